"""A search in rounds of trials: groups, each a population, stage by stage; after each rung the best go on (successive
halving); the best trials then once more with fresh seeds."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.sweeps import samplers
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.record import FINAL, FINISHED, TUNING, Record, per_seed, summary, survivors
from jaxdqn.sweeps.stage import Origin, Stage
from jaxdqn.sweeps.sweep import Group, Sweep, Trial, columns, grouped
from jaxdqn.timeline import timeline


class Progress(NamedTuple):
    """How far the trials of a group are: those `alive` at the end of the last stage, and all stages so far."""

    group: Group
    alive: tuple[Trial, ...]
    stages: tuple[Stage, ...] = ()


class RoundSearch:
    """Round after round, each of trials that the sampler chooses knowing the `history`."""

    def __init__(self, record: Record):
        self.record, self.sweep, self.rows = record, record.sweep, record.rows
        self.history: list[samplers.Scored] = []

    def execute(self) -> None:
        """Trains what is left. Raises `Stopped`, and `UserError`."""
        self._store()  # a storage that cannot be opened is an error of now
        for index in itertools.count():
            values = samplers.next_round(self.sweep.space, self.sweep.sampler, index, self.history)
            if not values:
                break
            trials = [Trial(len(self.rows) + i, value) for i, value in enumerate(values)]
            self._round(index, trials)
            # Scores after the first rung, which all trials have.
            self.history += [(trial.values, self.rows[trial.number]["first_score"]) for trial in trials]
            self._store()
        self._train_winners([Trial(number, self.history[number][0]) for number in self.record.best()])

    def _round(self, index: int, trials: Sequence[Trial]) -> None:
        alive = begin(self.sweep, trials)
        numbers = {trial.number: group for group, progress in enumerate(alive) for trial in progress.alive}
        for trial in trials:
            place = {"round": index, "group": numbers[trial.number], "rung": 0, "status": "training"}
            self.rows[trial.number] = {"trial": trial.number, **place, **columns(self.sweep, trial.values)}
        prefixes = [f"round-{index:02d}-group-{group:02d}" for group in range(len(alive))]
        last = len(self.sweep.halving.rungs) if self.sweep.halving else 0
        for rung in range(last + 1):
            alive = self._train(alive, prefixes, TUNING, self.sweep.seeds.all)
            for progress in alive:
                self._score(progress, rung)
            if rung < last:
                alive = self._halved(alive, rung)
                self.record.write()
        for progress in alive:
            for trial in progress.alive:
                self.rows[trial.number]["status"] = FINISHED
        self.record.write()

    def _halved(self, groups: Sequence[Progress], rung: int) -> list[Progress]:
        """The groups with only those trials that go on, ranked over all groups."""
        assert self.sweep.halving is not None
        ranked = {trial.number: self.rows[trial.number]["score"] for group in groups for trial in group.alive}
        kept = set(survivors(ranked, self.sweep.halving.keep))
        for number in ranked.keys() - kept:
            self.rows[number]["status"] = f"dropped after rung {rung}"
        return [
            progress._replace(alive=tuple(trial for trial in progress.alive if trial.number in kept))
            for progress in groups
        ]

    def _train(
        self, groups: Sequence[Progress], prefixes: Sequence[str], kind: str, seeds: tuple[int, ...]
    ) -> list[Progress]:
        """The groups that have trials alive, one stage further."""
        stages = {
            index: next_stage(self.sweep, progress, prefixes[index], kind, seeds)
            for index, progress in enumerate(groups)
            if progress.alive
        }
        self.record.train(list(stages.values()))
        return [
            progress._replace(stages=(*progress.stages, stages[index])) if index in stages else progress
            for index, progress in enumerate(groups)
        ]

    def _score(self, progress: Progress, rung: int) -> None:
        if not progress.alive:
            return
        frame, steps = self._metrics(progress)
        table, finals = self._scores(frame, steps)
        diverged = _stage.diverged(self.record.folder, progress.stages[-1])
        for trial in progress.alive:
            row = self.rows[trial.number]
            row["rung"], row["env_steps"], row["seeds"] = rung, steps[trial.number], self.sweep.seeds.number
            row.update(summary("score", table[table.trial == trial.number].score))
            row["final_return"] = summary("final", finals[finals.trial == trial.number].score)["final"]
            row.setdefault("first_score", row["score"])
            row["diverged"] = diverged[trial.number]
            row["seconds"] = float(frame[frame.trial == trial.number].seconds.max())

    def _metrics(self, progress: Progress) -> tuple[pd.DataFrame, dict[int, int]]:
        """The metrics of the trials alive, of all stages; and the environment steps each has taken."""
        frame = _stage.metrics_of(self.record.folder, progress.stages)
        line = timeline(progress.stages[-1].config)
        steps = line.total * line.steps_per_iteration
        numbers = [trial.number for trial in progress.alive]
        return frame[frame.trial.isin(numbers)], dict.fromkeys(numbers, steps)

    def _scores(self, frame: pd.DataFrame, steps: dict[int, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """By trial and seed: the sweep's objective, and the returns at the end."""
        return per_seed(frame, self.sweep.objective, steps), per_seed(frame, "final", steps)

    def _train_winners(self, best: Sequence[Trial]) -> None:
        """The best trials again, with seeds that tuning has not seen: what is reported."""
        if not best:
            return
        groups = begin(self.sweep, best)
        prefixes = [f"winners-group-{index:02d}" for index in range(len(groups))]
        for progress in self._train(groups, prefixes, FINAL, self.sweep.fresh_seeds):
            self.record.add_fresh(progress.stages[-1], *self._scores(*self._metrics(progress)))

    def _store(self) -> None:
        """Writes the trials so far for Optuna's own tools, where the sweep asks for it."""
        sampler = self.sweep.sampler
        if sampler.storage is not None:
            folder = self.record.folder
            samplers.store(self.sweep.space, sampler, folder.name, self.history, str(folder))


