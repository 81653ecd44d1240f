"""Random bad input gives a right result or a ValueError, and changes no weight.

Each property takes one hypothesis argument and no fixture, so that ``tests/robustness/fuzzers/fuzz.py`` can run it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.golden import GOLDEN
from helpers.models import REQUESTS, tiny_hparams, tiny_model
from helpers.paths import TESTS
from helpers.processes import call_cli
from helpers.run_lines import ABILITIES_LINE, CASES_LINE, CONFIG, EDITS_LINE, ENERGY, METRICS_LINE, SETTINGS, SUMMARY
from sphere_easyedit.cli.app import app
from sphere_easyedit.datasets.conflicts import find_conflicts
from sphere_easyedit.datasets.loaders import (
    DatasetName,
    EditRecord,
    load_records,
    records_fingerprint,
    with_protocol_targets,
)
from sphere_easyedit.editing.requests import EditRequest, parse_requests, tokenize_request
from sphere_easyedit.hparams_files import render_hparams
from sphere_easyedit.report.build import figures_of
from sphere_easyedit.report.cases import tables_of
from sphere_easyedit.report.notices import notices_of
from sphere_easyedit.report.runs import named_runs
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.utils.yaml import read_yaml

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))

ODD_TEXTS = ("", " ", "{}", "{} {}", "{0}", "}{", "\x00", "\n", "\r\n", "\u202e", "e\u0301", "👩‍👩‍👧", "\ud800",
             "\ufeff", "ﷺ", "İ", "ß", "<script>", "../../x", "a" * 300, "nan", "-0", "1e999")
texts = st.one_of(st.text(max_size=12), st.sampled_from(ODD_TEXTS),
                  st.text(st.characters(codec=None), max_size=6))  # with halves of surrogate pairs
scalars = st.one_of(st.none(), st.booleans(), st.integers(-10, 10), st.just(10 ** 30), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                      max_leaves=8)


def mutated(base: dict[str, Any], more: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    """A mapping like this one, with some values changed and some keys removed, also in nested mappings."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        found = dict(base)
        for name in draw(st.lists(st.sampled_from([*base, *more]), max_size=3)):
            what = draw(st.sampled_from(["any", "drop", "inside", "inside", "text"]))
            if what == "drop":
                found.pop(name, None)
            elif what == "inside" and isinstance(found.get(name), dict) and found[name]:
                found[name] = draw(mutated(found[name]))
            elif what == "inside" and isinstance(found.get(name), list) and found[name]:
                found[name] = [*found[name][:-1], draw(values)]
            else:
                found[name] = draw(texts if what == "text" else values)
        return found

    return st.one_of(draw_one(), draw_one(), draw_one(), values)


# --- requests ------------------------------------------------------------------------------------------------


@lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")


@lru_cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="sphere-fuzz-"))


request_lists = st.one_of(
    values, st.lists(st.sampled_from(REQUESTS).flatmap(lambda one: mutated(one, ("case_id",))), max_size=3))


@RELAXED
@given(request_lists)
def test_requests(requests: Any) -> None:
    try:
        parsed = parse_requests(requests)
        tokenized = [tokenize_request(tokenizer(), one, ["He said. {}"], 128) for one in parsed]
    except ValueError as error:
        assert str(error)
        return
    assert len(tokenized) == len(requests)
    for one in tokenized:
        assert isinstance(one.request, EditRequest)
        assert one.request.subject in one.request.prompt
        assert one.target_ids
        for prompt in (one.plain, *one.contexts, one.drift):
            assert 0 <= prompt.lookup < len(prompt.ids)


@lru_cache
def edited_model() -> tuple[nn.Module, sphere.SPHEREHyperParams, dict[str, torch.Tensor]]:
    model = tiny_model("llama", num_hidden_layers=2)
    hparams = tiny_hparams(folder(), layers=[0, 1], v_loss_layer=1, v_num_grad_steps=1, mom2_n_samples=6)
    return model, hparams, {name: value.clone() for name, value in model.state_dict().items()}


