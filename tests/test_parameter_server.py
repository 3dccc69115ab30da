"""The parameter server: counters under stress, every lock's promise, and one worker as the fused loop."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from jaxdqn.base import LearnerState
from jaxdqn.config import Config, HParams, timeline
from jaxdqn.errors import UserError
from jaxdqn.parallel import fleet, parameter_server, population, server_worker
from jaxdqn.parallel.parameter_server import Axes, Server

SMALL = Config(
    agent="a2c",
    hidden_sizes=(16,),
    num_envs=4,
    rollout_length=5,
    n_step=5,
    learning_starts=0,
    total_steps=16_000,
    eval_episodes=2,
    env_params={"max_steps_in_episode": 100},
)
REPLAYED = dataclasses.replace(SMALL, agent="dqn", rollout_length=2, learning_starts=80, batch_size=16, n_step=2)
H = HParams(learning_rate=2e-3, target_period=50, epsilon_steps=2_000)


def build(axes, config=SMALL, **options):
    return parameter_server.build(fleet.make_parts(config), jax.devices()[:1], [3], [H], axes, **options)


def run(built, states, iterations, config=SMALL, chunk=None):
    prefill = timeline(config).prefill
    states, metrics = built.collect(states, built.zero_metrics, 0, prefill)
    stop = prefill + iterations
    for start in range(prefill, stop, chunk or iterations):
        states, metrics = built.step(states, metrics, start, min(start + (chunk or iterations), stop))
    return states, metrics


@pytest.mark.parametrize("config", [SMALL, REPLAYED, dataclasses.replace(REPLAYED, updates_per_iteration=2)])
@pytest.mark.parametrize("lock", ["global", "none"])
def test_one_worker_is_the_fused_loop(config, lock):
    """A3C with one worker is A2C, Gorila with one DQN, over 300 iterations."""
    built, states = fleet.build(fleet.make_parts(config), jax.devices()[:1], 1, population.assign(1, 1), [3], [H])
    fused, _ = run(built, states, 300, config)
    states, _ = run(*build(Axes(num_workers=1, lock=lock), config), 300, config, chunk=77)
    expected, got = (fleet.gather([s[0].learner]) for s in (fused, states))
    # Bitwise for DQN; actor-critic's gradient is fused otherwise when a program ends with it.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if config.agent == "a2c" else {"rtol": 0}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


# -- counters ---------------------------------------------------------------------------------------------------------


def count_up(lock, workers, pushes, pause=0.0):
    """Pushes of +1 into three parameters from several threads: (parameters, version, telemetry)."""

    def apply(learner, gradients, loss, scale):
        stepped = {name: value + gradients for name, value in learner.params.items()}
        if pause:
            time.sleep(pause)
        return learner._replace(params=stepped), np.float32(1)

    params = {name: np.zeros((), np.int64) for name in "abc"}
    server = Server(apply, Axes(lock=lock))
    server.begin(LearnerState(params, (), (), np.int32(0), np.int32(-1)))

    def work():
        for _ in range(pushes):
            _, version = server.pull()
            server.push(np.int64(1), np.float32(0), version)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return server.end().params, server.version, server.take()


@pytest.mark.parametrize("lock", ["global", "leaf"])
def test_locked_pushes_sum_exactly(lock):
    pushes = 10_000 if lock == "global" else 1_000
    params, version, seen = count_up(lock, 8, pushes)
    assert version == 8 * pushes and all(value == 8 * pushes for value in params.values())
    assert sum(seen[f"lag_{low}"] for low in (0, 1, 2, 4, 8, 16, 32)) == 8 * pushes


def test_unlocked_pushes_get_lost_and_are_counted():
    params, version, seen = count_up("none", 8, 200, pause=1e-4)
    assert version == 1_600 and seen["lost"] > 0
    assert all(value == 1_600 - seen["lost"] for value in params.values())


def test_stale_pushes_are_dropped_and_counted():
    server = Server(lambda old, g, *_: (old._replace(params=old.params + g), 0.0), Axes(max_lag=2))
    server.begin(LearnerState(np.zeros(()), (), (), np.int32(0), np.int32(-1)))
    for version in (0, 0, 0, 0, 3, 0):  # lags 0, 1, 2, 3 (dropped), 0, 4 (dropped)
        server.push(np.ones(()), np.zeros(()), version)
    columns = server.take()
    assert (server.learner.params, server.version, columns["dropped"], columns["lag_max"]) == (4, 4, 2, 4)


def test_the_learning_rate_is_scaled_by_the_lag():
    scales = []

    def apply(learner, gradients, loss, scale):
        scales.append(float(scale[0, 0]))
        return learner, 0.0

    server = Server(apply, Axes(scale_by_lag=True))
    server.begin(LearnerState((), (), (), 0, -1))
    for _ in range(3):
        server.push((), 0.0, 0)
    np.testing.assert_allclose(scales, [1, 1 / 2, 1 / 3])


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes", [Axes(), Axes(lock="leaf"), Axes(lock="none"), Axes(own_statistics=True, scale_by_lag=True, max_lag=3)]
)
def test_every_iteration_is_done_once(axes):
    built, states = build(axes)
    states, _ = run(built, states, 200, chunk=60)
    assert sum(int(worker.acted[0, 0]) for worker in states[0].workers) == timeline(SMALL).prefill + 200
    seen = built.telemetry(states)
    kept = 200 - seen.get("lost", 0) - seen.get("dropped", 0)
    assert int(states[0].learner.updates[0, 0]) == kept
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fleet.gather([states[0].learner.params])))


def test_dropped_pushes_count_in_no_mean():
    """The sums are those of the pushes that were applied, and `updates` says how many."""
    programs = server_worker.compile_programs(fleet.make_parts(SMALL), jax.devices()[0], fleet.over_members(H))
    gradients = programs._replace(gradient=lambda *args: (0.0, np.ones((1, 1)), {**ones, "loss": np.ones((1, 1))}))
    ones = {name: np.ones((1, 1)) for name in programs.zeros.learning if name not in ("loss", "gradient_norm")}
    _, (state,) = build(Axes(num_workers=1))

    class EveryThird:
        pushes = 0

        def pull(self):
            return state.learner, 0

        def push(self, gradients, loss, version, own):
            self.pushes += 1
            return (None if self.pushes % 3 else np.ones((1, 1))), own

    node, server = server_worker.Node(gradients, fleet.over_members(H), SMALL), EveryThird()
    node.begin(state.workers[0])
    for iteration in range(9):
        node.learn(server, iteration)
    _, sums = node.end()
    assert int(sums.updates[0, 0]) == 3
    assert set(sums.learning) > {"loss", "gradient_norm"} and all(total == 3 for total in sums.learning.values())


def test_a_dead_worker_is_reported_once_and_the_others_do_its_work():
    said = []

    def disturb(worker, acted):
        if worker == 1 and acted == 20:
            raise RuntimeError("unplugged")

    built, states = build(Axes(), report=said.append, disturb=disturb)
    states, _ = run(built, states, 300, chunk=100)
    assert len(said) == 1 and "worker 1 died" in said[0] and "unplugged" in said[0]
    acted = [int(worker.acted[0, 0]) for worker in states[0].workers]
    assert acted[1] == 20 and sum(acted) == timeline(SMALL).prefill + 300


def test_a_worker_that_slept_through_the_prefill_samples_only_complete_returns():
    """It acts until it has n_step rows: tickets of the prefill go to whoever is free."""
    config = dataclasses.replace(REPLAYED, n_step=7)  # four rollouts of two rows
    parts, written, acted, slept = fleet.make_parts(config), [], [0, 0, 0, 0], []

    def sample(state, key, rows, hparams):
        jax.debug.callback(lambda rows: written.append(int(rows)), rows)
        return parts.replay.sample(state, key, rows, hparams)

    def disturb(worker, count):
        if worker == 3 and not slept:
            slept.append(1)
            while sum(acted) < timeline(config).prefill - 1 and time.monotonic() < end:
                time.sleep(0.001)
        acted[worker] += 1

    end = time.monotonic() + 60
    watched = parts._replace(replay=parts.replay._replace(sample=sample))
    built, states = parameter_server.build(watched, jax.devices()[:1], [3], [H], Axes(), disturb=disturb)
    jax.effects_barrier()
    written.clear()  # of the programs' first calls
    states, metrics = built.collect(states, built.zero_metrics, 0, timeline(config).prefill)
    assert int(states[0].workers[3].acted[0, 0]) <= 1
    built.step(states, metrics, timeline(config).prefill, timeline(config).prefill + 40)
    jax.effects_barrier()
    assert len(written) == 40 and 8 <= min(written) <= 12


@pytest.mark.parametrize(
    "changes, words",
    [({"num_workers": 0}, "num_workers is 0"), ({"lock": "big"}, "global, leaf, none"), ({"max_lag": -2}, "is -2")],
)
def test_axes_that_cannot_work_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        build(Axes()._replace(**changes))
