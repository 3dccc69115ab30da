"""The uniform ring: time-major arrays [rows, N, ...], written one block [T, N] at a time as one contiguous slice.

Row `written % rows` is written next, where `written` counts all rows ever written and is shared by all members of a
population: so a write stays one `dynamic_update_slice` under `vmap` and `pmap`. n-step returns are folded when
sampling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdqn.base import Array, Batch, Key, Progress, PyTree, Replay, Transition
from jaxdqn.config import HParams
from jaxdqn.replay.packing import Codec, codec


class Layout(NamedTuple):
    """How transitions lie in a ring. `codecs` is a `Transition` of `Codec`s; a layout holds no state."""

    rows: int
    num_envs: int
    codecs: PyTree


def layout(example: Transition, rows: int, num_envs: int) -> Layout:
    """The layout for transitions like `example`, whose fields are `ShapeDtypeStruct`s without T and N."""
    return Layout(rows, num_envs, jax.tree.map(codec, example))


def map_codecs(function: Callable[..., Any], ring: Layout, *trees: PyTree) -> PyTree:
    """function(codec, *leaves) for every field of a transition."""
    return jax.tree.map(function, ring.codecs, *trees, is_leaf=lambda x: isinstance(x, Codec))


def empty(ring: Layout) -> Transition:
    """Zeros, [rows, N, ...]: `jnp.empty` would be uninitialised memory."""
    return map_codecs(lambda c: jnp.zeros((ring.rows, ring.num_envs, *c.stored.shape), c.stored.dtype), ring)


def write(ring: Layout, data: Transition, block: Transition, written: Array, column: Array | int = 0) -> Transition:
    """Writes block [T, n] from row written % rows and `column` on; T must divide rows, or XLA would clamp the slice."""
    if ring.rows % block.reward.shape[0]:
        raise ValueError(f"{ring.rows} rows are not a multiple of the block's {block.reward.shape[0]}.")
    start = written % ring.rows

    def one(codec: Codec, old: Array, new: Array) -> Array:
        return lax.dynamic_update_slice(old, codec.encode(new), (start, column, *(0,) * (old.ndim - 2)))

    return map_codecs(one, ring, data, block)


def span(ring: Layout, n_step: int) -> int:
    """Rows that an n-step transition reaches over; the newest span - 1 start none."""
    del ring
    return n_step


def cut(data: Transition, written: Array, first: Array | int, count: int) -> Transition:
    """A ring whose `episode_end` is True in its newest row, for the `count` columns from `first` on.

    For a stream that breaks off there: what is written next does not follow on it. The row keeps its discount, so a
    return that reaches it ends with fewer rewards, and bootstraps on the observation that this row's own step produced.
    """
    end = data.episode_end
    ones = jnp.ones((1, count), end.dtype)
    return data._replace(episode_end=lax.dynamic_update_slice(end, ones, ((written - 1) % len(end), first)))


def read(ring: Layout, data: PyTree, row: Array, env: Array) -> PyTree:
    """The transitions at (row modulo the ring, env), index arrays of one shape."""
    return map_codecs(lambda c, stored: c.decode(stored[row % ring.rows, env]), ring, data)


def uniform_starts(ring: Layout, key: Key, count: int, written: Array, length: int) -> tuple[Array, Array]:
    """`count` uniform (row, env) from which `length` rows follow before the write head; each int32 [count].

    The caller writes at least `length` rows before it samples.
    """
    filled = jnp.minimum(written, ring.rows)
    # Without replacement would need a permutation of the ring; at batch << size the repeats are rare, and the
    # estimate is unbiased either way.
    size = (filled - length + 1) * ring.num_envs
    # `randint` draws three times. One draw favours no transition by more than size / 2^32 of its probability.
    flat = (jax.random.bits(key, (count,)) % size.astype(jnp.uint32)).astype(jnp.int32)
    return (written - filled + flat // ring.num_envs) % ring.rows, flat % ring.num_envs


def fold_n_step(reward: Array, discount: Array, episode_end: Array, gamma: Array) -> tuple[Array, Array, Array]:
    """Return, bootstrap discount and last index m - 1 of m-step transitions; inputs [n, B], outputs [B].

    The sum stops at the first `episode_end` or discount of 0, after m <= n rewards: sum_{k<m} gamma^k r_k and
    gamma^m * discount_{m-1}. So a termination bootstraps with 0, also one that is no episode's end (a lost life), and a
    time limit with gamma^m. Sutton and Barto (2018), eq. 7.1.
    """
    total, power = reward[0], gamma * jnp.ones_like(reward[0])
    bootstrap, last = discount[0], jnp.zeros_like(reward[0], jnp.int32)
    goes_on = jnp.logical_not(episode_end) & (discount != 0.0)
    alive = goes_on[0]
    for k in range(1, reward.shape[0]):
        total += jnp.where(alive, power * reward[k], 0.0)
        power = jnp.where(alive, gamma * power, power)
        bootstrap = jnp.where(alive, discount[k], bootstrap)
        last = jnp.where(alive, k, last)
        alive = alive & goes_on[k]
    return total, power * bootstrap, last


def n_step_batch(ring: Layout, data: Transition, row: Array, env: Array, n_step: int, hparams: HParams) -> Batch:
    """The m-step transitions that start at (row, env), int32 [B]; m <= n_step rows must follow before the head."""
    rows = row + jnp.arange(n_step)[:, None]
    outcome = (data.reward, data.discount, data.episode_end)
    reward, discount, end = (leaf[rows % ring.rows, env] for leaf in outcome)
    return_m, bootstrap_discount, last = fold_n_step(
        reward * hparams.reward_scale, discount.astype(jnp.float32), end, jnp.asarray(hparams.gamma, jnp.float32)
    )
    first = _decoded(ring.codecs.observation, data.observation, row, env)
    bootstrap = _decoded(ring.codecs.next_observation, data.next_observation, (row + last) % ring.rows, env)
    action = data.action[row, env].astype(jnp.int32)
    return Batch(first, action, return_m, bootstrap_discount, bootstrap, jnp.ones_like(return_m), (row, env))


def _decoded(codecs: PyTree, stored: PyTree, row: Array, env: Array) -> PyTree:
    """The observations at (row, env), int32 [B], from a field of the ring."""
    return jax.tree.map(lambda c, x: c.decode(x[row, env]), codecs, stored, is_leaf=lambda x: isinstance(x, Codec))


def uniform(example: Transition, rows: int, num_envs: int, batch_size: int, n_step: int = 1) -> Replay:
    """A ring of rows x num_envs transitions, sampled uniformly as m-step transitions (m <= n_step).

    The newest n_step - 1 rows are not sampled until they are complete, and nothing is read across the write head.
    State: a `Transition` of arrays [rows, N, ...].
    """
    ring = layout(example, rows, num_envs)

    def sample(state: Transition, key: Key, progress: Progress, hparams: HParams) -> Batch:
        row, env = uniform_starts(ring, key, batch_size, progress.written, span(ring, n_step))
        return n_step_batch(ring, state, row, env, n_step, hparams)

    return Replay(
        init=lambda: empty(ring),
        add=lambda state, block, written, hparams, priorities=None: write(ring, state, block, written),
        sample=sample,
    )