@settings(RELAXED, max_examples=60)
@given(request_lists)
def test_edits(requests: Any) -> None:
    model, hparams, before = edited_model()
    session = sphere.EditSession()
    try:
        sphere.apply_sphere_to_model(model, tokenizer(), requests, hparams, session=session)
    except ValueError:
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert session.num_edits == 0
    else:
        assert session.num_edits == len(requests)
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    finally:
        model.load_state_dict(before)


# --- hyperparameters -----------------------------------------------------------------------------------------

FIELDS = tuple(sphere.SPHEREHyperParams.__dataclass_fields__)


def check_hparams(hparams: sphere.SPHEREHyperParams) -> None:
    assert sphere.SPHEREHyperParams.from_dict(hparams.to_dict()) == hparams
    assert len(hparams.session_key()) == 64
    assert hparams.layers == sorted(set(hparams.layers))
    assert 0 <= hparams.alpha <= 1 and 0 <= hparams.gamma <= 1


@settings(RELAXED, max_examples=300)
@given(mutated(SETTINGS, (*FIELDS, "cumulative_ratio", "suppression_strength", "gama", "fp16")))
def test_hyperparameters(mapping: Any) -> None:
    with contextlib.suppress(ValueError):
        hparams = sphere.SPHEREHyperParams.from_dict(mapping)
        check_hparams(hparams)
        if hparams.executor == "native":
            text = render_hparams(hparams.to_dict())
            assert sphere.SPHEREHyperParams.from_dict(read_yaml(text, "rendered")) == hparams


yaml_texts = st.one_of(
    mutated(SETTINGS, FIELDS).map(lambda value: yaml.safe_dump(value, sort_keys=False).encode()),
    st.binary(max_size=40),
    st.text(st.sampled_from("abc: -[]{}&*!|>'\"#%@`\n\t<0.1e~?,=\ufeff\x85"), max_size=40).map(
        lambda text: text.encode()),
    st.lists(st.sampled_from(["layers: ", "&a ", "*a", "[", "]", "{", "}", ", ", "<<: ", "!!timestamp ",
                              "!!int ", "!!python/name:os.system ", "!!set ", "!!omap ", "2020-13-45", "? ", "\n",
                              "- ", "alpha: "]),
             max_size=14).map(lambda parts: "".join(parts).encode()))


@settings(RELAXED, max_examples=300)
@given(yaml_texts)
def test_yaml_files(content: bytes) -> None:
    path = folder() / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        check_hparams(sphere.SPHEREHyperParams.from_hparams(path))


# --- data sets -----------------------------------------------------------------------------------------------

ROME = {"case_id": 1, "requested_rewrite": {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "France"},
                                            "target_true": {"str": "Italy"}},
        "paraphrase_prompts": ["Where is Rome?"], "neighborhood_prompts": ["Milan is in"],
        "generation_prompts": ["Rome"]}
MEND = {"subject": "Rome", "src": "Where is Rome?", "rephrase": "Rome is where?", "answers": ["Italy"], "alt": "France",
        "loc": "who was it", "loc_ans": "me", "portability": {"New Question": "q", "New Answer": "a"}}
FLAT = {"prompt": "Rome is in", "subject": "Rome", "target_new": "France", "ground_truth": ["Italy"], "case_id": 3,
        "rephrase_prompt": "Where is Rome?", "locality_prompt": "Milan is in", "locality_ground_truth": "Italy",
        "locality": {"axis": [{"prompt": "p", "ground_truth": "g"}]},
        "portability": {"axis": {"prompt": "p", "ground_truth": [["g"]]}}}
FACT = {"prompt": "{} is in", "subject": "Rome", "target_new": "France", "target_true": "Italy", "case_id": 1,
        "paraphrases": ["Where is Rome?"], "neighbours": [{"prompt": "Milan is in", "target": "Italy"}, "Turin is in"],
        "generation_prompts": ["Rome"]}
records = st.sampled_from([ROME, MEND, FLAT, FACT]).flatmap(lambda one: mutated(one, tuple(FACT)))
csv_texts = st.lists(st.sampled_from(["prompt", "subject", "target_new", "neighbours", "case_id", ",", "\n", '"', "{}",
                                      "Rome", "a => b | c", "[", "7", " ", "\r"]), max_size=30).map("".join)
valid_csv = csv_texts.map(lambda rest: "prompt,subject,target_new,neighbours\n{} is in,Rome,France," + rest)


