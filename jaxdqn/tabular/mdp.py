"""Markov decision processes as arrays, with S states and A actions; the named ones are gymnax's own dynamics."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Key
from jaxdqn.config import LARGEST
from jaxdqn.errors import UserError, shown, unknown_name
from jaxdqn.tabular import dynamics

MOST_NUMBERS = 50_000_000  # of an array [S, A, S]
RANDOM_STATES, RANDOM_ACTIONS, RANDOM_BRANCHES = 50, 4, 5


class MDP(NamedTuple):
    """A finite MDP; make one with `from_arrays`, which checks it and fills `cumulative`.

    A terminal state stays where it is and earns nothing; it is never bootstrapped from.
    """

    transition: Array  # [S, A, S]  float, probability of each next state
    reward: Array  # [S, A, S]  float, mean reward of each transition
    terminal: Array  # [S]  bool
    start: Array  # [S]  float, probability of each first state
    cumulative: Array  # [S, A, S]  float, `transition` summed up over next states; ends at 1 exactly


class Outcome(NamedTuple):
    """What one step returned. `discount` is 0 where the MDP terminated, else 1; gamma is never in it."""

    reward: Array  # []
    discount: Array  # []
    next_state: Array  # []  int


def from_arrays(transition: np.ndarray, reward: np.ndarray, terminal: np.ndarray, start: np.ndarray) -> MDP:
    """An `MDP` of transition [S, A, S], reward [S, A, S] or [S, A], terminal [S] and start [S].

    Raises `UserError` for shapes that do not fit, rows that do not sum to 1, terminal states that are left or paid,
    and an MDP in which every state is terminal.
    """
    try:
        transition, reward = np.asarray(transition, np.float64), np.asarray(reward, np.float64)
        terminal, start = np.asarray(terminal, bool), np.asarray(start, np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"an MDP is made of arrays of numbers: {error}.") from None
    if transition.ndim != 3 or not transition.size or transition.shape[0] != transition.shape[2]:
        raise UserError(f"transition has shape {transition.shape}; it must be [states, actions, states].")
    if reward.shape not in (transition.shape, transition.shape[:2]):
        raise UserError(f"reward has shape {reward.shape}; it must be {transition.shape} or {transition.shape[:2]}.")
    if terminal.shape != transition.shape[:1] or start.shape != transition.shape[:1]:
        raise UserError(
            f"terminal has shape {terminal.shape} and start {start.shape}; both must be {transition.shape[:1]}."
        )
    _check_values(transition, reward, terminal, start)
    reward = np.broadcast_to(reward if reward.ndim == 3 else reward[..., None], transition.shape)
    cumulative = np.cumsum(transition, axis=-1)
    cumulative /= cumulative[..., -1:]
    numbers = [jnp.asarray(x, jnp.float32) for x in (transition, reward, start, cumulative)]
    return MDP(numbers[0], numbers[1], jnp.asarray(terminal), numbers[2], numbers[3])


def _check_values(transition: np.ndarray, reward: np.ndarray, terminal: np.ndarray, start: np.ndarray) -> None:
    if not (np.abs(reward) <= LARGEST).all():
        raise UserError("reward must be finite, also as a float32.")
    for name, rows in (("transition", transition), ("start", start)):
        if not (rows >= 0).all() or not np.allclose(rows.sum(-1), 1.0, atol=1e-6):
            raise UserError(f"{name} must hold probabilities that sum to 1 over the states.")
    if terminal.all():
        raise UserError("every state is terminal; there is nothing to learn.")
    stays = transition[terminal, :, np.flatnonzero(terminal)]
    if not np.allclose(stays, 1.0) or reward[terminal].any():
        raise UserError("a terminal state must stay where it is, with reward 0.")


def step(key: Key, mdp: MDP, state: Array, action: Array) -> Outcome:
    """One transition from `state` [] by `action` []; the caller vmaps."""
    return outcome(jax.random.uniform(key), mdp, state, action)


def outcome(uniform: Array, mdp: MDP, state: Array, action: Array) -> Outcome:
    """The transition that a number [] in [0, 1) stands for, by the inverse of the cumulative probabilities."""
    next_state = jnp.sum(mdp.cumulative[state, action] <= uniform).astype(jnp.int32)
    terminated = mdp.terminal[next_state]
    return Outcome(mdp.reward[state, action, next_state], 1.0 - terminated.astype(jnp.float32), next_state)


def random_mdp(
    seed: int = 0, num_states: int = RANDOM_STATES, num_actions: int = RANDOM_ACTIONS, branches: int = RANDOM_BRANCHES
) -> MDP:
    """A random ("Garnet") MDP: each action leads to `branches` states, with Dirichlet(1) probabilities.

    Rewards [S, A] are uniform in [0, 1); the last state is terminal. Archibald et al. (1995), section 2. Raises
    `UserError` for sizes below 2 states, 1 action and 1 branch, more branches than states, and arrays too large.
    """
    for name, value in {
        "seed": seed,
        "num_states": num_states,
        "num_actions": num_actions,
        "branches": branches,
    }.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise UserError(f"{name} of a random MDP is {shown(value)}; it must be a whole number of at least 0.")
    if num_states < 2 or num_actions < 1 or not 1 <= branches <= num_states:
        raise UserError(
            f"a random MDP needs 2 states, 1 action and 1 to {num_states} branches at least; it got {num_states} "
            f"states, {num_actions} actions, {branches} branches."
        )
    if int(num_states) ** 2 * int(num_actions) > MOST_NUMBERS:
        raise UserError(
            f"a random MDP of {num_states:,} states and {num_actions:,} actions has more than {MOST_NUMBERS:,} "
            "probabilities; take fewer."
        )
    rng = np.random.default_rng(seed)
    transition = np.zeros((num_states, num_actions, num_states))
    for row in transition.reshape(-1, num_states):
        row[rng.choice(num_states, branches, replace=False)] = rng.dirichlet(np.ones(branches))
    reward = rng.uniform(size=(num_states, num_actions))
    terminal = np.arange(num_states) == num_states - 1
    transition[-1], reward[-1] = terminal, 0.0
    return from_arrays(transition, reward, terminal, np.eye(num_states)[0])


_GRIDS: dict[str, Callable[[], dynamics.Dynamics]] = {
    "FrozenLake-4x4": functools.partial(dynamics.frozen_lake, "4x4"),
    "FrozenLake-8x8": functools.partial(dynamics.frozen_lake, "8x8"),
    "FourRooms": dynamics.four_rooms,
    "DeepSea": dynamics.deep_sea,
}
NAMES = (*_GRIDS, "Random")


def make(name: str) -> MDP:
    """The MDP called `name`, one of `NAMES`. Raises `UserError` for another."""
    if name == "Random":
        return random_mdp()
    return from_dynamics(_grid(name))


def from_dynamics(found: dynamics.Dynamics) -> MDP:
    """An environment's enumerated dynamics as an `MDP`."""
    return from_arrays(found.transition, found.reward, found.terminal, found.start)


def cells(name: str) -> np.ndarray | None:
    """The grid cell (row, column) of each state [S, 2], -1 for a state outside it; None where there is no grid."""
    return None if name == "Random" else _grid(name).cells


@functools.cache
def _grid(name: str) -> dynamics.Dynamics:
    if name not in _GRIDS:
        raise unknown_name("MDP", name, NAMES)
    return _GRIDS[name]()
