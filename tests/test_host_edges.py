"""Environments on the host, in what other tests do not show: seeds, ladders, memories, bounds of rewards, stacks at a
start, and what is left behind."""

import dataclasses
import gc
import multiprocessing
import threading
import time

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from gymnasium import spaces
from host_twins import Counters, frames_only, twin
from test_on_host import SEED, SMALL, H, components, run

from jaxdqn import agents, evaluation_on_host, training
from jaxdqn.base import HostStep
from jaxdqn.environments import host, registry
from jaxdqn.parallel.asynchronous import actor_learner
from jaxdqn.parallel.asynchronous.actor import start_actor
from jaxdqn.parallel.asynchronous.actor_learner import Axes
from jaxdqn.parallel.compiled import runner

TWO = Axes(workers=2, merge_every=2, broadcast_every=3)
SEQUENCES = {"burn_in": 1, "sequence_length": 4, "period": 3}


@pytest.mark.parametrize(
    "changes, hparams, prefill",
    [
        slow({"agent": "drqn", "replay": "sequences", "n_step": 1, "own": SEQUENCES}, H, 16),
        ({"n_step": 3, "replay_copies": "one"}, H._replace(reward_clip=0.5, ladder_power=3.0), 4),
    ],
)
def test_a_twin_learns_the_same_bits_with_a_memory_and_with_bounded_rewards(changes, hparams, prefill):
    config, hparams = agents.complete(dataclasses.replace(SMALL, **changes), hparams)
    made = []
    for environment in (frames_only("first"), twin(frames_only("first"), SEED, config.rollout_length)):
        axes = Axes(workers=1, merge_every=2, broadcast_every=3)
        built, states = actor_learner.build(
            components(environment, config), jax.devices()[:1], [SEED], [hparams], axes, print
        )
        states, metrics = built.prefill(states, built.zero_metrics, 0, prefill)
        states, metrics = built.step(states, metrics, prefill, prefill + 24)
        parts = [(states[0].learner, states[0].replay, metrics[0])]
        made.append(jax.tree.map(np.asarray, runner.gather_one(parts)))
    jax.tree.map(np.testing.assert_array_equal, *made)
    assert made[0][2].episodes.episodes > 5


def test_every_reset_has_a_seed_of_its_own():
    """That of an actor, and of its next attempt."""

    def trouble(making, step):
        if (making, step) == (1, 8):
            raise ValueError("out of order")

    counters, seeds = Counters(trouble), []
    counters.makings = -1
    plain = counters.environment.on_host

    def make(num_envs):
        made = plain(num_envs)
        return made._replace(reset=lambda seed: (seeds.append(seed), made.reset(seed))[1])

    run(components(counters.environment._replace(on_host=make)), TWO, 4)
    # The first is to compile; then come actors 0 and 1, and 0 again.
    assert len(seeds) == 4 and seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_each_actor_has_its_own_rungs_of_the_ladder():
    hparams = H._replace(ladder_power=7.0, epsilon_begin=0.4, epsilon_end=0.4)
    parts = components(Counters().environment)
    scheme = actor_learner.ActorLearner(parts, jax.devices()[:1], hparams, TWO, print, None, None)
    state = scheme.init(SEED)
    plan = scheme.acting.act.__self__._programs.plan
    expected = training.make_epsilons(parts.config, 4)(np.int32(9), 0, scheme.hparams)[1]
    of = [plan(state.actors[index], np.int32(9), np.int32(index), scheme.hparams)[1] for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(of), expected)
    assert len(set(np.asarray(expected).tolist())) == 4


