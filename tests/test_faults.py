"""Faults of the asynchronous modes: what fails is said once, what can go on goes on, and nothing hangs."""

import dataclasses
import functools
import threading
import time

import jax
import numpy as np
import pandas as pd
import pytest
from cases import usual

import jaxdqn
from jaxdqn import presets
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.environments import registry
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous import actor_learner, parameter_server
from jaxdqn.parallel.asynchronous.workers import NodeDied
from jaxdqn.parallel.axes import Axes, over, preset
from jaxdqn.runs import cli
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import timeline

LIMIT = 120  # seconds; a hang is a failure
SMALL = Config(
    hidden_sizes=(8,),
    num_envs=8,
    batch_size=16,
    replay_capacity=800,
    learning_starts=80,
    total_steps=4_000,
    log_interval=400,
    eval_interval=4_000,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 50},
)
LINE = timeline(SMALL)
H = HParams()
QUIET = Settings(progress=False, tensorboard=False)
SCHEMES = {
    "actor_learner": Axes("actor_learner", coupling="async", merge_every=2, slack=8),
    "parameter_server": Axes("parameter_server"),
}


def within_limit(function):
    """What `function()` returns or raises. It runs in a thread of its own: where that hangs, the test fails."""
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results[0]


def workers_alive():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("worker-")]


def with_faults(monkeypatch, fault_hook):
    """Whole runs whose workers call fault_hook(worker, acted) before every rollout."""
    for module in (actor_learner, parameter_server):
        monkeypatch.setattr(module, "build", functools.partial(module.build, fault_hook=fault_hook))


def dies(worker, acted):
    def fault_hook(index, count):
        if index == worker and count >= acted:
            raise RuntimeError("out of luck")

    return fault_hook


def train(scheme, config=SMALL, **options):
    options = {"settings": QUIET, "num_devices": 1, **options}
    return within_limit(lambda: jaxdqn.train(config, H, axes=SCHEMES[scheme], **options))


def assert_complete(metrics):
    """One row for each logging point."""
    assert list(metrics.iteration) == list(range(LINE.log_every, LINE.total + 1, LINE.log_every))


# -- the learner fails ------------------------------------------------------------------------------------------------


def failing_chunk(before_it_fails, merge_every=1):
    """Runs an async chunk whose learner calls before_it_fails(chunk) in each update; (the error, the scheme, what was
    said)."""
    said = []
    axes = actor_learner.Axes(workers=4, merge_every=merge_every, coupling="async", slack=1_000)
    scheme = actor_learner.ActorLearner(make_components(SMALL), jax.devices()[:1], H, axes, said.append, None, None)
    state = scheme.init(0)
    scheme.warm_up(state)
    (state,), (metrics,) = scheme.run([state], [scheme.zero_metrics], 0, LINE.prefill, learning=False)
    learn = scheme.programs.learn
    chunk = actor_learner.Chunk(scheme, state, jax.tree.map(jax.numpy.copy, metrics), learning=True)

    def failing(*args):
        before_it_fails(chunk)
        return learn(*args)

    chunk.programs = scheme.programs._replace(learn=failing)
    with pytest.raises(ZeroDivisionError) as caught:
        within_limit(lambda: chunk.asynchronous(LINE.prefill, LINE.prefill + 500))
    assert workers_alive() == [] and said == [] and scheme.pool.alive == [0, 1, 2, 3]
    return caught.value, scheme


def test_actors_that_block_in_a_full_queue_end_with_the_learner():
    def when_full(chunk):
        while not chunk.deliveries.full() or not chunk.scheme.seen._sums["queue_wait_seconds"]:
            time.sleep(0.001)
        raise ZeroDivisionError("the learner stops while actors wait to deliver")

    error, _ = failing_chunk(when_full)
    assert error.__context__ is None


def test_an_exception_of_the_learner_surfaces_once_and_ends_the_threads():
    calls = []

    def at_the_tenth(chunk):
        calls.append(1)
        if len(calls) == 10:
            raise ZeroDivisionError("ten")

    error, _ = failing_chunk(at_the_tenth, merge_every=2)
    assert str(error) == "ten" and error.__context__ is None and len(calls) == 10


