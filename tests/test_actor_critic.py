"""The latest block as m-step returns against a plain loop, and the actor-critic loss against rlax and enumeration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxdqn
from jaxdqn.agents.actor_critic import Weights
from jaxdqn.base import Batch, Spec, Transition
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.networks import network, policy_and_value
from jaxdqn.parallel.axes import Axes
from jaxdqn.replay.latest import block_batch, latest
from jaxdqn.timeline import timeline
from jaxdqn.validation import validate

A, KEY = 3, jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
CONFIG = Config(agent="a2c", hidden_sizes=(16,))
H = jax.tree.map(jnp.float32, HParams(gamma=0.9, own=Weights(0.7, 0.2)))


def random_block(seed, length, num_envs, ends=0.3):
    random = np.random.default_rng(seed)
    shape = (length, num_envs)
    end = random.random(shape) < ends
    return Transition(
        observation=random.normal(size=(*shape, 2)).astype(np.float32),
        action=random.integers(A, size=shape),
        reward=random.normal(size=shape).astype(np.float32),
        # Half of the ends are time limits; a discount of 0 elsewhere is a lost life, say.
        discount=np.where(random.random(shape) < np.where(end, 0.5, 0.1), 0.0, 1.0).astype(np.float32),
        next_observation=random.normal(size=(*shape, 2)).astype(np.float32),
        episode_end=end,
    )


def forward_view(block, n_step, gamma):
    """(return, bootstrap discount, bootstrap observation) of each transition, by a plain loop."""
    length, num_envs = block.reward.shape
    rows = []
    for t in range(length):
        for env in range(num_envs):
            total, k = 0.0, t
            while True:
                total += gamma ** (k - t) * block.reward[k, env]
                over = block.episode_end[k, env] or block.discount[k, env] == 0
                if over or k == length - 1 or k - t == n_step - 1:
                    break
                k += 1
            factor = gamma ** (k - t + 1) * block.discount[k, env]
            rows.append((total, factor, block.next_observation[k, env]))
    return [np.array(column) for column in zip(*rows, strict=True)]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 7]), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(0, 10**6))
def test_the_block_gives_the_forward_view(length, num_envs, n_step, seed):
    block = random_block(seed, length, num_envs)
    batch = block_batch(jax.tree.map(jnp.asarray, block), n_step, H)
    expected = forward_view(block, n_step, 0.9)
    np.testing.assert_allclose(batch.return_m, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.bootstrap_discount, expected[1], rtol=1e-5)
    np.testing.assert_array_equal(batch.bootstrap_observation, expected[2])
    np.testing.assert_array_equal(batch.observation, block.observation.reshape(-1, 2))
    np.testing.assert_array_equal(batch.action, block.action.reshape(-1))


def test_only_the_newest_block_is_kept():
    first, second = (jax.tree.map(jnp.asarray, random_block(seed, 4, 2)) for seed in (0, 1))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), first)
    memory = latest(example, 4, 2, 3)
    state = memory.add(memory.add(memory.init(), first, jnp.int32(0), H), second, jnp.int32(4), H)
    jax.tree.map(np.testing.assert_array_equal, memory.sample(state, KEY, jnp.int32(8), H), block_batch(second, 3, H))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return Batch(
        observation=jnp.asarray(random.normal(size=(32, 4)), jnp.float32),
        action=jnp.asarray(random.integers(A, size=32), jnp.int32),
        return_m=jnp.asarray(random.normal(size=32), jnp.float32),
        bootstrap_discount=jnp.asarray(0.9 * (random.random(32) < 0.8), jnp.float32),
        bootstrap_observation=jnp.asarray(random.normal(size=(32, 4)), jnp.float32),
        weights=jnp.ones(32),
    )


def test_loss_and_gradient_are_rlaxs(batch):
    agent, apply = (
        make_agent(CONFIG, SPEC),
        network(
            SPEC, policy_and_value(SPEC.num_actions), "auto", (16,), False, "relu", "default", "patches", False
        ).apply,
    )
    learner = agent.init(KEY, H)

    def expected_loss(params):
        logits, value = apply(params, batch.observation)
        target = batch.return_m + batch.bootstrap_discount * apply(learner.params, batch.bootstrap_observation)[1]
        advantage = target - value
        # rlax's first axis is time, and it stops the advantage's gradient itself.
        policy = rlax.policy_gradient_loss(logits, batch.action, advantage, batch.weights)
        return policy + 0.7 * jnp.mean(advantage**2) + 0.2 * rlax.entropy_loss(logits, batch.weights)

    expected, expected_gradients = jax.value_and_grad(expected_loss)(learner.params)
    gradients, output = agent.gradient(learner, batch, KEY, H)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))  # the value head's too


def test_the_policy_gradient_is_the_enumerated_one():
    """A bandit with A arms: the expected gradient over the policy's actions is the gradient of sum_a pi(a) r(a)."""
    agent, apply = (
        make_agent(CONFIG, SPEC),
        network(
            SPEC, policy_and_value(SPEC.num_actions), "auto", (16,), False, "relu", "default", "patches", False
        ).apply,
    )
    hparams = H._replace(own=Weights(jnp.float32(0), jnp.float32(0)))
    learner = agent.init(KEY, hparams)
    observation, reward = jnp.ones((A, 4)), jnp.array([1.0, -2.0, 0.5])
    policy = jax.nn.softmax(apply(learner.params, observation[:1])[0][0])
    zeros = jnp.zeros(A)
    batch = Batch(
        observation, jnp.arange(A), reward, zeros, observation, policy * A
    )  # the mean becomes the expectation

    def expected_return(params):
        return jnp.sum(jax.nn.softmax(apply(params, observation[:1])[0][0]) * reward)

    expected = jax.grad(lambda params: -expected_return(params))(learner.params)
    gradients, _ = agent.gradient(learner, batch, KEY, hparams)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)


