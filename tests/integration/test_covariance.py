"""Second moments and null spaces: against brute force, EasyEdit's files, and whatever can be wrong with a file."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.golden import load_golden
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.editing.solve import prepare_session
from sphere_easyedit.methods import checked_tensors, covariance
from sphere_easyedit.methods.corpus import corpus_name, token_sequences
from sphere_easyedit.methods.covariance import (
    load_moment,
    load_null_space,
    moment_path,
    null_space,
    null_space_basis,
    save_moment,
    second_moments,
    stored_factor,
    stored_null_space,
)
from sphere_easyedit.methods.solvers import CholeskyFactor, KeyHistory, NullSpace
from sphere_easyedit.methods.statistics_fingerprint import fingerprint_path
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.module_discovery import ModuleNames

TEXTS = ["The capital of France is Paris.", "Rome",
         " ".join(["John Smith plays for the team of the United States of America."] * 3),
         "He said that the official language of Brazil is Portuguese, which is spoken by most people there.",
         "A short one."]


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_file(folder: Path, texts: list[str] = TEXTS, name: str = "texts.txt") -> Path:
    path = folder / name
    lines = texts if path.suffix == ".txt" else [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def editable_of(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> EditableModel:
    return EditableModel(model, hparams.module_names(model.config), hparams.layers)


def brute_force(editable: EditableModel, sequences: list[list[int]], layers: list[int]) -> dict[int, Tensor]:
    """Mean of ``k k^T`` over every token: each text alone through the whole model, without padding."""
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def collect(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            keys[layer].append(args[0][0].double())

        return hook

    handles = [editable.down_projection(layer).register_forward_pre_hook(collect(layer)) for layer in layers]
    with torch.no_grad():
        for sequence in sequences:
            editable.model(input_ids=torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    every = {layer: torch.cat(parts) for layer, parts in keys.items()}
    return {layer: rows.T @ rows / len(rows) for layer, rows in every.items()}


# --- collecting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [8192, 40])
def test_collected_moment_equals_brute_force(family: str, tokens_at_once: int, tok: PreTrainedTokenizerBase,
                                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "TOKENS_AT_ONCE", tokens_at_once)
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=len(TEXTS),
                           mom2_max_length=128, layers=[0, 2])
    editable = editable_of(tiny_model(family), hparams)
    sequences = [tok(text)["input_ids"] for text in TEXTS]
    assert len({len(sequence) for sequence in sequences}) > 3  # so that padding is in play
    found = second_moments(editable, tok, hparams)
    expected = brute_force(editable, sequences, [0, 2])
    for layer in (0, 2):
        assert found[layer].dtype == torch.float32
        assert relative_error(found[layer], expected[layer]) < 1e-5


def test_written_file_has_easyedits_layout(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                           caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sphere_easyedit")
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=len(TEXTS),
                           mom2_max_length=128)
    editable = editable_of(tiny_model(family), hparams)
    editable.config._name_or_path = "/some/where/my-model/"
    found = second_moments(editable, tok, hparams)
    module = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    path = tmp_path / "stats" / "my-model" / "texts_stats" / f"{module}_float32_mom2_{len(TEXTS)}.npz"
    assert path == moment_path(editable, hparams, 1)
    golden = next((load_golden(family).folder / "stats").rglob("*.npz"))
    with np.load(path) as ours, np.load(golden) as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in theirs.files:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].ndim == theirs[name].ndim
        assert str(ours["mom2.constructor"]) == str(theirs["mom2.constructor"])
        assert int(ours["mom2.count"]) == sum(len(tok(text)["input_ids"]) for text in TEXTS)
        assert int(ours["sample_size"]) == len(TEXTS)
        mean = torch.from_numpy(ours["mom2.mom2"]) / int(ours["mom2.count"])
    assert relative_error(mean, found[1]) < 1e-6
    paths = [moment_path(editable, hparams, layer) for layer in hparams.layers]
    assert sorted(path.parent.iterdir()) == sorted([*paths, *map(fingerprint_path, paths)])  # and no temporary file
    assert f"statistics of layers [1, 2] are stored in {path.parent}" in caplog.messages


def test_files_are_read_and_not_collected_again(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=len(TEXTS),
                           mom2_max_length=128)
    editable = editable_of(tiny_model("llama"), hparams)
    first = second_moments(editable, tok, hparams)
    kept = moment_path(editable, hparams, 2).stat().st_mtime_ns
    moment_path(editable, hparams, 1).unlink()
    second = second_moments(editable, tok, hparams)  # collects what is missing, and only that
    assert moment_path(editable, hparams, 2).stat().st_mtime_ns == kept
    assert all(torch.equal(first[layer], second[layer]) for layer in hparams.layers)
    monkeypatch.setattr(covariance, "_collect", pytest.fail)
    assert torch.equal(second_moments(editable, tok, hparams)[1], second[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_of_the_file(dtype: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=5, mom2_dtype=dtype)
    editable = editable_of(tiny_model("llama"), hparams)
    found = second_moments(editable, tok, hparams)
    path = moment_path(editable, hparams, 1)
    assert f"_{dtype}_mom2_5" in path.name
    with np.load(path) as stored:
        assert str(stored["mom2.mom2"].dtype) == dtype
    assert found[1].dtype == torch.float32


def test_sum_too_large_for_the_files_dtype(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Float16 ends at 65,504: what does not fit is not filed, or the file would be refused for ever after."""
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=5, mom2_dtype="float16")
    model = tiny_model("llama")
    editable = editable_of(model, hparams)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1000.0)
    with pytest.raises(ValueError, match="mom2_dtype"):
        second_moments(editable, tok, hparams)
    assert not moment_path(editable, hparams, 1).exists()


