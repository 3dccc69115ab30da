"""C51 (Bellemare et al., 2017): the distribution of the return as masses on fixed atoms."""

import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.categorical import CLIPPED, Settings, Support, categorical, logits
from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.base import Agent, Array


def atoms(own: Support, num: int) -> Array:
    """Of the support, its ends included, [K]."""
    return jnp.linspace(own.v_min, own.v_max, num)


def target(r_t: Array, discount_t: Array, p_t: Array, own: Support) -> tuple[Array, Array]:
    """The distribution of r + discount * z, projected on the atoms; equation 7."""
    z = atoms(own, len(p_t))
    moved = r_t + discount_t * z
    return td.categorical_projection(moved, p_t, z), td.mass_outside(moved, p_t, z)


def c51(around: Around) -> Agent:
    """Cross-entropy to the projected distribution of R_m + gamma^m discount Z_target(s_m, a*)."""
    return categorical(around, atoms, target, Support())


C51 = Declaration(c51, head=logits, settings=Settings, hparams=Support, alarms=(CLIPPED,), unused=("loss",))
