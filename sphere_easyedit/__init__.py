"""SPHERE for EasyEdit: sequential model editing on hyperspheres (arXiv 2510.01172)."""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import EditCallback, EditEvent, StopEditing
    from .drift_guard import DriftGuard
    from .easyedit import register, track, unregister
    from .editing.session import EditSession
    from .he_tracker import HETracker
    from .hparams import SPHEREHyperParams
    from .hyperspherical import hyperspherical_energy
    from .loading import load_model
    from .methods.registry import register_method, unregister_method
    from .projection import PrincipalSpace
    from .wrapper import apply_sphere_to_model

__version__ = "0.1.0"

__all__ = [
    "DriftGuard",
    "EditCallback",
    "EditEvent",
    "EditSession",
    "HETracker",
    "PrincipalSpace",
    "SPHEREHyperParams",
    "StopEditing",
    "apply_sphere_to_model",
    "hyperspherical_energy",
    "load_model",
    "register",
    "register_method",
    "track",
    "unregister",
    "unregister_method",
]

# Imported when asked for: torch and transformers take seconds, and `sphere-easyedit doctor` must start without them.
_HOMES = MappingProxyType({
    "DriftGuard": ".drift_guard",
    "EditCallback": ".callbacks", "EditEvent": ".callbacks", "EditSession": ".editing.session",
    "HETracker": ".he_tracker", "PrincipalSpace": ".projection", "SPHEREHyperParams": ".hparams",
    "StopEditing": ".callbacks",
    "apply_sphere_to_model": ".wrapper", "hyperspherical_energy": ".hyperspherical", "load_model": ".loading",
    "register_method": ".methods.registry", "unregister_method": ".methods.registry",
    "register": ".easyedit", "track": ".easyedit", "unregister": ".easyedit",
})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
