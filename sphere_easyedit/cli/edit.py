"""``edit``: run sequential editing and its evaluations."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from rich.markup import escape
from rich.table import Table

from ..defaults import (
    CHECKPOINT_EVERY,
    GUARD_EARLY,
    GUARD_ENERGY,
    GUARD_FACTS,
    GUARD_NORM,
    GUARD_WARMUP,
    KEEP_CHECKPOINTS,
    REPAIR_NORM,
    REPAIR_ROUNDS,
)
from .common import Consoles, live_line, load_replicas, on_one_line, progress_of, set_up, starting
from .options import DataOptions, EvaluationOptions, MethodOptions, Quiet, Verbose, option, with_option_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..datasets.loaders import EditRecord
    from ..editing.callbacks import EditCallback
    from ..hparams import SPHEREHyperParams
    from ..report.live import LiveReport
    from ..runs.repair import RepairSettings
    from ..runs.result import RunResult
    from ..runs.schedule import MeasureSettings
    from ..runs.sequential import RunSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData(DataOptions):
    """The facts of a run, and the treatment of those that cannot be edited."""

    num_edits: Annotated[int | None, option("Number of facts (all if not given).", min=1)] = None
    order_seed: Annotated[int | None, option("Seed for reordering the drawn facts, without drawing others.")] = None
    skip: Annotated[int, option("Number of drawn facts to leave out, from the first.", min=0)] = 0
    on_error: Annotated[Literal["stop", "skip"], option(
        "Facts that cannot be edited: stop the run and name them, or skip them and list them in summary.json.")
    ] = "stop"

    def records(self, protocol: str) -> list[EditRecord]:
        """Load the facts, with the targets of a metrics protocol."""
        from ..datasets.loaders import load_records, with_protocol_targets

        drawn = load_records(self.dataset, self.data, self.num_edits, self.seed, order_seed=self.order_seed,
                             skip=self.skip)
        return with_protocol_targets(drawn, protocol)


@dataclass(frozen=True, kw_only=True)
class RunEvaluation(EvaluationOptions):
    """How a run is measured, and when."""

    eval_before: Annotated[bool, option("Measure all facts in the unedited model.")] = True
    eval_after: Annotated[bool, option("Measure all facts after the last edit.")] = True
    eval_cases: Annotated[int | None, option("Measure at most this many facts before and after, drawn at random (all "
                                             "if not given).", min=1)] = None
    eval_every: Annotated[int | None, option("Also measure the facts edited so far after every this many edits.",
                                             min=1)] = None
    eval_last_batch: Annotated[bool, option("Also measure each batch right after its edit, as EasyEdit does.",
                                            "--eval-last-batch")] = False
    share_before: Annotated[Path | None, option("Folder where runs of the same model and facts share the measurements "
                                                "of the unedited model.")] = None
    abilities_every: Annotated[int | None, option("Also measure abilities after every this many edits.", min=1)] = None

    def of_run(self) -> MeasureSettings:
        """The run's measurement settings."""
        return self.settings(self.abilities_every, before=self.eval_before, after=self.eval_after,
                             cases=self.eval_cases, every=self.eval_every, last_batch=self.eval_last_batch,
                             shared_before=self.share_before)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints and weights that a run keeps, for resuming, later measurement and export."""

    PANEL: ClassVar = "Checkpoints"

    resume: Annotated[bool, option("Continue the run in --output from its last checkpoint, or start it if there is "
                                   "none.", "--resume")] = False
    checkpoint_every: Annotated[int, option("Minimum number of edits between checkpoints.", min=1)
                                ] = CHECKPOINT_EVERY
    keep_checkpoints: Annotated[int, option("Number of recent checkpoints to keep (0 = all).", min=0)
                                ] = KEEP_CHECKPOINTS
    keep_weights_every: Annotated[int | None, option("Keep the edited weights permanently after every this many edits.",
                                                     min=1)] = None
    keep_factors: Annotated[bool, option("Keep the factors of each batch's weight change, so that single facts can be "
                                         "removed later (AlphaEdit, MEMIT).", "--keep-factors")] = False


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Editing facts again that later edits have overwritten (see ``runs.repair``)."""

    PANEL: ClassVar = "Repair"

    repair_every: Annotated[int | None, option(
        "After every this many edits, and after the last, find the facts that the model no longer predicts, and edit "
        "them again (native methods).", min=1)] = None
    repair_rounds: Annotated[int, option("Times that facts are looked for and edited again, at most, in one repair.",
                                         min=1)] = REPAIR_ROUNDS
    repair_norm: Annotated[float, option("Largest factor by which one repair may raise the norm of the weights' "
                                         "change.")] = REPAIR_NORM

    def of_run(self) -> RepairSettings | None:
        """The run's repair settings, if it is to be repaired."""
        from ..runs.repair import RepairSettings

        return None if self.repair_every is None else RepairSettings(self.repair_every, self.repair_rounds,
                                                                     self.repair_norm)


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """Detection of a coming collapse (see ``DriftGuard``)."""

    PANEL: ClassVar = "Guard"

    guard: Annotated[Literal["warn", "lower", "stop"] | None, option(
        "Watch for signs of a coming collapse and warn, lower the batch's strength, or stop the run.")] = None
    guard_energy: Annotated[float, option("Limit on a batch's change of hyperspherical energy, as a multiple of the "
                                          "usual change.")] = GUARD_ENERGY
    guard_norm: Annotated[float, option("Limit on the norm of a batch's weight change, as a multiple of the usual "
                                        "norm.")] = GUARD_NORM
    guard_early: Annotated[float, option("Lowest efficacy of early facts, as a share of their first efficacy.")
                           ] = GUARD_EARLY
    guard_facts: Annotated[int, option("Number of early facts to watch.", min=1)] = GUARD_FACTS
    guard_warmup: Annotated[int, option("Number of first batches that define what is usual; the guard acts on later "
                                        "ones.", min=1)] = GUARD_WARMUP

    def callbacks(self, tok: PreTrainedTokenizerBase, output: Path, num_batches: int) -> list[EditCallback]:
        """The guard, if requested; warns if the run has no batch for it to act on."""
        if self.guard is None:
            return []
        from ..callbacks.drift_guard import DriftGuard
        from ..runs.schema import GUARD

        if num_batches <= self.guard_warmup:
            logger.warning("--guard has nothing to act on: its first %d batches define what is usual, and there are no "
                           "others. Lower --guard-warmup or --batch-size", self.guard_warmup)
        return [DriftGuard(self.guard, tok, energy=self.guard_energy, norm=self.guard_norm, early=self.guard_early,
                           warmup=self.guard_warmup, facts=self.guard_facts, path=output / GUARD)]


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """Output of a run."""

    PANEL: ClassVar = "Output"

    output: Annotated[Path, option("Run directory: new or empty, or that of the run to resume.")]
    examples: Annotated[int, option("Number of edits whose continuations to show, before and after.", min=0)] = 3
    tracker: Annotated[list[str], option("Send the run's numbers to tensorboard, wandb, or another tracker that "
                                         "accelerate knows; repeatable.")] = field(default_factory=list)
    report: Annotated[bool, option("Keep report.html in the run directory up to date.", "--report")] = False
    verbose: Verbose = False
    quiet: Quiet = False

    def live_report(self) -> list[LiveReport]:
        """The live report, if requested."""
        if not self.report:
            return []
        from ..report.live import LiveReport

        return [LiveReport()]


