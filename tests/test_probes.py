"""Agents on environments whose action values are known: where one fails, its docstring says what to look at."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest

from jaxdqn import networks, replay, training
from jaxdqn.base import Environment
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.timeline import timeline

GAMMA = 0.9
# Nothing in the probes is noisy, so training converges to 1e-6 (to 4e-3 where values are 10 and bootstrapped without
# end); a wrong target is off by 0.1 and more.
ATOL = 5e-3
CONFIG = Config(
    hidden_sizes=(32,),
    num_envs=4,
    batch_size=32,
    replay_capacity=512,
    learning_starts=64,
    total_steps=4 * 2000,
)
HPARAMS = HParams(
    learning_rate=3e-3,
    gamma=GAMMA,
    target_period=10.0,
    # Uniformly random actions: these probes are about values, whatever the policy does.
    epsilon_begin=1.0,
    epsilon_end=1.0,
)


def train(environment: Environment, config: Config):
    """Q-values of trained parameters, as a function of observations [B, 1]."""
    line = timeline(config)
    hparams = jax.tree.map(jnp.float32, HPARAMS)
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    ring = replay.REPLAYS["uniform"].make(example, config)
    trainer = training.make_trainer(environment, agent, ring, config)
    state = jax.jit(trainer.init)(jax.random.key(0), jax.random.key(1), hparams)
    prefill = jax.jit(training.loop(trainer.prefill), donate_argnums=(0, 1))
    learn = jax.jit(training.loop(trainer.step), donate_argnums=(0, 1))
    state, metrics = prefill(state, trainer.zero_metrics(), hparams, jnp.int32(0), jnp.int32(line.prefill))
    state, _ = learn(state, metrics, hparams, jnp.int32(line.prefill), jnp.int32(line.total))
    network = networks.q_network(environment.spec, config.network, config.hidden_sizes)
    return functools.partial(network.apply, state.learner.params)


@pytest.mark.parametrize("agent", ["dqn", "double_dqn"])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("value", {1.0: (1, 1)}),
        ("observed_value", {1.0: (1, 1), -1.0: (-1, -1)}),
        ("discount", {0.0: (GAMMA, GAMMA), 1.0: (1, 1)}),
        ("action", {1.0: (1, -1)}),
        ("observed_action", {1.0: (1, -1), -1.0: (-1, 1)}),
    ],
)
def test_values_are_exact(agent, name, expected):
    config = dataclasses.replace(CONFIG, agent=agent)
    q = train(getattr(probe_environments, name)(), config)(jnp.array([[x] for x in expected]))
    np.testing.assert_allclose(q, list(expected.values()), atol=ATOL)


@pytest.mark.parametrize("rollout_length, copies", [(1, "two"), (2, "two"), (2, "one")])
def test_three_step_returns_stop_where_the_episode_ends(rollout_length, copies):
    config = dataclasses.replace(CONFIG, n_step=3, rollout_length=rollout_length, updates_per_iteration=rollout_length)
    config = dataclasses.replace(config, replay_copies=copies)
    q = train(probe_environments.discount(), config)(jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(q, [[GAMMA, GAMMA], [1, 1]], atol=ATOL)


# With one copy nothing can start in a limit's own row: that needs episodes of two steps.
@pytest.mark.parametrize("n_step, copies, steps", [(1, "two", 1), (3, "two", 1), (1, "one", 2), (3, "one", 2)])
def test_a_time_limit_is_bootstrapped_through(n_step, copies, steps):
    config = dataclasses.replace(CONFIG, n_step=n_step, replay_copies=copies)
    q = train(probe_environments.time_limit(steps), config)(jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(q, [[GAMMA / (1 - GAMMA)] * 2, [1 / (1 - GAMMA)] * 2], atol=10 * ATOL)  # values of 10
