"""Where trials come from. A round's trials depend on the sweep and on the scores of earlier rounds alone, so that a
sweep that is resumed asks for the same ones."""

import warnings
from collections.abc import Sequence

import numpy as np

from jaxdqn.sweeps.space import Space, Values
from jaxdqn.sweeps.sweep import Sampler

Scored = tuple[Values, float]


def next_round(space: Space, sampler: Sampler, index: int, history: Sequence[Scored]) -> list[Values]:
    """The trials of round `index`, after those of `history`; none where the sweep is at its end.

    Raises `UserError` where Optuna is needed and missing, and for a grid of ranges without points.
    """
    if sampler.adaptive:
        from jaxdqn.sweeps import optuna_sampler

        assert sampler.trials is not None
        count = min(sampler.batch, sampler.trials - index * sampler.batch)
        return optuna_sampler.ask(space, sampler, index, history, count) if count > 0 else []
    return once(space, sampler) if index == 0 else []


def once(space: Space, sampler: Sampler) -> list[Values]:
    """All trials of a sampler that does not learn from scores."""
    if sampler.name == "grid":
        return space.grid()
    assert sampler.trials is not None
    points = _SEQUENCES[sampler.name](len(space.parameters), sampler.trials, sampler.seed)
    return [space.at(point) for point in points.tolist()]


def uniform(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Independent points of the unit cube, [count, dimensions]."""
    return np.random.default_rng(seed).random((count, dimensions))


def sobol(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Points of a scrambled Sobol sequence, [count, dimensions]; they are even where `count` is a power of two."""
    from scipy.stats import qmc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that count is no power of two: the plan says so
        return np.asarray(qmc.Sobol(dimensions, scramble=True, rng=seed).random(count))


_SEQUENCES = {"random": uniform, "sobol": sobol}
