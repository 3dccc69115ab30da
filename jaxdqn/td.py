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


def munchausen_q_learning(
    q_tm1: Array,
    a_tm1: Array,
    r_t: Array,
    discount_t: Array,
    q_t: Array,
    q_tm1_policy: Array,
    alpha: Scalar,
    temperature: Scalar,
    lowest: Scalar,
) -> Array:
    """TD error, [], whose reward has a bonus for actions that the policy finds likely; Vieillard et al. (2020), eq. 2.

    r + alpha clip(t log pi(a_tm1), lowest, 0) + discount * sum_a pi(a) (q_t(a) - t log pi(a)), each pi the softmax of
    `q_tm1_policy` and `q_t` [A] over the temperature t; the sum is t logsumexp(q_t / t), finite where q_t / t is.
    """
    chex.assert_rank([q_tm1, a_tm1, r_t, discount_t, q_t, q_tm1_policy], [1, 0, 0, 0, 1, 1])
    chex.assert_type([q_tm1, a_tm1, r_t, discount_t, q_t, q_tm1_policy], [float, int, float, float, float, float])
    log_policy = temperature * jax.nn.log_softmax(q_tm1_policy / temperature)
    bonus = alpha * jnp.clip(log_policy[a_tm1], lowest, 0.0)
    soft_value = temperature * jax.nn.logsumexp(q_t / temperature)
    return r_t + bonus + discount_t * soft_value - q_tm1[a_tm1]


def categorical_projection(z_p: Array, p: Array, z_q: Array) -> Array:
    """Masses `p` [K'] at `z_p` [K'] on the even support `z_q` [K]: each between its two neighbours, what lies outside
    at the ends, [K]. Bellemare et al. (2017), eq. 7.

    Mass is kept, also that of what falls on an atom, and so is the mean of what lies inside.
    """
    chex.assert_rank([z_p, p, z_q], 1)
    chex.assert_type([z_p, p, z_q], float)
    place = (jnp.clip(z_p, z_q[0], z_q[-1]) - z_q[0]) / (z_q[-1] - z_q[0]) * (len(z_q) - 1)
    shares = jnp.maximum(0.0, 1.0 - jnp.abs(place - jnp.arange(len(z_q))[:, None]))  # [K, K']
    return jnp.sum(shares * p, axis=1)


def gaussian_masses(mean: Array, sigma: Scalar, edges: Array) -> Array:
    """The mass of N(mean, sigma^2) in each of K bins with `edges` [K + 1], the tails in the end bins, [K].

    `mean` is clipped to the support. HL-Gauss: Imani and White (2018); Farebrother et al. (2024), section 3.1.
    """
    chex.assert_rank([mean, edges], [0, 1])
    chex.assert_type([mean, edges], float)
    below = jax.scipy.stats.norm.cdf(edges[1:-1], jnp.clip(mean, edges[0], edges[-1]), sigma)
    return jnp.diff(below, prepend=0.0, append=1.0)


def mass_outside(z: Array, p: Array, support: Array) -> Array:
    """The part of the masses `p` [K'] at `z` [K'] that lies outside of `support` [K], []: by more than a hundredth of
    its step, which is no rounding."""
    slack = 0.01 * (support[1] - support[0])
    return jnp.sum(jnp.where((z < support[0] - slack) | (z > support[-1] + slack), p, 0.0))


def quantile_midpoints(num: int) -> Array:
    """(i + 1/2) / N, [N]: the fractions of N quantiles nearest to a distribution. Dabney et al. (2018a), lemma 2."""
    return (jnp.arange(num) + 0.5) / num


def quantile_huber(z_tm1: Array, tau_tm1: Array, z_t: Array, kappa: Scalar) -> Array:
    """Quantile regression of `z_tm1` [N], at fractions `tau_tm1` [N], towards samples `z_t` [N'], [].

    sum_i mean_j |tau_i - 1(u_ij < 0)| L(u_ij), u_ij = z_t_j - z_tm1_i; L is the Huber loss, or |u| where kappa is 0.
    Dabney et al. (2018a), eq. 10; Dabney et al. (2018b) divide by kappa.
    """
    chex.assert_rank([z_tm1, tau_tm1, z_t], 1)
    chex.assert_type([z_tm1, tau_tm1, z_t], float)
    error = z_t - z_tm1[:, None]
    # The slope of L as a constant: it moves only where the derivative with respect to it is 0. That halves the work.
    slope = jax.lax.stop_gradient(jnp.where(kappa > 0, jnp.clip(error, -kappa, kappa), jnp.sign(error)))
    penalty = slope * (error - jnp.where(kappa > 0, 0.5, 0.0) * slope)
    return jnp.sum(jnp.mean(jnp.abs(tau_tm1[:, None] - (error < 0)) * penalty, axis=1))


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
