"""What a caller may hand over, and in what state of PyTorch: right, or refused in one line with the model untouched."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import types
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_config, tiny_hparams, tiny_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.requests import parse_requests, request_dicts
from sphere_easyedit.evaluation.abilities.general import check_abilities, general_abilities
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.metrics import edit_efficacy, evaluate_protocols, evaluate_records
from sphere_easyedit.evaluation.perplexity import perplexity
from sphere_easyedit.evaluation.text_quality import measure_text_quality
from sphere_easyedit.removal import remove_facts
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

RECORDS = load_records("demo", None, 2, 0)


def state_of(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}


def is_untouched(model: nn.Module, before: dict[str, tuple[Tensor, bool]]) -> bool:
    now = state_of(model)
    return now.keys() == before.keys() and all(
        torch.equal(now[name][0], value) and now[name][1] == flag for name, (value, flag) in before.items())


@contextlib.contextmanager
def refused(kind: type[Exception] | tuple[type[Exception], ...], match: str) -> Iterator[None]:
    """An error of a kind, in one line that matches."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Public functions that take a model and a tokenizer, and how they are called.
ENTRIES: dict[str, Callable[[Any, Any, Any, Path], Any]] = {
    "apply_sphere_to_model": lambda model, tok, hparams, _: sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams),
    "with copy": lambda model, tok, hparams, _: sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, copy=True),
    "run_sequential": lambda model, tok, hparams, folder: run_sequential(model, tok, RECORDS, hparams,
                                                                         RunSettings(folder / "run", 2)),
    "evaluate_records": lambda model, tok, *_: evaluate_records(model, tok, RECORDS),
    "edit_efficacy": lambda model, tok, *_: edit_efficacy(model, tok, RECORDS),
    "evaluate_protocols": lambda model, tok, *_: evaluate_protocols(model, tok, RECORDS, ["rome", "easyedit"]),
    "generate_continuations": lambda model, tok, *_: generate_continuations(model, tok, [REQUESTS[0]["prompt"]]),
    "measure_text_quality": lambda model, tok, *_: measure_text_quality(model, tok, RECORDS),
    "perplexity": lambda model, tok, *_: perplexity(model, tok, ["The capital of France is Paris."]),
    "general_abilities": lambda model, tok, *_: general_abilities(model, tok, ["rte"]),
    "check_abilities": lambda model, tok, *_: check_abilities(model, tok, ["rte"]),
}
WITHOUT_TOKENIZER: dict[str, Callable[[Any, Any, Any, Path], Any]] = {
    "EditSession.of": lambda model, *_: sphere.EditSession.of(model),
    "EditSession.attach": lambda model, *_: sphere.EditSession.attach(model, sphere.EditSession()),
    "editable": lambda model, _, hparams, __: hparams.editable(model),
    "remove_facts": lambda model, _, hparams, folder: remove_facts(model, hparams, folder, [0]),
}
every_entry = pytest.mark.parametrize("entry", [*ENTRIES, *WITHOUT_TOKENIZER])


def call(entry: str, model: Any, tok: Any, hparams: Any, folder: Path) -> Any:
    return {**ENTRIES, **WITHOUT_TOKENIZER}[entry](model, tok, hparams, folder)


# --- models --------------------------------------------------------------------------------------------------------


