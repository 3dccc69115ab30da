"""Tabular Q-learning from exploring starts, and what its parallel forms share with it.

Letters in shapes: S states, A actions, B transitions of one batch. An exploring start is a state and an action drawn
uniformly, with one transition from there: every pair is visited alike, whatever the policy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import td
from jaxdqn.base import Array, Key
from jaxdqn.errors import UserError
from jaxdqn.tabular.mdp import MDP, outcome
from jaxdqn.tabular.method import Method, Table
from jaxdqn.tabular.planning import check_gamma

OMEGA = 0.6  # in (1/2, 1); 1/n would need exponentially many visits in 1/(1 - gamma): Even-Dar and Mansour (2003)
BLOCK = 256  # transitions drawn at once
MOST_DRAWN = 10_000_000
MOST_VISITS = 2**23  # of a pair on average: the clock of its step size is a float32, which stops at 2^24


class Transitions(NamedTuple):
    """Experience, each field [B]. `discount` is 0 where the MDP terminated; gamma is never in it.

    Those that are not `valid` fill up the batch and change nothing.
    """

    state: Array  # int
    action: Array  # int
    reward: Array  # float
    discount: Array  # float
    next_state: Array  # int
    valid: Array  # bool


class View(NamedTuple):
    """What a learner sees of tables that others hold: it bootstraps from `q` where a state is `foreign`."""

    q: Array  # [S, A]
    foreign: Array  # [S]  bool


class Starts(NamedTuple):
    """The states where a learner may start: the first `number` of `states` [P], which is padded."""

    states: Array  # [P]  int
    number: Array  # []  int


def empty(mdp: MDP) -> Table:
    """A table of zeros."""
    zeros = jnp.zeros(mdp.transition.shape[:2])
    return Table(zeros, zeros)


def starts(mdp: MDP, regions: np.ndarray) -> Starts:
    """Where each of K learners may start, regions [K, S] bool: Starts of [K, P] and [K]; maybe nowhere."""
    possible = np.asarray(regions) & ~np.asarray(mdp.terminal)
    number = possible.sum(axis=1)
    # A stable sort of "impossible" puts the possible states first, in order.
    states = np.argsort(~possible, axis=1, kind="stable")[:, : max(1, number.max())]
    return Starts(jnp.asarray(states, jnp.int32), jnp.asarray(number, jnp.int32))


def everywhere(mdp: MDP) -> Starts:
    """All non-terminal states, for one learner: Starts of [P] and []."""
    return jax.tree.map(lambda leaf: leaf[0], starts(mdp, np.ones((1, len(mdp.terminal)), bool)))


def explore(key: Key, mdp: MDP, where: Starts, num: int, num_valid: Array | int | None = None) -> Transitions:
    """`num` transitions from exploring starts; only the first `num_valid` count, and none where there is no start."""
    place, action, luck = jax.random.uniform(key, (3, num))
    # The smallest number below 1 times an integer may round up to it.
    index = jnp.minimum((place * where.number).astype(jnp.int32), jnp.maximum(where.number - 1, 0))
    state = where.states[index]
    num_actions = mdp.transition.shape[1]
    action = jnp.minimum((action * num_actions).astype(jnp.int32), num_actions - 1)
    result = jax.vmap(outcome, (0, None, 0, 0))(luck, mdp, state, action)
    valid = (jnp.arange(num) < (num if num_valid is None else num_valid)) & (where.number > 0)
    return Transitions(state, action, result.reward, result.discount, result.next_state, valid)


def apply_transitions(
    table: Table, batch: Transitions, gamma: float, omega: float, bootstrap: View | None = None
) -> Table:
    """Q-learning on `batch`, one transition after the other: duplicates in it see each other's update.

    Q(s, a) += n(s, a)^-omega (r + gamma * discount * max Q(s', .) - Q(s, a)), with n counting this visit too. Watkins
    and Dayan (1992); for the step size Even-Dar and Mansour (2003). Q(s', .) is the table's own, or `bootstrap`'s.
    """

    def update(table: Table, item: Transitions) -> tuple[Table, None]:
        q_tm1, pair = table.q[item.state], (item.state, item.action)
        q_t = table.q[item.next_state]
        if bootstrap is not None:
            q_t = jnp.where(bootstrap.foreign[item.next_state], bootstrap.q[item.next_state], q_t)
        error = td.q_learning(q_tm1, item.action, item.reward, gamma * item.discount, q_t)
        visits = table.counts[pair] + 1.0
        new = q_tm1[item.action] + visits**-omega * error
        return Table(
            table.q.at[pair].set(jnp.where(item.valid, new, q_tm1[item.action])),
            table.counts.at[pair].set(jnp.where(item.valid, visits, visits - 1.0)),
        ), None

    return jax.lax.scan(update, table, batch)[0]


def round_key(key: Key, worker: Array | int, number: Array | int) -> Key:
    """The key of a worker's round: nothing else decides its experience, so that any process can replay it."""
    return jax.random.fold_in(jax.random.fold_in(key, worker), number)


def check_learning(gamma: float, omega: float) -> None:
    """Raises `UserError` for gamma outside [0, 0.99999] and omega outside (0, 1]."""
    check_gamma(gamma)
    if not 0 < omega <= 1:
        raise UserError(f"omega is {omega}; it must lie in (0, 1].")


def check_round(name: str, num: int, num_learners: int = 1) -> None:
    """Raises `UserError` for a round of no transitions, or of more than are drawn at once."""
    if num < 1:
        raise UserError(f"{name} is {num}; it must be at least 1.")
    if num * num_learners > MOST_DRAWN:
        raise UserError(
            f"{name} {num:,} of {num_learners:,} learners are drawn at once; {MOST_DRAWN:,} transitions are the most: "
            f"lower {name}."
        )


def q_learning(mdp: MDP, gamma: float, omega: float = OMEGA, block: int = BLOCK) -> Method:
    """Plain Q-learning, drawing its transitions in blocks."""
    check_learning(gamma, omega)
    check_round("block", block)
    where = everywhere(mdp)

    def work(table: Table, k: Array, key: Key, number: Array, mdp: MDP) -> Table:
        return apply_transitions(table, explore(round_key(key, k, number), mdp, where, block), gamma, omega)

    return Method(
        init=lambda: empty(mdp),
        share=lambda table, k: table,
        work=work,
        join=lambda table, returned: jax.tree.map(lambda leaf: leaf[0], returned),
        table=lambda table: table,
        load=np.asarray([block]),
    )