def test_terminations_are_masked_and_time_limits_bootstrapped(batch):
    agent = make_agent(CONFIG, SPEC)
    learner = agent.init(KEY, H)

    def gradients(discount, bootstrap_observation):
        changed = batch._replace(bootstrap_discount=jnp.full(32, discount), bootstrap_observation=bootstrap_observation)
        return jax.tree.leaves(agent.gradient(learner, changed, KEY, H)[0])

    other = batch.bootstrap_observation + 1.0
    for discount, alike in ((0.0, True), (0.9, False)):
        same = [
            np.array_equal(a, b)
            for a, b in zip(gradients(discount, batch.bootstrap_observation), gradients(discount, other), strict=True)
        ]
        assert all(same) == alike


def test_it_samples_its_policy_whatever_epsilon_is_and_is_greedy_only_when_asked():
    agent, apply = (
        make_agent(CONFIG, SPEC),
        network(
            SPEC, policy_and_value(SPEC.num_actions), "auto", (16,), False, "relu", "default", "patches", False
        ).apply,
    )
    params = agent.init(KEY, H).params
    observation = jnp.ones((20_000, 4))
    logits = apply(params, observation)[0]
    greedy, _, _ = agent.greedy(params, (), observation, KEY)
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, axis=-1))
    for epsilon in (0.0, 0.1, 1.0):
        sampled, _, _ = agent.act(params, (), observation, KEY, jnp.full(20_000, epsilon))
        frequency = np.bincount(sampled, minlength=A) / 20_000
        np.testing.assert_allclose(frequency, jax.nn.softmax(logits[0]), atol=0.02)  # 5 standard errors


def test_returns_are_not_longer_than_the_block_they_are_taken_from():
    for agent, replay in (("a2c", "auto"), ("dqn", "latest")):
        config = Config(agent=agent, replay=replay, rollout_length=4, n_step=5, learning_starts=0)
        with pytest.raises(UserError, match="n_step 5 is longer than the block of rollout_length 4"):
            validate(config)
        validate(dataclasses.replace(config, n_step=4))


def test_on_policy_agents_learn_from_their_first_block():
    with pytest.raises(UserError, match="learning_starts is 100, but agent 'a2c' is on-policy"):
        validate(Config(agent="a2c", learning_starts=100))
    config = Config(agent="a2c", learning_starts=0, rollout_length=8, n_step=8)
    assert timeline(config).prefill == 0


def test_on_policy_agents_refuse_old_experience():
    with pytest.raises(UserError, match="on-policy"):
        make_components(Config(agent="a2c", replay="uniform"))
    assert make_components(Config(agent="dqn", replay="latest")).replay.init().reward.shape == (1, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, options",
    [(Axes(), {"num_devices": 2, "devices_per_agent": 2}), (Axes("averaging", workers=2), {})],
    ids=["devices", "averaging"],
)
def test_schemes_carry_it(axes, options):
    """Those for which no test of the scheme takes it."""
    blocks = {"env": "Catch-bsuite", "num_envs": 8, "rollout_length": 5, "n_step": 5, "learning_starts": 0}
    config = dataclasses.replace(CONFIG, **blocks, total_steps=1_600, eval_episodes=2, final_episodes=2)
    quiet = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
    result = jaxdqn.train(config, axes=axes, settings=quiet, **options)
    assert result.summary["status"] == "finished" and result.summary["updates"] == 40
    assert np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"updates_per_iteration": 2}, "updates_per_iteration is 2, but agent 'a2c' is on-policy"),
        ({"noisy": True}, "agent 'a2c' cannot be noisy"),
        ({"updates_per_iteration": "4"}, "updates_per_iteration is '4'; it must be a whole number"),
    ],
)
def test_a_gradient_of_another_policy_than_the_one_that_acted_is_refused(changed, words):
    config = jaxdqn.preset("cartpole-a2c").config
    validate(config)
    with pytest.raises(UserError, match=words):
        validate(dataclasses.replace(config, **changed))
