"""The parameter server: counters under stress, every lock's promise, and one worker as the fused loop."""

import contextlib
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

import jaxdqn
from jaxdqn.base import LearnerState, Network, Policy
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.learning import OPTIMIZERS, sgd_agent
from jaxdqn.parallel import schemes
from jaxdqn.parallel.asynchronous import actor, parameter_server, workers
from jaxdqn.parallel.asynchronous.parameter_server import Axes, Server
from jaxdqn.parallel.compiled import population, runner
from jaxdqn.timeline import timeline

SMALL = Config(
    agent="a2c",
    hidden_sizes=(16,),
    num_envs=4,
    rollout_length=5,
    n_step=5,
    learning_starts=0,
    total_steps=16_000,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 100},
)
REPLAYED = dataclasses.replace(SMALL, agent="dqn", rollout_length=2, learning_starts=80, batch_size=16, n_step=2)
H = HParams(learning_rate=2e-3, target_period=50, epsilon_steps=2_000)


def build(axes, config=SMALL, **options):
    return parameter_server.build(make_components(config), jax.devices()[:1], [3], [H], axes, **options)


def run(built, states, iterations, config=SMALL, chunk=None):
    prefill = timeline(config).prefill
    states, metrics = built.prefill(states, built.zero_metrics, 0, prefill)
    stop = prefill + iterations
    for start in range(prefill, stop, chunk or iterations):
        states, metrics = built.step(states, metrics, start, min(start + (chunk or iterations), stop))
    return states, metrics


@pytest.mark.parametrize(
    "config, lock",
    [
        (SMALL, "global"),
        slow(REPLAYED, "none"),
        slow(dataclasses.replace(REPLAYED, updates_per_iteration=2), "global"),
        slow(dataclasses.replace(REPLAYED, updates_per_iteration=2), "leaf"),
    ],
)
def test_one_worker_is_the_fused_loop(config, lock):
    """A3C with one worker is A2C, Gorila with one DQN, over 300 iterations."""
    built, states = runner.build(make_components(config), jax.devices()[:1], 1, population.assign(1, 1), [3], [H])
    fused, _ = run(built, states, 300, config)
    states, _ = run(*build(Axes(workers=1, lock=lock), config), 300, config, chunk=77)
    expected, got = runner.gather([fused[0].learner]), runner.gather_one([states[0].learner])
    # Bitwise for DQN; actor-critic's gradient is fused otherwise when a program ends with it.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if config.agent == "a2c" else {"rtol": 0}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


# -- counters ---------------------------------------------------------------------------------------------------------


