"""Figure of the share of each update in the principal space, compared with a random subspace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from ..methods.registry import METHODS
from .curves import MEAN
from .figure import Choice, Figure, Panel, Spec, chosen, line_layers, params, quantitative, shown, tooltip
from .runs import ReportRun

_APPLIED: Final = "applied"
_PROPOSED: Final = "proposed"
_KINDS: Final = ((_PROPOSED, "as proposed"), (_APPLIED, "as applied"))


def shares_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """The share of each update in the principal space of the weight before it; None if no run recorded it."""
    data = [row for run in runs for row in _rows(run)]
    if not data:
        return None
    labels = [run.label for run in runs]
    layers = sorted({row["layer"] for row in data} - {MEAN}, key=int)
    choices = (Choice("kind", "Updates", _KINDS),
               Choice("layer", "Layer", ((MEAN, "mean over layers"),
                                         *((layer, f"layer {layer}") for layer in layers))))
    encoding = {"x": quantitative("edits", "edits"), "y": quantitative("ratio", "times chance")}
    tips = tooltip(("run", "run", None), ("edits", "edits", ",d"), ("share", "% inside", ".2f"),
                   ("chance", "% by chance", ".2f"), ("ratio", "times chance", ".2f"))
    spec: Spec = {
        "data": {"values": data}, "params": params(labels, choices),
        "transform": [shown(), chosen("kind"), chosen("layer")],
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 3], "color": "var(--muted)"}, "encoding": {"y": {"datum": 1}}},
            *line_layers(labels, encoding, tips, small_points=True)]}
    return Figure(
        "shares", "How much of each update lies in the principal space",
        "Share of an update's squared norm in the principal space of the weight before it, divided by the expected "
        "share in a random subspace of that rank (rank / d_in; the dashed line). As proposed: before SPHERE suppressed "
        "its part there. It is unknown if alpha is 1, if another part was suppressed (random directions, a space not "
        "cut by gamma of the weight's own spectrum, a budget or compensation of energy), and for PRUNE, which changes "
        "the whole change since the unedited model.",
        " ".join(_description(run, data) for run in runs), (Panel("Share inside, times chance", spec),), choices)


def _rows(run: ReportRun) -> list[dict[str, Any]]:
    kept = _kept_inside(run)
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
            rows += [{"run": run.label, "edits": edits, "kind": kind, "layer": layer,
                      "share": float(f"{100 * share:.4g}"), "chance": float(f"{100 * chance:.4g}"),
                      "ratio": float(f"{share / chance:.4g}")} for layer, (share, chance) in values.items()]
    return rows


def _kept_inside(run: ReportRun) -> float:
    """The factor of the part of an update inside the principal space; 0 if unknown."""
    hparams = run.run.config["hparams"]
    alpha, suppression = float(hparams.get("alpha") or 0.0), hparams.get("suppression", "principal")
    method = METHODS.find(run.run.algorithm)
    if method is not None and method.restrains_whole_change:
        return 0.0
    if not alpha or suppression == "shrink":  # scaling the whole update keeps its share
        return 1.0
    as_measured = suppression == "principal" and hparams.get("gamma_rule", "share") == "share" and hparams.get(
        "space_source", "weight") == "weight" and not hparams.get("compensate") and hparams.get("energy_budget") is None
    return 1.0 - alpha if as_measured else 0.0


def _before_suppression(share: float, kept: float) -> float:
    """The share before the part inside was multiplied by ``kept``, and its square by ``kept^2``."""
    inside = share / kept**2
    return inside / (inside + 1.0 - share)


def _description(run: ReportRun, data: Sequence[dict[str, Any]]) -> str:
    by_kind = {kind: [row for row in data if (row["run"], row["layer"], row["kind"]) == (run.label, MEAN, kind)]
               for kind, _ in _KINDS}
    if not by_kind[_APPLIED]:
        return f"{run.label}: unknown."
    kind = _PROPOSED if by_kind[_PROPOSED] else _APPLIED
    first, last = by_kind[kind][0], by_kind[kind][-1]
    return (f"{run.label}: {first['share']:.1f}% of the update {kind} for the batch up to {first['edits']} edits lay "
            f"inside, {last['share']:.1f}% of the one up to {last['edits']}: {first['ratio']:.2f} and "
            f"{last['ratio']:.2f} times chance.")
