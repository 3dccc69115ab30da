"""Aggregate scores over runs and tasks, with intervals that resample runs within each task (Agarwal et al., 2021).

Scores are an array [runs, tasks] (or [runs] of one task), a mapping from task to its runs' scores, or a sequence of
one array per task; tasks may have differently many runs. A score that is not finite raises `UserError`: whether a
failed run counts as the worst score or is run again is not for a statistic to decide.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxdqn.analysis.intervals import Band, Interval, percentiles
from jaxdqn.errors import UserError

Scores = np.ndarray | Mapping[str, ArrayLike] | Sequence[ArrayLike]
Means = np.ndarray | np.float64
Aggregate = Callable[[Scores], Means]

CHUNK = 1_000  # resamples at a time, which bounds the memory


def by_task(scores: Scores) -> list[np.ndarray]:
    """One array [..., runs] of each task. Raises `UserError` for none, for a task without runs, and for NaN."""
    if isinstance(scores, Mapping):
        tasks = [np.asarray(values, float) for values in scores.values()]
    elif isinstance(scores, np.ndarray):
        tasks = list(np.asarray(scores, float).T) if scores.ndim > 1 else [np.asarray(scores, float)]
    else:
        flat = all(np.ndim(values) == 0 for values in scores)
        tasks = [np.asarray(scores, float)] if flat else [np.asarray(values, float) for values in scores]
    if not tasks or not all(task.size for task in tasks):
        raise UserError("scores of no task, or of a task without runs; give at least one of each.")
    if not all(np.isfinite(task).all() for task in tasks):
        raise UserError("scores with NaN or infinity; drop those runs, or give them the worst score.")
    return tasks


def iqm(scores: Scores) -> Means:
    """Interquartile mean: the mean of all runs of all tasks without the lowest and the highest quarter."""
    return stats.trim_mean(np.concatenate(by_task(scores), axis=-1), 0.25, axis=-1)


def mean(scores: Scores) -> Means:
    """The mean over tasks of each task's mean."""
    return np.mean(_task_means(scores), axis=0)


def median(scores: Scores) -> Means:
    """The median over tasks of each task's mean; of one task, the median of its runs."""
    tasks = by_task(scores)
    return np.median(tasks[0], axis=-1) if len(tasks) == 1 else np.median(_task_means(tasks), axis=0)


def optimality_gap(scores: Scores, gamma: float = 1.0) -> Means:
    """How far the runs stay below the score `gamma` on average, runs above it counting as at it; lower is better."""
    return gamma - np.mean([np.minimum(task, gamma).mean(axis=-1) for task in by_task(scores)], axis=0)


def _task_means(scores: Scores) -> np.ndarray:
    return np.array([task.mean(axis=-1) for task in by_task(scores)])


def stratified_bootstrap_ci(
    scores: Scores, statistic: Aggregate = iqm, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of an aggregate; runs are resampled within each task, tasks are not.

    `statistic` takes a list of arrays [..., runs] and reduces it to [...], as those above do. None where some task
    has one run.
    """
    tasks = by_task(scores)
    if min(len(task) for task in tasks) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        drawn.append(statistic([task[rng.integers(0, len(task), (count, len(task)))] for task in tasks]))
    low, high = percentiles(np.concatenate(drawn), level)
    return [float(low), float(high)]


def performance_profile(
    scores: Scores,
    thresholds: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Band:
    """The share of runs with a score above each threshold [T], averaged over tasks, with its pointwise interval.

    The interval is NaN where some task has one run.
    """
    tasks = by_task(scores)
    above = [(task[:, None] > np.asarray(thresholds, float)).astype(float) for task in tasks]
    value = np.mean([share.mean(axis=0) for share in above], axis=0)
    low, high = np.full((2, len(value)), np.nan)
    if min(len(task) for task in tasks) > 1:
        rng = np.random.default_rng(seed)
        resampled = np.mean([_weights(rng, len(share), resamples) @ share for share in above], axis=0)
        low, high = percentiles(resampled, level)
    return Band(value, low, high, np.full(len(value), sum(len(task) for task in tasks)))


def probability_of_improvement(
    x: Scores, y: Scores, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, Interval | None]:
    """How probably a run of x scores above a run of y, a tie counting half, averaged over tasks; and its interval.

    On one task this is Mann and Whitney's U / (n m). The interval is None where some task has one run on a side.
    Tasks of two mappings are paired by name. Raises `UserError` for different tasks.
    """
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        if other := sorted(set(x) ^ set(y)):
            raise UserError(f"only one side has scores of {', '.join(other)}; they must be of the same tasks.")
        y = {task: y[task] for task in x}
    ours, theirs = by_task(x), by_task(y)
    if len(ours) != len(theirs):
        raise UserError(f"scores of {len(ours)} tasks against scores of {len(theirs)}; they must be of the same tasks.")
    wins = [np.heaviside(a[:, None] - b[None, :], 0.5) for a, b in zip(ours, theirs, strict=True)]
    value = float(np.mean([win.mean() for win in wins]))
    if min(min(win.shape) for win in wins) < 2:
        return value, None
    rng = np.random.default_rng(seed)
    resampled = np.mean(
        [
            np.einsum("ri,ij,rj->r", _weights(rng, len(win), resamples), win, _weights(rng, win.shape[1], resamples))
            for win in wins
        ],
        axis=0,
    )
    low, high = percentiles(resampled, level)
    return value, [float(low), float(high)]


def _weights(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """How often each of `count` runs is in each resample, as a share: [resamples, count]."""
    return rng.multinomial(count, np.full(count, 1.0 / count), resamples) / count
