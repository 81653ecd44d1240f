"""Threads: models side by side, one model shared, and texts that depend on nothing but their seed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.golden import load_golden
from helpers.models import REQUESTS, edited_weights, tiny_config, tiny_hparams, tiny_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.contexts import NEW_TOKENS, OPENINGS, generate_contexts
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.metrics import evaluate_records
from sphere_easyedit.evaluation.perplexity import Perplexity, perplexity
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.sampling import generator_on, sample_tokens

# Each fails in most runs, but not in all, where threads are not kept apart.
RUNS = 2


def _edit(model: nn.Module, tok: PreTrainedTokenizerBase, folder: Path, seed: int
          ) -> tuple[list[str] | None, dict[int, Tensor]]:
    """Context templates and weights of a model edited with statistics and templates that it writes itself."""
    hparams = tiny_hparams(folder, base_alg="AlphaEdit", context_templates=None, seed=seed, v_num_grad_steps=2,
                           mom2_n_samples=4, layers=[2])
    sphere.apply_sphere_to_model(model, tok, REQUESTS[:2], hparams)
    return sphere.EditSession.of(model).contexts, edited_weights(model, hparams)


def _twins(shared_config: bool) -> Callable[[], nn.Module]:
    """Makes equal models; with a single config object for all of them, or each with its own."""
    first, config = tiny_model("llama"), tiny_config("llama")

    def make() -> nn.Module:
        if not shared_config:
            return tiny_model("llama")
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(first.state_dict())
        return model

    return make


@pytest.mark.parametrize("shared_config", [False, True], ids=["own configs", "one config"])
def test_models_edited_side_by_side_are_those_edited_alone(shared_config: bool, tmp_path: Path,
                                                           tok: PreTrainedTokenizerBase) -> None:
    make = _twins(shared_config)
    alone = [_edit(make(), tok, tmp_path / f"alone{seed}", seed) for seed in range(2)]
    for run in range(RUNS):
        jobs = [(make(), tok, tmp_path / f"{run}-{seed}", seed) for seed in range(len(alone))]
        before = torch.get_rng_state()
        with ThreadPoolExecutor(len(jobs)) as pool:
            beside = list(pool.map(lambda job: _edit(*job), jobs))
        assert torch.equal(torch.get_rng_state(), before)
        for (contexts, weights), (same_contexts, same_weights) in zip(alone, beside, strict=True):
            assert same_contexts == contexts
            assert all(torch.equal(same_weights[layer], weight) for layer, weight in weights.items())


def test_texts_do_not_depend_on_what_other_threads_draw(tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    editable = EditableModel(model, tiny_hparams(Path()).module_names(model.config), [1])
    alone = generate_contexts(editable, tok, 7)
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(1)

    other = threading.Thread(target=draw)
    other.start()
    try:
        assert all(generate_contexts(editable, tok, 7) == alone for _ in range(5))
    finally:
        done.set()
        other.join()


class Notes(sphere.EditCallback):
    """Takes down when batches start and end."""

    def __init__(self) -> None:
        self.running: list[str] = []

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        self.running.append("start")

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        self.running.append("end")


def test_one_model_shared_by_threads_takes_one_batch_at_a_time(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=4)
    for _ in range(RUNS):
        model = tiny_model("llama")
        flags = {name: number % 3 > 0 for number, (name, _) in enumerate(model.named_parameters())}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train()
        notes = Notes()
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(sphere.apply_sphere_to_model, model, tok, [request], hparams, callbacks=[notes])
                    for request in REQUESTS]
        assert not any(job.exception() for job in jobs)
        assert sphere.EditSession.of(model).num_edits == len(REQUESTS)
        assert notes.running == ["start", "end"] * len(REQUESTS)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        assert model.training


def test_a_model_is_measured_before_or_after_a_batch_and_not_within(llama_stats: Path, tok: PreTrainedTokenizerBase
                                                                    ) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=4)
    text = ["The capital of France is the largest town of the country and has been so for long."]
    model = tiny_model("llama")
    before = perplexity(model, tok, text)
    within, measured = threading.Event(), list[Perplexity]()

    class Tells(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:  # with new weights in place, which are undone
            within.set()
            other.join(0.5)
            raise RuntimeError("undone")

    def measure() -> None:
        within.wait()
        measured.append(perplexity(model, tok, text))

    other = threading.Thread(target=measure)
    other.start()
    with pytest.raises(RuntimeError, match="undone"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, callbacks=[Tells()])
    other.join()
    assert measured == [before]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_callbacks_may_measure_the_model_within_their_batch(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    model, records = tiny_model("llama"), load_records("demo", None, 2, 0)

    class Measures(sphere.EditCallback):
        scores: Any = None

        def on_batch_end(self, event: sphere.EditEvent) -> None:
            self.scores = evaluate_records(event.model, tok, records), generate_continuations(event.model, tok, ["A"])

    measures = Measures()
    sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], tiny_hparams(llama_stats, base_alg="MEMIT",
                                                                        v_num_grad_steps=2), callbacks=[measures])
    assert measures.scores == (evaluate_records(model, tok, records), generate_continuations(model, tok, ["A"]))


def test_a_model_that_is_in_use_is_copied_and_pickled_with_a_lock_of_its_own() -> None:
    model = tiny_model("llama")
    with frozen(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        copies.append(torch.load(stream, weights_only=False))
        for one in copies:
            other = threading.Thread(target=lambda one=one: frozen(one).__enter__())  # type: ignore[misc]
            other.start()
            other.join(10)
            assert not other.is_alive()


# --- sampling ------------------------------------------------------------------------------------------------------


def _by_transformers(model: nn.Module, ids: Tensor, seed: int, **settings: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: Tensor = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=12, pad_token_id=0, **settings)
    return found


@pytest.mark.parametrize("own", [
    {}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"min_p": 0.05}, {"typical_p": 0.7}, {"epsilon_cutoff": 1e-3, "eta_cutoff": 2e-3}, {"top_k": 3, "temperature": 2.0},
], ids=lambda own: " ".join(own) or "none")
@pytest.mark.parametrize("settings", [{"top_k": 5}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_that_transformers_samples(family: str, settings: dict[str, Any], own: dict[str, Any],
                                                    recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model(family)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    ids = torch.tensor([[3, 17], [250, 9], [1, 1]])
    expected = _by_transformers(model, ids, 11, **settings)
    before, recwarn_before = torch.get_rng_state(), len(recwarn)
    found = sample_tokens(model, ids, torch.ones_like(ids), generator_on(ids.device, 11), max_new_tokens=12,
                          pad_token_id=0, **settings)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before) and len(recwarn) == recwarn_before
    assert {name: getattr(model.generation_config, name) for name in own} == own


@pytest.mark.parametrize("family", ["mamba", "rwkv", "recurrent_gemma"])
def test_models_with_caches_of_their_own_kind_are_sampled(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=1500, hidden_size=48, num_hidden_layers=3, intermediate_size=96,
                                  bos_token_id=0, eos_token_id=0, **{"rwkv": {"attention_hidden_size": 48},
                                                                     "recurrent_gemma": {"lru_width": 48,
                                                                                         "num_attention_heads": 4}}
                                  .get(family, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    fresh = copy.deepcopy(model)  # RecurrentGemma keeps a state in its modules
    ids = torch.tensor([[5], [9]])
    with torch.no_grad():
        found = sample_tokens(model, ids, torch.ones_like(ids), generator_on(ids.device, 3), top_k=5,
                              max_new_tokens=12, pad_token_id=0)
        assert torch.equal(found, _by_transformers(fresh, ids, 3, top_k=5))


def test_context_templates_are_what_they_were(tok: PreTrainedTokenizerBase) -> None:
    """Real runs depend on them: sampled by transformers from the global generator, one opening after the other."""
    golden = load_golden("gpt2")
    model, tok = golden.load()
    editable = EditableModel(model, golden.hparams().module_names(model.config), [1])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        texts = [tok.decode(model.generate(  # type: ignore[operator]
            **tok(opening, return_tensors="pt"), do_sample=True, top_k=5, max_new_tokens=NEW_TOKENS,
            pad_token_id=tok.pad_token_id or 0)[0], skip_special_tokens=True) for opening in OPENINGS]
    expected = [text.replace("{", " ").replace("}", " ") + ". {}" for text in texts]
    assert generate_contexts(editable, tok, 5) == expected
    assert len(set(generate_contexts(editable, tok, 6)) & set(expected)) < len(OPENINGS)


def test_probabilities_that_are_not_finite_are_refused_in_one_line() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    ids = torch.tensor([[5]])
    with pytest.raises(ValueError, match=r"^the model's probabilities .* not finite.*$"):
        sample_tokens(model, ids, torch.ones_like(ids), generator_on(ids.device, 0), max_new_tokens=2, pad_token_id=0)
