"""Sequences: the same ring, sampled as runs of L consecutive raw transitions, for losses over time."""

from typing import Any

import jax.numpy as jnp

from jaxdqn.base import Array, Key, Replay, Transition
from jaxdqn.replay import ring as _ring


def sequences(example: Transition, rows: int, num_envs: int, batch_size: int, length: int) -> Replay:
    """A ring of rows x num_envs transitions, sampled uniformly as `Transition`s [L, B], oldest first.

    A sequence may contain episode ends, also where a stream was `cut`; a loss stops there. It never crosses the write
    head. `extras` is returned as stored (a recurrent state, say).
    """
    layout = _ring.layout(example, rows, num_envs)

    def sample(state: Transition, key: Key, written: Array, hparams: Any) -> Transition:
        del hparams
        row, env = _ring.uniform_starts(layout, key, batch_size, written, length)
        time = row + jnp.arange(length)[:, None]
        return _ring.read(layout, state, time, jnp.broadcast_to(env, time.shape))

    return Replay(
        init=lambda: _ring.empty(layout),
        add=lambda state, block, written: _ring.write(layout, state, block, written),
        sample=sample,
        update_priorities=lambda state, indices, priorities: state,
    )
