"""An `Environment` of a suite's functions that do not reset: what all adapters but gymnax's have in common."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Environment, Key, PyTree, Spec, TimeStep

Start = Callable[[Key], PyTree]
Renew = Callable[[Key, Array, PyTree], PyTree]
"""renew(key, end [], current) -> start(key) where `end`, else `current`."""

MOST_TURNS = 64  # in which the starts of a batch are made, should all end at once


class Step(NamedTuple):
    """What a step of a suite produced; `terminated` and `truncated` may both be true. On `achieved` see `TimeStep`."""

    state: PyTree
    observation: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    achieved: Mapping[str, Array] | tuple[()] = ()


def everywhere(start: Start) -> Renew:
    """A start in every step, kept only where an episode ended: for starts that cost less than steps."""

    def renew(key: Key, end: Array, current: PyTree) -> PyTree:
        return jax.tree.map(lambda new, old: jnp.where(end, new, _like(new, old)), start(key), current)

    return renew


def where_ended(start: Start) -> Renew:
    """The same values, from starts that are made only where an episode ended: for those that cost more than steps.

    A condition under `vmap` computes both of its branches for all. So the batch is taken as a whole, and a loop makes
    the starts that it needs, a few at a time.
    """

    @jax.custom_batching.custom_vmap
    def renew(key: Key, end: Array, current: PyTree) -> PyTree:  # [N], [N], [N, ...]
        num = len(end)
        together = max(1, num // MOST_TURNS)
        ended = jnp.nonzero(end, size=num + together, fill_value=num)[0]

        def turn(index: Array, current: PyTree) -> PyTree:
            places = jax.lax.dynamic_slice(ended, (index * together,), (together,))
            # What follows the last that ended lies out of bounds, and is dropped.
            return jax.tree.map(
                lambda old, new: old.at[places].set(new, mode="drop"), current, jax.vmap(start)(key[places])
            )

        return jax.lax.fori_loop(0, (jnp.sum(end) + together - 1) // together, turn, current)

    @renew.def_vmap
    def _(size: int, batched: PyTree, *arguments: PyTree) -> tuple[PyTree, PyTree]:
        def joined(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        new = renew(*jax.tree.map(joined, arguments, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), new), jax.tree.map(lambda _: True, new)

    def one(key: Key, end: Array, current: PyTree) -> PyTree:
        current = jax.tree.map(_like, jax.eval_shape(start, key), current)
        batch = jax.tree.map(lambda x: x[None], (key, end, current))
        return jax.tree.map(lambda x: x[0], renew(*batch))

    return one


def auto_reset(
    reset: Callable[[Key], tuple[PyTree, PyTree]],
    step: Callable[[Key, PyTree, Array], Step],
    spec: Spec,
    renewal: Callable[[Start], Renew] = everywhere,
) -> Environment:
    """The environment of reset(key) -> (state, observation) and step(key, state, action) -> `Step`.

    A step's key is split into that of the suite's step and that of the reset: a start does not depend on what ended.
    `renewal` is where starts are computed, and changes no value.
    """

    def start(key: Key) -> tuple[PyTree, PyTree]:
        return jax.tree.map(_strong, reset(key))

    renew = renewal(start)

    def advance(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        step_key, reset_key = jax.random.split(key)
        after = step(step_key, state, action)
        end = jnp.logical_or(after.terminated, after.truncated)
        next_state, observation = renew(reset_key, end, (after.state, after.observation))
        return next_state, TimeStep(
            observation=observation,
            reward=jnp.asarray(after.reward).astype(jnp.float32),
            discount=1.0 - jnp.asarray(after.terminated).astype(jnp.float32),
            final_observation=after.observation,
            episode_end=end,
            achieved=after.achieved,
        )

    return Environment(start, advance, spec)


def _like(leaf: Array, old: Array) -> Array:
    """`old` in the dtype of a start's, which some suites change in their first step."""
    return jnp.asarray(old).astype(leaf.dtype)


def _strong(leaf: Array) -> Array:
    """Without a weak type, which makes the second call of a jitted function compile again."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(leaf, leaf.dtype)
