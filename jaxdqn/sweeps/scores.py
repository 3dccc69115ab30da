"""What a trial is worth: the area under the curve of its greedy returns, or where they end."""

import math
from collections.abc import Mapping

import pandas as pd

from jaxdqn.analysis import curves

KEY = ("trial", "seed")


def per_seed(frame: pd.DataFrame, objective: str, env_steps: Mapping[int, int]) -> pd.DataFrame:
    """Each trial's score with each seed, columns trial, seed, score.

    auc: mean height of the curve from step 0 to env_steps[trial]; final: mean over the last fifth of the steps taken.
    """
    if objective == "final":
        return curves.final_score(frame, by=KEY).rename("score").reset_index()
    tables = [
        curves.area_under_curve(frame[frame.trial == trial], horizon=env_steps[trial], by=KEY)
        .rename("score")
        .reset_index()
        for trial in sorted(frame.trial.unique().tolist())
    ]
    return pd.concat(tables, ignore_index=True)


def means(scores: pd.DataFrame) -> dict[int, float]:
    """The mean over seeds by trial; NaN where a seed has no score."""
    table = scores.groupby("trial").score.agg(lambda values: values.mean(skipna=False))
    return dict(zip(table.index.tolist(), table.tolist(), strict=True))


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Trials from best to worst; those without a score last, equal ones by number."""
    missing = {trial: math.isnan(score) for trial, score in scores.items()}
    return sorted(scores, key=lambda trial: (missing[trial], 0.0 if missing[trial] else -scores[trial], trial))


def survivors(scores: Mapping[int, float], keep: float) -> list[int]:
    """The best fraction `keep` of the trials, rounded up, by number."""
    # Rounded first: .55 of 100 is 55.00000000000001 in floats.
    return sorted(ranked(scores)[: math.ceil(round(keep * len(scores), 6))])
