"""Environments on the host that are known by heart: twins of environments in JAX, and ones that fail on demand."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from probe_environments import stacks

from jaxdqn import training
from jaxdqn.base import Environment, Frames, HostEnvironments, HostStep, Spec
from jaxdqn.environments import host
from jaxdqn.parallel.compiled.runner import EXPERIENCE_STREAM


def frames_only(padding: str) -> Environment:
    """`stacks`, whose observation is the stack alone."""
    whole = stacks(padding)

    def reset(key):
        state, seen = whole.reset(key)
        return state, seen["frames"]

    def step(key, state, action):
        state, t = whole.step(key, state, action)
        frames = t._replace(observation=t.observation["frames"], final_observation=t.final_observation["frames"])
        return state, frames._replace(reward=t.reward + action)  # by which a wrong action would show

    return Environment(reset, step, whole.spec._replace(observation=whole.spec.observation["frames"]))


def twin(environment: Environment, seed: int, length: int) -> Environment:
    """`environment` on the host, with the keys that the only actor of a run with this seed and rollouts of `length`
    draws: it does the same in every step."""
    reset = jax.jit(jax.vmap(environment.reset))
    stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EXPERIENCE_STREAM), 0)
    key, actor_key = jax.random.split(stream)

    @jax.jit
    def step(state, count, actions):
        acted, turn = count // length, count % length
        keys = jax.random.split(training.stream_keys(key, acted)[0], (length, 1 + len(actions)))[turn, 1:]
        return jax.vmap(environment.step)(keys, state, actions)

    def newest(observation):
        is_stack = isinstance(environment.spec.observation, Frames)
        return np.asarray(observation[..., -1:] if is_stack else observation)

    def make(num_envs: int) -> HostEnvironments:
        now = {}

        def begin(seed: int):
            now["state"], observation = reset(jax.random.split(actor_key, num_envs))
            now["count"] = 0
            return newest(observation)

        def advance(actions: np.ndarray) -> HostStep:
            now["state"], t = step(now["state"], jnp.int32(now["count"]), jnp.asarray(actions, jnp.int32))
            now["count"] += 1
            rest = (np.asarray(x) for x in (t.reward, t.discount))
            final, end = newest(t.final_observation), np.asarray(t.episode_end)
            return HostStep(newest(t.observation), *rest, final, end)

        return HostEnvironments(begin, advance, lambda: None)

    return host.on_host(environment.spec, make)


class Counters:
    """Environments whose observation is (which making of them this is, steps since their reset): what an actor
    delivers tells which environments made it. Every tenth step ends an episode, each other one by a time limit.

    `trouble(making, step)` is called before each step: it may raise, or sleep.
    """

    def __init__(self, trouble=lambda making, step: None) -> None:
        self.makings, self.closed, self.trouble = 0, 0, trouble
        spec = Spec("counters", jax.ShapeDtypeStruct((2,), np.float32), 2)
        self.environment = host.on_host(spec, self._make)

    def _make(self, num_envs: int) -> HostEnvironments:
        self.makings += 1
        making, now = self.makings, {"step": 0}

        def seen() -> np.ndarray:
            return np.tile(np.float32([making, now["step"]]), (num_envs, 1))

        def reset(seed: int) -> np.ndarray:
            now["step"] = 0
            return seen()

        def step(actions: np.ndarray) -> HostStep:
            self.trouble(making, now["step"])
            now["step"] += 1
            end = np.full(num_envs, now["step"] % 10 == 0)
            death = end & (now["step"] % 20 == 0)
            reward = np.full(num_envs, now["step"], np.float32)
            return HostStep(seen(), reward, 1.0 - death.astype(np.float32), seen(), end)

        def close() -> None:
            self.closed += 1

        return HostEnvironments(reset, step, close)


def sleeping(seconds: float) -> Environment:
    """Environments that take so many seconds for a step."""
    return Counters(lambda making, step: time.sleep(seconds)).environment
