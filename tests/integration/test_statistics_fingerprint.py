"""Fingerprints of statistics: models, texts or tokenizers that share a path do not share statistics."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.editing import solve
from sphere_easyedit.methods import covariance, statistics_fingerprint
from sphere_easyedit.methods.covariance import load_moment, moment_path, save_moment, second_moments
from sphere_easyedit.methods.statistics_fingerprint import StatisticsFingerprints, fingerprint_path, tokenizer_digest
from study.weights import moment_on_file

WORDS = ("the", "of", "and", "in", "Rome", "Paris", "France", "Brazil", "language", "team", "plays", "John", "Smith",
         "who", "was", "born", "said", "that", "official", "world", "moon", "rain", "noon", "1969", "two", "men")


def prose(seed: int) -> str:
    """Twenty paragraphs of words at random: tokens enough for a second moment of full rank."""
    drawn = np.random.default_rng(seed)
    return "\n".join(" ".join(drawn.choice(WORDS, int(drawn.integers(3, 25)))) for _ in range(20)) + "\n"


TEXTS, OTHER_TEXTS = prose(0), prose(1)
FORK = multiprocessing.get_context("fork")

Collect = Callable[..., dict[int, Tensor]]


def write(path: Path, content: str = TEXTS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def another(model: nn.Module, name: str, factor: float = 1.5) -> nn.Module:
    """A copy of a model with one parameter otherwise."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).mul_(factor)
    return other


def same(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[layer], second[layer]) for layer in first)


