"""The command line: parse, validate, call."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from .cli_export import register as register_export
from .cli_remove import register as register_remove
from .cli_tables import case_lines, case_table, doctor_table, escaped, plan_table, summary_table
from .safe_yaml import read_yaml
from .signals import Interrupted, ProcessLost, interrupts_raised

if TYPE_CHECKING:
    from .callbacks import EditCallback
    from .evaluation.measuring import Progress
    from .hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Edit facts into language models with SPHERE (arXiv 2510.01172).")


class Dataset(str, Enum):
    """Data sets that the command line knows."""

    counterfact = "counterfact"
    multi_counterfact = "multi_counterfact"
    zsre = "zsre"
    facts = "facts"
    demo = "demo"


class OnError(str, Enum):
    """What becomes of a batch with edits that can't be made."""

    stop = "stop"
    skip = "skip"


class Launcher(str, Enum):
    """What starts a sweep's runs, by submitit."""

    local = "local"
    slurm = "slurm"


class Guard(str, Enum):
    """What is done about the signs of a coming collapse."""

    warn = "warn"
    lower_ = "lower"  # `lower` is a method of texts
    stop = "stop"


class Metrics(str, Enum):
    """Protocols of metrics."""

    paper = "paper"
    rome = "rome"
    easyedit = "easyedit"



Override = Annotated[list[str], typer.Option("--set", help="Change a hyperparameter: NAME=VALUE (YAML); repeatable.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is going on.")]
Fluency = Annotated[bool, typer.Option("--fluency", help="Measure the fluency of generated text, too.")]
FluencyTokens = Annotated[int, typer.Option(min=1, help="New tokens of a text.")]
FluencyPrompts = Annotated[int | None, typer.Option(min=1, help="At most so many texts a case.")]
References = Annotated[Path | None, typer.Option(help="Measure consistency, too, with these texts: a folder of ROME's "
                                                 "files, or a .txt or .jsonl corpus.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on the way but warnings and errors.")]


