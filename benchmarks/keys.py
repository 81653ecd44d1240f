"""Time of a batch's keys and residual states: ours against a plain reference, in one run, with the same result.

Ours runs each prompt up to the subject's last token and only the blocks that a layer's reading needs, on states kept
below it; the reference (plain.py) runs the whole model on every edit's prompts for every layer. Both read all edited
layers with the weights as they are, taking turns.

    python benchmarks/keys.py --data ../shared/data/counterfact.json
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from common import machine, peak_memory, spread
from plain import plain_states
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.contexts import generate_contexts
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.requests import TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.loading import load_model

Found = dict[int, tuple[Tensor, Tensor]]


def ours(editable: EditableModel, requests: list[TokenizedRequest], token_budget: int) -> Found:
    """Keys and residual states by layer, as a batch reads them."""
    states = BatchStates(editable, requests, token_budget)
    found = {editable.layers[0]: states.read(editable.layers[0])}
    for layer, following in pairwise(editable.layers):
        states.advance(layer, to=following)
        found[following] = states.read(following)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="MEMIT/smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    hparams = SPHEREHyperParams.from_hparams(options.hparams)
    model, tok = load_model(hparams.model_name, None, "float32")
    editable = hparams.editable(model)
    records = load_records("counterfact", options.data, options.edits, 0)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    difference = 0.0
    with frozen(model):
        contexts = generate_contexts(editable, tok, hparams.seed)
        requests = [tokenize_request(tok, request, contexts, None)
                    for request in parse_requests([record.request() for record in records])]
        ours(editable, requests[:1], hparams.token_budget)
        for _ in range(options.pairs):
            started = time.perf_counter()
            found = ours(editable, requests, hparams.token_budget)
            seconds["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            plain = {layer: plain_states(editable, requests, layer) for layer in editable.layers}
            seconds["plain"].append(time.perf_counter() - started)
            difference = max(difference, *(float((one - other).norm() / other.norm()) for layer in editable.layers
                                           for one, other in zip(found[layer], plain[layer], strict=True)))
    ratios = [theirs / own for theirs, own in zip(seconds["plain"], seconds["ours"], strict=True)]
    print(f"{options.edits} edits, {1 + len(contexts)} contexts, layers {editable.layers} of {options.hparams}; "
          f"{machine()}; {peak_memory()}\n")
    print("| side | seconds a batch, median (range) | times ours | differ by |\n| --- | --- | --- | --- |")
    print(f"| ours | {spread(seconds['ours'])} | 1 | |")
    print(f"| plain | {spread(seconds['plain'])} | {spread(ratios, 1)} | {difference:.1e} |")


if __name__ == "__main__":
    main()
