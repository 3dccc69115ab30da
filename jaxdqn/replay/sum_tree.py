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
_BEGINS_AND_TOTAL = np.triu(np.ones((FAN_OUT, FAN_OUT + 1), np.float32), 1)
"""[16, 17]: a group's masses times this are the sums before each of them, and of all."""


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
    """The masses from leaf `start` [] on become `values` [len], within the leaves: one slice a level.

    `len` leaves lie in at most ceil((len - 1) / 16) + 1 groups.
    """
    levels = [lax.dynamic_update_slice(tree.levels[0], values, (start,))]
    for level in tree.levels[1:]:
        start, touched = start // FAN_OUT, -(-(len(values) - 1) // FAN_OUT) + 1
        children = lax.dynamic_slice(levels[-1], (start * FAN_OUT,), (touched * FAN_OUT,))
        values = jnp.sum(children.reshape(touched, FAN_OUT), axis=1)
        levels.append(lax.dynamic_update_slice(level, values, (start,)))
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
    # One float32 for all levels would leave 6 % of 2^20 leaves unreachable.
    return descend(tree, jax.random.uniform(key, (len(tree.levels), count)))


def descend(tree: Tree, uniforms: Array) -> Array:
    """The leaves, int32 [B], that numbers in [0, 1), [levels, B], choose from the top down: in each group the last
    child with a mass that begins within this part of the group's sum."""
    chosen = jnp.zeros(uniforms.shape[1], jnp.int32)
    for level, uniform in zip(reversed(tree.levels), uniforms, strict=True):
        children = _groups(level)[chosen]
        # A product is a third faster than a cumulative sum. However it rounds, the first child begins at exactly 0.
        sums = jnp.matmul(children, _BEGINS_AND_TOTAL, precision=lax.Precision.HIGHEST)
        within = (children > 0) & (sums[:, :-1] <= uniform[:, None] * sums[:, -1:])
        chosen = chosen * FAN_OUT + jnp.max(jnp.where(within, jnp.arange(FAN_OUT), 0), axis=1)
    return chosen


def total(tree: Tree) -> Array:
    """The sum of all masses, []."""
    return jnp.sum(tree.levels[-1])


def leaves(tree: Tree, indices: Array) -> Array:
    """The masses of leaves, of the shape of `indices`."""
    return tree.levels[0][indices]


def _groups(level: Array) -> Array:
    return level.reshape(-1, FAN_OUT)