def test_golden_statistics_are_read_as_they_are() -> None:
    for family, names in (("llama", "model.layers.{}.mlp.down_proj"), ("gpt2", "transformer.h.{}.mlp.c_proj")):
        golden = load_golden(family)
        model, tok = golden.load()
        hparams = golden.hparams(base_alg="MEMIT")
        editable = editable_of(model, hparams)
        found = second_moments(editable, tok, hparams)
        for layer, moment in found.items():
            path = next((golden.folder / "stats").rglob(f"{names.format(layer)}_float32_mom2_*.npz"))
            with np.load(path) as stored:
                expected = torch.from_numpy(stored["mom2.mom2"]) / int(stored["mom2.count"])
            assert torch.equal(moment, expected)


def test_collecting_leaves_the_model_as_it_was(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=5)
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    second_moments(editable_of(model, hparams), tok, hparams)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def opt() -> tuple[nn.Module, ModuleNames]:
    config = AutoConfig.for_model("opt", vocab_size=1500, hidden_size=48, ffn_dim=80, num_hidden_layers=3,
                                  num_attention_heads=4, word_embed_proj_dim=48, max_position_embeddings=128)
    decoder = "model.decoder"
    return _model(config), ModuleNames(f"{decoder}.layers.{{}}.fc2", f"{decoder}.layers.{{}}", f"{decoder}.layers.{{}}",
                                       f"{decoder}.layers.{{}}.self_attn", f"{decoder}.final_layer_norm", "lm_head")


def mixture(model_type: str, down_projection: str = "mlp.shared_expert.down_proj", **changes: Any
            ) -> tuple[nn.Module, ModuleNames]:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = AutoConfig.for_model(model_type, **{
        "vocab_size": 1500, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "max_position_embeddings": 128, **changes})
    block = "model.layers.{}"
    return _model(config), ModuleNames(f"{block}.{down_projection}", block, f"{block}.mlp", f"{block}.self_attn",
                                       "model.norm", "lm_head")


def llama4() -> tuple[nn.Module, ModuleNames]:
    return mixture("llama4_text", "feed_forward.shared_expert.down_proj", intermediate_size_mlp=80, head_dim=12,
                   num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=64,
                   pad_token_id=0)


def qwen3_next() -> tuple[nn.Module, ModuleNames]:
    return mixture("qwen3_next", head_dim=12, linear_num_value_heads=4, linear_num_key_heads=2,
                   linear_key_head_dim=12, linear_value_head_dim=12,
                   layer_types=["linear_attention", "full_attention", "linear_attention"])


def _model(config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [opt, lambda: mixture("qwen2_moe"), llama4, qwen3_next],
                         ids=["OPT", "Qwen2-MoE", "Llama 4", "Qwen3-Next"])
