"""``evaluate``: measure a run again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

from .common import load_replicas, set_up
from .options import Dtype, EvaluationOptions, Quiet, RunFolder, Verbose, option, with_option_groups

if TYPE_CHECKING:
    from ..evaluation.revisiting import EditedRun


@with_option_groups
def evaluate(
    run: RunFolder,
    evaluation: EvaluationOptions,
    at: Annotated[list[int] | None, option("Evaluation", "Measure the weights after this many edits, if they were kept "
                                           "(0 = the unedited model); repeatable. The last checkpoint if not given.",
                                           min=0)] = None,
    facts: Annotated[bool, option("Evaluation", "Measure the facts; --no-facts measures only what else is asked for.")
                     ] = True,
    neurons: Annotated[bool, option("Evaluation", "Describe all kept weights for the report, which newer runs do "
                                                  "themselves.", "--neurons")] = False,
    dtype: Dtype = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run again from weights that it kept; results are added to its metrics.jsonl."""
    consoles = set_up(verbose, quiet)
    from ..evaluation.revisiting import EditedRun
    from ..progress import LiveLine, point_text

    if not (facts or evaluation.abilities or neurons):
        raise ValueError("--no-facts leaves nothing to measure: give --abilities TASKS or --neurons, or leave it out")
    edited = EditedRun(run)
    numbers = at or _last_kept(edited)
    settings = evaluation.settings(before=facts, after=facts, cases=evaluation.eval_sample)
    model, tok, leading = load_replicas(edited.hparams, dtype)
    with leading, LiveLine(run, consoles.err) if not quiet else nullcontext() as line:
        progress = None if line is None else line.update
        lines = edited.measure(model, tok, numbers, settings, progress) if facts or evaluation.abilities else []
        if neurons:
            edited.describe_weights(model, progress)
    for found in lines:
        consoles.print_line(point_text(found))


def _last_kept(edited: EditedRun) -> list[int]:
    """The largest number of edits whose weights a run kept."""
    from ..evaluation.checkpoints import saved_weights

    kept = saved_weights(edited.directory.checkpoints)
    if not kept:
        raise ValueError(f"{edited.directory.path} kept no weights: nothing can be measured")
    return kept[-1:]
