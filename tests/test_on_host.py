"""Environments on the host: an actor does with them what it does with the same environments in JAX, whatever happens
to them."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from cases import slow
from host_twins import Counters, frames_only, twin

import jaxdqn
from jaxdqn import agents, training
from jaxdqn.components import Components, make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.environments import host, registry
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.asynchronous import actor_learner
from jaxdqn.parallel.asynchronous.actor_learner import Axes
from jaxdqn.parallel.compiled import runner
from jaxdqn.timeline import timeline

SMALL = Config(
    hidden_sizes=(16,),
    num_envs=4,
    rollout_length=3,
    batch_size=16,
    replay_capacity=240,
    learning_starts=48,
    total_steps=3_000,
    eval_episodes=3,
    final_episodes=3,
    eval_max_steps=40,
    network="mlp",
)
H = HParams(learning_rate=1e-2, target_period=10, epsilon_end=0.1, epsilon_steps=1_000)
SEED = 3


def components(environment, config=SMALL):
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    return Components(config, environment, agent, agents.replay_of(config).make(example, config))


def run(parts, axes, iterations, report=print, chunk=None):
    built, states = actor_learner.build(parts, jax.devices()[:1], [SEED], [H], axes, report)
    prefill, chunk = timeline(parts.config).prefill, chunk or iterations
    states, metrics = built.prefill(states, built.zero_metrics, 0, prefill)
    for start in range(prefill, prefill + iterations, chunk):
        states, metrics = built.step(states, metrics, start, min(start + chunk, prefill + iterations))
    return built, states, metrics


@pytest.mark.parametrize(
    "padding, n_step, copies, memory",
    [slow("zeros", 1, "two", "uniform"), ("zeros", 3, "one", "prioritised"), slow("first", 3, "one", "uniform")],
)
def test_a_twin_on_the_host_learns_the_same_bits(padding, n_step, copies, memory):
    """Lockstep with one actor, stacks of frames, terminations and time limits: state, sums, and judged episodes."""
    config = dataclasses.replace(SMALL, n_step=n_step, replay_copies=copies, replay=memory)
    axes = Axes(workers=1, merge_every=2, broadcast_every=3)
    made = []
    for environment in (frames_only(padding), twin(frames_only(padding), SEED, config.rollout_length)):
        _, states, metrics = run(components(environment, config), axes, 60)
        made.append(jax.tree.map(np.asarray, runner.gather_one([(states[0].learner, states[0].replay, metrics[0])])))
    jax.tree.map(np.testing.assert_array_equal, *made)
    assert made[0][2].episodes.episodes > 10


def rows(state, actor=0):
    """(making, step, episode_end) of an actor's region of the replay, oldest first."""
    data, merged = jax.tree.map(np.asarray, (state.replay, state.merged))
    count, each = merged[actor], SMALL.num_envs // len(merged)
    at = slice(actor * each, (actor + 1) * each)
    assert count <= len(data.reward)
    making, step = np.moveaxis(data.observation[:count, at], -1, 0)
    return making[:, 0], step[:, 0], (data.ends[:count, at][:, 0] & 2) != 0


def check_stream(making, step, end):
    """Consecutive rows are consecutive steps of the same environments, or an episode ends between them."""
    same = (making[1:] == making[:-1]) & (step[1:] == step[:-1] + 1)
    assert np.all(same | end[:-1])


