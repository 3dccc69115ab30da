"""Schedules at their ends, the ladder against its formula, and epsilon-greedy against the distribution it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn import exploration

SCHEDULES = [exploration.linear_schedule, exploration.exponential_schedule]
SIGNIFICANCE = 1e-3  # keys are fixed: a test passes always or never


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step, expected", [(0, 1.0), (1000, 0.0625), (5000, 0.0625)])
def test_schedule_is_exact_at_its_ends(schedule, step, expected):
    assert schedule(1.0, 0.0625, 1000.0, jnp.float32(step)) == expected


def test_linear_schedule_is_the_mean_half_way():
    assert exploration.linear_schedule(1.0, 0.25, 1000.0, jnp.float32(500)) == 0.625


def test_exponential_schedule_is_the_geometric_mean_half_way():
    # XLA's power is accurate to a few units in the last place.
    np.testing.assert_allclose(exploration.exponential_schedule(1.0, 0.25, 1000.0, jnp.float32(500)), 0.5, rtol=1e-6)


def test_exponential_schedule_falls_by_a_constant_factor():
    values = np.asarray(exploration.exponential_schedule(0.8, 0.01, 10.0, jnp.arange(11.0)))
    np.testing.assert_allclose(values[1:] / values[:-1], (0.01 / 0.8) ** 0.1, rtol=1e-5)  # a quotient of rounded values


fractions = st.floats(0.015625, 1.0, width=32)


@pytest.mark.parametrize("schedule", [jax.jit(schedule) for schedule in SCHEDULES], ids=["linear", "exponential"])
@given(one=fractions, other=fractions, num_steps=st.floats(1.0, 1e6, width=32))
def test_schedule_is_monotone_between_its_ends(schedule, one, other, num_steps):
    begin, end = max(one, other), min(one, other)
    values = np.asarray(schedule(begin, end, num_steps, jnp.linspace(0.0, 1.25, 33) * num_steps))
    slack = 1e-6  # rounding of values of at most 1
    assert np.all(np.diff(values) <= slack)
    assert np.all((end - slack <= values) & (values <= begin + slack))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_differ_between_the_members_of_a_vmap(schedule):
    begin, end, num_steps = jnp.array([1.0, 0.5]), jnp.array([0.1, 0.05]), jnp.array([10.0, 20.0])
    together = jax.jit(jax.vmap(schedule, in_axes=(0, 0, 0, None)))(begin, end, num_steps, jnp.int32(5))
    alone = [schedule(float(b), float(e), float(n), 5) for b, e, n in zip(begin, end, num_steps, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_ladder_is_the_formula_of_ape_x():
    expected = 0.4 ** (1 + 7 * np.arange(8) / 7)  # Horgan et al. (2018), section 4.1
    np.testing.assert_allclose(exploration.epsilon_ladder(0.4, 7.0, 8, 0, 8), expected, rtol=1e-5)


def test_ladder_of_power_0_is_flat():
    np.testing.assert_array_equal(exploration.epsilon_ladder(0.3, 0.0, 5, 0, 5), np.full(5, 0.3, np.float32))


def test_ladder_of_one_environment_is_epsilon():
    np.testing.assert_array_equal(exploration.epsilon_ladder(0.3, 7.0, 1, 0, 1), np.full(1, 0.3, np.float32))


def test_ladder_over_shards_is_the_whole_ladder():
    shards = [exploration.epsilon_ladder(0.4, 7.0, 2, jnp.int32(first), 8) for first in (0, 2, 4, 6)]
    np.testing.assert_array_equal(np.concatenate(shards), exploration.epsilon_ladder(0.4, 7.0, 8, 0, 8))


N, A, GREEDY = 70_000, 7, 6


@pytest.fixture(scope="module")
def actions():
    """N actions at each epsilon, for action values whose greedy action is GREEDY."""
    q = jnp.zeros((N, A)).at[:, GREEDY].set(1.0)
    draw = jax.jit(exploration.epsilon_greedy)
    return {epsilon: np.asarray(draw(jax.random.key(1), q, jnp.full(N, epsilon))) for epsilon in (0.0, 0.1, 0.5, 1.0)}


def test_epsilon_0_is_greedy():
    q = jax.random.normal(jax.random.key(0), (100, A))
    np.testing.assert_array_equal(
        exploration.epsilon_greedy(jax.random.key(1), q, jnp.zeros(100)), np.argmax(q, axis=1)
    )


def test_epsilon_1_is_uniform(actions):
    assert scipy.stats.chisquare(np.bincount(actions[1.0], minlength=A)).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_explored_actions_are_uniform_whatever_the_coin(actions, epsilon):
    """An action drawn from the coin's own random number would be confined to the first `epsilon` of the actions."""
    counts = np.bincount(actions[epsilon], minlength=A)
    assert scipy.stats.chisquare(np.delete(counts, GREEDY)).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_other_actions_than_the_greedy_have_their_share(actions, epsilon):
    explored = int(np.sum(actions[epsilon] != GREEDY))
    assert scipy.stats.binomtest(explored, N, epsilon * (A - 1) / A).pvalue > SIGNIFICANCE


def test_every_environment_has_its_own_epsilon():
    q = jnp.zeros((1000, A)).at[:, GREEDY].set(1.0)
    epsilon = jnp.where(jnp.arange(1000) < 500, 0.0, 1.0)
    action = exploration.epsilon_greedy(jax.random.key(0), q, epsilon)
    assert np.all(action[:500] == GREEDY) and len(np.unique(action[500:])) == A


def test_actions_are_int32(actions):
    assert all(values.dtype == np.int32 for values in actions.values())
