"""Exports restore the weights they promise, state their errors, and refuse wrong input with nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers.models import save_tiny_model, tiny_hparams, tiny_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.checkpoints import load_weights
from sphere_easyedit.export import (
    EditedWeights,
    ExportableRun,
    apply_deltas,
    base_fingerprint,
    export_adapter,
    export_applied,
    export_deltas,
    export_model,
    read_deltas,
)
from sphere_easyedit.export.card import card_text, code
from sphere_easyedit.export.checksums import tensors_sha256
from sphere_easyedit.export.factors import Spectrum
from sphere_easyedit.export.folders import new_folder
from sphere_easyedit.models.loading import cache_folder
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
# The last one has tied embeddings, as GPT-2 has by default.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "qwen2": ("qwen2", {}), "gpt2": ("gpt2", {}),
    "tied": ("llama", {"tie_word_embeddings": True})}
MEASURED = "llama"  # the one whose run measures its facts
TOKENS = torch.tensor([[5, 17, 300, 42, 8], [11, 1200, 64, 2, 900]])


@dataclass(frozen=True)
class Made:
    """A run of four facts, and its base model on the disk."""

    path: Path
    base: Path
    tok: PreTrainedTokenizerBase

    def load(self) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.base)
        return model.eval()

    def edited(self, at: int | None = None) -> EditedWeights:
        return ExportableRun(self.path, at).read(self.load())

    def reference(self, at: int = 4) -> nn.Module:
        """The edited model as `evaluate` and `show` have it."""
        model, run = self.load(), ExportableRun(self.path)
        load_weights(run.hparams.editable(model), self.path / "checkpoints", at)
        return model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Runs, each made at its first use."""
    known: dict[str, Made] = {}

    def one(name: str) -> Made:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            family, changes = FAMILIES[name]
            base = folder / "base"
            save_tiny_model(base, family, **changes)
            tok = AutoTokenizer.from_pretrained(base)
            model = AutoModelForCausalLM.from_pretrained(base).eval()
            hparams = tiny_hparams(folder, model_name=str(base), v_num_grad_steps=4)
            measure = MeasureSettings(before=name == MEASURED, after=name == MEASURED)
            run_sequential(model, tok, load_records("demo", None, 4, 0), hparams, RunSettings(
                folder / "run", 2, described={"dataset": "demo", "data": None, "seed": 0}, measure=measure,
                keep_weights_every=2))
            known[name] = Made(folder / "run", base, tok)
        return known[name]

    return one


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Made:
    """Each family's run in turn."""
    return make(request.param)


@pytest.fixture
def llama(make: Callable[[str], Made]) -> Made:
    return make("llama")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the run ------------------------------------------------------------------------------------------------


def test_a_run_is_read_without_its_data(made: Made) -> None:
    run, model = ExportableRun(made.path), made.load()
    before = bits(model)
    edited = run.read(model)
    assert same(bits(model), before)
    assert run.num_edits == 4
    assert run.dtype == "float32"
    assert [change.name for change in edited.changes] == [
        f"{ExportableRun(made.path).hparams.editable(model).parameter_name(layer)}" for layer in (1, 2)]
    reference = made.reference()
    for change in edited.changes:
        assert torch.equal(change.before, before[change.name])
        assert torch.equal(change.after, reference.get_parameter(change.name))
        assert not torch.equal(change.before, change.after)
        assert change.transposed == ("gpt2" in type(model).__name__.lower())
    config = yaml.safe_load((made.path / "config.yaml").read_text())
    assert edited.provenance.facts == config["run"]["records"]
    assert edited.provenance.base_fingerprint == base_fingerprint(made.load())


def test_earlier_weights(llama: Made) -> None:
    edited = llama.edited(at=2)
    assert edited.provenance.num_edits == 2
    assert edited.provenance.results is None  # the run measured others
    reference = llama.reference(at=2)
    assert all(torch.equal(change.after, reference.get_parameter(change.name)) for change in edited.changes)
    assert llama.edited().provenance.results is not None


