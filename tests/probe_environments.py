"""Tiny environments with known action values, each of which fails for one reason (after rejax and Andy Jones, 2021).

Observations are float32 [1]. Episodes last one step, or two in `discount`. `clock` is for order, not for values.
"""

import jax
import jax.numpy as jnp

from jaxdqn import replay, training
from jaxdqn.base import Array, Environment, Frames, Key, PyTree, Spec, TimeStep
from jaxdqn.components import Components, make_agent
from jaxdqn.config import Config

OBSERVATION = jax.ShapeDtypeStruct((1,), jnp.float32)


def _one_step(name: str, observe, reward) -> Environment:
    """Every step ends its episode: state is the observation, observe(key) draws it, reward(observation, action)."""

    def reset(key: Key) -> tuple[PyTree, Array]:
        observation = observe(key)
        return observation, observation

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        observation = observe(key)
        end = TimeStep(
            observation=observation,
            reward=jnp.asarray(reward(state, action), jnp.float32),
            discount=jnp.float32(0.0),
            final_observation=state,
            episode_end=jnp.bool_(True),
        )
        return observation, end

    return Environment(reset, step, Spec(name, OBSERVATION, 2))


def _constant(key: Key) -> Array:
    del key
    return jnp.ones(1, jnp.float32)


def _sign(key: Key) -> Array:
    return jax.random.rademacher(key, (1,), jnp.float32)


def value() -> Environment:
    """Reward 1. Fails alone: loss or optimizer."""
    return _one_step("value", _constant, lambda observation, action: 1.0)


def observed_value() -> Environment:
    """A random observation of +1 or -1 is the reward. Fails after `value`: the network's input, or mixed-up rows."""
    return _one_step("observed_value", _sign, lambda observation, action: observation[0])


def action() -> Environment:
    """Action 0 gives 1, action 1 gives -1. Fails after `value`: exploration, or the action's index into Q."""
    return _one_step("action", _constant, lambda observation, action: 1.0 - 2.0 * action)


def observed_action() -> Environment:
    """A random observation of +1 or -1; action 0 gives it as reward, action 1 its negative: the two above together."""
    return _one_step("observed_action", _sign, lambda observation, action: observation[0] * (1.0 - 2.0 * action))


def discount() -> Environment:
    """Observation 0, then 1, and reward 1 at the end only. Fails after `observed_value`: discounting, bootstrapping."""

    def reset(key: Key) -> tuple[PyTree, Array]:
        del key
        return jnp.float32(0.0), jnp.zeros(1, jnp.float32)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        del key, action
        second = state == 1.0
        timestep = TimeStep(
            observation=jnp.where(second, 0.0, 1.0)[None],
            reward=state,
            discount=1.0 - state,
            final_observation=jnp.ones(1, jnp.float32),
            episode_end=second,
        )
        return 1.0 - state, timestep

    return Environment(reset, step, Spec("discount", OBSERVATION, 2))


def time_limit(steps: int = 1) -> Environment:
    """Observation 0 (reward 0) leads to 1, which stays 1 (reward 1) for ever; a time limit cuts it into episodes of so
    many steps that start at either. Values are gamma / (1 - gamma) and 1 / (1 - gamma). Fails alone: a limit that is
    learned as an end, or the next episode's observation in place of the one the step produced."""

    def reset(key: Key) -> tuple[PyTree, Array]:
        observation = jax.random.bernoulli(key, 0.5, (1,)).astype(jnp.float32)
        return (observation, jnp.int32(1)), observation

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        del action
        (observation, age), one = state, jnp.ones(1, jnp.float32)
        end = age == steps
        following = jax.tree.map(lambda new, old: jnp.where(end, new, old), reset(key)[0], (one, age + 1))
        return following, TimeStep(following[0], observation[0], jnp.float32(1.0), one, end)

    return Environment(reset, step, Spec("time_limit", OBSERVATION, 2, max_episode_steps=steps))


def clock() -> Environment:
    """Never ends; the observation is (a random name, age in steps), the reward the age after the step: by them a
    transition tells which environment made it, and when."""

    def reset(key: Key) -> tuple[PyTree, Array]:
        state = (jax.random.uniform(key), jnp.int32(0))
        return state, jnp.array([state[0], 0.0])

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        del key, action
        name, age = state[0], state[1] + 1
        observation = jnp.array([name, age.astype(jnp.float32)])
        return (name, age), TimeStep(observation, age.astype(jnp.float32), jnp.float32(1), observation, age < 0)

    return Environment(reset, step, Spec("clock", jax.ShapeDtypeStruct((2,), jnp.float32), 2))


def stacks(padding: str, frames: int = 3, limit: int = 6) -> Environment:
    """Stacks of frames [2, 1], each the (episode's name, age), beside the age itself. Episodes end by chance, half of
    them by a termination, or at a time limit."""

    def stacked(name: Array, age: Array) -> PyTree:
        ages = age + jnp.arange(1 - frames, 1)
        shown = jnp.stack([jnp.broadcast_to(name, ages.shape), jnp.maximum(ages, 0)])[:, None]
        shown = jnp.where((ages < 0) & (padding == "zeros"), 0, shown)
        return {"frames": shown.astype(jnp.uint8), "age": age.astype(jnp.float32)}

    def reset(key: Key) -> tuple[PyTree, PyTree]:
        state = (jax.random.randint(key, (), 1, 256), jnp.int32(0))
        return state, stacked(*state)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        del action
        draw, reset_key = jax.random.uniform(key), jax.random.fold_in(key, 1)
        (name, age), terminated = (state[0], state[1] + 1), draw < 0.1
        end = terminated | (draw > 0.9) | (age == limit)
        following = jax.tree.map(lambda new, old: jnp.where(end, new, old), reset(reset_key)[0], (name, age))
        discount = 1.0 - terminated.astype(jnp.float32)
        return following, TimeStep(stacked(*following), age.astype(jnp.float32), discount, stacked(name, age), end)

    observation = {"frames": Frames((2, 1, frames), jnp.uint8, padding), "age": jax.ShapeDtypeStruct((), jnp.float32)}
    return Environment(reset, step, Spec("stacks", observation, 2, limit))


def clocked(config: Config) -> Components:
    """The parts of an agent that learns from clocks."""
    environment = clock()
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    return Components(config, environment, agent, replay.uniform(example, 10, config.num_envs, config.batch_size))
