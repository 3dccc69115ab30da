"""Greedy episodes on environments of their own, with fixed keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn import acting
from jaxdqn.acting import ActorState
from jaxdqn.base import Agent, Array, Environment, Key, PyTree


class Episodes(NamedTuple):
    """Undiscounted, unscaled return and length in environment steps of each episode; [E]. An episode that was still
    running at the bound counts with what it had reached; `finished` says which ended."""

    returns: Array
    lengths: Array
    finished: Array


def evaluate(
    environment: Environment, agent: Agent, params: PyTree, key: Key, num_episodes: int, max_steps: int
) -> Episodes:
    """One greedy episode in each of `num_episodes` environments, at most `max_steps` steps long."""
    agent, zeros = acting.greedily(agent), jnp.zeros(num_episodes)
    start_key, step_key = jax.random.split(key)

    def running(carry: tuple[ActorState, Episodes, Array]) -> Array:
        _, episodes, step = carry
        return (step < max_steps) & ~jnp.all(episodes.finished)

    def body(carry: tuple[ActorState, Episodes, Array]) -> tuple[ActorState, Episodes, Array]:
        actor, episodes, step = carry
        key = jax.random.fold_in(step_key, step)
        actor, block, _ = acting.rollout(environment, agent, params, actor, key, zeros, length=1)
        alive = ~episodes.finished
        episodes = Episodes(
            episodes.returns + jnp.where(alive, block.reward[0], 0.0),
            episodes.lengths + alive,
            episodes.finished | block.episode_end[0],
        )
        return actor, episodes, step + 1

    actor = acting.start(environment, agent, num_episodes, start_key)
    none = Episodes(zeros, jnp.zeros(num_episodes, jnp.int32), jnp.zeros(num_episodes, jnp.bool_))
    return jax.lax.while_loop(running, body, (actor, none, jnp.int32(0)))[1]
