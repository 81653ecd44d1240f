"""Figures of cosines between neurons before and after editing (the paper's Figures 4, 5, 8 and 9) and of spectra."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..callbacks.neurons import LayerNeurons
from ..utils.files import atomic_write
from .figure import Choice, Figure, Panel, Spec, TableRow, chosen, quantitative, tooltip
from .runs import ReportRun

SIDES: Final = ("before", "after")
_HEATMAP: Final = 48  # neurons per side of a heatmap
_CURVE: Final = 240  # points of a spectrum
_PERPLEXITY: Final = 30.0  # of t-SNE; less for few neurons
_SIDE_COLOURS: Final = {"domain": list(SIDES), "range": ["var(--before)", "var(--after)"]}
_KEY: Final = (("before", "before editing"), ("after", "after"))


class NeuronFigures:
    """Figures of the layers whose neurons were recorded, which share the choices of run and layer.

    Args:
        runs: the report's runs.
        coordinates: JSON file that caches t-SNE's coordinates (a second a layer to compute); None for no cache.
    """

    def __init__(self, runs: Sequence[ReportRun], coordinates: Path | None = None) -> None:
        self.layers: dict[tuple[str, int], LayerNeurons] = {}
        self.edits: dict[str, int] = {}
        self._coordinates = coordinates
        self._gammas: set[float] = set()
        for run in runs:
            record = run.run.neurons
            if record is not None:
                self.edits[run.label] = record.num_edits
                self._gammas.add(record.gamma)
                self.layers |= {(run.label, layer): found for layer, found in record.layers.items()
                                if found.sampled > 1}
        numbers = sorted({layer for _, layer in self.layers})
        self.choices = (Choice("run", "Run", tuple((label, label) for label in self.edits)),
                        Choice("layer", "Layer", tuple((str(layer), f"layer {layer}") for layer in numbers)))

    def figures(self, embedded: bool = True) -> list[Figure]:
        """Heatmaps, the embedding if ``embedded``, histograms and spectra; none if no run recorded neurons."""
        if not self.layers:
            return []
        return [self._heatmaps(), *([self._embedding()] if embedded else []), self._histograms(), self._spectra()]

    def _figure(self, name: str, title: str, caption: str, panels: Sequence[Panel], **more: Any) -> Figure:
        edits = "; ".join(f"{label} after {count} edits" for label, count in self.edits.items())
        for panel in panels:
            panel.spec["params"] = [{"name": choice.name, "value": choice.default} for choice in self.choices]
        by_run = {label: [layer for one, layer in self.layers if one == label] for label in self.edits}
        if len({tuple(layers) for layers in by_run.values()}) > 1:  # to explain empty plots
            edits += ". Layers that a run has: " + "; ".join(f"{label} {', '.join(map(str, layers))}"
                                                            for label, layers in by_run.items())
        return Figure(name, title, f"{caption} After: {edits}.", self._description(), tuple(panels), self.choices,
                      by_run=False, **more)

    def _description(self) -> str:
        return " ".join(
            f"{label}, layer {layer}: standard deviation of pairwise cosines {_spread(found.histogram[0]):.4f} before, "
            f"{_spread(found.histogram[1]):.4f} after; rank of the principal space {found.ranks[0]}, then "
            f"{found.ranks[1]}." for (label, layer), found in self.layers.items())

    def _heatmaps(self) -> Figure:
        sizes = {min(_HEATMAP, found.sampled) for found in self.layers.values()}
        apart = [np.abs(_block(found, side)[~np.eye(len(_block(found, side)), dtype=bool)])
                 for found in self.layers.values() for side in range(2)]
        end = max(0.1, round(float(np.quantile(np.concatenate(apart), 0.998)), 2))
        data = [{"run": label, "layer": str(layer), "side": name, "n": len(_block(found, side)),
                 "c": np.rint(100.0 * _block(found, side)).astype(int).ravel().tolist()}  # percent: short to write
                for (label, layer), found in self.layers.items() for side, name in enumerate(SIDES)]
        panels = []
        for name, title in zip(SIDES, ("Before editing", "After"), strict=True):
            axis = {"scale": {"paddingInner": 0}, "axis": None}
            panels.append(Panel(title, {
                "data": {"values": [row for row in data if row["side"] == name]},
                "transform": [chosen("run"), chosen("layer"), {"flatten": ["c"]},
                              {"calculate": "datum.c / 100", "as": "c"},
                              {"window": [{"op": "row_number", "as": "k"}]},
                              {"calculate": "floor((datum.k - 1) / datum.n) + 1", "as": "i"},
                              {"calculate": "(datum.k - 1) % datum.n + 1", "as": "j"}],
                "mark": {"type": "rect"},
                "encoding": {"x": {"field": "j", "type": "ordinal", **axis},
                             "y": {"field": "i", "type": "ordinal", **axis},
                             "color": {"field": "c", "type": "quantitative", "title": "cosine", "scale": {
                                 "domain": [-end, 0, end], "range": ["#0b62a4", "#f7f7f7", "#b84a00"], "clamp": True}},
                             "tooltip": tooltip(("i", "neuron", "d"), ("j", "and", "d"), ("c", "cosine", ".2f"))},
            }, canvas=True, square=True, height=340))
        return self._figure(
            "heatmaps", "Cosines between neurons",
            f"Cosine similarity between {' or '.join(map(str, sorted(sizes)))} neurons (rows) of the edited weight, "
            "drawn by seed, the same before and after. The diagonal is 1; values beyond the scale have the colours of "
            "its ends.", panels, scale=(-end, end))

    def _embedding(self) -> Figure:
        data, lines = [], []
        for (label, layer), placed in self._coordinates_of_layers().items():
            found = self.layers[label, layer]
            (x, y), (x2, y2) = (tuple(map(list, zip(*placed[side * found.sampled: (side + 1) * found.sampled],
                                                    strict=True))) for side in range(2))
            which = {"run": label, "layer": str(layer)}
            data += [{**which, "side": name, "neuron": found.rows.tolist(), "x": across, "y": up}
                     for name, across, up in zip(SIDES, (x, x2), (y, y2), strict=True)]
            lines.append({**which, "x": x, "y": y, "x2": x2, "y2": y2})
        plain: Spec = {"axis": None, "scale": {"zero": False}}
        encoding = {"x": quantitative("x", **plain), "y": quantitative("y", **plain)}
        choose = [chosen("run"), chosen("layer")]
        spec: Spec = {"layer": [
            {"data": {"values": lines}, "transform": [*choose, {"flatten": ["x", "y", "x2", "y2"]}],
             "mark": {"type": "rule", "color": "var(--muted)", "opacity": 0.5},
             "encoding": {**encoding, "x2": {"field": "x2"}, "y2": {"field": "y2"}}},
            {"data": {"values": data}, "transform": [*choose, {"flatten": ["neuron", "x", "y"]}],
             "mark": {"type": "point", "size": 30}, "encoding": {
                **encoding, "color": {"field": "side", "type": "nominal", "scale": _SIDE_COLOURS, "title": None},
                "shape": {"field": "side", "type": "nominal", "title": None,
                          "scale": {"domain": list(SIDES), "range": ["circle", "triangle-up"]}},
                "tooltip": tooltip(("neuron", "row of the weight", "d"), ("side", "", None))}}]}
        counts = sorted({found.sampled for found in self.layers.values()})
        return self._figure(
            "embedding", "Neurons in the plane",
            f"t-SNE of {' or '.join(map(str, counts))} normalised neurons per layer, drawn by seed, before and after "
            "in one embedding of the angles between them; a line joins the two positions of a neuron. Close points are "
            "close in angle; distances between groups have little meaning.",
            [Panel("t-SNE", spec, square=True, height=420)], key=_KEY)

    def _coordinates_of_layers(self) -> dict[tuple[str, int], list[tuple[float, float]]]:
        """t-SNE coordinates of each layer's sampled neurons: all before editing, then all after."""
        kept = _cached_coordinates(self._coordinates)
        used, placed = {}, {}
        for which, found in self.layers.items():
            key = hashlib.sha256(found.cosines.tobytes()).hexdigest()[:16]
            if len(kept.get(key, ())) != 2 * found.sampled:
                kept[key] = [(round(float(x), 2), round(float(y), 2)) for x, y in embed(found.cosines)]
            used[key] = placed[which] = kept[key]
        if self._coordinates is not None:
            with atomic_write(self._coordinates) as temporary:
                temporary.write_text(json.dumps(used), encoding="utf-8")
        return placed

    def _histograms(self) -> Figure:
        data = []
        for (label, layer), found in self.layers.items():
            count = found.histogram.shape[1]
            shares = found.histogram / found.histogram.sum(axis=1, keepdims=True)
            filled = np.flatnonzero(found.histogram.sum(axis=0))
            bins = range(int(filled[0]), int(filled[-1]) + 1)
            for side, name in enumerate(SIDES):
                data.append({"run": label, "layer": str(layer), "side": name,
                             "x": [round(-1 + (2 * index + 1) / count, 4) for index in bins],
                             "y": [float(f"{100 * shares[side, index]:.3g}") for index in bins]})
        y = quantitative("y", "% of pairs")
        spec: Spec = {
            "data": {"values": data},
            "transform": [chosen("run"), chosen("layer"), {"flatten": ["x", "y"]}],
            "mark": {"type": "line", "interpolate": "step"},
            "encoding": {"x": quantitative("x", "cosine of two neurons"), "y": y, **_by_side(), "tooltip": tooltip(
                ("x", "cosine", ".3f"), ("side", "", None), ("y", "% of pairs", ".3~g"))}}
        # Empty bins have no logarithm.
        log = {"/encoding/y/scale": {"type": "log"}, "/transform/3": {"filter": "datum.y > 0"}}
        spec["transform"].append({"filter": "true"})
        pairs = "; ".join(f"{label}, layer {layer}: {int(found.histogram[0].sum()):,}"
                          for (label, layer), found in list(self.layers.items())[:1])
        rows: list[TableRow] = [(label, layer, name, f"{_mean(found.histogram[side]):+.4f}",
                            f"{_spread(found.histogram[side]):.4f}", f"{_above(found.histogram[side]):.3g}")
                           for (label, layer), found in self.layers.items() for side, name in enumerate(SIDES)]
        return self._figure(
            "cosines", "Pairwise cosines, all neurons",
            f"Share of all pairs of neurons by their cosine, in bins of {2 / found.histogram.shape[1]:g} (pairs: "
            f"{pairs}).",
            [Panel("Pairwise cosine", spec, log)], key=_KEY,
            columns=("run", "layer", "side", "mean", "standard deviation", "% above 0.5"), rows=tuple(rows))

    def _spectra(self) -> Figure:
        data, cuts = [], []
        for (label, layer), found in self.layers.items():
            for side, name in enumerate(SIDES):
                values = found.spectrum[side]
                chosen_ones = np.unique(np.linspace(0, len(values) - 1, min(_CURVE, len(values))).round().astype(int))
                data.append({"run": label, "layer": str(layer), "side": name, "x": (chosen_ones + 1).tolist(),
                             "y": [float(f"{values[index]:.4g}") for index in chosen_ones]})
                cuts.append({"run": label, "layer": str(layer), "side": name, "rank": int(found.ranks[side]),
                             "text": f"{name}: {found.ranks[side]}", "place": 14.0 * side + 8})
        choose = [chosen("run"), chosen("layer")]
        y = quantitative("y", "eigenvalue")
        rule = {"transform": choose, "data": {"values": cuts}}
        spec: Spec = {"layer": [
            {"data": {"values": data}, "transform": [*choose, {"flatten": ["x", "y"]}, {"filter": "true"}],
             "mark": "line", "encoding": {"x": quantitative("x", "direction"), "y": y, **_by_side(), "tooltip": tooltip(
                 ("x", "direction", "d"), ("side", "", None), ("y", "eigenvalue", ".4~g"))}},
            {**rule, "mark": {"type": "rule", "strokeDash": [4, 3]},
             "encoding": {"x": quantitative("rank"), **_by_side(("color",))}},
            {**rule, "mark": {"type": "text", "align": "left", "dx": 5},
             "encoding": {"x": quantitative("rank"), "y": {"field": "place", "type": "quantitative", "scale": None},
                          "text": {"field": "text"}, **_by_side(("color",))}}]}
        log = {"/layer/0/encoding/y/scale": {"type": "log"}, "/layer/0/transform/3": {"filter": "datum.y > 0"}}
        return self._figure(
            "spectra", "Spectrum of the weight's directions, and gamma's cut",
            "Eigenvalues of What What^T (What: the weight with rows of length 1), largest first. Dashed: their sum "
            f"passes gamma = {', '.join(f'{gamma:g}' for gamma in sorted(self._gammas))} of the total; the directions "
            "to the left are the principal ones, which SPHERE protects.", [Panel("Spectrum", spec, log)], key=_KEY)