def ends_of(sweep: Sweep, config: Config) -> tuple[int, ...]:
    """The environment steps at which a group's stages end. Raises `UserError` for rungs that fall together."""
    rungs = sweep.halving.rungs if sweep.halving else ()
    ends = _stage.ends(config, rungs)
    if len(ends) <= len(rungs):
        raise UserError(
            f"halving.rungs {list(rungs)} of {config.total_steps:,} steps fall together, or before learning starts: "
            f"rungs lie on evaluations, every {config.resolved().eval_interval:,} steps. Lower config.eval_interval or "
            "config.learning_starts, or take other rungs."
        )
    return ends


def begin(sweep: Sweep, trials: Sequence[Trial]) -> list[Progress]:
    """The groups of a round, nothing trained yet. Raises `UserError`."""
    return [Progress(group, group.trials) for group in grouped(sweep, trials)]


def next_stage(sweep: Sweep, progress: Progress, prefix: str, kind: str, seeds: tuple[int, ...]) -> Stage:
    """The stage that takes the alive trials of a group on to its next end."""
    index = len(progress.stages)
    name = f"{prefix}-rung-{index}" if sweep.halving and kind == TUNING else prefix
    ends = ends_of(sweep, progress.group.config) if kind == TUNING else (progress.group.config.total_steps,)
    labels = tuple(
        {"trial": trial.number, "stage": name, "kind": kind, **columns(sweep, trial.values)}
        for trial in progress.alive
        for _ in seeds
    )
    return Stage(
        name,
        _stage.until(progress.group.config, ends[index]),
        sweep.hparams_of(progress.group.config),
        tuple(sweep.setting_of(trial.values) for trial in progress.alive),
        seeds,
        labels,
        _origin(progress),
        exact=bool(sweep.halving and sweep.halving.exact),
    )


def _origin(progress: Progress) -> Origin | None:
    if not progress.stages:
        return None
    before = progress.stages[-1]
    alive = {trial.number for trial in progress.alive}
    members = tuple(place for place, label in enumerate(before.labels) if label["trial"] in alive)
    return Origin(before.name, members, members)
