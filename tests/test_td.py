"""Temporal-difference errors against rlax, exact values and their own assertions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from jaxdqn import td

B, A = 64, 5


@pytest.fixture(scope="module")
def batch():
    """q_tm1 [B, A], a_tm1 [B], r_t [B], discount_t [B] (a third of them terminal), q_t [B, A], selector [B, A]."""
    random = np.random.default_rng(0)
    discount = np.where(random.random(B) < 1 / 3, 0.0, random.random(B))
    return (
        jnp.asarray(random.normal(size=(B, A)), jnp.float32),
        jnp.asarray(random.integers(A, size=B), jnp.int32),
        jnp.asarray(random.normal(size=B), jnp.float32),
        jnp.asarray(discount, jnp.float32),
        jnp.asarray(random.normal(size=(B, A)), jnp.float32),
        jnp.asarray(random.normal(size=(B, A)), jnp.float32),
    )


def test_q_learning_equals_rlax(batch):
    errors = jax.vmap(td.q_learning)(*batch[:5])
    np.testing.assert_allclose(errors, jax.vmap(rlax.q_learning)(*batch[:5]), rtol=1e-6, atol=1e-6)


def test_double_q_learning_equals_rlax(batch):
    errors = jax.vmap(td.double_q_learning)(*batch)
    np.testing.assert_allclose(errors, jax.vmap(rlax.double_q_learning)(*batch), rtol=1e-6, atol=1e-6)


def test_double_q_learning_with_itself_as_selector_is_q_learning(batch):
    double = jax.vmap(td.double_q_learning)(*batch[:5], batch[4])
    np.testing.assert_array_equal(double, jax.vmap(td.q_learning)(*batch[:5]))


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_equals_rlax(delta):
    errors = jnp.concatenate([jnp.linspace(-5, 5, 41), jnp.array([-delta, delta])])  # both kinks are among them
    np.testing.assert_allclose(td.huber(errors, delta), rlax.huber_loss(errors, delta), rtol=1e-6)


def test_huber_gradient_is_the_clipped_error():
    errors = jnp.array([-7.0, -2.0, -0.5, 0.0, 0.5, 2.0, 7.0])
    gradients = jax.vmap(jax.grad(td.huber), in_axes=(0, None))(errors, jnp.float32(2.0))
    np.testing.assert_array_equal(gradients, jnp.clip(errors, -2.0, 2.0))


def test_squared_equals_rlax():
    errors = jnp.linspace(-3, 3, 13)
    np.testing.assert_allclose(td.squared(errors, jnp.float32(1.0)), rlax.l2_loss(errors), rtol=1e-6)


@pytest.mark.parametrize("selector", [(), (jnp.array([0.0, 1.0]),)], ids=["q_learning", "double_q_learning"])
def test_terminal_target_is_exactly_the_reward(selector):
    error = td.double_q_learning if selector else td.q_learning
    q_t = jnp.array([1e30, 1e30])  # anything but a factor of exactly 0 would show
    target = error(jnp.zeros(2), jnp.int32(1), jnp.float32(0.3), jnp.float32(0.0), q_t, *selector)
    assert target == jnp.float32(0.3)


GOOD = {
    "q_tm1": jnp.zeros(3),
    "a_tm1": jnp.int32(0),
    "r_t": jnp.float32(0),
    "discount_t": jnp.float32(1),
    "q_t_value": jnp.zeros(3),
    "q_t_selector": jnp.zeros(3),
}


@pytest.mark.parametrize(
    "bad",
    [
        {"q_tm1": jnp.zeros((2, 3))},
        {"r_t": jnp.zeros(2)},
        {"discount_t": jnp.zeros(1)},
        {"a_tm1": jnp.zeros(2, jnp.int32)},
        {"a_tm1": jnp.float32(0)},
        {"q_t_value": jnp.zeros((2, 3))},
        {"r_t": jnp.int32(1)},
        {"discount_t": jnp.bool_(True)},
    ],
    ids=lambda bad: "-".join(f"{name}-{value.dtype}-{value.ndim}" for name, value in bad.items()),
)
def test_wrong_ranks_and_types_are_refused(bad):
    values = {**GOOD, **bad}
    with pytest.raises(AssertionError):
        td.double_q_learning(**values)
    values["q_t"] = values.pop("q_t_value")
    del values["q_t_selector"]
    with pytest.raises(AssertionError):
        td.q_learning(**values)
