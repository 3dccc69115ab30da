"""Population-based training (Jaderberg et al., 2017): who takes over whose learner, and with which values it goes on.

All of it follows from the scores and the sweep's seed: a population that is resumed has the same lineage.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdqn.config import COMPLEMENTS
from jaxdqn.sweeps.space import Choices, Range, Space, Values
from jaxdqn.sweeps.sweep import PopulationBased


class Generation(NamedTuple):
    """Per member: whose learner it begins with (of the generation before; its own in the first), and its values."""

    parents: tuple[int, ...]
    values: tuple[Values, ...]


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
    changed: dict[str, Any] = {}
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


def _neighbour(domain: Choices, value: Any, random: np.random.Generator) -> Any:
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
