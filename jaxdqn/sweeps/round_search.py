"""A search in rounds of trials, with or without halving; the best trials then once more with fresh seeds."""

import itertools
from collections.abc import Sequence

import pandas as pd

from jaxdqn.config import timeline
from jaxdqn.sweeps import rounds, samplers
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.record import FINISHED, Record, per_seed, summary
from jaxdqn.sweeps.rounds import FINAL, TUNING, Progress
from jaxdqn.sweeps.sweep import Trial, columns


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
        alive = rounds.begin(self.sweep, trials)
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
        ranked = {trial.number: self.rows[trial.number]["score"] for group in groups for trial in group.alive}
        kept = rounds.survivors_of(self.sweep, ranked)
        for number in ranked.keys() - set(kept):
            self.rows[number]["status"] = f"dropped after rung {rung}"
        return [rounds.without(progress, kept) for progress in groups]

    def _train(
        self, groups: Sequence[Progress], prefixes: Sequence[str], kind: str, seeds: tuple[int, ...]
    ) -> list[Progress]:
        """The groups that have trials alive, one stage further."""
        stages = {
            index: rounds.next_stage(self.sweep, progress, prefixes[index], kind, seeds)
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
        frame, steps = self._measured(progress)
        table = per_seed(frame, self.sweep.objective, steps)
        finals = per_seed(frame, "final", steps)
        diverged = _stage.diverged(self.record.folder, progress.stages[-1])
        for trial in progress.alive:
            row = self.rows[trial.number]
            row["rung"], row["env_steps"], row["seeds"] = rung, steps[trial.number], len(self.sweep.seeds.all)
            row.update(summary("score", table[table.trial == trial.number].score))
            row["final_return"] = summary("final", finals[finals.trial == trial.number].score)["final"]
            row.setdefault("first_score", row["score"])
            row["diverged"] = diverged[trial.number]
            row["seconds"] = float(frame[frame.trial == trial.number].seconds.max())

    def _measured(self, progress: Progress) -> tuple[pd.DataFrame, dict[int, int]]:
        """The metrics of the trials alive, of all stages; and the environment steps each has taken."""
        frame = _stage.metrics_of(self.record.folder, progress.stages)
        line = timeline(progress.stages[-1].config)
        steps = line.total * line.steps_per_iteration
        numbers = [trial.number for trial in progress.alive]
        return frame[frame.trial.isin(numbers)], dict.fromkeys(numbers, steps)

    def _train_winners(self, best: Sequence[Trial]) -> None:
        """The best trials again, with seeds that tuning has not seen: what is reported."""
        if not best:
            return
        groups = rounds.begin(self.sweep, best)
        prefixes = [f"winners-group-{index:02d}" for index in range(len(groups))]
        for progress in self._train(groups, prefixes, FINAL, self.sweep.fresh_seeds):
            frame, steps = self._measured(progress)
            table = per_seed(frame, self.sweep.objective, steps)
            self.record.add_fresh(progress.stages[-1], table, per_seed(frame, "final", steps))

    def _store(self) -> None:
        """Writes the trials so far for Optuna's own tools, where the sweep asks for it."""
        sampler = self.sweep.sampler
        if sampler.storage is not None:
            folder = self.record.folder
            samplers.store(self.sweep.space, sampler, folder.name, self.history, str(folder))
