"""Population-based training (Jaderberg et al., 2017): a population that evolves, generation by generation; the
schedules of its best members then with fresh seeds.

Who takes over whose learner, and with which values it goes on, follows from the scores and the sweep's seed: a
population that is resumed has the same lineage.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxdqn.config import COMPLEMENTS
from jaxdqn.sweeps import directory, samplers
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.record import FINAL, FINISHED, TUNING, Record
from jaxdqn.sweeps.space import Choices, Range, Space, Values
from jaxdqn.sweeps.stage import Origin, Stage
from jaxdqn.sweeps.sweep import PopulationBased, Sweep, columns


class Generation(NamedTuple):
    """Per member: whose learner it begins with (of the generation before; its own in the first), and its values."""

    parents: tuple[int, ...]
    values: tuple[Values, ...]


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
    settings_of_trials = samplers.points(sweep.space, sweep.sampler)
    values = [each for each in settings_of_trials for _ in sweep.seeds.all]
    members = tuple(range(len(values)))
    population = Population("generation", TUNING, members, sweep.seeds.all * len(settings_of_trials))
    generations, ends = [first(values)], generation_ends(sweep)
    history: list[Values] = []
    for index, end in enumerate(ends):
        stage = _stage_of(sweep, population, generations[-1], index, end)
        record.train([stage])
        scores = _mean_returns(record, stage)
        history += _lineage_rows(sweep, population, generations[-1], index, end, scores)
        directory.write_table(record.folder, "lineage", history)
        if end != ends[-1]:
            seed = (sweep.sampler.seed, index)
            scored = [scores[member] for member in members]
            frozen = [member for member, lost in _stage.diverged(record.folder, stage).items() if lost]
            generations.append(following(generations[-1], scored, sweep.space, settings, seed, frozen))
    diverged = _stage.diverged(record.folder, stage)
    for row in history[-len(members) :]:
        member = row["member"]
        kept = {name: value for name, value in row.items() if name not in ("generation", "member", "parent")}
        record.rows[member] = {"trial": member, "status": FINISHED, **kept, "diverged": diverged[member]}
    record.write()
    _replay_winners(record, generations, ends)


def generation_ends(sweep: Sweep) -> tuple[int, ...]:
    """The environment steps at which the generations of a population end."""
    assert sweep.population_based is not None
    interval = sweep.population_based.interval
    return _stage.ends(sweep.config, [interval * k for k in range(1, math.ceil(1 / interval))])


def first(values: Sequence[Values]) -> Generation:
    """The first generation: everybody's own."""
    return Generation(tuple(range(len(values))), tuple(values))


def following(
    generation: Generation,
    scores: Sequence[float],
    space: Space,
    settings: PopulationBased,
    seed: Sequence[int],
    frozen: Collection[int] = (),
) -> Generation:
    """The next generation: the worst take over learner and values of members among the best, and change each value.

    `frozen` members, whose learners diverged, are behind all others, and nobody takes over from them; before them come
    scores that are NaN. `seed` is that of the sweep and the number of the generation.
    """
    random = np.random.default_rng(list(seed))
    count = max(1, int(round(settings.quantile * len(scores), 6))) if len(scores) > 1 else 0

    def rank(member: int) -> tuple[bool, bool, float, int]:
        missing = math.isnan(scores[member])
        return member in frozen, missing, 0.0 if missing else -scores[member], member

    order = sorted(range(len(scores)), key=rank)
    best = [member for member in order[:count] if member not in frozen]
    worst = order[len(order) - count :] if best else []
    parents, values = list(range(len(scores))), list(generation.values)
    for member in sorted(worst):
        parent = best[int(random.integers(len(best)))]
        parents[member] = parent
        values[member] = explored(generation.values[parent], space, settings.factors, random)
    return Generation(tuple(parents), tuple(values))


def explored(values: Values, space: Space, factors: Sequence[float], random: np.random.Generator) -> Values:
    """Each value times one of `factors` (of gamma its distance from 1), within its range; a choice moves to a
    neighbour, or stays.

    Where a choice that has moved makes a condition hold, the value under it is drawn anew.
    """
    changed: dict[str, object] = {}
    for parameter in space.parameters:
        name, domain = parameter.name, parameter.domain
        if name not in values:
            changed[name] = domain.at(random.random())
        elif isinstance(domain, Choices):
            changed[name] = _neighbour(domain, values[name], random)
        else:
            changed[name] = _moved(name, domain, values[name], factors[int(random.integers(len(factors)))])
    return space.active(changed)


def lineage(generations: Sequence[Generation], member: int) -> list[Values]:
    """The values with which the learner of `member` in the last generation was trained, generation by generation."""
    schedule = []
    for generation in reversed(generations):
        schedule.append(generation.values[member])
        member = generation.parents[member]
    return schedule[::-1]


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
    return Stage(name, _stage.until(sweep.config, end), sweep.hparams_of(sweep.config), settings, seeds, labels, origin)


def _lineage_rows(
    sweep: Sweep, population: Population, generation: Generation, index: int, end: int, scores: dict[int, float]
) -> list[Values]:
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
    schedules = [lineage(generations, member) for member in best]
    trials = tuple(member for member in best for _ in fresh)
    population = Population("winners", FINAL, trials, fresh * len(best))
    for index, end in enumerate(ends):
        values = tuple(schedule[index] for schedule in schedules for _ in fresh)
        stage = _stage_of(record.sweep, population, first(values), index, end)
        record.train([stage])
    frame = _stage.metrics_of(record.folder, [stage])
    table = frame.groupby(["trial", "seed"]).eval_return.mean().rename("score").reset_index()
    record.add_fresh(stage, table, table)


def _neighbour(domain: Choices, value: object, random: np.random.Generator) -> object:
    place = domain.values.index(value) + int(random.integers(-1, 2))
    return domain.values[min(max(place, 0), len(domain.values) - 1)]


def _moved(name: str, domain: Range, value: float, factor: float) -> float:
    """`value` times `factor`, or the other way where that leaves the range: cut off at its ends, values would gather
    there. In a range that is narrower than both steps it is cut off."""
    ahead, back = (_scaled(name, domain, value, step) for step in (factor, 1 / factor))
    for moved in (ahead, back):
        if domain.low <= moved <= domain.high:
            return moved
    return min(max(ahead, domain.low), domain.high)


def _scaled(name: str, domain: Range, value: float, factor: float) -> float:
    scaled = 1 - (1 - value) * factor if name in COMPLEMENTS else value * factor
    if not domain.integer:
        return scaled
    # A small whole number would be rounded back to itself.
    return float(value + math.copysign(1, factor - 1)) if round(scaled) == value != scaled else float(round(scaled))