def embed(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    """t-SNE of m directions by the angles between them: coordinates ``(m, 2)`` from cosines ``(m, m)``.

    Distances are chords, ``sqrt(2 - 2 cos)``; t-SNE starts from the two leading principal coordinates and is
    deterministic.
    """
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]  # takes seconds to import
    from threadpoolctl import threadpool_limits  # type: ignore[import-not-found,import-untyped,unused-ignore]

    values = cosines.astype(np.float64)
    distances = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * (values + values.T) / 2))
    np.fill_diagonal(distances, 0.0)
    centred = values - values.mean(axis=0) - values.mean(axis=1)[:, None] + values.mean()
    eigenvalues, vectors = np.linalg.eigh((centred + centred.T) / 2)
    start = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(eigenvalues[-2:][::-1], 0.0))
    start = 1e-4 * start / max(float(start[:, 0].std()), 1e-12)
    perplexity = min(_PERPLEXITY, max(1.0, (len(values) - 1) / 4))
    # Threads of so small a problem mostly wait for each other, without end on busy cores.
    with threadpool_limits(1):
        found: NDArray[np.float64] = TSNE(metric="precomputed", init=start.astype(np.float32), perplexity=perplexity,
                                          random_state=0, n_jobs=1).fit_transform(distances)
    return found