def test_runs_that_can_t_be_exported(llama: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights after 3 edits: kept are 2, 4; .*--keep-weights-every"):
        ExportableRun(llama.path, 3)
    with pytest.raises(ValueError, match="has no config.yaml: .*as `edit --output` makes it"):
        ExportableRun(tmp_path)
    with pytest.raises(ValueError, match=f"has no config.yaml: .*such as {llama.path}"):
        ExportableRun(llama.path.parent)
    (tmp_path / "config.yaml").write_text((llama.path / "config.yaml").read_text())
    with pytest.raises(ValueError, match="kept no weights.*run `edit` again"):
        ExportableRun(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {}\n")
    with pytest.raises(ValueError, match="config.yaml"):
        ExportableRun(tmp_path)


def test_another_base_than_the_run_had_is_refused(llama: Made) -> None:
    model = llama.load()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] += 1
    before = bits(model)
    with pytest.raises(ValueError, match="began with other weights"):
        ExportableRun(llama.path).read(model)
    assert same(bits(model), before)


def test_a_base_that_can_t_be_checked_is_warned_about(llama: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                     ) -> None:
    shutil.copytree(llama.path, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("session-*"):
        file.unlink()
    edited = ExportableRun(tmp_path / "run").read(llama.load())
    assert "can't be checked" in caplog.text
    assert all(torch.equal(one.after, other.after)
               for one, other in zip(edited.changes, llama.edited().changes, strict=True))


# --- the whole model ----------------------------------------------------------------------------------------


def test_the_whole_model_loads_in_plain_transformers(made: Made, tmp_path: Path) -> None:
    export_model(tmp_path / "out", made.load(), made.tok, made.edited(), max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reference = made.reference()
    assert same(bits(loaded), bits(reference))
    assert torch.equal(logits(loaded), logits(reference))
    assert not torch.equal(logits(loaded), logits(made.load()))
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tok("The capital of France is")["input_ids"] == made.tok("The capital of France is")["input_ids"]
    assert not list(tmp_path.glob(".*"))
    modes = [path.stat().st_mode & 0o444 for path in (tmp_path / "out", tmp_path / "out" / "README.md")]
    assert modes[0] == modes[1]  # as private or public as any new file


def test_the_whole_model_in_another_dtype(llama: Made, tmp_path: Path) -> None:
    export_model(tmp_path / "out", llama.load(), llama.tok, llama.edited(), torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    reference = bits(llama.reference().to(torch.bfloat16))
    assert all(torch.equal(stored[name], value) for name, value in reference.items())
    assert "rounded to bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_a_size_of_shards_that_transformers_refuses_leaves_no_folder(llama: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 gigabytes"):
        export_model(tmp_path / "out", llama.load(), llama.tok, llama.edited(), max_shard_size="5 gigabytes")
    assert not list(tmp_path.iterdir())


# --- deltas -------------------------------------------------------------------------------------------------


def test_exact_deltas_give_the_bits(made: Made, tmp_path: Path) -> None:
    layers = export_deltas(tmp_path / "deltas", made.edited(), exact=True)
    assert {(layer.stored, layer.rank, layer.relative_error) for layer in layers} == {("weight", None, 0.0)}
    model = made.load()
    apply_deltas(model, tmp_path / "deltas")
    assert same(bits(model), bits(made.reference()))
    export_applied(tmp_path / "whole", made.load(), made.tok, read_deltas(tmp_path / "deltas" / "deltas.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(loaded), logits(made.reference()))


@pytest.mark.parametrize("given", [{}, {"tolerance": 0.1}, {"tolerance": 0.1, "dtype": torch.bfloat16}], ids=str)
def test_low_rank_deltas_have_the_stated_error(given: dict[str, Any], made: Made, tmp_path: Path) -> None:
    edited = made.edited()
    layers = export_deltas(tmp_path / "deltas", edited, **given)
    model = made.load()
    deltas = apply_deltas(model, tmp_path / "deltas")
    assert deltas.layers == layers
    stored = load_file(tmp_path / "deltas" / "deltas.safetensors")
    for change, layer in zip(edited.changes, layers, strict=True):
        assert layer.stored == "factors"
        assert layer.rank is not None
        assert layer.rank <= 4  # facts: a batch of AlphaEdit adds as many directions as it has edits
        difference = change.after.double() - change.before.double()
        product = stored[f"left.{layer.name}"].double() @ stored[f"right.{layer.name}"].double()
        assert layer.relative_error == pytest.approx(float((difference - product).norm() / difference.norm()), rel=1e-9)
        assert layer.change_norm == pytest.approx(float(difference.norm()), rel=1e-12)
        assert layer.relative_error <= given.get("tolerance", 1e-4)
        applied = model.get_parameter(change.name).detach().double() - change.before.double()
        rounding = 2.0**-23 * float(change.after.double().norm())
        assert float((applied - product).norm()) <= rounding
        assert stored[f"left.{layer.name}"].dtype == given.get("dtype", torch.float32)
    assert {name for name, before in bits(made.load()).items() if not torch.equal(before, model.get_parameter(name))} \
        == {change.name for change in edited.changes}


def test_where_low_rank_does_not_pay_the_weight_is_stored(llama: Made, tmp_path: Path) -> None:
    """For a change of full rank, and for a tolerance below the rounding of the factors."""
    edited = llama.edited()
    noise = torch.randn(edited.changes[0].before.shape, generator=torch.Generator().manual_seed(0))
    noisy = replace(edited, changes=(replace(edited.changes[0], after=edited.changes[0].before + noise),
                                     edited.changes[1]))
    layers = export_deltas(tmp_path / "noisy", noisy)
    assert [layer.stored for layer in layers] == ["weight", "factors"]
    layers = export_deltas(tmp_path / "near", edited, tolerance=1e-12)
    assert [(layer.stored, layer.relative_error) for layer in layers] == [("weight", 0.0)] * 2
    model = llama.load()
    apply_deltas(model, tmp_path / "near")
    assert same(bits(model), bits(llama.reference()))


def test_a_layer_that_did_not_change(llama: Made, tmp_path: Path) -> None:
    edited = llama.edited()
    still = replace(edited, changes=(replace(edited.changes[0], after=edited.changes[0].before), edited.changes[1]))
    layers = export_deltas(tmp_path / "deltas", still)
    assert (layers[0].rank, layers[0].relative_error, layers[0].change_norm) == (0, 0.0, 0.0)
    model = llama.load()
    apply_deltas(model, tmp_path / "deltas")
    assert torch.equal(model.get_parameter(layers[0].name), edited.changes[0].before)
    layers = export_adapter(tmp_path / "lora", llama.load(), still, 4)
    assert (layers[0].relative_error, layers[0].change_norm) == (0.0, 0.0)


def test_arguments_of_deltas(llama: Made, tmp_path: Path) -> None:
    edited = llama.edited()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"exact": True, "dtype": torch.float16}, "leave dtype out"),
        ({"tolerance": 0.0}, "tolerance is 0.0"), ({"tolerance": float("nan")}, "tolerance is nan")]
    for arguments, match in refused:
        with pytest.raises(ValueError, match=match):
            export_deltas(tmp_path / "deltas", edited, **arguments)
    broken = replace(edited, changes=(replace(edited.changes[0], after=edited.changes[0].after * float("inf")),))
    with pytest.raises(ValueError, match="not finite"):
        export_deltas(tmp_path / "deltas", broken)
    with pytest.raises(ValueError, match="not finite"):
        export_adapter(tmp_path / "deltas", llama.load(), broken, 2)
    huge = replace(edited, changes=(replace(edited.changes[0], after=edited.changes[0].after + 1e12),))
    with pytest.raises(ValueError, match="exceed the range of torch.float16"):
        export_deltas(tmp_path / "deltas", huge, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_refused(llama: Made, tmp_path: Path) -> None:
    export_deltas(tmp_path / "deltas", llama.edited(), exact=True)
    right = base_fingerprint(llama.load())
    others = [llama.load() for _ in range(2)]
    with torch.no_grad():  # not an edited weight
        others[0].get_parameter("model.norm.weight")[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    others[1].to(torch.bfloat16)
    for model in [*others, llama.reference()]:
        before = bits(model)
        with pytest.raises(ValueError, match=f"(?s){base_fingerprint(model)}.*{right}.*in float32"):
            apply_deltas(model, tmp_path / "deltas")
        assert same(bits(model), before)
        with pytest.raises(ValueError, match=right):
            export_applied(tmp_path / "whole", model, llama.tok, read_deltas(tmp_path / "deltas"))
        assert not (tmp_path / "whole").exists()


def test_damaged_deltas_are_refused(llama: Made, tmp_path: Path) -> None:
    export_deltas(tmp_path / "deltas", llama.edited())
    file = tmp_path / "deltas" / "deltas.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    described = whole.replace(b"AlphaEdit + SPHERE", b"AlphaEdit - SPHERE")
    assert described != whole
    for content, match in ((bytes(flipped), "another SHA-256"), (described, "another SHA-256"),
                           (whole[: len(whole) // 2], "can't be read as deltas"), (b"", "can't be read as deltas"),
                           (b"\x80\x02cos\nsystem\n.", "can't be read as deltas")):
        file.write_bytes(content)
        model = llama.load()
        with pytest.raises(ValueError, match=match):
            apply_deltas(model, tmp_path / "deltas")
        assert same(bits(model), bits(llama.load()))
    with pytest.raises(ValueError, match="contains no deltas.safetensors"):
        read_deltas(tmp_path)
    with pytest.raises(ValueError, match="contains no deltas.safetensors"):
        read_deltas(tmp_path / "absent")
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="contains no deltas .*None"):
        read_deltas(file)


def test_deltas_that_do_not_fit_change_nothing(llama: Made, tmp_path: Path) -> None:
    """Manipulated files with valid checksums."""
    export_deltas(tmp_path / "deltas", llama.edited())
    deltas = read_deltas(tmp_path / "deltas")
    name, rank = deltas.layers[1].name, deltas.layers[1].rank
    assert rank is not None
    for wrong, match in (
            ({**deltas.tensors, f"right.{name}": torch.zeros(rank, 7)}, "the file was changed"),
            ({**deltas.tensors, f"left.{name}": torch.full((48, rank), torch.nan)}, "not finite"),
            ({**deltas.tensors, f"left.{name}": torch.zeros(48, rank + 1)}, "the file was changed")):
        model = llama.load()
        with pytest.raises(ValueError, match=match):
            apply_deltas(model, replace(deltas, tensors=wrong))
        assert same(bits(model), bits(llama.load()))
    absent = replace(deltas.layers[1], name="model.layers.9.mlp.down_proj.weight")
    with pytest.raises(ValueError, match="the model has no parameter"):
        apply_deltas(llama.load(), replace(deltas, layers=(deltas.layers[0], absent)))


# --- LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 48])
def test_the_adapter_is_the_truncated_change(rank: int, made: Made, tmp_path: Path) -> None:
    edited, model = made.edited(), made.load()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    attributes = set(vars(model))
    layers = export_adapter(tmp_path / "lora", model, edited, rank)
    assert base_fingerprint(model) == edited.provenance.base_fingerprint
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == kinds
    assert set(vars(model)) == attributes

    truncated = made.load()
    for change, layer in zip(edited.changes, layers, strict=True):
        difference = change.after.double() - change.before.double()
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        nearest = left[:, :rank] * values[:rank] @ right[:rank]
        error = float((difference - nearest).norm() / difference.norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)
        with torch.no_grad():
            truncated.get_parameter(change.name).copy_(change.before.double() + nearest)
    loaded = PeftModel.from_pretrained(made.load(), str(tmp_path / "lora")).eval()
    scale = float(logits(truncated).abs().max())
    assert float((logits(loaded) - logits(truncated)).abs().max()) < 1e-5 * scale
    if rank == 48:
        assert float((logits(loaded) - logits(made.reference())).abs().max()) < 1e-5 * scale
    elif rank == 1:
        assert float((logits(loaded) - logits(made.reference())).abs().max()) > 1e-4 * scale
    merged = loaded.merge_and_unload()
    for change in edited.changes:  # whichever way round the module stores it
        assert torch.allclose(merged.get_parameter(change.name), truncated.get_parameter(change.name), atol=1e-6)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (
        rank, rank, edited.changes[0].transposed)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_in_half_precision(llama: Made, tmp_path: Path) -> None:
    layers = export_adapter(tmp_path / "lora", llama.load(), llama.edited(), 4, torch.bfloat16)
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}
    assert all(1e-4 < layer.relative_error < 1e-2 for layer in layers)  # of the factors' rounding


@pytest.mark.parametrize("rank", [0, 49, -1])
def test_ranks_that_do_not_fit(rank: int, llama: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}: give 1 to 48"):
        export_adapter(tmp_path / "lora", llama.load(), llama.edited(), rank)
    assert not list(tmp_path.iterdir())


# --- factors, fingerprints, folders, cards ------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(0, 10**6), st.floats(-6, 6),
       st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.floats(0.0, 6.0))
def test_the_stated_error_is_the_true_one(rows: int, columns: int, rank: int, seed: int, magnitude: float,
                                          dtype: torch.dtype, decay: float) -> None:
    generator = np.random.default_rng(seed)
    side = min(rows, columns)
    assume(rank <= side)
    left, _ = np.linalg.qr(generator.standard_normal((rows, side)))
    right, _ = np.linalg.qr(generator.standard_normal((columns, side)))
    change = 10.0**magnitude * (left * np.exp(-decay * np.arange(side))) @ right.T
    factors = Spectrum(torch.from_numpy(change)).factors(rank, dtype)
    assert factors.left.shape == (rows, rank)
    assert factors.right.shape == (rank, columns)
    assert factors.left.dtype == factors.right.dtype == dtype
    product = factors.left.double().numpy() @ factors.right.double().numpy()
    true = float(np.linalg.norm(change - product) / np.linalg.norm(change))
    assert factors.relative_error == pytest.approx(true, rel=1e-6, abs=1e-14)
    # Eckart and Young: no rank does better, and rounding costs no more than it must.
    values = np.linalg.svd(change, compute_uv=False)
    best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    assert factors.relative_error >= best * (1 - 1e-6) - 1e-14
    assert factors.relative_error <= best + {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


@PROPERTY
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 10**6), st.floats(1e-5, 0.9))
def test_the_smallest_rank_within_a_tolerance(rows: int, columns: int, seed: int, tolerance: float) -> None:
    change = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = Spectrum(change)
    rank = spectrum.rank_within(tolerance)
    assert spectrum.factors(rank, torch.float64).relative_error <= tolerance * (1 + 1e-6)
    if rank:
        assert spectrum.factors(rank - 1, torch.float64).relative_error > tolerance * (1 - 1e-6)


def test_the_fingerprint_is_of_names_and_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    print_of = base_fingerprint(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == print_of  # in many files
    for parameter in model.parameters():
        parameter.data = parameter.data.T.contiguous().T if parameter.dim() == 2 else parameter.data
    assert base_fingerprint(model) == print_of  # another layout in memory
    seen = {print_of}
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1:].mul_(-1) if parameter.is_contiguous() else parameter[-1, -1].mul_(-1)
        assert base_fingerprint(model) not in seen, name
        seen.add(base_fingerprint(model))
        with torch.no_grad():
            parameter.copy_(kept)
    assert base_fingerprint(model) == print_of
    assert base_fingerprint(model.to(torch.bfloat16)) not in seen
    assert tensors_sha256([("a", torch.zeros(2, 3))]) != tensors_sha256([("b", torch.zeros(2, 3))])
    assert tensors_sha256([("a", torch.zeros(2, 3))]) != tensors_sha256([("a", torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="a is on the meta device"):
        tensors_sha256([("a", torch.zeros(2, device="meta"))])


def test_folders_are_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("done")
    assert (tmp_path / "empty" / "file").read_text() == "done"
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "empty" / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]


@pytest.mark.parametrize("kind", ["model", "deltas", "lora"])
def test_nothing_is_overwritten(kind: str, llama: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    edited, model = llama.edited(), llama.load()
    with pytest.raises(ValueError, match="not empty"):
        if kind == "model":
            export_model(tmp_path, model, llama.tok, edited)
        elif kind == "deltas":
            export_deltas(tmp_path, edited)
        else:
            export_adapter(tmp_path, model, edited, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert same(bits(model), bits(llama.load()))


def test_the_card_states_the_origin(llama: Made, tmp_path: Path) -> None:
    edited = llama.edited()
    layers = export_adapter(tmp_path / "lora", llama.load(), edited, 2)
    card = (tmp_path / "lora" / "README.md").read_text()
    origin = edited.provenance
    assert origin.facts is not None
    assert origin.results is not None
    for text in (origin.base_fingerprint, origin.facts, "AlphaEdit + SPHERE (alpha 0.5, gamma 0.5)", "Facts edited: 4;",
                 "`demo`", "seed `0`", "nullspace_share: 0.6", "transformers:", "protocol `paper`",
                 *(layer.name for layer in layers), *(f"{layer.relative_error:.3e}" for layer in layers),
                 f"{origin.results['post']['efficacy']['mean']:.1f}"):
        assert text in card
    assert "4 of the run's" not in card
    assert "not with those stored here" in card
    assert "not with those stored here" not in card_text("model", origin)
    assert "Facts edited: 2 of the run's 4" in card_text("deltas", llama.edited(at=2).provenance)
    alias = card_text("lora", replace(origin, base="smollm2-135m"))
    assert f"the folder `{cache_folder() / 'llama-smollm2-135m'}`" in alias
    assert "the hub's `HuggingFaceTB/SmolLM2-135M-Instruct`" in alias


NASTY = "</code><script>alert(1)</script>`` | # **x**\n\n# heading\x00\u202e[a](javascript:b)"


def tokens_of(markdown: str) -> list[Token]:
    """All tokens of a text by CommonMark, inline ones included."""
    return [token for block in MarkdownIt().parse(markdown) for token in (block, *(block.children or ()))]


def test_untrusted_text_in_the_card_is_not_markup(llama: Made) -> None:
    origin = llama.edited().provenance
    nasty = replace(origin, base=NASTY, dataset=NASTY, facts=NASTY, method=NASTY,
                    settings={**origin.settings, "stats_dir": "x\n```\n<script>alert(1)</script>"})
    cards = [card_text("model", one) for one in (nasty, origin)]
    types = [[token.type for token in tokens_of(card)] for card in cards]
    assert not {"html_block", "html_inline", "link_open", "strong_open"} & set(types[0])
    assert types[0].count("heading_open") == types[1].count("heading_open")
    assert types[0].count("fence") == types[1].count("fence")
    assert "\u202e" not in cards[0]
    assert "\x00" not in cards[0]


@PROPERTY
@given(st.text(max_size=40) | st.text("`ab |<", max_size=8))
def test_code_spans_hold_any_text(text: str) -> None:
    span = code(text)
    found = tokens_of(f"a {span} b")
    assert [token.type for token in found] == ["paragraph_open", "inline", "text", "code_inline", "text",
                                               "paragraph_close"]
    assert (found[2].content, found[4].content) == ("a ", " b")
    assert "\n" not in span
    assert "\r" not in span
