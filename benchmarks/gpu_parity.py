"""The GPU check's first part: a device gives the CPU's numbers, and EasyEdit's golden ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpu_rows import GOLDEN, Row, Sizes, compared, difference
from solves import L2, LAMBDA, SyntheticKeys
from sphere_easyedit import EditSession, PrincipalSpace, SPHEREHyperParams, apply_sphere_to_model, hyperspherical_energy
from sphere_easyedit.core.hyperspherical import energy_from_gram
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.editing.gram_matrices import GramMatrix
from sphere_easyedit.methods.covariance import null_space
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpaceMetric,
    adjusted_keys,
    plain_alphaedit_keys,
    plain_memit_keys,
)

PART = "parity"
GAMMA, ALPHA = 0.5, 0.8
# Twenty steps of an optimiser carry rounding further than one product does; the tests allow as much.
_EDITED = 2e-3


def parity(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """All of it."""
    with torch.no_grad():
        yield from _geometry(device, sizes)
        yield from _solves(device, sizes)
    yield from _tiny_edits(device)
    yield from _golden(device)


def _geometry(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """HE, principal space and suppression in float32 on the device, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes.weight, generator=generator) * 0.02
    update = torch.randn(64, sizes.weight[1], generator=generator)
    low_rank = LowRankUpdate(1e-3 * torch.randn(sizes.weight[0], sizes.batch, generator=generator),
                             torch.randn(sizes.weight[1], sizes.batch, generator=generator))
    exact, there = weight.double(), weight.to(device)
    size = "x".join(map(str, sizes.weight))
    energy = float(hyperspherical_energy(exact))
    yield compared(PART, f"HE, {size}", abs(float(hyperspherical_energy(there)) / energy - 1), 1e-6)
    rounded = float(hyperspherical_energy(weight.bfloat16()))
    found = float(hyperspherical_energy(there.bfloat16()))
    yield compared(PART, f"HE of the weight in bfloat16, {size}", abs(found / rounded - 1), 1e-6)
    gram = GramMatrix.of(there)
    yield compared(PART, "HE from the Gram matrix", abs(float(energy_from_gram(gram.matrix)) / energy - 1), 1e-5)
    space = PrincipalSpace.from_weight(exact, GAMMA)
    found_space = PrincipalSpace.from_gram(there, gram.matrix, GAMMA)
    yield compared(PART, f"rank of the principal space ({space.rank})", abs(found_space.rank - space.rank), 0)
    there_keys = low_rank.keys.to(device)
    yield compared(PART, "keys projected on the rest", difference(
        found_space.suppress_keys(there_keys, ALPHA), space.suppress_keys(low_rank.keys.double(), ALPHA)), 1e-4)
    yield compared(PART, "a dense update projected on the rest", difference(
        found_space.suppress(update.to(device), ALPHA), space.suppress(update.double(), ALPHA)), 1e-4)
    after = gram.after(there, LowRankUpdate(low_rank.values.to(device), there_keys))
    changed = exact + low_rank.dense().double()
    if after is None:
        raise SystemExit("the Gram matrix of a float32 weight was not carried")
    yield compared(PART, "a Gram matrix carried through an update", difference(after.matrix, changed @ changed.T), 1e-5)


