"""Untrusted files are not executed, and no file, name or text leads out of its folder or into markup."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.faulty_runs import checkpointed, state_of, unchanged
from helpers.golden import GOLDEN
from helpers.models import REQUESTS, tiny_hparams, tiny_model
from helpers.run_lines import ABILITIES_LINE, CASES_LINE, CONFIG, EDITS_LINE, ENERGY, METRICS_LINE, SUMMARY
from sphere_easyedit.callbacks.neurons import NeuronRecord
from sphere_easyedit.callbacks.trackers import RunTrackers
from sphere_easyedit.cli import main
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.callbacks import MeasureEvent, RunState
from sphere_easyedit.editing.checkpoints import load_weights, session_path, weights_path
from sphere_easyedit.editing.session import resume_from
from sphere_easyedit.methods.covariance import load_projections, moment_path
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.runs.sweep import Run, Sweep, run_sweep
from sphere_easyedit.utils.files import checksum_path, record_checksum, sha256_of

PACKAGE = Path(sphere.__file__).parent


class Bomb:
    """A pickle that leaves a folder behind when it is loaded."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._target),)


def bomb(path: Path, trace: Path) -> None:
    """A real one at ``path``."""
    made = path.with_suffix(".pt")
    torch.save({"weight": Bomb(trace)}, made)
    torch.load(made, weights_only=False)
    assert trace.exists()
    trace.rmdir()
    made.rename(path)


# --- what is loaded, and how ---------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield (f"{path.relative_to(PACKAGE)}:{node.lineno}", ast.unparse(node.func),
                       {word.arg or "**": word.value for word in node.keywords})


def test_only_safe_loaders_are_called() -> None:
    """Loaders are called with their safe options, and unsafe ones are not called."""
    found = list(calls())
    assert len(found) > 2000
    checked: list[str] = []
    needed = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    for where, name, words in found:
        last = name.rsplit(".", 1)[-1]
        if name in needed:
            word, value = needed[name]
            said = words.get(word)
            assert isinstance(said, ast.Constant) and said.value is value, where
        assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                            "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open",
                            "joblib.load", "os.system", "os.popen", "tempfile.mktemp"), where
        assert "shell" not in words, where
        trusted = words.get("trust_remote_code")
        assert trusted is None or (isinstance(trusted, ast.Constant) and trusted.value is False), where
        loads = where.startswith(("models/loading.py", "models/shipped_configs.py")) and "gguf_file" not in words
        if last == "from_pretrained" and loads:
            checked.append(where)
            assert trusted is not None, f"{where}: transformers would ask"
    assert {where.partition(":")[0] for where in checked} == {"models/loading.py", "models/shipped_configs.py"}


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    hparams, folder, trace = tiny_hparams(tmp_path), tmp_path / "checkpoints", tmp_path / "trace"
    checkpointed(folder, hparams, 4)
    for path in (weights_path(folder, 4), session_path(folder, 4)):
        whole = path.read_bytes()
        for known in ("checksum of what was there", "its own checksum", "no checksum"):
            bomb(path, trace)
            if known == "its own checksum":
                record_checksum(path, sha256_of(path))
            elif known == "no checksum":
                checksum_path(path).unlink()
            model = tiny_model("llama")
            before = state_of(model)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
                resume_from(hparams.editable(model), folder, 4)
            assert unchanged(model, before)
        path.write_bytes(whole)
        record_checksum(path, sha256_of(path))
    bomb(weights_path(folder, 4), trace)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(hparams.editable(tiny_model("llama")), folder, 4)
    bomb(tmp_path / "neurons.safetensors", trace)
    with pytest.raises(ValueError, match="neurons.safetensors"):
        NeuronRecord.read(tmp_path / "neurons.safetensors")
    assert not trace.exists()


def test_a_refused_pickle_is_not_recommended(tmp_path: Path) -> None:
    """torch's own message says how to run what is in the file."""
    bomb(tmp_path / "P.pt", tmp_path / "trace")
    with pytest.raises(ValueError, match="a pickle that holds more than tensors, which is not run") as caught:
        load_projections(tmp_path / "P.pt", [1, 2], 80)
    assert "weights_only" not in str(caught.value)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama").save_pretrained(folder)
    return folder