# -- workers die ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_survives_the_death_of_a_worker_and_shows_it(scheme, monkeypatch, capsys, tmp_path):
    with_faults(monkeypatch, dies(2, 60))
    result = train(scheme, out=tmp_path / "run")
    assert result.summary["status"] == "finished" and result.summary["dead_workers"] == 1
    assert_complete(result.metrics)
    dead = result.metrics.dead_workers
    # It may take its sixty rollouts before the first row: whoever is free takes the next.
    assert dead.is_monotonic_increasing and set(dead) <= {0, 1} and dead.iloc[-1] == 1
    assert result.metrics.worker_rate_2.iloc[-1] == 0 and result.metrics.worker_rate_min.iloc[-1] == 0
    assert result.metrics.updates.max() == LINE.total - LINE.prefill
    err = capsys.readouterr().err
    assert err.count("died") == 1 and "worker 2 died" in err and "out of luck" in err and "Traceback" not in err
    assert workers_alive() == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_last_ticket_of_a_dead_worker_is_done_by_another(scheme):
    """It dies while the others have nothing else left to do."""
    acted = [0, 0, 0, 0]

    def fault_hook(worker, count):
        if worker == 3 and not waited:
            waited.append(1)
            while sum(acted) < total - 1 and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(0.2)  # by now the others have asked for more
            raise RuntimeError("late")
        acted[worker] += 1

    waited, end = [], time.monotonic() + LIMIT / 2
    components, options = make_components(SMALL), {"report": lambda line: None, "fault_hook": fault_hook}
    total = 20 * (4 if scheme == "actor_learner" else 1)
    if scheme == "actor_learner":
        axes = actor_learner.Axes(workers=4, merge_every=2, coupling="async")
        built, states = actor_learner.build(components, jax.devices()[:1], [0], [H], axes, **options)
    else:
        built, states = parameter_server.build(
            components, jax.devices()[:1], [0], [H], parameter_server.Axes(workers=4), **options
        )
    (state,), _ = within_limit(lambda: built.prefill(states, built.zero_metrics, 0, 20))
    done = state.actors if scheme == "actor_learner" else state.workers
    assert sum(int(worker.acted) for worker in done) == total


class Killed:
    """A node whose process ends when the test says so."""

    def __init__(self, node):
        self.node, self.dead = node, False

    def __getattr__(self, name):
        def call(*args):
            if self.dead:
                raise NodeDied("its process ended")
            return getattr(self.node, name)(*args)

        return call


@pytest.mark.parametrize("module", [actor_learner, parameter_server])
def test_a_node_that_dies_when_all_is_done_costs_only_what_it_had(module):
    nodes, said = [], []

    class Engine:
        def spawn(self, make, *args, threads=1):
            nodes.append(Killed(make(*args)))
            return nodes[-1]

    axes = module.Axes(workers=3, **({"coupling": "async"} if module is actor_learner else {}))
    parts = make_components(dataclasses.replace(SMALL, num_envs=9))
    built, states = module.build(parts, jax.devices()[:1], [0], [H], axes, report=said.append, engine=Engine())
    pool = built.step.func.__self__.pool
    join = pool.join

    def late(work, threads):
        join(work, threads)
        workers[1].dead = True

    def chunk(states, start):
        metrics = jax.tree.map(jax.numpy.copy, built.zero_metrics)
        return within_limit(lambda: built.prefill(states, metrics, start, start + 10))[0]

    workers, pool.join = nodes[-3:], late  # before them there may be the server
    (state,) = chunk(states, 0)
    assert said == ["warning: worker 1 died and the others go on without it: NodeDied: its process ended"]
    assert pool.alive == [0, 2] and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner.params))
    states = chunk([state], 10)
    workers[0].dead = workers[2].dead = True
    with pytest.raises(UserError, match="every worker died; the last cause: NodeDied: its process ended"):
        chunk(states, 20)


@pytest.fixture
def faulty():
    """A registered CartPole whose step raises once, in whichever worker comes next after `armed.set()`."""
    armed = threading.Event()

    def pass_on(reward):
        if armed.is_set():
            armed.clear()
            raise ValueError("the simulator crashed")
        return reward

    def make():
        plain = registry.make("CartPole-v1", {"max_steps_in_episode": 50}, {}, 0.0)

        def step(key, state, action):
            state, out = plain.step(key, state, action)
            reward = jax.pure_callback(
                pass_on, jax.ShapeDtypeStruct((), np.float32), out.reward, vmap_method="expand_dims"
            )
            return state, out._replace(reward=reward)

        return plain._replace(step=step)

    jaxdqn.register("faulty", make)
    return armed