def _solves(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Closed forms on the device against dense float64 solves on the CPU."""
    synthetic = SyntheticKeys(sizes.solve)
    moment = synthetic.moment()
    old, keys = synthetic.draw(sizes.earlier), synthetic.draw(sizes.batch)
    there = moment.to(device)
    wide, narrow = null_space(there, share=0.9), null_space(there, share=0.3)
    metrics: dict[str, tuple[KeyMetric, Any]] = {
        "MEMIT": (CovarianceMetric(CholeskyFactor.of(there), LAMBDA),
                  lambda history: plain_memit_keys(moment, LAMBDA, keys, history)),
        "AlphaEdit, null space of 90%": (NullSpaceMetric(wide, L2), lambda history: plain_alphaedit_keys(
            wide.on(torch.device("cpu")), L2, keys, history)),
        "AlphaEdit, null space of 30%": (NullSpaceMetric(narrow, L2), lambda history: plain_alphaedit_keys(
            narrow.on(torch.device("cpu")), L2, keys, history)),
    }
    for name, (metric, plain) in metrics.items():
        # The earlier keys are more than the null space of 30% has dimensions: some are absorbed.
        history = KeyHistory(old.to(device), metric)
        found = adjusted_keys(history, keys.to(device))
        what = f"{name}: {sizes.batch} keys after {sizes.earlier}, {sizes.solve} wide"
        if found is None:
            yield Row(PART, what, "the factored solve failed", "a solution", "FAILED")
        else:
            yield compared(PART, what, difference(found, plain(KeyHistory(old, None))), 1e-8)


def tiny_model() -> nn.Module:
    """A Llama of four blocks with fixed random weights that shares the golden tokenizer's vocabulary."""
    config = AutoConfig.for_model("llama", vocab_size=1500, bos_token_id=0, eos_token_id=0, initializer_range=0.15,
                                  hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=2, max_position_embeddings=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return built


def tiny_settings(folder: Path, **changes: Any) -> SPHEREHyperParams:
    """That edit it in a second, with statistics from text that it writes itself."""
    return SPHEREHyperParams.from_dict({
        "model_name": "tiny", "layers": [1, 2], "v_num_grad_steps": 12, "v_lr": 0.5, "v_loss_layer": 3,
        "v_weight_decay": 0.001, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "L2": 0.1, "mom2_update_weight": 20.0,
        "nullspace_share": 0.6, "mom2_dataset": "generated", "mom2_n_samples": 12, "mom2_max_length": 32,
        "stats_dir": str(folder / "stats"), "context_templates": ["He said that. {}"], **changes})


def golden_tokenizer() -> Any:
    """Byte-level BPE of 1,500 tokens."""
    return AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")


_FACTS = [{"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"},
          {"prompt": "{} plays for the team", "subject": "John Smith", "target_new": "the United States"},
          {"prompt": "The official language of Brazil is", "subject": "Brazil", "target_new": "German"},
          {"prompt": "The author of Hamlet is", "subject": "Hamlet", "target_new": "Charles Dickens"}]


def _changes(model: nn.Module, tok: Any, batches: list[list[dict[str, Any]]], hparams: SPHEREHyperParams
             ) -> list[dict[int, Tensor]]:
    """Weight changes as stored, by batch and layer."""
    names = [(layer, f"{hparams.module_names(model.config).rewrite_module_tmp.format(layer)}.weight")
             for layer in hparams.layers]
    found = []
    for batch in batches:
        before = {layer: model.get_parameter(name).detach().clone() for layer, name in names}
        apply_sphere_to_model(model, tok, batch, hparams)
        found.append({layer: model.get_parameter(name).detach() - before[layer] for layer, name in names})
    return found


def _tiny_edits(device: torch.device) -> Iterator[Row]:
    """Two batches edited on the device in float32, against float64 on the CPU, whose statistics both use."""
    tok = golden_tokenizer()
    for base_alg in ("MEMIT", "AlphaEdit"):
        with tempfile.TemporaryDirectory() as folder:
            hparams = tiny_settings(Path(folder), base_alg=base_alg, device="cpu")
            batches = [_FACTS[:2], _FACTS[2:]]
            # Statistics are filed by the float32 model, whose text they come from, before either edits.
            apply_sphere_to_model(tiny_model(), tok, _FACTS[:1], hparams, copy=True)
            reference = _changes(tiny_model().double(), tok, batches, hparams)
            found = _changes(tiny_model().to(device), tok, batches, hparams)
        worst = max(difference(one[layer], other[layer]) for one, other in zip(found, reference, strict=True)
                    for layer in one)
        yield compared(PART, f"{base_alg} + SPHERE on a tiny Llama, against float64 on the CPU", worst, _EDITED)


def _golden(device: torch.device) -> Iterator[Row]:
    """What EasyEdit's own executors changed (tests/golden)."""
    for family, name in (("llama", "tiny-llama"), ("gpt2", "tiny-gpt2-xl")):
        folder = GOLDEN / family
        meta = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        tensors, tok = load_file(folder / "golden.safetensors"), AutoTokenizer.from_pretrained(folder / name)
        cases: dict[str, dict[str, Any]] = {
            "memit": {"base_alg": "MEMIT", "alpha": 0.0},
            "alphaedit": {"base_alg": "AlphaEdit", "alpha": 0.0, "projection_stage": "update"}}
        if family == "llama":  # on gpt2 EasyEdit's SPHERE takes inputs for neurons (tests/golden/README.md)
            cases |= {"sphere_alphaedit_posthoc": {"alpha": 0.5, "projection_stage": "update"},
                      "sphere_alphaedit_layerwise": {"alpha": 0.5, "projection_stage": "layer"}}
        for kind, changes in cases.items():
            hparams = SPHEREHyperParams.from_dict({
                **meta["hparams"], "stats_dir": str(folder / "stats"), "L2": meta["alphaedit"]["L2"],
                "P_loc": str(folder / "null_space_project.pt"), "nullspace_threshold": 0.02, "gamma": 0.5,
                "context_templates": meta["context_templates"], **changes})
            model = AutoModelForCausalLM.from_pretrained(folder / name).to(device)
            batches = [[meta["requests"][i] for i in batch] for batch in meta["batches"]]
            worst = max(difference(change, tensors[f"{kind}.update.{number}.{layer}"])
                        for number, batch in enumerate(_changes(model, tok, batches, hparams))
                        for layer, change in batch.items())
            if EditSession.of(model).num_edits != len(meta["requests"]):
                raise SystemExit("the golden edits were not all made")
            yield compared(PART, f"golden {family}, {kind}", worst, _EDITED)
