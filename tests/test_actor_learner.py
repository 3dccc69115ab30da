"""Actors with local replays and one learner: equal to the fused loop where they must be, and losing nothing."""

import dataclasses
import itertools
import time

import jax
import numpy as np
import pytest
from probe_environments import clocked

from jaxdqn.config import Config, HParams, timeline
from jaxdqn.errors import UserError
from jaxdqn.parallel import actor_learner, fleet, population
from jaxdqn.parallel.actor_learner import Axes

SMALL = Config(
    hidden_sizes=(16,),
    num_envs=8,
    batch_size=32,
    replay_capacity=2_000,
    learning_starts=400,
    total_steps=16_000,
    n_step=2,
    eval_episodes=2,
    env_params={"max_steps_in_episode": 100},
)
# A policy that matters, and that every update changes: else actors that are late would act just the same.
H = HParams(learning_rate=2e-2, target_period=50, epsilon_end=0.02, epsilon_steps=1_000)


def run(built, states, iterations, chunk=None, config=SMALL):
    prefill = timeline(config).prefill
    states, metrics = built.collect(states, built.zero_metrics, 0, prefill)
    stop = prefill + iterations
    for start in range(prefill, stop, chunk or iterations):
        states, metrics = built.step(states, metrics, start, min(start + (chunk or iterations), stop))
    return states, metrics


def build(axes, config=SMALL, devices=1, **options):
    return actor_learner.build(fleet.make_parts(config), jax.devices()[:devices], [3], [H], axes, **options)


def params(states):
    return fleet.gather([state.learner.params for state in states])


@pytest.fixture(scope="module")
def fused():
    built, states = fleet.build(fleet.make_parts(SMALL), jax.devices()[:1], 1, population.assign(1, 1), [3], [H])
    return run(built, states, 1_000)


def test_one_actor_in_lockstep_is_the_fused_loop(fused):
    """Bitwise over 1,000 iterations, metrics included."""
    states, metrics = run(*build(Axes(num_actors=1, merge_every=1, broadcast_every=1)), 1_000)
    jax.tree.map(np.testing.assert_array_equal, params(states), params(fused[0]))
    jax.tree.map(np.testing.assert_array_equal, fleet.gather(metrics), fleet.gather(fused[1]))


def test_the_comparison_with_the_fused_loop_notices_what_is_late_or_another_key(fused):
    """By what it must not be equal to: parameters one update late or broadcast every other update, other randomness."""

    def differs(states):
        pairs = zip(jax.tree.leaves(params(states)), jax.tree.leaves(params(fused[0])), strict=True)
        return any(np.any(a != b) for a, b in pairs)

    same = Axes(num_actors=1, merge_every=1, broadcast_every=1)
    for axes in (same._replace(lag=1), same._replace(broadcast_every=2), same._replace(merge_every=2)):
        assert differs(run(*build(axes), 1_000)[0]), axes
    built, (state,) = build(same)
    other = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, 1)))(state.key)
    assert differs(run(built, [state._replace(key=other)], 1_000)[0])


@pytest.mark.parametrize("axes", [Axes(num_actors=4, merge_every=4, broadcast_every=6), Axes(num_actors=2, lag=1)])
def test_lockstep_does_not_depend_on_the_chunks(axes):
    whole, _ = run(*build(axes), 200)
    pieces, _ = run(*build(axes), 200, chunk=33)
    jax.tree.map(np.testing.assert_array_equal, fleet.gather(whole), fleet.gather(pieces))


def test_after_a_broadcast_the_actors_have_the_learners_parameters():
    states, _ = run(*build(Axes(num_actors=4, broadcast_every=10)), 100)
    jax.tree.map(np.testing.assert_array_equal, states[0].broadcast[0], states[0].learner.params)
    states, _ = run(*build(Axes(num_actors=4, broadcast_every=10)), 105)
    leaves = zip(jax.tree.leaves(states[0].broadcast[0]), jax.tree.leaves(states[0].learner.params), strict=True)
    assert any(np.any(a != b) for a, b in leaves)


