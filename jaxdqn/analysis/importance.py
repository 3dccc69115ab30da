"""How much of the variance of a score each hyperparameter explains on its own."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxdqn.analysis.curves import check_columns
from jaxdqn.errors import UserError

MAX_LEVELS, MAX_POINTS = 8, 16
MIN_TRIALS = 10


def main_effects(
    trials: pd.DataFrame, names: Sequence[str], score: str = "score", permutations: int = 500, seed: int = 0
) -> pd.DataFrame:
    """The first-order share of each hyperparameter in the variance of the score, [names] x (share, noise, n).

    The functional ANOVA's main effect, Var(E[score | hyperparameter]) / Var(score), where hyperparameters were drawn
    independently of each other. The expectation is over values, or over bins of equally many trials where there are
    more than eight; Kelley's epsilon squared (1935) corrects for the share that as many bins explain by chance, so
    that a hyperparameter without effect has 0 on average. `noise` is the share that 5 % of shuffled scores exceed:
    below it, nothing was shown. Trials without a finite score are left out, and for each hyperparameter those where it
    is NaN: not in use; n counts the others.

    Raises `UserError` for an unknown column and for fewer than ten trials.
    """
    check_columns(trials, names, [score])
    if not names:
        raise UserError("no hyperparameter is named whose importance is asked for.")
    known = trials[np.isfinite(trials[score].to_numpy(float))]
    used = [known.dropna(subset=[name]) for name in names]
    least = min(map(len, [known, *used]))
    if least < MIN_TRIALS:
        raise UserError(f"{least} trials with a score; the importance of hyperparameters needs {MIN_TRIALS}.")
    shares = np.stack(
        [
            _shares(_shuffled(rows[score].to_numpy(float), permutations, seed), levels(rows[name]))
            for name, rows in zip(names, used, strict=True)
        ]
    )
    noise = np.percentile(shares[:, 1:], 95.0, axis=1)
    return pd.DataFrame({"share": shares[:, 0], "noise": noise, "n": list(map(len, used))}, index=pd.Index(names))


def _shuffled(scores: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """The scores [n], and under them in random orders: [1 + permutations, n]."""
    rng = np.random.default_rng(seed)
    return np.stack([scores, *(rng.permutation(scores) for _ in range(permutations))])


def levels(column: pd.Series) -> np.ndarray:
    """The number of each row's value, or of its bin of equally many rows: [n].

    Bins are for more than eight values, but not for a grid of at most sixteen that come twice or more on average.
    """
    codes, distinct = pd.factorize(column, sort=False)
    on_a_grid = len(distinct) <= MAX_POINTS and 2 * len(distinct) <= len(column)
    if len(distinct) <= MAX_LEVELS or on_a_grid or not pd.api.types.is_numeric_dtype(column):
        return np.asarray(codes)
    bins = int(np.clip(len(column) // 5, 2, MAX_LEVELS))  # at least five trials in each
    return pd.qcut(column.rank(method="first"), bins, labels=False).to_numpy()


def _shares(scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Epsilon squared of each row of scores [S, n], grouped by level [n]: [S]."""
    n, groups = scores.shape[1], np.unique(level)
    member = (level[:, None] == groups).astype(float)
    centred = scores - scores.mean(axis=1, keepdims=True)
    total = np.sum(centred**2, axis=1)
    between = np.sum((centred @ member) ** 2 / member.sum(axis=0), axis=1)
    within = np.maximum(total - between, 0.0) / max(n - len(groups), 1)
    return np.where(total > 0, (between - (len(groups) - 1) * within) / np.where(total > 0, total, 1.0), 0.0)
