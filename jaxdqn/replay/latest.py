"""Only the block just written: what makes on-policy methods (actor-critic, n-step Q, PQN) the same loop as replay."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Batch, Key, Progress, Replay, Sample, TargetBatch, Transition
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.replay.ring import fold_n_step


def latest(example: Transition, length: int, num_envs: int, n_step: int) -> Replay:
    """All T * N transitions of the newest block [T, N], as m-step transitions; sampling ignores the key.

    m is n_step, or what is left of the episode or of the block: the forward view of Mnih et al. (2016), algorithm 3.
    State: a `Transition` of arrays [T, N, ...].
    """

    def sample(state: Transition, key: Key, progress: Progress, hparams: HParams) -> Batch:
        del key, progress
        return block_batch(state, n_step, hparams)

    return _newest(example, length, num_envs, sample)


class Targets(NamedTuple):
    """What `minibatches` needs in a block's `extras`, [T, N]: a target for each transition, and a permutation of
    0 ... T * N - 1, int32, in which they are gone through."""

    target: Array
    order: Array


def minibatches(example: Transition, length: int, num_envs: int, batch_size: int, epochs: int) -> Replay:
    """The T * N transitions of the newest block [T, N] in parts of `batch_size`, one a turn, which divides T * N.

    Each of the `epochs` of T * N / batch_size turns goes through all of them once. The first follows the block's order,
    epoch e what that order makes of itself when followed e times: random permutations, of one that is drawn once and
    stored.
    State: a `Transition` of arrays [T, N, ...] with `Targets` as extras.
    """
    turns = length * num_envs // batch_size

    def sample(state: Transition, key: Key, progress: Progress, hparams: HParams) -> TargetBatch:
        del key, hparams
        flat = jax.tree.map(lambda x: x.reshape(length * num_envs, *x.shape[2:]), state)
        epoch, part = jnp.divmod(progress.turn, turns)
        places = part * batch_size + jnp.arange(batch_size)
        index = places
        for number in range(epochs):  # a loop up to this epoch would have a GPU ask the host before each turn
            index = jnp.where(number <= epoch, flat.extras.order[index], index)
        observation = jax.tree.map(lambda x: x[index], flat.observation)
        action = flat.action[index].astype(jnp.int32)
        return TargetBatch(observation, action, flat.extras.target[index], jnp.ones(batch_size), index)

    return _newest(example, length, num_envs, sample)


def _newest(example: Transition, length: int, num_envs: int, sample: Sample) -> Replay:
    """A replay whose state is the newest block."""

    def init() -> Transition:
        return jax.tree.map(lambda leaf: jnp.zeros((length, num_envs, *leaf.shape), leaf.dtype), example)

    def add(
        state: Transition, block: Transition, written: Array, hparams: HParams, priorities: Array | None = None
    ) -> Transition:
        del state, written, hparams, priorities
        return block

    def describe(state: Transition, progress: Progress, hparams: HParams) -> dict[str, Array]:
        del state, progress, hparams
        return {"replay_age": jnp.float32((length - 1) / 2)}

    return Replay(init, add, sample, describe=describe)


def check_returns(config: Config) -> None:
    """Raises `UserError` for returns that are longer than the block they are taken from."""
    if config.n_step > config.rollout_length:
        raise UserError(
            f"n_step {config.n_step} is longer than the block of rollout_length {config.rollout_length} that agent "
            f"{config.agent!r} learns from; raise rollout_length or lower n_step to {config.rollout_length}."
        )


def check_epochs(config: Config) -> None:
    """Raises `UserError` where minibatches do not divide the block, or updates are no whole number of epochs."""
    block, size, updates = config.rollout_length * config.num_envs, config.batch_size, config.updates_per_iteration
    if block % size:
        raise UserError(
            f"batch_size {size} does not divide the block of rollout_length {config.rollout_length} x num_envs "
            f"{config.num_envs} = {block} transitions that agent {config.agent!r} learns from; use a divisor of "
            f"{block}."
        )
    if updates % (block // size):
        raise UserError(
            f"updates_per_iteration {updates} is no whole number of epochs: {block // size} minibatches of batch_size "
            f"{size} are one epoch of the block; use a multiple of {block // size}."
        )


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
