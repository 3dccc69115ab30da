"""Value iteration: the exact action values that learning is measured against."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, PyTree
from jaxdqn.errors import UserError
from jaxdqn.tabular.mdp import MDP

MOST_GAMMA = 0.99999


def value_iteration(mdp: MDP, gamma: float, tolerance: float = 1e-7) -> Array:
    """Q* [S, A] to within `tolerance` of the largest possible value, max |r| / (1 - gamma), but for float32's rounding.

    0 at terminal states. Sutton and Barto (2018), section 4.4. Stops where the change proves the error (a contraction
    by gamma), and in any case after as many sweeps as contract the first error that far: float32 may never see so
    small a change. Raises `UserError` for gamma outside [0, 0.99999] or a tolerance outside (0, 1).
    """
    check_gamma(gamma)
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance}; it must lie between 0 and 1.")
    sweeps = 1 if gamma == 0 else math.ceil(math.log(tolerance) / math.log(gamma)) + 1
    return _iterate(mdp, gamma, tolerance, max(1, sweeps))


def check_gamma(gamma: float) -> None:
    """Raises `UserError` for gamma outside [0, 0.99999]: beyond, 1 - gamma is no number that a float32 knows well."""
    if not 0 <= gamma <= MOST_GAMMA:
        raise UserError(f"gamma is {gamma}; it must lie in [0, 1), and be at most {MOST_GAMMA}.")


def backup(mdp: MDP, q: Array, gamma: float | Array) -> Array:
    """One sweep of the optimality operator: (T q) [S, A]. Bellman (1957)."""
    values = jnp.where(mdp.terminal, 0.0, jnp.max(q, axis=-1))
    mean_reward = jnp.sum(mdp.transition * mdp.reward, axis=-1)
    return mean_reward + gamma * jnp.einsum("sat,t->sa", mdp.transition, values, precision="highest")


@functools.partial(jax.jit, static_argnames="max_sweeps")
def _iterate(mdp: MDP, gamma: Array, tolerance: Array, max_sweeps: int) -> Array:
    largest = jnp.max(jnp.abs(mdp.reward)) / (1 - gamma)

    def goes_on(carry: PyTree) -> Array:
        sweep, _, change = carry
        return (sweep == 0) | ((sweep < max_sweeps) & (change * gamma > tolerance * largest * (1 - gamma)))

    def sweep(carry: PyTree) -> PyTree:
        number, q, _ = carry
        new = backup(mdp, q, gamma)
        return number + 1, new, jnp.max(jnp.abs(new - q))

    start = 0, jnp.zeros(mdp.transition.shape[:2]), jnp.inf
    return jax.lax.while_loop(goes_on, sweep, start)[1]


def max_error(q: Array, optimal: Array, terminal: Array) -> Array:
    """max |q - optimal| [] over the actions of non-terminal states; q, optimal: [S, A]."""
    return jnp.max(jnp.where(terminal[:, None], 0.0, jnp.abs(q - optimal)))
