"""Actors with local replays and one learner: equal to the fused loop where they must be, and losing nothing."""

import dataclasses
import functools
import itertools
import queue
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from hypothesis import given
from hypothesis import strategies as st
from probe_environments import clock, clocked

import jaxdqn
from jaxdqn import training
from jaxdqn.base import Transition
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.asynchronous import actor_learner, workers
from jaxdqn.parallel.asynchronous.actor import Actor, ActorNode, ActorPrograms, Local
from jaxdqn.parallel.asynchronous.actor_learner import Axes
from jaxdqn.parallel.asynchronous.workers import WorkerPool
from jaxdqn.parallel.compiled import population, runner
from jaxdqn.replay import ring
from jaxdqn.timeline import timeline

SMALL = Config(
    hidden_sizes=(16,),
    num_envs=8,
    batch_size=32,
    replay_capacity=2_000,
    learning_starts=400,
    total_steps=16_000,
    n_step=2,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 100},
)
# A policy that matters, and that every update changes: else actors that are late would act just the same.
H = HParams(learning_rate=2e-2, target_period=50, epsilon_end=0.02, epsilon_steps=1_000)


def run(built, states, iterations, chunk=None, config=SMALL):
    prefill = timeline(config).prefill
    states, metrics = built.prefill(states, built.zero_metrics, 0, prefill)
    stop = prefill + iterations
    for start in range(prefill, stop, chunk or iterations):
        states, metrics = built.step(states, metrics, start, min(start + (chunk or iterations), stop))
    return states, metrics


def build(axes, config=SMALL, devices=1, **options):
    return actor_learner.build(make_components(config), jax.devices()[:devices], [3], [H], axes, **options)


def gathered(states):
    """[1, 1, ...]; of the fused loop's stack, or of one member without these axes."""
    lanes = jax.tree.leaves(states)[0].shape[:2] == (1, 1)
    return (runner.gather if lanes else runner.gather_one)(states)


def params(states):
    return gathered([state.learner.params for state in states])


@pytest.fixture(scope="module")
def fused():
    built, states = runner.build(make_components(SMALL), jax.devices()[:1], 1, population.assign(1, 1), [3], [H])
    return run(built, states, 1_000)


def test_one_actor_in_lockstep_is_the_fused_loop(fused):
    """Bitwise over 1,000 iterations, metrics included."""
    states, metrics = run(*build(Axes(workers=1, merge_every=1, broadcast_every=1)), 1_000)
    jax.tree.map(np.testing.assert_array_equal, params(states), params(fused[0]))
    jax.tree.map(np.testing.assert_array_equal, runner.gather_one(metrics), runner.gather(fused[1]))


def test_the_comparison_with_the_fused_loop_notices_what_is_late_or_another_key(fused):
    """By what it must not be equal to: parameters one update late or broadcast every other update, other randomness."""

    def differs(states):
        pairs = zip(jax.tree.leaves(params(states)), jax.tree.leaves(params(fused[0])), strict=True)
        return any(np.any(a != b) for a, b in pairs)

    same = Axes(workers=1, merge_every=1, broadcast_every=1)
    for axes in (same._replace(lag=1), same._replace(broadcast_every=2), same._replace(merge_every=2)):
        assert differs(run(*build(axes), 1_000)[0]), axes
    built, (state,) = build(same)
    other = jax.random.fold_in(state.key, 1)
    assert differs(run(built, [state._replace(key=other)], 1_000)[0])


@pytest.mark.parametrize("axes", [slow(Axes(workers=4, merge_every=4, broadcast_every=6)), Axes(workers=2, lag=1)])
def test_lockstep_does_not_depend_on_the_chunks(axes):
    whole, _ = run(*build(axes), 200)
    pieces, _ = run(*build(axes), 200, chunk=33)
    jax.tree.map(np.testing.assert_array_equal, runner.gather_one(whole), runner.gather_one(pieces))


def test_after_a_broadcast_the_actors_have_the_learners_parameters():
    states, _ = run(*build(Axes(workers=4, broadcast_every=10)), 100)
    jax.tree.map(np.testing.assert_array_equal, states[0].broadcast[0], states[0].learner.params)
    states, _ = run(*build(Axes(workers=4, broadcast_every=10)), 105)
    leaves = zip(jax.tree.leaves(states[0].broadcast[0]), jax.tree.leaves(states[0].learner.params), strict=True)
    assert any(np.any(a != b) for a, b in leaves)


def test_late_parameters_are_one_broadcast_old():
    """The actors act on broadcast[0]: with lag 1 that is what the learner sent the time before."""
    built, states = build(Axes(workers=2, broadcast_every=10, lag=1))
    initial = params(states)
    states, _ = run(built, states, 10)
    jax.tree.map(np.testing.assert_array_equal, runner.gather_one([states[0].broadcast[0]]), initial)
    jax.tree.map(np.testing.assert_array_equal, states[0].broadcast[1], states[0].learner.params)


