"""``show``: compare continuations of the unedited, the edited and the rolled-back model for one case."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from .common import load_for, on_one_line, set_up
from .options import AsJson, At, RunFolder, option

if TYPE_CHECKING:
    from ..analysis.case_study import CaseStudy


def show(
    run: RunFolder,
    case: Annotated[str, option("case_id of the case, or its subject.")],
    at: At = None,
    max_new_tokens: Annotated[int, option("Maximum number of new tokens per continuation.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """Show continuations of the unedited, the edited and the rolled-back model for one case, side by side."""
    consoles = set_up()
    from ..analysis.case_study import choose_case, study_case
    from ..runs.config import model_dtype
    from ..runs.reevaluation import EditedRun

    edited = EditedRun(run)
    place, num_edits = choose_case(edited, case, at)
    model, tok = load_for(edited.hparams, model_dtype(edited.directory.read_config()))
    study = study_case(edited, model, tok, place, num_edits, max_new_tokens)
    if as_json:
        print(json.dumps(study.to_dict(), indent=2))
        return
    for line in _case_lines(study):
        consoles.print_line(line)
    consoles.out.print(_case_table(study))
    consoles.print_line(f"The original weights are {'back,' if study.restored else 'NOT back'} bit for bit.")
    if not study.restored:
        raise typer.Exit(1)


def _case_lines(study: CaseStudy) -> list[str]:
    """The case, its position among the edits, and its scores."""
    true = "" if study.target_true is None else f", true target: {study.target_true}"
    lines = [f"Case {study.case_id}, {study.subject}. New target: {study.target_new}{true}",
             f"Edit {study.number} of {study.total}; the edited model holds the first {study.num_edits}"
             + ("" if study.is_edited else ": the fact is not in these weights yet")]
    for when, title in (("pre", "before"), ("post", "after")):
        scores = None if study.scores is None else study.scores[when]
        if scores is not None:
            shown = ", ".join(f"{name} {100 * score:.1f}" for name, score in scores.items() if score is not None)
            lines.append(f"Scores {title} the run (%): {shown}")
    return lines


def _case_table(study: CaseStudy) -> Table:
    table = Table(*(Column(title, overflow="fold", ratio=1)
                    for title in ("prompt", "unedited", "edited", "rolled back")), show_lines=True, expand=True)
    for one in study.continuations:
        said = (one.unedited, one.edited, one.rolled_back)
        table.add_row(Text.assemble((f"{one.kind}\n", "bold"), on_one_line(one.prompt)),
                      *(Text(on_one_line(text)) for text in said))
    return table
