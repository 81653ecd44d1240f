"""Compares two ways to choose the edited layers: causal tracing (arXiv 2202.05262) and short trials of ``tune``.

Causal tracing adds noise to the subject's embeddings and restores the clean outputs of the feed-forward networks in a
window of layers at the subject's last token. The window that brings back most of the true answer's probability is
edited. The trials edit some facts with each band of layers and take the one of the highest value (``Limits.value``).
Both choices, and the start's layers, are then measured on other facts::

    python benchmarks/layer_choice.py smollm2-135m --data counterfact.json --output layers.json
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.cli.common import load_for
from sphere_easyedit.cli.tune import StartOptions
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.methods.corpus import GENERATED, GENERATED_LENGTH, token_sequences
from sphere_easyedit.methods.covariance import statistics_files
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.tuning.trial import NEIGHBOURS, Limits, TrialRunner

NOISES = 5  # noisy runs of a fact


@torch.no_grad()
def indirect_effects(editable: EditableModel, tok: Any, records: Sequence[EditRecord], window: int, facts: int
                     ) -> dict[int, float]:
    """Mean gain of the true answer's probability, by the first layer of the restored window.

    Args:
        facts: number of facts to trace: the first whose true answer's first token the model predicts.
    """
    model, blocks = editable.model, editable.num_blocks
    modules = dict(model.named_modules(remove_duplicate=False))
    mlps = [modules[editable.names.mlp_module_tmp.format(layer)] for layer in range(blocks)]
    embedding: nn.Module = model.get_input_embeddings()
    noise = 3.0 * float(embedding.weight.float().std())
    gains: dict[int, list[float]] = {first: [] for first in range(blocks - window + 1)}
    generator = torch.Generator().manual_seed(0)
    for record in records:
        before = record.prompt.index("{}")
        encoded = tok(record.edit_prompt, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        subject = [at for at, (low, high) in enumerate(encoded["offset_mapping"])
                   if high > before and low < before + len(record.subject)]
        answer = tok(" " + str(record.target_true), add_special_tokens=False)["input_ids"][0]
        clean: list[Tensor] = []
        with ExitStack() as stack:
            for mlp in mlps:
                stack.enter_context(_hook(mlp, lambda out, clean=clean, last=subject[-1]:
                                          clean.append(out[0, last].clone())))
            if int(model(input_ids=ids).logits[0, -1].argmax()) != answer:
                continue
        noisy = noise * torch.randn(NOISES, len(subject), editable.hidden_size, generator=generator)

        def corrupt(out: Tensor, noisy: Tensor = noisy, subject: list[int] = subject) -> None:
            out[:, subject] += noisy

        def probability(first: int | None, corrupt: Any = corrupt, ids: Tensor = ids, answer: int = answer,
                        clean: list[Tensor] = clean, last: int = subject[-1]) -> float:
            with ExitStack() as stack:
                stack.enter_context(_hook(embedding, corrupt))
                for layer in () if first is None else range(first, first + window):
                    stack.enter_context(_hook(mlps[layer], lambda out, layer=layer: out[:, last].copy_(clean[layer])))
                logits = model(input_ids=ids.repeat(NOISES, 1)).logits[:, -1]
            return float(logits.float().softmax(-1)[:, answer].mean())

        lowest = probability(None)
        for first in gains:
            gains[first].append(probability(first) - lowest)
        if len(gains[0]) == facts:
            break
    print(f"traced {len(gains[0])} facts", flush=True)
    return {first: sum(found) / len(found) for first, found in gains.items()}


class _hook:
    """A forward hook for the duration of a context, which may change the module's output in place."""

    def __init__(self, module: nn.Module, act: Any) -> None:
        self._module, self._act = module, act

    def __enter__(self) -> None:
        def run(_module: nn.Module, _args: Any, output: Any) -> None:
            self._act(output[0] if isinstance(output, tuple) else output)

        self._handle = self._module.register_forward_hook(run)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-alg", default="AlphaEdit")
    parser.add_argument("--facts", type=int, default=30, help="facts of a trial")
    parser.add_argument("--others", type=int, default=100, help="facts of the comparison")
    parser.add_argument("--traced", type=int, default=20, help="facts of causal tracing")
    parser.add_argument("--step", type=int, default=2, help="layers between two bands that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="override")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    start = StartOptions(base_alg=given.base_alg, override=given.override).mapping(given.model)
    hparams = SPHEREHyperParams.from_dict(start)
    model, tok = load_for(hparams, None)
    editable = hparams.editable(model)
    window = len(hparams.layers)
    records = load_records("counterfact", given.data, None, given.seed)
    trial, others, rest = (records[: given.facts], records[given.facts: given.facts + given.others],
                           records[given.facts + given.others:])
    result: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(given).items()}, "start": start}

    def save() -> None:
        given.output.write_text(json.dumps(result, indent=1), encoding="utf-8")

    began = time.process_time()
    result["gains"] = indirect_effects(editable, tok, rest, window, given.traced)
    result["tracing_seconds"] = time.process_time() - began
    traced = max(result["gains"], key=result["gains"].get)
    print(f"causal tracing: layers from {traced}, {result['gains']}, {result['tracing_seconds']:.0f} s", flush=True)
    save()
    highest = 2 * editable.num_blocks // 3 - window + 1
    firsts = sorted({*range(0, highest + 1, given.step), hparams.layers[0], traced})
    every = sorted({layer for first in firsts for layer in range(first, first + window)})
    statistics_files(EditableModel(model, editable.names, every), tok, hparams)
    other = SPHEREHyperParams.from_dict({**start, "mom2_dataset": GENERATED, "mom2_n_samples": 24, "seed": 1})
    texts = tok.batch_decode(token_sequences(editable, tok, other, GENERATED_LENGTH), skip_special_tokens=True)
    runner = TrialRunner(model, tok, 10, texts, 2048)

    def run(first: int, facts: Sequence[EditRecord], neighbours: int | None) -> dict[str, Any]:
        tried = SPHEREHyperParams.from_dict({**start, "layers": list(range(first, first + window))})
        scores = runner.run(tried, facts, neighbours)
        return {**scores.to_dict(), "rise": limits.rise(scores), "value": limits.value(scores)}

    limits = Limits(runner.measure(trial, NEIGHBOURS), 5.0, 3.0)
    began = time.process_time()
    result["trials"] = {}
    for first in firsts:
        result["trials"][first] = run(first, trial, NEIGHBOURS)
        print(f"trial: layers from {first}: {result['trials'][first]}", flush=True)
        save()
    result["trial_seconds"] = time.process_time() - began
    tried = max((first for first in firsts if first <= highest), key=lambda one: result["trials"][one]["value"])
    limits = Limits(runner.measure(others), 5.0, 3.0)
    result["unedited"] = limits.unedited.to_dict()
    result["others"] = {first: run(first, others, None) for first in sorted({traced, tried, hparams.layers[0]})}
    for first, found in result["others"].items():
        names = [name for name, one in (("tracing", traced), ("trials", tried), ("start", hparams.layers[0]))
                 if one == first]
        print(f"other facts: layers from {first} ({', '.join(names)}): {found}", flush=True)
    save()


if __name__ == "__main__":
    main()