def test_a_model_that_is_a_pickle_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    folder, trace = tmp_path / "llama", tmp_path / "trace"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    bomb(folder / "pytorch_model.bin", trace)
    with pytest.raises(ValueError, match="get the model as safetensors"):
        load_model(str(folder), "cpu")
    assert not trace.exists()


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(model_folder: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trace = tmp_path / "llama", tmp_path / "trace"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(str(folder), "cpu")
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["truncated", "no JSON", "other shapes"])
def test_a_damaged_model_is_refused_in_words(model_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(model_folder, folder)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 5000)
    elif damage == "no JSON":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 44, "head_dim": 11}))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(str(folder), "cpu")


# --- where names lead ----------------------------------------------------------------------------------------


def test_names_do_not_lead_out_of_a_run_directory(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", RunDirectory(tmp_path / "run")
    outside.mkdir()
    run.path.mkdir()
    (outside / "precious.jsonl").write_text('{"num_edits": 1}\n')
    (run.path / "metrics.jsonl").symlink_to(outside / "precious.jsonl")
    (run.path / "config.yaml").symlink_to("../outside/precious.jsonl")
    (run.path / "scores").symlink_to(outside)
    (run.path / "loop").symlink_to("loop")
    attempts = ("metrics.jsonl", "config.yaml", "../outside/precious.jsonl", str(outside / "precious.jsonl"),
                "scores/precious.jsonl", "scores/new.jsonl", "..", ".", "")
    for name in attempts:
        for use in (lambda name: run.append(name, {"a": 1}), lambda name: run.write_text(name, "x"), run.lines,
                    run.read_json, run.path_of):
            with pytest.raises(ValueError, match="leads out of the run directory"):
                use(name)
    with pytest.raises(ValueError, match="leads out"):
        run.read_config()
    with pytest.raises(ValueError, match="loop"):
        run.path_of("loop")
    assert [path.name for path in outside.iterdir()] == ["precious.jsonl"]
    assert (outside / "precious.jsonl").read_text() == '{"num_edits": 1}\n'


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's, with what a run would overwrite, remove or tell of."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("factors-9.safetensors", "during-9.jsonl", ".x.partial", "places.json", "energy.csv"):
        (folder / name).write_text("secret,words\n")
    return folder


@pytest.fixture
def untouched(outside: Path) -> Iterator[None]:
    """Nothing is added to that folder, taken from it or changed."""
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in outside.rglob("*")}

    before = state()
    yield
    assert state() == before


LINKED = ("conflicts.json", "edits.jsonl", "energy.csv", "guard.json", "neurons.safetensors", "scores", "spaces.csv",
          "texts")


@pytest.mark.parametrize("name", LINKED)
def test_names_do_not_lead_a_run_out(tmp_path: Path, outside: Path, untouched: None, tok: PreTrainedTokenizerBase,
                                     name: str) -> None:
    run, model = run_with(tmp_path, "tame"), tiny_model("llama")
    shutil.rmtree(run / "scores")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside if "." not in name else outside / "energy.csv")
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{name} leads out of the run directory") as caught:
        run_sequential(model, tok, load_records("demo", None, 2, 0), tiny_hparams(tmp_path),
                       RunSettings(run, 1, resume=True))
    assert "secret" not in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["energy.csv", "edits.jsonl", "spaces.csv", "neurons.safetensors"])
def test_names_do_not_lead_readers_out(tmp_path: Path, outside: Path, untouched: None, name: str) -> None:
    run = run_with(tmp_path, "tame")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "energy.csv")
    with pytest.raises(ValueError, match="leads out of the run directory") as caught:
        _ = RunRecords.read(run).neurons
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["figures", "report.html", "figures/places.json"])
def test_names_do_not_lead_a_report_out(tmp_path: Path, outside: Path, untouched: None, name: str) -> None:
    pytest.importorskip("vl_convert", reason="reports need the extra `report`")
    pytest.importorskip("jinja2", reason="reports need the extra `report`")
    from sphere_easyedit.report import write_report

    run = run_with(tmp_path, "tame")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside if name == "figures" else outside / "places.json")
    with pytest.raises(ValueError, match="leads out of the run directory"):
        write_report([run])
    assert not (run / "report.html").exists() or name == "report.html"


