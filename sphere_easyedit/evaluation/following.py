"""PRUNE without editing anew: it edits as MEMIT does, so a run of MEMIT holds the weights that it restrains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..editing.session import EditSession
from ..hparams import SPHERE_ONLY, SPHEREHyperParams
from ..models import EditableModel
from .checkpoints import put_weights, saved_weights
from .run_directory import CONFIG, RunDirectory

# What may differ between the two runs: how PRUNE reads out, and where things lie.
_FREE = (*SPHERE_ONLY, "base_alg", "alg_name", "prune_log_base", "rect_keep", "device", "stats_dir")


class FollowedWeights:
    """An executor that takes each batch's weights from a run of MEMIT in place of solving.

    Args:
        run: that run's directory, with the weights after each of its batches.
        editable: the model that is edited.
        hparams: PRUNE's.
        ends: numbers of edits after each batch.

    Raises:
        ValueError: these are not PRUNE's hyperparameters, the run is of another method or other settings, or weights
            after some batch were not kept.
    """

    def __init__(self, run: Path, editable: EditableModel, hparams: SPHEREHyperParams, ends: Sequence[int]) -> None:
        followed = hparams.method.edits_as
        if followed is None:
            raise ValueError(f"base_alg is {hparams.base_alg}, but only PRUNE edits as another method's run did: leave "
                             "out the run to follow")
        self._folder = RunDirectory(run).checkpoints
        if not (run / CONFIG).is_file():
            raise ValueError(f"{run} holds no run to follow (no {CONFIG})")
        theirs = SPHEREHyperParams.from_dict(RunDirectory(run).read_config()["hparams"])
        if theirs.base_alg != followed or theirs.projects:
            raise ValueError(f"{run} is a run of {theirs.base_alg} with alpha {theirs.alpha}: {hparams.base_alg} "
                             f"follows {followed} with alpha 0")
        was, now = theirs.to_dict(), hparams.to_dict()
        differing = sorted(name for name in now if name not in _FREE and was.get(name) != now[name])
        if differing:
            raise ValueError(f"{run} was edited with other {', '.join(differing)}: give the same ones")
        missing = sorted(set(ends) - set(saved_weights(self._folder)))
        if missing:
            raise ValueError(f"{run} kept no weights after {missing[:5]} edits: run it with the same batches, and keep "
                             "the weights of each (keep_checkpoints 0)")
        self._editable = editable

    def __call__(self, model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: SPHEREHyperParams,
                 **_: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        """Bring the model to the followed run's weights after this batch."""
        put_weights(self._editable, self._folder, EditSession.of(model).num_edits + len(requests))
        return model, {}
