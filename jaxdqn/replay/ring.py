"""The uniform ring: time-major arrays [rows, N, ...], written one block [T, N] at a time as one contiguous slice.

Row `written % rows` is written next, where `written` counts all rows ever written and is shared by all members of a
population: so a write stays one `dynamic_update_slice` under `vmap` and `pmap`. n-step returns are folded when
sampling.

With two copies a row holds its observation and the one that its step produced. With one copy the latter is the next
row's observation: right inside an episode, of no use after a termination, and the next episode's first after a time
limit. So a return stops before a limit's row and bootstraps on that row's own observation, and one that would start
there has weight 0. This is exact but for two things: a reward paid only in a limit's own row is never a first reward,
and where some episodes terminate in the row in which others meet the limit, the former are kept and the latter not.

With one copy also each frame of a stack is held once, in the row in which it was the newest; stacks are put together
when sampling, and no longer than their episode has been. Nothing starts where a stack reaches over the write head, or
over the place where a stream was cut.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdqn.base import Array, Batch, Key, Progress, PyTree, Replay, Transition
from jaxdqn.config import HParams
from jaxdqn.errors import UserError
from jaxdqn.replay.packing import Codec, codec, frame_codec, plain

SMALL = 32  # bytes of a packed observation, up to which a second copy costs little
GOES_ON, END, UNKNOWN, CUT = 1, 2, 4, 8


class Stored(NamedTuple):
    """Transitions as a ring holds them, each field [rows, N, ...]; `Layout` also has one of `Codec`s.

    `ends` is discount and episode_end in one byte; `next_observation` is () where observations have one copy.
    """

    observation: PyTree
    action: PyTree
    reward: PyTree
    ends: PyTree
    next_observation: PyTree
    extras: PyTree


class Layout(NamedTuple):
    """How transitions lie in a ring, with 1 or 2 copies of an observation; `history` is how many rows before its own
    an observation's frames lie in. A layout holds no state."""

    rows: int
    num_envs: int
    codecs: Stored
    copies: int
    history: int


def layout(example: Transition, rows: int, num_envs: int, copies: int = 2) -> Layout:
    """The layout for transitions like `example`, whose fields are `ShapeDtypeStruct`s (or `Frames`) without T and N."""
    fields = _fields(example, jax.ShapeDtypeStruct((), jnp.uint8), copies)
    codecs = jax.tree.map(frame_codec if copies == 1 else lambda x: codec(plain(x)), fields)
    history = max(c.frames for c in jax.tree.leaves(codecs, is_leaf=_is_codec)) - 1
    return Layout(rows, num_envs, codecs, copies, max(history, 0))


def copies(example: Transition, asked: str) -> int:
    """How many copies of an observation `Config.replay_copies` asks for."""
    stored = [codec(plain(leaf)).stored for leaf in jax.tree.leaves(example.observation)]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in stored)
    return {"one": 1, "two": 2, "auto": 1 if size > SMALL else 2}[asked]


def kept(ring: Layout, block: Transition) -> Transition:
    """What of a block [T, N] `encode` reads: the same comes of it."""
    if ring.copies == 2:
        return block
    newest = _map(lambda c, x: x[..., -1:] if c.frames else x, ring.codecs.observation, block.observation)
    return block._replace(observation=newest, next_observation=())


def encode(ring: Layout, block: Transition) -> Stored:
    """A block [T, N] as the ring holds it, its actions of any type of integers."""
    block = block._replace(action=block.action.astype(ring.codecs.action.stored.dtype))
    return _map(lambda c, x: c.encode(x), ring.codecs, _fields(block, _ends(block), ring.copies))


def empty(ring: Layout) -> Stored:
    """Zeros, [rows, N, ...]: `jnp.empty` would be uninitialised memory. But unwritten rows end an episode, so that no
    stack of frames reaches into them."""
    data = _map(lambda c: jnp.zeros((ring.rows, ring.num_envs, *c.stored.shape), c.stored.dtype), ring.codecs)
    return data._replace(ends=jnp.full_like(data.ends, END))


def write(ring: Layout, data: Stored, block: Transition, written: Array, column: Array | int = 0) -> Stored:
    """Writes block [T, n] from row written % rows and `column` on; T must divide rows, or XLA would clamp the slice."""
    if ring.rows % block.reward.shape[0]:
        raise ValueError(f"{ring.rows} rows are not a multiple of the block's {block.reward.shape[0]}.")
    start = written % ring.rows
    return jax.tree.map(lambda old, new: overwrite(old, new, start, jnp.int32(column)), data, encode(ring, block))


