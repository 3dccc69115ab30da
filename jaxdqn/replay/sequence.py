"""Sequences: the same ring, sampled as runs of L consecutive raw transitions, for losses over time.

They start every `period` rows, and only there a recurrent state is kept. What a loss over time asks of the step after a
row is in the next row, so no `next_observation` is stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdqn.base import Array, Key, Progress, PyTree, Replay, SequenceBatch, Transition
from jaxdqn.config import Config, HParams, own_values, replay_rows
from jaxdqn.errors import UserError
from jaxdqn.replay import ring as _ring
from jaxdqn.replay.ring import Stored


class Layout(NamedTuple):
    """How sequences of `length` rows lie in a ring of `steps`, with a slot for one of `states` every `period` rows."""

    steps: _ring.Layout
    states: PyTree
    length: int
    period: int


def layout(example: Transition, rows: int, num_envs: int, length: int, period: int) -> Layout:
    """The layout for transitions like `example`; `period` must divide `rows`. Raises `UserError` for a ring in which
    there would not always be a whole sequence."""
    if rows % period:
        raise ValueError(f"{rows} rows are not a multiple of the period {period}.")
    steps = _ring.layout(example._replace(extras=()), rows, num_envs, copies=1)
    needed = length + period - 1 + steps.history
    if needed > rows:
        raise UserError(
            f"sequences of {length} rows, every {period} rows, with what their observations are put together of, need "
            f"{needed} rows of {num_envs} transitions, and the replay holds {rows}; raise replay_capacity."
        )
    return Layout(steps, example.extras, length, period)


def slots(ring: Layout) -> int:
    """How many sequences of one environment the ring has the starts of."""
    return ring.steps.rows // ring.period


def empty(ring: Layout) -> Stored:
    """Zeros, [rows, N, ...], and [slots, N, ...] in `extras`."""
    leading = slots(ring), ring.steps.num_envs
    states = jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), ring.states)
    return _ring.empty(ring.steps)._replace(extras=states)


def write(ring: Layout, data: Stored, block: Transition, written: Array, column: Array | int = 0) -> Stored:
    """Writes block [T, n] from row written % rows and `column` on. T must divide the rows, and the period or the other
    way round."""
    size, period = len(block.reward), ring.period
    if size % period and period % size:
        raise ValueError(f"blocks of {size} rows and sequences every {period} rows: neither divides the other.")

    def put(old: Array, new: Array) -> Array:
        new, at = new[::period], (written // period % slots(ring), column, *(0,) * (old.ndim - 2))
        # A block that is shorter than the period begins a sequence, or has none.
        begun = jnp.where(written % period == 0, new, lax.dynamic_slice(old, at, new.shape))
        return lax.dynamic_update_slice(old, begun, at)

    bare = data._replace(extras=()), block._replace(extras=())
    steps = _ring.write(ring.steps, *bare, written, column)
    return steps._replace(extras=jax.tree.map(put, data.extras, block.extras))


def read(ring: Layout, data: Stored, slot: Array, env: Array) -> SequenceBatch:
    """The sequences that start at (slot, env), int32 [B], with weights of 1, or 0 where a stack of frames would reach
    over the place where a stream was cut: the actor saw another."""
    time = slot * ring.period + jnp.arange(ring.length)[:, None]
    rows = _ring.read(ring.steps, data._replace(extras=()), time, jnp.broadcast_to(env, time.shape))
    carry, weights = jax.tree.map(lambda x: x[slot, env], data.extras), jnp.ones(env.shape)
    if ring.steps.history:
        before = slot * ring.period + jnp.arange(-ring.steps.history, ring.length - 1)[:, None]
        cuts = data.ends[before % ring.steps.rows, env] & _ring.CUT
        weights = jnp.where(jnp.any(cuts != 0, axis=0), 0.0, weights)
    return SequenceBatch(rows, carry, weights, (slot, env))


def starts(ring: Layout, key: Key, count: int, written: Array) -> tuple[Array, Array]:
    """`count` uniform (slot, env) of whole sequences; each int32 [count]. `written` [actors] are the rows that each
    actor ever wrote to its part of the columns; one must have written length + period - 1."""
    each = ring.steps.num_envs // written.shape[0]
    oldest, newest = whole(ring, written)
    ends = jnp.cumsum(jnp.maximum(newest - oldest + 1, 0) * each)
    flat = (jax.random.bits(key, (count,)) % ends[-1].astype(jnp.uint32)).astype(jnp.int32)
    actor = jnp.searchsorted(ends, flat, side="right")
    flat -= jnp.where(actor > 0, ends[actor - 1], 0)
    return (oldest[actor] + flat // each) % slots(ring), actor * each + flat % each


def whole(ring: Layout, written: Array) -> tuple[Array, Array]:
    """The oldest and the newest sequence that is there as a whole, with the frames before it that its observations are
    put together of, by its number among all that ever began."""
    oldest = jnp.maximum(written - ring.steps.rows + ring.steps.history, 0)
    return -(-oldest // ring.period), (written - ring.length) // ring.period


def age(ring: Layout, written: Array, number: Array) -> Array:
    """The mean over a sequence's rows of how many were written after them, of its `number` as in `whole`."""
    return written - 1 - number * ring.period - (ring.length - 1) / 2


