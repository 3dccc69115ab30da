"""A number for what an episode was like, so that equal episodes can be counted: a running hash of 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, PyTree

_ODD = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: spreads bits upwards


def extend(fingerprint: Array, observation: PyTree, reward: Array) -> Array:
    """The fingerprints [N], uint32, of episodes that had `fingerprint` [N] and go on with observation [N, *O] and
    reward [N]. Other values, or the same in another order, give another number but for one chance in 2^32."""
    arrays = [_bits(x).reshape(len(x), -1) for x in jax.tree.leaves(observation)]
    values = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)
    weights = np.random.default_rng(0).integers(0, 2**32, values.shape[1], np.uint32) | np.uint32(1)
    seen = jnp.sum(_spread(values) * weights, axis=1, dtype=jnp.uint32)
    return _spread(_spread(fingerprint ^ seen) + _bits(reward) + _ODD)  # zeros, too, make another of 0


def distinct(fingerprints: np.ndarray) -> np.ndarray:
    """How many different ones there are in each row: int [M] of [M, E]."""
    ordered = np.sort(fingerprints, axis=1)
    changes = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return np.asarray(changes + (fingerprints.shape[1] > 0))


def _bits(values: Array) -> Array:
    if jnp.issubdtype(values.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(values.astype(jnp.float32) + 0.0, jnp.uint32)  # -0.0 is 0.0
    return values.astype(jnp.uint32)


def _spread(bits: Array) -> Array:
    """A permutation of the numbers of 32 bits. Downwards too: floats such as 1.0 have their bits at the upper end."""
    bits = (bits ^ (bits >> 16)) * _ODD
    return bits ^ (bits >> 15)
