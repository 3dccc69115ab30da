"""Temporal-difference errors, for one transition; the caller vmaps.

Names follow time: q_tm1 [A] and a_tm1 [] at the step that was taken, r_t [] and discount_t [] after it, q_t [A] at the
observation it produced. `discount_t` contains gamma (gamma^m for m steps) and is 0 where the MDP terminated.
"""

from collections.abc import Callable

import chex
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


RESCALING = 1e-3


def rescaled(x: Array) -> Array:
    """h(x) = sgn(x) (sqrt(|x| + 1) - 1) + .001 x, so that large returns are small. Pohlen et al. (2018), 3.2."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1.0) - 1.0) + RESCALING * x


def unscaled(y: Array) -> Array:
    """The inverse of `rescaled`. Pohlen et al. (2018), proposition A.2."""
    inner = jnp.abs(y) + 1.0 + RESCALING
    # (sqrt(1 + 4 e inner) - 1) / (2 e), written without the difference of two numbers near 1.
    root = 2.0 * inner / (jnp.sqrt(1.0 + 4.0 * RESCALING * inner) + 1.0)
    return jnp.sign(y) * (jnp.square(root) - 1.0)


def rescaled_double_q_learning(
    q_tm1: Array, a_tm1: Array, r_t: Array, discount_t: Array, q_t_value: Array, q_t_selector: Array
) -> Array:
    """TD error h(r + discount * h^-1(q_t_value(a*))) - q_tm1(a_tm1), a* the greedy action of `q_t_selector` [A].

    Kapturowski et al. (2019), section 2.3; h is `rescaled`.
    """
    target = double_q_learning(jnp.zeros_like(q_tm1), a_tm1, r_t, discount_t, unscaled(q_t_value), q_t_selector)
    return rescaled(target) - q_tm1[a_tm1]


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
