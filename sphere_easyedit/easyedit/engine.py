"""The engine that solves batches by EasyEdit's functions (``executor: easyedit``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..editing.engines import Batch, ExecutorEngine
from ..editing.session import EditSession
from ..editing.solve import warn_of_indirect_outputs
from ..hparams import SPHEREHyperParams
from ..methods.registry import METHODS
from ..models.architecture import EditableModel
from .discovery import find_method
from .executor import WrappedExecutor
from .method_hparams import runs_another
from .simie import BASE_METHODS, WrappedSimIE


class EasyEditEngine(ExecutorEngine):
    """Solves batches by one of EasyEdit's functions.

    Args:
        executor: the wrapped function.
        hparams, arguments: as for ``ExecutorEngine``.
    """

    def __init__(self, executor: WrappedExecutor, hparams: SPHEREHyperParams, arguments: Mapping[str, Any]) -> None:
        super().__init__(executor, hparams, arguments)
        self._executor = executor

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        self._executor.check(hparams, editable, batch_size)

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        if METHODS.find(hparams.base_alg) is not None:
            warn_of_indirect_outputs(editable, batch.tok, session)
        return batch


def easyedit_engine(hparams: SPHEREHyperParams, session: EditSession, arguments: Mapping[str, Any]) -> EasyEditEngine:
    """The engine of EasyEdit's function for ``base_alg``.

    Raises:
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: EasyEdit has no such method, or it can't be wrapped.
    """
    function, batchable = find_method("base_alg", hparams.base_alg)
    if runs_another(function):
        base_method = hparams.executor_hparams.get("base_method")
        if base_method not in BASE_METHODS:
            raise ValueError(f"base_method is {base_method!r}: {hparams.base_alg} can be wrapped on "
                             f"{', '.join(BASE_METHODS)}; give one of them")
        base = WrappedExecutor(base_method, find_method("base_method", base_method)[0], session, batchable=False)
        executor: WrappedExecutor = WrappedSimIE(hparams.base_alg, function, session, base)
    else:
        executor = WrappedExecutor(hparams.base_alg, function, session, batchable)
    return EasyEditEngine(executor, hparams, arguments)