@pytest.mark.parametrize("padding", ["first", slow("zeros")])
def test_stacks_of_newest_frames_are_those_of_the_environment(padding):
    environment, steps, envs = frames_only(padding), 40, 3
    state, first = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), envs))

    def step(state, key):
        return jax.vmap(environment.step)(jax.random.split(key, envs), state, jnp.zeros(envs, jnp.int32))

    walk = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps))[1])
    taken = jax.tree.map(np.asarray, walk(state))
    seen = np.concatenate([np.asarray(first)[None], taken.observation[:-1]])
    spec, reach, since = environment.spec, host.horizon(environment.spec), np.zeros((steps, envs), int)
    for row in range(1, steps):
        since[row] = np.where(taken.episode_end[row - 1], 0, np.minimum(since[row - 1] + 1, reach))
    newest = np.concatenate([np.full((reach, *seen[0, ..., -1:].shape), 7, seen.dtype), seen[..., -1:]])
    np.testing.assert_array_equal(host.stacked(spec, newest, jnp.asarray(since)), seen)
    now = host.begun(spec, first[..., -1:])
    for row in range(steps):
        np.testing.assert_array_equal(now, seen[row])
        frames = taken.observation[row, ..., -1:], taken.final_observation[row, ..., -1:]
        one = HostStep(frames[0], taken.reward[row], taken.discount[row], frames[1], taken.episode_end[row])
        after = host.timestep(spec, now, one)
        np.testing.assert_array_equal(after.final_observation, taken.final_observation[row])
        now = after.observation
    assert taken.episode_end.sum() > 5


def test_local_replays_hold_each_frame_once():
    parts = components(frames_only("zeros"), dataclasses.replace(SMALL, replay_copies="one"))
    local = jax.eval_shape(lambda key: start_actor(parts, 1, 2, key).local, jax.random.key(0))
    assert local.observation.shape == (6, 4, 2, 1, 1) and local.next_observation == ()


def serving():
    return [thread for thread in threading.enumerate() if "_serve" in thread.name]


def gone(alive, seconds=10.0):
    until = time.monotonic() + seconds
    while alive() and time.monotonic() < until:
        time.sleep(0.01)
    return not alive()


def player(counters, bound):
    parts = components(counters.environment)
    params = parts.agent.init(jax.random.key(0), parts.agent.complete(H)).params
    play = evaluation_on_host.player(counters.environment, parts.agent, 3, bound, 0.0, 20.0)
    return lambda *film: play(params, jax.random.key(1), *film)


@pytest.mark.parametrize("bound, length", [(7, 7), (10, 10), (12, 10)])
def test_an_evaluation_closes_what_it_made_and_takes_no_step_too_many(bound, length):
    taken = []
    counters = Counters(lambda making, step: taken.append(step))
    episodes = player(counters, bound)()
    assert len(taken) == length and np.all(episodes.lengths == length) and np.all(episodes.finished == (length == 10))
    assert np.all(episodes.returns == length * (length + 1) / 2)
    assert counters.closed == counters.makings == 1 and gone(serving)


def test_a_film_that_fails_leaves_no_environments():
    def film(observation, environments, begins):
        if not begins:
            raise MemoryError

    with pytest.raises(MemoryError):
        player(Counters(), 9)(film)
    assert gone(serving)


def test_a_run_that_is_done_leaves_no_environments():
    counters = Counters()
    built, *rest = run(components(counters.environment), TWO, 2)
    del built, rest
    gc.collect()
    assert counters.closed == counters.makings and gone(serving)


class Hangs(gymnasium.Env):
    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        time.sleep(1_000)


def test_processes_that_hang_are_ended():
    gymnasium.register("Hangs-v0", Hangs)
    environment = registry.make("gymnasium/Hangs-v0", env_kwargs={"vectorization": "async"})
    guarded, before = host.Guarded(environment, 2, 60.0), set(multiprocessing.active_children())
    guarded.reset(0)
    mine = set(multiprocessing.active_children()) - before
    guarded._timeout = 0.5
    with pytest.raises(host.Broken):
        guarded.step(np.zeros(2, np.int64))
    guarded.abandon()
    for child in mine:
        child.join(10)
    assert mine and not any(child.is_alive() for child in mine) and gone(serving)
