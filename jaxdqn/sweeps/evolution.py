"""Population-based training (Jaderberg et al., 2017): who takes over whose learner, and with which values it goes on.

All of it follows from the scores and the sweep's seed: a population that is resumed has the same lineage.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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
    generation: Generation, scores: Sequence[float], space: Space, settings: PopulationBased, seed: Sequence[int]
) -> Generation:
    """The next generation: the worst take over learner and values of members among the best, and change each value.

    A score that is NaN is the worst of all. `seed` is that of the sweep and the number of the generation.
    """
    random = np.random.default_rng(list(seed))
    count = max(1, int(round(settings.quantile * len(scores), 6))) if len(scores) > 1 else 0
    order = sorted(
        range(len(scores)), key=lambda m: (math.isnan(scores[m]), -scores[m] if scores[m] == scores[m] else 0, m)
    )
    best, worst = order[:count], order[len(order) - count :]
    parents, values = list(range(len(scores))), list(generation.values)
    for member in sorted(worst):
        parent = best[int(random.integers(len(best)))]
        parents[member] = parent
        values[member] = explored(generation.values[parent], space, settings.factors, random)
    return Generation(tuple(parents), tuple(values))


def explored(values: Values, space: Space, factors: Sequence[float], random: np.random.Generator) -> Values:
    """Each value times one of `factors`, within its range; a choice moves to a neighbour, or stays.

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
            changed[name] = _scaled(domain, values[name] * factors[int(random.integers(len(factors)))])
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


def _scaled(domain: Range, value: float) -> float:
    inside = min(max(value, domain.low), domain.high)
    return float(round(inside)) if domain.integer else inside
