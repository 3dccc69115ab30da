"""Figures of hyperparameter searches: score against settings, and which settings matter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from jaxdqn.analysis import style
from jaxdqn.analysis.curves import check_columns, final_score, identity
from jaxdqn.analysis.importance import levels, main_effects
from jaxdqn.analysis.intervals import bootstrap_ci
from jaxdqn.errors import UserError

MAX_TICKS = 8  # as many different values have a tick each
MAX_TICK_LETTERS = 15  # as many fit side by side below a small panel


def scored(frame: pd.DataFrame, names: Sequence[str], score: str = "score") -> pd.DataFrame:
    """Settings with their score, one row each: of trials, or the final greedy return of every curve of metrics.

    Rows without a finite score are left out. Raises `UserError` for an unknown column, and where none has a score.
    """
    if not names:
        raise UserError("no column is named to see the score against.")
    if "member" in frame:
        check_columns(frame, names)
        key = identity(frame)
        settings = frame.groupby(key, observed=True)[[name for name in names if name not in key]].first()
        frame = settings.assign(**{score: final_score(frame, by=key)}).reset_index()
    check_columns(frame, names, [score])
    table = frame[[*names, score]]
    table = table[np.isfinite(table[score].to_numpy(float))].reset_index(drop=True)
    if table.empty:
        raise UserError(f"nothing to draw: none of {len(frame)} trials or seeds has a score yet.")
    return table


def response(frame: pd.DataFrame, name: str, score: str = "score", colour: str | None = None) -> Figure:
    """The score against one hyperparameter: every trial or seed, and the mean with its 95 % interval.

    Means are over equal values (see `importance.levels`), or over bins of equally many trials; `colour` draws each
    setting of another column apart. Rows where the hyperparameter is NaN, not in use, are left out. Raises `UserError`
    for an unknown column.
    """
    others = [colour] if colour else []
    table = scored(frame, [name, *others], score).dropna(subset=[name]).reset_index(drop=True)
    if colour and table[colour].nunique() > 4 and is_numeric(table[colour]):
        table[colour] = _thirds(table[colour])
    figure, (axis,) = style.panels(1, 5.6, 3.8)
    x = _positions(axis, "x", table[name])
    count = 0
    for count, (label, rows) in enumerate(style.groups(table, others), start=1):
        _draw_response(axis, x[rows.index], rows, name, score, style.counted(label, len(rows)), count - 1)
    axis.set(xlabel=style.named(name), ylabel="final greedy return" if "member" in frame else style.named(score))
    style.legend(axis, count)
    style.note(figure, f"dot: a {'seed' if 'member' in frame else 'trial'}; {RESPONSE}")
    return figure


RESPONSE = "marker: mean of equal values (or of a bin), bar: its 95 % bootstrap interval"


def _thirds(column: pd.Series) -> "pd.Categorical[str]":
    """Which third of the values each belongs to, named by its ends, in order."""
    third = pd.qcut(column.rank(method="first"), 3, labels=False)
    names = [f"{part.min():.3g} to {part.max():.3g}" for _, part in column.groupby(third)]
    return pd.Categorical.from_codes(third, pd.Index(names))


def _draw_response(
    axis: Axes, x: np.ndarray, rows: pd.DataFrame, name: str, score: str, label: str, index: int
) -> None:
    look, y, level = style.look(index), rows[score].to_numpy(float), levels(rows[name])
    if not is_numeric(rows[name]):
        look["linestyle"] = ""  # nothing lies between two categories
    bins = [(float(np.median(x[level == each])), y[level == each]) for each in np.unique(level)]
    bins.sort(key=lambda pair: pair[0])
    centres, means = [centre for centre, _ in bins], [values.mean() for _, values in bins]
    drawn = axis.plot(x, y, ".", color=look["color"], alpha=0.6, markersize=6, markeredgewidth=0)
    drawn += axis.plot(centres, means, linewidth=1.4, markersize=5, label=label, **look)
    for centre, values in bins:
        interval = bootstrap_ci(values)
        if interval is not None:
            drawn += axis.plot([centre, centre], interval, color=look["color"], linewidth=1.6)
    # Groups stand a little apart, or intervals at the same value would hide each other.
    beside = axis.transData + ScaledTranslation(index * 4 / 72, 0.0, axis.figure.dpi_scale_trans)
    for line in drawn:
        line.set_transform(beside)


def pairwise(trials: pd.DataFrame, names: Sequence[str], score: str = "score") -> Figure:
    """Every pair of hyperparameters as a scatter of trials coloured by score; the score against each on the diagonal.

    A trial is missing where a hyperparameter is NaN: not in use. Raises `UserError` for an unknown column.
    """
    table = scored(trials, names, score).sort_values(score)  # the best on top
    count = len(names)
    figure = Figure(figsize=(2.3 * count + 1.2, 2.1 * count + 0.4), layout="constrained")
    axes: Any = figure.subplots(count, count, squeeze=False)
    norm = Normalize(table[score].min(), table[score].max())
    for row, column in np.ndindex(count, count):
        axis: Axes = axes[row, column]
        if column > row:
            axis.remove()
            continue
        style.tidy(axis)
        x = _positions(axis, "x", table[names[column]])
        y = table[score] if row == column else _positions(axis, "y", table[names[row]])
        axis.scatter(x, y, c=table[score], cmap=style.SCALE, norm=norm, s=14, linewidths=0)
        _outer_labels(axis, row, column, names, score)
    figure.colorbar(ScalarMappable(norm, style.SCALE), ax=list(figure.axes), label=style.named(score), shrink=0.6)
    style.note(figure, f"a dot is a trial (n={len(table)}{_missing(table, names)}); diagonal: score against each")
    return figure


def _outer_labels(axis: Axes, row: int, column: int, names: Sequence[str], score: str) -> None:
    if row == len(names) - 1:
        axis.set_xlabel(style.named(names[column]))
        fixed = isinstance(axis.xaxis.get_major_formatter(), FixedFormatter)
        if fixed and sum(len(tick.get_text()) for tick in axis.get_xticklabels()) > MAX_TICK_LETTERS:
            axis.tick_params(axis="x", labelrotation=30)
    else:
        axis.tick_params(labelbottom=False)
    if row == column:
        axis.set_ylabel(style.named(score))
    elif column == 0:
        axis.set_ylabel(style.named(names[row]))
    else:
        axis.tick_params(labelleft=False)


def parallel_coordinates(trials: pd.DataFrame, names: Sequence[str], score: str = "score") -> Figure:
    """Every trial as a line through its hyperparameters and its score, coloured by score, the best on top.

    Its line has a gap where a hyperparameter is NaN: not in use. Raises `UserError` for an unknown column.
    """
    table = scored(trials, names, score).sort_values(score)
    columns = [*names, score]
    figure, (axis,) = style.panels(1, 1.7 * len(columns) + 1.5, 4.0)
    heights = np.column_stack([_height(axis, index, table[name], name == score) for index, name in enumerate(columns)])
    lines = [np.column_stack([np.arange(len(columns)), height]) for height in heights]
    norm = Normalize(table[score].min(), table[score].max())
    axis.add_collection(
        LineCollection(
            lines, array=table[score].to_numpy(float), cmap=style.SCALE, norm=norm, linewidths=1.0, alpha=0.8
        )
    )
    axis.set(xlim=(-0.3, len(columns) - 0.7), ylim=(-0.05, 1.05), yticks=[])
    axis.set_xticks(range(len(columns)), [style.named(name) for name in columns])
    axis.spines["left"].set_visible(False)
    figure.colorbar(ScalarMappable(norm, style.SCALE), ax=axis, label=style.named(score))
    style.note(figure, f"a line is a trial (n={len(table)}{_missing(table, names)})")
    return figure


def _missing(table: pd.DataFrame, names: Sequence[str]) -> str:
    return "; missing where a value is not in use" if table[list(names)].isna().any(axis=None) else ""


def _height(axis: Axes, index: int, column: pd.Series, is_score: bool) -> np.ndarray:
    """Values on the scale from 0 to 1 of one upright axis, [n], which is drawn with its ticks."""
    axis.axvline(index, color=style.GREY, linewidth=0.8, zorder=0)
    if is_numeric(column):
        log = style.is_logarithmic(column) and not is_score
        values = np.log10(column.to_numpy(float)) if log else column.to_numpy(float)
        low, high = np.nanmin(values), np.nanmax(values)
        heights = (values - low) / (high - low or 1.0)
        at = np.unique(heights[np.isfinite(heights)]) if column.nunique() <= MAX_TICKS else np.array([0.0, 0.5, 1.0])
        marks = low + at * (high - low)
        names = [f"{10**mark if log else mark:.3g}" for mark in marks]
    else:
        codes, distinct = pd.factorize(column, sort=True)
        at = (np.arange(len(distinct)) + 0.5) / len(distinct)
        heights, names = np.append(at, np.nan)[codes], [str(value) for value in distinct]
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
    for height, name in zip(at, names, strict=True):
        axis.text(index + 0.03, float(height), name, fontsize="x-small", va="center", bbox=box, zorder=4)
    return heights


def importance(trials: pd.DataFrame, names: Sequence[str], score: str = "score") -> Figure:
    """The share of the score's variance that each hyperparameter explains on its own, with what chance explains.

    Raises `UserError` as `importance.main_effects` does.
    """
    table = scored(trials, names, score)
    effects = main_effects(table, names, score).sort_values("share")
    figure, (axis,) = style.panels(1, 6.0, 1.6 + 0.32 * len(effects))
    position = list(range(len(effects)))
    shares = effects.share.clip(lower=0.0)
    axis.barh(position, shares, color=style.COLOURS[0], height=0.6)
    axis.plot(effects.noise, position, "|", color="black", markersize=14, markeredgewidth=1.6)
    for at, share, noise, count in zip(position, shares, effects.noise, effects.n, strict=True):
        text = f"{share:.0%}" + (f" (n={count})" if count < len(table) else "")
        axis.text(max(share, noise) + 0.015, at, text, fontsize="small", va="center")
    axis.set_yticks(position, [style.named(str(name)) for name in effects.index])
    axis.set(xlabel=f"share of the variance of {style.named(score)} (main effect)", xlim=(0.0, 1.0))
    style.note(figure, f"n={len(table)} trials; black mark: what chance exceeds in 5 % of shuffled scores")
    return figure


def _positions(axis: Axes, which: str, column: pd.Series) -> np.ndarray:
    """Where values lie on an axis, [n]: themselves, on a logarithmic scale where they span decades, or places in order.

    Anything but numbers gets a place each, and its name as tick; so do a few numbers.
    """
    numeric = is_numeric(column)
    direction = axis.xaxis if which == "x" else axis.yaxis
    codes, distinct = pd.factorize(column, sort=True)
    if numeric and style.is_logarithmic(column):
        getattr(axis, f"set_{which}scale")("log")
    if len(distinct) <= MAX_TICKS or not numeric:
        names = [f"{value:g}" if numeric else str(value) for value in distinct]
        direction.set_ticks(list(distinct) if numeric else range(len(distinct)), names)
        direction.set_minor_locator(NullLocator())
    if numeric:
        return column.to_numpy(float)
    getattr(axis, f"set_{which}lim")(-0.5, len(distinct) - 0.5)
    return np.where(codes < 0, np.nan, codes)


def is_numeric(column: pd.Series) -> bool:
    """Whether a column holds numbers on a scale, not names or truth values."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
