"""``evaluate``: measure a run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from .common import live_line, load_replicas, progress_of, set_up
from .options import Dtype, EvaluationOptions, Quiet, RunFolder, Verbose, option, with_option_groups

if TYPE_CHECKING:
    from ..runs.reevaluation import EditedRun


@dataclass(frozen=True, kw_only=True)
class RevisitOptions(EvaluationOptions):
    """Options of measuring a run again."""

    at: Annotated[list[int], option("Measure the weights after this many edits, if they were kept (0 = the unedited "
                                    "model); repeatable. The last ones if not given.", min=0)
                  ] = field(default_factory=list)
    facts: Annotated[bool, option("Measure the facts; --no-facts measures only what else is asked for.")] = True

    def __post_init__(self) -> None:
        if not (self.facts or self.abilities):
            raise ValueError("--no-facts leaves nothing to measure: give --abilities TASKS, or leave it out")


@with_option_groups
def evaluate(run: RunFolder, evaluation: RevisitOptions, dtype: Dtype = None, verbose: Verbose = False,
             quiet: Quiet = False) -> None:
    """Measure a run again from weights that it kept; results are added to its metrics.jsonl."""
    consoles = set_up(verbose, quiet)
    from ..callbacks.progress import point_text
    from ..runs.reevaluation import EditedRun

    edited = EditedRun(run)
    numbers = evaluation.at or _last_kept(edited)
    settings = evaluation.settings(before=evaluation.facts, after=evaluation.facts, cases=evaluation.eval_sample)
    model, tok, leading = load_replicas(edited.hparams, dtype)
    with leading, live_line(consoles, quiet) as line:
        lines = edited.measure(model, tok, numbers, settings, progress_of(line), line)
    for found in lines:
        consoles.print_line(point_text(found))


def _last_kept(edited: EditedRun) -> list[int]:
    """The largest number of edits whose weights a run kept."""
    from ..editing.checkpoints import saved_weights

    kept = saved_weights(edited.directory.checkpoints)
    if not kept:
        raise ValueError(f"{edited.directory.path} kept no weights to measure: edit with --keep-weights-every")
    return kept[-1:]