def _compiled_block(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers")[1].compile(backend="eager")  # type: ignore[index]
    return model


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _wrapped_block(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule("model.layers")
    layers[1] = torch.compile(layers[1], backend="eager")
    return model


def _encoder_decoder() -> nn.Module:
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(
        "t5", vocab_size=1500, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: None, TypeError, "the model is a NoneType, .*AutoModelForCausalLM"),
    "name": (lambda: "gpt2", TypeError, "the model is a str, .*AutoModelForCausalLM"),
    "plain module": (_Plain, TypeError, "the model is a _Plain, .*AutoModelForCausalLM"),
    "pipeline": (lambda: types.SimpleNamespace(model=tiny_model("llama")), TypeError, r"give its model, \.model"),
    "DataParallel": (lambda: nn.DataParallel(tiny_model("llama")), TypeError, r"DataParallel: .*model\.module"),
    "torch.compile": (lambda: torch.compile(tiny_model("llama"), backend="eager"), TypeError, r"model\._orig_mod"),
    "model.compile": (lambda: _compiled_in_place(tiny_model("llama")), ValueError, "the model is compiled"),
    "block.compile": (lambda: _compiled_block(tiny_model("llama")), ValueError, r"model\.layers\.1 is compiled"),
    "compiled block": (lambda: _wrapped_block(tiny_model("llama")), ValueError, r"model\.layers\.1 is compiled"),
    "encoder-decoder": (_encoder_decoder, ValueError, "T5ForConditionalGeneration is an encoder-decoder"),
    "no head": (lambda: AutoModel.from_config(tiny_config("llama")), ValueError, "LlamaModel has no LM head"),
}


@pytest.mark.parametrize("what", MODELS)
@every_entry
def test_models_of_a_wrong_kind_are_refused_with_the_remedy(entry: str, what: str, tmp_path: Path,
                                                            tok: PreTrainedTokenizerBase) -> None:
    make, kind, match = MODELS[what]
    model = make()
    before = state_of(model) if isinstance(model, nn.Module) else {}
    with refused(kind, match):
        call(entry, model, tok, tiny_hparams(tmp_path), tmp_path)
    assert not before or is_untouched(model, before)
    assert not (tmp_path / "run").exists() and not (tmp_path / "stats").exists()


def test_distributed_data_parallel_is_refused_like_data_parallel() -> None:
    class DistributedDataParallel(nn.Module):  # what matters of torch's, which needs a process group
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def __getattr__(self, name: str) -> Any:  # as DeepSpeed's engine and FSDP hand on what they lack
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

    with refused(TypeError, r"wrapped in a DistributedDataParallel: .*model\.module"):
        sphere.EditSession.of(DistributedDataParallel(tiny_model("llama")))


# --- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "match"), [
    (lambda tok: None, "the tokenizer is None, .*AutoTokenizer"),
    (lambda tok: "gpt2", "the tokenizer is a str, .*AutoTokenizer"),
    (lambda tok: tok.backend_tokenizer, "the tokenizer is a Tokenizer, .*AutoTokenizer"),
    (lambda tok: types.SimpleNamespace(tokenizer=tok), r"give its tokenizer, \.tokenizer"),
], ids=["None", "name", "of tokenizers", "processor"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_tokenizer_is_refused(entry: str, make: Callable[[Any], Any], match: str, tmp_path: Path,
                                         tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with refused(TypeError, match):
        call(entry, model, make(tok), tiny_hparams(tmp_path), tmp_path)
    assert is_untouched(model, before) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["apply_sphere_to_model", "run_sequential", "evaluate_records", "evaluate_protocols",
                                   "generate_continuations", "measure_text_quality", "perplexity"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_models_tokenizer_is_refused_before_anything_is_collected(
        family: str, entry: str, tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model(family, vocab_size=300)  # the tokenizer has 1,500 tokens
    before = state_of(model)
    with refused(ValueError, r"token id \d+ is beyond the model's embedding of 300 tokens: .*tokenizer that belongs"):
        call(entry, model, tok, tiny_hparams(tmp_path, context_templates=None), tmp_path)
    assert is_untouched(model, before) and not (tmp_path / "stats").exists()


def test_statistics_too_are_not_collected_with_another_models_tokenizer(tmp_path: Path, tok: PreTrainedTokenizerBase
                                                                        ) -> None:
    request = {"prompt": "a b", "subject": "a", "target_new": "c"}
    size = max(tok("a b c")["input_ids"]) + 1  # the request by itself fits
    (tmp_path / "corpus.txt").write_text(tok.decode(range(size, size + 20)))
    model = tiny_model("llama", vocab_size=size)
    with refused(ValueError, f"beyond the model's embedding of {size} tokens"):
        sphere.apply_sphere_to_model(model, tok, [request], tiny_hparams(
            tmp_path, base_alg="MEMIT", mom2_dataset=str(tmp_path / "corpus.txt"), context_templates=["a {}"]))
    assert not list((tmp_path / "stats").rglob("*.npz"))


# --- hyperparameters -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MEMITHyperParams:
    layers: list[int]


@pytest.mark.parametrize(("given", "match"), [
    ({"base_alg": "MEMIT"}, "not dict: .*from_dict"), ("AlphaEdit/gpt2", "not str: .*from_hparams"),
    (Path("a.yaml"), "not PosixPath: .*from_hparams"), (None, "not NoneType: .*from_dict"),
    (MEMITHyperParams([1]), "not MEMITHyperParams: .*dataclasses.asdict"),
], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("entry", ["apply_sphere_to_model", "run_sequential", "remove_facts"])
def test_hyperparameters_of_a_wrong_kind_are_refused(entry: str, given: Any, match: str, tmp_path: Path,
                                                     tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with refused(TypeError, f"must be a SPHEREHyperParams, {match}"):
        call(entry, model, tok, given, tmp_path)
    assert is_untouched(model, before)


def test_a_session_of_a_wrong_kind_is_refused(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    model: Any = tiny_model("llama")
    with refused(TypeError, "session is a dict"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(tmp_path), session={})  # type: ignore[arg-type]
    with refused(TypeError, "the session is a LlamaForCausalLM"):
        sphere.EditSession.attach(model, model)


def test_callbacks_of_a_wrong_kind_are_refused(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    with refused(TypeError, "single HETracker: wrap it in a list"):
        sphere.apply_sphere_to_model(tiny_model("llama"), tok, REQUESTS, tiny_hparams(tmp_path),
                                     callbacks=sphere.HETracker())  # type: ignore[arg-type]
    for layers in (3, "12", ["1"]):
        with refused(TypeError, "layers is .*: give a list of layer numbers"):
            sphere.HETracker(layers=layers)  # type: ignore[arg-type]
    with refused(TypeError, "every is '2': give a whole number"):
        sphere.HETracker(every="2")  # type: ignore[arg-type]


# --- requests ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fact:
    prompt: str
    subject: str
    target_new: str
    case_id: Any = None


FACTS = [Fact(**request) for request in REQUESTS]


@pytest.mark.parametrize("given", [
    FACTS, tuple(FACTS), (fact for fact in FACTS), iter(REQUESTS), [types.MappingProxyType(REQUESTS[0]), *FACTS[1:]],
    [collections.UserDict(REQUESTS[0]), collections.ChainMap(REQUESTS[1]), FACTS[2]], np.array(REQUESTS, dtype=object),
    dict(enumerate(REQUESTS)).values(), [{**REQUESTS[0], "subject": np.str_("France")}, *REQUESTS[1:]],
    collections.deque(FACTS),
], ids=lambda given: type(given).__name__)
def test_requests_are_any_iterable_of_mappings_or_dataclass_instances(given: Any) -> None:
    parsed = parse_requests(given)
    assert parsed == parse_requests(REQUESTS)
    assert all(type(text) is str for one in parsed for text in (one.before, one.subject, one.after, one.target))


def test_records_of_the_evaluation_are_requests() -> None:
    assert parse_requests(RECORDS) == parse_requests([record.request() for record in RECORDS])


def test_a_generator_of_dataclass_instances_is_edited(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    model, other = tiny_model("llama"), tiny_model("llama")
    sphere.apply_sphere_to_model(model, tok, (fact for fact in FACTS), hparams)
    sphere.apply_sphere_to_model(other, tok, REQUESTS, hparams)
    assert all(torch.equal(weight, edited_weights(other, hparams)[layer])
               for layer, weight in edited_weights(model, hparams).items())


def test_an_executor_gets_dicts_too(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    seen: list[Any] = []

    def executor(model: nn.Module, tok: Any, requests: list[Any], hparams: Any, **_: Any) -> Any:
        seen.extend(requests)
        return model, {}

    sphere.apply_sphere_to_model(tiny_model("llama"), tok, iter(FACTS), tiny_hparams(llama_stats, base_alg="MEMIT"),
                                 executor=executor)
    assert seen == [dataclasses.asdict(fact) for fact in FACTS]


@pytest.mark.parametrize(("given", "match"), [
    (REQUESTS[0], "single dict: wrap it in a list"), (FACTS[0], "single Fact: wrap it in a list"),
    ("The capital", "must be a list of dicts .*, not str"), (None, "must be a list of dicts .*, not NoneType"),
    (7, "not int"), ([], "no requests given"), (iter(()), "no requests given"), ({}, "single dict"),
    ([REQUESTS[0], "Rome"], "request 1 is 'Rome' of type str"), ([REQUESTS], r"request 0 is \[.* of type list"),
    ([Fact], "request 0 is .* of type type"), ([None], "request 0 is None of type NoneType"), (Fact, "not type"),
    ([{**REQUESTS[0], "subject": 7}], "subject is 7"),
])
def test_other_requests_are_refused_with_their_type(given: Any, match: str, tmp_path: Path,
                                                    tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with refused(ValueError, match):
        sphere.apply_sphere_to_model(model, tok, given, tiny_hparams(tmp_path))
    assert is_untouched(model, before) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "expected"), [
    (np.int64(3), 3), (np.uint8(3), 3), (np.float32(3.0), 3), (3.0, 3), (torch.tensor(3), 3), (np.array(3), 3),
    (Decimal(3), 3), (Fraction(6, 2), 3), (-3, -3), (10**30, 10**30), ("3", "3"), (np.str_("a"), "a"), ("", ""),
    (None, 5),
], ids=repr)
def test_case_ids_are_numbers_and_texts_of_any_kind(given: Any, expected: int | str) -> None:
    [request] = parse_requests([{**REQUESTS[0], "case_id": given}], first_id=5)
    assert request.case_id == expected and type(request.case_id) is type(expected)


@pytest.mark.parametrize("given", [True, np.True_, 1.5, math.nan, np.float64("nan"), math.inf, 1j, b"3", [3], (1,),
                                   np.array([1]), torch.tensor([1]), torch.tensor(True), Decimal("NaN"), {}], ids=repr)
def test_other_case_ids_are_refused(given: Any) -> None:
    with refused(ValueError, "request 1: case_id .* of type .* is neither a whole number nor a text"):
        request_dicts([REQUESTS[0], {**REQUESTS[1], "case_id": given}])


def test_case_ids_that_are_the_same_number_are_the_same() -> None:
    with refused(ValueError, "case_id 3 occurs twice"):
        parse_requests([{**REQUESTS[0], "case_id": np.int32(3)}, {**REQUESTS[1], "case_id": 3.0}])


# --- contradictions ------------------------------------------------------------------------------------------------


def test_one_fact_with_two_targets_in_a_batch_is_told(llama_stats: Path, tok: PreTrainedTokenizerBase,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    again = {"prompt": "the capital of  {} is", "subject": "France", "target_new": " Lyon", "case_id": "late"}
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=2)
    with caplog.at_level(logging.WARNING, "sphere_easyedit"):
        sphere.apply_sphere_to_model(tiny_model("llama"), tok, [*REQUESTS, again], hparams)
    [message] = [record.getMessage() for record in caplog.records if "different targets" in record.getMessage()]
    assert "'The capital of France is' to 'Rome' (case_id 0) and 'Lyon' (case_id late)" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sphere_easyedit"):
        same = {**again, "target_new": "rome"}
        sphere.apply_sphere_to_model(tiny_model("llama"), tok, [*REQUESTS, same], hparams)
    assert not [record for record in caplog.records if "different targets" in record.getMessage()]


# --- the state that PyTorch is in ----------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta by default": lambda: default_device("meta"),
}


def _edited(family: str, base_alg: str, settings: dict[str, Any], folder: Path, tok: PreTrainedTokenizerBase,
            state: contextlib.AbstractContextManager[Any]) -> tuple[dict[int, Tensor], Any]:
    model = tiny_model(family)
    hparams = tiny_hparams(folder, base_alg=base_alg, context_templates=None, v_num_grad_steps=4, mom2_n_samples=4,
                           **settings)
    tracker = sphere.HETracker()
    with state:
        for batch in (REQUESTS[:2], REQUESTS[2:]):
            sphere.apply_sphere_to_model(model, tok, batch, hparams, callbacks=[tracker])
    assert all(parameter.requires_grad for parameter in model.parameters())
    return edited_weights(model, hparams), [record.energy for record in tracker.records]


@pytest.mark.parametrize(("family", "base_alg", "settings", "names"), [
    ("llama", "AlphaEdit", {}, list(STATES)),
    ("gpt2", "MEMIT", {"keep_previous_keys": True}, ["float64 by default", "inference_mode"]),
    ("gemma2", "RECT", {}, ["bfloat16 by default"]),
    ("llama", "PRUNE", {}, ["float64 by default"]),
    ("llama", "MEMIT", {"projection_stage": "layer", "suppression": "shrink"}, ["bfloat16 by default"]),
    ("llama", "AlphaEdit", {"suppression": "random"}, ["float64 by default"]),
], ids=str)
def test_edits_have_the_same_bits_whatever_the_caller_set(
        family: str, base_alg: str, settings: dict[str, Any], names: Collection[str], tmp_path: Path,
        tok: PreTrainedTokenizerBase) -> None:
    expected, energies = _edited(family, base_alg, settings, tmp_path / "plain", tok, contextlib.nullcontext())
    for name in names:
        found, same = _edited(family, base_alg, settings, tmp_path / name, tok, STATES[name]())
        assert all(torch.equal(found[layer], weight) for layer, weight in expected.items()), name
        assert same == energies, name


@pytest.mark.parametrize("name", ["float64 by default", "bfloat16 by default", "inference_mode", "no_grad"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measurements_are_the_same_whatever_the_caller_set(family: str, name: str, tok: PreTrainedTokenizerBase
                                                           ) -> None:
    model = tiny_model(family)

    def measured() -> tuple[Any, ...]:
        return (evaluate_protocols(model, tok, RECORDS, ["paper", "rome", "easyedit"]),
                generate_continuations(model, tok, ["The capital of", "A"], 6),
                generate_continuations(model, tok, ["The capital of"], 6, 5, [(1,)]),
                perplexity(model, tok, ["The capital of France is a large town."]))

    expected = measured()
    with STATES[name]():
        assert measured() == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", STATES)
def test_a_run_and_its_session_work_in_any_state(name: str, tmp_path: Path, tok: PreTrainedTokenizerBase,
                                                 llama_stats: Path) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="AlphaEdit", v_num_grad_steps=3)
    expected, model = tiny_model("llama"), tiny_model("llama")
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        sphere.apply_sphere_to_model(expected, tok, batch, hparams)
    with STATES[name]():
        sphere.apply_sphere_to_model(model, tok, REQUESTS[:2], hparams)
        sphere.EditSession.of(model).save(tmp_path / "session")
        sphere.EditSession.attach(model, sphere.EditSession.load(tmp_path / "session"))
    sphere.apply_sphere_to_model(model, tok, REQUESTS[2:], hparams)  # with what was made there, back in a plain state
    assert sphere.EditSession.of(model).num_edits == 3
    for layer, weight in edited_weights(expected, hparams).items():
        assert torch.allclose(edited_weights(model, hparams)[layer], weight, rtol=1e-4, atol=1e-5)
    with STATES[name]():
        sphere.EditSession.of(model).rollback(0)
    sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], hparams)
    assert sphere.EditSession.of(model).num_edits == 1


def test_parameters_made_under_inference_mode_are_refused(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    for state in (contextlib.nullcontext(), torch.inference_mode()):
        with state, refused(ValueError, "parameters were created under torch.inference_mode, .*load the model outside"):
            sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(tmp_path))
    assert not list(tmp_path.iterdir())


def test_transformers_warns_of_nothing_that_we_call_it_with(tmp_path: Path, tok: PreTrainedTokenizerBase,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as many checkpoints say
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(
                tmp_path, base_alg="MEMIT", context_templates=None, mom2_n_samples=8, v_num_grad_steps=2))
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


@pytest.mark.parametrize("compute", ["prune", "weight_norm"])
def test_a_weight_that_is_computed_is_refused(compute: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """It is computed anew in each forward pass, so an edit of it would be lost."""
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    if compute == "prune":
        prune.random_unstructured(down, "weight", 0.2)
    else:
        torch.nn.utils.parametrizations.weight_norm(down)
    before = state_of(model)
    with refused(ValueError, r"layers\.1\.mlp\.down_proj\.weight is computed from other parameters"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(tmp_path))
    assert is_untouched(model, before)


@pytest.mark.parametrize(("needed", "refused_name"), [
    (None, "attention_mask"), (None, "use_cache"), (None, "position_ids"), ("pixel_values", None)])
def test_a_model_with_other_arguments_than_decoders_is_refused(
        needed: str | None, refused_name: str | None, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One that lacks an argument of decoders, or needs another one, such as pictures."""
    model = tiny_model("llama")
    forward = model.forward

    def other(**kwargs: Any) -> Any:
        if refused_name in kwargs:
            raise TypeError(f"forward() got an unexpected keyword argument {refused_name!r}")
        if needed is not None and needed not in kwargs:
            raise ValueError(f"You have to specify {needed}")
        return forward(**kwargs)

    model.forward = other
    before = state_of(model)
    with refused(ValueError, f"does not run like a transformers decoder.*{needed or refused_name}"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(tmp_path))
    assert is_untouched(model, before)