def _dumped(items: list[Any]) -> bytes:
    return json.dumps(items).encode()


def _lines(items: list[Any]) -> bytes:
    return "\n".join(json.dumps(item) for item in items).encode()


files = st.one_of(
    st.tuples(st.sampled_from(["counterfact", "multi_counterfact", "zsre"]), st.just("data.json"),
              st.lists(records, max_size=3).map(_dumped)),
    st.tuples(st.just("facts"), st.just("data.jsonl"), st.lists(records, max_size=3).map(_lines)),
    st.tuples(st.just("facts"), st.just("data.csv"), (csv_texts | valid_csv).map(str.encode)),
    st.tuples(st.sampled_from(get_args(DatasetName)), st.sampled_from(["data.json", "data.jsonl", "data.csv", "data"]),
              st.binary(max_size=60)),
    st.tuples(st.just("zsre"), st.just("data.json"), st.sampled_from([
        b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"9" * 5000 + b"]", b"[1e999]", b"[NaN]", b'["\\ud800"]'])))


def check_record(record: EditRecord) -> None:
    assert record.prompt.count("{}") == 1
    assert record.subject.strip() and record.target_new.strip()
    assert record.subject in record.edit_prompt
    for text in (*record.paraphrase_prompts, *(pair.text for pair in record.neighborhood_prompts)):
        text.encode()  # what a tokenizer is handed must be text


@settings(RELAXED, max_examples=400)
@given(files)
def test_data_sets(file: tuple[Any, str, bytes]) -> None:
    dataset, name, content = file
    path = folder() / name
    path.write_bytes(content)
    try:
        found = load_records(dataset, path)
    except ValueError as error:
        assert str(error)
        return
    assert len({record.case_id for record in found}) == len(found)
    for record in found:
        check_record(record)
    find_conflicts(found).to_dict()
    records_fingerprint(found)
    for one in parse_requests([record.request() for record in found]):
        with contextlib.suppress(ValueError):  # a target may have no tokens
            tokenize_request(tokenizer(), one, [], None)
    with contextlib.suppress(ValueError):
        with_protocol_targets(found, "easyedit")


# --- run directories -----------------------------------------------------------------------------------------

SCORES_LINE = {"case_id": 1, "protocol": "paper", "efficacy": 1.0}
SPACES = "since,num_edits,layer,share,rank,d_in\n0,2,1,0.5,3,12\n"
LINES = {"metrics.jsonl": [METRICS_LINE | {"when": "before", "num_edits": 0}, METRICS_LINE, ABILITIES_LINE],
         "edits.jsonl": [EDITS_LINE], "cases.jsonl": [CASES_LINE], "scores/during-2.jsonl": [SCORES_LINE]}
RUN = {**{name: _lines(lines) + b"\n" for name, lines in LINES.items()},
       "config.yaml": yaml.safe_dump(CONFIG).encode(), "summary.json": json.dumps(SUMMARY).encode(),
       "energy.csv": ENERGY.encode(), "spaces.csv": SPACES.encode()}
CELLS = st.sampled_from(["", "0", "1", "2", "-1", "1e308", "nan", "inf", "x", "9" * 30, "0.5"])


@st.composite
def run_files(draw: st.DrawFn) -> dict[str, bytes]:
    """A run's files, one or two of them odd."""
    found = dict(RUN)
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=2, unique=True)):
        kind = draw(st.sampled_from(["lines", "bytes", "cut", "gone"]))
        if kind == "bytes":
            found[name] = draw(st.binary(max_size=60))
        elif kind == "cut":
            raw = found[name]
            position = draw(st.integers(0, len(raw)))
            found[name] = raw[:position] + draw(st.binary(max_size=3)) + (raw[position + 1:] if draw(st.booleans())
                                                                         else b"")
        elif kind == "gone":
            found.pop(name)
        elif name.endswith(".csv"):
            rows = [line.split(",") for line in found[name].decode().splitlines()]
            row = draw(st.sampled_from(rows[1:]))
            row[draw(st.integers(0, len(row) - 1))] = draw(CELLS)
            found[name] = "".join(",".join(cells) + "\n" for cells in rows).encode()
        elif name in LINES:
            these = [draw(mutated(line, ("case_id", "abilities"))) for line in LINES[name]]
            found[name] = _lines(these) + b"\n"
        elif name == "config.yaml":
            found[name] = yaml.safe_dump(draw(mutated(CONFIG))).encode()
        elif name == "summary.json":
            found[name] = json.dumps(draw(mutated(SUMMARY))).encode()
    return found


