"""How all figures look: colours, line styles and markers that survive grey print and colour-blindness, and names."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike

from jaxdqn.analysis.curves import check_columns

# Okabe and Ito (2008), without the yellow, which vanishes on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
SCALE = "cividis"  # a colour map that reads alike with and without red-green vision
GREY = "#707070"

NAMES = {
    "env_steps": "environment steps",
    "seconds": "training time in seconds, compilation apart",
    "eval_return": "greedy return",
    "episode_return": "training return",
    "updates": "gradient updates",
    "num_envs": "environments in parallel",
}
COUNTS = ("env_steps", "updates")
PLAIN = ("run", "env", "agent", "scheme", "sweep", "kind")  # columns whose values need no name beside them
DECADES = 0.8  # values over more than this many have a logarithmic axis


def named(column: str) -> str:
    """A column's name for people."""
    return NAMES.get(column, column.replace("_", " "))


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the index-th group; no two of the first 28 are alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def groups(frame: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each setting of the columns `by`, with its name; all rows, named "", without any column.

    Raises `UserError` for an unknown column.
    """
    check_columns(frame, by)
    if not by:
        yield "", frame
        return
    for key, rows in frame.groupby(list(by), observed=True, dropna=False):
        yield ", ".join(_value(column, value) for column, value in zip(by, key, strict=True)), rows


def _value(column: str, value: object) -> str:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    text = f"{value:g}" if number else str(value)
    return text if column in PLAIN else f"{column}={text}"


def counted(name: str, n: int) -> str:
    """A group's name with its number of seeds, and why there is no interval where there is none."""
    return f"{name} ({size(n)})" if name else size(n)


def size(n: int) -> str:
    """The number of seeds, for people."""
    return "n=1: no interval" if n == 1 else f"n={n}"


def panels(count: int, width: float = 5.2, height: float = 3.6, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, at most three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for unused in axes[count:]:
        unused.remove()
    for axis in axes[:count]:
        tidy(axis)
    return figure, axes[:count]


def name_axes(axis: Axes, x: str, y: str) -> None:
    """Labels both axes with the columns they show."""
    axis.set(xlabel=named(x), ylabel=named(y))
    if x in COUNTS:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5M


def tidy(axis: Axes) -> None:
    """No box, a light grid."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def note(figure: Figure, text: str) -> None:
    """What marks and bands mean, below the figure."""
    figure.supxlabel(textwrap.fill(text, int(13 * figure.get_figwidth())), fontsize="small", color=GREY)


def legend(axis: Axes, entries: int) -> None:
    """A legend in the axes, or beside them where it would cover too much."""
    if entries > 6:
        _, labels = axis.get_legend_handles_labels()
        widen(axis.figure.get_figure(root=True), labels)
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif entries:
        axis.legend(frameon=False, fontsize="small")


def widen(figure: Figure, labels: Sequence[str]) -> None:
    """Makes room for labels beside an axes, so that long ones do not squeeze it."""
    figure.set_figwidth(figure.get_figwidth() + 0.075 * max(map(len, labels), default=0))


def is_logarithmic(values: ArrayLike) -> bool:
    """Whether positive numbers span so much that a linear axis would crowd the small ones."""
    numbers = np.asarray(values)
    if not np.issubdtype(numbers.dtype, np.number):
        return False
    numbers = numbers[np.isfinite(numbers)]
    return bool(len(numbers) and numbers.min() > 0 and np.log10(numbers.max() / numbers.min()) > DECADES)