def sequences(example: Transition, rows: int, num_envs: int, batch_size: int, length: int, period: int = 1) -> Replay:
    """A ring of rows x num_envs transitions, sampled uniformly as a `SequenceBatch` [L, B], oldest first.

    A sequence may contain episode ends, also where a stream was `cut`; a loss stops there. It never crosses the write
    head. Its `carry` is what the actor stored as `extras` of its first row. State: as `empty` gives it.
    """
    ring = layout(example, rows, num_envs, length, period)
    one = sequence_regions(example, rows, 1, num_envs, batch_size, length, period)

    def add(
        state: Stored, block: Transition, written: Array, hparams: HParams, priorities: Array | None = None
    ) -> Stored:
        added: Stored = one.add(state, block, (0, written), hparams, priorities)
        return added

    def sample(state: Stored, key: Key, progress: Progress, hparams: HParams) -> SequenceBatch:
        return one.sample(state, key, progress._replace(written=progress.written[None]), hparams)

    def describe(state: Stored, progress: Progress, hparams: HParams) -> dict[str, Array]:
        del state, hparams
        oldest, newest = whole(ring, progress.written)
        return {"replay_age": age(ring, progress.written, (oldest + newest) / 2)}

    return one._replace(add=add, sample=sample, cut=None, describe=describe)


def sequence_regions(
    example: Transition, rows: int, num_actors: int, envs_each: int, batch_size: int, length: int, period: int = 1
) -> Replay:
    """`sequences` of several actors, each with its own columns and write row, as `regions` has them."""
    ring = layout(example, rows, num_actors * envs_each, length, period)

    def add(
        state: Stored,
        block: Transition,
        written: tuple[Array | int, Array],
        hparams: HParams,
        priorities: Array | None = None,
    ) -> Stored:
        del hparams, priorities
        return write(ring, state, block, written[1], written[0] * envs_each)

    def sample(state: Stored, key: Key, progress: Progress, hparams: HParams) -> SequenceBatch:
        del hparams
        return read(ring, state, *starts(ring, key, batch_size, progress.written))

    def cut(state: Stored, written: tuple[Array | int, Array]) -> Stored:
        return _ring.cut(state, written[1], written[0] * envs_each, envs_each)

    return Replay(lambda: empty(ring), add, sample, cut=cut, rows=rows)


def n_step_errors(
    error: Callable[..., Array], q: Array, q_target: Array, rows: Transition, length: int, hparams: HParams
) -> Array:
    """m-step TD errors [S, B] of the first S = `length` of S + n rows, m <= n, the rest being bootstrapped from.

    error(q_tm1 [A], action [], return_m [], bootstrap_discount [], q_t_value [A], q_t_selector [A]) -> []; q and
    q_target [S + n, B, A]. Returns stop where discount is 0 or an episode ends. The row after a time limit is another
    episode's: an error that would bootstrap from there is 0.
    """
    first, n_step = jnp.arange(length), len(rows.reward) - length
    window = first + jnp.arange(n_step)[:, None]
    return_m, bootstrap_discount, last = _ring.fold_n_step(
        rows.reward[window] * hparams.reward_scale,
        rows.discount[window].astype(jnp.float32),
        rows.episode_end[window],
        jnp.asarray(hparams.gamma, jnp.float32),
    )
    last += first[:, None]
    q_t_value, q_t_selector = (jnp.take_along_axis(x, last[..., None] + 1, axis=0) for x in (q_target, q))
    outcome = (rows.action[:length].astype(jnp.int32), return_m, bootstrap_discount, q_t_value, q_t_selector)
    errors = jax.vmap(jax.vmap(error))(q[:length], *outcome)
    known = (bootstrap_discount == 0.0) | ~jnp.take_along_axis(rows.episode_end, last, axis=0)
    return jnp.where(known, errors, 0.0)


def window(config: Config) -> tuple[int, int]:
    """Length and period of the sequences that an agent with the settings burn_in, sequence_length and period learns
    from: the burn-in comes on top of the trained rows, and the last n_step rows are only bootstrapped from."""
    own = own_values(config.own)
    return own["burn_in"] + own["sequence_length"] + config.n_step, own["period"]


def rows_needed(config: Config) -> int:
    """Rows after which there is a whole sequence, also where the write head has overwritten a part of the oldest."""
    length, period = window(config)
    return length + period - 1


def whole_rows(config: Config, block: int) -> int:
    """The rows of a ring for blocks of `block` rows: whole blocks, and whole periods. Raises `UserError` where neither
    divides the other."""
    period = window(config)[1]
    if block % period and period % block:
        raise UserError(
            f"sequences start every period {period} rows, and blocks of {block} rows are written: one must divide the "
            f"other; use period {block}, say."
        )
    most = max(block, period)
    return -(-replay_rows(config) // most) * most


def check(config: Config) -> None:
    """Raises `UserError` for sequences that do not fit the blocks of experience, and for too long a burn-in."""
    own = own_values(config.own)
    if own["burn_in"] > own["sequence_length"]:
        raise UserError(
            f"burn_in {own['burn_in']} is longer than the {own['sequence_length']} rows of sequence_length that are "
            "trained on after it; lower burn_in or raise sequence_length."
        )
    if own["period"] > own["sequence_length"]:
        raise UserError(
            f"period {own['period']} is longer than sequence_length {own['sequence_length']}: the steps between would "
            "not be trained on; lower period or raise sequence_length."
        )
    whole_rows(config, config.rollout_length)
