"""Proportional prioritised replay over the ring: drawn by the size of errors, and weighted for that.

A priority is |error| + epsilon; to the power alpha it is a mass in the sum tree. What is new gets the highest priority
there ever was, or what its actor brings, once its return is complete: until then it has mass 0, as what was never
written. Leaves are time-major and region by region, so that an actor's block is one slice of them.

Schaul et al. (2016), sections 3.3 and 3.4; Horgan et al. (2018) for priorities from actors.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxdqn.base import Array, Batch, Key, Progress, PyTree, Replay, Transition
from jaxdqn.config import HParams
from jaxdqn.errors import UserError
from jaxdqn.exploration import linear_schedule
from jaxdqn.replay import ring as _ring
from jaxdqn.replay import sum_tree
from jaxdqn.replay.ring import Stored
from jaxdqn.replay.sum_tree import Tree

EDGES = ("1e-4", "1e-3", "1e-2", "1e-1", "1e0", "1e1")  # of the histogram of priorities, as columns spell them
LEAST, MOST = 1e-14, 1e14  # of a mass, so that no total overflows, and no chance of being drawn is 0


class Prioritised(NamedTuple):
    """`data` is the ring, [rows, actors * N, ...]; `tree` has a mass for each of its places; `waiting` [actors, late *
    T, N] are the priorities of what is not complete (infinity: the highest); `highest` [] is the largest ever."""

    data: Stored
    tree: Tree
    waiting: Array
    highest: Array


def late(span: int, block: int) -> int:
    """Blocks that must follow the one in which a transition starts that reaches over `span` rows."""
    return -(-(span - 1) // block)


def raised(priorities: Array, hparams: HParams) -> Array:
    """|error| + epsilon; what is not finite counts as an error of 0."""
    return jnp.where(jnp.isfinite(priorities), priorities, 0.0) + hparams.priority_epsilon


def mass(priorities: Array, hparams: HParams) -> Array:
    """p^alpha, and 0 where p is 0, also to the power of 0."""
    return jnp.where(priorities > 0, jnp.clip(priorities**hparams.priority_exponent, LEAST, MOST), 0.0)


def importance(chances: Array, progress: Progress, hparams: HParams) -> Array:
    """P(i)^-beta: importance weights but for a factor. Section 3.4."""
    ends = hparams.importance_begin, hparams.importance_end
    beta = linear_schedule(*ends, hparams.importance_updates, progress.updates)
    return chances**-beta


def update_priorities(state: PyTree, indices: Array, priorities: Array, hparams: HParams) -> PyTree:
    """A state with a `tree` and the `highest` priority, of any prioritised replay, with new `priorities` [B]."""
    priorities = raised(priorities, hparams)
    tree = sum_tree.update(state.tree, indices, mass(priorities, hparams))
    return state._replace(tree=tree, highest=jnp.maximum(state.highest, jnp.max(priorities)))


def describe_masses(tree: Tree, ages: Array, num_envs: int, hparams: HParams) -> dict[str, Array]:
    """The expected age of what `tree` draws, of its leaves' `ages` [K], num_envs leaves each; and the fractions of the
    leaves that it can draw with a priority below each of `EDGES`, NaN with an exponent of 0, which forgets them."""
    masses = tree.levels[0][: len(ages) * num_envs].reshape(len(ages), num_envs)
    by_age, alpha = jnp.sum(masses, axis=1), jnp.asarray(hparams.priority_exponent, jnp.float32)
    drawable = jnp.sum(masses > 0)

    def below(edge: float) -> Array:
        found = jnp.sum((masses > 0) & (masses < edge**alpha)) / drawable
        return jnp.where(alpha > 0, found, jnp.nan)

    fractions = {f"priorities_below_{name}": below(float(name)) for name in EDGES}
    return {"replay_age": jnp.sum(by_age * ages) / jnp.sum(by_age), **fractions}


def prioritised(
    example: Transition,
    rows: int,
    num_envs: int,
    batch_size: int,
    n_step: int = 1,
    block_length: int = 1,
    copies: int = 2,
) -> Replay:
    """A ring of rows x num_envs transitions, drawn by priority as m-step transitions (m <= n_step).

    It is written in blocks of `block_length` rows (with n_step 1, of any); more than `late` of them must come before
    a batch. Weights are relative to the largest of the batch. State: a `Prioritised`.
    """
    one = prioritised_regions(example, rows, 1, num_envs, batch_size, n_step, block_length, copies)

    def add(
        state: Prioritised, block: Transition, written: Array, hparams: HParams, priorities: Array | None = None
    ) -> Prioritised:
        added: Prioritised = one.add(state, block, (0, written), hparams, priorities)
        return added

    def describe(state: Prioritised, progress: Progress, hparams: HParams) -> dict[str, Array]:
        return describe_masses(state.tree, (progress.written - 1 - jnp.arange(rows)) % rows, num_envs, hparams)

    return one._replace(add=add, cut=None, describe=describe)


def prioritised_regions(
    example: Transition,
    rows: int,
    num_actors: int,
    envs_each: int,
    batch_size: int,
    n_step: int = 1,
    block_length: int = 1,
    copies: int = 2,
) -> Replay:
    """The same with a region of rows x envs_each transitions for each actor, drawn from all of them.

    add(state, block [T, envs_each], (actor [], written []), hparams, priorities=None) writes actor's next rows. Raises
    `UserError` for a ring in which a block would be overwritten before its returns are complete.
    """
    ring = _ring.layout(example, rows, num_actors * envs_each, copies)
    blocks_late = late(_ring.span(ring, n_step), block_length)
    needed = (blocks_late + 1) * block_length + ring.history
    if blocks_late and needed > rows:
        raise UserError(
            f"n_step {n_step} by priority, written in blocks of {block_length} rows, needs {needed} rows of "
            f"{ring.num_envs} transitions, and the replay holds {rows}; raise replay_capacity, or write smaller blocks."
        )

    def init() -> Prioritised:
        tree = sum_tree.empty(rows * ring.num_envs)
        waiting = jnp.zeros((num_actors, blocks_late * block_length, envs_each))
        return Prioritised(_ring.empty(ring), tree, waiting, jnp.float32(1))

    def at(actor: Array, row: Array, masses: Array) -> tuple[Array, Array]:
        return (actor * rows + row % rows) * envs_each, masses.reshape(-1)

    def add(
        state: Prioritised,
        block: Transition,
        written: tuple[Array, Array],
        hparams: HParams,
        priorities: Array | None = None,
    ) -> Prioritised:
        (actor, row), length, highest = written, len(block.reward), state.highest
        if blocks_late and length != block_length:
            raise ValueError(f"a block of {length} rows; with n_step {n_step} all have {block_length}.")
        entering = jnp.full(block.reward.shape, jnp.inf)
        if priorities is not None:
            entering = raised(priorities, hparams)
            highest = jnp.maximum(highest, jnp.max(entering))
        known = jnp.concatenate([state.waiting[actor], entering])
        complete, waiting = known[:length], known[length:]

        data = _ring.write(ring, state.data, block, row, actor * envs_each)
        due, place = row - len(waiting), (row - len(waiting) + jnp.arange(-ring.history, length)) % rows
        ends = lax.dynamic_slice_in_dim(data.ends[place], actor * envs_each, envs_each, 1)
        masses = jnp.where(_ring.void(ring, ends), 0.0, mass(jnp.minimum(complete, highest), hparams))
        # Nothing starts in this block yet, nor where a stack of frames would reach into it.
        none = [at(actor, row + ahead, jnp.zeros_like(entering)) for ahead in range(0, length + ring.history, length)]
        tree = sum_tree.write_all(state.tree, *(none if blocks_late else []), at(actor, due, masses))
        waiting = lax.dynamic_update_index_in_dim(state.waiting, waiting, actor, 0)
        return Prioritised(data, tree, waiting, highest)

    def sample(
        state: Prioritised,
        key: Key,
        progress: Progress,
        hparams: HParams,
        largest: Callable[[Array], Array] = lambda weight: weight,
    ) -> Batch:
        indices, masses = sum_tree.draw_with_masses(state.tree, key, batch_size)
        actor, place = jnp.divmod(indices, rows * envs_each)
        row, env = jnp.divmod(place, envs_each)
        batch = _ring.n_step_batch(ring, state.data, row, actor * envs_each + env, n_step, hparams)
        weights = importance(masses / sum_tree.total(state.tree), progress, hparams)
        return batch._replace(weights=weights / largest(jnp.max(weights)), indices=indices)

    def cut(state: Prioritised, written: tuple[Array, Array]) -> Prioritised:
        actor, row = written
        return state._replace(data=_ring.cut(state.data, row, actor * envs_each, envs_each))

    def weighted(largest: Callable[[Array], Array]) -> functools.partial[Batch]:
        return functools.partial(sample, largest=largest)

    return Replay(init, add, sample, update_priorities, cut, weighted, rows=rows)
