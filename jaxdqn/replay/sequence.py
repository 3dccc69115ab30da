"""Sequences: the same ring, sampled as runs of L consecutive raw transitions, for losses over time."""

import jax
import jax.numpy as jnp

from jaxdqn.base import Key, Progress, Replay, SequenceBatch, Transition
from jaxdqn.config import HParams
from jaxdqn.replay import ring as _ring


def sequences(example: Transition, rows: int, num_envs: int, batch_size: int, length: int) -> Replay:
    """A ring of rows x num_envs transitions, sampled uniformly as a `SequenceBatch` [L, B], oldest first.

    A sequence may contain episode ends, also where a stream was `cut`; a loss stops there. It never crosses the write
    head. `extras` is what the actor stored (a recurrent state, say), and its first row the batch's `carry`.
    """
    layout = _ring.layout(example, rows, num_envs)

    def sample(state: Transition, key: Key, progress: Progress, hparams: HParams) -> SequenceBatch:
        del hparams
        row, env = _ring.uniform_starts(layout, key, batch_size, progress.written, length)
        time = row + jnp.arange(length)[:, None]
        rows: Transition = _ring.read(layout, state, time, jnp.broadcast_to(env, time.shape))
        carry = jax.tree.map(lambda x: x[0], rows.extras)
        return SequenceBatch(rows, carry, jnp.ones(batch_size), (row, env))

    return Replay(
        init=lambda: _ring.empty(layout),
        add=lambda state, block, written, hparams, priorities=None: _ring.write(layout, state, block, written),
        sample=sample,
    )
