"""Populations: many members (seeds and hyperparameters) over the functions of one, without a second loop.

Members lie in lanes. A device runs its lanes vmapped, or one after the other; which is faster depends on the backend
(measured: a CPU core is fastest with one member at a time, its arrays in cache; a GPU with all at once).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdqn.base import PyTree

How = Literal["vmap", "sequential"]


def fastest(platform: str) -> How:
    """How one device of `platform` runs its lanes fastest."""
    return "sequential" if platform == "cpu" else "vmap"


def over_lanes(function: Callable[..., PyTree], how: How) -> Callable[..., PyTree]:
    """function(*args) over the leading axis [L] of all arguments; the results are stacked."""
    if how == "vmap":
        return jax.vmap(function)
    return lambda *args: lax.map(lambda lane: function(*lane), args)


def carry_over_lanes(run: Callable[..., PyTree], how: How) -> Callable[..., PyTree]:
    """run(carry, hparams, *shared) -> carry over the leading axis [L] of carry and hparams.

    Sequential lanes run one after the other, each for the whole call, and are updated in place: that takes the
    temporaries of one member, where a mapped loop would hold a second copy of every ring.
    """

    def vmapped(carries: PyTree, hparams: PyTree, *shared: Any) -> PyTree:
        return jax.vmap(run, in_axes=(0, 0, *(None for _ in shared)))(carries, hparams, *shared)

    def sequential(carries: PyTree, hparams: PyTree, *shared: Any) -> PyTree:
        def lane(index: Any, carries: PyTree) -> PyTree:
            carry, setting = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), (carries, hparams)
            )
            new = run(carry, setting, *shared)
            return jax.tree.map(lambda old, x: lax.dynamic_update_index_in_dim(old, x, index, 0), carries, new)

        num_lanes = jax.tree.leaves(carries)[0].shape[0]
        if num_lanes > 1:
            return lax.fori_loop(0, num_lanes, lane, carries)
        only = run(*jax.tree.map(lambda x: x[0], (carries, hparams)), *shared)
        return jax.tree.map(lambda x: x[None], only)

    return vmapped if how == "vmap" else sequential


class Assignment(NamedTuple):
    """Which member runs where: members [G, L] for G groups of devices with L lanes each; -1 marks a dead lane, which
    repeats the first member's work so that all devices run one program, and appears in no result."""

    members: np.ndarray

    @property
    def num_lanes(self) -> int:
        return int(self.members.shape[1])

    @property
    def num_members(self) -> int:
        return int((self.members >= 0).sum())

    def spread(self, values: np.ndarray, shards: int) -> np.ndarray:
        """Per-member values [M, ...] laid out for D = G * shards devices, [D, L, ...]."""
        return np.repeat(values[np.maximum(self.members, 0)], shards, axis=0)

    def collect(self, values: np.ndarray) -> np.ndarray:
        """The inverse: [D, L, ...] -> [M, shards, ...], members in order."""
        groups, lanes = self.members.shape
        shards = values.shape[0] // groups
        by_lane = np.moveaxis(values.reshape(groups, shards, *values.shape[1:]), 1, 2)
        flat = by_lane.reshape(groups * lanes, shards, *values.shape[2:])
        order = self.members.reshape(-1)
        alive = np.flatnonzero(order >= 0)
        return flat[alive[np.argsort(order[alive])]]


def assign(num_members: int, num_groups: int) -> Assignment:
    """Members dealt out evenly over groups of devices; the last lanes are dead where they do not divide."""
    lanes = -(-num_members // num_groups)
    padded = np.full(num_groups * lanes, -1)
    padded[:num_members] = np.arange(num_members)
    # Dealt like cards, so that dead lanes fall on different devices.
    return Assignment(padded.reshape(lanes, num_groups).T.copy())


def stack_hparams(settings: list[Any]) -> Any:
    """A list of `HParams` as one `HParams` of float32 arrays [M]."""
    return jax.tree.map(lambda *values: np.asarray(values, np.float32), *settings)


def float_hparams(hparams: Any) -> Any:
    """`HParams` as traced-ready float32 scalars."""
    return jax.tree.map(jnp.float32, hparams)