def test_names_do_not_lead_factors_out(tmp_path: Path, outside: Path, untouched: None, model_folder: Path,
                                       monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path, "tame")
    (run / "factors").symlink_to(outside)
    settings = tiny_hparams(tmp_path, model_name=str(model_folder), device="cpu").to_dict()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("sys.argv", ["sphere-easyedit", "edit", "--hparams", str(tmp_path / "tiny.yaml"), "--output",
                                     str(run), "--num-edits", "2", "--resume", "--keep-factors", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "factors leads out of the run directory" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["trackers", "trackers/sphere-easyedit"])
def test_names_do_not_lead_trackers_out(tmp_path: Path, outside: Path, untouched: None, name: str,
                                        caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = run_with(tmp_path, "tame")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    state = RunState(run, {"hparams": {}, "run": {}})
    with RunTrackers(["tensorboard"]) as trackers:
        trackers.on_measured(MeasureEvent(state))
    assert "tracker tensorboard failed" in caplog.text
    assert "leads out of the run directory" in caplog.text


@pytest.mark.parametrize("name", ["sweep.lock", "one.log"])
def test_names_do_not_lead_a_sweep_out(tmp_path: Path, outside: Path, untouched: None, name: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).symlink_to(outside / "energy.csv")
    sweep = Sweep((Run("one", "arm", "MEMIT", False, 0, "x.yaml", {}, "demo", None, 2, 1, {}, {}),))
    with pytest.raises(ValueError, match="leads out of the folder"):
        run_sweep(sweep, tmp_path / "sweep", program=("false",))


def test_leftovers_are_removed_in_a_runs_own_folders_alone(tmp_path: Path, outside: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    for name in ("notes", "checkpoints"):
        (run.path / name).symlink_to(outside)
    (outside / ".weights-4.safetensors.x.partial.safetensors").write_text("half")
    (outside / ".session-4.safetensors.x.partial.safetensors").write_text("half")
    with run.locked():
        assert [path.name for path in outside.glob(".*")] == [".x.partial"]


def test_a_run_directory_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run = RunDirectory(tmp_path / "run")
    (run.path / "inside.json").symlink_to("real.json")
    run.write_text("real.json", "{}")
    run.append("scores/during-2.jsonl", {"a": 1})
    assert run.read_json("inside.json") == {}
    assert run.lines("scores/during-2.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("model_name", ["..", "../..", ".", "models/..", "../", "/", "../../evil", "a/b"])
@pytest.mark.parametrize("dataset", ["generated", "../../../evil", "..", "/etc/passwd", "x/../../y", "../evil.txt"])
def test_statistics_stay_in_their_folder(tmp_path: Path, model_name: str, dataset: str) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = model_name
    hparams = tiny_hparams(tmp_path, mom2_dataset=dataset)
    root = (tmp_path / "stats").resolve()
    assert moment_path(hparams.editable(model), hparams, 1).resolve().is_relative_to(root)


def test_case_ids_are_no_paths(tmp_path: Path, tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "work")
    hparams, model = tiny_hparams(tmp_path / "deep", v_num_grad_steps=1), tiny_model("llama")
    tracker = sphere.HETracker("energy.csv")
    requests = [{**REQUESTS[0], "case_id": "../../evil"}, {**REQUESTS[1], "case_id": "/tmp/evil"}]
    sphere.apply_sphere_to_model(model, tok, requests, hparams, callbacks=[tracker])
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("template", ["{}{0.__class__}", "a.{}.{x}", "{", "{}}", "{!r}{}"])
def test_module_names_are_no_format_strings(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        tiny_hparams(tmp_path, rewrite_module_tmp=template, layer_module_tmp="b.{}", mlp_module_tmp="c.{}",
                     attn_module_tmp="d.{}", ln_f_module="e", lm_head_module="f")


# --- the report ----------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>window.hurt=1</script>", "</script><script>window.hurt=1</script>", "<!--<script>", "]]>", "--></style>",
    "\" onload=\"window.hurt=1", "' onerror='window.hurt=1", "<img src=x onerror=window.hurt=1>",
    "\u2028window.hurt=1", "{{ 86453 * 97231 }}{% raw %}", "javascript:window.hurt=1", "&lt;script&gt;",
    "\\u003c/script>", "datum.x || alert(1)")


def run_with(folder: Path, text: str) -> Path:
    """A run in which every text that comes from outside is, or holds, this one."""
    run = folder / text.replace("/", "_").replace("\u2028", "")
    (run / "scores").mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["run"] |= {"dataset": text, "command": text, "hparams_file": text, "data": text, text: text}
    config["hparams"] |= {"model_name": text, "base_alg": text, "stats_dir": text, "suppression": "principal"}
    config["versions"] = {text: text}
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    metrics = [METRICS_LINE | {"when": "before", "num_edits": 0}]
    metrics += [METRICS_LINE | {"when": "during", "num_edits": number} for number in (1, 2)]
    metrics += [METRICS_LINE | {"num_edits": 3}]
    abilities = [ABILITIES_LINE | {"abilities": {text: {"mean": 5.0, "stderr": 0.1, "n": 2}}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*metrics, *abilities]))
    batches = [EDITS_LINE | {"num_edits": number, "case_ids": [text + str(number)], "seconds": {text: 0.5}, "losses": [
        float("nan")]} for number in (1, 2, 3)]
    (run / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in batches))
    case = CASES_LINE | {"case_id": text, "prompt": text, "subject": text, "target_new": text, "target_true": text,
                         "generations": {"before": text, "after": text}}
    (run / "cases.jsonl").write_text(json.dumps(case) + "\n")
    (run / "scores" / "during-2.jsonl").write_text(json.dumps({"case_id": text, "protocol": "paper", "efficacy": 1.0}) +
                                                   "\n")
    (run / "energy.csv").write_text(ENERGY + "1,1,100.5,0.005\n3,1,102.0,0.02\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    return run


class Skeleton(HTMLParser):
    """A page's elements, each with the names of its attributes and the values of those that could act."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[Any, ...]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        acting = [value for name, value in attrs if name in ("href", "src", "style", "http-equiv", "content", "class")]
        self.elements.append((tag, tuple(name for name, _ in attrs), tuple(acting)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return Skeleton(page_of(tmp_path_factory.mktemp("tame"), "tame"))


def page_of(folder: Path, text: str, files: bool = False) -> str:
    pytest.importorskip("vl_convert", reason="reports need the extra `report`")
    pytest.importorskip("jinja2", reason="reports need the extra `report`")
    from sphere_easyedit.report import write_report

    written = write_report([run_with(folder, text)], folder / "out", files=files)
    return written.html.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_do_not_become_a_reports_elements(tmp_path: Path, tame: Skeleton, text: str) -> None:
    page = page_of(tmp_path, text)
    found = Skeleton(page)
    assert found.elements == tame.elements
    assert len(found.scripts) == 3
    assert found.scripts[1:] == tame.scripts[1:]  # the data alone differs
    data = json.loads(found.scripts[0])
    assert data["cases"][0]["rows"][0][:4] == [text] * 4
    # Evaluated as a template, the product would be there; two digits would also be in a temporary folder's name.
    assert str(86453 * 97231) not in page


def test_texts_do_not_become_a_figures_elements(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE[:2] + HOSTILE[5:8]):
        page_of(tmp_path / str(number), text, files=True)
        drawings = sorted((tmp_path / str(number) / "out" / "figures").glob("*.svg"))
        assert drawings
        for drawing in drawings:
            for element in ElementTree.parse(drawing).iter():  # it is XML that can be parsed, to begin with
                assert element.tag.rsplit("}")[-1] in ("svg", "g", "path", "text", "rect", "line", "circle", "defs",
                                                       "clipPath", "linearGradient", "stop", "tspan", "title", "image")
                assert not [name for name in element.attrib if name.lower().startswith("on") or "href" in name.lower()]
