"""What is read off single curves: values on a common grid, the area under one, and its final score.

A curve is the rows of one `run` and `member` (of one `member`, where the frame has no runs), in which the column is
not NaN: greedy returns are measured at some logging points only.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import pandas as pd

from jaxdqn.errors import UserError, unknown_name

MAX_GRID = 200
Key = tuple[Hashable, ...]


def identity(frame: pd.DataFrame) -> list[str]:
    """The columns that tell curves apart: run and member, as far as they are there."""
    return [name for name in ("run", "member") if name in frame]


def check_columns(frame: pd.DataFrame, names: Sequence[str], numbers: Sequence[str] = ()) -> None:
    """Raises `UserError` for a column that the frame lacks, and for one of `numbers` that holds something else."""
    for name in (*names, *numbers):
        if name not in frame:
            raise unknown_name("column", name, [str(column) for column in frame.columns])
    for name in numbers:
        try:
            frame[name].to_numpy(float)
        except (ValueError, TypeError):
            raise UserError(f"column {name!r} holds something else than numbers.") from None


def keys(frame: pd.DataFrame, by: Sequence[str] | None) -> list[str]:
    """The columns `by`, or those of `identity`. Raises `UserError` for none, and for one that the frame lacks."""
    by = identity(frame) if by is None else list(by)
    if not by:
        raise UserError("nothing tells curves apart: the frame has no column run or member, and by names none.")
    check_columns(frame, by)
    return by


def each(frame: pd.DataFrame, x: str, column: str, by: Sequence[str]) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
    """Every curve: its key (a tuple of `by`), and its points x [P] and values [P], x ascending. Raises `UserError`."""
    check_columns(frame, by, [x, column])
    rows = frame[[*by, x, column]].dropna(subset=[x, column]).sort_values(x, kind="stable")
    for key, curve in rows.groupby(list(by), observed=True, dropna=False):
        yield key, curve[x].to_numpy(float), curve[column].to_numpy(float)


def on_grid(
    frame: pd.DataFrame,
    column: str = "eval_return",
    grid: Sequence[float] | np.ndarray | None = None,
    x: str = "env_steps",
    by: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Every curve, interpolated linearly at the points of `grid` [G]: a row each, indexed by its key; a column a point.

    NaN before a curve's first point and after its last: nothing is extrapolated. The grid is by default that of all
    logged points, or 200 evenly spaced ones where they are more. Raises `UserError` for an unknown column.
    """
    by = keys(frame, by)
    curves = list(each(frame, x, column, by))
    if grid is None:
        grid = np.unique(np.concatenate([points for _, points, _ in curves])) if curves else np.empty(0)
        grid = grid if len(grid) <= MAX_GRID else np.linspace(grid[0], grid[-1], MAX_GRID)
    grid = np.asarray(grid, float)
    values = [np.interp(grid, points, heights, left=np.nan, right=np.nan) for _, points, heights in curves]
    index = pd.MultiIndex.from_tuples([key for key, _, _ in curves], names=by) if curves else None
    return pd.DataFrame(np.reshape(values, (len(curves), len(grid))), index=index, columns=pd.Index(grid, name=x))


def area_under_curve(
    frame: pd.DataFrame,
    column: str = "eval_return",
    horizon: float | None = None,
    x: str = "env_steps",
    by: Sequence[str] | None = None,
) -> pd.Series:
    """The mean height of every interpolated curve from 0 to `horizon`, in the column's unit, indexed by its key.

    The first value holds before the first point. A curve that ends before the horizon has NaN; by default the horizon
    is where the shortest ends. Raises `UserError` for an unknown column, and for a horizon that is not positive.
    """
    by = keys(frame, by)
    curves = list(each(frame, x, column, by))
    if horizon is None:
        horizon = min((points[-1] for _, points, _ in curves), default=1.0)
    if not horizon > 0:
        raise UserError(f"horizon is {horizon}; it must be above 0.")
    return _by_key([(key, _mean_height(points, heights, horizon)) for key, points, heights in curves], by, column)


def _mean_height(points: np.ndarray, heights: np.ndarray, horizon: float) -> float:
    if points[-1] < horizon:
        return np.nan
    inner = (points > 0) & (points < horizon)
    x = np.concatenate([[0.0], points[inner], [horizon]])
    return float(np.trapezoid(np.interp(x, points, heights), x) / horizon)


def final_score(frame: pd.DataFrame, column: str = "eval_return", by: Sequence[str] | None = None) -> pd.Series:
    """Per curve, the mean of the column over the last fifth of the environment steps that were taken, by key.

    NaN where nothing was measured there. Raises `UserError` for an unknown column.
    """
    by = keys(frame, by)
    check_columns(frame, by, ["env_steps", column])
    groups = frame.groupby(list(by), observed=True, sort=True, dropna=False)
    late = frame.env_steps > 0.8 * groups.env_steps.transform("max")
    # Not groupby's own mean, which sums in another order: summaries are to stay the same to the last bit.
    settings = [frame[name] for name in by]
    return (
        frame[column]
        .where(late)
        .groupby(settings, observed=True, dropna=False)
        .agg(lambda values: values.dropna().mean())
    )


def _by_key(found: Sequence[tuple[Key, float]], by: Sequence[str], name: str) -> pd.Series:
    index = pd.MultiIndex.from_tuples([key for key, _ in found], names=list(by)) if found else None
    return pd.Series([value for _, value in found], index=index, name=name, dtype=float)
