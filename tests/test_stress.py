"""The path of actor-learners (threads, queue, region inserts, samples) under load: nothing is lost or doubled."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from probe_environments import clocked

from jaxdqn.base import Progress, Transition
from jaxdqn.config import Config, HParams
from jaxdqn.parallel.asynchronous import actor_learner, learner
from jaxdqn.parallel.asynchronous.actor_learner import Axes
from jaxdqn.parallel.compiled import runner

ACTORS, ROWS, N_STEP, SAMPLED_EVERY = 8, 5_000, 3, 100
H = HParams(learning_rate=0.0)
# The smallest blocks there are: one step of one environment.
CONFIG = Config(
    hidden_sizes=(4,),
    num_envs=ACTORS,
    batch_size=8,
    replay_capacity=ACTORS * ROWS,
    learning_starts=ACTORS * 50,
    n_step=N_STEP,
)


def check_batch(batch):
    """n-step transitions of a clock: one environment's, whose ages follow one another."""
    name, age = np.asarray(batch.observation).T
    last_name, last_age = np.asarray(batch.bootstrap_observation).T
    np.testing.assert_array_equal(name, last_name)
    np.testing.assert_array_equal(last_age, age + N_STEP)
    # The reward of a step is the age after it.
    expected = sum(H.gamma**k * (age + k + 1) for k in range(N_STEP))
    np.testing.assert_allclose(batch.return_m, expected, rtol=1e-6)


def check_ring(ring, merged):
    """Each region [ROWS] holds the last rows of one environment, in order, with no gap since its first step."""
    rows = np.arange(ROWS)[:, None]
    written = merged - 1 - (merged - 1 - rows) % ROWS  # which of its actor's rows lies there
    np.testing.assert_array_equal(ring.reward, np.where(written >= 0, written + 1, 0))
    names = ring.observation[..., 0]
    assert all((names[:count, actor] == names[0, actor]).all() for actor, count in enumerate(np.minimum(merged, ROWS)))
    assert len(set(names[0])) == ACTORS


@pytest.mark.parametrize("blocks", [2_000, slow(30_000)])
def test_blocks_arrive_once_in_order_from_eight_actors_with_random_delays(blocks):
    random = np.random.default_rng(0)
    pauses = itertools.cycle(np.where(random.random(997) < 0.1, random.exponential(2e-3, 997), 0.0))
    axes = Axes(workers=ACTORS, merge_every=1, coupling="async", slack=8)

    def fault_hook(actor, acted):
        time.sleep(next(pauses))

    components = clocked(CONFIG)
    scheme = actor_learner.ActorLearner(components, jax.devices()[:2], H, axes, pytest.fail, fault_hook, engine=None)
    state = scheme.init(0)
    scheme.warm_up(state)
    learn, updates = scheme.programs.learn, itertools.count()
    sample = jax.jit(learner.global_replay(components, axes).sample)

    def learn_and_look(learner, data, sums, merged, key, hparams, iteration):
        """The learner's own program; now and then a batch is also looked at, while the actors go on."""
        if next(updates) % SAMPLED_EVERY == 0:
            only = (data, merged)
            check_batch(
                sample(only[0], jax.random.key(int(iteration)), Progress(only[1], jnp.int32(0), jnp.int32(0)), H)
            )
        return learn(learner, data, sums, merged, key, hparams, iteration)

    scheme.programs = scheme.programs._replace(learn=learn_and_look)
    metrics, prefill, total = scheme.zero_metrics, 50, blocks // ACTORS
    states, metrics = scheme.run([state], [metrics], 0, prefill, learning=False)
    middle = (prefill + total) // 2
    for start, stop in ((prefill, middle), (middle, total)):
        states, metrics = scheme.run(states, metrics, start, stop, learning=True)
    state = jax.tree.map(lambda x: x[0, 0], runner.gather_one(states))
    assert state.merged.sum() == blocks and next(updates) == total - prefill
    np.testing.assert_array_equal(state.merged, [actor.acted for actor in state.actors])
    check_ring(state.replay, state.merged)
    for seed in range(10):
        check_batch(sample(state.replay, jax.random.key(seed), Progress(state.merged, 0, 0), H))


def test_the_checks_notice_a_lost_a_doubled_and_a_misplaced_block():
    """By NumPy alone: each fault, put into a sound ring, fails."""
    count = ROWS + 7
    merged = np.full(ACTORS, count)
    written = count - 1 - (count - 1 - np.arange(ROWS)) % ROWS
    names = np.broadcast_to(np.arange(ACTORS) / ACTORS, (ROWS, ACTORS))

    def ring(rewards, names=names):
        columns = np.broadcast_to(rewards[:, None], (ROWS, ACTORS))
        return Transition(np.stack([names, columns - 1], -1), None, columns, None, None, None)

    check_ring(ring(written + 1), merged)
    strange = names.copy()
    strange[100, 3] = names[100, 4]
    for wrong in (ring(written + 2), ring(written), ring(written + 1, strange)):
        with pytest.raises(AssertionError):
            check_ring(wrong, merged)
