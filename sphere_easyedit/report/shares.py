"""Where the updates of a run lie: the share inside the principal space, against what chance gives."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from .curves import MEAN
from .figure import Choice, Figure, Panel, Spec, by_run, chosen, params, quantitative, shown, tooltip
from .runs import ReportRun

_APPLIED: Final = "applied"
_PROPOSED: Final = "proposed"
_KINDS: Final = ((_PROPOSED, "as proposed"), (_APPLIED, "as applied"))


def shares_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """The share of each update in the principal space of the weight before it; None where no run recorded it."""
    data = [row for run in runs for row in _rows(run)]
    if not data:
        return None
    labels = [run.label for run in runs]
    layers = sorted({row["layer"] for row in data} - {MEAN}, key=int)
    choices = (Choice("kind", "Updates", _KINDS),
               Choice("layer", "Layer", ((MEAN, "mean over layers"),
                                         *((layer, f"layer {layer}") for layer in layers))))
    encoding: Spec = {"x": quantitative("edits", "edits"), "y": quantitative("ratio", "times chance"), **by_run(labels)}
    spec: Spec = {
        "data": {"values": data}, "params": params(labels, choices),
        "transform": [shown(), chosen("kind"), chosen("layer")],
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 3], "color": "var(--muted)"}, "encoding": {"y": {"datum": 1}}},
            {"mark": "line", "encoding": {**encoding, **by_run(labels, ("strokeDash",))}},
            {"mark": {"type": "point", "size": 14}, "encoding": {**encoding, "tooltip": tooltip(
                ("run", "run", None), ("edits", "edits", ",d"), ("share", "% inside", ".2f"),
                ("chance", "% by chance", ".2f"), ("ratio", "times chance", ".2f"))}}]}
    return Figure(
        "shares", "How much of each update lies in the principal space",
        "Share of an update's squared norm in the principal space of the weight before it, over what a random subspace "
        "of that rank would hold (rank / d_in; the dashed line). As proposed: before SPHERE suppressed its part "
        "there; it can't be told where alpha is 1.",
        " ".join(_told(run, data) for run in runs), (Panel("Share inside, times chance", spec),), choices)


def _rows(run: ReportRun) -> list[dict[str, Any]]:
    hparams = run.run.config["hparams"]
    principal = hparams.get("suppression", "principal") == "principal"
    kept = 1.0 - float(hparams.get("alpha") or 0.0) if principal else 1.0
    by_edits: defaultdict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for space in run.run.spaces:
        if math.isfinite(space.share) and space.rank:
            by_edits[space.num_edits][space.layer] = space.share, space.rank / space.d_in
    rows = []
    for edits, found in by_edits.items():
        for kind, _ in _KINDS:
            if kind == _PROPOSED and not kept:
                continue
            values = {str(layer): (share if kind == _APPLIED else _before_suppression(share, kept), chance)
                      for layer, (share, chance) in found.items()}
            count = len(values)
            values[MEAN] = (sum(share for share, _ in values.values()) / count,
                            sum(chance for _, chance in values.values()) / count)
            rows += [{"run": run.label, "edits": edits, "kind": kind, "layer": layer, "share": 100 * share,
                      "chance": 100 * chance, "ratio": share / chance} for layer, (share, chance) in values.items()]
    return rows


def _before_suppression(share: float, kept: float) -> float:
    """The share that became ``share`` when the part inside was multiplied by ``kept``: its square was by kept^2."""
    inside = share / kept**2
    return inside / (inside + 1.0 - share)


def _told(run: ReportRun, data: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in data if row["run"] == run.label and row["layer"] == MEAN and row["kind"] == _PROPOSED]
    if not rows:
        return f"{run.label}: not told."
    first, last = rows[0], rows[-1]
    return (f"{run.label}: {first['share']:.1f}% of the update proposed for the batch up to {first['edits']} edits lay "
            f"inside, {last['share']:.1f}% of the one up to {last['edits']}: {first['ratio']:.2f} and "
            f"{last['ratio']:.2f} times chance.")
