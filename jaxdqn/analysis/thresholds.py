"""How long until a curve reaches a threshold, where some never do: their times are censored, not infinite or missing.

A run that was stopped before it reached the threshold says only that its time is longer. Kaplan and Meier's estimate
uses that; the mean over those that made it would be too short.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxdqn.analysis.curves import check_columns, keys
from jaxdqn.analysis.intervals import Interval, percentiles
from jaxdqn.errors import UserError


class Survival(NamedTuple):
    """Times to a threshold, summarised; intervals are None for a single curve.

    n: curves; reached: how many got there; median: when half of them have, by Kaplan and Meier's estimate, None where
    they never do; restricted_mean: the mean of min(time, horizon).
    """

    n: int
    reached: int
    median: float | None
    median_ci: Interval | None  # its upper end is infinite where resamples never get half of the curves there
    restricted_mean: float
    restricted_mean_ci: Interval | None
    horizon: float


def steps_to_threshold(
    frame: pd.DataFrame, threshold: float, column: str = "eval_return", by: Sequence[str] | None = None
) -> pd.DataFrame:
    """Environment steps at the first logging point where the column is at least `threshold`, one row a curve.

    Columns: `time`, and `reached`; where that is false, `time` is the curve's last point (censored). A curve whose
    column was never measured, such as one that stopped before its first evaluation, is censored at its last row: it
    counts, as one that has not been seen to get there. Raises `UserError` for an unknown column,
    and a threshold of NaN.
    """
    return _to_threshold(frame, threshold, column, "env_steps", by)


def seconds_to_threshold(
    frame: pd.DataFrame, threshold: float, column: str = "eval_return", by: Sequence[str] | None = None
) -> pd.DataFrame:
    """As `steps_to_threshold`, in seconds of training without compilation."""
    return _to_threshold(frame, threshold, column, "seconds", by)


def _to_threshold(frame: pd.DataFrame, threshold: float, column: str, x: str, by: Sequence[str] | None) -> pd.DataFrame:
    by = keys(frame, by)
    if math.isnan(threshold):
        raise UserError("threshold is nan; it must be a number.")
    check_columns(frame, by, [x, column])
    found, rows = [], []
    for key, curve in frame.groupby(by, observed=True, dropna=False):
        measured = curve[[x, column]].dropna().sort_values(x, kind="stable")
        hits = measured[x][measured[column] >= threshold]
        end = measured[x] if len(measured) else curve[x].dropna()
        found.append(key)
        rows.append((hits.iloc[0] if len(hits) else end.max() if len(end) else 0.0, len(hits) > 0))
    index = pd.MultiIndex.from_tuples(found, names=by) if found else None
    return pd.DataFrame(rows, index=index, columns=["time", "reached"])


def kaplan_meier(times: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of curves still below the threshold after each distinct time [T] (Kaplan and Meier, 1958): both [T]."""
    times, reached = np.asarray(times, float), np.asarray(reached, bool)
    distinct, index, counts = np.unique(times, return_inverse=True, return_counts=True)
    at_risk = len(times) - (np.cumsum(counts) - counts)
    events = np.bincount(index, weights=reached)
    return distinct, np.cumprod(1.0 - events / at_risk)


def summarise(
    times: Sequence[float] | np.ndarray,
    reached: Sequence[bool] | np.ndarray,
    horizon: float | None = None,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Survival:
    """Median and restricted mean of censored times [n], with percentile bootstrap intervals over curves.

    The horizon is by default the longest time. Raises `UserError` without any time, and for a horizon beyond the
    longest: nothing is known there.
    """
    times, reached = np.asarray(times, float), np.asarray(reached, bool)
    if not len(times):
        raise UserError("no curve to summarise times to a threshold of.")
    if len(times) != len(reached):
        raise UserError(f"{len(times)} times, but {len(reached)} curves that did or did not get there.")
    longest = float(times.max())
    horizon = longest if horizon is None else horizon
    if not 0 < horizon <= longest:
        raise UserError(f"horizon is {horizon:g}; it must be above 0 and at most the longest time, {longest:g}.")
    median, restricted = _median(times, reached), _restricted_mean(times, reached, horizon)
    median_ci = restricted_ci = None
    if len(times) > 1:
        picks = np.random.default_rng(seed).integers(0, len(times), (resamples, len(times)))
        medians = np.sort([_median(times[pick], reached[pick]) for pick in picks])
        # An end of the interval is one of the medians: between a finite and an infinite one nothing is interpolated.
        tail = int(0.5 * (1.0 - level) * (resamples - 1))
        median_ci = [float(medians[tail]), float(medians[-1 - tail])]
        means = np.array([_restricted_mean(times[pick], reached[pick], horizon) for pick in picks])
        restricted_ci = [float(end) for end in percentiles(means, level)]
    finite = float(median) if np.isfinite(median) else None
    return Survival(len(times), int(reached.sum()), finite, median_ci, restricted, restricted_ci, horizon)


def _median(times: np.ndarray, reached: np.ndarray) -> float:
    points, below = kaplan_meier(times, reached)
    hits = np.flatnonzero(below <= 0.5 + 1e-12)  # 1 - 1/2 in floating point
    return float(points[hits[0]]) if len(hits) else np.inf


def _restricted_mean(times: np.ndarray, reached: np.ndarray, horizon: float) -> float:
    """The area under the share still below, from 0 to the horizon; it keeps its last value where all are censored."""
    points, below = kaplan_meier(times, reached)
    edges = np.minimum(np.concatenate([[0.0], points, [horizon]]), horizon)
    return float(np.sum(np.diff(np.maximum.accumulate(edges)) * np.concatenate([[1.0], below])))