@app.command()
def edit(
    hparams: Annotated[str, typer.Option(help="YAML file, or a short name such as AlphaEdit/smollm2-135m.")],
    output: Annotated[Path, typer.Option(help="Run directory, new or empty (or to resume).")],
    dataset: Annotated[Dataset, typer.Option(help="What to edit.")] = Dataset.demo,
    data: Annotated[Path | None, typer.Option(help="The data set's file; if not given, looked for in SPHERE_DATA, then "
                                               "downloaded. demo has none.")] = None,
    num_edits: Annotated[int | None, typer.Option(min=1, help="Number of facts; all if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Facts edited at once.")] = 100,
    seed: Annotated[int | None, typer.Option(help="Draws and orders the facts; the file's order if not given.")] = None,
    order_seed: Annotated[int | None, typer.Option(help="Orders the facts drawn anew, without drawing others.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many of the facts drawn first.")] = 0,
    override: Override = [],  # noqa: B006 - typer reads the default and hands over a new list
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
    = None,
    examples: Annotated[int, typer.Option(min=0, help="Show the continuations of so many edits.")] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output from its last checkpoint, or "
                                         "begin it if there is none.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Edits between checkpoints, at least.")] = 10,
    keep_checkpoints: Annotated[int, typer.Option(min=0, help="So many of the newest stay; 0: all.")] = 1,
    keep_weights_every: Annotated[int | None, typer.Option(min=1, help="Keep the edited weights for good after every "
                                                           "so many edits.")] = None,
    follow: Annotated[Path | None, typer.Option(help="PRUNE only: a run of MEMIT whose weights it restrains.")] = None,
    on_error: Annotated[OnError, typer.Option(help="Edits that can't be made: end the run and name them, or leave them "
                                              "out and list them in summary.json.")] = OnError.stop,
    keep_factors: Annotated[bool, typer.Option("--keep-factors", help="Keep each batch's factors, so that single facts "
                                               "can be removed later (AlphaEdit, MEMIT).")] = False,
    guard: Annotated[Guard | None, typer.Option(help="Watch for the signs of a coming collapse and warn, lower the "
                                                "batch's strength, or end the run before it.")] = None,
    guard_energy: Annotated[float, typer.Option(help="Times the usual step of hyperspherical energy.")] = 2.0,
    guard_norm: Annotated[float, typer.Option(help="Times the usual norm of a batch's change.")] = 1.25,
    guard_early: Annotated[float, typer.Option(help="Share of the early facts' first efficacy.")] = 0.5,
    guard_facts: Annotated[int, typer.Option(min=1, help="Number of early facts that are watched.")] = 20,
    guard_warmup: Annotated[int, typer.Option(min=1, help="So many batches set the measure; the guard acts on those "
                                              "after them.")] = 5,
    protocol: Annotated[list[Metrics], typer.Option(help="How metrics are computed; repeatable, the first is the "
                                                    "summary's.")] = [Metrics.paper],  # noqa: B006
    eval_before: Annotated[bool, typer.Option(help="Measure all facts in the unedited model.")] = True,
    eval_after: Annotated[bool, typer.Option(help="Measure all facts after the last edit.")] = True,
    eval_cases: Annotated[int | None, typer.Option(min=1, help="At most so many facts then, drawn by seed.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Measure the facts edited so far after every so many "
                                                   "edits.")] = None,
    eval_sample: Annotated[int | None, typer.Option(min=1, help="At most so many of them, drawn by seed.")] = None,
    eval_last_batch: Annotated[bool, typer.Option("--eval-last-batch", help="Measure each batch right after it, as "
                                                  "EasyEdit does.")] = False,
    eval_seed: Annotated[int, typer.Option(min=0, help="Of samples and intervals.")] = 0,
    share_before: Annotated[Path | None, typer.Option(help="Folder in which runs share what they measured before.")]
    = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text (.txt, .jsonl) for perplexity.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="So many of its tokens.")] = 8192,
    fluency: Fluency = False,
    fluency_tokens: FluencyTokens = 100,
    fluency_prompts: FluencyPrompts = None,
    references: References = None,
    abilities: Annotated[list[str], typer.Option(help="General abilities by lm-eval: gsm8k, rte, natural_questions, "
                                                 "boolq, or any of its tasks; repeatable.")] = [],  # noqa: B006
    abilities_every: Annotated[int | None, typer.Option(min=1, help="Also after every so many edits.")] = None,
    abilities_data: Annotated[Path | None, typer.Option(help="Folder of the four tasks' .jsonl files.")] = None,
    abilities_shots: Annotated[int, typer.Option(min=0, help="Examples in front of each question.")] = 0,
    abilities_limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions a task.")] = None,
    abilities_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many new tokens an answer.")] = None,
    tracker: Annotated[list[str], typer.Option(help="Hand the run's numbers to tensorboard, wandb, or whatever "
                                               "accelerate knows; repeatable.")] = [],  # noqa: B006
    report: Annotated[bool, typer.Option("--report", help="Keep report.html in the run directory up to date.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Edit facts into a model, batch after batch, and measure before, on the way and after."""
    console, errors = _set_up(verbose, quiet)
    from .evaluation.datasets import load_records, with_protocol_targets  # torch and transformers take seconds
    from .evaluation.measuring import AbilitySettings, MeasureSettings
    from .evaluation.run_directory import GUARD, RunDirectory
    from .evaluation.sequential import RunSettings, run_sequential
    from .evaluation.trackers import RunTrackers
    from .progress import LiveLine

    _without_bars_of_transformers()
    settings_of_model = _hparams_with(hparams, override)
    trackers = RunTrackers(output, tracker, quiet)
    live_report = None
    if report:
        from .report.live import LiveReport

        live_report = LiveReport(output)
    protocols: Any = tuple(one.value for one in protocol)
    measure = MeasureSettings(
        protocols=protocols, before=eval_before, after=eval_after, cases=eval_cases, every=eval_every,
        sample=eval_sample, last_batch=eval_last_batch, text=text, text_tokens=text_tokens,
        decoding=_decoding(fluency, references, fluency_tokens, eval_seed, fluency_prompts),
        references=references, seed=eval_seed, shared_before=share_before,
        abilities=AbilitySettings(tuple(abilities), abilities_every, abilities_data, abilities_shots, abilities_limit,
                                  abilities_tokens))
    drawn = load_records(dataset.value, data, num_edits, seed, order_seed=order_seed, skip=skip)
    records = with_protocol_targets(drawn, protocols[0])
    model, tok, leading = _load_replicas(settings_of_model, dtype)
    described = {"command": " ".join(["sphere-easyedit", *sys.argv[1:]]), "hparams_file": hparams,
                 "dataset": dataset.value, "data": None if data is None else str(data), "seed": seed,
                 "order_seed": order_seed, "skip": skip}
    settings = RunSettings(output, batch_size, examples, described, measure, resume, checkpoint_every,
                           keep_checkpoints, keep_weights_every, follow, on_error.value)
    callbacks: list[EditCallback] = []
    if keep_factors:
        from .removal.factors import FACTORS, FactorKeeper

        callbacks.append(FactorKeeper(RunDirectory(output).place(FACTORS), settings_of_model))
    if guard is not None:
        from .drift_guard import DriftGuard

        callbacks.append(DriftGuard(guard.value, tok, energy=guard_energy, norm=guard_norm, early=guard_early,
                                    warmup=guard_warmup, facts=guard_facts, path=output / GUARD))
        if len(records) <= guard_warmup * batch_size:
            logger.warning("--guard has nothing to act on: its first %d batches set the measure, and no others come. "
                           "Give a smaller --guard-warmup or --batch-size", guard_warmup)
    with ExitStack() as stack:
        stack.enter_context(leading)
        watching = [stack.enter_context(trackers).update]
        if live_report is not None:
            watching.append(live_report.update)
        if not quiet:
            watching.append(stack.enter_context(LiveLine(output, errors, len(records))).update)
        result = run_sequential(model, tok, records, settings_of_model, settings, callbacks, _telling(watching))
    if result.summary["post"] is not None:
        console.print(summary_table(result.summary, settings_of_model.base_alg, settings_of_model.alpha))
    for skipped in result.summary.get("skipped", ()):
        console.print(Text(f"Left out: case_id {skipped['case_id']} ({skipped['error']})"), soft_wrap=True)
    if result.summary.get("stopped"):
        console.print(Text(f"Stopped after {result.summary['num_edits']} edits: {result.summary['stopped']}"),
                      soft_wrap=True)
    last = result.tracker.records[-1]
    drift = ", ".join(f"{layer}: {change:+.2e}" for layer, change in last.relative_change.items())
    console.print(f"Hyperspherical energy, relative change by layer: {drift}", highlight=False, soft_wrap=True)
    for prompt, before, after in result.generations:
        console.print(f"\n[bold]{escaped(prompt)}[/]\n  before:{escaped(before)}\n  after: {escaped(after)}",
                      highlight=False, soft_wrap=True)
    console.print(f"\nRun directory: {output}", highlight=False, soft_wrap=True)
    if live_report is not None and (page := live_report.finish()) is not None:
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    at: Annotated[list[int], typer.Option(min=0, help="After so many edits, whose weights were kept; 0 is the unedited "
                                          "model. Repeatable; the last checkpoint if not given.")] = [],  # noqa: B006
    facts: Annotated[bool, typer.Option(help="Measure the facts; --no-facts for the rest alone.")] = True,
    protocol: Annotated[list[Metrics], typer.Option(help="How metrics are computed; repeatable.")]
    = [Metrics.paper],  # noqa: B006
    eval_sample: Annotated[int | None, typer.Option(min=1, help="At most so many of the facts edited so far, drawn by "
                                                    "seed; of all for the unedited model.")] = None,
    eval_seed: Annotated[int, typer.Option(min=0, help="Of samples and intervals.")] = 0,
    text: Annotated[Path | None, typer.Option(help="Held-out text (.txt, .jsonl) for perplexity.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="So many of its tokens.")] = 8192,
    fluency: Fluency = False,
    fluency_tokens: FluencyTokens = 100,
    fluency_prompts: FluencyPrompts = None,
    references: References = None,
    abilities: Annotated[list[str], typer.Option(help="General abilities, as for edit; repeatable.")]
    = [],  # noqa: B006
    abilities_data: Annotated[Path | None, typer.Option(help="Folder of the four tasks' .jsonl files.")] = None,
    abilities_shots: Annotated[int, typer.Option(min=0, help="Examples in front of each question.")] = 0,
    abilities_limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions a task.")] = None,
    abilities_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many new tokens an answer.")] = None,
    neurons: Annotated[bool, typer.Option("--neurons", help="Describe all kept weights for the report: what newer runs "
                                          "write themselves.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
    = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run again from weights that it kept; lines are added to its metrics.jsonl."""
    console, errors = _set_up(verbose, quiet)
    from .evaluation.checkpoints import saved_weights
    from .evaluation.measuring import AbilitySettings, MeasureSettings
    from .evaluation.revisiting import EditedRun
    from .progress import LiveLine, point_text

    if not (facts or abilities or neurons):
        raise ValueError("--no-facts leaves nothing to measure: give --abilities TASKS or --neurons, or leave it out")
    _without_bars_of_transformers()
    edited = EditedRun(run)
    wanted = at or saved_weights(edited.directory.checkpoints)[-1:]
    if not wanted:
        raise ValueError(f"{run} kept no weights: nothing can be measured")
    protocols: Any = tuple(one.value for one in protocol)
    measure = MeasureSettings(
        protocols=protocols, before=facts, after=facts, cases=eval_sample, sample=eval_sample, seed=eval_seed,
        text=text, text_tokens=text_tokens, references=references,
        decoding=_decoding(fluency, references, fluency_tokens, eval_seed, fluency_prompts),
        abilities=AbilitySettings(tuple(abilities), None, abilities_data, abilities_shots, abilities_limit,
                                  abilities_tokens))
    model, tok, leading = _load_replicas(edited.hparams, dtype)
    with ExitStack() as stack:
        stack.enter_context(leading)
        watching = [] if quiet else [stack.enter_context(LiveLine(run, errors)).update]
        lines = []
        if facts or abilities:
            lines = edited.measure(model, tok, wanted, measure, _telling(watching))
        if neurons:
            edited.describe_weights(model, _telling(watching))
    for line in lines:
        console.print(Text(point_text(line)), soft_wrap=True)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    case: Annotated[str, typer.Option(help="The case's case_id.")],
    at: Annotated[int | None, typer.Option(min=1, help="After so many edits, whose weights were kept; the last ones if "
                                           "not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each continuation, at most.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Let the unedited, the edited and the rolled-back model speak about one case, side by side."""
    console = _set_up().out
    from .evaluation.case_study import choose_case, dtype_of_run, study_case
    from .evaluation.revisiting import EditedRun

    _without_bars_of_transformers()
    edited = EditedRun(run)
    place, num_edits = choose_case(edited, case, at)
    model, tok = _load(edited.hparams, dtype_of_run(edited))
    study = study_case(edited, model, tok, place, num_edits, max_new_tokens)
    if as_json:
        print(json.dumps(study.to_dict(), indent=2))
        return
    for line in case_lines(study):
        console.print(Text(line), soft_wrap=True)
    console.print(case_table(study))
    console.print("The original weights are back, bit for bit." if study.restored else
                  "The original weights are NOT back bit for bit.", soft_wrap=True)
    if not study.restored:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, side by side in one report.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write to; for one run its own directory if not "
                                                "given.")] = None,
    figures: Annotated[bool, typer.Option(help="Write the figures as SVG and PNG, too.")] = True,
) -> None:
    """Make report.html of runs, and their figures as files."""
    console = _set_up().out
    from .report import write_report

    written = write_report(runs, output, figures)
    console.print(str(written.html), highlight=False, soft_wrap=True)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: methods, SPHERE or not, seeds, gamma, alpha and so on.")],
    output: Annotated[Path, typer.Option(help="Folder of the sweep's runs; one that was begun goes on.")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, each in a process of its own; 1 if not "
                                             "given.")] = None,
    launcher: Annotated[Launcher | None, typer.Option(help="slurm: submit the runs as jobs and return. local: as jobs, "
                                                      "but here. Processes of this machine if not given.")] = None,
    slurm: Annotated[list[str], typer.Option(help="What each job asks for, on top of the file's `slurm`: NAME=VALUE, "
                                             "sbatch's names; repeatable.")] = [],  # noqa: B006
    wait: Annotated[bool, typer.Option("--wait", help="With --launcher slurm: stay until the jobs have ended.")]
    = False,
    collect_only: Annotated[bool, typer.Option("--collect-only", help="Start nothing; write the tables of what is "
                                               "there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run what one YAML file describes, and collect it into one table with paired differences."""
    on_slurm = launcher is Launcher.slurm
    if slurm and launcher is None:
        raise ValueError("--slurm says what jobs ask for: give --launcher slurm, too")
    if wait and not on_slurm:
        raise ValueError("--wait belongs to --launcher slurm; all else waits anyway")
    if jobs is not None and on_slurm:
        raise ValueError("--jobs is of this machine: for SLURM give --slurm array_parallelism=NUMBER")
    from .evaluation.sweep import (
        collect,
        load_sweep,
        local_jobs,
        parse_slurm,
        run_sweep,
        submit_sweep,
        wait_for_jobs,
    )

    console = _set_up(quiet=quiet).out
    parameters = typer.main.get_group(app).commands["edit"].params
    options = {name.removeprefix("--") for parameter in parameters
               for name in (*parameter.opts, *parameter.secondary_opts)}
    planned = load_sweep(file, options)
    asked = {**planned.slurm, **parse_slurm(slurm)}
    failed: tuple[Any, ...] = ()

    def report(name: str, what: str, settled: int, count: int) -> None:
        if not quiet:
            console.print(f"{settled}/{count} {name}: {what}", highlight=False, soft_wrap=True)

    if on_slurm and not collect_only:
        submissions = submit_sweep(planned, output, asked)
        for number, one in enumerate(submissions, 1):
            status = one.status if one.job is None else f"{one.status} (job {one.job})"
            report(one.name, status, number, len(submissions))
        if wait:
            failed = wait_for_jobs(planned, output, report).failed
    elif not collect_only:
        pool = None if launcher is None else local_jobs(asked)
        failed = run_sweep(planned, output, jobs or 1, report, pool=pool).failed
    for path in collect(output).write(output):
        console.print(str(path), highlight=False, soft_wrap=True)
    for outcome in failed:
        console.print(Text(f"\n{outcome.name} failed ({outcome.log}):\n{outcome.tail}", style="red"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("hparams")
def hparams_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a decoder; its config alone is read.")],
    base_alg: Annotated[str, typer.Option(help="AlphaEdit, MEMIT, PRUNE, RECT, FT or ROME.")] = "AlphaEdit",
    output: Annotated[Path | None, typer.Option(help="File to write; standard output if not given.")] = None,
) -> None:
    """Write a starting YAML for a decoder that has none."""
    from .configs import planning_config
    from .files import replacing
    from .hparams_files import starting_file
    from .loading import model_source

    text = starting_file(planning_config(model, model_source(model)), model, base_alg)
    if output is None:
        print(text, end="")
    else:
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")


@app.command()
def stats(
    hparams: Annotated[str, typer.Option(help="YAML file or short name.")],
    override: Override = [],  # noqa: B006
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    verbose: Verbose = False,
) -> None:
    """Collect the second moments of keys that MEMIT and AlphaEdit need, once for all runs."""
    console = _set_up(verbose).out
    from .editing.covariance import moment_path, second_moments

    _without_bars_of_transformers()
    settings = _hparams_with(hparams, override)
    model, tok, leading = _load_replicas(settings, dtype)
    editable = settings.editable(model)
    with leading:
        second_moments(editable, tok, settings)
    for layer in settings.layers:
        console.print(str(moment_path(editable, settings, layer)), highlight=False, soft_wrap=True)


@app.command()
def doctor(
    stats_dir: Annotated[Path, typer.Option(help="Where statistics are looked for.")] = Path("data/stats"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what is there, what is missing, and what mends it; exit status 1 where something required is broken."""
    from .doctor import examine

    console = _set_up().out
    report = examine(stats_dir)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        console.print(doctor_table(report))
        for item in report.items:
            if item.remedy is not None:  # below the table, where no border cuts a command
                console.print(Text(f"{item.name} ({item.status}): {item.remedy}"), soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def plan(
    hparams: Annotated[str, typer.Option(help="YAML file, or a short name such as AlphaEdit/smollm2-135m.")],
    num_edits: Annotated[int, typer.Option(help="Number of facts.")],
    batch_size: Annotated[int, typer.Option(help="Facts edited at once.")] = 100,
    dataset: Annotated[Dataset, typer.Option(help="Whose facts are counted in tokens.")] = Dataset.demo,
    data: Annotated[Path | None, typer.Option(help="The data set's file; demo has none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws and orders the facts, as for edit.")] = None,
    override: Override = [],  # noqa: B006
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
    = None,
    calibrate: Annotated[bool, typer.Option(help="Measure on this machine for some seconds, if the model is here.")]
    = True,
    gflops: Annotated[float | None, typer.Option(help="Speed in 1e9 FLOP/s, for a rough time where nothing is "
                                                      "measured.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what a run will need - time, memory, disk, downloads - before anything starts."""
    console = _set_up().out
    from .planning import PlanSettings, make_plan

    _without_bars_of_transformers()
    settings = PlanSettings(num_edits, batch_size, dataset.value, data, seed, dtype, calibrate=calibrate, gflops=gflops)
    planned = make_plan(_hparams_with(hparams, override), settings)
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
        return
    console.print(plan_table(planned))
    for line in (f"Time: {planned.method}.", *planned.notes):
        console.print(Text(line), soft_wrap=True)


register_export(app)
register_remove(app)


def _hparams_with(name: str, overrides: list[str]) -> Any:
    from .hparams import SPHEREHyperParams

    loaded = SPHEREHyperParams.from_hparams(name)
    if not overrides:
        return loaded
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} has no '=': write NAME=VALUE")
        changes[key.strip()] = read_yaml(value, f"--set {override!r}")
    return SPHEREHyperParams.from_dict({**loaded.to_dict(), **changes})


class _Consoles(NamedTuple):
    out: Console
    err: Console  # of log messages and the live line, so that neither runs into the other


def _set_up(verbose: bool = False, quiet: bool = False) -> _Consoles:
    if verbose and quiet:
        raise ValueError("--verbose and --quiet can't both be meant: give one")
    consoles = _Consoles(Console(), Console(stderr=True))
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, so this comes before that
    handler = RichHandler(console=consoles.err, show_path=False, show_time=False)
    handler.addFilter(_unwritten)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # What takes time says so before it starts.
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("sphere_easyedit").setLevel(level)
    return consoles


def _unwritten(record: logging.LogRecord) -> bool:
    """Whether no handler below the root's has written a record to the terminal, as huggingface_hub's own has."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        if any(isinstance(handler, logging.StreamHandler) and handler.stream in (
                sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
               for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


def _load(hparams: SPHEREHyperParams, dtype: str | None) -> Any:
    from .loading import load_model

    return load_model(hparams.model_name, "auto" if hparams.model_parallel else hparams.device, dtype)


def _load_replicas(hparams: SPHEREHyperParams, dtype: str | None) -> tuple[Any, Any, AbstractContextManager[None]]:
    """The model, its tokenizer, and the context within which other processes work for this one.

    Where ``accelerate launch`` or ``torchrun`` started several, all but the first work from here on, and end here.
    """
    from .replicas import Place, Replicas

    place = Place.joined(hparams.device)
    if place.size == 1:
        return *_load(hparams, dtype), nullcontext()
    for name, value in (("model_parallel", hparams.model_parallel), ("executor", hparams.executor == "easyedit")):
        if value:
            raise ValueError(f"{name} is {getattr(hparams, name)!r}, which {place.size} processes can't share out: "
                             "start one process, or change it")
    if place.index:
        logging.getLogger("sphere_easyedit").setLevel(logging.WARNING)
    model, tok = _load(replace(hparams, device=place.device), dtype)
    replicas = Replicas(hparams.editable(model), place)
    if place.index:
        replicas.follow()
        raise typer.Exit
    return model, tok, replicas.leading()


def _decoding(fluency: bool, references: Path | None, tokens: int, seed: int, prompts: int | None) -> Any:
    """How text is generated, where fluency or consistency asks for it."""
    from .evaluation.text_quality import Decoding

    return Decoding(tokens, seed=seed, prompts=prompts) if fluency or references is not None else None


def _without_bars_of_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _telling(watching: Sequence[Progress]) -> Progress:
    def tell(phase: str, done: int, total: int) -> None:
        for watch in watching:
            watch(phase, done, total)

    return tell


def main() -> None:
    """Run the command line; a mistake of the user's ends with one clear line and exit status 2, a signal with 128+n,
    a lost process with 1.
    """
    try:
        with interrupts_raised():
            try:
                app()
            except ProcessLost as error:  # told in here: a launcher sends SIGTERM to the processes that are left
                _end(f"error: {error}; a batch under way was undone. `edit --resume` goes on with a run.", 1)
    except Interrupted as interrupted:
        _end(f"ended by {interrupted.name}; a batch under way was undone. `edit --resume` goes on with a run.",
             interrupted.exit_status, "yellow")
    except (ValueError, ImportError, OSError) as error:  # OSError: a file that is absent, a disk that is full
        _end(f"error: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        from .evaluation.faults import out_of_memory

        if not out_of_memory(error):
            raise
        _end(f"error: out of memory ({' '.join(str(error).split())}); a batch under way was undone. `edit --resume "
             "--on-error skip` goes on with a run and edits in halves what is too large; token_budget and --batch-size "
             "bound what is done at once", 1)


def _end(said: str, status: int, style: str = "red") -> NoReturn:
    """End the process with one line on standard error."""
    Console(stderr=True).print(" ".join(said.split()), style=style, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