@jax.custom_batching.custom_vmap
def overwrite(old: Array, new: Array, row: Array, column: Array) -> Array:
    """`old` [rows, N, ...] with `new` [T, n, ...] from (row, column) on; for a population in one slice as well."""
    return lax.dynamic_update_slice(old, new, (row, column, *(0,) * (old.ndim - 2)))


@overwrite.def_vmap
def _overwrite_all(
    size: int, batched: tuple[bool, ...], old: Array, new: Array, row: Array, column: Array
) -> tuple[Array, bool]:
    # JAX makes a scatter of a slice of several members, which on a GPU is four more kernels a block.
    if tuple(batched) == (True, True, False, False):
        return lax.dynamic_update_slice(old, new, (0, row, column, *(0,) * (old.ndim - 3))), True
    axes = tuple(0 if mapped else None for mapped in batched)
    write_one = jax.vmap(
        lambda old, new, *at: lax.dynamic_update_slice(old, new, (*at, *(0,) * (old.ndim - 2))), axes, axis_size=size
    )
    return write_one(old, new, row, column), True


def cut(data: Stored, written: Array, first: Array | int, count: int) -> Stored:
    """A ring with an episode's end in its newest row, for the `count` columns from `first` on.

    For a stream that breaks off there: what is written next does not follow on it. The row keeps its discount, so that
    returns treat it as they treat a time limit.
    """
    at = ((written - 1) % len(data.ends), first)
    ended = lax.dynamic_slice(data.ends, at, (1, count)) | jnp.uint8(END | CUT)
    return data._replace(ends=lax.dynamic_update_slice(data.ends, ended, at))


def read(ring: Layout, data: PyTree, row: Array, env: Array) -> Transition:
    """The transitions at (row modulo the ring, env), index arrays of one shape; with one copy, without
    `next_observation`."""
    rest = _map(
        lambda c, x: c.decode(x[row % ring.rows, env]), *(t._replace(observation=()) for t in (ring.codecs, data))
    )
    discount, episode_end = outcome(rest.ends)
    observation, action = observations(ring, data, row, env), rest.action.astype(jnp.int32)
    return Transition(observation, action, rest.reward, discount, rest.next_observation, episode_end, rest.extras)


def observations(ring: Layout, data: Stored, row: Array, env: Array) -> PyTree:
    """The observations at (row modulo the ring, env), index arrays of one shape."""
    ages = jnp.arange(1, ring.history + 1).reshape(-1, *(1,) * row.ndim)
    same = ~outcome(data.ends[(row - ages) % ring.rows, env])[1]
    since = jnp.sum(jnp.cumprod(same, 0), 0)  # rows since the episode began, up to `history`

    def gathered(c: Codec, x: Array) -> Array:
        if not c.frames:
            return c.decode(x[row % ring.rows, env])
        age = jnp.arange(c.frames - 1, -1, -1).reshape(-1, *(1,) * row.ndim)
        return c.decode(x[(row - jnp.minimum(age, since)) % ring.rows, env], age > since)

    return _map(gathered, ring.codecs.observation, data.observation)


def produced(ring: Layout, data: Stored, row: Array, env: Array) -> PyTree:
    """The observations that the steps at (row modulo the ring, env) produced; with one copy, those of the next row."""
    if ring.copies == 1:
        return observations(ring, data, row + 1, env)
    return _map(lambda c, x: c.decode(x[row % ring.rows, env]), ring.codecs.next_observation, data.next_observation)


def outcome(ends: Array) -> tuple[Array, Array]:
    """(discount float32, episode_end bool) of bytes as stored. A discount that was neither 0 nor 1 is NaN: nothing is
    learned from it in silence."""
    discount = (ends & GOES_ON).astype(jnp.float32)
    return jnp.where((ends & UNKNOWN) != 0, jnp.nan, discount), (ends & END) != 0


def void(ring: Layout, ends: Array) -> Array:
    """Where no return may start, [T, ...], of `ends` [history + T, ...] in consecutive rows.

    With one copy in the row of a time limit, or where a stream was `cut`, since nothing holds what its step produced;
    and where a stack of frames would reach over such a cut.
    """
    own = ends[ring.history :]
    if ring.copies == 2:
        return jnp.zeros(own.shape, jnp.bool_)
    discount, end = outcome(own)
    cuts = (ends[age : age + len(own)] & CUT for age in range(ring.history))
    return functools.reduce(lambda found, cut: found | (cut != 0), cuts, end & (discount != 0.0))