def together(*works):
    """Runs functions in threads of their own."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stepper(step):
    """What a server applies: step(learner, gradients, loss, scale) -> learner, or one part of that."""

    def apply(learner, gradients, loss, scale, part=None):
        stepped = step(learner, gradients, loss, scale)
        return (stepped if part is None else parameter_server.replaced(learner, stepped, part)), np.float32(1)

    return apply


def learner_of(params, updates=0, opt_state=()):
    return LearnerState(params, dict.fromkeys(params, np.float64(0)), opt_state, np.int32(updates), np.int32(-1))


def counting(learner, gradients, loss, scale, period=10):
    """+gradients into every parameter until a loss is NaN; targets are copies from every period-th update."""
    updates = learner.updates + 1
    bad = learner.first_bad_update
    bad = updates if np.isnan(loss) and bad < 0 else bad
    params = {name: value + gradients * (bad < 0) for name, value in learner.params.items()}
    due = updates % period == 0 and bad < 0
    return LearnerState(params, params if due else learner.target_params, learner.opt_state, updates, bad)


def count_up(lock, workers, pushes, pause=0.0):
    """Pushes of +1 into three parameters from several threads: (parameters, version, telemetry)."""

    def step(*push):
        if pause:
            time.sleep(pause)
        return counting(*push)

    shared = Server(stepper(step), Axes(lock=lock))
    shared.begin(learner_of({name: np.zeros((), np.int64) for name in "abc"}))

    def work():
        for _ in range(pushes):
            _, version = shared.pull()
            shared.push(np.int64(1), np.float32(0), version)

    together(*[work] * workers)
    return shared.end().params, shared.version, shared.take()


@pytest.mark.parametrize("lock", ["global", "leaf"])
def test_locked_pushes_sum_exactly(lock):
    pushes = 5_000 if lock == "global" else 250
    params, version, seen = count_up(lock, 8, pushes)
    assert version == 8 * pushes and all(value == 8 * pushes for value in params.values())
    assert sum(seen[f"lag_{low}"] for low in (0, 1, 2, 4, 8, 16, 32)) == 8 * pushes


def test_unlocked_pushes_get_lost_and_are_counted():
    params, version, seen = count_up("none", 8, 200, pause=1e-4)
    assert version == 1_600 and seen["lost"] > 0
    assert all(value == 1_600 - seen["lost"] for value in params.values())


@pytest.mark.parametrize("lock", ["global", "leaf"])
def test_no_part_of_a_push_is_lost_under_a_lock(lock):
    """2,000 pushes of one gradient by Adam, from four threads: counts and moments as one thread makes them, and the
    target moves at every number that is due, never backwards."""
    period, moves = 50, []
    network = Network(lambda key: {"a": jnp.zeros(3), "b": jnp.zeros(2)}, None)
    agent = sgd_agent(network, None, Policy(None, None), OPTIMIZERS["adam"])
    hparams = runner.traced_hparams(HParams(target_period=period, learning_rate=1e-3))
    components = runner.Components(SMALL, None, agent, None)
    apply = parameter_server.compile_apply(components, hparams)
    init = jax.jit(lambda _, h: agent.init(jax.random.key(0), h))
    gradients = {"a": jnp.full(3, 0.25), "b": jnp.full(2, -0.5)}

    def watched(learner, *push):
        stepped, norm = apply(learner, *push)
        targets = [float(state.target_params["a"][0]) for state in (learner, stepped)]
        if targets[0] != targets[1]:
            moves.append(targets)
        return stepped, norm

    def pushed(lock, threads):
        shared = Server(watched, Axes(lock=lock))
        shared.begin(init(np.float32(0), hparams))

        def work():
            for _ in range(2_000 // threads):
                _, version = shared.pull()
                shared.push(gradients, np.float32(0), version)

        together(*[work] * threads)
        return jax.tree.map(np.asarray, shared.end())

    alone = pushed("global", 1)
    moves.clear()
    got = pushed(lock, 4)
    assert got.updates == 2_000 and got.first_bad_update == -1
    jax.tree.map(np.testing.assert_array_equal, got.opt_state, alone.opt_state)
    assert len(moves) == 2_000 // period and [old for old, _ in moves[1:]] == [new for _, new in moves[:-1]]
    assert all(new < old for old, new in moves)
    # A step's bias correction is by its number, which may be off by the others' under way: that matters at first only.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), got.params, alone.params)


@pytest.mark.parametrize("lock", ["global", "leaf"])
def test_two_pushes_at_once_have_two_numbers(lock):
    """Both begin with 8 updates, of a period of 10: the target moves."""
    meeting = threading.Barrier(2, timeout=0.2)

    def step(*push):
        with contextlib.suppress(threading.BrokenBarrierError):  # where a lock keeps them apart
            meeting.wait()
        return counting(*push)

    shared = Server(stepper(step), Axes(lock=lock))
    shared.begin(learner_of({"a": np.float64(8), "b": np.float64(8)}, updates=8))
    together(*[lambda: shared.push(1.0, 0.0, 0)] * 2)
    assert shared.learner.updates == 10 and shared.learner.params == {"a": 10, "b": 10}
    assert all(9 <= value <= 10 for value in shared.learner.target_params.values())


@pytest.mark.parametrize("lock", ["global", "leaf"])
def test_a_freeze_is_not_undone(lock):
    """By a push that was under way when the bad one came."""
    good_began, bad_ended = threading.Event(), threading.Event()

    def step(learner, gradients, loss, scale):
        if not np.isnan(loss):
            good_began.set()
            bad_ended.wait(0.2)  # in vain where a lock keeps them apart
        return counting(learner, gradients, loss, scale)

    def bad():
        good_began.wait()
        shared.push(1.0, np.nan, 0)
        bad_ended.set()

    shared = Server(stepper(step), Axes(lock=lock))
    shared.begin(learner_of({"a": np.float64(0), "b": np.float64(0)}))
    together(lambda: shared.push(1.0, 0.0, 0), bad)
    shared.push(1.0, 0.0, 0)
    assert shared.learner.updates == 3 and shared.learner.first_bad_update == 2
    assert shared.learner.params == {"a": 1, "b": 1}


@pytest.mark.parametrize("lock", ["global", "leaf", "none"])
def test_workers_keep_their_own_statistics_and_steps_are_scaled_by_their_lags(lock):
    scales, own = [], {}

    def step(learner, gradients, loss, scale):
        params = {name: value + float(scale) for name, value in learner.params.items()}
        return learner._replace(params=params, opt_state=learner.opt_state + 1, updates=learner.updates + 1)

    def apply(learner, gradients, loss, scale, part=None):
        if part in (None, parameter_server.COUNTED):
            scales.append(float(scale))
        return stepper(step)(learner, gradients, loss, scale, part)

    shared = Server(apply, Axes(lock=lock, scale_by_lag=True, own_statistics=True))
    shared.begin(learner_of({"a": np.float64(0), "b": np.float64(0)}, opt_state=np.int64(-7)))

    def work(index):
        own[index] = np.int64(0)
        for _ in range(100):
            _, version = shared.pull()
            time.sleep(1e-5)
            _, own[index] = shared.push(1.0, 0.0, version, own[index])

    together(*[functools.partial(work, index) for index in range(4)])
    seen = shared.take()
    assert own == dict.fromkeys(range(4), 100) and shared.learner.opt_state == -7
    assert len(scales) == 400 and min(scales) < 1
    assert seen["lag_sum"] == pytest.approx(sum(1 / scale - 1 for scale in scales))
    assert shared.learner.updates == 400 - seen["lost"]
    if lock != "none":
        assert [shared.learner.params[name] for name in "ab"] == pytest.approx([sum(scales)] * 2)


@pytest.mark.parametrize("lock", ["global", "leaf", "none"])
def test_stale_pushes_are_dropped_and_counted(lock):
    shared = Server(stepper(counting), Axes(max_lag=2, lock=lock))
    shared.begin(learner_of({"a": np.zeros(())}))
    for version in (0, 0, 0, 0, 3, 0):  # lags 0, 1, 2, 3 (dropped), 0, 4 (dropped)
        shared.push(np.ones(()), np.zeros(()), version)
    seen = shared.take()
    assert (shared.learner.params["a"], shared.version, seen["dropped"], seen["lag_max"]) == (4, 4, 2, 4)


def test_the_learning_rate_is_scaled_by_the_lag():
    scales = []
    shared = Server(lambda learner, *push: (learner, scales.append(float(push[2]))), Axes(scale_by_lag=True))
    shared.begin(learner_of({}))
    for _ in range(3):
        shared.push((), 0.0, 0)
    np.testing.assert_allclose(scales, [1, 1 / 2, 1 / 3])


# -- training ---------------------------------------------------------------------------------------------------------


def test_dropped_pushes_count_in_no_mean():
    """The sums are those of the pushes that were applied, and `updates` says how many."""
    programs = actor.compile_worker(make_components(SMALL))
    gradients = programs._replace(
        gradient=lambda _, ring, *rest: (ring, 0.0, np.float32(1), {**ones, "loss": np.float32(1)})
    )
    ones = {name: np.float32(1) for name in programs.zeros.learning if name not in ("loss", "gradient_norm")}
    _, (state,) = build(Axes(workers=1))

    class EveryThird:
        pushes = 0

        def pull(self):
            return state.learner, 0

        def push(self, gradients, loss, version, own):
            self.pushes += 1
            return (None if self.pushes % 3 else np.float32(1)), own

    node, server = (
        actor.WorkerNode(gradients, runner.traced_hparams(make_components(SMALL).agent.complete(H)), SMALL),
        EveryThird(),
    )
    node.begin(state.workers[0])
    for iteration in range(9):
        node.learn(server, iteration)
    _, sums = node.end()
    assert int(sums.updates) == 3
    assert set(sums.learning) > {"loss", "gradient_norm"} and all(total == 3 for total in sums.learning.values())


# -- telemetry adds up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [
        Axes(scale_by_lag=True),
        Axes(lock="leaf", max_lag=1),
        Axes(lock="none", own_statistics=True),
    ],
)
def test_telemetry_adds_up(axes):
    """Over chunks: rollouts to environment steps, pushes applied, dropped and lost to gradients, lags to pushes."""
    config = dataclasses.replace(REPLAYED, updates_per_iteration=2, n_step=7)
    built, states = build(axes, config)
    prefill, iterations = timeline(config).prefill, 40
    states, metrics = run(built, states, iterations, config, chunk=15)
    state, sums = (jax.tree.map(lambda x: x[0, 0], runner.gather_one(tree)) for tree in (states, metrics))
    seen = sums.seen
    rollouts = [seen[f"rollouts_{worker}"] for worker in range(4)]
    assert rollouts == [worker.acted for worker in state.workers]
    assert sum(rollouts) == prefill + iterations + seen["extra_rollouts"]
    gradients = 2 * iterations
    assert sums.updates + seen["dropped"] == gradients == sum(seen[f"lag_{low}"] for low in workers.LAG_BINS)
    assert state.learner.updates == sums.updates - seen["lost"] == built.telemetry(states)["updates"]
    assert (seen["lost"] == 0 or axes.lock == "none") and (seen["dropped"] == 0 or axes.max_lag > 0)
    columns = workers.columns({name: x[None] for name, x in seen.items()})
    rates = sum(columns[f"worker_rate_{worker}"] for worker in range(4))
    assert rates * seen["running_seconds"] == pytest.approx(sum(rollouts), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner.params))


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_dead_worker_is_reported_once_and_the_others_do_its_work():
    said = []

    def fault_hook(worker, acted):
        if worker == 1 and acted == 20:
            raise RuntimeError("unplugged")

    built, states = build(Axes(), report=said.append, fault_hook=fault_hook)
    states, _ = run(built, states, 300, chunk=100)
    assert len(said) == 1 and "worker 1 died" in said[0] and "unplugged" in said[0]
    acted = [int(worker.acted) for worker in states[0].workers]
    assert acted[1] == 20 and sum(acted) == timeline(SMALL).prefill + 300


def test_a_worker_that_slept_through_the_prefill_samples_only_complete_returns():
    """It acts until it has n_step rows: tickets of the prefill go to whoever is free."""
    config = dataclasses.replace(REPLAYED, n_step=7)  # four rollouts of two rows
    components, written, acted, slept = make_components(config), [], [0, 0, 0, 0], []

    def sample(state, key, progress, hparams):
        jax.debug.callback(lambda rows: written.append(int(rows)), progress.written)
        return components.replay.sample(state, key, progress, hparams)

    def fault_hook(worker, count):
        if worker == 3 and not slept:
            slept.append(1)
            while sum(acted) < timeline(config).prefill - 1 and time.monotonic() < end:
                time.sleep(0.001)
        acted[worker] += 1

    end = time.monotonic() + 60
    watched = components._replace(replay=components.replay._replace(sample=sample))
    built, states = parameter_server.build(watched, jax.devices()[:1], [3], [H], Axes(), fault_hook=fault_hook)
    jax.effects_barrier()
    written.clear()  # of the programs' first calls
    states, metrics = built.prefill(states, built.zero_metrics, 0, timeline(config).prefill)
    assert int(states[0].workers[3].acted) <= 1
    built.step(states, metrics, timeline(config).prefill, timeline(config).prefill + 40)
    jax.effects_barrier()
    assert len(written) == 40 and 8 <= min(written) <= 12


@pytest.mark.parametrize(
    "changes, words",
    [({"workers": 0}, "workers is 0"), ({"lock": "big"}, "lock 'big'"), ({"max_lag": -2}, "is -2")],
)
def test_axes_that_cannot_work_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        schemes.check(jaxdqn.Axes("parameter_server", **changes), SMALL, 1)