@contextlib.contextmanager
def written(content: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder()) as name:
        for file, raw in content.items():
            path = Path(name) / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
        yield Path(name)


def test_the_undamaged_run_is_read() -> None:
    """Else the next test would fuzz next to nothing."""
    with written(RUN) as path:
        run = RunRecords.read(path)
        assert len(run.spaces) == 1 and run.energy and len(run.points) == 2
        RunDirectory(path).keep_until("edits.jsonl", 1)
        named = named_runs([run])
        assert figures_of(named) and tables_of(named)
        notices_of(named)


@settings(RELAXED, max_examples=300)
@given(run_files())
def test_run_directories(content: dict[str, bytes]) -> None:
    with written(content) as path, contextlib.suppress(ValueError):
        run = RunRecords.read(path)
        assert all(point.num_edits >= 0 for point in run.points)
        for name in ("edits.jsonl", "metrics.jsonl"):
            RunDirectory(path).keep_whole_lines(name)
            RunDirectory(path).keep_until(name, 1)
    with written(content) as path, contextlib.suppress(ValueError):
        named = named_runs([RunRecords.read(path)])
        figures_of(named)
        tables_of(named)
        notices_of(named)


# --- the command line ----------------------------------------------------------------------------------------

OPTIONS = {name: tuple(text for parameter in command.params if parameter.param_type_name == "option"
                       for text in (*parameter.opts, *parameter.secondary_opts))
           for name, command in typer.main.get_group(app).commands.items()} | {"odd": ("--odd",)}
# Lines that are in order up to the model, which is absent.
PLAIN = {"edit": "--hparams tiny.yaml --output new --quiet", "evaluate": "run", "show": "run --case 26",
         "report": "run", "sweep": "tiny.yaml --output new", "hparams": "./absent-model",
         "stats": "--hparams tiny.yaml", "plan": "--hparams tiny.yaml --num-edits 2 --no-calibrate",
         "export": "run --output new", "apply": "run --model ./absent-model --output new",
         "remove": "run --case 26 --output new", "withdraw": "run --case 26 --output new"}
WORDS = ("tiny.yaml", "odd.yaml", "AlphaEdit/smollm2-135n", "demo", "facts", "facts.csv", "absent", "run", "0", "-1",
         "3", "1e9", "alpha=2", "alpha=[", "=", "model_name=absent", "layers=&a [*a]", "gamma=!!timestamp x", "paper",
         "auto", "float8", "é\u202e", "", " ", "\n", "--", "-", "[bold]", "[/]", "nan", "0.5", "-inf", "1", "2", "warn",
         "stop", "skip", "lora", "deltas", "gsm8k", "rte", "rome", "easyedit", "5GB", "MEMIT", "float32")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with options mostly its own, behind what it needs or not."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    given = PLAIN.get(command, "").split() if draw(st.integers(0, 3)) else []
    own = st.sampled_from(OPTIONS[command] or ("--odd",))
    odd = st.sampled_from(sorted({text for texts in OPTIONS.values() for text in texts}))
    word = st.sampled_from(WORDS) | st.integers(-1, 5).map(str)
    pairs = st.tuples(own, word)
    parts = st.one_of(pairs, pairs, pairs, pairs, pairs, st.tuples(own), st.tuples(word), st.tuples(odd, word))
    for part in draw(st.lists(parts, max_size=4)):
        given += part
    return [command, *given]


