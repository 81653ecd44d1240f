"""A figure: Vega-Lite panels with caption, choices and a table, in the colours of the page or of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

Spec = dict[str, Any]
Row = tuple[object, ...]

SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is fetched from it
HEIGHT: Final = 230  # pixels of a panel's plot
_LEGEND_WIDTH: Final = 800  # pixels of a name, at most
LABEL_HEIGHT: Final = 13  # pixels that a label at a curve's end takes

# Colours are named in specs as CSS variables. On the page report.css gives them, for light, dark and paper; a file gets
# these. All are at least 4.5:1 on white, and apart for colour-blind eyes by lightness; dashes and shapes double them.
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
        title: above it.
        spec: Vega-Lite without size and configuration.
        log: what changes for a logarithmic scale: values by JSON pointer into ``spec``; empty where there is none.
        start_log: shown logarithmically at first.
        canvas: drawn on a canvas: for thousands of marks, which then can't follow the page's colours.
        square: no wider than it is high.
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
    """A parameter of a figure's specs that the reader sets: ``options`` are (value, what it is called)."""

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
        name: of its files, and its anchor on the page.
        title, caption: what is seen; the caption names samples, seeds and sizes.
        description: the text alternative: what the figure says, in words and numbers.
        panels: its plots.
        choices: what can be chosen, for all panels together.
        by_run: whether it shows the runs by their colours, so that the page's list of runs is its legend.
        key: of figures that don't: (colour's name, meaning).
        scale: (lowest, highest) of a colour scale from blue over white to orange, where there is one.
        columns, rows: its numbers as a table, where that is short enough to be read.
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
    rows: tuple[Row, ...] = ()


def params(labels: Sequence[str], choices: Iterable[Choice] = ()) -> list[Spec]:
    """What the page sets in a spec: the runs shown, and the figure's choices."""
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


def spread(wanted: Sequence[float], least: float = LABEL_HEIGHT, top: float = 6.0, bottom: float = HEIGHT - 6.0
           ) -> list[float]:
    """Positions (pixels from the top) close to the wanted ones and in their order, at least ``least`` apart where all
    fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    gap = min(least, (bottom - top) / max(1, len(wanted)))
    placed = dict.fromkeys(order, 0.0)
    lowest = top
    for index in order:
        placed[index] = max(lowest, wanted[index])
        lowest = placed[index] + gap
    highest = bottom
    for index in reversed(order):  # what was pushed out at the bottom goes up again
        placed[index] = min(placed[index], highest)
        highest = placed[index] - gap
    return [placed[index] for index in range(len(wanted))]


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
    """A panel as the page draws it: as wide as its place, without a legend."""
    return {"$schema": SCHEMA, "width": "container", "height": panel.height, "config": config(legend=False),
            "autosize": {"type": "fit-x", "contains": "padding", "resize": True}, **panel.spec}


def as_file(figure: Figure, width: int = 380, columns: int = 2) -> Spec:
    """A whole figure as one drawing on white paper: first choices, and with a legend."""
    labels: list[Spec] = [{"text": choice.label + ": " + choice.options[0][1]} for choice in figure.choices]
    note = ", ".join(label["text"] for label in labels)
    settings = config(legend=figure.by_run or bool(figure.key) or figure.scale is not None)
    longest = max((len(label) for label in figure.panels[0].spec.get("params", [{}])[0].get("value", ())
                   if figure.by_run), default=0)
    # Names are not cut while two columns hold them, or one.
    settings["legend"]["columns"] = 3 if longest <= 34 else 2 if longest <= 60 else 1
    found: Spec = {
        "$schema": SCHEMA, "config": settings, "background": "white", "padding": 12,
        "title": {"text": figure.title, **({"subtitle": note} if note else {}), "fontSize": 15, "offset": 12,
                  "subtitleColor": "var(--muted)"},
        "columns": min(columns, len(figure.panels)), "spacing": 28,
        "resolve": {"scale": {"color": "shared"}},
        # Parameters of one name can't be declared twice: those of the panels are the same.
        "params": list(figure.panels[0].spec.get("params", [])),
        "concat": [{"width": width, "height": panel.height, "title": panel.title,
                    **{name: part for name, part in _logged(panel).items() if name != "params"}}
                   for panel in figure.panels]}
    return dict(json.loads(coloured(json.dumps(found))))


def coloured(text: str) -> str:
    """CSS variables in a text as the colours that they are on white paper."""
    for index, colour in enumerate(SERIES):
        text = text.replace(f"var(--s{index})", colour)
    for name, colour in _INK.items():
        text = text.replace(f"var(--{name})", colour)
    return text


def _logged(panel: Panel) -> Spec:
    return with_values(panel.spec, panel.log) if panel.start_log else panel.spec


def with_values(spec: Spec, values: Mapping[str, object]) -> Spec:
    """A copy of a spec with values put in by JSON pointer."""
    copy: Spec = json.loads(json.dumps(spec))
    for pointer, value in values.items():
        *path, last = pointer.strip("/").split("/")
        place: Any = copy
        for part in path:
            place = place[_step(place, part)]
        place[_step(place, last)] = value
    return copy


def _step(place: object, part: str) -> int | str:
    return int(part) if isinstance(place, list) else part
