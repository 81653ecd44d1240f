"""Wraps EasyEdit's SimIE, which runs another method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from ..utils.locks import exclusive
from .executor import WrappedExecutor

BASE_METHODS = ("ROME", "MEMIT", "FT")  # those that SimIE runs, of the methods that can be wrapped

_KEY_MOMENTS = "matrix_P."  # (d_in, d_in) by parameter name, to which every request adds


class WrappedSimIE(WrappedExecutor):
    """SimIE: for each request in turn another method edits the original weights, and part of its change is kept.

    SimIE's function keeps its state on the hyperparameter object. Here the second moments of keys and the original
    weights are in the session, and the current weights are the model's, which SPHERE may have changed.

    Args:
        name, function, session: as for ``WrappedExecutor``.
        base: the other method, wrapped for the same session.
    """

    def __init__(self, name: str, function: Callable[..., Any], session: EditSession, base: WrappedExecutor) -> None:
        super().__init__(name, function, session)
        self._base = base
        self._batchable = True  # its function loops over the requests
        self._known = self._fields | base._known
        self._padding_side = base._padding_side

    def _method_hparams(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        own = super()._method_hparams(hparams, editable, batch_size)
        own._base_hparams = self._base._method_hparams(hparams, editable, 1)
        return own

    @contextmanager
    def _state(self, editable: EditableModel, hparams: SPHEREHyperParams, own: Any) -> Iterator[None]:
        # The other method's state is in the globals of its own modules (see ``__call__``).
        with exclusive(self._base._module), self._base._state(editable, hparams, own._base_hparams):
            moments = {name.removeprefix(_KEY_MOMENTS): moment for name, moment
                       in self._session.engine_history.items() if name.startswith(_KEY_MOMENTS)}
            if moments:
                own._simie_instance = self._resumed(editable, own, moments)
                own._simie_call_count = own._simie_total_edits = self._session.num_edits
            yield
        self._session.engine_history = {f"{_KEY_MOMENTS}{name}": moment.cpu() for name, moment
                                        in own._simie_instance.matrix_P.items()}

    def _resumed(self, editable: EditableModel, own: Any, moments: Mapping[str, Tensor]) -> Any:
        """SimIE's own object with the session's moments, the original weights and the model's current ones."""
        simie: Any = vars(self._module)["SimIE"](lamHyper=own.lamHyper, init=own.init_model, solver=own.solver)
        originals = {editable.parameter_name(layer): editable.orient(layer, weight)
                     for layer, weight in self._session.original.items()}
        simie.initialization(own.model_name, originals, own.device, own.fast)
        # Copies, since the method adds to them in place, and a failed batch must not change the session's.
        simie.matrix_P = {name: moments[name].to(held.device, copy=True) for name, held in simie.matrix_P.items()}
        simie.weights_copy = {editable.parameter_name(layer): editable.orient(layer, weight).to(
            simie.weights_copy[editable.parameter_name(layer)].device, copy=True)
            for layer, weight in editable.weights().items()}
        return simie

    def _prepare_statistics(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                            own: Any, stack: ExitStack) -> None:
        self._base._prepare_statistics(editable, tok, hparams, own._base_hparams, stack)
