"""A way of learning a table, as a record of pure functions, and its rounds: compiled, on one device or over several.

A round is what happens between two exchanges of tables. It comes apart into what each learner is given, what it does
with that, and what all of it makes together, so that where the learners are (lanes of a vmap, devices, processes of a
Ray cluster) changes nothing of what is learned.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdqn.base import Array, Key, PyTree
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.tabular.mdp import MDP

Function = Callable[..., PyTree]


class Table(NamedTuple):
    """Action values, and the clock of their step sizes."""

    q: Array  # [S, A]  float
    counts: Array  # [S, A]  float: visits; an aggregate of tables may have fractions of one


class Method(NamedTuple):
    """K learners and how they exchange tables.

    init() -> state
    share(state, k []) -> what learner k is given at the start of a round: tables, nothing else
    work(given, k [], key, number [], mdp) -> what it makes of that; the key is the run's, `number` counts the rounds
    join(state, returned [K, ...]) -> state
    table(state) -> Table                        the merged table
    load: how many updates each learner makes in a round, [K]; the largest is the round's length in parallel
    """

    init: Callable[[], PyTree]
    share: Callable[[PyTree, Array], PyTree]
    work: Callable[[PyTree, Array, Key, Array, MDP], PyTree]
    join: Callable[[PyTree, PyTree], PyTree]
    table: Callable[[PyTree], Table]
    load: np.ndarray


def _returned(share: Function, work: Function, learners: Array, state: PyTree, *at: PyTree) -> PyTree:
    """What the given learners return from a round, [len(learners), ...]; `at` is (key, number, mdp)."""
    return jax.vmap(lambda k: work(share(state, k), k, *at))(learners)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    functions: tuple[Function, ...], learners: Array, state: PyTree, key: Key, first: Array, num: Array, mdp: MDP
) -> PyTree:
    share, work, join = functions

    def one(i: Array, state: PyTree) -> PyTree:
        return join(state, _returned(share, work, learners, state, key, first + i, mdp))

    return jax.lax.fori_loop(0, num, one, state)


def run(method: Method, state: PyTree, key: Key, first: int, num_rounds: int, mdp: MDP) -> PyTree:
    """`state` after rounds first, first + 1, ..., first + num_rounds - 1. One compile per method."""
    functions = method.share, method.work, method.join
    return _run(functions, np.arange(len(method.load)), state, key, first, num_rounds, mdp)


def over_devices(method: Method, devices: Sequence[jax.Device], key: Key, mdp: MDP) -> Callable[..., PyTree]:
    """`run` with the K learners spread over D devices, called as run(state, first, num_rounds); every device joins
    what all of them return. Raises `UserError` where D does not divide K.
    """
    count = len(method.load)
    if count % len(devices):
        raise UserError(f"{count} learners cannot be divided over {len(devices)} devices.")
    if len(devices) == 1:
        return lambda state, first, num_rounds: run(method, state, key, first, num_rounds, mdp)

    def rounds(learners: Array, state: PyTree, key: Key, first: Array, num_rounds: Array, mdp: MDP) -> PyTree:
        def one(i: Array, state: PyTree) -> PyTree:
            mine = _returned(method.share, method.work, learners, state, key, first + i, mdp)
            return method.join(state, jax.lax.all_gather(mine, _devices.AXIS, tiled=True))

        return jax.lax.fori_loop(0, num_rounds, one, state)

    program = _devices.over_devices(rounds, devices, num_mapped=1, num_shared=5)
    learners = np.arange(count).reshape(len(devices), -1)

    def on_all(state: PyTree, first: int, num_rounds: int) -> PyTree:
        everywhere = program(learners, state, key, np.int32(first), np.int32(num_rounds), mdp)
        return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], everywhere)

    return on_all