def test_late_parameters_are_one_broadcast_old():
    """The actors act on broadcast[0]: with lag 1 that is what the learner sent the time before."""
    built, states = build(Axes(num_actors=2, broadcast_every=10, lag=1))
    initial = params(states)
    states, _ = run(built, states, 10)
    jax.tree.map(np.testing.assert_array_equal, fleet.gather([states[0].broadcast[0]]), initial)
    jax.tree.map(np.testing.assert_array_equal, states[0].broadcast[1], states[0].learner.params)


# -- conservation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling, devices", [("lockstep", 1), ("async", 1), ("async", 3)])
def test_every_transition_arrives_once_in_its_actors_order(coupling, devices):
    """All steps of every environment lie in its own column, one after the other, although actors sleep at random."""
    config = dataclasses.replace(
        SMALL, env_params={}, num_envs=8, replay_capacity=80_000, rollout_length=2, learning_starts=160, n_step=3
    )
    random = np.random.default_rng(0)
    pauses = itertools.cycle(random.exponential(2e-4, 1_000))
    axes = Axes(num_actors=4, merge_every=5, coupling=coupling)
    options = {"disturb": lambda actor, acted: time.sleep(next(pauses))} if coupling == "async" else {}
    built, states = actor_learner.build(clocked(config), jax.devices()[:devices], [0], [H], axes, **options)
    states, _ = run(built, states, 200, chunk=60, config=config)
    state = jax.tree.map(lambda x: x[0, 0], fleet.gather(states))
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


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_dead_actor_is_reported_once_and_the_others_do_its_work():
    said = []

    def disturb(actor, acted):
        if actor == 2 and acted == 70:
            raise ValueError("out of luck")

    axes = Axes(num_actors=4, coupling="async")
    built, states = build(axes, report=said.append, disturb=disturb)
    states, _ = run(built, states, 300, chunk=50)
    assert len(said) == 1 and "worker 2 died" in said[0] and "out of luck" in said[0]
    acted = [int(actor.acted[0, 0]) for actor in states[0].actors]
    assert acted[2] == 70 and sum(acted) == 4 * (timeline(SMALL).prefill + 300)
    assert int(states[0].learner.updates[0, 0]) == 300


def test_the_run_ends_with_the_cause_when_every_actor_died():
    def disturb(actor, acted):
        raise ValueError("no power")

    built, states = build(Axes(num_actors=2, coupling="async"), report=lambda line: None, disturb=disturb)
    with pytest.raises(UserError, match=r"every worker died.*no power"):
        built.collect(states, built.zero_metrics, 0, 10)


def test_old_experience_is_dropped_and_counted():
    """A local replay is as old as its oldest rollout: one that an actor fills slowly is too late."""

    def disturb(actor, acted):
        if actor == 1 and acted % 8 == 7:
            time.sleep(0.05)

    built, states = build(Axes(num_actors=4, coupling="async", broadcast_every=1, max_lag=1), disturb=disturb)
    states, _ = run(built, states, 300)
    seen = built.telemetry(states)
    merged = int(states[0].merged.sum())
    acted = sum(int(actor.acted[0, 0]) // 8 for actor in states[0].actors)
    assert seen["dropped"] == acted - merged // 8 > 0 and seen["lag_max"] > 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_actors": 3}, "num_envs 8 cannot be divided over 3 actors"),
        ({"num_actors": 0}, "num_actors is 0"),
        ({"merge_every": 1000, "slack": 1000}, "do not fit the replay"),
        ({"merge_every": 64, "slack": 64}, "ends before the first local replay is merged; raise it to at least 512"),
        ({"slack": 4}, "slack 4 is below merge_every 8"),
        ({"coupling": "loose"}, "'lockstep' or 'async'"),
        ({"lag": 2}, "lag is 2"),
        ({"max_lag": -1}, "max_lag is -1"),
    ],
)
def test_axes_that_cannot_work_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        build(Axes()._replace(**changes))
