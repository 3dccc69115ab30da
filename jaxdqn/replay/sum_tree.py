"""A sum tree of fan-out 16: masses [leaves], and above them the sums of groups of 16, up to one group.

Draws are proportional to mass. Float32 does not drift, as what is touched is summed again from its children. It may lie
in a loop's carry, under `vmap` and `pmap`: writes are slices and scatters in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdqn.base import Array, Key

FAN_OUT = 16
_SUMS = np.vstack([np.eye(FAN_OUT), np.tri(FAN_OUT + 1, FAN_OUT, -1)]).astype(np.float32)
"""[33, 16]: this times a group's masses are these masses, the sums before each of them, and the sum of all."""


class Tree(NamedTuple):
    """`levels`: the leaves first, each other level the sums of groups of the one below; float32, padded with zeros by
    two groups more than is used, so that no slice at the end is clamped."""

    levels: tuple[Array, ...]


def empty(size: int) -> Tree:
    """A tree of `size` leaves of mass 0."""
    counts = [size]
    while counts[-1] > FAN_OUT:
        counts.append(-(-counts[-1] // FAN_OUT))
    return Tree(tuple(jnp.zeros((-(-count // FAN_OUT) + 2) * FAN_OUT) for count in counts))


def write(tree: Tree, start: Array, values: Array) -> Tree:
    """The masses from leaf `start` [] on become `values` [len], within the leaves: one slice a level."""
    return write_all(tree, (start, values))


def write_all(tree: Tree, *slices: tuple[Array, Array]) -> Tree:
    """The same for several (start, values), the later ones above the earlier. Level by level: a second `write` would
    have the first one's levels copied, as it reads what that has written.

    `len` leaves lie in at most ceil((len - 1) / 16) + 1 groups.
    """
    levels = [_written(tree.levels[0], slices)]
    for level in tree.levels[1:]:
        slices = tuple((start // FAN_OUT, _sums(levels[-1], start, len(values))) for start, values in slices)
        levels.append(_written(level, slices))
    return Tree(tuple(levels))


def update(tree: Tree, indices: Array, values: Array) -> Tree:
    """The masses at `indices` [B] become `values` [B]; an index that is there twice keeps the larger of its values."""
    levels = [tree.levels[0].at[indices].set(values).at[indices].max(values)]
    for level in tree.levels[1:]:
        indices = indices // FAN_OUT
        levels.append(level.at[indices].set(jnp.sum(_groups(levels[-1])[indices], axis=1)))
    return Tree(tuple(levels))


def draw(tree: Tree, key: Key, count: int) -> Array:
    """`count` leaves, int32 [count], each drawn in proportion to its mass; none of mass 0 where any has more."""
    return draw_with_masses(tree, key, count)[0]


def draw_with_masses(tree: Tree, key: Key, count: int) -> tuple[Array, Array]:
    """`draw`, and the masses [count] of what is drawn. To look them up in a loop that also updates them would cost a
    copy of all leaves."""
    # One float32 for all levels would leave 6 % of 2^20 leaves unreachable.
    return descend(tree, jax.random.uniform(key, (len(tree.levels), count)))


def descend(tree: Tree, uniforms: Array) -> tuple[Array, Array]:
    """The leaves, int32 [B], and their masses that numbers in [0, 1), [levels, B], choose from the top down: in each
    group the last child with a mass that begins within this part of the group's sum."""
    chosen, mass = jnp.zeros(uniforms.shape[1], jnp.int32), uniforms[0]
    for level, uniform in zip(reversed(tree.levels), uniforms, strict=True):
        # A product is faster than a cumulative sum, most so with the batch last, and reads the level once, before
        # anything is written. However it rounds, the first child begins at exactly 0. Child by child, all levels in one
        # pass over the batch, it takes a third of the time alone, but in a training step XLA copies the leaves for it.
        sums = jnp.matmul(_SUMS, _groups(level)[chosen].T, precision=lax.Precision.HIGHEST)
        masses, begins, end = sums[:FAN_OUT], sums[FAN_OUT:-1], sums[-1]
        child = jnp.arange(FAN_OUT)[:, None]
        last = jnp.max(jnp.where((masses > 0) & (begins <= uniform * end), child, 0), axis=0)
        chosen, mass = chosen * FAN_OUT + last, jnp.sum(jnp.where(child == last, masses, 0.0), axis=0)
    return chosen, mass


def total(tree: Tree) -> Array:
    """The sum of all masses, []."""
    return jnp.sum(tree.levels[-1])


def leaves(tree: Tree, indices: Array) -> Array:
    """The masses of leaves, of the shape of `indices`."""
    return tree.levels[0][indices]


def _groups(level: Array) -> Array:
    return level.reshape(-1, FAN_OUT)


def _written(level: Array, slices: tuple[tuple[Array, Array], ...]) -> Array:
    for start, values in slices:
        level = lax.dynamic_update_slice(level, values, (start,))
    return level


def _sums(level: Array, start: Array, length: int) -> Array:
    """Of the groups in which `length` masses from `start` [] on lie."""
    touched = -(-(length - 1) // FAN_OUT) + 1
    children = lax.dynamic_slice(level, (start // FAN_OUT * FAN_OUT,), (touched * FAN_OUT,))
    return jnp.sum(children.reshape(touched, FAN_OUT), axis=1)
