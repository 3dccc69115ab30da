"""State-partitioned parallel Q-learning: K owners, each of which learns the action values of its own states only.

An owner draws transitions that start in its part, and bootstraps from its own values where s' is its own, else from
a view of the others' that is refreshed every R updates. Nothing but tables leaves an owner. The parts are disjoint, so
the whole is the indicator sum  Q(s, a) = sum_k 1[owner(s) = k] Q_k(s, a); a mean of disjoint tables would be Q / K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Key
from jaxdqn.errors import UserError
from jaxdqn.tabular.mdp import MDP
from jaxdqn.tabular.method import Method, Table
from jaxdqn.tabular.q_learning import (
    OMEGA,
    Starts,
    Transitions,
    View,
    apply_transitions,
    check_learning,
    check_round,
    empty,
    explore,
    round_key,
    starts,
)


class Owners(NamedTuple):
    """Who owns what, and works how much; each field [K, ...]."""

    owned: Array  # [K, S]  bool, a partition of the states
    starts: Starts  # [K, P] and [K]
    load: Array  # [K]  int, updates in a round


class Partitioned(NamedTuple):
    """The state of all owners."""

    tables: Table  # [K, S, A]  zero outside an owner's part
    view: Array  # [S, A]  the merged action values of the last refresh


class Given(NamedTuple):
    """What one owner is given at the start of a round."""

    table: Table  # [S, A]  its own
    view: Array  # [S, A]  the merged action values


def contiguous(num_states: int, num_owners: int) -> np.ndarray:
    """The owner of each state [S]: parts of consecutive states, of sizes that differ by at most one."""
    if not 1 <= num_owners <= num_states:
        raise UserError(
            f"{num_owners} owners cannot share {num_states} states; there must be 1 to {num_states} of them."
        )
    return np.arange(num_states) * num_owners // num_states


def make_owners(mdp: MDP, owner: np.ndarray, refresh: int) -> Owners:
    """Hands out work by need: the owner with the most start states makes `refresh` updates a round, others in
    proportion (at least one; none where nothing can be learned), so that all pairs are visited alike.

    owner [S]: numbers 0 .. K - 1. Raises `UserError` where it is no such array, and for a refresh below 1 or too long.
    """
    owner = np.asarray(owner)
    if owner.shape != mdp.terminal.shape or not np.issubdtype(owner.dtype, np.integer) or owner.min() < 0:
        raise UserError(f"owner must be {mdp.terminal.shape[0]} whole numbers of at least 0, one for each state.")
    check_round("refresh", refresh, int(owner.max()) + 1)
    owned = owner == np.arange(owner.max() + 1)[:, None]
    need = (owned & ~np.asarray(mdp.terminal)).sum(axis=1)
    load = np.where(need > 0, np.maximum(1, np.round(refresh * need / need.max())), 0)
    return Owners(
        owned=jnp.asarray(owned),
        starts=starts(mdp, owned),
        load=jnp.asarray(load, jnp.int32),
    )


def init(mdp: MDP, owners: Owners) -> Partitioned:
    """Tables of zeros."""
    table = empty(mdp)
    tables = jax.tree.map(lambda leaf: jnp.zeros((len(owners.owned), *leaf.shape)), table)
    return Partitioned(tables, table.q)


def merge(tables: Array, owned: Array) -> Array:
    """The indicator sum [S, A] of tables [K, S, A] over a partition owned [K, S]: one value plus zeros, so exact."""
    return jnp.sum(jnp.where(owned[..., None], tables, 0.0), axis=0)


def learn(table: Table, view: Array, batch: Transitions, owned: Array, gamma: float, omega: float) -> Table:
    """One owner learns from those transitions of a batch [B] that start in its part, owned [S], in their order."""
    mine = batch._replace(valid=batch.valid & owned[batch.state])
    return apply_transitions(table, mine, gamma, omega, View(view, ~owned))


def partitioned(mdp: MDP, owner: np.ndarray, refresh: int, gamma: float, omega: float = OMEGA) -> Method:
    """Q-learning by owners of disjoint parts, owner [S]; `refresh` is in updates of the busiest owner."""
    check_learning(gamma, omega)
    owners = make_owners(mdp, owner, refresh)

    def work(given: Given, k: Array, key: Key, number: Array, mdp: MDP) -> Table:
        own = jax.tree.map(lambda leaf: leaf[k], owners)
        batch = explore(round_key(key, k, number), mdp, own.starts, refresh, own.load)
        return learn(given.table, given.view, batch, own.owned, gamma, omega)

    return Method(
        init=lambda: init(mdp, owners),
        share=lambda state, k: Given(jax.tree.map(lambda leaf: leaf[k], state.tables), state.view),
        work=work,
        join=lambda state, tables: Partitioned(tables, merge(tables.q, owners.owned)),
        table=lambda state: Table(state.view, merge(state.tables.counts, owners.owned)),
        load=np.asarray(owners.load),
    )
