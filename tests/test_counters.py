"""Every counter against Python's integers, at the ends of the range that `validate` accepts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probe_environments
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdqn import acting, exploration, training
from jaxdqn.base import Network, Policy, Transition
from jaxdqn.components import make_agent
from jaxdqn.config import FLOAT_WHOLE, INT32_MAX, MOST_SUMMED, Config, HParams, validate_hparams
from jaxdqn.errors import UserError
from jaxdqn.learning import sgd_agent
from jaxdqn.parallel.asynchronous import learner, workers
from jaxdqn.parallel.compiled.averaging import Schedule
from jaxdqn.replay import ring
from jaxdqn.sweeps import space
from jaxdqn.timeline import timeline
from jaxdqn.validation import validate

LAST = INT32_MAX - 1  # the largest number of updates, iterations and rows
COUNTS = st.one_of(st.integers(0, LAST), st.integers(LAST - 100, LAST), st.integers(2**24 - 100, 2**24 + 100))


def traced(**changes) -> HParams:
    return jax.tree.map(jnp.float32, HParams(**changes))


# The target network's clock.

AGENT = sgd_agent(Network(lambda key: jnp.zeros(1), None), None, Policy(None, None), lambda h: optax.sgd(0.5))
START = AGENT.init(jax.random.key(0), traced())


@jax.jit
@jax.vmap
def target_moves(updates, period):
    """Whether an update after `updates` others copies the parameters into the target."""
    learner = START._replace(updates=updates)
    hparams = traced()._replace(target_period=period)
    return AGENT.apply(learner, jnp.ones(1), jnp.float32(0), hparams)[0].target_params[0] != 0


@pytest.mark.parametrize("period", [1, 2, 3, 50, 500, 999_983, 2**24 - 1, 2**24])
def test_the_target_is_copied_at_exactly_every_period(period):
    around = [0, 2**24, 2**25, 50_000_000, 2**30, LAST]
    updates = [u for center in around for u in range(max(center - 600, 0), min(center + 600, LAST))]
    updates += [u for k in range(5) for u in ((LAST // period - k) * period - 1,) if 0 <= u < LAST]
    moves = target_moves(jnp.array(updates, jnp.int32), jnp.full(len(updates), period, jnp.float32))
    np.testing.assert_array_equal(moves, [(u + 1) % period == 0 for u in updates])


@pytest.mark.parametrize("period", [0, 0.5, 2.5, -3, 2**24 + 1, 2**31, math.inf, math.nan])
def test_a_period_that_is_no_exact_whole_number_is_refused(period):
    with pytest.raises(UserError, match=r"target_period is .*from 1 to 16,777,216, a whole one"):
        validate_hparams(HParams(target_period=period))


def test_a_searched_period_is_a_whole_number():
    for options in ({"low": 10, "high": 1000}, {"low": 1, "high": 5000, "log": True}):
        domain = space.parse({"target_period": options}).parameters[0].domain
        values = [domain.at(u) for u in np.linspace(0, 0.999, 50)]
        assert all(float(value).is_integer() for value in values) and len(set(values)) > 20
    with pytest.raises(UserError, match="whole numbers"):
        space.parse({"target_period": {"low": 1.5, "high": 10}})


# Rows of the ring.

SCALAR = Transition(*(jax.ShapeDtypeStruct((), jnp.float32),) * 6)


@settings(max_examples=30, deadline=None)
@given(COUNTS, st.integers(2, 50), st.integers(1, 3), st.integers(1, 4))
def test_sampled_rows_are_complete_and_behind_the_write_head(written, rows, num_envs, length):
    length = min(length, rows - 1)
    written = max(written, length)
    layout = ring.layout(SCALAR, rows, num_envs)
    row, env = ring.uniform_starts(layout, jax.random.key(written), 64, jnp.int32(written), length)
    kept = range(max(written - rows, 0), written - length + 1)
    assert set(np.asarray(row).tolist()) <= {number % rows for number in kept}
    assert set(np.asarray(env).tolist()) <= set(range(num_envs))


# Keys, schedules, averaging.


def test_keys_of_all_turns_differ():
    turns = jnp.array([0, 1, 2, 2**24, 2**30, LAST - 1, LAST], jnp.int32)
    keys = jax.vmap(lambda turn: jnp.stack(training.stream_keys(jax.random.key(0), turn)))(turns)
    data = np.asarray(jax.random.key_data(keys)).reshape(2 * len(turns), -1)
    assert len(np.unique(data, axis=0)) == 2 * len(turns)


def test_schedules_fall_and_are_exact_to_a_millionth():
    iterations = np.unique(np.concatenate([np.linspace(0, LAST, 500), 2.0 ** np.arange(31)]).astype(np.int64))
    for steps in (1, 16, 1024):
        at = jnp.asarray(iterations, jnp.int32).astype(jnp.float32) * steps
        num_steps = LAST * steps * 0.7
        values = np.asarray(exploration.linear_schedule(1.0, 0.05, jnp.float32(num_steps), at))
        expected = 1 - 0.95 * np.minimum(iterations * float(steps) / num_steps, 1)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        assert np.all(np.diff(values) <= 0)


@given(COUNTS, st.integers(1, INT32_MAX // 2), st.booleans())
def test_the_next_averaging_is_the_next_multiple(iteration, period, dense):
    due = int(Schedule(period, 1 if dense else 0).next(jnp.int32(iteration), jnp.int32(0)))
    assert due == min(iteration + 1 if dense else (iteration // period + 1) * period, INT32_MAX)


# Sums over episodes.


def test_episodes_and_their_lengths_are_counted_exactly():
    environment = probe_environments.discount()  # episodes of two steps
    config = Config(hidden_sizes=(4,), num_envs=3, batch_size=4, replay_capacity=16)
    agent = make_agent(config, environment.spec)
    state = acting.start(environment, agent, 3, jax.random.key(1))
    params = agent.init(jax.random.key(0), traced()).params
    _, _, new = acting.rollout(environment, agent, params, state, jax.random.key(2), jnp.ones(3), 5)
    for before in (2**24, 2**25 + 1, INT32_MAX // 2):
        sums = acting.EpisodeSums(*(jnp.asarray(before, x.dtype) for x in new))
        total = jax.tree.map(jnp.add, sums, new)
        assert (int(total.episodes), int(total.lengths)) == (before + 6, before + 12)


# What is refused.

LONG = Config(num_envs=1, rollout_length=1, batch_size=1, learning_starts=0, total_steps=LAST - 1, replay_copies="two")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"total_steps": INT32_MAX}, "2,147,483,647 iterations"),
        ({"num_envs": 1, "rollout_length": 1024, "total_steps": 3_000_000_000}, "rows of experience"),
        ({"total_steps": INT32_MAX // 2, "updates_per_iteration": 3}, "gradient updates"),
        ({"replay_capacity": INT32_MAX}, "transitions in the replay"),
        ({"log_interval": MOST_SUMMED + 1}, "1,048,577 updates, .* Lower log_interval"),
        (
            {"log_interval": MOST_SUMMED + 8, "rollout_length": 8, "total_steps": 10**9},
            "1,048,584 rows of experience .* Lower log_interval",
        ),
        ({"num_envs": 2**10, "log_interval": 2**31, "total_steps": 2**40}, "2,147,483,648 environment steps"),
    ],
)
def test_what_would_overflow_is_refused_with_its_numbers(changes, words):
    config = dataclasses.replace(LONG, **{"log_interval": 10_000, **changes})
    with pytest.raises(UserError, match=words):
        validate(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_envs": 1, "rollout_length": 1024, "total_steps": 2_000_000_000},
        {"num_envs": 4096, "total_steps": 10**12, "replay_capacity": 10**6},
        {"replay_capacity": INT32_MAX - 10},
    ],
)
def test_what_fits_is_accepted_and_counts_in_32_bits(changes):
    config = dataclasses.replace(LONG, **{"log_interval": 10_000, **changes})
    validate(config)
    line = timeline(config)
    counts = line.total, (line.total + line.prefill) * config.rollout_length, line.updates(line.total, 1)
    assert max(counts) < INT32_MAX


def test_the_sum_of_lags_is_for_a_mean_and_has_no_end():
    """Up to 2^24 updates between two logging points, with hundreds of versions each."""
    seen = workers.Seen(workers.LAGS, ["running"])
    sums = workers.zeros(seen.take())
    for _ in range(3):
        sums = workers.added(sums, {**seen.take(), "lag_sum": 2.1e9, "lag_1": 2**23})
    found = workers.columns({name: np.asarray(x) for name, x in sums.items()} | {"rollouts_0": 1})
    assert found["lag_mean"] == pytest.approx(2.1e9 / 2**23)


def test_one_actor_may_act_for_all_where_they_do_not_wait_for_each_other():
    config = Config(num_envs=4, total_steps=4 * (INT32_MAX // 4), learning_starts=1_000, log_interval=10**6)
    learner.check(learner.Axes(workers=4, coupling="lockstep"), config)
    with pytest.raises(UserError, match="one actor may act for all of them"):
        learner.check(learner.Axes(workers=4, coupling="async"), dataclasses.replace(config, total_steps=INT32_MAX))


def test_a_sum_of_so_many_equal_numbers_is_right_to_a_percent():
    """And of four times as many it is not."""
    for count, right in ((MOST_SUMMED, True), (4 * MOST_SUMMED, False)):
        total = np.cumsum(np.full(count, 0.1, np.float32), dtype=np.float32)[-1]  # one after the other
        assert (abs(total / count - 0.1) < 0.001) == right


def test_a_return_counts_every_step_of_an_evaluation():
    """A float32 that counts by ones stands still at 2^24."""
    validate(Config(eval_max_steps=FLOAT_WHOLE))
    with pytest.raises(UserError, match="eval_max_steps is 16777217; it must be at most 16777216"):
        validate(Config(eval_max_steps=FLOAT_WHOLE + 1))
