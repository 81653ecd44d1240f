"""The host's own SPHERE, which the plugin replaces; it is an error to end up here."""

from dataclasses import dataclass

from ..alphaedit.AlphaEdit_main import AlphaEditHyperParams


@dataclass(kw_only=True)
class SPHEREHyperParams(AlphaEditHyperParams):
    cumulative_ratio: float
    suppression_strength: float


def apply_SPHERE_to_model(model, tok, requests: list[dict], hparams: SPHEREHyperParams, copy=False,
                          return_orig_weights=False, **kwargs):
    raise AssertionError("the host's own SPHERE was called")
