"""An `Environment` of a suite's functions that do not reset: what all adapters but gymnax's have in common."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Environment, Key, PyTree, Spec, TimeStep


class Step(NamedTuple):
    """What one step of a suite produced; `terminated` and `truncated` may both be true."""

    state: PyTree
    observation: PyTree
    reward: Array
    terminated: Array
    truncated: Array


def auto_reset(
    reset: Callable[[Key], tuple[PyTree, PyTree]], step: Callable[[Key, PyTree, Array], Step], spec: Spec
) -> Environment:
    """The environment of reset(key) -> (state, observation) and step(key, state, action) -> `Step`.

    A step's key is split into that of the suite's step and that of the reset: a start does not depend on what ended.
    """

    def start(key: Key) -> tuple[PyTree, PyTree]:
        return jax.tree.map(_strong, reset(key))

    def advance(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        step_key, reset_key = jax.random.split(key)
        after, first = step(step_key, state, action), start(reset_key)
        end = jnp.logical_or(after.terminated, after.truncated)

        def begun(new: Array, old: Array) -> Array:
            return jnp.where(end, new, jnp.asarray(old).astype(new.dtype))

        next_state, observation = jax.tree.map(begun, first, (after.state, after.observation))
        return next_state, TimeStep(
            observation=observation,
            reward=jnp.asarray(after.reward).astype(jnp.float32),
            discount=1.0 - jnp.asarray(after.terminated).astype(jnp.float32),
            final_observation=after.observation,
            episode_end=end,
        )

    return Environment(start, advance, spec)


def _strong(leaf: Array) -> Array:
    """Without a weak type, which makes the second call of a jitted function compile again."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(leaf, leaf.dtype)
