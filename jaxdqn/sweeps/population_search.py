"""A population that evolves, generation by generation; the schedules of its best members then with fresh seeds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdqn.sweeps import directory, evolution, samplers
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.evolution import Generation
from jaxdqn.sweeps.record import FINAL, FINISHED, TUNING, Record
from jaxdqn.sweeps.stage import Origin, Stage
from jaxdqn.sweeps.sweep import Sweep, columns


class Population(NamedTuple):
    """Members that train together from the first step to the last: per member its number as a trial, and its seed.

    Each setting of the first generation has the same seeds, in the same order.
    """

    name: str
    kind: str
    trials: tuple[int, ...]
    seeds: tuple[int, ...]


def evolve(record: Record) -> None:
    """Trains what is left of a population-based sweep: every trial with every seed is a member, and then a trial.

    Raises `Stopped`, and `UserError`.
    """
    sweep, settings = record.sweep, record.sweep.population_based
    assert settings is not None
    settings_of_trials = samplers.once(sweep.space, sweep.sampler)
    values = [each for each in settings_of_trials for _ in sweep.seeds.all]
    members = tuple(range(len(values)))
    population = Population("generation", TUNING, members, sweep.seeds.all * len(settings_of_trials))
    generations, ends = [evolution.first(values)], generation_ends(sweep)
    lineage: list[dict[str, Any]] = []
    for index, end in enumerate(ends):
        stage = _stage_of(sweep, population, generations[-1], index, end)
        record.train([stage])
        scores = _mean_returns(record, stage)
        lineage += _lineage_rows(sweep, population, generations[-1], index, end, scores)
        directory.write_table(record.folder, "lineage", lineage)
        if end != ends[-1]:
            seed = (sweep.sampler.seed, index)
            scored = [scores[member] for member in members]
            frozen = [member for member, lost in _stage.diverged(record.folder, stage).items() if lost]
            generations.append(evolution.following(generations[-1], scored, sweep.space, settings, seed, frozen))
    diverged = _stage.diverged(record.folder, stage)
    for row in lineage[-len(members) :]:
        kept = {name: value for name, value in row.items() if name not in ("generation", "member", "parent")}
        record.rows[row["member"]] = {
            "trial": row["member"],
            "status": FINISHED,
            **kept,
            "diverged": diverged[row["member"]],
        }
    record.write()
    _replay_winners(record, generations, ends)


def generation_ends(sweep: Sweep) -> tuple[int, ...]:
    """The environment steps at which the generations of a population end."""
    assert sweep.population_based is not None
    interval = sweep.population_based.interval
    return _stage.ends(sweep.config, [interval * k for k in range(1, math.ceil(1 / interval))])


def _stage_of(sweep: Sweep, population: Population, generation: Generation, index: int, end: int) -> Stage:
    """Generation `index` of a population, until environment step `end`."""
    name = f"{population.name}-{index:03d}"
    labels = tuple(
        {"trial": trial, "seed": seed, "stage": name, "kind": population.kind, **columns(sweep, values)}
        for trial, seed, values in zip(population.trials, population.seeds, generation.values, strict=True)
    )
    settings = tuple(sweep.setting_of(values) for values in generation.values)
    seeds = tuple(dict.fromkeys(population.seeds))
    origin = None
    if index == 0:
        settings = settings[:: len(seeds)]  # every setting with every seed
    else:
        seeds = seeds[:1]  # keys come with the states
        everyone = tuple(range(len(labels)))
        origin = Origin(f"{population.name}-{index - 1:03d}", everyone, generation.parents)
    return Stage(name, _stage.until(sweep.config, end), sweep.hparams, settings, seeds, labels, origin)


def _lineage_rows(
    sweep: Sweep, population: Population, generation: Generation, index: int, end: int, scores: dict[int, float]
) -> list[dict[str, Any]]:
    return [
        {
            "generation": index,
            "member": member,
            "parent": generation.parents[member],
            "seed": population.seeds[member],
            "env_steps": end,
            "score": scores[member],
            **columns(sweep, generation.values[member]),
        }
        for member in population.trials
    ]


def _mean_returns(record: Record, stage: Stage) -> dict[int, float]:
    """Each member's mean greedy return in a stage; NaN where none was measured."""
    table = _stage.metrics_of(record.folder, [stage]).groupby("trial").eval_return.mean()
    return dict(zip(table.index.tolist(), table.tolist(), strict=True))


def _replay_winners(record: Record, generations: Sequence[Generation], ends: Sequence[int]) -> None:
    """The best members' schedules of values with fresh seeds, each from the beginning."""
    best, fresh = record.best(), record.sweep.fresh_seeds
    if not best:
        return
    schedules = [evolution.lineage(generations, member) for member in best]
    trials = tuple(member for member in best for _ in fresh)
    population = Population("winners", FINAL, trials, fresh * len(best))
    for index, end in enumerate(ends):
        values = tuple(schedule[index] for schedule in schedules for _ in fresh)
        stage = _stage_of(record.sweep, population, evolution.first(values), index, end)
        record.train([stage])
    frame = _stage.metrics_of(record.folder, [stage])
    table = frame.groupby(["trial", "seed"]).eval_return.mean().rename("score").reset_index()
    record.add_fresh(stage, table, table)
