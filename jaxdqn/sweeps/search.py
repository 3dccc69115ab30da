"""A whole sweep: rounds of trials or a population that evolves, and the winners once more with fresh seeds.

Everything is computed from the sweep and from what its stages left in their directories; finished stages are passed
over, so that starting again is resuming.
"""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxdqn.analysis import intervals
from jaxdqn.config import timeline
from jaxdqn.sweeps import directory, evolution, rounds, samplers, scores
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.engines import Engine, Run
from jaxdqn.sweeps.rounds import FINAL, TUNING, Progress
from jaxdqn.sweeps.stage import Origin, Stage
from jaxdqn.sweeps.sweep import Sweep
from jaxdqn.sweeps.trials import Trial, columns

FINISHED = "finished"


class Search:
    """One sweep in a directory, its stages trained by an engine."""

    def __init__(self, sweep: Sweep, folder: pathlib.Path, engine: Engine, run: Run):
        self.sweep, self.folder, self.engine, self.run = sweep, folder, engine, run
        self.rows: dict[int, dict[str, Any]] = {}
        self.history: list[samplers.Scored] = []

    def execute(self) -> pd.DataFrame:
        """Trains what is left; the table of trials. Raises `Stopped`, and `UserError`."""
        if self.sweep.population_based is not None:
            self._evolve()
        else:
            self._rounds()
        return self._write()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _rounds(self) -> None:
        self._record()  # a storage that cannot be opened is an error of now
        for index in itertools.count():
            values = samplers.next_round(self.sweep.space, self.sweep.sampler, index, self.history)
            if not values:
                break
            trials = [Trial(len(self.rows) + i, value) for i, value in enumerate(values)]
            self._round(index, trials)
            # Scores after the first rung, which all trials have.
            self.history += [(trial.values, self.rows[trial.number]["first_score"]) for trial in trials]
            self._record()
        best = [Trial(number, self.history[number][0]) for number in self._best()]
        self._train_winners(best)

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
            if rung == last:
                break
            kept = rounds.survivors_of(
                self.sweep, {t.number: self.rows[t.number]["score"] for p in alive for t in p.alive}
            )
            for trial in [trial for progress in alive for trial in progress.alive if trial.number not in kept]:
                self.rows[trial.number]["status"] = f"dropped after rung {rung}"
            alive = [rounds.without(progress, kept) for progress in alive]
            self._write()
        for progress in alive:
            for trial in progress.alive:
                self.rows[trial.number]["status"] = FINISHED
        self._write()

    def _train(
        self, groups: Sequence[Progress], prefixes: Sequence[str], kind: str, seeds: tuple[int, ...]
    ) -> list[Progress]:
        """The groups that have trials alive, one stage further."""
        stages = {
            index: rounds.next_stage(self.sweep, progress, prefixes[index], kind, seeds)
            for index, progress in enumerate(groups)
            if progress.alive
        }
        self._run(list(stages.values()))
        return [
            progress._replace(stages=(*progress.stages, stages[index])) if index in stages else progress
            for index, progress in enumerate(groups)
        ]

    def _run(self, stages: Sequence[Stage]) -> None:
        self.engine(stages, self.run)
        directory.add_metrics(self.folder, stages)
        for stage in stages:
            if stage.continues is not None:
                _stage.prune(self.folder, stage.continues.stage)

    def _score(self, progress: Progress, rung: int) -> None:
        if not progress.alive:
            return
        frame, steps = self._measured(progress)
        table = scores.per_seed(frame, self.sweep.objective, dict.fromkeys(steps, steps[progress.alive[0].number]))
        finals = scores.per_seed(frame, "final", steps)
        for trial in progress.alive:
            row = self.rows[trial.number]
            row["rung"], row["env_steps"], row["seeds"] = rung, steps[trial.number], len(self.sweep.seeds.all)
            row.update(_summary("score", table[table.trial == trial.number].score))
            row["final_return"] = _summary("final", finals[finals.trial == trial.number].score)["final"]
            row.setdefault("first_score", row["score"])
            row["seconds"] = float(frame[frame.trial == trial.number].seconds.max())

    def _measured(self, progress: Progress) -> tuple[pd.DataFrame, dict[int, int]]:
        """The metrics of the trials alive, of all stages; and the environment steps each has taken."""
        frame = _stage.metrics_of(self.folder, progress.stages)
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
        for progress in self._train(groups, prefixes, FINAL, self._fresh_seeds()):
            frame, steps = self._measured(progress)
            self._write_fresh(
                scores.per_seed(frame, self.sweep.objective, steps), scores.per_seed(frame, "final", steps)
            )

    def _write_fresh(self, table: pd.DataFrame, finals: pd.DataFrame) -> None:
        for number in table.trial.unique().tolist():
            row = self.rows[number]
            row.update(_summary("fresh_score", table[table.trial == number].score))
            row.update(_summary("fresh_return", finals[finals.trial == number].score))
            row["fresh_seeds"] = len(self._fresh_seeds())

    def _fresh_seeds(self) -> tuple[int, ...]:
        winners = self.sweep.winners
        return tuple(range(winners.first_seed, winners.first_seed + winners.seeds))

    def _best(self) -> list[int]:
        finished = {number: row["score"] for number, row in self.rows.items() if row["status"] == FINISHED}
        scored = [number for number in scores.ranked(finished) if not math.isnan(finished[number])]
        return scored[: self.sweep.winners.trials]

    def _record(self) -> None:
        sampler = self.sweep.sampler
        if sampler.storage is not None:
            from jaxdqn.sweeps import optuna_sampler

            optuna_sampler.record(self.sweep.space, sampler, self.folder.name, self.history, str(self.folder))

    def _write(self) -> pd.DataFrame:
        return directory.write_table(self.folder, "trials", [self.rows[number] for number in sorted(self.rows)])

    # -- a population that evolves ------------------------------------------------------------------------------------

    def _evolve(self) -> None:
        sweep, settings = self.sweep, self.sweep.population_based
        assert settings is not None
        seeds = sweep.seeds.all
        first = [values for values in samplers.once(sweep.space, sweep.sampler) for _ in seeds]
        generations = [evolution.first(first)]
        lineage: list[dict[str, Any]] = []
        ends = generation_ends(sweep)
        members = range(len(first))
        for index, end in enumerate(ends):
            generation = generations[-1]
            own = [seeds[member % len(seeds)] for member in members]
            stage = self._generation(f"generation-{index:03d}", end, generation, own, TUNING, index, list(members))
            self._run([stage])
            found = self._late_returns(stage)
            for member in members:
                known = {"generation": index, "member": member, "parent": generation.parents[member]}
                values = columns(sweep, generation.values[member])
                lineage.append({**known, "seed": own[member], "env_steps": end, "score": found[member], **values})
            directory.write_table(self.folder, "lineage", lineage)
            if end != ends[-1]:
                seed = (sweep.sampler.seed, index)
                scored = [found[member] for member in members]
                generations.append(evolution.following(generation, scored, sweep.space, settings, seed))
        for row in lineage[-len(first) :]:
            kept = {name: value for name, value in row.items() if name not in ("generation", "member", "parent")}
            self.rows[row["member"]] = {"trial": row["member"], "status": FINISHED, **kept}
        self._write()
        self._replay_winners(generations, ends)

    def _generation(
        self,
        name: str,
        end: int,
        generation: evolution.Generation,
        own_seeds: Sequence[int],
        kind: str,
        index: int,
        trials: Sequence[int],
    ) -> Stage:
        """One interval of a population, each member with its own seed and values."""
        sweep = self.sweep
        labels = tuple(
            {"trial": trial, "seed": seed, "stage": name, "kind": kind, **columns(sweep, values)}
            for trial, seed, values in zip(trials, own_seeds, generation.values, strict=True)
        )
        settings = [sweep.setting_of(values) for values in generation.values]
        seeds: tuple[int, ...] = tuple(dict.fromkeys(own_seeds))
        origin = None
        if index == 0:
            settings = settings[:: len(seeds)]  # every setting with every seed
        else:
            seeds = seeds[:1]  # keys come with the states
            before = name.rpartition("-")[0] + f"-{index - 1:03d}"
            origin = Origin(before, tuple(range(len(labels))), generation.parents)
        return Stage(name, _stage.until(sweep.config, end), sweep.hparams, tuple(settings), seeds, labels, origin)

    def _late_returns(self, stage: Stage) -> dict[int, float]:
        """Each member's mean greedy return in a stage; NaN where none was measured."""
        frame = _stage.metrics_of(self.folder, [stage])
        table = frame.groupby("trial").eval_return.mean()
        return dict(zip(table.index.tolist(), table.tolist(), strict=True))

    def _replay_winners(self, generations: Sequence[evolution.Generation], ends: Sequence[int]) -> None:
        """The best members' schedules of values with fresh seeds, each from the beginning."""
        best, fresh = self._best(), self._fresh_seeds()
        if not best:
            return
        schedules = [evolution.lineage(generations, member) for member in best]
        own, trials = list(fresh) * len(best), [member for member in best for _ in fresh]
        everyone = tuple(range(len(trials)))
        for index, end in enumerate(ends):
            values = tuple(schedule[index] for schedule in schedules for _ in fresh)
            generation = evolution.Generation(everyone, values)
            stage = self._generation(f"winners-{index:03d}", end, generation, own, FINAL, index, trials)
            self._run([stage])
        frame = _stage.metrics_of(self.folder, [stage])
        table = frame.groupby(["trial", "seed"]).eval_return.mean().rename("score").reset_index()
        self._write_fresh(table, table)


def generation_ends(sweep: Sweep) -> tuple[int, ...]:
    """The environment steps at which the generations of a population end."""
    assert sweep.population_based is not None
    interval = sweep.population_based.interval
    return _stage.ends(sweep.config, [interval * k for k in range(1, math.ceil(1 / interval))])


def _summary(name: str, values: pd.Series) -> dict[str, Any]:
    """The mean, NaN where a value is, and its 95 % bootstrap interval, None for one value."""
    mean = float(np.mean(values.to_numpy(float)))
    interval = None if math.isnan(mean) else intervals.bootstrap_ci(values.to_numpy(float))
    low, high = interval if interval is not None else (math.nan, math.nan)
    return {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}
