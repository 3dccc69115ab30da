"""What a sweep knows of its trials, what each is worth, and how stages are trained: what every kind of search shares.

Everything is computed from the sweep and from what its stages left in their directories; finished stages are passed
over, so that starting again is resuming.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from jaxdqn.analysis import curves, intervals
from jaxdqn.files.documents import Fields
from jaxdqn.sweeps import directory
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.engines import Engine, Run
from jaxdqn.sweeps.stage import Stage
from jaxdqn.sweeps.sweep import Sweep

TUNING, FINAL = "tuning", "final"  # kinds of stages
FINISHED = "finished"  # a status of trials
KEY = ("trial", "seed")


class Record:
    """The rows of one sweep's table of trials, by number, and the training of its stages by an engine.

    trained: how many stages were not finished before.
    """

    def __init__(self, sweep: Sweep, engine: Engine, run: Run):
        self.sweep, self.engine, self.run, self.folder = sweep, engine, run, run.folder
        self.rows: dict[int, Fields] = {}
        self.trained = 0

    def train(self, stages: Sequence[Stage]) -> None:
        """Trains what is left of the stages, and keeps their metrics. Raises `Stopped`, and `UserError`."""
        self.trained += sum(not _stage.finished(self.folder, stage) for stage in stages)
        self.engine(stages, self.run)
        directory.add_metrics(self.folder, stages)
        for stage in stages:
            if stage.continues is not None:
                _stage.prune(self.folder, stage.continues.stage)

    def write(self) -> pd.DataFrame:
        """Writes the table of trials; returns it."""
        return directory.write_table(self.folder, "trials", [self.rows[number] for number in sorted(self.rows)])

    def best(self) -> list[int]:
        """The finished trials that are to be trained again with fresh seeds, the best first: of equal ones one; members
        of a population whose learners diverged after all others."""
        finished = {number: row["score"] for number, row in self.rows.items() if row["status"] == FINISHED}
        scored = [number for number in ranked(finished) if not math.isnan(finished[number])]
        if self.sweep.population_based:
            scored.sort(key=lambda number: self.rows[number]["diverged"] > 0)
        else:
            first: dict[str, int] = {}
            for number in scored:
                first.setdefault(repr([self.rows[number][name] for name in self.sweep.space.names]), number)
            scored = list(first.values())
        return scored[: self.sweep.winners.trials]

    def add_fresh(self, stage: Stage, table: pd.DataFrame, finals: pd.DataFrame) -> None:
        """Adds what winners reach with fresh seeds at the end of `stage`: scores and returns by trial and seed."""
        diverged = _stage.diverged(self.folder, stage)
        for number in table.trial.unique().tolist():
            row = self.rows[number]
            row.update(summary("fresh_score", table[table.trial == number].score))
            row.update(summary("fresh_return", finals[finals.trial == number].score))
            row["fresh_seeds"], row["fresh_diverged"] = self.sweep.winners.seeds, diverged[number]


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


def summary(name: str, values: pd.Series) -> dict[str, float]:
    """The mean and its 95 % interval (Student's) as columns name, name_low, name_high.

    All are NaN where a value is; the interval also where there is only one.
    """
    mean = float(np.mean(values.to_numpy(float)))
    interval = None if math.isnan(mean) else intervals.mean_interval(values.to_numpy(float))
    low, high = interval if interval is not None else (math.nan, math.nan)
    return {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Trials from best to worst; those without a score last, equal ones by number."""
    missing = {trial: math.isnan(score) for trial, score in scores.items()}
    return sorted(scores, key=lambda trial: (missing[trial], 0.0 if missing[trial] else -scores[trial], trial))


def survivors(scores: Mapping[int, float], keep: float) -> list[int]:
    """The best fraction `keep` of the trials, rounded up, by number."""
    # Rounded first: .55 of 100 is 55.00000000000001 in floats.
    return sorted(ranked(scores)[: math.ceil(round(keep * len(scores), 6))])
