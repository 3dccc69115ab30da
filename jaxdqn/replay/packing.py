"""Compact storage: how one field of a transition is kept in the ring, and decoded after sampling."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array


class Codec(NamedTuple):
    """encode/decode act on trailing dimensions; `stored` is the shape and dtype of one encoded item."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    stored: jax.ShapeDtypeStruct


def codec(example: jax.ShapeDtypeStruct) -> Codec:
    """The storage of items like `example`: bool grids of at least 8 cells as bits, everything else as it is."""
    size = math.prod(example.shape)
    if example.dtype != jnp.bool_ or size < 8:
        return Codec(lambda x: x, lambda x: x, example)

    def encode(grid: Array) -> Array:
        leading = grid.shape[: grid.ndim - len(example.shape)]
        return jnp.packbits(grid.reshape(*leading, size), axis=-1)

    def decode(bits: Array) -> Array:
        cells = jnp.unpackbits(bits, axis=-1, count=size)
        return cells.reshape(*bits.shape[:-1], *example.shape).astype(jnp.bool_)

    return Codec(encode, decode, jax.ShapeDtypeStruct((-(-size // 8),), jnp.uint8))
