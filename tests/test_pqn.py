"""PQN: lambda returns against rlax, float64 and exact values; its minibatches; and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from cases import slow
from hypothesis import given
from hypothesis import strategies as st

import jaxdqn
from jaxdqn import td
from jaxdqn.agents.pqn import Trace
from jaxdqn.base import Progress, Spec, Transition
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.networks import q_network
from jaxdqn.parallel.axes import Axes
from jaxdqn.replay.latest import Targets, minibatches
from jaxdqn.validation import validate

A, KEY = 3, jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
NETWORK = q_network(SPEC, hidden_sizes=(16,), layer_norm=True)
H = jax.tree.map(jnp.float32, HParams(gamma=0.9, reward_scale=0.5, own=Trace(0.65)))


def sequence(seed, length):
    """(reward, discount, value, time limit), each [T]; a third of the steps terminate, a third are time limits."""
    random = np.random.default_rng(seed)
    kind = random.integers(3, size=length)
    numbers = random.normal(size=(2, length)).astype(np.float32)
    return numbers[0], 0.9 * (kind != 0).astype(np.float32), numbers[1], kind == 1


def arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


def test_lambda_returns_across_a_termination_and_a_time_limit():
    reward, discount, value = [1, 2, 0.5, 1, 3], [0.9, 0, 0.9, 0.9, 0.9], [4, 9, 5, 6, 7]
    returns = td.lambda_returns(*arrays(reward, discount, value, [0.65, 0, 0.65, 0, 0.65]))
    np.testing.assert_allclose(returns, [3.43, 2, 5.819, 6.4, 9.3], rtol=1e-6)


@given(st.sampled_from([1, 4, 12]), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.integers(0, 10**6))
def test_lambda_returns_equal_rlaxs_and_a_loop(length, decay, seed):
    reward, discount, value, limit = sequence(seed, length)
    decays = np.where(limit, 0.0, decay)
    returns = jax.jit(td.lambda_returns)(*arrays(reward, discount, value, decays))
    of_rlax = jax.jit(rlax.lambda_returns)(*arrays(reward, discount, value, decays))
    np.testing.assert_allclose(returns, of_rlax, rtol=1e-5, atol=1e-6)
    expected, following = np.zeros(length), float(value[-1])
    for t in reversed(range(length)):
        bootstrap = float(value[t]) if limit[t] else (1 - decay) * value[t] + decay * following
        expected[t] = following = reward[t] + float(discount[t]) * bootstrap
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-5)


def block_of(seed, length, num_envs):
    random = np.random.default_rng(seed)
    shape, kind = (length, num_envs), random.integers(6, size=(length, num_envs))
    observation, produced = random.normal(size=(2, *shape, 4)).astype(np.float32)
    end = (kind == 0) | (kind == 2)
    produced[:-1] = np.where(end[:-1, :, None], produced[:-1], observation[1:])
    return Transition(
        observation=observation,
        action=random.integers(A, size=shape).astype(np.int32),
        reward=random.normal(size=shape).astype(np.float32),
        discount=(kind > 1).astype(np.float32),  # 0: termination, 1: a lost life, 2: time limit
        next_observation=produced,
        episode_end=end,
    )


@pytest.mark.parametrize("decay", [0.0, 0.65, 1.0])
def test_errors_are_those_of_rlaxs_q_lambda(decay):
    """Prepared targets and the loss together: the step's own final observation, scaled rewards, no way past an end."""
    agent, block = make_agent(Config(agent="pqn", hidden_sizes=(16,), layer_norm=True), SPEC), block_of(0, 9, 5)
    hparams = H._replace(own=Trace(jnp.float32(decay)))
    learner = agent.init(KEY, hparams)
    acted = jnp.max(NETWORK.apply(learner.params, block.observation.reshape(45, 4)), axis=-1).reshape(9, 5)
    block = block._replace(extras=acted)
    prepared = jax.jit(agent.prepare)(learner.params, block, KEY, hparams)
    q = functools.partial(NETWORK.apply, learner.params)

    def of_column(column):
        decays = jnp.where(column.episode_end, 0.0, decay)
        return rlax.q_lambda(
            q(column.observation),
            column.action,
            0.5 * column.reward,
            0.9 * column.discount,
            q(column.next_observation),
            decays,
        )

    expected = jax.jit(jax.vmap(of_column, in_axes=1, out_axes=1))(jax.tree.map(jnp.asarray, block._replace(extras=())))
    batch = sampler(9, 5, 45)(prepared, turns(0))
    gradients, output = jax.jit(agent.gradient)(learner, batch, KEY, hparams)
    errors = expected.reshape(-1)[batch.indices]
    np.testing.assert_allclose(output.priorities, jnp.abs(errors), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.loss, 0.5 * jnp.mean(errors**2), rtol=1e-5)
    chosen = lambda params: NETWORK.apply(params, batch.observation)[jnp.arange(45), batch.action]  # noqa: E731
    semi_gradient = jax.jit(lambda params: jax.vjp(chosen, params)[1](-errors / 45)[0])(learner.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, semi_gradient)


