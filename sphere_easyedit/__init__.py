"""SPHERE for EasyEdit: sequential model editing on hyperspheres (arXiv 2510.01172)."""

from .callbacks import EditCallback, EditEvent, HETracker
from .easyedit import register, track, unregister
from .editing.session import EditSession
from .hparams import SPHEREHyperParams
from .hyperspherical import hyperspherical_energy
from .projection import PrincipalSpace
from .wrapper import apply_sphere_to_model

__version__ = "0.1.0"

__all__ = [
    "EditCallback",
    "EditEvent",
    "EditSession",
    "HETracker",
    "PrincipalSpace",
    "SPHEREHyperParams",
    "apply_sphere_to_model",
    "hyperspherical_energy",
    "register",
    "track",
    "unregister",
]
