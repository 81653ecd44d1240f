"""AlphaEdit (arXiv 2410.02355): projects keys on the null space of preserved knowledge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..models.architecture import EditableModel
from .base import Method
from .covariance import load_null_space, stored_null_space
from .solvers import KeyHistory, KeyMetric, NullSpace, NullSpaceMetric, plain_alphaedit_keys
from .statistics_fingerprint import StatisticsFile
from .tensor_store import TensorStore

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)


class AlphaEdit(Method):
    """``dW = R K^T P0 (K_p K_p^T P0 + K K^T P0 + L2 I)^-1`` with K_p every earlier key."""

    name = "AlphaEdit"
    default_alpha = 0.5
    default_stage = "layer"
    required = (("L2",), ("nullspace_threshold", "nullspace_share"))
    always_keeps_keys = True
    uses_null_space = True
    reads_target_values = True
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"L2": 10, "P_loc": None, "nullspace_threshold": 2e-2})

    def needs_statistics(self, hparams: SPHEREHyperParams) -> bool:
        return hparams.P_loc is None or not Path(hparams.P_loc).exists()

    def key_metrics(self, editable: EditableModel, hparams: SPHEREHyperParams,
                    statistics: Mapping[int, StatisticsFile], store: TensorStore) -> dict[int, KeyMetric | None]:
        spaces = self._null_spaces(editable, hparams, statistics, store)
        return {layer: NullSpaceMetric(space, hparams.L2, store) for layer, space in spaces.items()}

    def _null_spaces(self, editable: EditableModel, hparams: SPHEREHyperParams,
                     statistics: Mapping[int, StatisticsFile], store: TensorStore) -> dict[int, NullSpace]:
        if hparams.P_loc is not None:
            path = Path(hparams.P_loc)
            if path.exists():
                spaces = load_null_space(path, editable.layers, editable.d_in(editable.layers[0]))
                return {layer: space.on(editable.device(layer), store) for layer, space in spaces.items()}
            logger.info("P_loc %s does not exist: the null space is computed from the keys' second moment", path)
        share = hparams.nullspace_share
        threshold = None if share is not None else hparams.nullspace_threshold
        return {layer: stored_null_space(file.path, editable.d_in(layer), threshold, share, editable.device(layer),
                                        store) for layer, file in statistics.items()}

    def solve_densely(self, metric: KeyMetric | None, moment: Callable[[], Tensor], keys: Tensor, history: KeyHistory,
                      hparams: SPHEREHyperParams) -> Tensor:
        assert isinstance(metric, NullSpaceMetric)
        return plain_alphaedit_keys(metric.space, metric.ridge, keys, history)
