"""Tables and plots for notebooks: HTML, pandas frames and matplotlib figures.

pandas and matplotlib belong to the extra ``notebook`` and are imported when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INSTALL: Final = "pip install 'sphere-easyedit[notebook]'"
_PANEL: Final = (4.6, 4.0)  # inches


def data_frame(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> pandas.DataFrame:
    """A pandas data frame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"a data frame needs pandas, which can't be imported ({error}): {_INSTALL}") from error
    return pandas.DataFrame(list(rows), columns=list(columns))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A matplotlib figure with plots side by side, over the number of edits.

    pyplot does not keep the figure: a notebook shows it once, as the result of its cell, and it needs no closing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib, which can't be imported ({error}): {_INSTALL}") from error
    figure, axes = plt.subplots(1, count, figsize=(count * _PANEL[0], _PANEL[1]), squeeze=False,
                                layout="constrained")
    plt.close(figure)
    for one in axes[0]:
        one.set_xlabel("edits")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(alpha=0.3)
    return figure, list(axes[0])


def legend_below(axes: Axes) -> None:
    """Add a plot's legend below it, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small", frameon=False)


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """A table as HTML, with every text escaped.

    Args:
        caption: shown above the table.
        columns: headings.
        rows: cells; numbers are to be formatted already.
        text_columns: number of first columns to align left; the others are aligned right.
    """
    def line(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(
            f'<{tag} style="text-align: {"left" if index < text_columns else "right"}">{escape(str(cell))}</{tag}>'
            for index, cell in enumerate(cells)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (f'<table><caption style="text-align: left">{escape(caption)}</caption>'
            f"<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>")


def layer_colours(count: int) -> list[Any]:
    """Colours for layers, from dark to light in their order."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](index / max(1, count - 1) * 0.85) for index in range(count)]