def _cached_coordinates(path: Path | None) -> dict[str, list[tuple[float, float]]]:
    if path is None or not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): [(float(x), float(y)) for x, y in points] for key, points in kept.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # damaged or of another form: they are computed again


def _by_side(channels: Sequence[str] = ("color", "strokeDash")) -> Spec:
    ranges: dict[str, list[Any]] = {"color": _SIDE_COLOURS["range"], "strokeDash": [[5, 3], [1, 0]]}
    return {channel: {"field": "side", "type": "nominal", "title": None,
                      "scale": {"domain": list(SIDES), "range": ranges[channel]}} for channel in channels}


def _block(found: LayerNeurons, side: int) -> NDArray[np.float32]:
    first = side * found.sampled
    count = min(_HEATMAP, found.sampled)
    return found.cosines[first: first + count, first: first + count]


def _middles(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    count = len(histogram)
    return -1 + (2 * np.arange(count) + 1) / count


def _mean(histogram: NDArray[np.int64]) -> float:
    return float(np.average(_middles(histogram), weights=histogram))


def _spread(histogram: NDArray[np.int64]) -> float:
    middles = _middles(histogram)
    return float(np.sqrt(np.average((middles - _mean(histogram)) ** 2, weights=histogram)))


def _above(histogram: NDArray[np.int64], cosine: float = 0.5) -> float:
    return float(100 * histogram[_middles(histogram) > cosine].sum() / histogram.sum())
