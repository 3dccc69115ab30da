"""Tabular rounds on Ray: each learner's work of a round is a task of a node; only tables come and go.

The key, the learner's number and the round's decide all that a learner does: so it does not matter which node does
it, and a node that dies costs nothing but the time of its task.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxdqn.base import Array, Key, PyTree
from jaxdqn.parallel.asynchronous.ray_engine import Cluster, Pool
from jaxdqn.tabular.mdp import MDP
from jaxdqn.tabular.method import Method


class Node:
    """Does the work of any learner in its process."""

    def __init__(self, work: Callable[..., PyTree], mdp: MDP, key: Array) -> None:
        self._work, self._mdp, self._key = jax.jit(work), mdp, jax.random.wrap_key_data(key)

    def learn(self, given: PyTree, learner: int, number: int) -> PyTree:
        """What `Method.work` makes of `given` in round `number`."""
        return self._work(given, np.int32(learner), self._key, np.int32(number), self._mdp)


def over_nodes(
    method: Method, cluster: Cluster, num_nodes: int, key: Key, mdp: MDP, report: Callable[[str], None]
) -> Callable[..., PyTree]:
    """`method.run` on `num_nodes` Ray nodes, called as run(state, first, num_rounds).

    Raises `UserError` once all nodes are dead; the death of one is reported, and another does its work.
    """
    share, join = jax.jit(method.share), jax.jit(method.join)
    recipe = method.work, jax.tree.map(np.asarray, mdp), np.asarray(jax.random.key_data(key))
    pool = Pool([cluster.spawn(Node, *recipe) for _ in range(num_nodes)], report)

    def run(state: PyTree, first: int, num_rounds: int) -> PyTree:
        for number in range(first, first + num_rounds):
            tasks = [(share(state, np.int32(k)), k, number) for k in range(len(method.load))]
            returned = pool.map("learn", tasks)
            state = join(state, jax.tree.map(lambda *leaves: np.stack(leaves), *returned))
        return state

    return run
