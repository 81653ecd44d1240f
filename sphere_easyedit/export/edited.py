"""Reads the edited weights of a run directory, with their provenance, for export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..editing.checkpoints import choose_checkpoint, load_weights, resumable, session_path
from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams
from ..models.offload import writable_parameter
from ..runs.config import model_dtype, package_versions
from ..runs.directory import RunDirectory
from ..runs.schema import SUMMARY, Summary, read_record
from .checksums import base_fingerprint

logger = logging.getLogger(__name__)

_PACKAGES = ("sphere-easyedit", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Provenance:
    """Where edited weights come from, in JSON-serialisable values.

    Attributes:
        base: name or folder of the unedited model, as the run had it.
        base_fingerprint: see ``base_fingerprint``.
        base_dtype: that it was loaded in, for ``load_model``; None if it has several.
        method: base method, and SPHERE's alpha and gamma.
        num_edits: number of edits in the weights.
        num_facts: number of facts in the whole run.
        facts: SHA-256 over the whole run's facts in their order (``records_fingerprint``); None if not known.
        dataset, seed, batch_size: of the run; None if not known.
        settings: all hyperparameters.
        run_versions: versions of packages in the run.
        versions: versions of packages in the export.
        results: protocol and metrics before and after editing; None if the run did not measure these weights.
    """

    base: str
    base_fingerprint: str
    base_dtype: str | None
    method: str
    num_edits: int
    num_facts: int | None
    facts: str | None
    dataset: str | None
    seed: int | None
    batch_size: int | None
    settings: dict[str, Any]
    run_versions: dict[str, Any]
    versions: dict[str, Any]
    results: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Restore from ``to_dict``'s values.

        Raises:
            KeyError, TypeError: an entry is missing or of the wrong type.
        """
        found = cls(**{field.name: values[field.name] for field in fields(cls)})
        texts = (found.base, found.base_fingerprint, found.method)
        tables = (found.settings, found.run_versions, found.versions)
        if not (all(isinstance(text, str) for text in texts) and isinstance(found.num_edits, int)
                and all(isinstance(table, dict) for table in tables) and isinstance(found.base_dtype, str | None)
                and isinstance(found.results, dict | None)):
            raise TypeError("an entry of the provenance is of the wrong type")
        return found


@dataclass(frozen=True)
class WeightChange:
    """One edited parameter before and after editing, as the module stores it, on the CPU.

    Attributes:
        name: of the parameter.
        transposed: whether it is stored as ``(d_in, d_out)`` (GPT-2's ``Conv1D``).
        before, after: ``(d_out, d_in)``, or the transpose.
    """

    name: str
    transposed: bool
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class EditedWeights:
    """All edited parameters of a model, and where they come from."""

    changes: tuple[WeightChange, ...]
    provenance: Provenance

    @torch.no_grad()
    def copy_into(self, model: nn.Module) -> None:
        """Copy the edited weights into a model, bit for bit."""
        for change in self.changes:
            writable_parameter(model, change.name).copy_(change.after)


class ExportableRun:
    """A run directory to export from; its data set is not needed.

    Args:
        path: the run directory.
        at: number of edits after which to take the weights; None for the last weights that the run kept.

    Attributes:
        hparams: as the run resolved them.
        num_edits: number of edits in the weights.
        dtype: that the run's model was loaded in, for ``load_model``; None if it had several.

    Raises:
        ValueError: the directory is not a run, or it did not keep these weights.
    """

    def __init__(self, path: Path, at: int | None = None) -> None:
        self._run = RunDirectory(path)
        self._config = self._run.read_config()
        try:
            self.hparams = SPHEREHyperParams.from_dict(self._config["hparams"])
            self._described: dict[str, Any] = dict(self._config["run"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no run that can be exported: config.yaml lacks {error}") from error
        self.num_edits = choose_checkpoint(path, at, "nothing can be exported")
        self.dtype = model_dtype(self._config)

    def read(self, model: nn.Module) -> EditedWeights:
        """Read the run's weights and those of the unedited model.

        Args:
            model: the model that the run edited, freshly loaded; stays as it is.

        Raises:
            ValueError: the weights can't be read, or are another model's.
        """
        editable = self.hparams.editable(model)
        self._check_base(model)
        fingerprint = base_fingerprint(model)
        with editable.restoring(always=True):
            before = {layer: editable.parameter(layer).detach().to("cpu", copy=True) for layer in editable.layers}
            load_weights(editable, self._run.checkpoints, self.num_edits)
            changes = tuple(WeightChange(editable.parameter_name(layer), editable.is_transposed(layer), before[layer],
                                         editable.parameter(layer).detach().to("cpu", copy=True))
                            for layer in editable.layers)
        return EditedWeights(changes, self._provenance(model, fingerprint))

    def _check_base(self, model: nn.Module) -> None:
        """Check that the run began with this model, if it kept a session to compare with."""
        folder = self._run.checkpoints
        numbers = resumable(folder)
        if not numbers:
            logger.warning("%s kept no session, so it can't be checked that %s is the model that was edited",
                           self._run.path, self.hparams.model_name)
        for num_edits in numbers[-1:]:
            if not EditSession.load(session_path(folder, num_edits)).is_original(self.hparams.editable(model)):
                raise ValueError(f"the run in {self._run.path} began with other weights than "
                                 f"{self.hparams.model_name!r} has now, or in another dtype: load the model that it "
                                 "edited")

    def _provenance(self, model: nn.Module, fingerprint: str) -> Provenance:
        hparams, run = self.hparams, self._described
        method = hparams.base_alg
        if hparams.alpha:
            method += f" + SPHERE (alpha {hparams.alpha:g}, gamma {hparams.gamma:g})"
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        return Provenance(
            base=hparams.model_name, base_fingerprint=fingerprint, base_dtype=dtype, method=method,
            num_edits=self.num_edits, num_facts=run.get("num_edits"), facts=run.get("records"),
            dataset=run.get("dataset"), seed=run.get("seed"), batch_size=run.get("batch_size"),
            settings=hparams.to_dict(), run_versions=dict(self._config.get("versions") or {}),
            versions=package_versions(_PACKAGES), results=self._results())

    def _results(self) -> dict[str, Any] | None:
        if not self._run.has(SUMMARY):
            return None
        summary = read_record(Summary, self._run.read_json(SUMMARY), str(self._run.path / SUMMARY))
        if summary.num_edits != self.num_edits or summary.post is None:
            return None  # measured of other weights, or not at all
        return {name: value for name, value in summary.to_dict().items() if name in ("protocol", "pre", "post")}
