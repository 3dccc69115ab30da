"""Prioritised sequences: runs of L transitions, drawn in proportion to their priority (Kapturowski et al., 2019).

A leaf of the sum tree is a start. It has mass 0 from when its first row is written until its last one is, then that of
the highest priority there ever was, and 0 again when frames are overwritten that its observations are put together of.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxdqn.base import Array, Key, Progress, Replay, SequenceBatch, Transition
from jaxdqn.config import HParams
from jaxdqn.replay import ring as _ring
from jaxdqn.replay import sequence, sum_tree
from jaxdqn.replay.prioritised import describe_masses, importance, mass, update_priorities
from jaxdqn.replay.ring import Stored
from jaxdqn.replay.sum_tree import Tree


class Prioritised(NamedTuple):
    """`data` as `sequence.empty` gives it; `tree` has a mass for each start, time-major, region by region; `highest` []
    is the largest priority there ever was."""

    data: Stored
    tree: Tree
    highest: Array


def prioritised_sequences(
    example: Transition, rows: int, num_envs: int, batch_size: int, length: int, period: int = 1
) -> Replay:
    """`sequence.sequences`, drawn by priority. Weights are relative to the largest of the batch. State: a
    `Prioritised`."""
    ring = sequence.layout(example, rows, num_envs, length, period)
    one = prioritised_sequence_regions(example, rows, 1, num_envs, batch_size, length, period)

    def add(
        state: Prioritised, block: Transition, written: Array, hparams: HParams, priorities: Array | None = None
    ) -> Prioritised:
        added: Prioritised = one.add(state, block, (0, written), hparams, priorities)
        return added

    def describe(state: Prioritised, progress: Progress, hparams: HParams) -> dict[str, Array]:
        newest, slots = (progress.written - 1) // period, sequence.slots(ring)
        ages = sequence.age(ring, progress.written, newest - (newest - jnp.arange(slots)) % slots)
        return describe_masses(state.tree, ages, num_envs, hparams)

    return one._replace(add=add, cut=None, describe=describe)


def prioritised_sequence_regions(
    example: Transition, rows: int, num_actors: int, envs_each: int, batch_size: int, length: int, period: int = 1
) -> Replay:
    """The same with a region of columns for each actor, drawn from all of them; priorities that actors bring are those
    of steps, and are not used."""
    if period > length:
        raise ValueError(f"a sequence of {length} rows ends before the next one starts, period {period} rows later.")
    ring = sequence.layout(example, rows, num_actors * envs_each, length, period)
    slots, history = sequence.slots(ring), ring.steps.history

    def leaves(actor: Array | int, slot: Array) -> Array:
        first = (actor * slots + slot % slots) * envs_each
        return (first[:, None] + jnp.arange(envs_each)).reshape(-1)

    def init() -> Prioritised:
        return Prioritised(sequence.empty(ring), sum_tree.empty(slots * ring.steps.num_envs), jnp.float32(1))

    def add(
        state: Prioritised,
        block: Transition,
        written: tuple[Array | int, Array],
        hparams: HParams,
        priorities: Array | None = None,
    ) -> Prioritised:
        del priorities
        (actor, row), size = written, len(block.reward)
        data = sequence.write(ring, state.data, block, row, actor * envs_each)
        # Where no sequence begins in this block, the slot is that of one which is not complete anyway.
        slot = jnp.arange(max(1, size // period))
        begun, ended = row // period + slot, (row - length) // period + 1 + slot
        oldest = row + size - rows + history  # from here on nothing is overwritten that a sequence is made of
        complete = (ended >= 0) & (ended * period + length <= row + size) & (ended * period >= oldest)
        over = -((history - oldest) // period) + jnp.arange(-(-history // period))
        over = jnp.where(over * period < oldest, over, begun[0])
        complete, begun = jnp.repeat(complete, envs_each), leaves(actor, begun)
        at = jnp.where(complete, leaves(actor, ended), begun)
        masses = jnp.where(complete, mass(state.highest, hparams), 0.0)
        # At once: one update after the other would copy the tree. Of two masses for one leaf the larger is kept.
        none = jnp.concatenate([begun, leaves(actor, over)])
        every = jnp.concatenate([none, at]), jnp.concatenate([jnp.zeros(none.shape), masses])
        return Prioritised(data, sum_tree.update(state.tree, *every), state.highest)

    def sample(
        state: Prioritised,
        key: Key,
        progress: Progress,
        hparams: HParams,
        largest: Callable[[Array], Array] = lambda weight: weight,
    ) -> SequenceBatch:
        indices, masses = sum_tree.draw_with_masses(state.tree, key, batch_size)
        actor, place = jnp.divmod(indices, slots * envs_each)
        slot, env = jnp.divmod(place, envs_each)
        weights = importance(masses / sum_tree.total(state.tree), progress, hparams)
        batch = sequence.read(ring, state.data, slot, actor * envs_each + env)
        return batch._replace(weights=batch.weights * weights / largest(jnp.max(weights)), indices=indices)

    def cut(state: Prioritised, written: tuple[Array, Array]) -> Prioritised:
        actor, row = written
        return state._replace(data=_ring.cut(state.data, row, actor * envs_each, envs_each))

    def weighted(largest: Callable[[Array], Array]) -> functools.partial[SequenceBatch]:
        return functools.partial(sample, largest=largest)

    return Replay(init, add, sample, update_priorities, cut, weighted, rows=rows)
