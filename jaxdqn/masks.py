"""Which actions are legal: a mask that travels with the observation, and what agents do with it.

Where an environment has none, `legal_of` is None, and every function here gives back what it was given.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

ILLEGAL = -1e9
"""The value of an illegal action: below all others, and unlike -inf it may be multiplied by 0."""


class Masked(NamedTuple):
    """An observation, or its spec, with the actions that are legal in it: bool [A]."""

    observation: Any
    legal: Array


def seen(observation: Any) -> Any:
    """An observation without its mask: what networks take, and pictures show."""
    return observation.observation if isinstance(observation, Masked) else observation


def legal_of(observation: Any) -> Array | None:
    """The mask [..., A] of observations [..., *O]; all actions where none is legal, as after a termination."""
    if not isinstance(observation, Masked):
        return None
    return observation.legal | ~jnp.any(observation.legal, axis=-1, keepdims=True)


def masked(values: Array, legal: Array | None) -> Array:
    """`values` [..., A], those of illegal actions being `ILLEGAL`: no maximum, and of no weight in a softmax."""
    return values if legal is None else jnp.where(legal, values, ILLEGAL)


def count(num_actions: int, legal: Array | None) -> Array | int:
    """How many actions there are to choose from, [...] of `legal` [..., A]."""
    return num_actions if legal is None else jnp.sum(legal, axis=-1)


def nth(index: Array, legal: Array | None) -> Array:
    """The action that is the `index`-th [...] of those there are to choose from."""
    return (
        index if legal is None else jnp.argmax(jnp.cumsum(legal, axis=-1) > index[..., None], axis=-1).astype(jnp.int32)
    )