def moments(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    return second_moments(hparams.editable(model), tok, hparams)


def edited(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    return edited_weights(model, hparams)


# --- edits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["texts.txt", "generated"])
@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_checkpoints_of_one_name_are_edited_as_alone(base_alg: str, text: str, tok: PreTrainedTokenizerBase,
                                                     tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = text if text == "generated" else write(tmp_path / text)
    base = tiny_model("llama")
    models = {"runA": base, "runB": another(base, "model.layers.0.mlp.up_proj.weight", 3.0)}
    for run, model in models.items():
        model.save_pretrained(tmp_path / run / "checkpoint-500")

    def edit(run: str, stats: Path) -> dict[int, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / run / "checkpoint-500")
        return edited(model, tok, tiny_hparams(stats, base_alg=base_alg, v_num_grad_steps=2, mom2_dataset=dataset))

    alone = {run: edit(run, tmp_path / f"stats of {run}") for run in models}
    assert "replaced" not in caplog.text
    for turn, run in enumerate(["runA", "runB", "runB", "runA"]):
        caplog.clear()
        assert same(edit(run, tmp_path / "shared"), alone[run])
        told = [record for record in caplog.records if "replaced" in record.message]
        assert len(told) == (turn in (1, 3)), caplog.text  # neither the first one nor the same one again
        assert all(record.levelno == logging.WARNING and "layers [1, 2]" in record.message
                   and "other weights of the model" in record.message for record in told)


def test_texts_of_one_name_are_told_apart(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                          caplog: pytest.LogCaptureFixture) -> None:
    texts = {"t1": write(tmp_path / "t1" / "corpus.txt"), "t2": write(tmp_path / "t2" / "corpus.txt", OTHER_TEXTS)}

    def edit(text: str, stats: Path) -> dict[int, Tensor]:
        return edited(tiny_model("llama"), tok, tiny_hparams(stats, v_num_grad_steps=2, mom2_dataset=texts[text]))

    alone = {text: edit(text, tmp_path / f"stats of {text}") for text in texts}
    assert not same(alone["t1"], alone["t2"])
    for text in ("t1", "t2"):
        assert same(edit(text, tmp_path / "shared"), alone[text])
    assert caplog.text.count("collected from another text: they are collected again and replaced") == 1


def test_a_session_computes_the_fingerprint_once(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=1, mom2_dataset=write(tmp_path / "texts.txt"))
    names: list[str] = []
    compute = statistics_fingerprint.tensor_digests

    def counted(editable: Any, wanted: Any) -> Any:
        names.extend(wanted)
        return compute(editable, wanted)

    monkeypatch.setattr(statistics_fingerprint, "tensor_digests", counted)
    model = tiny_model("llama")
    for request in REQUESTS:
        sphere.apply_sphere_to_model(model, tok, [request], hparams)
    assert names and len(set(names)) == len(names)
    assert not any(name.startswith(("model.layers.3", "model.norm", "lm_head")) for name in names)


# --- what counts, and what does not --------------------------------------------------------------------------


@pytest.fixture
def first(tok: PreTrainedTokenizerBase, tmp_path: Path) -> tuple[nn.Module, sphere.SPHEREHyperParams]:
    """A tiny Llama whose statistics are on file."""
    hparams = tiny_hparams(tmp_path, mom2_dataset=write(tmp_path / "texts.txt"), mom2_n_samples=3)
    model = tiny_model("llama")
    moments(model, tok, hparams)
    return model, hparams


def turned(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    if getattr(other.config, "rope_parameters", None):
        other.config.rope_parameters["rope_theta"] = 77.0
    else:
        other.config.rope_theta = 77.0
    fresh = type(model)(other.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize(("change", "reason"), [
    (lambda model: another(model, "model.embed_tokens.weight"), "other weights of the model"),
    (lambda model: another(model, "model.layers.0.mlp.down_proj.weight"), "other weights of the model"),
    (lambda model: another(model, "model.layers.1.self_attn.o_proj.weight"), "other weights of the model"),
    (lambda model: copy.deepcopy(model).bfloat16(), "other weights of the model"),
    (turned, "another config of the model (rope_"),
])
def test_another_model_is_noticed(change: Callable[[nn.Module], nn.Module], reason: str, tok: PreTrainedTokenizerBase,
                                  first: tuple[nn.Module, sphere.SPHEREHyperParams], tmp_path: Path,
                                  caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    other = change(model)
    found = moments(other, tok, hparams)
    assert f"the statistics of layers [1, 2] in {tmp_path / 'stats'}" in caplog.text and reason in caplog.text
    assert same(found, moments(other, tok, tiny_hparams(tmp_path / "alone", mom2_dataset=hparams.mom2_dataset,
                                                        mom2_n_samples=3)))
    caplog.clear()
    assert same(moments(other, tok, hparams), found) and not caplog.text


def test_only_layers_above_a_change_are_collected_anew(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                       tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
                                                       ) -> None:
    """Keys of layer 1 do not depend on its own down-projection, those of layer 2 do."""
    model, hparams = first
    before = moments(model, tok, hparams)
    found = moments(another(model, "model.layers.1.mlp.down_proj.weight", 30.0), tok, hparams)
    assert "the statistics of layers [2] in" in caplog.text
    assert torch.equal(found[1], before[1]) and not torch.equal(found[2], before[2])


def lower_case(tok: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tok)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    return other


@pytest.mark.parametrize(("settings", "change_tok", "reason"), [
    ({"mom2_max_length": 5}, None, "tokens of a text 32 in place of 5"),
    ({"seed": 3}, None, "seed 0 in place of 3"),
    ({}, lower_case, "another tokenizer"),
])
def test_settings_and_tokenizers_are_told_apart(settings: dict[str, Any], change_tok: Any, reason: str, tmp_path: Path,
                                                first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    given = {"mom2_dataset": hparams.mom2_dataset, "mom2_n_samples": 3, **settings}
    there = tok if change_tok is None else change_tok(tok)
    found = moments(model, there, tiny_hparams(tmp_path, **given))
    assert f"were collected from {reason}: they are collected again and replaced" in caplog.text
    assert same(found, moments(model, there, tiny_hparams(tmp_path / "alone", **given)))
    assert not same(found, moments(model, tok, hparams))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight",
                                  "model.norm.weight", "lm_head.weight"])
def test_what_comes_behind_the_keys_does_not_count(name: str, first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                   tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    model, hparams = first
    monkeypatch.setattr(covariance, "_collect", pytest.fail)
    moments(another(model, name, 30.0), tok, hparams)


def test_all_weights_count_where_the_model_writes_the_text(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    hparams, model = tiny_hparams(tmp_path), tiny_model("llama")
    moments(model, tok, hparams)
    moments(another(model, "lm_head.weight", 30.0), tok, hparams)
    assert "were collected from another text" in caplog.text


def test_what_does_not_shape_keys_does_not_count(first: tuple[nn.Module, sphere.SPHEREHyperParams], tmp_path: Path,
                                                 tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other layers, a moved text, the tokenizer's padding and truncation, and what configs say of themselves."""
    model, _ = first
    monkeypatch.setattr(covariance, "_collect", pytest.fail)
    model.config.use_cache, model.config.pad_token_id = False, 7
    model.config._attn_implementation = "eager"
    tok.pad_token = tok.eos_token
    tok(["one", "and another one"], truncation=True, max_length=2, padding=True)
    moved = write(tmp_path / "elsewhere" / "texts.txt")
    for layers in ([1, 2], [2]):
        moments(model, tok, tiny_hparams(tmp_path, mom2_dataset=moved, mom2_n_samples=3, layers=layers))


def test_versions_of_transformers_may_add_fields(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                 tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hparams = first
    for layer in hparams.layers:
        path = fingerprint_path(moment_path(hparams.editable(model), hparams, layer))
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["config"]["a_field_of_another_version"] = 3
        del stored["config"]["attention_bias"]
        path.write_text(json.dumps(stored), encoding="utf-8")
    monkeypatch.setattr(covariance, "_collect", pytest.fail)
    moments(model, tok, hparams)


def test_a_text_that_is_not_here(first: tuple[nn.Module, sphere.SPHEREHyperParams], tok: PreTrainedTokenizerBase,
                                 caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    found = moments(model, tok, hparams)
    Path(hparams.mom2_dataset).unlink()
    caplog.set_level(logging.INFO, "sphere_easyedit")
    assert same(moments(model, tok, hparams), found)
    assert "texts.txt, which is not found here" in caplog.text
    with pytest.raises(ValueError, match="is not a file"):  # what does not fit can't be collected anew either
        moments(another(model, "model.embed_tokens.weight"), tok, hparams)


def test_a_tokenizer_is_told_by_what_it_does(tok: PreTrainedTokenizerBase) -> None:
    before = tokenizer_digest(tok)
    tok("a text that is cut", truncation=True, max_length=2)
    assert tokenizer_digest(copy.deepcopy(tok)) == before != tokenizer_digest(lower_case(tok))
    tok.add_tokens(["<new>"])
    assert tokenizer_digest(tok) != before


# --- weights wherever they lie -------------------------------------------------------------------------------


def of_layers(model: nn.Module, tok: PreTrainedTokenizerBase, folder: Path, layers: list[int], dataset: str
              ) -> dict[int, Any]:
    hparams = tiny_hparams(folder, layers=layers, mom2_dataset=dataset)
    found = StatisticsFingerprints(hparams.editable(model), hparams, tok)
    return {layer: found.expected(layer) for layer in layers}


@pytest.mark.parametrize("dataset", ["texts.txt", "generated"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_weights_have_the_same_fingerprint(family: str, dataset: str, tok: PreTrainedTokenizerBase,
                                                     tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    text = dataset if dataset == "generated" else write(tmp_path / dataset)
    whole = tiny_model(family)
    whole.save_pretrained(tmp_path / "model")
    wanted = of_layers(whole, tok, tmp_path, [1, 2], text)
    for offload in (accelerate.cpu_offload, lambda model: accelerate.disk_offload(model, tmp_path / "away"),
                    lambda model: accelerate.cpu_offload(model, offload_buffers=True)):
        away = offload(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
        assert of_layers(away, tok, tmp_path, [1, 2], text) == wanted


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_model_has_one_fingerprint_whichever_layers_are_edited(
        family: str, bits: int, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wide = {"hidden_size": 64, "intermediate_size": 128} if family == "llama" else {}
    tiny_model(family, **wide).save_pretrained(tmp_path / "model")

    def loaded() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu", quantization_config=
                                                    BitsAndBytesConfig(**{f"load_in_{bits}bit": True})).eval()

    text = write(tmp_path / "texts.txt")
    both, upper = (of_layers(loaded(), tok, tmp_path, layers, text) for layers in ([1, 2], [2]))
    assert both[2] == upper[2] != both[1]
    changed = loaded()
    with torch.no_grad():
        next(parameter for name, parameter in changed.named_parameters() if "norm" in name or "ln_1" in name).mul_(2)
    assert of_layers(changed, tok, tmp_path, [2], text)[2]["model"] != both[2]["model"]


def test_weights_that_a_quantised_layer_keeps_in_buffers_count(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As GPTQ and AWQ do."""
    text, model = write(tmp_path / "texts.txt"), tiny_model("llama")
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    module.register_buffer("qweight", torch.arange(6, dtype=torch.int32))
    before = of_layers(model, tok, tmp_path, [1], text)
    module.qweight[2] = 9
    assert of_layers(model, tok, tmp_path, [1], text)[1]["model"] != before[1]["model"]


# --- files of others -----------------------------------------------------------------------------------------


def test_files_without_a_fingerprint_are_taken_as_they_are(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                           tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    editable = hparams.editable(model)
    paths = [moment_path(editable, hparams, layer) for layer in hparams.layers]
    for path in paths:
        save_moment(path, 7 * torch.eye(80), 7, 3)  # over ours, as EasyEdit's force_recompute does
    fingerprint_path(paths[0]).unlink()
    caplog.set_level(logging.INFO, "sphere_easyedit")
    found = moments(another(model, "model.embed_tokens.weight"), tok, hparams)
    assert all(torch.equal(moment, torch.eye(80)) for moment in found.values())
    told = [record.message for record in caplog.records if "used without a check" in record.message]
    assert len(told) == 2
    assert "layers [1]" in told[0] and "has no fingerprint" in told[0]
    assert "layers [2]" in told[1] and "not the file that its fingerprint was written for" in told[1]


def test_a_fingerprint_that_can_not_be_read(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                            tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    before = moments(model, tok, hparams)
    for content in ("", "{", "[]", '{"format": "another"}', "null"):
        path = fingerprint_path(moment_path(hparams.editable(model), hparams, 2))
        path.write_text(content, encoding="utf-8")
        caplog.clear()
        assert same(moments(model, tok, hparams), before)
        assert "layers [2] in" in caplog.text and "a fingerprint that can't be read" in caplog.text
    path.write_text(json.dumps({"format": statistics_fingerprint._FORMAT, "contents": "x"}), encoding="utf-8")
    assert same(moments(model, tok, hparams), before)


def test_statistics_of_another_model_are_left_out_of_a_study(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                             tok: PreTrainedTokenizerBase,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    model, hparams = first
    own = moment_on_file(hparams.editable(model), hparams, 1)
    assert own is not None and torch.equal(own, moments(model, tok, hparams)[1])
    other = another(model, "model.embed_tokens.weight")
    assert moment_on_file(hparams.editable(other), hparams, 1) is None
    assert "is left out: it was collected from other weights of the model" in caplog.text
    assert moment_on_file(tiny_hparams(Path("nowhere")).editable(model), tiny_hparams(Path("nowhere")), 1) is None


# --- whoever else is at work ---------------------------------------------------------------------------------


def test_a_read_only_folder_of_another_models_statistics(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                         tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
                                                         ) -> None:
    model, hparams = first

    def refuse(path: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(covariance, "locked", refuse)
    moments(model, tok, hparams)  # what fits needs no lock
    with pytest.raises(ValueError, match=r"of another model or text, and can't be written to .*set stats_dir"):
        moments(another(model, "model.embed_tokens.weight"), tok, hparams)


@pytest.mark.parametrize("at", ["fingerprint", "statistics"])
def test_a_process_that_dies_while_it_replaces(at: str, first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                               tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left, neither model is ever given the other's."""
    model, hparams = first
    wanted, other = moments(model, tok, hparams), another(model, "model.embed_tokens.weight")
    write_fingerprint = covariance.write_fingerprint

    def die(*given: Any) -> None:
        if at == "statistics":  # the fingerprint is there, its statistics are not
            write_fingerprint(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(covariance, "write_fingerprint", die)
    with pytest.raises(KeyboardInterrupt):
        moments(other, tok, hparams)
    monkeypatch.undo()
    assert not moment_path(hparams.editable(model), hparams, 1).exists()
    folder = moment_path(hparams.editable(model), hparams, 1).parent
    left = shutil.copytree(folder, folder.with_name("left"))
    assert same(moments(model, tok, hparams), wanted)
    shutil.rmtree(folder)
    left.rename(folder)
    assert not same(moments(other, tok, hparams), wanted)


def test_statistics_replaced_while_they_are_read(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                 tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hparams = first
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def replaced(path: Path, d_in: int) -> Tensor:
        save_moment(path, 7 * torch.eye(80), 7, 3)
        return load_moment(path, d_in)

    monkeypatch.setattr(covariance, "load_moment", replaced)
    for read in (moments, edited):
        with pytest.raises(ValueError, match=r"was replaced or removed by another process.*stats_dir") as error:
            read(model, tok, hparams)
        assert "\n" not in str(error.value)
        save_moment(moment_path(hparams.editable(model), hparams, 1), torch.eye(80), 1, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_statistics_replaced_behind_the_first_batch(first: tuple[nn.Module, sphere.SPHEREHyperParams],
                                                    tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    """A dense solve reads them anew."""
    model, hparams = first
    hparams = sphere.SPHEREHyperParams.from_dict({**hparams.to_dict(), "base_alg": "MEMIT", "v_num_grad_steps": 1,
                                                 "mom2_n_samples": 20})
    monkeypatch.setattr(solve, "adjusted_keys", lambda *_: None)
    sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], hparams)
    weights = edited_weights(model, hparams)
    moments(another(tiny_model("llama"), "model.embed_tokens.weight"), tok, hparams)
    with pytest.raises(ValueError, match="was replaced or removed by another process"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS[1:2], hparams)
    assert same(edited_weights(model, hparams), weights)


def _alternate(number: int, hparams: sphere.SPHEREHyperParams, tok: PreTrainedTokenizerBase, result: Path) -> None:
    model = tiny_model("llama")
    if number:
        model = another(model, "model.embed_tokens.weight")
    found = []
    for _ in range(8):
        try:
            found.append(moments(model, tok, hparams))
        except ValueError as error:
            assert "by another process" in str(error)
    torch.save(found, result)


def test_processes_with_two_models_in_one_folder(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Each gets its own statistics or an error, never the other's."""
    text = write(tmp_path / "texts.txt")
    hparams = tiny_hparams(tmp_path, mom2_dataset=text)
    children = [FORK.Process(target=_alternate, args=(number, hparams, tok, tmp_path / f"{number}.pt"))
                for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0]
    for number, model in enumerate([tiny_model("llama"), another(tiny_model("llama"), "model.embed_tokens.weight")]):
        wanted = moments(model, tok, tiny_hparams(tmp_path / f"alone {number}", mom2_dataset=text))
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found and all(same(one, wanted) for one in found)


def test_what_is_derived_follows(tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Cholesky factor beside the statistics is derived again with them (the null space: see above, AlphaEdit)."""
    monkeypatch.setattr(covariance, "MIN_STORED_FACTOR_SIZE", 1)
    text = write(tmp_path / "texts.txt")
    model = tiny_model("llama")

    def edit(one: nn.Module, folder: Path) -> dict[int, Tensor]:
        return edited(copy.deepcopy(one), tok, tiny_hparams(folder, base_alg="MEMIT", v_num_grad_steps=1,
                                                            mom2_dataset=text, mom2_n_samples=20))

    other = another(model, "model.layers.0.mlp.up_proj.weight", 2.0)
    alone = edit(other, tmp_path / "alone")
    edit(model, tmp_path)
    assert list((tmp_path / "stats").rglob("*_cholesky.safetensors"))
    assert same(edit(other, tmp_path), alone)
