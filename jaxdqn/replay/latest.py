"""Only the block just written: what makes on-policy methods (actor-critic, n-step Q) the same loop as replay."""

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Batch, Key, Progress, Replay, Transition
from jaxdqn.config import HParams
from jaxdqn.replay.ring import fold_n_step


def latest(example: Transition, length: int, num_envs: int, n_step: int) -> Replay:
    """All T * N transitions of the newest block [T, N], as m-step transitions; sampling ignores the key.

    m is n_step, or what is left of the episode or of the block: the forward view of Mnih et al. (2016), algorithm 3.
    State: a `Transition` of arrays [T, N, ...].
    """

    def init() -> Transition:
        return jax.tree.map(lambda leaf: jnp.zeros((length, num_envs, *leaf.shape), leaf.dtype), example)

    def add(
        state: Transition, block: Transition, written: Array, hparams: HParams, priorities: Array | None = None
    ) -> Transition:
        del state, written, hparams, priorities
        return block

    def sample(state: Transition, key: Key, progress: Progress, hparams: HParams) -> Batch:
        del key, progress
        return block_batch(state, n_step, hparams)

    return Replay(init, add, sample)


def block_batch(block: Transition, n_step: int, hparams: HParams) -> Batch:
    """The m-step transitions of a block [T, N], time-major in a batch [T * N]."""
    length, num_envs = block.reward.shape
    # Nothing follows the block: its last row ends every return, and bootstraps as a time limit does.
    cut = block.episode_end.at[-1].set(True)
    rows = jnp.minimum(jnp.arange(length) + jnp.arange(min(n_step, length))[:, None], length - 1)

    def windows(leaf: Array) -> Array:
        return leaf[rows].reshape(rows.shape[0], length * num_envs)

    gamma = jnp.asarray(hparams.gamma, jnp.float32)
    return_m, bootstrap_discount, last = fold_n_step(
        windows(block.reward) * hparams.reward_scale, windows(block.discount.astype(jnp.float32)), windows(cut), gamma
    )
    start, env = jnp.divmod(jnp.arange(length * num_envs), num_envs)
    return Batch(
        observation=jax.tree.map(lambda x: x[start, env], block.observation),
        action=block.action[start, env].astype(jnp.int32),
        return_m=return_m,
        bootstrap_discount=bootstrap_discount,
        bootstrap_observation=jax.tree.map(lambda x: x[start + last, env], block.next_observation),
        weights=jnp.ones_like(return_m),
        indices=(start, env),
    )
