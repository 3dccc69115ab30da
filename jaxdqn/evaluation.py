"""Greedy episodes on environments of their own. Every seed, evaluation and shard has its own start states and dice."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn import acting, exploration, fingerprints, masks
from jaxdqn.acting import ActorState
from jaxdqn.base import Agent, Array, Environment, Key, PyTree, Spec, Transition

EVALUATION_SEED = 20_150_226


class Episodes(NamedTuple):
    """Undiscounted, unscaled return and length in environment steps of each episode; [E]. An episode that was still
    running at the bound counts with what it had reached; `finished` says which ended. Episodes with the same
    observations and rewards have the same `fingerprints`. `achieved` has for each of `Spec.achievements` whether it was
    done."""

    returns: Array
    lengths: Array
    finished: Array
    fingerprints: Array
    achieved: Mapping[str, Array]


def episode_key(seed: Array | int, iteration: Array | int, part: Array | int, shard: Array | int = 0) -> Key:
    """The key of one evaluation of a member with this seed [], after `iteration` [] and by one shard [] of it.

    part [] is 0 on the curve, and counts from 1 in the evaluation at the end, which has more episodes than one call.
    """
    key = jax.random.key(EVALUATION_SEED)
    for number in (seed, iteration, part, shard):
        key = jax.random.fold_in(key, number)
    return key


def sometimes_random(agent: Agent, num_actions: int, epsilon: float) -> Agent:
    """`agent`, whose greedy action is replaced by a uniformly random one with probability `epsilon`."""

    def greedy(params: PyTree, carry: PyTree, observation: PyTree, key: Key) -> tuple[Array, PyTree, PyTree]:
        own_key, random_key = jax.random.split(key)
        action, carry, extras = agent.greedy(params, carry, observation, own_key)
        legal = masks.legal_of(observation)
        action = exploration.epsilon_random(random_key, action, num_actions, jnp.float32(epsilon), legal)
        return action, carry, extras

    return agent._replace(greedy=greedy)


def none_yet(num_episodes: int, spec: Spec) -> Episodes:
    """Episodes of which nothing is played."""
    returns, lengths, finished, seen = (
        jnp.zeros(num_episodes, kind) for kind in (jnp.float32, jnp.int32, jnp.bool_, jnp.uint32)
    )
    return Episodes(returns, lengths, finished, seen, {name: jnp.zeros_like(finished) for name in spec.achievements})


def extended(episodes: Episodes, row: Transition, achieved: PyTree) -> Episodes:
    """`episodes` [E] with a transition [E] of each more, where they still run, and with `TimeStep.achieved` [E]."""
    alive = ~episodes.finished
    seen = fingerprints.extend(episodes.fingerprints, row.observation, row.reward)
    done = jax.tree.map(lambda now, before: jnp.where(alive, now, before), dict(achieved), episodes.achieved)
    return Episodes(
        episodes.returns + jnp.where(alive, row.reward, 0.0),
        episodes.lengths + alive,
        episodes.finished | row.episode_end,
        jnp.where(alive, seen, episodes.fingerprints),
        done,
    )


def evaluate(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    key: Key,
    num_episodes: int,
    max_steps: int,
    epsilon: float = 0.0,
) -> Episodes:
    """One episode in each of `num_episodes` environments, at most `max_steps` steps long: greedy, but for a random
    action with probability `epsilon`."""
    if epsilon > 0:
        agent = sometimes_random(agent, environment.spec.num_actions, epsilon)
    agent, zeros = acting.greedily(agent), jnp.zeros(num_episodes)
    start_key, step_key = jax.random.split(key)

    def running(carry: tuple[ActorState, Episodes, Array]) -> Array:
        _, episodes, step = carry
        return (step < max_steps) & ~jnp.all(episodes.finished)

    def body(carry: tuple[ActorState, Episodes, Array]) -> tuple[ActorState, Episodes, Array]:
        actor, episodes, step = carry
        key = jax.random.fold_in(step_key, step)
        (keys,) = jax.random.split(key, (1, 1 + num_episodes))  # those of a rollout
        actor, row, _, achieved = acting.one_step(environment, agent, params, actor, keys, zeros)
        return actor, extended(episodes, row, achieved), step + 1

    actor = acting.start(environment, agent, num_episodes, start_key)
    return jax.lax.while_loop(running, body, (actor, none_yet(num_episodes, environment.spec), jnp.int32(0)))[1]
