"""Which hyperparameters are searched, and in which ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..hparams import SPHEREHyperParams

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LAYERS = "layers"
FIRST, NUMBER = "first_layer", "num_layers"
_MOST_LAYERS = 8
_SHARE = 0.6

# Low, high, and whether the scale is logarithmic.
_RANGES = MappingProxyType({
    "v_lr": (0.02, 2.0, True),
    "step_norm_factor": (0.1, 1.0, True),
    "clamp_norm_factor": (0.5, 8.0, True),
    "nullspace_share": (0.2, 0.98, False),
})
# Their scale is the model's: searched from a 30th to 30 times the value of the start. With one
# range for all models, half of the trials on SmolLM2-135M edited nothing.
_RELATIVE = frozenset({"L2", "mom2_update_weight", "ft_lr", "kl_factor"})
_RELATIVE_RANGE = 30.0


def searched_names(start: SPHEREHyperParams) -> list[str]:
    """Hyperparameters that can be searched: those of the target values, the layers, and what the base method requires.

    SPHERE's gamma and alpha are not among them: what they prevent shows in long runs only, so that short trials
    would always turn them off.
    """
    required = [name for group in start.method.required for name in group if name in _RANGES or name in _RELATIVE]
    if start.method.fine_tunes:
        return [LAYERS, *required]
    step = "v_lr" if start.normalised_steps is None else "step_norm_factor"
    return [LAYERS, step, "clamp_norm_factor", *required]


@dataclass(frozen=True)
class SearchSpace:
    """The hyperparameters of a search.

    Attributes:
        start: where the search starts; what is not searched stays as it is here.
        names: of the searched hyperparameters (see ``searched_names``).
        layers: numbers of the layers that can be edited, ascending.
    """

    start: SPHEREHyperParams
    names: Sequence[str]
    layers: Sequence[int]

    def start_values(self) -> dict[str, Any]:
        """The parameters of ``start``: a guess for what they can't express, layers with gaps and a threshold."""
        values: dict[str, Any] = {name: getattr(self.start, name) for name in self.names if name != LAYERS}
        if "nullspace_share" in values:
            values["nullspace_share"] = self.start.nullspace_share or _SHARE
        if LAYERS in self.names:
            values |= {FIRST: self.layers.index(self.start.layers[0]), NUMBER: len(self.start.layers)}
        return values

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter; ranges are widened to hold the values of ``start``."""
        from optuna.distributions import FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for name, value in self.start_values().items():
            if name == FIRST:
                found[name] = IntDistribution(0, len(self.layers) - 1)
            elif name == NUMBER:
                found[name] = IntDistribution(1, max(min(_MOST_LAYERS, len(self.layers)), value))
            elif name in _RELATIVE:
                found[name] = FloatDistribution(value / _RELATIVE_RANGE, value * _RELATIVE_RANGE, log=True)
            else:
                low, high, log = _RANGES[name]
                found[name] = FloatDistribution(min(low, value), max(high, value), log=log)
        return found

    def changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters that differ from ``start`` for these values of the parameters, to four digits."""
        found: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in values.items()
                                 if name not in {FIRST, NUMBER}}
        if FIRST in values:
            found |= {LAYERS: list(self.layers[values[FIRST]: values[FIRST] + values[NUMBER]])}
        if "nullspace_share" in found:  # it replaces both
            found |= {"nullspace_threshold": None, "P_loc": None}
        return found
