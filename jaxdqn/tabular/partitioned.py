"""State-partitioned parallel Q-learning: K owners, each of which learns the action values of its own states only.

An owner draws transitions that start in its part, and bootstraps from its own values where s' is its own, else from
a view of the others' that is refreshed every R updates. Nothing but tables leaves an owner. The parts are disjoint, so
the whole is the indicator sum  Q(s, a) = sum_k 1[owner(s) = k] Q_k(s, a); a mean of disjoint tables would be Q / K.
"""

import functools
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
    empty,
    explore,
    round_key,
    starts,
)


class Owners(NamedTuple):
    """Who owns what, and works how much; each field [K, ...], so that owners can be spread over devices."""

    number: Array  # [K]  int, 0 .. K - 1, for keys
    owned: Array  # [K, S]  bool, a partition of the states
    starts: Starts  # [K, P] and [K]
    load: Array  # [K]  int, updates in a round


class Partitioned(NamedTuple):
    """The state of all owners."""

    tables: Table  # [K, S, A]  zero outside an owner's part
    view: Array  # [S, A]  the merged action values of the last refresh


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

    owner [S]: numbers 0 .. K - 1. Raises `UserError` where it is no such array, or refresh is below 1.
    """
    owner = np.asarray(owner)
    if owner.shape != mdp.terminal.shape or not np.issubdtype(owner.dtype, np.integer) or owner.min() < 0:
        raise UserError(f"owner must be {mdp.terminal.shape[0]} whole numbers of at least 0, one for each state.")
    if refresh < 1:
        raise UserError(f"refresh is {refresh}; it must be at least 1.")
    owned = owner == np.arange(owner.max() + 1)[:, None]
    need = (owned & ~np.asarray(mdp.terminal)).sum(axis=1)
    load = np.where(need > 0, np.maximum(1, np.round(refresh * need / need.max())), 0)
    return Owners(
        number=jnp.arange(len(owned)),
        owned=jnp.asarray(owned),
        starts=starts(mdp, owned),
        load=jnp.asarray(load, jnp.int32),
    )


def init(mdp: MDP, owners: Owners) -> Partitioned:
    """Tables of zeros."""
    table = empty(mdp)
    tables = jax.tree.map(lambda leaf: jnp.zeros((len(owners.number), *leaf.shape)), table)
    return Partitioned(tables, table.q)


def merge(tables: Array, owned: Array, axis_name: str | None = None) -> Array:
    """The indicator sum [...] of tables [K, S, A] over a partition owned [K, S], and over devices where there are any.

    Each entry is one owner's value plus zeros: exact, in any order.
    """
    total = jnp.sum(jnp.where(owned[..., None], tables, 0.0), axis=0)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def learn(
    state: Partitioned, batches: Transitions, owners: Owners, gamma: float, omega: float, axis_name: str | None = None
) -> Partitioned:
    """Each owner learns from its batch, batches [K, B], in order; then the view is refreshed."""

    def one(table: Table, batch: Transitions, owned: Array) -> Table:
        mine = batch._replace(valid=batch.valid & owned[batch.state])
        return apply_transitions(table, mine, gamma, omega, View(state.view, ~owned))

    tables = jax.vmap(one)(state.tables, batches, owners.owned)
    return Partitioned(tables, merge(tables.q, owners.owned, axis_name))


def hand_out(batch: Transitions, num_owners: int) -> Transitions:
    """One stream of transitions [B] for all owners [K, B], each of which takes only its own ones from it."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_owners, *leaf.shape)), batch)


def partitioned_round(
    state: Partitioned,
    key: Key,
    number: Array,
    mdp: MDP,
    owners: Owners,
    refresh: int,
    gamma: float,
    omega: float,
    axis_name: str | None = None,
) -> Partitioned:
    """One refresh to the next: every owner draws transitions from its own states, and learns from them."""
    keys = jax.vmap(round_key, (None, 0, None))(key, owners.number, number)
    draw = jax.vmap(functools.partial(explore, num=refresh), (0, None, 0))
    batches = draw(keys, mdp, owners.starts)
    handed_out = jnp.arange(refresh) < owners.load[:, None]
    return learn(state, batches._replace(valid=batches.valid & handed_out), owners, gamma, omega, axis_name)


def partitioned(mdp: MDP, owner: np.ndarray, refresh: int, gamma: float, omega: float = OMEGA) -> Method:
    """Q-learning by owners of disjoint parts, owner [S]; `refresh` is in updates of the busiest owner."""
    check_learning(gamma, omega)
    owners = make_owners(mdp, owner, refresh)

    def round_(state: Partitioned, key: Key, number: Array, mdp: MDP) -> Partitioned:
        return partitioned_round(state, key, number, mdp, owners, refresh, gamma, omega)

    return Method(
        init=lambda: init(mdp, owners),
        round=round_,
        table=lambda state: Table(state.view, merge(state.tables.counts, owners.owned)),
        load=np.asarray(owners.load),
    )
