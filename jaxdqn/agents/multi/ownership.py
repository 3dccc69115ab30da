"""Who owns a state: owner(observation [*O]) -> int32 [] in [0, K), a partition of the state space into K regions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, PyTree, Spec
from jaxdqn.masks import seen

Owner = Callable[[PyTree], Array]


def flat(observation: PyTree) -> Array:
    """One observation [*O] as a vector, float32."""
    return jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(seen(observation))])


def directions(spec: Spec, num_owners: int) -> Owner:
    """The nearest in angle of K fixed random directions: what a spec alone allows, without bounds or experience.

    One-hot and sparse binary observations spread evenly over the owners, vectors around 0 roughly so; images that
    mostly stay the same do not, nor do vectors far from 0. The directions depend on nothing but
    the shape and K, so that a saved run keeps its owners. (They are the hash of Andoni et al., 2015, "cross-polytope",
    with Gaussian directions.)
    """
    size = sum(int(np.prod(leaf.shape, dtype=int)) for leaf in jax.tree.leaves(seen(spec.observation)))
    # NumPy guarantees this generator's stream from version to version.
    drawn = np.random.RandomState(0).normal(size=(num_owners, size)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return lambda observation: jnp.argmax(jnp.asarray(drawn) @ flat(observation)).astype(jnp.int32)


def loads(owner: Owner, num_owners: int, observation: Array) -> Array:
    """The fraction of observations [B, *O] in each region, [K]; they sum to 1."""
    owners = jax.vmap(owner)(observation)
    return jnp.mean((owners[:, None] == jnp.arange(num_owners)).astype(jnp.float32), axis=0)