def turns(turn):
    return Progress(np.int32(0), np.int32(7), np.int32(turn))


@functools.cache
def sampler(length, num_envs, size):
    """sample(block, progress) -> TargetBatch, through the replay."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), block_of(0, 1, 1))
    example = example._replace(
        extras=Targets(jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    )
    memory = minibatches(example, length, num_envs, size, epochs=4)
    return jax.jit(lambda block, progress: memory.sample(memory.add(memory.init(), block, 0, H), KEY, progress, H))


@given(st.sampled_from([(4, 6, 8), (5, 3, 15), (1, 8, 2), (6, 6, 1)]), st.integers(0, 10**6))
def test_each_epoch_goes_once_through_the_block(shape, seed):
    length, num_envs, size = shape
    count = length * num_envs
    block = block_of(seed, length, num_envs)
    order = np.random.default_rng(seed).permutation(count).reshape(length, num_envs).astype(np.int32)
    target = np.arange(count, dtype=np.float32).reshape(length, num_envs)
    block = block._replace(extras=Targets(target, order))
    for epoch in range(3):
        first = epoch * count // size
        batches = [sampler(*shape)(block, turns(first + i)) for i in range(count // size)]
        batch = jax.tree.map(lambda *x: np.concatenate(x), *batches)
        np.testing.assert_array_equal(np.sort(batch.indices), np.arange(count))
        np.testing.assert_array_equal(batch.target, batch.indices)
        np.testing.assert_array_equal(batch.observation, block.observation.reshape(count, 4)[batch.indices])
        np.testing.assert_array_equal(batch.action, block.action.reshape(count)[batch.indices])


def test_epochs_and_blocks_have_orders_of_their_own():
    """Of two shuffles of 1,024 about one place is the same; of who shares a minibatch about an eighth."""
    agent = make_agent(Config(agent="pqn", hidden_sizes=(16,)), SPEC)
    learner, block = agent.init(KEY, H), block_of(0, 32, 32)._replace(extras=jnp.zeros((32, 32)))
    prepare = jax.jit(agent.prepare)
    orders = [np.arange(1024)]
    for key in (1, 2):
        prepared = prepare(learner.params, block, jax.random.key(key), H)
        orders += [np.asarray(sampler(32, 32, 1024)(prepared, turns(epoch)).indices) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 12
            shared = np.argsort(one) // 128 == np.argsort(other) // 128
            assert 0.06 < shared.mean() < 0.19  # six standard errors around 1/8


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"batch_size": 48}, "batch_size 48 does not divide the block of rollout_length 64 x num_envs 32 = 2048"),
        ({"updates_per_iteration": 40}, "updates_per_iteration 40 is no whole number of epochs: 16 minibatches"),
        ({"n_step": 3}, "n_step 3 has no effect on agent 'pqn' or its replay; leave it 1"),
        ({"learning_starts": 100}, "agent 'pqn' is on-policy and would throw these steps away; use learning_starts 0"),
        ({"replay": "uniform"}, "agent 'pqn' is on-policy: it cannot learn from replay 'uniform'; leave it 'auto'"),
        ({"replay": "latest"}, "learns from a TargetBatch, and replay 'latest' gives a Batch; leave it 'auto'"),
        ({"agent": "dqn", "replay": "minibatches", "own": ()}, "agent 'dqn' learns from a Batch, and replay 'minibat"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(changed, words):
    config = jaxdqn.preset("cartpole-pqn").config
    validate(config)
    with pytest.raises(UserError, match=words):
        validate(dataclasses.replace(config, **changed))


# -- in training (in every mode: test_modes_agree.py) -----------------------------------------------------------------

SMALL = Config(
    agent="pqn",
    env="Catch-bsuite",
    num_envs=8,
    rollout_length=8,
    batch_size=16,
    updates_per_iteration=8,
    hidden_sizes=(16,),
    layer_norm=True,
    learning_starts=0,
    total_steps=2_560,
    log_interval=640,
    eval_episodes=2,
    final_episodes=2,
)
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)


@pytest.mark.parametrize(
    "axes",
    [
        Axes("parameter_server", workers=2),
        slow(Axes("averaging", workers=2)),
        slow(Axes("sharding", workers=2)),
    ],
    ids=lambda x: getattr(x, "scheme", ""),
)
def test_every_scheme_that_learns_from_blocks_carries_it(axes):
    result = jaxdqn.train(SMALL, axes=axes, settings=QUIET)
    assert result.summary["status"] == "finished" and result.summary["updates"] == 320
    assert np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()


def test_actors_with_a_replay_are_refused():
    with pytest.raises(UserError, match="agent 'pqn' with replay 'auto' learns from the latest block, and actors fill"):
        jaxdqn.train(SMALL, axes=Axes("actor_learner", workers=2), settings=QUIET)
