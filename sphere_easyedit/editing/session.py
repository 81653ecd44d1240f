"""All state that outlives a batch, tied to one model object."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.projection import PrincipalSpace
from ..hparams import SPHEREHyperParams
from ..methods.solvers import KeyHistory, KeyMetric
from ..methods.statistics_origin import StatisticsFile
from ..methods.tensor_store import TensorStore
from ..models.architecture import EditableModel
from ..models.checks import check_model, default_torch_settings
from ..models.fingerprint import Fingerprint
from ..models.module_discovery import ModuleNames
from ..models.output_path import OutputPath
from ..utils.files import atomic_write
from ..utils.locks import exclusive
from ..utils.messages import kind_and_text
from .checkpoints import check_whole, damaged, put_weights, resumable, session_path
from .gram_matrices import GramMatrix

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_sphere_session"
_FORMAT = "sphere-easyedit session 1"
_EXECUTOR = "executor"
_DERIVED = ("contexts", "paths", "metrics", "statistics", "spaces", "store", "engine_caches")


class EditSession:
    """What sequential editing of one model carries from batch to batch.

    It notices changes from outside in the weights of the edited layers, not in the rest of the model.

    Attributes:
        num_edits, num_batches: edited so far.
        contexts: context templates, each with one ``{}``; None until made.
        original: weights ``(d_out, d_in)`` of the edited layers before the first edit, on the CPU.
        unrestrained: PRUNE's weights that editing goes on from, on the CPU; else empty.
        history: earlier keys by layer.
        paths: how outputs of the edited weights reach the residual stream, by layer; rebuilt when needed, not saved.
        metrics: how keys are weighed, by layer; rebuilt when needed, not saved.
        statistics: the files of the keys' second moments as they were found to fit, by layer; looked at again when
            needed, not saved.
        store: where metrics and histories are kept; None until made.
        spaces: principal spaces of the original weights, by layer and how they were made; rebuilt when needed, not
            saved.
        ranks: of the last principal space, by layer: where the next one's is looked for first.
        grams: Gram matrices of the weights as the last batch left them, by layer, where one was asked for; rebuilt when
            needed, not saved.
        engine_caches: what an engine derived from the original model, by name; rebuilt when needed, not saved.
        engine_history: what an engine adds to with every batch, by name (on the CPU).
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._key: str | None = None
        self._names: ModuleNames | None = None
        self._clear()

    def _clear(self) -> None:
        self.num_edits = 0
        self.num_batches = 0
        self.contexts: list[str] | None = None
        self.original: dict[int, Tensor] = {}
        self.unrestrained: dict[int, Tensor] = {}
        self.history: dict[int, KeyHistory] = {}
        self.paths: dict[int, OutputPath] = {}
        self.metrics: dict[int, KeyMetric | None] = {}
        self.statistics: dict[int, StatisticsFile] = {}
        self.store: TensorStore | None = None
        self.spaces: dict[str, PrincipalSpace] = {}
        self.ranks: dict[int, int] = {}
        self.grams: dict[int, GramMatrix] = {}
        self.engine_caches: dict[str, Any] = {}
        self.engine_history: dict[str, Tensor] = {}
        self._fingerprints: dict[int, Fingerprint] = {}  # of the weights as the last batch left them
        self._base: dict[int, Fingerprint] = {}  # of the original ones

    def __reduce__(self) -> Any:
        # A copied or pickled model starts with an empty session: the history belongs to the model it was made on.
        return (EditSession, ())

    @classmethod
    def of(cls, model: nn.Module) -> EditSession:
        """The session that lives on a model object, made if there is none.

        Raises:
            TypeError, ValueError: it is no decoder of transformers (see ``inputs.check_model``).
        """
        check_model(model)
        session = getattr(model, _ATTRIBUTE, None)
        if not isinstance(session, cls):
            session = cls()
            setattr(model, _ATTRIBUTE, session)
        return session

    @classmethod
    def attach(cls, model: nn.Module, session: EditSession) -> None:
        """Make a session the one that lives on a model object.

        Raises:
            TypeError: it is no session, or the model is of a wrong kind; ValueError: see ``inputs.check_model``.
        """
        check_model(model)
        if not isinstance(session, cls):
            raise TypeError(f"the session is a {type(session).__name__}: give an EditSession")
        setattr(model, _ATTRIBUTE, session)

    def is_original(self, editable: EditableModel) -> bool:
        """Whether the model's edited layers are, bit for bit, as they were before this session's first edit."""
        return self._is_restored(editable)

    def settle(self) -> None:
        """Forget what a session that was saved and loaded would not know, so that both go on to the same bits.

        Gram matrices, ranks and the factors of earlier keys are derived anew; carried on, they differ by rounding.
        """
        self.ranks, self.grams = {}, {}
        self.history = {layer: history.keys_only() for layer, history in self.history.items()}

    def bind(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        """Make the session fit the model as it stands, starting afresh where it does not.

        Raises:
            ValueError: the session belongs to another model object.
        """
        if self._model is not None and self._model() is not editable.model:
            raise ValueError("this EditSession belongs to another model object: give every model a session of its own")
        key = hparams.session_key()
        if self._key is not None and self._key != key:
            logger.warning("hyperparameters that shape the session changed after %d edits: starting afresh",
                           self.num_edits)
            self._clear()
        elif self._fingerprints and (changed := self._changed_layers(editable)):
            restored = self._is_restored(editable)
            # EasyEdit restores after every edit that is not sequential; any other change is worth a warning.
            logger.log(logging.INFO if restored else logging.WARNING,
                       "weights of layers %s were %s from outside after %d edits: starting afresh", changed,
                       "restored" if restored else "changed", self.num_edits)
            # What was derived from the original weights still holds where they are back.
            kept = dict(vars(self)) if restored else {}
            self._clear()
            vars(self).update({name: kept[name] for name in _DERIVED if name in kept})
        self._model, self._key, self._names = weakref.ref(editable.model), key, editable.names
        if not self.original:
            self.original = {layer: editable.weight(layer).to("cpu", copy=True) for layer in editable.layers}
            self._base = {layer: Fingerprint.of(editable.weight(layer)) for layer in editable.layers}

    def known_names(self, model: nn.Module, hparams: SPHEREHyperParams) -> ModuleNames | None:
        """Where this model keeps its parts, if an earlier batch with the same settings has found out."""
        is_same = self._model is not None and self._model() is model and self._key == hparams.session_key()
        return self._names if is_same else None

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Everything the session holds is as before if the context ends in an error."""
        saved = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(saved)
            raise

    def _changed_layers(self, editable: EditableModel) -> list[int]:
        return [layer for layer, was in self._fingerprints.items() if Fingerprint.of(editable.weight(layer)) != was]

    def _is_restored(self, editable: EditableModel) -> bool:
        return all(Fingerprint.of(editable.weight(layer)) == was for layer, was in self._base.items())

    def commit(self, editable: EditableModel, num_edits: int, history: dict[int, KeyHistory],
               unrestrained: dict[int, Tensor], grams: dict[int, GramMatrix]) -> None:
        """Take over a finished batch; nothing before this call changed the session's state of edits."""
        fingerprints = {layer: Fingerprint.of(editable.weight(layer)) for layer in editable.layers}
        self.history, self.unrestrained, self._fingerprints = history, unrestrained, fingerprints
        self.grams = dict(grams)
        self.num_edits += num_edits
        self.num_batches += 1

    def rollback(self, to: int, checkpoints: Path | None = None) -> None:
        """Bring the model's edited layers and this session back to where they stood after so many edits.

        Weights are restored bit for bit, and editing goes on to the bits of a run that had stopped there. Either all of
        it is restored or nothing changes. A later checkpoint of the same original weights can be gone to as well.

        Args:
            to: edits that stay. 0 needs no checkpoint: the original weights are in the session.
            checkpoints: folder with ``weights-TO.safetensors`` and ``session-TO.safetensors``, as a run directory's
                ``checkpoints``.

        Raises:
            ValueError: the session has not edited a model that still exists, there is no such checkpoint, or it is
                damaged, of another model or of settings that shape the session otherwise.
        """
        model = None if self._model is None else self._model()
        if model is None or self._names is None:
            raise ValueError("the session is tied to no model, so there is none to roll back: edit with it first, or "
                             "load the model that it was made on")
        kept = [0, *(resumable(checkpoints) if checkpoints is not None else [])]
        if to not in kept:
            where = "no folder of checkpoints was given" if checkpoints is None else f"checkpoints are in {checkpoints}"
            raise ValueError(f"can't roll back to {to} edits ({where}): possible are {', '.join(map(str, kept))}")
        with default_torch_settings(), exclusive(model):
            self._roll_back(EditableModel(model, self._names, sorted(self.original)), to, checkpoints)

    def _roll_back(self, editable: EditableModel, to: int, checkpoints: Path | None) -> None:
        model = editable.model
        attached = vars(model).get(_ATTRIBUTE)
        try:
            with editable.restored_on_error():
                found = self._restored(editable, to, checkpoints)
        finally:
            vars(model).pop(_ATTRIBUTE, None)
            if attached is not None:
                setattr(model, _ATTRIBUTE, attached)
        # What was derived from the original weights still holds, the templates apart, which the checkpoint has.
        kept_state = {name: vars(self)[name] for name in _DERIVED if name != "contexts"}
        vars(self).update({**vars(found), **kept_state, "_model": self._model, "_names": self._names})

    def _restored(self, editable: EditableModel, to: int, checkpoints: Path | None) -> EditSession:
        """A session as it was after so many edits, with the weights in the model; that of no edits if ``to`` is 0."""
        for layer, weight in self.original.items():
            editable.set_weight(layer, weight)
        if not self._is_restored(editable):
            raise ValueError("the original weights can't be put back bit for bit: the model's dtype was changed since. "
                             "Load the model anew")
        if to == 0 or checkpoints is None:
            found = EditSession()
            found._key, found.original, found.contexts = self._key, self.original, self.contexts
            # Noticed, too, if the weights are changed from outside before the next batch.
            found._base, found._fingerprints = self._base, dict(self._base)
            return found
        found = resume_from(editable, checkpoints, to)
        if found._key != self._key:
            raise ValueError(f"the checkpoint after {to} edits in {checkpoints} was made with other hyperparameters "
                             "than this session's: give the folder of a run with the same ones")
        if changed := found._changed_layers(editable):
            raise ValueError(f"the weights after {to} edits in {checkpoints} are not those that its session left, in "
                             f"layers {changed}: the file was exchanged or damaged. Give another checkpoint")
        return found

    def save(self, path: Path) -> None:
        """Write counters, contexts, original and unrestrained weights and earlier keys to one safetensors file."""
        if self._key is None:
            raise ValueError("the session has not been used yet: there is nothing to save")
        tensors = {f"original.{layer}": weight for layer, weight in self.original.items()}
        tensors |= {f"unrestrained.{layer}": weight for layer, weight in self.unrestrained.items()}
        tensors |= {f"keys.{layer}": history.keys for layer, history in self.history.items()}
        tensors |= {f"{_EXECUTOR}.{name}": tensor for name, tensor in self.engine_history.items()}
        for kind, prints in (("edited", self._fingerprints), ("base", self._base)):
            for layer, fingerprint in prints.items():
                tensors |= {f"{kind}.rows.{layer}": fingerprint.rows, f"{kind}.columns.{layer}": fingerprint.columns}
        state = {"key": self._key, "num_edits": self.num_edits, "num_batches": self.num_batches,
                 "contexts": self.contexts}
        with atomic_write(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                      metadata={"format": _FORMAT, "state": json.dumps(state)})

    @classmethod
    def load(cls, path: Path) -> EditSession:
        """Read a saved session; it ties itself to the model of the next batch, whose weights must be those it left.

        Raises:
            ValueError: the file is damaged or no session.
        """
        try:
            with default_torch_settings():
                return cls._read(path)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} can't be read as a saved session ({kind_and_text(error)})") from error

    @classmethod
    def _read(cls, path: Path) -> EditSession:
        session = cls()
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no saved session (format {metadata.get('format')!r})")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        state = json.loads(metadata["state"])
        session._key, session.contexts = state["key"], state["contexts"]
        session.num_edits, session.num_batches = state["num_edits"], state["num_batches"]

        def by_layer(kind: str) -> dict[int, Tensor]:
            names = [name for name in tensors if name.startswith(f"{kind}.")]
            return {int(name.rsplit(".", 1)[1]): tensors[name] for name in names}

        session.engine_history = {name.partition(".")[2]: tensor for name, tensor in tensors.items()
                                    if name.startswith(f"{_EXECUTOR}.")}
        session.original, session.unrestrained = by_layer("original"), by_layer("unrestrained")
        session.history = {layer: KeyHistory(keys, None) for layer, keys in by_layer("keys").items()}
        for kind, target in (("edited", session._fingerprints), ("base", session._base)):
            rows, columns = by_layer(f"{kind}.rows"), by_layer(f"{kind}.columns")
            target.update({layer: Fingerprint(rows[layer], columns[layer]) for layer in rows})
        return session


def resume_from(editable: EditableModel, folder: Path, num_edits: int) -> EditSession:
    """Bring a model just loaded to a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or was made from another model than this one.
    """
    check_whole(folder, num_edits, session=True)
    path = session_path(folder, num_edits)
    try:
        session = EditSession.load(path)
    except Exception as error:
        raise damaged(folder, num_edits, path, f"{type(error).__name__}: {error}") from error
    if not session.is_original(editable):
        raise ValueError(f"the run in {folder.parent} began with other weights than this model's: load the model that "
                         "it edited, before any edit")
    put_weights(editable, folder, num_edits, checked=True)
    EditSession.attach(editable.model, session)
    return session
