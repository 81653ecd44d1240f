"""State of sequential editing that is carried from batch to batch, for one model object."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.projection import PrincipalSpace
from ..hparams import SPHEREHyperParams
from ..methods.solvers import KeyHistory, KeyMetric
from ..methods.statistics_fingerprint import StatisticsFile
from ..methods.tensor_store import TensorStore
from ..models.architecture import EditableModel
from ..models.checks import check_model, default_torch_settings
from ..models.fingerprint import Fingerprint
from ..models.module_discovery import ModuleNames
from ..models.output_path import OutputPath
from ..utils.files import atomic_write
from ..utils.locks import exclusive
from ..utils.messages import kind_and_text
from . import key_files
from .checkpoints import damaged, load_weights, resumable, session_path, verify_checksums
from .gram_matrices import GramMatrix
from .row_layout import KnownLayouts

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_sphere_session"
_FORMAT = "sphere-easyedit session 1"
_FORMAT_SHARED = "sphere-easyedit session 2"  # refers to files of keys, which older versions would leave out
_ENGINE = "executor"  # prefix of the engine's tensors in the file
_DERIVED = ("contexts", "paths", "layouts", "metrics", "statistics", "spaces", "store", "engine_caches")


class EditSession:
    """State that sequential editing carries from batch to batch, for one model.

    Changes that other code makes to the weights of the edited layers are detected; changes elsewhere in the model are
    not. Attributes marked * are not saved: they are derived again when needed.

    Attributes:
        num_edits, num_batches: edited so far.
        contexts: context templates, each with one ``{}``; None until generated.
        original: weights ``(d_out, d_in)`` of the edited layers before the first edit, on the CPU.
        unrestrained: PRUNE's weights that the next batch starts from, on the CPU; else empty.
        history: earlier keys by layer.
        key_files: names of the files that have the first of these keys, in the folder of checkpoints.
        paths: * output paths of the edited weights by layer (see ``models.output_path``).
        layouts: * how rows are laid out in the optimisation of target values.
        metrics: * how keys are weighed, by layer.
        statistics: * files of the keys' second moments, as they were when checked, by layer.
        store: * where metrics and histories are kept; None until created.
        spaces: * principal spaces of the original weights, by layer and gamma.
        ranks: * rank of the last principal space by layer, where the next search starts.
        grams: * Gram matrices of the current weights by layer, where any was computed.
        engine_caches: * what an engine derived from the original model, by name.
        engine_history: tensors that an engine updates with every batch, by name, on the CPU.
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
        self.key_files: tuple[str, ...] = ()
        self.paths: dict[int, OutputPath] = {}
        self.layouts = KnownLayouts()
        self.metrics: dict[int, KeyMetric | None] = {}
        self.statistics: dict[int, StatisticsFile] = {}
        self.store: TensorStore | None = None
        self.spaces: dict[str, PrincipalSpace] = {}
        self.ranks: dict[int, int] = {}
        self.grams: dict[int, GramMatrix] = {}
        self.engine_caches: dict[str, Any] = {}
        self.engine_history: dict[str, Tensor] = {}
        self._fingerprints: dict[int, Fingerprint] = {}  # of the weights after the last batch
        self._base: dict[int, Fingerprint] = {}  # of the original weights

    def __reduce__(self) -> Any:
        # Copies and pickles of a model start with an empty session.
        return (EditSession, ())

    @classmethod
    def of(cls, model: nn.Module) -> EditSession:
        """The session stored on a model object, created if there is none.

        Raises:
            TypeError, ValueError: see ``checks.check_model``.
        """
        check_model(model)
        session = getattr(model, _ATTRIBUTE, None)
        if not isinstance(session, cls):
            session = cls()
            setattr(model, _ATTRIBUTE, session)
        return session

    @classmethod
    def attach(cls, model: nn.Module, session: EditSession) -> None:
        """Store a session on a model object.

        Raises:
            TypeError, ValueError: it is not a session; see ``checks.check_model``, too.
        """
        check_model(model)
        if not isinstance(session, cls):
            raise TypeError(f"the session is a {type(session).__name__}: give an EditSession")
        setattr(model, _ATTRIBUTE, session)

    def is_original(self, editable: EditableModel) -> bool:
        """Whether the model's edited layers equal, bit for bit, the weights before this session's first edit."""
        return all(Fingerprint.of(editable.weight(layer)) == old for layer, old in self._base.items())

    def drop_derived(self) -> None:
        """Drop Gram matrices and ranks, which a loaded session does not have either.

        Derived again, they differ by rounding; so both sessions then continue with identical results. The factors of
        earlier keys stay: derived again from the keys, they are the same to the bit, but that takes ever longer.
        """
        self.ranks, self.grams = {}, {}

    def bind(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        """Tie the session to the model, and reset it if settings or edited weights changed since the last batch.

        Raises:
            ValueError: the session belongs to another model object.
        """
        if self._model is not None and self._model() is not editable.model:
            raise ValueError("this EditSession belongs to another model object: give each model its own session")
        key = hparams.session_key()
        if self._key is not None and self._key != key:
            logger.warning("hyperparameters that shape the session changed after %d edits: starting afresh",
                           self.num_edits)
            self._clear()
        elif self._fingerprints and (changed := self._changed_layers(editable)):
            restored = self.is_original(editable)
            # EasyEdit restores the weights after each non-sequential edit; any other change is worth a warning.
            logger.log(logging.INFO if restored else logging.WARNING,
                       "weights of layers %s were %s from outside after %d edits: starting afresh", changed,
                       "restored" if restored else "changed", self.num_edits)
            # With the original weights back, what was derived from them is still valid.
            kept = dict(vars(self)) if restored else {}
            self._clear()
            vars(self).update({name: kept[name] for name in _DERIVED if name in kept})
        self._model, self._key, self._names = weakref.ref(editable.model), key, editable.names
        if not self.original:
            self.original = {layer: editable.weight(layer).to("cpu", copy=True) for layer in editable.layers}
            self._base = {layer: Fingerprint.of(editable.weight(layer)) for layer in editable.layers}

    def known_names(self, model: nn.Module, hparams: SPHEREHyperParams) -> ModuleNames | None:
        """Module names of this model, if an earlier batch with the same settings found them."""
        is_same = self._model is not None and self._model() is model and self._key == hparams.session_key()
        return self._names if is_same else None

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Restores the session if the context ends in an error."""
        saved = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(saved)
            raise

    def forget_keys(self, edits: Sequence[int]) -> None:
        """Leave out the keys of earlier edits, which are about to be made anew; after ``prepare_session``.

        Args:
            edits: in the order of the keys, from 0.

        Raises:
            ValueError: there is no such edit, or one is named twice.
        """
        chosen = set(edits)
        if len(chosen) < len(edits) or not chosen <= set(range(self.num_edits)):
            raise ValueError(f"edits to make anew are {sorted(edits)[:10]}: give different numbers from 0 to "
                             f"{self.num_edits - 1}")
        if not chosen or all(history.num_keys == 0 for history in self.history.values()):
            return
        kept = torch.tensor([edit for edit in range(self.num_edits) if edit not in chosen], dtype=torch.long)
        self.history = {layer: KeyHistory(history.keys[:, kept], self.metrics[layer], history.device, self.store)
                        for layer, history in self.history.items()}
        self.key_files = ()

    def _changed_layers(self, editable: EditableModel) -> list[int]:
        return [layer for layer, was in self._fingerprints.items() if Fingerprint.of(editable.weight(layer)) != was]

    def commit(self, editable: EditableModel, num_edits: int, history: dict[int, KeyHistory],
               unrestrained: dict[int, Tensor], grams: dict[int, GramMatrix]) -> None:
        """Record a finished batch; nothing before this call changes what the session knows of edits."""
        fingerprints = {layer: Fingerprint.of(editable.weight(layer)) for layer in editable.layers}
        self.history, self.unrestrained, self._fingerprints = history, unrestrained, fingerprints
        self.grams = dict(grams)
        self.num_edits += num_edits
        self.num_batches += 1

    def rollback(self, to: int, checkpoints: Path | None = None) -> None:
        """Restore the model's edited layers and this session as they were after ``to`` edits.

        Weights are restored bit for bit, and further editing gives the results of a run that had stopped there. On an
        error nothing changes. A later checkpoint of the same original weights can be restored, too.

        Args:
            to: number of edits to keep. 0 needs no checkpoint, since the session has the original weights.
            checkpoints: folder with ``weights-TO.safetensors`` and ``session-TO.safetensors``, such as a run
                directory's ``checkpoints``.

        Raises:
            ValueError: the session has no model, or the checkpoint is missing, damaged, or of another model or other
                settings.
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
            self._restore(EditableModel(model, self._names, sorted(self.original)), to, checkpoints)

    def _restore(self, editable: EditableModel, to: int, checkpoints: Path | None) -> None:
        model = editable.model
        attached = vars(model).get(_ATTRIBUTE)
        try:
            with editable.restoring():
                restored = self._session_at(editable, to, checkpoints)
        finally:
            vars(model).pop(_ATTRIBUTE, None)
            if attached is not None:
                setattr(model, _ATTRIBUTE, attached)
        # What was derived from the original weights is still valid; context templates come from the checkpoint.
        kept_state = {name: vars(self)[name] for name in _DERIVED if name != "contexts"}
        vars(self).update({**vars(restored), **kept_state, "_model": self._model, "_names": self._names})

    def _session_at(self, editable: EditableModel, to: int, checkpoints: Path | None) -> EditSession:
        """The session after ``to`` edits; its weights are put into the model."""
        for layer, weight in self.original.items():
            editable.set_weight(layer, weight)
        if not self.is_original(editable):
            raise ValueError("the original weights can't be put back bit for bit: the model's dtype was changed since. "
                             "Load the model again")
        if to == 0 or checkpoints is None:
            session = EditSession()
            session._key, session.original, session.contexts = self._key, self.original, self.contexts
            # Fingerprints detect changes from outside before the next batch.
            session._base, session._fingerprints = self._base, dict(self._base)
            return session
        session = resume_from(editable, checkpoints, to)
        if session._key != self._key:
            raise ValueError(f"the checkpoint after {to} edits in {checkpoints} was made with other hyperparameters "
                             "than this session's: give the folder of a run with the same ones")
        if changed := session._changed_layers(editable):
            raise ValueError(f"the weights after {to} edits in {checkpoints} are not those that its session left, in "
                             f"layers {changed}: the file was exchanged or damaged. Give another checkpoint")
        return session

    def save(self, path: Path, share_keys: bool = False) -> None:
        """Write counters, contexts, original and unrestrained weights and earlier keys to a safetensors file.

        Args:
            share_keys: write most of the keys to files beside it that later checkpoints share (see ``key_files``).
        """
        if self._key is None:
            raise ValueError("the session has not been used yet, so there is nothing to save: edit a batch first")
        if share_keys:
            self.key_files = key_files.save_keys(path.parent, self.history, self.key_files)
        shared = self.key_files if share_keys else ()
        tensors = {f"original.{layer}": weight for layer, weight in self.original.items()}
        tensors |= {f"unrestrained.{layer}": weight for layer, weight in self.unrestrained.items()}
        tensors |= {f"keys.{layer}": history.columns(key_files.KEYS_A_FILE * len(shared), history.num_keys)
                    for layer, history in self.history.items()}
        tensors |= {f"{_ENGINE}.{name}": tensor for name, tensor in self.engine_history.items()}
        for kind, prints in (("edited", self._fingerprints), ("base", self._base)):
            for layer, fingerprint in prints.items():
                tensors |= {f"{kind}.rows.{layer}": fingerprint.rows, f"{kind}.columns.{layer}": fingerprint.columns}
        state = {"key": self._key, "num_edits": self.num_edits, "num_batches": self.num_batches,
                 "contexts": self.contexts, "key_files": shared}
        with atomic_write(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                      metadata={"format": _FORMAT_SHARED if shared else _FORMAT, "state": json.dumps(state)})

    @classmethod
    def load(cls, path: Path) -> EditSession:
        """Read a saved session. The next batch ties it to its model, whose weights must be those that were saved.

        Raises:
            ValueError: the file is damaged or holds no session.
        """
        try:
            with default_torch_settings():
                return cls._read(path)
        except (OSError, RuntimeError, SafetensorError, AttributeError, KeyError, TypeError,
                json.JSONDecodeError) as error:
            raise ValueError(f"{path} can't be read as a saved session ({kind_and_text(error)})") from error

    @classmethod
    def _read(cls, path: Path) -> EditSession:
        session = cls()
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") not in (_FORMAT, _FORMAT_SHARED):
                raise ValueError(f"{path} is not a saved session (format {metadata.get('format')!r})")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        state = json.loads(metadata["state"])
        session._key, session.contexts = state["key"], state["contexts"]
        session.num_edits, session.num_batches = state["num_edits"], state["num_batches"]

        def by_layer(kind: str) -> dict[int, Tensor]:
            names = [name for name in tensors if name.startswith(f"{kind}.")]
            return {int(name.rsplit(".", 1)[1]): tensors[name] for name in names}

        session.engine_history = {name.partition(".")[2]: tensor for name, tensor in tensors.items()
                                    if name.startswith(f"{_ENGINE}.")}
        session.original, session.unrestrained = by_layer("original"), by_layer("unrestrained")
        session.key_files = tuple(state.get("key_files", ()))
        earlier = key_files.load_keys(path.parent, session.key_files)
        session.history = {layer: KeyHistory(torch.cat([earlier[layer], keys], dim=1) if earlier else keys, None)
                           for layer, keys in by_layer("keys").items()}
        for kind, target in (("edited", session._fingerprints), ("base", session._base)):
            rows, columns = by_layer(f"{kind}.rows"), by_layer(f"{kind}.columns")
            target.update({layer: Fingerprint(rows[layer], columns[layer]) for layer in rows})
        return session


def resume_from(editable: EditableModel, folder: Path, num_edits: int) -> EditSession:
    """Put a checkpoint's weights and session on a freshly loaded model; returns the session.

    Raises:
        ValueError: the checkpoint is damaged, or was made from another model than this one.
    """
    verify_checksums(folder, num_edits, session=True)
    path = session_path(folder, num_edits)
    try:
        session = EditSession.load(path)
    except Exception as error:
        raise damaged(folder, num_edits, path, f"{type(error).__name__}: {error}") from error
    if not session.is_original(editable):
        raise ValueError(f"the run in {folder.parent} began with other weights than this model's: load the model that "
                         "it edited, before any edit")
    load_weights(editable, folder, num_edits, checked=True)
    EditSession.attach(editable.model, session)
    return session
