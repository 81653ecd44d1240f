"""Figures as Vega-Lite panels with caption, choices and a table, drawn on the page or as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

Spec = dict[str, Any]
TableRow = tuple[object, ...]

SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v6.json"  # an identifier; nothing is fetched
HEIGHT: Final = 230  # pixels of a panel's plot
_LEGEND_WIDTH: Final = 800  # maximum width of a name, in pixels
LABEL_HEIGHT: Final = 13  # pixels of a label at the end of a curve

# Specs name colours as CSS variables. On the page report.css defines them (light, dark, paper); files use these. All
# have a contrast of at least 4.5:1 on white and differ in lightness for colour-blind readers; dashes and shapes repeat
# the distinction.
_INK: Final = MappingProxyType({
    "ink": "#1b1f24", "muted": "#57606a", "grid": "#d8dee4", "paper": "#ffffff", "before": "#57606a",
    "after": "#b84a00"})
SERIES: Final = ("#0b62a4", "#b84a00", "#00735a", "#8a3b80", "#4d4d4d", "#7a5c00", "#a8123a", "#1d6f86", "#5b5bd6",
                 "#3f6b12")
_DASHES: Final = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
_SHAPES: Final = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        title: heading above the plot.
        spec: Vega-Lite without size and configuration.
        log: values by JSON pointer into ``spec`` that make the scale logarithmic; empty if there is no such scale.
        start_log: logarithmic at first.
        canvas: draw on a canvas (for thousands of marks, whose colours then do not follow the page's).
        square: as wide as high at most.
        height: in pixels.
    """

    title: str
    spec: Spec
    log: Mapping[str, object] = field(default_factory=dict)
    start_log: bool = False
    canvas: bool = False
    square: bool = False
    height: int = HEIGHT


@dataclass(frozen=True)
class Choice:
    """A parameter of a figure's specs that the reader chooses; ``options`` are (value, label)."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...]

    @property
    def default(self) -> str:
        """The first option's value."""
        return self.options[0][0]


@dataclass(frozen=True)
class Figure:
    """Panels that show one thing.

    Attributes:
        name: name of its files, and its anchor on the page.
        title, caption: shown with the figure; the caption gives samples, seeds and sizes.
        description: text alternative: the content of the figure in words and numbers.
        panels: its plots.
        choices: the reader's choices, for all panels together.
        by_run: runs differ by colour, so that the page's list of runs is the legend.
        key: legend of other figures: (colour's name, meaning).
        scale: (lowest, highest) of a colour scale from blue over white to orange, if any.
        columns, rows: its numbers as a table, if that is short enough to read.
    """

    name: str
    title: str
    caption: str
    description: str
    panels: tuple[Panel, ...]
    choices: tuple[Choice, ...] = ()
    by_run: bool = True
    key: tuple[tuple[str, str], ...] = ()
    scale: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[TableRow, ...] = ()


def params(labels: Sequence[str], choices: Iterable[Choice] = ()) -> list[Spec]:
    """Parameters of a spec that the page sets: the runs shown, and the figure's choices."""
    return [{"name": "shown", "value": list(labels)},
            *({"name": choice.name, "value": choice.default} for choice in choices)]


def shown() -> Spec:
    """The filter for rows of the runs shown."""
    return {"filter": "indexof(shown, datum.run) >= 0"}


def chosen(name: str) -> Spec:
    """The filter for rows of the chosen option."""
    return {"filter": f"datum.{name} == {name}"}


