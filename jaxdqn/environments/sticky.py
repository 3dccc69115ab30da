"""Sticky actions (Machado et al., 2018, section 5): with some probability the environment repeats the last action."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Environment, Key, PyTree, TimeStep
from jaxdqn.errors import UserError
from jaxdqn.masks import Masked


class StickyState(NamedTuple):
    """The wrapped environment's state, and the action it executed last (0 at an episode's start)."""

    env_state: PyTree
    last_action: Array


def sticky(environment: Environment, probability: float) -> Environment:
    """`environment`, repeating its last executed action with `probability` at each step. Raises `UserError` where that
    may be an illegal one, and for environments on the host."""
    name, observed = environment.spec.name, environment.spec.observation
    if isinstance(observed, Masked):
        raise UserError(f"environment {name!r} cannot have sticky actions: the last action may not be legal any more.")
    if environment.on_host is not None:
        raise UserError(
            f"sticky_actions {probability:g} is for environments in JAX, and {name!r} runs on the host; ALE's have "
            "--env-kwargs.sticky."
        )

    def reset(key: Key) -> tuple[StickyState, Array]:
        env_state, observation = environment.reset(key)
        return StickyState(env_state, jnp.int32(0)), observation

    def step(key: Key, state: StickyState, action: Array) -> tuple[StickyState, TimeStep]:
        key, coin_key = jax.random.split(key)
        repeat = jax.random.bernoulli(coin_key, probability)
        executed = jnp.where(repeat, state.last_action, jnp.asarray(action, jnp.int32))
        env_state, timestep = environment.step(key, state.env_state, executed)
        return StickyState(env_state, jnp.where(timestep.episode_end, 0, executed)), timestep

    return Environment(reset, step, environment.spec)
