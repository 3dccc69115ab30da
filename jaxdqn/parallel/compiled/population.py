"""Populations: many members (seeds and hyperparameters) over the functions of one, without a second loop.

Members lie in lanes: each device has L of them, in stacks of W lanes that run vmapped; stacks run one after the other,
as separate calls of one program on separate arrays. W = 1 runs every member as its own single run would (measured: a
CPU core is fastest with one member at a time, its arrays in cache); W = L vmaps them all (a GPU).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxdqn.base import PyTree
from jaxdqn.config import HParams


def fastest_width(platform: str, num_lanes: int) -> int:
    """How many of a device's lanes to vmap into one program: one on a CPU, all elsewhere."""
    return 1 if platform == "cpu" else num_lanes


def over_lanes(function: Callable[..., PyTree], num_shared: int = 0) -> Callable[..., PyTree]:
    """function(*mapped, *shared) over the leading axis [W] of the mapped arguments: vmapped, or for W = 1 as it is."""

    def run(*args: object) -> PyTree:
        split = len(args) - num_shared
        mapped, shared = args[:split], args[split:]
        if jax.tree.leaves(mapped)[0].shape[0] > 1:
            return jax.vmap(function, in_axes=(0,) * split + (None,) * num_shared)(*args)
        only = function(*jax.tree.map(lambda x: x[0], mapped), *shared)
        return jax.tree.map(lambda x: x[None], only)

    return run


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

    def place(self, values: np.ndarray) -> np.ndarray:
        """Values [M, shards, ...] laid out for D = G * shards devices, [D, L, ...]."""
        laid = np.moveaxis(values[np.maximum(self.members, 0)], 2, 1)  # [G, shards, L, ...]
        return laid.reshape(laid.shape[0] * laid.shape[1], *laid.shape[2:])  # no -1: there may be no elements

    def spread(self, values: np.ndarray, shards: int) -> np.ndarray:
        """The same values [M, ...] on all shards of a member, [D, L, ...]."""
        return self.place(np.repeat(values[:, None], shards, axis=1))

    def collect(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `place`: [D, L, ...] -> [M, shards, ...], members in order, dead lanes left out."""
        groups, lanes = self.members.shape
        shards = values.shape[0] // groups
        by_lane = np.moveaxis(values.reshape(groups, shards, *values.shape[1:]), 1, 2)
        flat = by_lane.reshape(groups * lanes, shards, *values.shape[2:])
        order = self.members.reshape(-1)
        alive = np.flatnonzero(order >= 0)
        return flat[alive[np.argsort(order[alive])]]


def assign(num_members: int, num_groups: int, least_lanes: int = 1) -> Assignment:
    """Members dealt out evenly over groups of devices; the last lanes are dead where they do not divide, or where
    there would be less than `least_lanes`."""
    lanes = max(-(-num_members // num_groups), least_lanes)
    padded = np.full(num_groups * lanes, -1)
    padded[:num_members] = np.arange(num_members)
    # Dealt like cards, so that dead lanes fall on different devices.
    return Assignment(padded.reshape(lanes, num_groups).T.copy())


def stack_hparams(settings: list[HParams]) -> HParams:
    """A list of `HParams` as one `HParams` of float32 arrays [M]."""
    return jax.tree.map(lambda *values: np.asarray(values, np.float32), *settings)
