"""Prioritised replay against a loop in NumPy, the slow replay of quantile_agent.py, and the paper's formulas."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantile_agent
import scipy.stats
from cases import slow
from test_replay import EXAMPLE, at, block, history, loop_n_step

import jaxdqn
from jaxdqn import learning, replay
from jaxdqn.base import Progress, Transition
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import devices
from jaxdqn.replay import sum_tree

H = jax.tree.map(jnp.float32, HParams(gamma=0.9, priority_epsilon=1e-3, importance_updates=100.0))
SHAPE = jax.ShapeDtypeStruct
KEYS = [jax.random.fold_in(jax.random.key(0), turn) for turn in range(1_000)]
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)


class Loop:
    """The replay, one transition at a time: a priority for each place, 0 where nothing may start."""

    def __init__(self, actors, rows, envs, n_step, length, alpha):
        self.priority, self.highest = np.zeros((actors, rows, envs)), 1.0
        self.rows, self.n_step, self.length, self.alpha = rows, n_step, length, alpha
        self.written, self.brought = [0] * actors, {}

    def add(self, actor, brought=None):
        block = self.written[actor] // self.length
        self.priority[actor, self.rows_of(block)] = 0.0
        if brought is not None:
            brought = brought + 1e-3
            self.highest = max(self.highest, brought.max())
        self.brought[actor, block] = brought
        complete = block
        while (block - complete) * self.length < self.n_step - 1:
            complete -= 1
        if complete >= 0:
            brought = self.brought.pop((actor, complete))
            self.priority[actor, self.rows_of(complete)] = self.highest if brought is None else brought
        self.written[actor] += self.length

    def rows_of(self, block):
        return np.arange(block * self.length, (block + 1) * self.length) % self.rows

    def update(self, indices, errors):
        for index in indices:
            self.priority.flat[index] = max(errors[indices == index]) + 1e-3
        self.highest = max(self.highest, max(errors) + 1e-3)

    def masses(self):
        return (self.priority > 0) * self.priority**self.alpha


@pytest.mark.parametrize(
    "actors, rows, n_step, length, alpha",
    [(1, 6, 1, 1, 0.6), (1, 12, 3, 1, 0.0), (1, 12, 4, 2, 0.6), (3, 8, 2, 2, 1.0)],
    ids=["plain", "n-step, alpha 0", "n-step, blocks", "three actors"],
)
def test_it_is_the_loop(actors, rows, n_step, length, alpha):
    """Wrapping around several times; with duplicates in a batch, and with priorities that actors bring."""
    envs, batch_size, random = 3, 16, np.random.default_rng(0)
    record = replay.prioritised_regions(EXAMPLE, rows, actors, envs, batch_size, n_step, length)
    if actors == 1:
        record = replay.prioritised(EXAMPLE, rows, envs, batch_size, n_step, length)
    add, sample, update = jax.jit(record.add), jax.jit(record.sample), jax.jit(record.update_priorities)
    hparams = H._replace(priority_exponent=jnp.float32(alpha))
    loop, state = Loop(actors, rows, envs, n_step, length, alpha), record.init()
    data = [history(100, envs, seed) for seed in range(actors)]
    for turn in range(5 * rows):
        actor, brought = int(random.integers(actors)), None
        if turn % 4 == 3:
            brought = 2.0 * random.random((length, envs)).astype(np.float32)
        new, written = block(data[actor], loop.written[actor] % 60, length), jnp.int32(loop.written[actor])
        new = new._replace(extras={"carry": jnp.full((length, envs, 3), 1000.0 * actor)})
        state = add(state, new, written if actors == 1 else (jnp.int32(actor), written), hparams, brought)
        loop.add(actor, brought)
        masses = loop.masses()
        found = np.asarray(sum_tree.leaves(state.tree, jnp.arange(masses.size))).reshape(masses.shape)
        np.testing.assert_allclose(found, masses, rtol=1e-5)
        if not masses.any():
            continue

        batch = jax.tree.map(np.asarray, sample(state, KEYS[turn], Progress(written, jnp.int32(turn), 0), hparams))
        chances = masses.flat[batch.indices] / masses.sum()
        assert np.all(chances > 0)
        weights = (1.0 / (np.count_nonzero(masses) * chances)) ** (0.4 + 0.6 * min(turn / 100, 1.0))
        np.testing.assert_allclose(batch.weights, weights / weights.max(), rtol=1e-4)
        for b in range(batch_size):
            owner, row, env = np.unravel_index(batch.indices[b], masses.shape)
            newest = loop.written[owner] - 1
            time = newest - (newest - row) % rows
            assert time >= 0 and time + n_step <= loop.written[owner]
            rewards, discounts, ends = (
                np.array([x[t % 60, env] for t in range(time, time + n_step)])
                for x in (data[owner].reward, data[owner].discount, data[owner].episode_end)
            )
            total, bootstrap, _ = loop_n_step(rewards, discounts, ends, 0.9)
            np.testing.assert_allclose([batch.return_m[b], batch.bootstrap_discount[b]], [total, bootstrap], rtol=1e-5)
        errors = random.exponential(size=batch_size).astype(np.float32)
        state = update(state, batch.indices, errors, hparams)
        loop.update(batch.indices, errors)
    np.testing.assert_allclose(state.highest, loop.highest, rtol=1e-6)


def test_it_is_the_slow_replay_of_the_quantile_agent():
    rows, envs, many = 10, 3, 4_000
    ours = replay.prioritised(EXAMPLE, rows, envs, many)
    slow = quantile_agent.prioritised(EXAMPLE, rows, envs, many, exponent=lambda hparams: hparams.priority_exponent)
    data, hparams = history(14, envs), H._replace(importance_begin=jnp.float32(1))
    changed, errors = jnp.arange(0, 30, 2), jnp.linspace(0.0, 3.0, 15)

    def made(record, indices):
        add, state = jax.jit(record.add), record.init()
        for row in range(0, 14, 2):
            state = add(state, block(data, row, 2), jnp.int32(row), hparams)
        state = jax.jit(record.update_priorities)(state, indices, errors, hparams)
        return state, jax.jit(record.sample)(state, jax.random.key(3), at(14), hparams)

    (state, batch), (slow_state, slow_batch) = made(ours, changed), made(slow, (changed // envs, changed % envs))
    masses = np.asarray(slow_state.priorities, float).reshape(-1) ** 0.6
    np.testing.assert_allclose(sum_tree.leaves(state.tree, jnp.arange(30)), masses, rtol=1e-5)
    row, env = slow_batch.indices
    for drawn, weights in ((batch.indices, batch.weights), (row * envs + env, slow_batch.weights)):
        found = np.bincount(drawn, minlength=30)
        assert scipy.stats.chisquare(found, masses / masses.sum() * many).pvalue > 1e-3
        np.testing.assert_allclose(weights, masses.min() / masses[drawn], rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_pinned_weights(beta):
    """P of p = [1, 2, 3, 4] at alpha .6; computed in float64."""
    record = replay.prioritised(EXAMPLE, 4, 1, 64)
    hparams = H._replace(importance_begin=beta, importance_end=beta, priority_epsilon=1e-9)
    state = record.add(record.init(), block(history(4, 1), 0, 4), jnp.int32(0), hparams, jnp.arange(1.0, 5.0)[:, None])
    batch = record.sample(state, jax.random.key(0), at(4), hparams)
    chances = np.array([0.148230, 0.224674, 0.286555, 0.340542])
    assert set(np.asarray(batch.indices)) == {0, 1, 2, 3}
    np.testing.assert_allclose(batch.weights, ((chances / chances[0]) ** -beta)[batch.indices], rtol=1e-5)


@pytest.mark.parametrize("used, each", [(2, 2), (4, 4), (4, 2)])
def test_over_shards_weights_are_relative_to_the_largest_of_all(used, each):
    """P(i) = p_i / (D x the sum of its shard); here in groups of `each` of `used` devices."""
    rows, batch_size = 64, 32
    shards = devices.make_shards(used, each)
    record = learning.over_shards(replay.prioritised(EXAMPLE, rows, 1, batch_size), shards)
    data, random = block(history(rows, 1), 0, rows), np.random.default_rng(0)
    brought = (10.0 ** random.uniform(-3, 2, (used, 1, 1)) * random.random((used, rows, 1))).astype(np.float32)

    def of_shard(priorities, shard):
        state = record.add(record.init(), data, jnp.int32(0), H, priorities)
        batch = record.sample(state, jax.random.fold_in(jax.random.key(0), shard), at(rows), H)
        return batch.indices, batch.weights

    over = devices.over_devices(of_shard, jax.devices()[:used], num_mapped=2)
    indices, weights = (np.asarray(x) for x in over(brought, np.arange(used)))
    masses = (brought[:, :, 0].astype(float) + 1e-3) ** 0.6
    chances = np.take_along_axis(masses / (each * masses.sum(axis=1, keepdims=True)), indices, axis=1)
    expected = (1.0 / (each * rows * chances)) ** 0.4
    largest = expected.reshape(-1, each * batch_size).max(axis=1).repeat(each)
    np.testing.assert_allclose(weights, expected / largest[:, None], rtol=1e-4)


def test_a_uniform_replay_over_shards_is_what_it_was():
    record = replay.uniform(EXAMPLE, 8, 1, 4)
    assert learning.over_shards(record, devices.make_shards(2, 2)) is record


def test_what_is_not_finite_is_drawn_seldom_and_nothing_else_changes():
    record = replay.prioritised(EXAMPLE, 8, 1, 64)
    state = record.add(record.init(), block(history(8, 1), 0, 8), jnp.int32(0), H)
    state = record.update_priorities(state, jnp.arange(3), jnp.array([jnp.nan, jnp.inf, 1e38]), H)
    batch = record.sample(state, jax.random.key(0), at(8), H)
    assert np.isfinite(state.highest) and np.all(np.isfinite(batch.weights)) and np.all(batch.weights > 0)


def test_blocks_that_would_not_be_complete_in_time_are_refused():
    record = replay.prioritised(EXAMPLE, 8, 1, 64, n_step=3, block_length=2)
    with pytest.raises(ValueError, match="a block of 4 rows; with n_step 3 all have 2"):
        record.add(record.init(), block(history(4, 1), 0, 4), jnp.int32(0), H)


@pytest.mark.parametrize("rows, n_step, block, needed", [(8, 3, 8, 16), (12, 4, 4, 8), (4, 4, 2, 6)])
def test_a_ring_in_which_blocks_are_overwritten_before_they_are_complete_is_refused(rows, n_step, block, needed):
    make = lambda: replay.prioritised(EXAMPLE, rows, 1, 8, n_step, block)  # noqa: E731
    if needed <= rows:
        assert make().rows == rows
        return
    with pytest.raises(UserError, match=rf"blocks of {block} rows, needs {needed} rows .* holds {rows}; raise"):
        make()


def test_a_learner_whose_regions_hold_one_merge_is_refused():
    """With eight rows of each actor at once, a return of three rows would be complete when its rows are gone."""
    config = Config(
        env="Catch-bsuite",
        agent="dqn",
        replay="prioritised",
        n_step=3,
        num_envs=16,
        replay_capacity=128,
        batch_size=32,
        total_steps=5_000,
        learning_starts=1_000,
    )
    with pytest.raises(UserError, match="blocks of 8 rows, needs 16 rows of 16 transitions, and the replay holds 8"):
        jaxdqn.train(config, axes=Axes("actor_learner", workers=4, merge_every=8), settings=QUIET)


def test_the_example_of_the_docs_runs():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "replay.md").read_text(encoding="utf-8")
    named = {}
    exec(page.split("```python")[1].split("```")[0], named)
    assert named["batch"].weights.shape == (32,) and named["state"].highest > 1


# -- blind cliffwalk --------------------------------------------------------------------------------------------------


@functools.cache
def cliffwalk(states):
    """Every transition of all 2^n sequences of actions, each until it ends: the right action leads on, and at the end
    to a reward of 1; the wrong one ends with 0. Schaul et al. (2016), section 3.1."""
    where, right = [], []
    for state in range(states):
        times = 2 ** (states - state - 1)
        where += [state] * 2 * times
        right += [1] * times + [0] * times
    where, right = np.array(where), np.array(right)
    last = where == states - 1
    data = Transition(
        observation=where.astype(np.int32),
        action=right.astype(np.int32),
        reward=(last & (right == 1)).astype(np.float32),
        discount=((right == 1) & ~last).astype(np.float32),
        next_observation=np.minimum(where + 1, states - 1).astype(np.int32),
        episode_end=(right == 0) | last,
    )
    return jax.tree.map(lambda x: jnp.asarray(x)[:, None], data)


def updates_until_known(kind, states, hparams, most=400_000):
    """Updates of a table, each by one transition, until its mean squared error is below 1e-3."""
    data, gamma = cliffwalk(states), 1 - 1 / states
    rows = len(data.reward)
    example = jax.tree.map(lambda x: SHAPE((), x.dtype), data)
    record = getattr(replay, kind)(example, rows, 1, 1)
    truth = jnp.stack([jnp.zeros(states), gamma ** jnp.arange(states - 1.0, -1.0, -1.0)], axis=1)

    def unknown(carry):
        _, table, count = carry
        return (jnp.mean((table - truth) ** 2) > 1e-3) & (count < most)

    def one(carry):
        state, table, count = carry
        batch = record.sample(state, jax.random.fold_in(jax.random.key(0), count), Progress(rows, count, 0), hparams)
        at = batch.observation, batch.action
        error = batch.return_m + batch.bootstrap_discount * table[batch.bootstrap_observation].max(1) - table[at]
        state = record.update_priorities(state, batch.indices, jnp.abs(error), hparams)
        return state, table.at[at].add(0.25 * error), count + 1

    @jax.jit
    def run():
        state = record.add(record.init(), data, jnp.int32(0), hparams)
        return jax.lax.while_loop(unknown, one, (state, jnp.zeros((states, 2)), jnp.int32(0)))[2]

    assert rows == 2 ** (states + 1) - 2
    return int(run())


def test_blind_cliffwalk_takes_a_sixth_of_the_updates():
    hparams = H._replace(gamma=1 - 1 / 12, priority_exponent=1.0, priority_epsilon=1e-6)
    by_chance, by_error = (updates_until_known(kind, 12, hparams) for kind in ("uniform", "prioritised"))
    print(by_chance, by_error)
    assert by_chance < 400_000 and 6 * by_error <= by_chance


# -- in training ------------------------------------------------------------------------------------------------------

SMALL = Config(
    env="Catch-bsuite",
    replay="prioritised",
    num_envs=8,
    batch_size=32,
    hidden_sizes=(16,),
    replay_capacity=800,
    learning_starts=200,
    total_steps=1_600,
    eval_episodes=2,
    final_episodes=2,
    n_step=3,
)


@pytest.mark.parametrize(
    "changes, hparams, words",
    [
        ({"agent": "a2c", "learning_starts": 0}, {}, "is on-policy: it cannot learn from replay 'prioritised'"),
        ({}, {"priority_exponent": 1.5}, r"hparams.priority_exponent is 1.5; it must be a number in \[0, 1\]"),
        ({}, {"importance_begin": -0.1}, r"hparams.importance_begin is -0.1; it must be a number in \[0, 1\]"),
        ({}, {"importance_end": 2.0}, r"hparams.importance_end is 2.0; it must be a number in \[0, 1\]"),
        ({}, {"priority_epsilon": 0.0}, "hparams.priority_epsilon is 0.0; it must be a number above 0"),
        (
            {"rollout_length": 100, "replay_capacity": 800, "total_steps": 8_000},
            {},
            "the replay needs 200 rows before it can be sampled, and holds 100",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, hparams, words):
    with pytest.raises(UserError, match=words):
        jaxdqn.train(Config(**{**vars(SMALL), **changes}), HParams(**hparams), settings=QUIET)


@pytest.mark.parametrize(
    "agent, axes",
    [
        ("ensemble_dqn", Axes()),
        ("dqn", Axes("actor_learner", workers=2, merge_every=2)),
        slow("dqn", Axes("sharding", workers=2)),
        slow("rainbow", Axes("actor_learner", workers=2, coupling="async")),
        slow("rainbow", Axes("parameter_server", workers=2)),
        slow("rainbow", Axes("averaging", workers=2)),
    ],
    ids=lambda x: getattr(x, "scheme", x),
)
def test_schemes_carry_it(agent, axes):
    config = Config(**{**vars(SMALL), "agent": agent})
    result = jaxdqn.train(config, HParams(), axes=axes, settings=QUIET)
    losses = result.metrics.loss.dropna()
    assert len(losses) and np.isfinite(losses).all() and result.summary["status"] == "finished"