def span(ring: Layout, n_step: int) -> int:
    """Rows that an n-step transition reaches over; the newest span - 1 start none. Raises `UserError` where the ring
    has fewer."""
    rows = n_step + 2 - ring.copies
    if rows + ring.history > ring.rows:
        raise UserError(
            f"n_step {n_step}, with what its observations are put together of, needs {rows + ring.history} rows of "
            f"{ring.num_envs} transitions, and the replay holds {ring.rows}; raise replay_capacity."
        )
    return rows


def _fields(transition: Transition, ends: PyTree, copies: int) -> Stored:
    t = transition
    following = t.next_observation if copies == 2 else ()
    return Stored(t.observation, t.action, t.reward, ends, following, t.extras)


def _ends(block: Transition) -> Array:
    known = jnp.where(block.discount == 0.0, 0, jnp.where(block.discount == 1.0, GOES_ON, UNKNOWN))
    return (known + jnp.where(block.episode_end, END, 0)).astype(jnp.uint8)


def _map(function: Callable[..., PyTree], codecs: PyTree, *trees: PyTree) -> PyTree:
    """function(codec, *leaves) for every leaf of what the codecs are for."""
    return jax.tree.map(function, codecs, *trees, is_leaf=_is_codec)


def _is_codec(x: object) -> bool:
    return isinstance(x, Codec)


def uniform_starts(ring: Layout, key: Key, count: int, written: Array, length: int) -> tuple[Array, Array]:
    """`count` uniform (row, env) from which `length` rows follow before the write head; each int32 [count].

    The caller writes at least `length` rows before it samples.
    """
    filled = jnp.minimum(written, ring.rows - ring.history)
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


def n_step_batch(ring: Layout, data: Stored, row: Array, env: Array, n_step: int, hparams: HParams) -> Batch:
    """The m-step transitions that start at (row, env), int32 [B], with weight 0 where that is `void`, else 1; m <=
    n_step. `span` rows from there on must lie before the write head."""
    rows = (row + jnp.arange(-ring.history, n_step)[:, None]) % ring.rows
    reward, ends = data.reward[rows[ring.history :], env], data.ends[rows, env]
    (discount, end), none = outcome(ends[ring.history :]), void(ring, ends)
    before = jnp.concatenate([none[1:], jnp.zeros_like(none[:1])])
    return_m, bootstrap_discount, last = fold_n_step(
        reward * hparams.reward_scale, discount, end | before, jnp.asarray(hparams.gamma, jnp.float32)
    )
    first, bootstrap = observations(ring, data, row, env), produced(ring, data, row + last, env)
    action = data.action[row, env].astype(jnp.int32)
    weights = jnp.where(none[0], 0.0, jnp.ones_like(return_m))
    return Batch(first, action, return_m, bootstrap_discount, bootstrap, weights, (row, env))


def uniform(example: Transition, rows: int, num_envs: int, batch_size: int, n_step: int = 1, copies: int = 2) -> Replay:
    """A ring of rows x num_envs transitions, sampled uniformly as m-step transitions (m <= n_step).

    The newest rows are not sampled until their returns are complete, and nothing is read across the write head. A start
    that is `void` counts in the mean of the loss, with weight 0. State: a `Stored` of arrays [rows, N, ...].
    """
    ring = layout(example, rows, num_envs, copies)

    def sample(state: Stored, key: Key, progress: Progress, hparams: HParams) -> Batch:
        row, env = uniform_starts(ring, key, batch_size, progress.written, span(ring, n_step))
        return n_step_batch(ring, state, row, env, n_step, hparams)

    def describe(state: Stored, progress: Progress, hparams: HParams) -> dict[str, Array]:
        del state, hparams
        oldest = jnp.minimum(progress.written, rows - ring.history) - 1
        return {"replay_age": (oldest + span(ring, n_step) - 1) / 2}

    return Replay(
        init=lambda: empty(ring),
        add=lambda state, block, written, hparams, priorities=None: write(ring, state, block, written),
        sample=sample,
        describe=describe,
        rows=rows,
        kept=functools.partial(kept, ring),
    )
