"""Distributed Q-learning: M workers with experience of their own, whose tables are aggregated every H steps.

An aggregate is a weighted sum over workers with weights [M, S, A] that sum to one at every entry: a partition of
unity. `equal` is 1/M, as in federated averaging (McMahan et al., 2017, algorithm 1); `visits` weighs an entry by how
often a worker updated it since the last aggregation; `indicator` takes every state from its owner. Where workers cover
the states only jointly, `equal` dilutes an update by the M - 1 workers that could not make it; larger weights for
entries visited more often, here in proportion, mend that (Woo et al., 2025: federated Q-learning).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Key
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.tabular.mdp import MDP
from jaxdqn.tabular.method import Method, Table
from jaxdqn.tabular.q_learning import (
    OMEGA,
    Starts,
    apply_transitions,
    check_learning,
    check_round,
    empty,
    explore,
    round_key,
    starts,
)

AGGREGATES = ("equal", "visits", "indicator")


class WorkerState(NamedTuple):
    """What one worker holds."""

    table: Table
    visits: Array  # [S, A]  float: its own updates since the last aggregation


def fresh(table: Table) -> WorkerState:
    """A worker that has just taken over `table`."""
    return WorkerState(table, jnp.zeros_like(table.counts))


def local_steps(
    worker: WorkerState, key: Key, mdp: MDP, where: Starts, num_steps: int, gamma: float, omega: float
) -> WorkerState:
    """`num_steps` Q-learning updates of one worker, from starts of its own; `key` is its `round_key`."""
    batch = explore(key, mdp, where, num_steps)
    visits = worker.visits.at[batch.state, batch.action].add(batch.valid)
    return WorkerState(apply_transitions(worker.table, batch, gamma, omega), visits)


def weights(visits: Array, how: str, owned: Array | None = None) -> Array:
    """The share [M, S, A] of each worker in each entry; they sum to one over workers.

    visits [M, S, A], how one of `AGGREGATES`, owned [M, S] a partition of the states, for `indicator` only. Raises
    `UserError` for another name, and for `indicator` without owners.
    """
    if how == "equal":
        return jnp.full(visits.shape, 1.0 / len(visits))
    if how == "visits":
        total = jnp.sum(visits, axis=0)
        # Where nobody has been, all tables hold the same: the first one's value is everyone's, unrounded.
        first = (jnp.arange(len(visits)) == 0)[:, None, None]
        return jnp.where(total > 0, visits / jnp.maximum(total, 1.0), first)
    if how == "indicator":
        if owned is None:
            raise UserError("aggregate 'indicator' needs to know which worker owns which states.")
        return jnp.broadcast_to(owned[..., None], visits.shape).astype(visits.dtype)
    raise unknown_name("aggregate", how, AGGREGATES)


def aggregate(tables: Table, visits: Array, how: str, owned: Array | None = None) -> Table:
    """One table of tables [M, S, A]: action values and step-size clocks under the same `weights`.

    So the clock of an entry that one worker knows is that worker's, and that of one which all know is their mean: an
    average over M workers moves as far as one of them does.
    """
    share = weights(visits, how, owned)
    return jax.tree.map(lambda leaf: jnp.sum(share * leaf, axis=0), tables)


def distributed(
    mdp: MDP,
    regions: np.ndarray,
    num_local: int,
    how: str,
    gamma: float,
    omega: float = OMEGA,
    owned: np.ndarray | None = None,
) -> Method:
    """Q-learning by M workers that start in their regions [M, S], aggregated every `num_local` steps of each.

    A worker whose region is terminal throughout idles. Raises `UserError` for what `weights` and the step sizes refuse.
    """
    check_learning(gamma, omega)
    check_round("local_steps", num_local, len(regions))
    where = starts(mdp, regions)
    parts = None if owned is None else jnp.asarray(owned)
    weights(jnp.zeros((len(regions), 1, 1)), how, None if parts is None else parts[:, :1])  # refuses early

    def work(table: Table, k: Array, key: Key, number: Array, mdp: MDP) -> WorkerState:
        own = jax.tree.map(lambda leaf: leaf[k], where)
        return local_steps(fresh(table), round_key(key, k, number), mdp, own, num_local, gamma, omega)

    return Method(
        init=lambda: empty(mdp),
        share=lambda table, k: table,
        work=work,
        join=lambda table, workers: aggregate(workers.table, workers.visits, how, parts),
        table=lambda table: table,
        load=np.where(np.asarray(where.number) > 0, num_local, 0),
    )
