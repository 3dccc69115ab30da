"""The rollout: policy -> environment.step, T times over N environments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Agent, Array, Environment, Key, PyTree, TimeStep, Transition


class ActorState(NamedTuple):
    """One shard's experience stream; N environments on this shard."""

    env_state: PyTree  # [N, ...]
    observation: PyTree  # [N, *O]   what the policy sees next
    carry: PyTree  # [N, ...]   recurrent state, () for feed-forward agents
    episode_return: Array  # [N]       of the episode under way, rewards unscaled
    episode_length: Array  # [N]       environment steps


class EpisodeSums(NamedTuple):
    """Over the episodes that finished: how many, and the sums of their returns and lengths; each []."""

    episodes: Array  # int32
    returns: Array  # float32
    lengths: Array  # int32


def start(environment: Environment, agent: Agent, num_envs: int, key: Key) -> ActorState:
    """N freshly reset environments."""
    env_state, observation = jax.vmap(environment.reset)(jax.random.split(key, num_envs))
    # Two buffers of zeros: donating a state whose leaves alias one another fails.
    zeros = jnp.zeros(num_envs, jnp.float32)
    return ActorState(env_state, observation, agent.initial_carry(num_envs), zeros, jnp.zeros(num_envs, jnp.int32))


def greedily(agent: Agent) -> Agent:
    """`agent`, acting without exploration."""

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        del exploration
        return agent.greedy(params, carry, observation, key)

    return agent._replace(act=act)


def rollout(
    environment: Environment, agent: Agent, params: PyTree, state: ActorState, key: Key, exploration: Array, length: int
) -> tuple[ActorState, Transition, EpisodeSums]:
    """`length` = T steps of all N environments: (state, block [T, N], sums over the finished episodes).

    exploration [N] is each environment's epsilon.
    """

    def step(state: ActorState, keys: Key) -> tuple[ActorState, tuple[Transition, EpisodeSums]]:
        state, transition, sums, _ = one_step(environment, agent, params, state, keys, exploration)
        return state, (transition, sums)

    keys = jax.random.split(key, (length, 1 + exploration.shape[0]))  # one draw for all: each costs microseconds
    state, (block, sums) = jax.lax.scan(step, state, keys, unroll=min(length, 2))
    return state, block, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def one_step(
    environment: Environment, agent: Agent, params: PyTree, state: ActorState, keys: Key, exploration: Array
) -> tuple[ActorState, Transition, EpisodeSums, PyTree]:
    """A step of all N environments, with keys [1 + N]: (state, transition [N], sums, `TimeStep.achieved` [N])."""
    chosen = agent.act(params, state.carry, state.observation, keys[0], exploration)
    env_state, timestep = jax.vmap(environment.step)(keys[1:], state.env_state, chosen[0])
    initial = agent.initial_carry(exploration.shape[0])
    return *followed(state, chosen, env_state, timestep, initial), timestep.achieved


def followed(
    state: ActorState, chosen: tuple[Array, PyTree, PyTree], env_state: PyTree, timestep: TimeStep, initial: PyTree
) -> tuple[ActorState, Transition, EpisodeSums]:
    """What follows on `state` where the agent chose (action [N], carry, extras), and the environments went on to
    `env_state` and returned `timestep` [N]: (state, transition [N], sums). `initial` [N] is the carry at a start."""
    (action, carry, extras), end = chosen, timestep.episode_end
    transition = Transition(
        state.observation,
        action,
        timestep.reward,
        timestep.discount,
        timestep.final_observation,
        end,
        extras,
    )
    episode_return = state.episode_return + timestep.reward
    episode_length = state.episode_length + 1
    sums = EpisodeSums(
        jnp.sum(end, dtype=jnp.int32),
        jnp.sum(jnp.where(end, episode_return, 0.0)),
        jnp.sum(jnp.where(end, episode_length, 0), dtype=jnp.int32),
    )
    next_state = ActorState(
        env_state,
        timestep.observation,
        reset_where(end, initial, carry),
        jnp.where(end, 0.0, episode_return),
        jnp.where(end, 0, episode_length),
    )
    return next_state, transition, sums


def reset_where(end: Array, initial: PyTree, carry: PyTree) -> PyTree:
    """`initial` for the environments where `end` [N], else `carry`; both [N, ...]."""
    return jax.tree.map(lambda i, c: jnp.where(end.reshape(-1, *(1,) * (c.ndim - 1)), i, c), initial, carry)
