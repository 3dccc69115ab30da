"""The picture of a tabular run: its error curve, and its values where the states are cells of a grid."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure  # not pyplot: no global state, no display


def picture(
    updates: Sequence[int],
    errors: Sequence[float],
    title: str,
    values: np.ndarray,
    terminal: np.ndarray,
    cells: np.ndarray | None = None,
    owner: np.ndarray | None = None,
) -> Figure:
    """A matplotlib figure: error against updates; values [S] on their cells [S, 2]; borders between owners [S].

    Walls are grey, terminal [S] cells too, and marked with a T.
    """
    figure = Figure(figsize=(9 if cells is not None else 4.8, 3.8), layout="constrained")
    axes = figure.subplots(1, 1 if cells is None else 2, squeeze=False)[0]
    axes[0].plot(updates, errors, linewidth=1.8)
    axes[0].set(xlabel="updates", ylabel="max |Q - Q*|", yscale="log")
    axes[0].grid(alpha=0.25, which="both")
    axes[0].spines[["top", "right"]].set_visible(False)
    if cells is not None:
        image = axes[1].imshow(on_grid(np.where(terminal, np.nan, values), cells), cmap="viridis")
        figure.colorbar(image, ax=axes[1], label="max Q(s, .)")
        axes[1].set(xticks=[], yticks=[], facecolor="lightgrey")
        for row, column in cells[terminal & (cells >= 0).all(axis=1)]:
            axes[1].text(column, row, "T", ha="center", va="center", fontsize="small")
        if owner is not None:
            _draw_borders(axes[1], on_grid(owner, cells))
    figure.suptitle(title, fontsize="medium")
    return figure


def on_grid(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """values [S] at their (row, column) cells [S, 2]; NaN where there is no state, and -1 cells left out."""
    grid = np.full(cells.max(axis=0) + 1, np.nan)
    inside = (cells >= 0).all(axis=1)
    grid[tuple(cells[inside].T)] = values[inside]
    return grid


def borders(grid: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The edges between neighbouring cells of different value, as pairs of (x, y), cell centres being whole numbers."""
    edges = []
    differ = lambda one, other: np.argwhere((one != other) & ~np.isnan(one) & ~np.isnan(other))  # noqa: E731
    for row, column in differ(grid[:, :-1], grid[:, 1:]):
        edges.append(((column + 0.5, row - 0.5), (column + 0.5, row + 0.5)))
    for row, column in differ(grid[:-1], grid[1:]):
        edges.append(((column - 0.5, row + 0.5), (column + 0.5, row + 0.5)))
    return edges


def _draw_borders(axis: Axes, grid: np.ndarray) -> None:
    axis.add_collection(LineCollection(borders(grid), colors="red", linewidths=2.0))
    for number in np.unique(grid[~np.isnan(grid)]):
        own = np.argwhere(grid == number)
        middle = own.mean(axis=0)
        row, column = own[np.abs(own - middle).sum(axis=1).argmin()]  # a cell of its own, whatever the part's shape
        axis.text(column, row, f"{number:.0f}", color="red", ha="center", va="center", fontsize="small")
