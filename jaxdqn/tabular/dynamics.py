"""The dynamics of small gymnax environments as arrays, enumerated from gymnax's own steps.

Each of these environments is a deterministic step behind noise on the action: the deterministic step is asked of
gymnax for every state and action, and the noise [A, A] (the chance that action b happens where a was chosen) follows
from the environment's parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, PyTree
from jaxdqn.environments.gymnax_adapter import construct
from jaxdqn.errors import UserError, shown

FOUR_ROOMS_GOAL = (8, 9)  # gymnax's own
MAX_DEEP_SEA = 40  # [S, A, S] floats: about 40 MB


class Dynamics(NamedTuple):
    """S states, A actions, NumPy arrays.

    `cells` are the (row, column) of the states in a grid, (-1, -1) for one that is not in it.
    """

    transition: np.ndarray  # [S, A, S]  probability of each next state; a terminal state stays where it is
    reward: np.ndarray  # [S, A, S]  mean reward of each transition; 0 where it cannot happen
    terminal: np.ndarray  # [S]  bool
    start: np.ndarray  # [S]  probability of each first state
    cells: np.ndarray  # [S, 2]  int


def frozen_lake(map_name: str = "4x4", slippery: bool = True) -> Dynamics:
    """FrozenLake: a state is a cell; on ice, a third of the moves each go as chosen, to its left and to its right."""
    make = lambda is_slippery: construct("FrozenLake-misc", None, {"map_name": map_name, "is_slippery": is_slippery})  # noqa: E731
    env, sure = make(slippery), make(False)
    wanted = np.eye(env.num_actions)
    aside = (np.roll(wanted, 1, axis=1) + np.roll(wanted, -1, axis=1)) / 2
    noise = env.success_rate * wanted + (1 - env.success_rate) * aside if slippery else wanted
    return _enumerate(
        sure,
        sure.default_params,
        cells=np.indices((env.nrow, env.ncol)).reshape(2, -1).T,
        place=lambda state, cell: state.replace(position=cell[0] * env.ncol + cell[1]),
        locate=lambda state: state.position,
        noise=noise,
    )


def four_rooms(goal: tuple[int, int] = FOUR_ROOMS_GOAL) -> Dynamics:
    """FourRooms with one goal cell, which is terminal: a state is an open cell of the 13 x 13 map.

    A move fails with `fail_prob` (1/3) and then is one of the three others. Raises `UserError` for a goal in a wall.
    """
    if not isinstance(goal, tuple | list):
        raise UserError(f"goal of FourRooms is {shown(goal)}; it must be (row, column).")
    env = construct("FourRooms-misc", None, {"goal_fixed": list(goal)})
    cells = np.asarray(env.coords)
    if list(goal) not in cells.tolist():
        raise UserError(f"goal {goal} of FourRooms is no open cell; gymnax's own is {FOUR_ROOMS_GOAL}.")
    index = np.zeros(env.env_map.shape, np.int32)
    index[tuple(cells.T)] = np.arange(len(cells))
    fail, actions = env.default_params.fail_prob, env.num_actions
    return _enumerate(
        env,
        env.default_params.replace(fail_prob=0.0),
        cells=cells,
        place=lambda state, cell: state.replace(pos=cell),
        locate=lambda state: jnp.asarray(index)[state.pos[0], state.pos[1]],
        noise=(1 - fail) * np.eye(actions) + fail / (actions - 1) * (1 - np.eye(actions)),
    )


def deep_sea(size: int = 8) -> Dynamics:
    """Deterministic DeepSea: size x size cells and, last, one state for the end of an episode.

    Raises `UserError` for a size outside [2, 40].
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= MAX_DEEP_SEA:
        raise UserError(f"size of DeepSea is {shown(size)}; it must be a whole number in [2, {MAX_DEEP_SEA}].")
    env = construct("DeepSea-bsuite", None, {"size": size})
    cells = np.vstack([np.indices((size, size)).reshape(2, -1).T, [[size, 0]]])
    found = _enumerate(
        env,
        env.default_params,
        cells=cells,
        place=lambda state, cell: state.replace(row=cell[0], column=cell[1]),
        locate=lambda state: jnp.where(state.row >= size, size * size, state.row * size + state.column),
        noise=np.eye(env.num_actions),
    )
    return found._replace(cells=np.where(cells[:, :1] < size, cells, -1))


def _enumerate(
    env: Any,
    params: PyTree,
    cells: np.ndarray,
    place: Callable[[PyTree, Array], PyTree],
    locate: Callable[[PyTree], Array],
    noise: np.ndarray,
) -> Dynamics:
    """Asks a deterministic `env` for the outcome of every action in every cell [S, 2], and mixes them by `noise`.

    place(state, cell) puts the agent of a reset state there; locate(state) is the number of a state.
    """
    key = jax.random.key(0)  # neither the step nor the reset uses it
    _, first = env.reset_env(key, params)

    def outcome(cell: Array, action: Array) -> tuple[Array, Array]:
        _, state, reward, _, _ = env.step_env(key, place(first, cell), action, params)
        return locate(state), jnp.asarray(reward, jnp.float32)

    where, actions = jnp.asarray(cells), jnp.arange(env.num_actions)
    reached, reward = jax.jit(jax.vmap(jax.vmap(outcome, (None, 0)), (0, None)))(where, actions)
    terminal = jax.vmap(lambda cell: env.is_terminated(place(first, cell), params))(where)
    transition, mean = mix(np.asarray(reached), np.asarray(reward), np.asarray(terminal), noise)
    start = np.eye(len(cells))[int(locate(first))]
    return Dynamics(transition, mean, np.asarray(terminal), start, cells)


def mix(
    reached: np.ndarray, reward: np.ndarray, terminal: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Deterministic outcomes (next state and reward [S, A]) behind noise [A, A]: (transition, mean reward) [S, A, S].

    A terminal state [S] stays where it is, and earns nothing.
    """
    states = np.eye(len(reached))
    taken = states[reached]  # [S, B, S]
    transition = np.einsum("ab,sbt->sat", noise, taken)
    total = np.einsum("ab,sbt->sat", noise, taken * reward[..., None])
    mean = np.divide(total, transition, out=np.zeros_like(total), where=transition > 0)
    stays = terminal[:, None, None]
    return np.where(stays, states[:, None], transition), np.where(stays, 0.0, mean)
