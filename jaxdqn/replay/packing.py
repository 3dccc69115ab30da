"""Compact storage: how one field of a transition is kept in the ring, and decoded after sampling."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Frames


class Codec(NamedTuple):
    """encode/decode act on trailing dimensions; `stored` is the shape and dtype of one encoded item.

    Of a stack of `frames` only the newest is encoded; `decode` takes that many, [F, ...] with the oldest first, and
    which of them are missing [F, ...], as they are before an episode's first.
    """

    encode: Callable[[Array], Array]
    decode: Callable[..., Array]
    stored: jax.ShapeDtypeStruct
    frames: int = 0


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


def frame_codec(example: Any) -> Codec:
    """The storage of items like `example`: `Frames` as their newest frame, everything else as `codec` has it."""
    if not isinstance(example, Frames):
        return codec(plain(example))
    *shape, frames = example.shape
    one = codec(jax.ShapeDtypeStruct(tuple(shape), example.dtype))

    def decode(stored: Array, missing: Array) -> Array:
        found = one.decode(stored)
        if example.padding == "zeros":
            found = jnp.where(missing.reshape(*missing.shape, *(1,) * len(shape)), jnp.zeros_like(found), found)
        return jnp.moveaxis(found, 0, -1)

    return Codec(lambda stack: one.encode(stack[..., -1]), decode, one.stored, frames)


def plain(example: Any) -> jax.ShapeDtypeStruct:
    """`example` without what it says of frames: to be stored whole."""
    return jax.ShapeDtypeStruct(example.shape, example.dtype)
