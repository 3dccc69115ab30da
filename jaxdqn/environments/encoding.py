"""How an observation is stored: small integers one-hot as bits, everything else as it is."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdqn.base import Array
from jaxdqn.errors import UserError, shown

MOST_BITS = 2**14  # of a one-hot code: 2 KB packed
BYTES = (0, 255)


class Bounds(NamedTuple):
    """The lowest and the highest value of each number of an integer observation, both included; int64 [K]."""

    low: np.ndarray
    high: np.ndarray

    @property
    def bits(self) -> int:
        return int(np.sum(self.high - self.low + 1))


def encoder(name: str, raw: jax.ShapeDtypeStruct, space: Any) -> Callable[[Array], Array]:
    """What makes the stored observation of a raw one, from the space it is declared to be in.

    Integers in at most one dimension are one-hot, each from its lowest value on; a value outside its bounds would be
    all zeros. Bytes (uint8 from 0 to 255) stay bytes, which networks scale; other uint8 in a grid become float32, and
    those of 0 and 1 bits. Everything else stays as it is. Raises `UserError` for integers without bounds, or of too
    many values.
    """
    if not categorical(raw):
        kind = of_grid(bounds(name, raw, space)) if raw.dtype == jnp.uint8 else raw.dtype
        return lambda observation: jnp.asarray(observation).astype(kind)
    low, high = limits = bounds(name, raw, space)
    if raw.dtype == jnp.uint8 and np.all((low == BYTES[0]) & (high == BYTES[1])):
        return lambda observation: jax.lax.convert_element_type(observation, raw.dtype)
    if limits.bits > MOST_BITS:
        raise UserError(
            f"environment {name!r} has integer observations of {limits.bits:,} values in all; a one-hot code has at "
            f"most {MOST_BITS:,}. Return them as float32, or as uint8 from 0 to 255."
        )
    value = np.concatenate([np.arange(first, last + 1) for first, last in zip(low, high, strict=True)])
    place = np.repeat(np.arange(len(low)), high - low + 1)
    return lambda observation: jnp.asarray(observation).astype(jnp.int32).reshape(-1)[place] == value


def of_grid(limits: Bounds) -> DTypeLike:
    """How uint8 are stored: networks divide bytes by 255, which would all but hide numbers that are small."""
    if np.all(limits.high <= 1):
        return jnp.bool_
    return jnp.uint8 if limits.high.max() == BYTES[1] else jnp.float32


def categorical(raw: jax.ShapeDtypeStruct) -> bool:
    """Whether numbers are taken as categories: integers, one or a vector. Those of a grid are taken as they are."""
    return jnp.issubdtype(raw.dtype, jnp.integer) and len(raw.shape) <= 1


def bounds(name: str, raw: jax.ShapeDtypeStruct, space: Any) -> Bounds:
    """The bounds that `space` (gymnax's or Gymnasium's) gives. Raises `UserError` where they are none."""
    start = np.asarray(getattr(space, "start", 0))
    if hasattr(space, "nvec"):  # MultiDiscrete
        low, high = start, start + np.asarray(space.nvec) - 1
    elif hasattr(space, "n") and tuple(getattr(space, "shape", ()) or ()):  # MultiBinary
        low, high = np.asarray(0), np.asarray(1)
    elif hasattr(space, "n"):
        low, high = start, start + int(space.n) - 1
    elif hasattr(space, "low") and hasattr(space, "high"):
        low, high = np.asarray(space.low, float), np.asarray(space.high, float)
        if jnp.issubdtype(space.dtype, jnp.floating):  # gymnax's FourRooms: not the bounds of categories
            low = np.minimum(low, 0)
    else:
        raise UserError(f"environment {name!r} has integer observations in {shown(space)}, which gives no bounds.")
    most = np.iinfo(np.int32)
    if not (np.all(low >= most.min) and np.all(high <= most.max) and np.all(low <= high)):  # NaN fails, too
        raise UserError(
            f"environment {name!r} has integer observations from {np.min(low):g} to {np.max(high):g}, which cannot be "
            "one-hot. Give the space small bounds, or return float32."
        )
    shape = (math.prod(raw.shape),)
    return Bounds(*(np.broadcast_to(x, raw.shape).reshape(shape).astype(np.int64) for x in (np.ceil(low), high)))