@pytest.mark.parametrize("scheme", usual(SCHEMES, "parameter_server"))
def test_a_program_that_fails_kills_one_worker_and_no_state(scheme, faulty, capfd, tmp_path):
    """The compiled program takes the worker's donated arrays with it; the run is still saved, and resumes whole."""
    rows = []

    def on_chunk(new):
        rows.append(new)
        if len(rows) == 3:
            faulty.set()

    config = dataclasses.replace(SMALL, env="faulty", env_params={})
    result = train(
        scheme, config, out=tmp_path / "run", on_chunk=on_chunk, settings=QUIET._replace(checkpoint_seconds=0)
    )
    assert not faulty.is_set() and result.summary["dead_workers"] == 1
    assert_complete(result.metrics)
    assert np.isfinite(result.metrics.loss.iloc[1:]).all() and (result.metrics.epsilon <= 1).all()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: worker")]
    assert "the simulator crashed" in line
    again = within_limit(lambda: jaxdqn.resume(tmp_path / "run", total_steps=8_000, settings=QUIET))
    assert again.summary["status"] == "finished" and again.metrics.dead_workers.iloc[-1] == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_death_of_all_workers_ends_in_one_line_and_leaves_metrics_and_checkpoint(
    scheme, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "run"

    def fault_hook(worker, acted):
        if acted >= 60:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        with_faults(patched, fault_hook)
        settings = QUIET._replace(checkpoint_seconds=0.0)
        cli.main(lambda: train(scheme, out=out, settings=settings) and None)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "seldom learns" not in line]
    assert len(lines) == 5 and all("power cut" in line for line in lines)
    assert lines[-1].startswith("error: every worker died")
    kept = pd.read_parquet(out / "metrics.parquet")
    assert 0 < len(kept) < 10 and list((out / "checkpoints").iterdir())
    resumed = within_limit(lambda: jaxdqn.resume(out, settings=QUIET))
    assert_complete(resumed.metrics)
    assert resumed.summary["status"] == "finished"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_metrics_remain_where_every_worker_died_before_a_checkpoint(scheme, monkeypatch, tmp_path):
    def fault_hook(worker, acted):
        if acted >= 60:
            raise RuntimeError("power cut")

    with_faults(monkeypatch, fault_hook)
    with pytest.raises(UserError, match="every worker died"):
        train(scheme, out=tmp_path / "run")
    assert len(pd.read_parquet(tmp_path / "run" / "metrics.parquet")) > 0
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_slow_worker_is_seen_in_the_rates_and_delays_nobody(scheme, monkeypatch):
    def fault_hook(worker, acted):
        if worker == 1:
            time.sleep(0.05)

    with_faults(monkeypatch, fault_hook)
    result = train(scheme)
    assert_complete(result.metrics)
    assert result.summary["dead_workers"] == 0
    rates = result.metrics[[f"worker_rate_{worker}" for worker in range(4)]].fillna(0).mean()
    assert rates.idxmin() == "worker_rate_1" and rates.worker_rate_1 < rates.drop("worker_rate_1").min() / 2


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("parallel_dqn", 500_000), ("a3c", 2_000_000)])
def test_three_of_four_workers_solve_cartpole(name, steps, monkeypatch, capsys):
    with_faults(monkeypatch, dies(3, 500))
    chosen, cartpole = preset(name), presets.for_environment("CartPole-v1")
    config, hparams = over(chosen, cartpole.config, cartpole.hparams)
    config = dataclasses.replace(config, total_steps=steps)
    result = jaxdqn.train(config, hparams, seeds=[1], axes=chosen.axes, settings=QUIET, num_devices=1)
    said = capsys.readouterr().err
    assert result.summary["dead_workers"] == 1 and said.count("died") == said.count("worker 3 died") == 1
    # Threads take turns as they like, and one evaluation may fall in a dip of a policy that has learned.
    late = result.metrics[result.metrics.env_steps > steps / 2]
    assert late.eval_return.median() >= 475
