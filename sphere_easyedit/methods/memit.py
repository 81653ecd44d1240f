"""MEMIT (arXiv 2210.07229): weighs keys by the inverse of their covariance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..models.architecture import EditableModel
from .base import Method
from .covariance import stored_factor
from .solvers import CovarianceMetric, KeyHistory, KeyMetric, plain_memit_keys
from .statistics_fingerprint import StatisticsFile
from .tensor_store import TensorStore

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)


class MEMIT(Method):
    """``dW = R K^T (lambda C + K K^T)^-1``; with ``keep_previous_keys`` earlier keys join the bracket (Eq. 69)."""

    name = "MEMIT"
    required = (("mom2_update_weight",),)
    reads_target_values = True
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType({"mom2_update_weight": 15000})

    def key_metrics(self, editable: EditableModel, hparams: SPHEREHyperParams,
                    statistics: Mapping[int, StatisticsFile], store: TensorStore) -> dict[int, KeyMetric | None]:
        metrics: dict[int, KeyMetric | None] = {}
        for layer, file in statistics.items():
            try:
                factor = stored_factor(file.path, editable.d_in(layer), editable.device(layer), store)
                metrics[layer] = CovarianceMetric(factor, hparams.mom2_update_weight)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                logger.warning("layer %d: the second moment of keys is not positive definite; each batch solves "
                               "densely. Collect statistics from more text (mom2_n_samples)", layer)
                metrics[layer] = None
        return metrics

    def solve_densely(self, metric: KeyMetric | None, moment: Callable[[], Tensor], keys: Tensor, history: KeyHistory,
                      hparams: SPHEREHyperParams) -> Tensor:
        return plain_memit_keys(moment(), hparams.mom2_update_weight, keys, history)
