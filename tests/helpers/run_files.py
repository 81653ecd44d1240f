"""Run directories written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def metric(mean: float | None, n: int = 8) -> dict[str, Any]:
    return {"mean": mean, "ci95": None if mean is None else [mean - 1, mean + 1], "n": 0 if mean is None else n}


def write_run(folder: Path, base: str = "MEMIT", alpha: float = 0.0, efficacy: Sequence[float] = (90.0, 80.0, 70.0),
              perplexity: Sequence[float | None] = (20.0, 21.0, 22.0), dataset: str = "counterfact", seed: int = 0,
              scores: Mapping[int, Mapping[str, float | None]] | None = None, **hparams: Any) -> Path:
    """A run of batches of 100 that measured after each; layers 4 and 5 gain and lose energy by 1% a batch."""
    folder.mkdir(parents=True)
    config = {"run": {"dataset": dataset, "seed": seed, "batch_size": 100},
              "hparams": {"base_alg": base, "alpha": alpha, "gamma": 0.5, "model_name": "models/tiny", **hparams}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines: list[dict[str, Any]] = [{
        "num_edits": 0, "when": "before", "protocol": "paper", "cases": 8, "efficacy": metric(1.0),
        "generalization": metric(1.0), "specificity": metric(20.0),
        "watched": {"perplexity": 20.0, "update_norms": {}}}]
    for batch, (hit, puzzled) in enumerate(zip(efficacy, perplexity, strict=True), start=1):
        lines.append({"num_edits": 100 * batch, "when": "after" if batch == len(efficacy) else "during",
                      "protocol": "paper", "cases": 8, "efficacy": metric(hit), "generalization": metric(hit / 2),
                      "specificity": metric(20.0 - batch), "fluency": metric(None),
                      "watched": {"perplexity": puzzled, "update_norms": {"4": 1.0 * batch, "5": 3.0 * batch}},
                      "seconds": 1.0})
    lines.insert(2, {"num_edits": 100, "when": "last_batch", "protocol": "paper", "cases": 8, "efficacy": metric(99.0),
                     "watched": {"perplexity": None, "update_norms": {}}})
    for edits, solved in ((0, 40.0), (300, 20.0)):
        lines.append({"num_edits": edits, "when": "after" if edits else "before", "protocol": "lm-eval 0.4",
                      "abilities": {"gsm8k": {"mean": solved, "stderr": 0.5, "n": 50, "extra": {"a": 1}}}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "energy.csv").write_text("num_edits,layer,energy,relative_change\n" + "".join(
        f"{100 * batch},{layer},{1000 * (1 + sign * batch / 100)},{sign * batch / 100}\n"
        for batch in range(len(efficacy) + 1) for layer, sign in ((4, 1), (5, -0.5))))
    (folder / "edits.jsonl").write_text("".join(json.dumps(
        {"num_edits": 100 * batch, "case_ids": [batch, "b"], "seconds": {"solve": 0.5}, "losses": [0.1, math.nan],
         "update_norms": {"4": 1.0, "5": 3.0}, "energy": {"4": 1.0, "5": 2.0}}) + "\n" for batch in (1, 2, 3)))
    (folder / "summary.json").write_text(json.dumps({"num_edits": 100 * len(efficacy)}))
    if scores is not None:
        (folder / "scores").mkdir()
        (folder / "scores" / f"after-{100 * len(efficacy)}.jsonl").write_text("".join(
            json.dumps({"case_id": case, "protocol": protocol, "dataset": dataset, "efficacy_prompts": [1.0],
                        **(values if protocol == "paper" else {"efficacy": 0.0})}) + "\n"
            for protocol in ("paper", "rome") for case, values in scores.items()))
    return folder