@with_option_groups
def edit(method: MethodOptions, data: RunData, evaluation: RunEvaluation, checkpoints: CheckpointOptions,
         repair: RepairOptions, guard: GuardOptions, output: RunOutput) -> None:
    """Edit facts into a model, batch after batch, and measure it before, during and after."""
    consoles = set_up(output.verbose, output.quiet)
    with starting(consoles, output.quiet):
        from ..callbacks.trackers import RunTrackers
        from ..runs.sequential import run_sequential

        hparams = method.load()
        trackers, report = RunTrackers(output.tracker, output.quiet), output.live_report()
        settings = _run_settings(method, data, evaluation, checkpoints, repair, output)
        records = data.records(settings.measure.protocols[0])
        model, tok, leading = load_replicas(hparams, method.dtype)
    callbacks = [*_factor_keepers(checkpoints.keep_factors, hparams, output.output),
                 *guard.callbacks(tok, output.output, -(-len(records) // data.batch_size)), trackers, *report]
    with leading, trackers, live_line(consoles, output.quiet, len(records)) as line:
        result = run_sequential(model, tok, records, hparams, settings, [*callbacks, *line],
                                progress_of([*report, *line]))
    _print_result(consoles, result, hparams, {record.edit_prompt: record.case_id for record in records})
    consoles.print_line(f"\nRun directory: {output.output}")
    for page in (one.page for one in report if one.page is not None):
        consoles.print_line(f"Report: {page}")
    run = shlex.quote(str(output.output))
    consoles.print_line(f"Next: sphere-easyedit chat {run}" + ("" if report else f", sphere-easyedit report {run}"))


def _run_settings(method: MethodOptions, data: RunData, evaluation: RunEvaluation, checkpoints: CheckpointOptions,
                  repair: RepairOptions, output: RunOutput) -> RunSettings:
    from ..runs.sequential import RunSettings

    described = {"command": " ".join(["sphere-easyedit", *sys.argv[1:]]), "hparams_file": method.hparams,
                 "dataset": data.dataset, "data": None if data.data is None else str(data.data), "seed": data.seed,
                 "order_seed": data.order_seed, "skip": data.skip}
    return RunSettings(output.output, data.batch_size, output.examples, described, evaluation.of_run(),
                       checkpoints.resume, checkpoints.checkpoint_every, checkpoints.keep_checkpoints,
                       checkpoints.keep_weights_every, repair.of_run(), data.on_error)


def _factor_keepers(enabled: bool, hparams: SPHEREHyperParams, output: Path) -> list[EditCallback]:
    if not enabled:
        return []
    from ..removal.factors import FACTORS, FactorKeeper
    from ..runs.directory import RunDirectory

    return [FactorKeeper(RunDirectory(output).path_of(FACTORS), hparams)]


def _print_result(consoles: Consoles, result: RunResult, hparams: SPHEREHyperParams, case_ids: Mapping[str, int]
                  ) -> None:
    """Print the metrics, the drift of energy, and the examples with their case_id, which is given by prompt."""
    summary = result.summary
    if summary["post"] is not None:
        consoles.out.print(_summary_table(result, hparams))
        for line in _terms(summary["protocol"], hparams):
            consoles.print_line(line, "dim")
    for skipped in summary.get("skipped", ()):
        consoles.print_line(f"Left out: case_id {skipped['case_id']} ({skipped['error']})")
    if summary.get("repaired") is not None:
        left = len(summary["unrepaired"])
        consoles.print_line(f"Edited again: {summary['repaired']} facts; {left} are still not predicted"
                            + (", listed as unrepaired in summary.json" if left else ""))
    if summary.get("stopped"):
        consoles.print_line(f"Stopped after {summary['num_edits']} edits: {summary['stopped']}")
    changes = result.tracker.records[-1].relative_change
    drift = ", ".join(f"{layer}: {change:+.2e}" for layer, change in changes.items())
    consoles.print_line("Hyperspherical energy (HE: the higher, the less evenly the weight's neurons are spread), "
                        f"relative change by layer: {drift}")
    for generation in result.generations:
        prompt, before, after = (escape(on_one_line(text)) for text in generation)
        case = escape(str(case_ids[generation[0]]))
        consoles.out.print(f"\ncase {case}: [bold]{prompt}[/]\n  before:{before}\n  after: {after}", highlight=False,
                           soft_wrap=True)


def _terms(protocol: str, hparams: SPHEREHyperParams) -> list[str]:
    """What the terms of the table mean, a line each."""
    alpha = [f"alpha {hparams.alpha:g}: the share of each update along the weight's principal directions that SPHERE "
             "removes"] if hparams.alpha else []
    return ["efficacy: edited prompts get the new answer; generalization: their paraphrases do; specificity: other "
            "facts keep theirs",
            f"protocol {protocol}: how answers are scored (docs/EVALUATION.md)", *alpha]


def _summary_table(result: RunResult, hparams: SPHEREHyperParams) -> Table:
    from ..runs.schema import FACT_METRICS

    summary = result.summary
    name = f"{hparams.base_alg} + SPHERE (alpha {hparams.alpha:g})" if hparams.alpha else hparams.base_alg
    table = Table("metric (%)", title=f"{summary['num_edits']} edits with {name}, protocol {summary['protocol']}")
    for column in ("before", "after", "95% interval", "cases"):
        table.add_column(column, justify="right")
    for metric in FACT_METRICS:
        now = summary["post"][metric]
        was = None if summary["pre"] is None else summary["pre"][metric]["mean"]
        if now["mean"] is not None:
            low, high = now["ci95"]
            table.add_row(metric, "" if was is None else f"{was:.1f}", f"{now['mean']:.1f}",
                          f"{low:.1f} - {high:.1f}", str(now["n"]))
    seconds = summary["editing_seconds"] / summary["num_edits"]
    table.caption = f"{seconds:.2f} s an edit, {summary['peak_memory_bytes'] / 1e9:.2f} GB at the peak"
    return table
