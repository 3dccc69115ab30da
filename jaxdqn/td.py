"""Temporal-difference errors for one transition, and returns of one sequence; the caller vmaps.

Names follow time: q_tm1 [A] and a_tm1 [] at the step that was taken, r_t [] and discount_t [] after it, q_t [A] at the
observation it produced. `discount_t` contains gamma (gamma^m for m steps) and is 0 where the MDP terminated.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Scalar


def q_learning(q_tm1: Array, a_tm1: Array, r_t: Array, discount_t: Array, q_t: Array) -> Array:
    """TD error r + discount * max_a q_t(a) - q_tm1(a_tm1), []. Mnih et al. (2015), algorithm 1."""
    chex.assert_rank([q_tm1, a_tm1, r_t, discount_t, q_t], [1, 0, 0, 0, 1])
    chex.assert_type([q_tm1, a_tm1, r_t, discount_t, q_t], [float, int, float, float, float])
    return r_t + discount_t * jnp.max(q_t) - q_tm1[a_tm1]


def double_q_learning(
    q_tm1: Array, a_tm1: Array, r_t: Array, discount_t: Array, q_t_value: Array, q_t_selector: Array
) -> Array:
    """TD error with the greedy action of `q_t_selector` [A] valued by `q_t_value` [A].

    van Hasselt et al. (2016), eq. 4.
    """
    chex.assert_rank([q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_selector], [1, 0, 0, 0, 1, 1])
    chex.assert_type([q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_selector], [float, int, float, float, float, float])
    return r_t + discount_t * q_t_value[jnp.argmax(q_t_selector)] - q_tm1[a_tm1]


def lambda_returns(r_t: Array, discount_t: Array, v_t: Array, lambda_t: Array) -> Array:
    """Returns [T] of G_t = r_t + discount_t ((1 - lambda_t) v_t + lambda_t G_{t+1}); the last bootstraps on v_t alone.

    All [T]; v_t is the value of what step t produced. Where the next step is another episode's, lambda_t is 0. Sutton
    and Barto (2018), equation 12.18.
    """
    chex.assert_rank([r_t, discount_t, v_t, lambda_t], 1)
    chex.assert_type([r_t, discount_t, v_t, lambda_t], float)

    def back(following: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        reward, discount, value, decay = step
        returned = reward + discount * ((1.0 - decay) * value + decay * following)
        return returned, returned

    return jax.lax.scan(back, v_t[-1], (r_t, discount_t, v_t, lambda_t), reverse=True)[1]


Penalty = Callable[[Array, Scalar], Array]
"""penalty(TD errors [B], delta []) -> losses [B]."""


def squared(error: Array, delta: Scalar) -> Array:
    """error^2 / 2. `delta` is unused, so that both losses have one signature."""
    del delta
    return 0.5 * jnp.square(error)


def huber(error: Array, delta: Scalar) -> Array:
    """error^2 / 2 up to |error| = delta, then linear with slope delta > 0. Huber (1964)."""
    absolute = jnp.abs(error)
    quadratic = jnp.minimum(absolute, delta)
    return 0.5 * jnp.square(quadratic) + delta * (absolute - quadratic)


PENALTIES: dict[str, Penalty] = {"squared": squared, "huber": huber}
