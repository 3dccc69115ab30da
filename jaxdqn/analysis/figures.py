"""Learning curves, and the final score of every seed."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdqn.analysis import style
from jaxdqn.analysis.curves import final_score, identity, on_grid
from jaxdqn.analysis.intervals import bootstrap_band, mean_interval
from jaxdqn.errors import UserError

BAND_RESAMPLES = 2_000  # a band need not be exact to a hair, and there is one at every point
MAX_THIN = 30  # curves of a group that are drawn one by one


def learning_curves(
    frame: pd.DataFrame, x: str = "env_steps", y: str = "eval_return", by: Sequence[str] = (), title: str = ""
) -> Figure:
    """`y` against `x` for each setting of the columns `by`: mean, 95 % bootstrap band, seeds; a panel for each env.

    Raises `UserError` for an unknown column.
    """
    environments = list(_environments(frame))
    figure, axes = style.panels(len(environments), 6.4, 4.0)
    rest = [column for column in by if column != "env"]
    for axis, (name, rows) in zip(axes, environments, strict=True):
        count = draw_curves(axis, rows, x, y, rest, setting_names(frame, rest))
        if x == "seconds" and style.is_logarithmic(rows.groupby(identity(rows), observed=True)[x].max()):
            axis.set_xscale("log")
        axis.set_title(name)
        style.name_axes(axis, x, y)
        style.legend(axis, count)
    style.note(figure, CURVES)
    figure.suptitle(title, fontsize="medium")
    return figure


CURVES = (
    "thick: mean over seeds (dotted where some are missing); thin: seeds; band: 95 % bootstrap interval of the mean"
)


def return_distributions(returns: np.ndarray, probabilities: np.ndarray, title: str = "", bins: int = 60) -> Figure:
    """The distribution of the return at each step of an episode, and its mean: masses [L, K] at returns [L, K]."""
    figure, (axis,) = style.panels(1, 6.4, 4.0)
    steps = np.arange(len(returns))
    likely = returns[probabilities > 1e-3 * probabilities.max()]
    edges = np.linspace(likely.min() - 0.5, likely.max() + 0.5, bins + 1)
    mass, _, _ = np.histogram2d(
        np.repeat(steps, returns.shape[1]),
        returns.ravel(),
        bins=[np.arange(len(returns) + 1) - 0.5, edges],
        weights=probabilities.ravel(),
    )
    image = axis.pcolormesh(np.arange(len(returns) + 1) - 0.5, edges, mass.T, cmap=style.SCALE)
    axis.plot(steps, np.sum(returns * probabilities, axis=1), color="white", linewidth=1)
    figure.colorbar(image, ax=axis, label="probability")
    axis.set_xlabel("step of the episode")
    axis.set_ylabel("discounted return from here on")
    axis.set_title(title, fontsize="medium")
    return figure


def setting_names(frame: pd.DataFrame, by: Sequence[str]) -> list[str]:
    """The names of all settings: their places are their colours, in every panel."""
    return [name for name, _ in style.groups(frame, by)]


def draw_curves(axis: Axes, frame: pd.DataFrame, x: str, y: str, by: Sequence[str], order: Sequence[str]) -> int:
    """Draws the curves of each setting into `axis`, with labels for a legend; returns how many settings have any.

    `order` names all settings, by which they get their colours. Raises `UserError` for an unknown column.
    """
    drawn = 0
    for name, rows in style.groups(frame, by):
        table = on_grid(rows, y, x=x)
        if len(table):
            _draw_group(axis, table, style.counted(name, len(table)), order.index(name))
            drawn += 1
    return drawn


def _draw_group(axis: Axes, table: pd.DataFrame, label: str, index: int) -> None:
    look = style.look(index)
    colour, line = look["color"], look["linestyle"]
    grid, curves = table.columns.to_numpy(), table.to_numpy()
    if len(curves) == 1:
        marker = "o" if len(grid) == 1 else ""
        axis.plot(grid, curves[0], line, marker=marker, color=colour, linewidth=1.6, label=label)
        return
    band = bootstrap_band(curves, resamples=BAND_RESAMPLES)
    axis.plot(grid, curves[:MAX_THIN].T, color=colour, linewidth=0.6, alpha=0.3)
    axis.fill_between(grid, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
    everyone = np.where(band.n == len(curves), band.value, np.nan)
    if (band.n < len(curves)).any():
        axis.plot(grid, band.value, ":", color=colour, linewidth=1.4)
    axis.plot(grid, everyone, line, color=colour, linewidth=2.0, label=label)


def seed_dots(frame: pd.DataFrame, by: Sequence[str] = (), column: str = "eval_return", title: str = "") -> Figure:
    """The final score of every seed, with mean and 95 % interval, for each setting of the columns `by`.

    Raises `UserError` for an unknown column.
    """
    environments = list(_environments(frame))
    rest = [name for name in by if name != "env"]
    order = setting_names(frame, rest)
    figure, axes = style.panels(len(environments), 4.2 + 0.08 * max(map(len, order)), 1.6 + 0.35 * len(order))
    for axis, (name, part) in zip(axes, environments, strict=True):
        _draw_dots(axis, part, rest, column, order)
        axis.set(xlabel=f"final {style.named(column)}", title=name)
    style.note(figure, DOTS)
    figure.suptitle(title, fontsize="medium")
    return figure


DOTS = (
    "dot: a seed's mean over the last fifth of its steps; diamond: mean over seeds, bar: its 95 % interval (Student's)"
)


def _draw_dots(axis: Axes, frame: pd.DataFrame, by: Sequence[str], column: str, order: Sequence[str]) -> None:
    labels = []
    for index, (name, rows) in enumerate(style.groups(frame, by)):
        scores = final_score(rows, column).dropna().to_numpy()
        labels.append(style.counted(name, len(scores)))
        if not len(scores):
            continue
        colour = style.look(order.index(name))["color"]
        spread = np.linspace(-0.18, 0.18, len(scores)) if len(scores) > 1 else np.zeros(1)
        axis.plot(scores, index + spread, "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        draw_interval(axis, float(scores.mean()), mean_interval(scores), index, "black")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)  # the first on top


def draw_interval(axis: Axes, value: float, interval: Sequence[float] | None, position: float, colour: str) -> None:
    """A diamond at `value` with its interval, where there is one, at height `position`."""
    axis.plot([value], [position], "D", color=colour, markersize=5, zorder=3)
    if interval is not None:
        axis.plot(interval, [position, position], color=colour, linewidth=1.8, solid_capstyle="butt", zorder=3)


def _environments(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each environment with its name, or all where there are none to tell apart. Raises `UserError`."""
    if frame.empty:
        raise UserError("nothing to draw: there are no rows.")
    yield from style.groups(frame, ["env"] if "env" in frame else [])
