"""SPHERE for EasyEdit: sequential model editing on hyperspheres (arXiv 2510.01172)."""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks.drift_guard import DriftGuard
    from .callbacks.he_tracker import HETracker
    from .core.hyperspherical import hyperspherical_energy
    from .core.projection import PrincipalSpace
    from .datasets.loaders import load_records
    from .easyedit.editor import track
    from .easyedit.plugin import register, unregister
    from .editing.callbacks import EditCallback, EditEvent, StopEditing
    from .editing.pipeline import apply_sphere_to_model
    from .editing.session import EditSession
    from .hparams import SPHEREHyperParams
    from .methods.registry import register_method, unregister_method
    from .models.loading import load_model
    from .runs.run import run

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
    "load_records",
    "register",
    "register_method",
    "run",
    "track",
    "unregister",
    "unregister_method",
]

# Imported when asked for: torch and transformers take seconds, and `sphere-easyedit doctor` must start without them.
_HOMES = MappingProxyType({
    "DriftGuard": ".callbacks.drift_guard",
    "EditCallback": ".editing.callbacks", "EditEvent": ".editing.callbacks", "EditSession": ".editing.session",
    "HETracker": ".callbacks.he_tracker", "PrincipalSpace": ".core.projection", "SPHEREHyperParams": ".hparams",
    "StopEditing": ".editing.callbacks",
    "apply_sphere_to_model": ".editing.pipeline", "hyperspherical_energy": ".core.hyperspherical",
    "load_model": ".models.loading", "load_records": ".datasets.loaders", "run": ".runs.run",
    "register_method": ".methods.registry", "unregister_method": ".methods.registry",
    "register": ".easyedit.plugin", "track": ".easyedit.editor", "unregister": ".easyedit.plugin",
})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
