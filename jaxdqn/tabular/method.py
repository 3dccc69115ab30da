"""A way of learning a table, as a record of pure functions, and the compiled loop over its rounds."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxdqn.base import Array, Key, PyTree
from jaxdqn.tabular.mdp import MDP


class Table(NamedTuple):
    """Action values, and the clock of their step sizes."""

    q: Array  # [S, A]  float
    counts: Array  # [S, A]  float: visits; an aggregate of tables may have fractions of one


class Method(NamedTuple):
    """A round is what happens between two exchanges of tables.

    init() -> state
    round(state, key, number [], mdp) -> state        the key is the run's; `number` counts the rounds from 0
    table(state) -> Table                             the merged table
    load: how many updates each learner makes in a round, [K]; the largest is the round's length in parallel
    """

    init: Callable[[], PyTree]
    round: Callable[[PyTree, Key, Array, MDP], PyTree]
    table: Callable[[PyTree], Table]
    load: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _run(round_: Callable[..., PyTree], state: PyTree, key: Key, first: Array, num_rounds: Array, mdp: MDP) -> PyTree:
    return jax.lax.fori_loop(0, num_rounds, lambda i, state: round_(state, key, first + i, mdp), state)


def run(method: Method, state: PyTree, key: Key, first: int, num_rounds: int, mdp: MDP) -> PyTree:
    """`state` after rounds first, first + 1, ..., first + num_rounds - 1. One compile per method."""
    return _run(method.round, state, key, first, num_rounds, mdp)
