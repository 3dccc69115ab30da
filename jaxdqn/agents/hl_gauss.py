"""HL-Gauss: DQN's value, learned as the histogram of a normal distribution around its target.

Imani and White (2018); Farebrother et al. (2024). What it learns is a value, its distribution is a way to.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.categorical import CLIPPED, Settings, Support, categorical, logits
from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.base import Agent, Array
from jaxdqn.config import POSITIVE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper(Support):
    """Of the histogram."""

    sigma: Annotated[float, POSITIVE] = 0.75
    """Standard deviation of the target, in bins of the support: a wider support makes it wider, too."""


def edges(own: Hyper, num: int) -> Array:
    """Of the bins, [K + 1]."""
    return jnp.linspace(own.v_min, own.v_max, num + 1)


def centres(own: Hyper, num: int) -> Array:
    """Of the bins, [K]."""
    ends = edges(own, num)
    return 0.5 * (ends[1:] + ends[:-1])


def target(r_t: Array, discount_t: Array, p_t: Array, own: Hyper) -> tuple[Array, Array]:
    """The histogram of N(r + discount * mean, sigma^2)."""
    support, y = edges(own, len(p_t)), r_t + discount_t * (p_t @ centres(own, len(p_t)))
    masses = td.gaussian_masses(y, own.sigma * (support[1] - support[0]), support)
    return masses, td.mass_outside(y[None], jnp.ones(1), support)


def hl_gauss(around: Around) -> Agent:
    """Cross-entropy to the histogram around y = R_m + gamma^m discount Q_target(s_m, a*)."""
    return categorical(around, centres, target, Hyper())


HL_GAUSS = Declaration(hl_gauss, head=logits, settings=Settings, hparams=Hyper, alarms=(CLIPPED,), unused=("loss",))