@lru_cache
def workplace() -> Path:
    place = folder() / "work"
    (place / "run").mkdir(parents=True)
    (place / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS | {"model_name": "./absent-model"}))
    (place / "odd.yaml").write_bytes(b"layers: \xff")
    (place / "facts.csv").write_text("prompt,subject,target_new\n{} is in,Rome,France\n")
    drawn = {"dataset": "demo", "data": None, "num_edits": 2, "seed": 0, "protocol": "paper",
             "records": records_fingerprint(load_records("demo", None, 2, 0))}
    config = CONFIG | {"run": drawn, "hparams": SETTINGS | {"model_name": "./absent-model"}}
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "run" / "metrics.jsonl").write_text("{")
    (place / "run" / "checkpoints").mkdir()
    (place / "run" / "checkpoints" / "weights-2.safetensors").write_bytes(b"odd")
    return place


@settings(RELAXED, max_examples=80)
@given(command_lines())
def test_command_line(line: list[str]) -> None:
    with mock.patch.dict(os.environ, {"SPHERE_CACHE": str(folder() / "cache")}):
        done = call_cli(*line, cwd=workplace())
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr


# --- what was found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "!!timestamp x", "!!bool x", "!!int ''", "&a [*a]", "a: 2020-13-45", "[" * 5000, "{[1]: 2}", "a: 1\n---\nb: 2",
    "!!python/object/apply:os.system ['true']",
    "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)),
])
def test_malicious_yaml_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the file: not readable as YAML"):
        read_yaml(text, "the file")


def test_aliases_of_a_sane_size_are_read() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}", "the file") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    assert math.isnan(read_yaml("a: .nan", "the file")["a"])


FOUND = [  # by fuzzing, kept so that they stay mended
    ("config.yaml", yaml.safe_dump(CONFIG | {"run": {"measure": 3}}).encode(), "measure is 3"),
    ("config.yaml", yaml.safe_dump(CONFIG | {"run": {"measure": {"protocols": "paper"}}}).encode(),
     "measure.protocols is 'paper'"),
    ("config.yaml", yaml.safe_dump(CONFIG | {"run": {"seed": "x"}}).encode(), "seed is 'x'"),
    ("summary.json", b"[]", r"summary.json is \[\]"),
    ("summary.json", json.dumps(SUMMARY | {"editing_seconds": "long"}).encode(), "editing_seconds is 'long'"),
    ("edits.jsonl", _lines([EDITS_LINE | {"case_ids": [[1]]}]) + b"\n", "case_ids.0.int is "),
    ("cases.jsonl", _lines([CASES_LINE | {"pre": 3}]) + b"\n", "line 1: pre is 3"),
    ("cases.jsonl", _lines([CASES_LINE | {"case_id": {}}]) + b"\n", "line 1: case_id.int is {}"),
    ("cases.jsonl", _lines([CASES_LINE | {"post": {"efficacy": "x"}}]) + b"\n", "line 1: post.efficacy is 'x'"),
    ("cases.jsonl", _lines([CASES_LINE | {"generations": "x"}]) + b"\n", "line 1: generations is 'x'"),
    ("energy.csv", ENERGY.encode() + b"1" * 200_000, r"energy.csv, line \d: field larger than field limit"),
    ("spaces.csv", SPACES.encode() + b"1" * 200_000, "spaces.csv, line 2: field larger than field limit"),
    ("spaces.csv", b"num_edits,layer\n", r"spaces.csv, line 1: its columns are \['num_edits', 'layer'\], not"),
]


@pytest.mark.parametrize(("name", "content", "message"), FOUND)
def test_damaged_run_directories_found_by_fuzzing(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "metrics.jsonl").write_bytes(_lines([METRICS_LINE]) + b"\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tables_of(named_runs([RunRecords.read(tmp_path)]))


@pytest.mark.parametrize("name", ["run_directories", "data_sets", "hyperparameters", "yaml_files", "requests", "edits",
                                  "command_line"])
def test_fuzzers_run(name: str, tmp_path: Path) -> None:
    """A few hundred inputs by coverage; minutes of it are run by hand (see the file)."""
    pytest.importorskip("atheris", reason="atheris is not installed")
    if name != "run_directories" and not os.environ.get("SPHERE_FUZZ"):
        pytest.skip("each takes as long as torch takes to start: set SPHERE_FUZZ=1 to run all")
    done = subprocess.run(
        [sys.executable, str(TESTS / "robustness" / "fuzzers" / "fuzz.py"), name, "-runs=300", "-max_total_time=60",
         f"-artifact_prefix={tmp_path}/"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr
