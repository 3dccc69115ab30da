"""The iteration: what it tells the replay and the agent, in which order, and that chunks do not matter."""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest

from jaxdqn import acting, replay, training
from jaxdqn.base import Array, Batch, Replay
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams, replay_rows

N, T, U = 4, 3, 2
CONFIG = Config(
    hidden_sizes=(8,),
    num_envs=N,
    rollout_length=T,
    updates_per_iteration=U,
    batch_size=16,
    replay_capacity=60,
    learning_starts=24,
    n_step=2,
)
H = jax.tree.map(jnp.float32, HParams(epsilon_steps=120.0, epsilon_end=0.25, ladder_power=7.0))
ENVIRONMENT = probe_environments.observed_action()
AGENT = make_agent(CONFIG, ENVIRONMENT.spec)


class Calls(NamedTuple):
    """What a replay was told last; times count the calls."""

    added_at: Array
    sampled_at: Array
    epsilon: Array  # [T, N]
    times_added: Array
    times_sampled: Array


def spy() -> Replay:
    """A replay that only remembers how it was called. `sample` reports through the batch's indices."""

    def init():
        zeros = [jnp.int32(0) for _ in range(4)]
        return Calls(zeros[0], zeros[1], jnp.zeros((T, N)), zeros[2], zeros[3])

    def add(state, block, written, hparams, priorities=None):
        return state._replace(added_at=written, epsilon=block.extras, times_added=state.times_added + 1)

    def sample(state, key, progress, hparams):
        ones = jnp.ones(CONFIG.batch_size)
        observation, action = ones[:, None], ones.astype(jnp.int32)
        return Batch(observation, action, ones, ones, observation, ones, indices=(progress.written, state.added_at))

    def update_priorities(state, indices, priorities, hparams):
        written, added_at = indices
        # -1 if the sample's row counter is not the one right after the block it should have seen written.
        return state._replace(
            sampled_at=jnp.where(added_at == written - T, written, -1), times_sampled=state.times_sampled + 1
        )

    return Replay(init, add, sample, update_priorities)


@pytest.fixture(scope="module")
def spied():
    """The replay's calls after the ten iterations 0 ... 9 of `prefill` and of `step`."""

    def act(params, carry, observation, key, exploration):
        action, carry, _ = AGENT.act(params, carry, observation, key, exploration)
        return action, carry, exploration

    def gradient(*arguments):
        gradients, output = AGENT.gradient(*arguments)
        return gradients, output._replace(metrics={"ones": jnp.float32(1.0)})

    trainer = training.make_trainer(ENVIRONMENT, AGENT._replace(act=act, gradient=gradient), spy(), CONFIG)

    def run(iterate):
        state = trainer.init(jax.random.key(0), jax.random.key(1), H)
        state, metrics = jax.jit(training.loop(iterate))(state, trainer.zero_metrics(), H, jnp.int32(0), jnp.int32(10))
        return state.learner, state.replay, metrics

    return run(trainer.prefill), run(trainer.step)


def test_each_iteration_adds_one_block_after_the_last(spied):
    for _, calls, _ in spied:
        assert (calls.times_added, calls.added_at) == (10, 9 * T)


def test_updates_sample_after_the_block_was_written(spied):
    _, (_, calls, _) = spied
    assert (calls.times_sampled, calls.sampled_at) == (10 * U, 10 * T)


def test_collecting_does_not_learn(spied):
    (learner, calls, metrics), _ = spied
    assert (learner.updates, calls.times_sampled, metrics.updates) == (0, 0, 0)
    assert all(value == 0 for value in metrics.learning.values())


def test_updates_are_counted(spied):
    _, (learner, _, _) = spied
    assert learner.updates == 10 * U


def test_collecting_explores_always(spied):
    (_, calls, _), _ = spied
    np.testing.assert_array_equal(calls.epsilon, np.ones((T, N)))


def test_exploration_follows_schedule_and_ladder(spied):
    _, (_, calls, _) = spied
    epsilon = 1 - 0.75 * (9 * T * N) / 120  # environment steps before the last iteration
    ladder = epsilon ** (1 + 7 * np.arange(N) / (N - 1))
    np.testing.assert_allclose(calls.epsilon, np.broadcast_to(ladder, (T, N)), rtol=1e-5)


def test_episodes_are_summed_over_the_chunk(spied):
    for _, _, metrics in spied:
        assert metrics.episodes.episodes == metrics.episodes.lengths == 10 * T * N  # of one step each


def test_learning_metrics_are_sums_over_all_updates(spied):
    _, (_, _, metrics) = spied
    assert set(metrics.learning) == {"loss", "gradient_norm", "ones"}
    assert metrics.learning["ones"] == metrics.updates == 10 * U


@pytest.fixture(scope="module")
def trainer():
    example = training.transition_example(ENVIRONMENT.spec, AGENT)
    ring = replay.uniform(example, replay_rows(CONFIG), N, CONFIG.batch_size, CONFIG.n_step)
    trainer = training.make_trainer(ENVIRONMENT, AGENT, ring, CONFIG)
    return trainer._replace(init=jax.jit(trainer.init), step=jax.jit(training.loop(trainer.step)))


def train(trainer, bounds, stream_seed=1):
    state = trainer.init(jax.random.key(0), jax.random.key(stream_seed), H)
    metrics = trainer.zero_metrics()
    for start, stop in itertools.pairwise(bounds):
        state, metrics = trainer.step(state, metrics, H, jnp.int32(start), jnp.int32(stop))
    return state._replace(key=jax.random.key_data(state.key))


@pytest.mark.parametrize("bounds", [(2, 3, 30), (2, 10, 11, 25, 30)])
def test_chunks_change_nothing(trainer, bounds):
    chex.assert_trees_all_equal(train(trainer, bounds), train(trainer, (2, 30)))


def test_shards_start_from_equal_parameters_and_see_other_experience(trainer):
    one, other = (train(trainer, (2, 2), stream_seed=seed) for seed in (1, 2))
    chex.assert_trees_all_equal(one.learner, other.learner)
    one, other = (train(trainer, (2, 6), stream_seed=seed) for seed in (1, 2))
    assert np.any(one.replay.action != other.replay.action)
    assert np.any(one.replay.observation != other.replay.observation)


def test_iterations_see_new_randomness(trainer):
    state = trainer.init(jax.random.key(0), jax.random.key(1), H)
    prefill = jax.jit(training.loop(trainer.prefill))
    state, _ = prefill(state, trainer.zero_metrics(), H, jnp.int32(0), jnp.int32(5))
    blocks = np.asarray(state.replay.action).reshape(5, T * N)  # the whole ring, of uniformly random actions
    assert len(np.unique(blocks, axis=0)) == 5


@pytest.mark.parametrize("clip", [0.5, 2.0, np.inf])
def test_rewards_are_clipped_for_the_learner_and_never_in_what_is_reported(clip):
    """The rewards 1 and -1 of actions, by chance: in the block within the bound, in the sums as they were."""
    environment = probe_environments.action()
    act = jax.jit(training.make_act(environment, AGENT, CONFIG, N))
    hparams = H._replace(reward_clip=jnp.float32(clip), epsilon_end=jnp.float32(1.0), ladder_power=jnp.float32(0.0))
    params = AGENT.init(jax.random.key(0), hparams).params
    actor = acting.start(environment, AGENT, N, jax.random.key(1))
    _, block, sums, _ = act(params, actor, jax.random.key(2), jnp.int32(0), 0, hparams)
    rewards = 1.0 - 2.0 * np.asarray(block.action, np.float32)
    assert len(np.unique(rewards)) == 2
    np.testing.assert_array_equal(block.reward, np.clip(rewards, -clip, clip))
    assert sums.returns == rewards.sum() and sums.episodes == N * T