def dashes(count: int) -> list[list[int]]:
    """Dash patterns for ``count`` runs; runs that share a colour differ in their dashes."""
    return [list(_DASHES[(index + index // len(SERIES)) % len(_DASHES)]) for index in range(count)]


def by_run(labels: Sequence[str], channels: Sequence[str] = ("color",)) -> Spec:
    """Encodings that distinguish runs: by ``color``, ``strokeDash`` and ``shape``."""
    ranges: dict[str, list[Any]] = {
        "color": [f"var(--s{index % len(SERIES)})" for index in range(len(labels))],
        "strokeDash": dashes(len(labels)),
        "shape": [_SHAPES[(index + index // len(SERIES)) % len(_SHAPES)] for index in range(len(labels))]}
    return {channel: {"field": "run", "type": "nominal", "title": None,
                      "scale": {"domain": list(labels), "range": ranges[channel]}} for channel in channels}


def quantitative(name: str, title: str | None = None, **more: Any) -> Spec:
    """Encoding of a number."""
    return {"field": name, "type": "quantitative", **({} if title is None else {"title": title}), **more}


# Changes of energy are parts in ten thousand or less.
SMALL: Final = MappingProxyType({"labelExpr": "datum.value == 0 ? '0' : format(datum.value, '.2~e')", "tickCount": 5})


def tooltip(*fields: tuple[str, str, str | None]) -> list[Spec]:
    """Fields shown on hovering: (field, title, number format or None for text)."""
    return [{"field": name, "title": title, "type": "nominal" if form is None else "quantitative",
             **({} if form is None else {"format": form})} for name, title, form in fields]


def line_layers(labels: Sequence[str], encoding: Spec, tips: list[Spec], small_points: bool = False) -> list[Spec]:
    """A line per run and a point per row with a tooltip; small points all have the same shape."""
    mark: Any = {"type": "point", "size": 14} if small_points else "point"
    point = by_run(labels, ("color",) if small_points else ("color", "shape"))
    return [{"mark": "line", "encoding": {**encoding, **by_run(labels, ("color", "strokeDash"))}},
            {"mark": mark, "encoding": {**encoding, **point, "tooltip": tips}}]


def spread(positions: Sequence[float], least: float = LABEL_HEIGHT, top: float = 6.0, bottom: float = HEIGHT - 6.0
           ) -> list[float]:
    """Move label positions (pixels from the top) to be at least ``least`` apart if all fit, in the same order."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    gap = min(least, (bottom - top) / max(1, len(positions)))
    placed = dict.fromkeys(order, 0.0)
    lowest = top
    for index in order:
        placed[index] = max(lowest, positions[index])
        lowest = placed[index] + gap
    highest = bottom
    for index in reversed(order):  # labels pushed out at the bottom move up again
        placed[index] = min(placed[index], highest)
        highest = placed[index] - gap
    return [placed[index] for index in range(len(positions))]


def config(legend: bool) -> Spec:
    """Vega-Lite's configuration, the same for page and files."""
    text = {"labelColor": "var(--muted)", "titleColor": "var(--ink)", "labelFontSize": 11, "titleFontSize": 11,
            "titleFontWeight": "normal"}
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {**text, "domainColor": "var(--grid)", "tickColor": "var(--grid)", "gridColor": "var(--grid)",
                 "labelOverlap": True, "labelSeparation": 6},
        "legend": {**text, "disable": not legend, "orient": "bottom", "columns": 3, "labelLimit": _LEGEND_WIDTH,
                   "symbolSize": 80},
        "title": {"color": "var(--ink)", "fontSize": 13, "fontWeight": 600, "anchor": "start"},
        "text": {"color": "var(--ink)", "fontSize": 11},
        "line": {"strokeWidth": 2},
        "point": {"filled": True, "size": 42},
    }


def on_page(panel: Panel) -> Spec:
    """A panel for the page: as wide as its container, without a legend."""
    return {"$schema": SCHEMA, "width": "container", "height": panel.height, "config": config(legend=False),
            "autosize": {"type": "fit-x", "contains": "padding", "resize": True}, **panel.spec}


def as_file(figure: Figure, width: int = 380, columns: int = 2) -> Spec:
    """A whole figure as one drawing on white, with the first options and a legend."""
    labels: list[Spec] = [{"text": choice.label + ": " + choice.options[0][1]} for choice in figure.choices]
    note = ", ".join(label["text"] for label in labels)
    settings = config(legend=figure.by_run or bool(figure.key) or figure.scale is not None)
    longest = max((len(label) for label in figure.panels[0].spec.get("params", [{}])[0].get("value", ())
                   if figure.by_run), default=0)
    # Fewer columns for long names, so that they are not cut.
    settings["legend"]["columns"] = 3 if longest <= 34 else 2 if longest <= 60 else 1
    drawing: Spec = {
        "$schema": SCHEMA, "config": settings, "background": "white", "padding": 12,
        "title": {"text": figure.title, **({"subtitle": note} if note else {}), "fontSize": 15, "offset": 12,
                  "subtitleColor": "var(--muted)"},
        "columns": min(columns, len(figure.panels)), "spacing": 28,
        "resolve": {"scale": {"color": "shared"}},
        # A parameter can't be declared twice; those of all panels are the same.
        "params": list(figure.panels[0].spec.get("params", [])),
        "concat": [{"width": width, "height": panel.height, "title": panel.title,
                    **{name: part for name, part in _logged(panel).items() if name != "params"}}
                   for panel in figure.panels]}
    return dict(json.loads(coloured(json.dumps(drawing))))


def coloured(text: str) -> str:
    """Replace CSS variables in a text by the colours for files."""
    for index, colour in enumerate(SERIES):
        text = text.replace(f"var(--s{index})", colour)
    for name, colour in _INK.items():
        text = text.replace(f"var(--{name})", colour)
    return text


def _logged(panel: Panel) -> Spec:
    return with_values(panel.spec, panel.log) if panel.start_log else panel.spec


def with_values(spec: Spec, values: Mapping[str, object]) -> Spec:
    """A copy of a spec with values set by JSON pointer."""
    copy: Spec = json.loads(json.dumps(spec))
    for pointer, value in values.items():
        *path, last = pointer.strip("/").split("/")
        node: Any = copy
        for part in path:
            node = node[_index(node, part)]
        node[_index(node, last)] = value
    return copy


def _index(node: object, part: str) -> int | str:
    return int(part) if isinstance(node, list) else part
