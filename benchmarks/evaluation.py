"""Time of evaluating a case: ours against one prompt at a time, and against EasyEdit's own evaluation where it is.

All sides answer the same prompts with the same model, threads and dtype (float32): the edit prompt, the first
paraphrase (EasyEdit takes one) and all neighbours. They take turns on chunks of cases, in another order in each turn,
so that what else runs on the machine hurts all of them alike; ratios are of one chunk. The plain side is written here:
one prompt at a time, logits at every place, argmax. EasyEdit's `compute_edit_quality` goes case by case and pads the
neighbours of a case into one batch. Ours gets a chunk at once, as it gets all cases of a run at once.

    python benchmarks/evaluation.py --data ../shared/data/counterfact.json
    EASYEDIT_HOME=... python benchmarks/evaluation.py --data ../shared/data/counterfact.json

Where other processes want the cores too, `--threads 1 --clock cpu` is what still tells something.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from common import machine, peak_memory, spread
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.easyedit.discovery import HOME, load_easyedit
from sphere_easyedit.easyedit.editor import edit_arguments
from sphere_easyedit.evaluation.metrics import evaluate_records, prompts_by_metric
from sphere_easyedit.models.architecture import input_device
from sphere_easyedit.models.loading import load_model, model_source
from sphere_easyedit.models.tokenization import continuation_ids

# For each case, whether each prompt's target is what the model says: edit prompt, paraphrase, neighbours.
Answers = list[list[bool]]
Side = Callable[[list[EditRecord]], Answers]


def ours(model: Any, tok: Any) -> Side:
    def answer(records: list[EditRecord]) -> Answers:
        return [[value == 1.0 for value in
                 (*score.efficacy_prompts, *score.generalization_prompts, *score.specificity_prompts)]
                for score in evaluate_records(model, tok, records)]

    return answer


def plain(model: Any, tok: Any) -> Side:
    @torch.no_grad()
    def answer(records: list[EditRecord]) -> Answers:
        return [[said_so(*question) for asked in prompts_by_metric(record).values() for question in asked]
                for record in records]

    def said_so(prompt: str, target: str) -> bool:
        prompt_ids, target_ids = continuation_ids(tok, prompt, " " + target)
        input_ids = torch.tensor([prompt_ids + target_ids], device=input_device(model))
        said = model(input_ids).logits[0].argmax(dim=-1)
        return bool(said[len(prompt_ids) - 1: -1].tolist() == target_ids)

    return answer


def easyedits(model: Any, tok: Any, model_name: str) -> Side:
    compute_edit_quality = load_easyedit().evaluate.compute_edit_quality
    tok = copy.deepcopy(tok)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    hparams = SimpleNamespace(alg_name="MEMIT", max_length=40, device=input_device(model))  # as in EasyEdit's files

    def answer(records: list[EditRecord]) -> Answers:
        given = edit_arguments(records)
        neighbours = given["locality_inputs"]["neighborhood"]
        return [case({
            "prompt": given["prompts"][i], "subject": given["subject"][i], "target_new": given["target_new"][i],
            "ground_truth": given["ground_truth"][i], "rephrase_prompt": given["rephrase_prompts"][i],
            "portability": {}, "locality": {"neighborhood": {name: values[i] for name, values in neighbours.items()}},
        }) for i in range(len(records))]

    def case(request: dict[str, Any]) -> list[bool]:
        found = compute_edit_quality(model, model_name, hparams, tok, request, hparams.device)
        near = request["locality"]["neighborhood"]
        wanted = [continuation_ids(tok, prompt, " " + target)[1]
                  for prompt, target in zip(near["prompt"], near["ground_truth"], strict=True)]
        said = found["locality"]["neighborhood_output"]
        return [found["rewrite_acc"][0] == 1.0, found["rephrase_acc"][0] == 1.0,
                *(list(one) == ids for one, ids in zip(said, wanted, strict=True))]

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5, help="chunks that the cases are cut into")
    parser.add_argument("--without-plain", action="store_true", help="leave the slowest side out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch's")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, all threads'")
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    model, tok = load_model(args.model, args.device, "float32")
    records = [replace(record, paraphrase_prompts=record.paraphrase_prompts[:1])
               for record in load_records("counterfact", args.data, args.cases, seed=0)
               if record.paraphrase_prompts and record.neighborhood_prompts]
    sides: dict[str, Side] = {"ours": ours(model, tok)}
    if not args.without_plain:
        sides["plain"] = plain(model, tok)
    if os.environ.get(HOME):
        sides["EasyEdit"] = easyedits(model, tok, model_source(args.model))
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, Answers] = {name: [] for name in names}
    for side in sides.values():
        side(records[:1])
    for turn in range(args.turns):
        chunk = records[turn :: args.turns]
        for name in names[turn % len(names):] + names[: turn % len(names)]:
            started = clock()
            answers[name] += sides[name](chunk)
            seconds[name].append((clock() - started) / len(chunk))
        print(f"turn {turn + 1} of {args.turns}, {len(chunk)} cases:",
              ", ".join(f"{name} {seconds[name][-1]:.3f}" for name in names), "s a case", flush=True)

    count, hits = (sum(map(measure, answers["ours"])) for measure in (len, sum))
    print(f"\n{args.model}, {len(records)} cases with {count} prompts, {hits} of them answered with the target; "
          f"{machine()}; {peak_memory()}\n")
    print(f"| side | {args.clock} seconds a case, median (range) | times ours, median (range) | answers unlike ours |")
    print("| --- | --- | --- | --- |")
    for name in names:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=True)]
        unlike = sum(one != own for case, own_case in zip(answers[name], answers["ours"], strict=True)
                     for one, own in zip(case, own_case, strict=True))
        print(f"| {name} | {spread(seconds[name], 3)} | {spread(ratios)} | {unlike} of {count} |")


if __name__ == "__main__":
    main()
