"""The GPU check's second part: how long things take on a device, and in how much memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from gpu_parity import ALPHA, GAMMA, golden_tokenizer
from gpu_rows import Row, Sizes, left_out, measured, wait
from published_models import MODELS
from solves import L2, LAMBDA, SyntheticKeys
from sphere_easyedit import PrincipalSpace, SPHEREHyperParams, apply_sphere_to_model, hyperspherical_energy
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.gram_matrices import GramMatrix
from sphere_easyedit.editing.requests import TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.methods.covariance import null_space
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.models.architecture import frozen
from sphere_easyedit.planning import PlanSettings
from sphere_easyedit.planning.memory import activation_bytes, memory_items, peak_bytes
from sphere_easyedit.planning.sizes import ModelShape, Statistics, Tokens, count_tokens, model_shape

SPEED, MEMORY = "speed", "memory"
# Beginnings as long as the generated ones.
CONTEXTS = ("The first thing that I want to say is. {}", "Therefore, it is important to know that the. {}",
            "Because of this, the number of people who. {}", "I have been working on this for a. {}",
            "You can use this to make your own new. {}")
_ROOM_FOR_LLAMA = 40e9  # bytes free on the device: 16 GB of weights, and a micro-batch beside them


def speed(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Of what is done with one weight and its keys, and of target values."""
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            yield from _weight(device, dtype, sizes)
        yield from _solves(device, sizes)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Of several turns, after one that starts what is started once."""
    found = []
    for _ in range(1 + repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - started)
    return found[1:]


def _row(what: str, seconds: Sequence[float]) -> Row:
    return measured(SPEED, what, f"{statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g})")


def _settings(**changes: Any) -> SPHEREHyperParams:
    return SPHEREHyperParams.from_dict({
        "model_name": "random", "layers": [1], "v_num_grad_steps": 25, "v_lr": 1e-6, "v_loss_layer": 3,
        "v_weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625, "L2": L2, "mom2_update_weight": LAMBDA,
        "nullspace_share": 0.9, "mom2_dataset": "generated", "mom2_n_samples": 4,
        "context_templates": list(CONTEXTS), **changes})


def _weight(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Row]:
    weight = (torch.randn(sizes.weight, generator=torch.Generator().manual_seed(0)) * 0.02).to(device, dtype)
    keys = torch.randn(sizes.weight[1], sizes.batch, device=device)
    values = torch.randn(sizes.weight[0], sizes.batch, device=device) * 1e-3
    name, repeats = f"{'x'.join(map(str, sizes.weight))}, {str(dtype).removeprefix('torch.')}", sizes.repeats
    yield _row(f"HE, {name}", _seconds(lambda: hyperspherical_energy(weight), device, repeats))
    gram = GramMatrix.of(weight)
    yield _row(f"Gram matrix, {name}", _seconds(lambda: GramMatrix.of(weight), device, repeats))
    yield _row(f"principal space from it, {name}", _seconds(
        lambda: PrincipalSpace.from_gram(weight, gram.matrix, GAMMA), device, repeats))
    space = PrincipalSpace.from_gram(weight, gram.matrix, GAMMA)
    yield _row(f"projecting {sizes.batch} keys, {name}", _seconds(lambda: space.suppress_keys(keys, ALPHA), device,
                                                                 repeats))
    update = LowRankUpdate(values, keys)
    if dtype == torch.float32:
        yield _row(f"Gram matrix carried, {name}", _seconds(lambda: gram.after(weight, update), device, repeats))

    def whole() -> None:
        PrincipalSpace.from_gram(weight, GramMatrix.of(weight).matrix, GAMMA).suppress_keys(keys, ALPHA)

    yield _row(f"Gram matrix, space and keys together, {name}", _seconds(whole, device, repeats))


def _solves(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    d_in = sizes.weight[1]
    synthetic = SyntheticKeys(d_in)
    left = d_in - int(0.9 * d_in)
    keys = synthetic.draw(sizes.batch).to(device)
    null = NullSpaceMetric(NullSpace(synthetic.directions(0, left).float().to(device), complement=True), L2)
    history = KeyHistory(synthetic.draw(sizes.earlier).to(device), null)

    def batch(earlier: KeyHistory) -> None:
        if adjusted_keys(earlier, keys) is None:
            raise SystemExit("the factored solve failed")
        earlier.extended(keys)

    yield _row(f"AlphaEdit, {sizes.batch} keys after {sizes.earlier}, {d_in} wide",
               _seconds(partial(batch, history), device, sizes.repeats))
    del history, null
    moment = synthetic.moment().to(device)
    yield _row(f"null space from C, {d_in} wide, once", _seconds(lambda: null_space(moment, share=0.9), device, 1))
    yield _row(f"factor of C, {d_in} wide, once", _seconds(lambda: CholeskyFactor.of(moment), device, 1))
    memit = KeyHistory.empty(d_in, CovarianceMetric(CholeskyFactor.of(moment), LAMBDA), device)
    yield _row(f"MEMIT, {sizes.batch} keys, {d_in} wide", _seconds(lambda: adjusted_keys(memit, keys), device,
                                                                  sizes.repeats))


# --- language models with random weights --------------------------------------------------------------------

def models(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Target values and whole batches: seconds, and memory against the plan's."""
    config = AutoConfig.for_model(
        "llama", vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.depth, num_attention_heads=sizes.hidden // 16 if sizes.hidden < 512 else 9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    for dtype in sizes.dtypes:
        yield from _model(f"{sizes.depth} blocks {sizes.hidden} wide", config, device, dtype, sizes)
    if device.type != "cuda":
        yield left_out(SPEED, "target values at Llama-3-8B's shape", "needs a GPU")
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < _ROOM_FOR_LLAMA:
        yield left_out(SPEED, "target values at Llama-3-8B's shape",
                       f"{free / 1e9:.0f} GB free, {_ROOM_FOR_LLAMA / 1e9:.0f} needed")
        return
    yield from _model("Llama-3-8B's shape", MODELS["llama3-8b"].loaded_config(), device, torch.bfloat16, sizes,
                      whole_batch=False)


def _model(name: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, sizes: Sizes,
           whole_batch: bool = True) -> Iterator[Row]:
    built = _random_model(config, device, dtype)
    first = min(4, config.num_hidden_layers - 3)
    layers = list(range(first, min(first + 5, config.num_hidden_layers - 1)))
    records = load_records("demo", None, sizes.edits)
    tok = golden_tokenizer()
    requests = [record.request() for record in records]
    tokenized = [tokenize_request(tok, request, CONTEXTS, None) for request in parse_requests(requests)]
    tokens = count_tokens(records, CONTEXTS)
    name = f"{name}, {str(dtype).removeprefix('torch.')}, {sizes.edits} edits"
    with TemporaryDirectory() as folder:
        hparams = _settings(base_alg="AlphaEdit", layers=layers, v_loss_layer=config.num_hidden_layers - 1,
                            stats_dir=folder, device=str(device), v_num_grad_steps=sizes.steps)
        shape = model_shape(config, hparams.module_names(config), layers, dtype)
        yield from _target_values(name, built, tokenized, hparams, shape, tokens, device)
        if whole_batch:
            # Statistics and null spaces are filed by a first edit; nothing else of it stays.
            apply_sphere_to_model(built, tok, requests[:1], hparams, copy=True)
            _reset(device)
            apply_sphere_to_model(built, tok, requests, hparams)
            items = memory_items(shape, hparams, PlanSettings(sizes.edits, sizes.edits), tokens, device.type,
                                 Statistics({layer: Path() for layer in layers}, metric_is_filed=True))
            editing = [item for item in items if not item.name.startswith("evaluation")]
            planned = peak_bytes(editing, device.type).get("device")
            yield _memory(f"a batch of AlphaEdit + SPHERE, {name}", planned, device)
    del built
    _reset(device)


def _random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Made on the device, where there is most room for it."""
    torch.manual_seed(0)
    with torch.device(device):
        built: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return built.eval()


def _target_values(name: str, built: nn.Module, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                   shape: ModelShape, tokens: Tokens, device: torch.device) -> Iterator[Row]:
    editable = hparams.editable(built)
    found: list[Tensor] = []
    with frozen(built):
        optimise_target_values(editable, requests[:1], hparams)
        _reset(device)

        def work() -> None:
            found.append(optimise_target_values(editable, requests, hparams).values)

        seconds = _seconds(work, device, 1)
    if not bool(torch.isfinite(found[-1]).all()):
        raise SystemExit(f"target values of {name} are not finite")
    yield _row(f"target values, {name}, each", [one / len(requests) for one in seconds])
    largest = activation_bytes(shape, hparams, tokens, len(requests))
    yield _memory(f"target values, {name}", shape.weight_bytes + largest, device)


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory(what: str, planned: int | None, device: torch.device) -> Row:
    """The most that torch had allocated since the last reset, against the plan's count."""
    if device.type != "cuda" or planned is None:
        return left_out(MEMORY, what, "torch counts what it allocates on a GPU alone")
    found = torch.cuda.max_memory_allocated(device)
    return Row(MEMORY, what, f"{found / 1e9:.2f} GB", f"{planned / 1e9:.2f} GB planned, {found / planned:.0%} of it",
               "ok" if found <= 1.25 * planned else "FAILED")
