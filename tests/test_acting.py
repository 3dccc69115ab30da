"""The rollout, on environments whose every step is known."""

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest

from jaxdqn import acting
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams

N = 3
H = jax.tree.map(jnp.float32, HParams())


def roll(environment, lengths):
    """The state, block and sums after each of several rollouts of `lengths`, with random actions."""
    agent = make_agent(Config(hidden_sizes=(4,)), environment.spec)
    params = agent.init(jax.random.key(0), H).params
    state, outputs = acting.start(environment, agent, N, jax.random.key(1)), []
    for i, length in enumerate(lengths):
        state, block, sums = acting.rollout(environment, agent, params, state, jax.random.key(i), jnp.ones(N), length)
        outputs.append((state, block, sums))
    return outputs


@pytest.fixture(scope="module")
def two_step_episodes():
    return roll(probe_environments.discount(), (5, 2))


def test_a_block_is_what_happened(two_step_episodes):
    _, block, _ = two_step_episodes[0]
    second = np.repeat([[0], [1], [0], [1], [0]], N, axis=1)  # whether a step is its episode's second
    np.testing.assert_array_equal(block.observation[..., 0], second)
    np.testing.assert_array_equal(block.reward, second)
    np.testing.assert_array_equal(block.discount, 1 - second)
    np.testing.assert_array_equal(block.episode_end, second == 1)
    np.testing.assert_array_equal(block.next_observation, np.ones((5, N, 1)))  # also where 0 follows


def test_the_next_block_goes_on_where_the_last_one_stopped(two_step_episodes):
    (state, _, _), (_, block, _) = two_step_episodes
    np.testing.assert_array_equal(block.observation[0], state.observation)


def test_only_finished_episodes_are_summed(two_step_episodes):
    first, second = (sums for _, _, sums in two_step_episodes)
    assert tuple(map(float, first)) == (2 * N, 2 * N, 4 * N)  # two each, of return 1 and length 2
    assert tuple(map(float, second)) == (N, N, 2 * N)  # begun in the first rollout


def test_an_episode_under_way_is_carried(two_step_episodes):
    state, _, _ = two_step_episodes[0]
    np.testing.assert_array_equal(state.episode_length, [1] * N)
    np.testing.assert_array_equal(state.episode_return, [0.0] * N)


def test_rewards_follow_the_actions_of_the_block():
    _, block, _ = roll(probe_environments.observed_action(), (20,))[0]
    np.testing.assert_array_equal(block.reward, block.observation[..., 0] * (1 - 2 * block.action))
    assert set(np.unique(block.action)) == {0, 1}


def test_environments_are_independent():
    _, block, _ = roll(probe_environments.observed_value(), (20,))[0]
    assert len(np.unique(block.reward, axis=1).T) > 1 and len(np.unique(block.reward, axis=0)) > 1


def test_the_carry_is_reset_where_an_episode_ended():
    end, initial, carry = np.array([True, False]), {"h": jnp.zeros((2, 3))}, {"h": jnp.ones((2, 3))}
    np.testing.assert_array_equal(acting.reset_where(end, initial, carry)["h"], [[0, 0, 0], [1, 1, 1]])