# -- conservation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling, devices", [("lockstep", 1), slow("async", 1), ("async", 3)])
def test_every_transition_arrives_once_in_its_actors_order(coupling, devices):
    """All steps of every environment lie in its own column, one after the other, although actors sleep at random."""
    config = dataclasses.replace(
        SMALL, env_params={}, num_envs=8, replay_capacity=80_000, rollout_length=2, learning_starts=160, n_step=3
    )
    random = np.random.default_rng(0)
    pauses = itertools.cycle(random.exponential(2e-4, 1_000))
    axes = Axes(workers=4, merge_every=5, coupling=coupling)
    options = {"fault_hook": lambda actor, acted: time.sleep(next(pauses))} if coupling == "async" else {}
    built, states = actor_learner.build(clocked(config), jax.devices()[:devices], [0], [H], axes, **options)
    states, _ = run(built, states, 200, chunk=60, config=config)
    state = jax.tree.map(lambda x: x[0, 0], runner.gather_one(states))
    acted = np.array([actor.acted for actor in state.actors])
    assert acted.sum() == 4 * (timeline(config).prefill + 200)
    np.testing.assert_array_equal(state.merged, acted // 5 * 5 * 2)
    names = set()
    for actor, merged in enumerate(state.merged):
        columns = slice(2 * actor, 2 * actor + 2)
        ages = state.replay.reward[:merged, columns]
        np.testing.assert_array_equal(ages, np.repeat(np.arange(1, merged + 1)[:, None], 2, axis=1))
        ids = state.replay.observation[:merged, columns, 0]
        assert (ids == ids[0]).all()
        names |= set(ids[0].tolist())
        assert not state.replay.reward[merged:, columns].any()
        # What is not merged yet lies in the local replay, after it.
        rest = acted[actor] * 2 - merged
        local = state.actors[actor].local.reward[:rest]
        np.testing.assert_array_equal(local, np.repeat(np.arange(merged + 1, merged + rest + 1)[:, None], 2, axis=1))
    assert len(names) == 8


# -- where a stream breaks off ----------------------------------------------------------------------------------------

CLOCKS = dataclasses.replace(SMALL, env_params={}, n_step=4)
EXAMPLE = training.transition_example(clock().spec, make_agent(CLOCKS, clock().spec))


@functools.partial(jax.jit, static_argnums=1)
def all_returns(replayed, n_step):
    """The n-step transition of every row and environment, [rows * N, ...]."""
    rows, num_envs = replayed.reward.shape
    starts = jnp.divmod(jnp.arange(rows * num_envs), num_envs)
    return ring.n_step_batch(ring.layout(EXAMPLE, rows, num_envs), replayed, *starts, n_step, H)


def check_returns(replayed, merged, n_step):
    """All that can be sampled from a replay of clocks: rewards are ages that follow one another, up to the bootstrap.
    Returns how many rewards there are in each."""
    rows, num_envs = replayed.reward.shape
    batch = jax.tree.map(lambda x: np.asarray(x).reshape(rows, num_envs, *x.shape[1:]), all_returns(replayed, n_step))
    written = np.repeat(merged, num_envs // len(merged))
    newer = (written - 1 - np.arange(rows)[:, None]) % rows  # rows after this one
    complete = (newer >= n_step - 1) & (newer < written)
    batch = jax.tree.map(lambda x: x[complete], batch)
    (names, ages), (last_names, last_ages) = batch.observation.T, batch.bootstrap_observation.T
    length = last_ages - ages
    np.testing.assert_array_equal(names, last_names)
    assert set(length) <= set(range(1, n_step + 1))
    true = sum(np.where(k < length, H.gamma**k * (ages + k + 1), 0) for k in range(n_step))
    np.testing.assert_allclose(batch.return_m, true, rtol=1e-5)
    np.testing.assert_allclose(batch.bootstrap_discount, H.gamma**length, rtol=1e-5)
    return length


def test_old_experience_is_dropped_and_counted_and_no_return_reads_across_it():
    """A local replay is as old as its oldest rollout: one that an actor fills slowly is too late. And all adds up:
    rollouts to environment steps, lags to blocks, inserted and dropped blocks to those acted."""

    def fault_hook(actor, acted):
        if actor == 1 and acted % 2:
            time.sleep(0.02)

    axes = Axes(workers=4, coupling="async", merge_every=2, broadcast_every=1, max_lag=2)
    built, states = actor_learner.build(clocked(CLOCKS), jax.devices()[:1], [0], [H], axes, fault_hook=fault_hook)
    states, metrics = run(built, states, 100, chunk=60, config=CLOCKS)
    state, sums = (jax.tree.map(lambda x: x[0, 0], runner.gather_one(tree)) for tree in (states, metrics))
    seen = sums.seen
    acted = np.array([actor.acted for actor in state.actors])
    assert seen["dropped"] == (acted // 2).sum() - state.merged.sum() // 2 > 0 and seen["lag_max"] > 2
    assert check_returns(state.replay, state.merged, n_step=4).mean() < 4
    assert acted.sum() == 4 * (timeline(CLOCKS).prefill + 100)
    assert list(acted) == [seen[f"rollouts_{actor}"] for actor in range(4)]
    assert (acted // 2).sum() == sum(seen[f"lag_{low}"] for low in workers.LAG_BINS)
    assert sums.updates == state.learner.updates == 100
    columns = workers.columns({name: x[None] for name, x in seen.items()})
    rates = sum(columns[f"worker_rate_{actor}"] for actor in range(4))
    assert rates * seen["running_seconds"] == pytest.approx(acted.sum(), rel=1e-5)


def test_a_half_full_local_replay_keeps_its_age_over_chunks_and_resumes():
    """It is as old as its first rollout: also where that was made in a session before."""
    count = lambda number: jnp.int32(number)  # noqa: E731
    programs = ActorPrograms(
        None, lambda params, now, episodes, *_: (now, episodes), lambda params, now, hparams: now.local, count(0)
    )
    node, begun = ActorNode(programs, None, index=0, merge_every=3), []
    now = Actor((), (), "local", acted=count(0), begun=count(0))
    for version in range(7, 15):  # a chunk, or a session, for each rollout
        node.begin(now)
        full = node.act(None, version, 0, learning=False)
        begun.append(full and full.begun)
        now = node.end().actor._replace(acted=count(version - 6))
    assert begun == [None, None, 7, None, None, 10, None, None]


@pytest.fixture(scope="module")
def two_actors():
    """A scheme of two actors with two clocks each, and its first state."""
    config = dataclasses.replace(CLOCKS, num_envs=4, rollout_length=2, replay_capacity=200)
    axes = Axes(workers=2, merge_every=1, coupling="async", max_lag=2)
    scheme = actor_learner.ActorLearner(clocked(config), jax.devices()[:1], H, axes, lambda line: None, None, None)
    return scheme, scheme.init(0)


@given(blocks=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=10, max_size=60))
def test_a_stream_is_cut_where_a_block_is_left_out(two_actors, blocks):
    """Any sequence of blocks, each of an actor and too old or not."""
    scheme, state = two_actors
    chunk = actor_learner.Chunk(scheme, jax.tree.map(jnp.copy, state), scheme.zero_metrics, learning=True)
    chunk.deliveries, chunk.published = queue.Queue(), actor_learner.Published({}, 10)
    count = [0, 0]
    for actor, old in [(0, False), (1, False), (0, False), (1, False), *blocks]:
        chunk.deliveries.put(
            actor_learner.Delivery(actor, Local(clock_block(actor, count[actor]), None), 0 if old else 9, False)
        )
        count[actor] += 1
    chunk._receive()
    data, merged = jax.tree.map(np.asarray, (chunk.data, chunk.merged))
    assert merged.sum() == 2 * (4 + sum(not old for _, old in blocks))
    check_returns(data, merged, n_step=4)


def clock_block(actor, index):
    """The actor's `index`-th two steps of two clocks, [2, 2, ...]."""
    age = np.broadcast_to(2.0 * index + np.arange(2)[:, None], (2, 2)).astype(np.float32)
    name = np.broadcast_to(2.0 * actor + np.arange(2), (2, 2))
    before, after = (np.stack([name, a], -1).astype(np.float32) for a in (age, age + 1))
    no = np.zeros((2, 2), bool)
    return Transition(before, no.astype(np.int32), age + 1, np.ones((2, 2), np.float32), after, no)


def test_an_actor_brings_the_errors_of_its_own_parameters():
    """As priorities of what it delivers (Horgan et al., 2018): against a loop; and the learner draws by them."""
    config = dataclasses.replace(SMALL, replay="prioritised", num_envs=4, replay_capacity=400)
    components, axes = make_components(config), Axes(workers=2, merge_every=10)
    scheme = actor_learner.ActorLearner(components, jax.devices()[:1], H, axes, pytest.fail, None, None)
    chunk = actor_learner.Chunk(scheme, scheme.init(3), scheme.zero_metrics, learning=False)
    chunk.lockstep(0, 10)
    weights, blocks = jax.device_get((chunk.broadcast[0], [actor.local for actor in chunk.actors]))
    chunk.lockstep(10, 20)  # with which the first ten rows are complete

    def q(observation):
        hidden = np.maximum(observation @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"], 0)
        return hidden @ weights["Dense_1"]["kernel"] + weights["Dense_1"]["bias"]

    masses = np.asarray(chunk.data.tree.levels[0][: 100 * 4]).reshape(2, 100, 2)  # actor, row, environment
    for actor, block in enumerate(blocks):
        for row in range(9):  # the last return ends with the local replay
            for env in range(2):
                total, factor, last = 0.0, 1.0, row
                for last in range(row, row + 2):
                    total += factor * block.reward[last, env]
                    factor *= H.gamma * block.discount[last, env]
                    if block.episode_end[last, env]:
                        break
                bootstrap = q(block.next_observation[last, env]).max()
                error = total + factor * bootstrap - q(block.observation[row, env])[block.action[row, env]]
                expected = (abs(error) + H.priority_epsilon) ** H.priority_exponent
                np.testing.assert_allclose(masses[actor, row, env], expected, rtol=1e-4)
    assert masses[:, 9].all() and not masses[:, 10:].any()


@pytest.mark.parametrize("broken", [True, False])
def test_the_stream_of_a_dead_actor_is_cut(broken, two_actors):
    """A resumed run has it again: as a copy of another, where its arrays died with it, or where it was."""
    scheme, state = two_actors
    said, done, end = [], [0, 0], time.monotonic() + 30

    def wait_for(ready):
        while not ready() and time.monotonic() < end:
            time.sleep(0.001)

    def dies(actor, acted):
        if actor == 1 and acted == 15:
            if broken:  # as a compiled program that fails does
                jax.tree.map(lambda x: x.delete(), scheme.nodes[1].end().actor)
            raise ValueError("out of luck")
        if actor == 0 and acted == 15:
            wait_for(lambda: said)

    def returns(actor, acted):
        done[actor] += 1
        if actor == 0:
            wait_for(lambda: done[1] > 5)

    def chunk(state, start, stop, fault_hook):
        scheme.fault_hook, scheme.pool = fault_hook, WorkerPool(2, said.append)
        (state,), _ = scheme.run([state], [scheme.zero_metrics], start, stop, learning=False)
        return state

    state = chunk(jax.tree.map(jnp.copy, state), 0, 5, dies)
    state = chunk(state, 5, 25, dies)
    assert len(said) == 1
    before = int(state.merged[1])
    state = jax.tree.map(lambda x: x[0, 0], runner.gather_one([chunk(state, 25, 35, returns)]))
    assert len(said) == 1 and state.merged[1] > before
    check_returns(state.replay, state.merged, n_step=4)
    ages, end = state.replay.reward[: state.merged[1], 2], ring.outcome(state.replay.ends[: state.merged[1], 2])[1]
    assert end.sum() == 1 and end[before - 1] and ages[before - 1] == before
    assert (ages[before] == before + 1) != broken


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_dead_actor_is_reported_once_and_the_others_do_its_work():
    said = []

    def fault_hook(actor, acted):
        if actor == 2 and acted == 70:
            raise ValueError("out of luck")

    axes = Axes(workers=4, coupling="async")
    built, states = build(axes, report=said.append, fault_hook=fault_hook)
    states, _ = run(built, states, 300, chunk=50)
    assert len(said) == 1 and "worker 2 died" in said[0] and "out of luck" in said[0]
    acted = [int(actor.acted) for actor in states[0].actors]
    assert acted[2] == 70 and sum(acted) == 4 * (timeline(SMALL).prefill + 300)
    assert int(states[0].learner.updates) == 300


def test_the_run_ends_with_the_cause_when_every_actor_died():
    def fault_hook(actor, acted):
        raise ValueError("no power")

    built, states = build(Axes(workers=2, coupling="async"), report=lambda line: None, fault_hook=fault_hook)
    with pytest.raises(UserError, match=r"every worker died.*no power"):
        built.prefill(states, built.zero_metrics, 0, 10)


# -- axes that cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"workers": 3}, "num_envs 8 cannot be divided over 3 actors"),
        ({"workers": 0}, "workers is 0"),
        ({"merge_every": 1000, "slack": 1000}, "do not fit the replay"),
        ({"merge_every": 64, "slack": 64}, "ends before the first local replay is merged; raise it to at least 512"),
        ({"slack": 4}, "slack 4 is below merge_every 8"),
        ({"coupling": "loose"}, "coupling 'loose'"),
        ({"lag": 2}, "lag is 2"),
        ({"max_lag": -1}, "max_lag is -1"),
    ],
)
def test_axes_that_cannot_work_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        schemes.check(jaxdqn.Axes("actor_learner", **changes), SMALL, 1)