def test_networks_that_flatten_their_tokens(make: Callable[[], tuple[nn.Module, ModuleNames]], tmp_path: Path,
                                            tok: PreTrainedTokenizerBase) -> None:
    model, names = make()
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=len(TEXTS),
                           mom2_max_length=128)
    editable = EditableModel(model, names, [1, 2])
    found = second_moments(editable, tok, hparams)
    flat: dict[int, list[Tensor]] = {1: [], 2: []}
    handles = [editable.down_projection(layer).register_forward_pre_hook(
        lambda _module, args, layer=layer: flat[layer].append(args[0].reshape(-1, args[0].shape[-1]).double()))
        for layer in flat]
    with torch.no_grad():
        for text in TEXTS:  # each alone, so without padding
            model(input_ids=torch.tensor([tok(text)["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, parts in flat.items():
        keys = torch.cat(parts)
        assert len(keys) == sum(len(tok(text)["input_ids"]) for text in TEXTS)
        assert relative_error(found[layer], keys.T @ keys / len(keys)) < 1e-5


class _Routed(nn.Module):
    """A network of which one expert sees every other token."""

    def __init__(self, mlp: nn.Module, how: str) -> None:
        super().__init__()
        self.down_proj, self._mlp, self._how = mlp.down_proj, [mlp], how

    def forward(self, states: Tensor) -> Tensor:
        mlp = self._mlp[0]
        hidden = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
        if self._how == "some tokens":
            out = torch.zeros_like(states)
            out.flatten(0, 1)[::2] = self.down_proj(hidden.flatten(0, 1)[::2])
            return out
        if self._how == "twice":
            return (self.down_proj(hidden) + self.down_proj(hidden)) / 2
        return nn.functional.linear(hidden, self.down_proj.weight)


@pytest.mark.parametrize(("how", "message"), [
    ("some tokens", r"saw states of shape .* rows of .* tokens, not one vector per token.*shared expert"),
    ("twice", r"ran 2 times in a forward pass, not once"), ("never", r"ran 0 times in a forward pass, not once")])
def test_keys_that_can_not_be_told_by_token(how: str, message: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is filed, nor said to be."""
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(text_file(tmp_path)), mom2_n_samples=len(TEXTS),
                           mom2_max_length=128)
    model = tiny_model("llama")
    model.model.layers[2].mlp = _Routed(model.model.layers[2].mlp, how)
    caplog.set_level(logging.INFO, "sphere_easyedit")
    with pytest.raises(ValueError, match=rf"^model\.layers\.2\.mlp\.down_proj {message}") as error:
        second_moments(editable_of(model, hparams), tok, hparams)
    assert "\n" not in str(error.value)
    assert "stored" not in caplog.text and not list((tmp_path / "stats").rglob("*.npz"))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dataset", ["texts.txt", "generated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, dataset: str, tok: PreTrainedTokenizerBase,
                                           tmp_path: Path) -> None:
    text_file(tmp_path)
    source = dataset if dataset == "generated" else str(tmp_path / dataset)
    model, before = tiny_model("llama"), torch.get_default_dtype()
    wanted, other = (tiny_hparams(tmp_path / name, mom2_dataset=source, mom2_n_samples=5) for name in ("one", "two"))
    expected = second_moments(editable_of(model, wanted), tok, wanted)
    space = null_space(expected[1], None, 0.6)
    torch.set_default_dtype(dtype)
    try:
        found = second_moments(editable_of(model, other), tok, other)
        assert all(torch.equal(found[layer], moment) for layer, moment in expected.items())
        assert torch.equal(null_space(found[1], None, 0.6).columns, space.columns)
        assert KeyHistory.empty(5, None, torch.device("cpu")).keys.dtype == torch.float32
        projection = space.columns @ space.columns.T if not space.complement else \
            torch.eye(80, dtype=torch.float32) - space.columns @ space.columns.T
        torch.save(projection[None], tmp_path / "P.pt")
        loaded = load_null_space(tmp_path / "P.pt", [1], 80)[1]
        assert loaded.columns.dtype == torch.float32 and loaded.dimensions == space.dimensions
    finally:
        torch.set_default_dtype(before)


# --- damaged and foreign files ------------------------------------------------------------------------------


class _Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._target),)


def _npz(path: Path, **changes: Any) -> None:
    content = {"mom2.constructor": np.array("x"), "mom2.count": np.array(7),
               "mom2.mom2": np.eye(80, dtype=np.float32), "sample_size": np.array(5), **changes}
    with path.open("wb") as stream:
        np.savez(stream, **{name: value for name, value in content.items() if value is not None})


def _truncated(path: Path) -> None:
    _npz(path)
    path.write_bytes(path.read_bytes()[:-400])


def _flipped(path: Path) -> None:
    _npz(path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


def _with_nan(path: Path) -> None:
    total = np.eye(80, dtype=np.float32)
    total[3, 4] = np.nan
    _npz(path, **{"mom2.mom2": total})


DAMAGES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_bytes(b"no archive at all\n" * 9) and None,
    "truncated": _truncated,
    "flipped bit": _flipped,
    "key missing": lambda path: _npz(path, **{"mom2.mom2": None}),
    "wrong shape": lambda path: _npz(path, **{"mom2.mom2": np.eye(79, dtype=np.float32)}),
    "not finite": _with_nan,
    "no samples": lambda path: _npz(path, **{"mom2.count": np.array(0)}),
    "count of several": lambda path: _npz(path, **{"mom2.count": np.array([7, 7])}),
    "pickle": lambda path: _npz(path, **{"mom2.mom2": np.array([object], dtype=object)}),
    "text for numbers": lambda path: _npz(path, **{"mom2.mom2": np.full((80, 80), "a")}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_file_is_refused_with_path_and_remedy(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.npz"
    DAMAGES[damage](path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"\(79, 79\).*\(80, 80\).*stats_dir" if damage == "wrong shape" else "remove"
                       ) as caught:
        load_moment(path, 80)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_unusable_file_leaves_the_model_untouched(base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path
                                                  ) -> None:
    hparams = tiny_hparams(tmp_path, base_alg=base_alg)
    model = tiny_model("llama")
    path = moment_path(editable_of(model, hparams), hparams, 2)
    path.parent.mkdir(parents=True)
    _npz(path.with_name(path.name.replace("layers.2", "layers.1")))
    DAMAGES["not finite"](path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="remove"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sphere.EditSession.of(model).num_batches == 0
    assert path.exists()


def test_interrupted_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "layer.npz"

    def fail(stream: Any, **_: Any) -> None:
        stream.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        save_moment(path, torch.eye(3), 5, 2)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()
    save_moment(path, torch.eye(3), 5, 2)
    monkeypatch.setattr(np, "savez", fail)
    content = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        save_moment(path, 2 * torch.eye(3), 5, 2)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == content
    assert torch.equal(load_moment(path, 3), torch.eye(3) / 5)


# --- text sources -------------------------------------------------------------------------------------------


def sequences_of(tok: PreTrainedTokenizerBase, folder: Path, max_length: int = 100, **changes: Any) -> list[list[int]]:
    hparams = tiny_hparams(folder, **changes)
    return token_sequences(editable_of(tiny_model("llama"), hparams), tok, hparams, max_length)


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_local_file(name: str, tok: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = text_file(tmp_path, ["", *TEXTS, "   "], name)
    everything = sequences_of(tok, tmp_path, mom2_dataset=str(path), mom2_n_samples=50)
    assert "holds 5 texts, fewer than mom2_n_samples 50" in caplog.text
    expected = sorted(tok(text.strip())["input_ids"] for text in TEXTS)
    assert sorted(tok(tok.decode(ids).strip())["input_ids"] for ids in everything) == expected
    some = sequences_of(tok, tmp_path, mom2_dataset=str(path), mom2_n_samples=2)
    assert len(some) == 2
    assert all(ids in everything for ids in some)
    drawn = {tuple(map(tuple, sequences_of(tok, tmp_path, mom2_dataset=str(path), mom2_n_samples=2, seed=seed)))
             for seed in range(6)}
    assert len(drawn) > 1  # drawn by the seed
    assert some == sequences_of(tok, tmp_path, mom2_dataset=str(path), mom2_n_samples=2)


def test_texts_are_cut(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = text_file(tmp_path)
    cut = sequences_of(tok, tmp_path, max_length=6, mom2_dataset=str(path), mom2_n_samples=5)
    whole = sequences_of(tok, tmp_path, mom2_dataset=str(path), mom2_n_samples=5)
    assert max(map(len, whole)) > 6
    assert cut == [ids[:6] for ids in whole]


@pytest.mark.parametrize(("settings_", "limit"), [({"mom2_max_length": 1024}, 128), ({"mom2_max_length": 9}, 9)])
def test_length_is_capped_by_setting_and_context(settings_: dict[str, int], limit: int, tok: PreTrainedTokenizerBase,
                                                 tmp_path: Path) -> None:
    """The tiny model's context holds 128 tokens; a text of many more is no reason to fail."""
    path = text_file(tmp_path, ["word " * 400])
    hparams = tiny_hparams(tmp_path, mom2_dataset=str(path), mom2_n_samples=1, **settings_)
    editable = editable_of(tiny_model("gpt2"), hparams)
    assert len(tok("word " * 400)["input_ids"]) > 128
    second_moments(editable, tok, hparams)
    with np.load(moment_path(editable, hparams, 1)) as stored:
        assert int(stored["mom2.count"]) == limit


@pytest.mark.parametrize(("line", "number"), [
    ("{not json", 2), ('{"no_text": 1}', 2), ('["text"]', 2), ("17", 2)])
def test_bad_jsonl_line_is_named(line: str, number: int, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"line {number}") as caught:
        sequences_of(tok, tmp_path, mom2_dataset=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize(("content", "message"), [
    (None, "is not a file; set mom2_dataset to"), ('{"text": "café"}\n'.encode("latin-1"), "(?i)utf-?8"),
    (b"\n  \n", "holds no text; set mom2_dataset to")], ids=["missing", "latin-1", "blank"])
def test_unusable_text_file(content: bytes | None, message: str, suffix: str, tok: PreTrainedTokenizerBase,
                            tmp_path: Path) -> None:
    path = tmp_path / f"texts.{suffix}"
    if content == b"\n  \n":
        text_file(tmp_path, ["", "  "], path.name)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        sequences_of(tok, tmp_path, mom2_dataset=str(path))
    assert str(path) in str(caught.value)


def _replace_datasets(monkeypatch: pytest.MonkeyPatch, replacement: Any) -> None:
    """Let ``import datasets`` give, or raise, the replacement; offline either way."""
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name != "datasets":
            return real(name, package)
        if isinstance(replacement, BaseException):
            raise replacement
        return replacement

    monkeypatch.setattr(importlib, "import_module", import_module)


class _Stream:
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records, self.seeds = records, []

    def shuffle(self, seed: int) -> list[dict[str, Any]]:
        self.seeds.append(seed)
        return self._records


def _unreachable(*_: Any, **__: Any) -> Any:
    raise ConnectionError("offline")


@pytest.mark.parametrize(("library", "message"), [
    (ImportError("No module named 'datasets'"), r"pip install datasets.*or set mom2_dataset to a local"),
    (types.SimpleNamespace(load_dataset=_unreachable), r"'no/such-set'.*offline; set mom2_dataset to a local")],
    ids=["no library", "offline"])
def test_data_set_out_of_reach(library: Any, message: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_datasets(monkeypatch, library)
    with pytest.raises(ValueError, match=message):
        sequences_of(tok, tmp_path, mom2_dataset="no/such-set")


@pytest.mark.parametrize(("name", "asked"), [
    ("wikipedia", ("wikimedia/wikipedia", "20231101.en")), ("someone/texts", ("someone/texts", None))])
def test_data_set_by_name(name: str, asked: tuple[str, str | None], tok: PreTrainedTokenizerBase, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stream = _Stream([{"text": " "}, {"text": "one"}, {"text": "two"}, {"text": "three"}])

    def load_dataset(*args: Any, **kwargs: Any) -> _Stream:
        calls.append((args, kwargs))
        return stream

    _replace_datasets(monkeypatch, types.SimpleNamespace(load_dataset=load_dataset))
    found = sequences_of(tok, tmp_path, mom2_dataset=name, mom2_n_samples=2, seed=5)
    assert found == [tok("one")["input_ids"], tok("two")["input_ids"]]
    assert calls == [(asked, {"split": "train", "streaming": True})]
    assert stream.seeds == [5]


@pytest.mark.parametrize("records", [[], [{"text": "  "}], [{"body": "no such column"}], [{"text": None}]])
def test_data_set_without_text(records: list[dict[str, Any]], tok: PreTrainedTokenizerBase, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_datasets(monkeypatch, types.SimpleNamespace(load_dataset=lambda *_, **__: _Stream(records)))
    with pytest.raises(ValueError, match=r"someone/texts.*set mom2_dataset to"):
        sequences_of(tok, tmp_path, mom2_dataset="someone/texts")


def test_generated_text(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, mom2_n_samples=7)
    editable = editable_of(tiny_model(family), hparams)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = token_sequences(editable, tok, hparams, 30)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(456)
    assert token_sequences(editable, tok, hparams, 30) == first
    assert len(first) == 7
    assert max(map(len, first)) == 30
    assert all(ids[0] == 0 and 0 not in ids[1:-1] for ids in first)  # the start token, and nothing behind an end
    assert len(set(map(tuple, first))) == 7
    other = tiny_hparams(tmp_path, mom2_n_samples=7, seed=1)
    assert token_sequences(editable, tok, other, 30) != first


@pytest.mark.parametrize(("dataset", "name"), [
    ("/some/where/my.texts.jsonl", "my.texts"), ("texts.txt", "texts"), ("wikipedia", "wikipedia"),
    ("someone/texts", "someone_texts"), ("generated", "generated-seed3-t40")])
def test_corpus_names(tmp_path: Path, dataset: str, name: str) -> None:
    assert corpus_name(tiny_hparams(tmp_path, mom2_dataset=dataset, mom2_max_length=40, seed=3)) == name


def test_statistics_come_from_the_unedited_weights(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Collected in the middle of a run, they are filed under the same name as before it: they must be the same."""
    hparams = tiny_hparams(tmp_path, stats_dir=str(tmp_path / "before"))
    model = tiny_model("llama")
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    changed = tiny_hparams(tmp_path, stats_dir=str(tmp_path / "later"))
    sphere.EditSession.of(model).metrics = {}
    sphere.apply_sphere_to_model(model, tok, REQUESTS, changed)
    assert sphere.EditSession.of(model).num_edits == 2 * len(REQUESTS)
    editable = hparams.editable(model)
    for layer in hparams.layers:
        moments = [load_moment(moment_path(editable, settings, layer), 80) for settings in (hparams, changed)]
        assert torch.equal(*moments)


# --- null spaces --------------------------------------------------------------------------------------------


def diagonal_moment(values: list[float]) -> tuple[Tensor, Tensor]:
    """A moment with given eigenvalues, and its eigenvectors in their order."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T, vectors


def projection(space: NullSpace) -> Tensor:
    return space.project(torch.eye(len(space.columns)))


@pytest.mark.parametrize(("threshold", "kept"), [(0.1, 2), (0.7, 3), (6.0, 5), (0.002, 1)])
def test_null_space_by_threshold(threshold: float, kept: int) -> None:
    moment, vectors = diagonal_moment([5.0, 0.01, 1.0, 0.001, 0.5])
    basis = null_space_basis(moment, threshold=threshold)
    expected = vectors[:, [3, 1, 4, 2, 0][:kept]]
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.T @ basis, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-12)
    space = null_space(moment, threshold=threshold)
    assert (space.dimensions, space.columns.shape[1]) == (kept, min(kept, 5 - kept))
    torch.testing.assert_close(projection(space), expected @ expected.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_are_counted(dtype: torch.dtype) -> None:
    """By inertia, with pivots of one and of two rows."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 17, 60):
        for shift in (-3.0, -0.1, 0.0, 2.0):
            matrix = torch.randn(size, size, generator=generator, dtype=dtype)
            matrix = matrix + matrix.T + shift * torch.eye(size, dtype=dtype)
            assert covariance._negative_eigenvalues(matrix) == int((torch.linalg.eigvalsh(matrix) < 0).sum())
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    assert covariance._negative_eigenvalues(torch.block_diag(swap, -swap)) == 2
    assert covariance._negative_eigenvalues(torch.zeros(3, 3, dtype=dtype)) == 0


@pytest.mark.parametrize(("share", "kept"), [(0.2, 1), (0.4, 2), (0.5, 2), (0.6, 3), (1.0, 5), (0.01, 1)])
def test_null_space_by_share(share: float, kept: int) -> None:
    moment, vectors = diagonal_moment([5.0, 0.01, 1.0, 0.001, 0.5])
    expected = vectors[:, [3, 1, 4, 2, 0][:kept]]
    for threshold in (None, 1e-9):  # the share has the last word
        basis = null_space_basis(moment, threshold, share)
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-10)
        space = null_space(moment, threshold, share)
        assert (space.complement, space.columns.shape[1]) == (kept > 2, min(kept, 5 - kept))
        torch.testing.assert_close(projection(space), expected @ expected.T, rtol=0, atol=1e-6)


def test_null_space_that_is_empty() -> None:
    moment, _ = diagonal_moment([5.0, 1.0])
    with pytest.raises(ValueError, match=r"nullspace_threshold 0\.5 \(the smallest is 1\).*nullspace_share"):
        null_space_basis(moment, threshold=0.5)


@pytest.mark.parametrize("kept", [1, 40, 299, 300])
def test_projection_is_read_whatever_its_rank(kept: int, tmp_path: Path) -> None:
    stacked = _projections(width=300, kept=kept)
    torch.save(stacked, tmp_path / "P.pt")
    spaces = load_null_space(tmp_path / "P.pt", [3, 5], 300)
    for stored, space in zip(stacked, (spaces[3], spaces[5]), strict=True):
        assert (space.dimensions, space.columns.dtype) == (kept, torch.float32)
        assert relative_error(projection(space), stored) < 2e-6


def _projections(count: int = 2, width: int = 6, kept: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    bases = torch.linalg.qr(torch.randn(count, width, kept, generator=generator)).Q
    return bases @ bases.mT


def _oblique() -> Tensor:
    """A projection, P P = P, but along a slanted direction."""
    return torch.tensor([[1.0, 2.0], [0.0, 0.0]]).repeat(2, 1, 1)


NO_NULL_SPACES: dict[str, tuple[Any, int]] = {
    "wrong width": (_projections(width=7), 6),
    "wrong layers": (_projections(count=3), 6),
    "one matrix": (_projections()[0], 6),
    "a list": ([_projections()[0], _projections()[1]], 6),
    "half": (_projections() * 0.5, 6),
    "twice": (_projections() * 2.0, 6),
    "oblique": (_oblique(), 2),
    "empty": (torch.zeros(2, 6, 6), 6),
    "not finite": (torch.full((2, 6, 6), math.nan), 6),
}


@pytest.mark.parametrize("case", NO_NULL_SPACES)
def test_unusable_null_space_is_refused(case: str, tmp_path: Path) -> None:
    content, width = NO_NULL_SPACES[case]
    path = tmp_path / "P.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="P_loc") as caught:
        load_null_space(path, [1, 2], width)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no tensor at all"])
def test_damaged_null_space_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "P.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"P_loc .*P\.pt can't be read"):
        load_null_space(path, [1, 2], 6)


def test_pickle_in_a_null_space_file_is_not_executed(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path, trace = tmp_path / "P.pt", tmp_path / "trace"
    torch.save(_Bomb(trace), path)
    hparams = tiny_hparams(tmp_path, base_alg="AlphaEdit", P_loc=str(path))
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match="can't be read as a plain tensor"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert not trace.exists()
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert trace.exists()


def _spaces(tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    model = tiny_model("llama")
    session = sphere.EditSession()
    prepare_session(editable_of(model, hparams), tok, hparams, session)
    return {layer: projection(metric.space) for layer, metric in session.metrics.items()}


def test_missing_null_space_falls_back_to_the_statistics(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "P.pt"
    absent = _spaces(tok, tiny_hparams(tmp_path, P_loc=str(path)))
    assert f"P_loc {path} does not exist" in caplog.text
    unnamed = _spaces(tok, tiny_hparams(tmp_path))
    assert all(torch.equal(absent[layer], unnamed[layer]) for layer in (1, 2))
    given = _projections(width=80, kept=30)
    torch.save(given, path)
    present = _spaces(tok, tiny_hparams(tmp_path, P_loc=str(path)))
    for layer, stored in zip((1, 2), given, strict=True):
        assert relative_error(present[layer], stored) < 1e-5
        assert relative_error(present[layer], unnamed[layer]) > 0.1


# --- what is derived from statistics and kept beside them ---------------------------------------------------


CPU = torch.device("cpu")


def _statistics(folder: Path, width: int = 40, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(width, 3 * width, generator=generator, dtype=torch.float64)
    path = folder / "model.layers.1.mlp_float32_mom2_7.npz"
    save_moment(path, (samples @ samples.T).float(), 3 * width, 7)
    return path


def _fail(*_: Any) -> Any:
    raise AssertionError("derived again")


def _made_once(make: Callable[[Path], list[Tensor]], maker: tuple[Any, str], folder: Path,
               monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """First made and filed, then read, and made again with a warning where the file is not to be trusted."""
    caplog.set_level("WARNING")
    statistics = _statistics(folder)
    made = make(statistics)
    filed, = folder.glob("*.safetensors")
    assert filed.name.startswith("model.layers.1.mlp_float32_mom2_7_")
    good = filed.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(*maker, _fail)
        patch.setattr(covariance, "load_moment", _fail)
        assert all(torch.equal(*pair) for pair in zip(make(statistics), made, strict=True))
    assert not caplog.records

    one_bit = bytearray(good)
    one_bit[-100] ^= 1
    for content in (b"", b"nonsense", good[:-50], bytes(one_bit), good.replace(b"statistics 1", b"statistics 0")):
        filed.write_bytes(content)
        caplog.clear()
        assert all(torch.equal(*pair) for pair in zip(make(statistics), made, strict=True))
        assert f"{filed}" in caplog.text
        assert "derived again" in caplog.text
        caplog.clear()
        make(statistics)
        assert not caplog.records  # the file was mended

    caplog.clear()
    _statistics(folder, seed=1)  # other statistics under the same name
    other = make(statistics)
    assert "was made from other statistics" in caplog.text
    assert not all(torch.equal(*pair) for pair in zip(other, made, strict=True))
    caplog.clear()
    assert all(torch.equal(*pair) for pair in zip(make(statistics), other, strict=True))
    assert not caplog.records
    assert sorted(path.name for path in folder.iterdir()) == sorted([statistics.name, filed.name])


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"share": 0.9}, {"share": 0.3}, {"share": 1.0}], ids=str)
def test_null_space_is_filed(rule: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             caplog: pytest.LogCaptureFixture) -> None:
    def make(statistics: Path) -> list[Tensor]:
        return [projection(stored_null_space(statistics, 40, rule.get("threshold"), rule.get("share"), CPU))]

    if rule == {"share": 1.0}:  # nothing in the file to be damaged, and no other statistics give anything else
        assert torch.equal(make(_statistics(tmp_path))[0], make(_statistics(tmp_path))[0])
        assert torch.equal(make(_statistics(tmp_path))[0], torch.eye(40, dtype=torch.float64))
        return
    _made_once(make, (covariance, "null_space"), tmp_path, monkeypatch, caplog)


def test_rules_are_filed_apart(tmp_path: Path) -> None:
    statistics = _statistics(tmp_path)
    dimensions = [stored_null_space(statistics, 40, threshold, share, CPU).dimensions
                  for threshold, share in ((0.2, None), (0.5, None), (None, 0.9), (0.2, 0.5)) for _ in range(2)]
    assert dimensions[::2] == dimensions[1::2]
    assert dimensions[4::2] == [36, 20]
    assert dimensions[0] < dimensions[2]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_wide_factor_is_filed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              caplog: pytest.LogCaptureFixture) -> None:
    def make(statistics: Path) -> list[Tensor]:
        return list(stored_factor(statistics, 40, CPU).rows)

    make(_statistics(tmp_path))
    assert list(tmp_path.glob("*.safetensors")) == []  # a narrow one is not
    monkeypatch.setattr(covariance, "MIN_STORED_FACTOR_SIZE", 40)
    _made_once(make, (CholeskyFactor, "of"), tmp_path, monkeypatch, caplog)


def test_factor_of_a_singular_moment_is_not_filed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "MIN_STORED_FACTOR_SIZE", 1)
    path = tmp_path / "C.npz"
    save_moment(path, torch.zeros(5, 5), 3, 7)
    with pytest.raises(torch.linalg.LinAlgError):
        stored_factor(path, 5, CPU)
    assert [file.name for file in tmp_path.iterdir()] == ["C.npz"]


def test_damaged_statistics_are_refused_whatever_lies_beside_them(tmp_path: Path) -> None:
    statistics = _statistics(tmp_path)
    stored_null_space(statistics, 40, None, 0.9, CPU)
    statistics.write_bytes(statistics.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a statistics file"):
        stored_null_space(statistics, 40, None, 0.9, CPU)


def test_folder_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        caplog: pytest.LogCaptureFixture) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    statistics = _statistics(tmp_path)
    monkeypatch.setattr(checked_tensors, "atomic_write", refuse)
    assert stored_null_space(statistics, 40, None, 0.9, CPU).dimensions == 36
    assert "can't be written" in caplog.text
    assert "derived again in the next session" in caplog.text


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_second_run_reads_what_the_first_derived(base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "MIN_STORED_FACTOR_SIZE", 1)
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, v_num_grad_steps=2)
    first, second = tiny_model("llama"), tiny_model("llama")
    sphere.apply_sphere_to_model(first, tok, REQUESTS, hparams)
    monkeypatch.setattr(covariance, "load_moment", _fail)
    sphere.apply_sphere_to_model(second, tok, REQUESTS, hparams)
    for layer, weight in edited_weights(first, hparams).items():
        assert torch.equal(weight, edited_weights(second, hparams)[layer])