@pytest.mark.parametrize("coupling", ["lockstep", "async"])
@pytest.mark.parametrize("at", [(1, 8), (1, 12)])  # in the midst of a local replay, and at the first step after one
def test_environments_that_fail_are_made_anew_and_only_their_rollout_is_lost(coupling, at):
    def trouble(making, step):
        if (making, step) == at:
            raise ValueError("out of order")

    counters, told = Counters(trouble), []
    axes = Axes(workers=1, merge_every=2, broadcast_every=3, coupling=coupling)
    # The first are made to compile the programs, and closed.
    counters.makings = -1
    _, states, _ = run(components(counters.environment), axes, 4, told.append)
    making, step, end = rows(states[0])
    check_stream(making, step, end)
    assert set(making) == {1, 2} and list(step[making == 1]) == list(range(at[1] // 3 * 3))
    assert len(making) == 3 * (4 + timeline(SMALL).prefill) and counters.makings == 2
    assert told == ["warning: the environments of actor 0 failed and are made anew: ValueError: out of order"]


def test_actors_on_devices_of_their_own_leave_each_others_environments_alone():
    """Two actors that compile at once, of which the first is done before the second has taken a step."""
    counters, told = Counters(lambda making, step: time.sleep(0.1 * (making == 2))), []
    config = dataclasses.replace(SMALL, env_timeout=20.0)
    axes = Axes(workers=2, merge_every=2, broadcast_every=3, coupling="async")
    built, states = actor_learner.build(
        components(counters.environment, config), jax.devices()[:3], [SEED], [H], axes, told.append
    )
    assert counters.makings == 2 and built.telemetry(states)["env_restarts"] == 0
    built.prefill(states, built.zero_metrics, 0, 4)
    assert counters.makings == 4 and told == []


def test_environments_that_hang_are_left_behind():
    def trouble(making, step):
        if (making, step) == (1, 8):
            time.sleep(3.0)

    counters, told = Counters(trouble), []
    counters.makings = -1
    config = dataclasses.replace(SMALL, env_timeout=0.5)
    axes = Axes(workers=1, merge_every=2, broadcast_every=3, coupling="async")
    began = time.perf_counter()
    built, states, _ = run(components(counters.environment, config), axes, 4, told.append)
    check_stream(*rows(states[0]))
    assert built.telemetry(states)["env_restarts"] == 1 and "no answer to step within 0.5 s" in told[0]
    assert time.perf_counter() - began < 120 and counters.makings == 2


def test_environments_that_always_fail_end_the_run_in_one_line():
    def trouble(making, step):
        raise ValueError("never\nright")

    parts = components(Counters(trouble).environment)
    with pytest.raises(UserError, match="'CartPole-v1' failed 3 times in a row: ValueError: never right"):
        run(parts, Axes(workers=1, merge_every=2, broadcast_every=3), 4)


@pytest.mark.parametrize("iterations", [3, 4])  # a local replay half full, and one just merged
def test_after_a_resume_environments_begin_new_episodes(iterations):
    """A runner made anew goes on with a state: the rest is as it was, and no return reads across."""
    axes = Axes(workers=1, merge_every=2, broadcast_every=3)
    counters = Counters()
    parts = components(counters.environment)
    _, states, metrics = run(parts, axes, iterations)
    before = counters.makings
    again, _ = actor_learner.build(parts, jax.devices()[:1], [SEED], [H], axes)
    done = timeline(SMALL).prefill + iterations
    states, _ = again.step(states, metrics, done, done + 6)
    making, step, end = rows(states[0])
    check_stream(making, step, end)
    # One of them compiled the programs.
    assert counters.makings == before + 2 and list(step[making == counters.makings][:3]) == [0, 1, 2]


def test_a_break_is_not_forgotten_by_a_session_that_ends_before_it_is_told():
    """Stopped right after a merge, gone on with for one iteration, and stopped again."""
    axes = Axes(workers=1, merge_every=2, broadcast_every=3)
    parts = components(Counters().environment)
    _, states, metrics = run(parts, axes, 4)
    done = timeline(SMALL).prefill + 4
    for count in (1, 6):
        again, _ = actor_learner.build(parts, jax.devices()[:1], [SEED], [H], axes)
        states, metrics = again.step(states, metrics, done, done + count)
        done += count
    making, step, end = rows(states[0])
    check_stream(making, step, end)
    assert len(set(making)) == 3


def test_two_runs_in_lockstep_are_the_same_bits_whatever_the_chunks():
    axes = Axes(workers=2, merge_every=2, broadcast_every=3)
    made = [run(components(Counters().environment), axes, 20, chunk=chunk)[1] for chunk in (20, 7)]
    jax.tree.map(np.testing.assert_array_equal, *(runner.gather_one([s[0].learner]) for s in made))


def test_the_other_schemes_refuse_them():
    parts = components(Counters().environment)
    for name in ("fused", "parameter_server", "averaging", "sharding"):
        with pytest.raises(UserError, match=r"runs on the host.*--parallel parallel_dqn, apex or lockstep_dqn"):
            schemes.check_components(schemes.complete(schemes.Axes(name)), parts)


def test_closing_reaches_the_environments():
    counters = Counters()
    guarded = host.Guarded(counters.environment, 2, 5.0)
    guarded.reset(0)
    guarded.close()
    deadline = time.perf_counter() + 5
    while not counters.closed and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert counters.closed == 1


def test_a_run_goes_on_after_a_stop_and_says_that_episodes_begin_anew(tmp_path, capsys):
    """Through a run directory: what was saved is what is loaded, bit for bit, and training goes on to the end."""
    registry.register("counters", lambda: Counters().environment)
    config = dataclasses.replace(SMALL, env="counters", total_steps=240, log_interval=24, eval_interval=240)
    axes = schemes.Axes("actor_learner", workers=2, merge_every=2, broadcast_every=3)
    half = dataclasses.replace(config, total_steps=120)
    jaxdqn.train(half, H, seeds=[SEED], axes=axes, out=tmp_path / "run")
    assert "begin new episodes" not in capsys.readouterr().err
    result = jaxdqn.resume(tmp_path / "run", total_steps=240)
    assert "environments on the host are in no checkpoint: they begin new episodes" in capsys.readouterr().err
    assert result.summary["status"] == "finished" and result.metrics.env_steps.max() == 240
    assert result.metrics.env_restarts.max() == 0 and result.summary["final_return_mean"] > 0
