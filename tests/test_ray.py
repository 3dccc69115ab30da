"""The Ray engine: nodes in processes compute what they compute here, and one that dies costs only its process."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from cases import slow

pytest.importorskip("ray")

import test_actor_learner as actors
import test_parameter_server as servers
import test_tabular as tables
from probe_environments import observed_action

from jaxdqn.environments import registry
from jaxdqn.errors import UserError
from jaxdqn.parallel import axes
from jaxdqn.parallel.asynchronous import parameter_server, ray_engine
from jaxdqn.parallel.asynchronous.ray_engine import Pool
from jaxdqn.parallel.asynchronous.workers import NodeDied
from jaxdqn.parallel.compiled import runner
from jaxdqn.runs import experiment
from jaxdqn.runs.settings import Settings
from jaxdqn.tabular import method, on_ray
from jaxdqn.timeline import timeline

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def python(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def cluster():
    with ray_engine.cluster() as running:
        yield running


def kill(node):
    os.kill(node.process(), signal.SIGKILL)


# -- nodes ------------------------------------------------------------------------------------------------------------


class Echo:
    """A node that says what it got."""

    def __init__(self, word):
        self.word = word

    def told(self, *args):
        return self.word, args

    def kinds(self, tree):
        return jax.tree.map(lambda x: isinstance(x, jax.Array), tree)

    def fail(self, message):
        raise UserError(message)


def test_calls_carry_arrays_keys_and_errors(cluster):
    node = cluster.spawn(Echo, "hello")
    tree = {"array": jax.numpy.arange(3.0), "key": jax.random.key(7), "number": 3}
    word, (back,) = node.told(tree)
    assert word == "hello" and back["number"] == 3
    np.testing.assert_array_equal(back["array"], tree["array"])
    np.testing.assert_array_equal(jax.random.uniform(back["key"]), jax.random.uniform(tree["key"]))
    assert node.kinds(tree) == {"array": True, "key": True, "number": False}
    with pytest.raises(UserError, match="no such thing"):
        node.fail("no such thing")
    kill(node)
    with pytest.raises(NodeDied):
        node.told()


class Broken:
    def __init__(self):
        raise ValueError("no such part")


def test_a_node_that_cannot_be_made_says_why(cluster):
    with pytest.raises(NodeDied, match="no such part"):
        cluster.spawn(Broken).anything()


@pytest.mark.slow
def test_a_pool_keeps_the_order_and_outlives_a_node(cluster):
    nodes, said = [cluster.spawn(Echo, str(i)) for i in range(3)], []
    pool = Pool(nodes, said.append)
    results = pool.map("told", [(i,) for i in range(20)])
    assert [args for _, args in results] == [(i,) for i in range(20)] and {word for word, _ in results} == set("012")
    kill(nodes[1])
    assert [args for _, args in pool.map("told", [(i,) for i in range(20)])] == [(i,) for i in range(20)]
    assert len(said) == 1 and "node 1 died" in said[0]
    kill(nodes[0])
    kill(nodes[2])
    with pytest.raises(UserError, match="every node died"):
        pool.map("told", [(1,)])


# -- tabular ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [slow("partitioned"), slow("visits, parts")])
def test_two_ray_workers_are_two_in_process_workers_bitwise(cluster, kind):
    mdp = tables.made("FourRooms")
    way = tables.form(kind, "FourRooms", tables.GAMMA, 2)
    run = on_ray.over_nodes(way, cluster, 2, tables.KEY, mdp, print)
    state = run(run(way.init(), 0, 20), 20, 10)
    tables.assert_same(state, method.run(way, way.init(), tables.KEY, 0, 30, mdp))


@pytest.mark.slow
def test_a_dead_tabular_node_changes_nothing_of_what_is_learned(cluster, monkeypatch):
    mdp, said, spawned = tables.made("FourRooms"), [], []
    way = tables.form("partitioned", "FourRooms", tables.GAMMA, 4)
    spawn = cluster.spawn
    monkeypatch.setattr(cluster, "spawn", lambda *args: spawned.append(spawn(*args)) or spawned[-1])
    run = on_ray.over_nodes(way, cluster, 3, tables.KEY, mdp, said.append)
    state = run(way.init(), 0, 5)
    kill(spawned[2])
    tables.assert_same(run(state, 5, 5), method.run(way, way.init(), tables.KEY, 0, 10, mdp))
    assert len(said) == 1 and "node 2 died" in said[0]


# -- deep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, lock",
    [slow(servers.SMALL, "global"), slow(servers.REPLAYED, "leaf")],
    ids=["a2c", "dqn"],
)
def test_one_ray_worker_and_server_are_those_in_process_bitwise(cluster, config, lock):
    axes = parameter_server.Axes(workers=1, lock=lock)
    (here, sums), (there, others) = (
        servers.run(*servers.build(axes, config, engine=where), 60, config, chunk=25) for where in (None, cluster)
    )
    tables.assert_same(runner.gather_one(there), runner.gather_one(here))
    # But for what was counted on the way, in which there are times.
    others, sums = ([each._replace(seen={}) for each in every] for every in (others, sums))
    tables.assert_same(runner.gather_one(others), runner.gather_one(sums))


@pytest.mark.slow
def test_a_dead_ray_worker_is_reported_once_and_the_others_do_its_work(cluster):
    said, nodes = [], []

    def fault_hook(worker, rollouts):
        if worker == 1 and rollouts == 10:
            kill(nodes[1])

    built, states = servers.build(
        parameter_server.Axes(workers=3), engine=cluster, report=said.append, fault_hook=fault_hook
    )
    nodes += built.step.func.__self__.nodes
    states, _ = servers.run(built, states, 150, chunk=50)
    assert len(said) == 1 and "worker 1 died" in said[0] and built.telemetry(states)["dead_workers"] == 1
    learned = int(states[0].learner.updates)
    assert 150 <= learned <= 151  # its last push may have arrived before it died
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(runner.gather_one([states[0].learner.params])))


@pytest.mark.slow
def test_ray_actors_fill_the_learners_replay_and_one_may_die(cluster):
    said, nodes = [], []

    def fault_hook(actor, acted):
        if actor == 1 and acted == 60:
            kill(nodes[1])

    axes = actors.Axes(workers=4, merge_every=5, coupling="async")
    config = dataclasses.replace(actors.SMALL, num_envs=8)
    built, states = actors.build(axes, config=config, engine=cluster, report=said.append, fault_hook=fault_hook)
    nodes += built.step.func.__self__.nodes
    states, _ = actors.run(built, states, 100, chunk=40, config=config)
    state = jax.tree.map(lambda x: x[0, 0], runner.gather_one(states))
    assert int(state.learner.updates) == 100 and len(said) == 1 and "worker 1 died" in said[0]
    alive = [0, 2, 3]
    acted = np.array([actor.acted for actor in state.actors])
    np.testing.assert_array_equal(
        state.merged[alive], acted[alive] // 5 * 5 * config.rollout_length, "whole local replays"
    )
    assert acted[alive].sum() > 3 * (timeline(config).prefill + 100)  # they did its work


@pytest.mark.slow
def test_a_users_environment_travels_to_the_nodes(cluster):
    registry.register("Probe-ray", observed_action)
    config = dataclasses.replace(servers.SMALL, env="Probe-ray", env_params={})
    built, states = servers.build(parameter_server.Axes(workers=1), config, engine=cluster)
    states, _ = servers.run(built, states, 5, config)
    assert int(states[0].learner.updates) == 5


# -- scripts and errors -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_on_ray_and_resume_without(tmp_path):
    out = tmp_path / "run"
    small = (
        "--num-envs 4 --total-steps 4000 --eval-episodes 2 --final-episodes 4 --axes.workers 2 --parallel a3c".split()
    )
    done = python("experiments/train.py", *small, "--engine", "ray", "--out", str(out))
    assert "finished" in done.stdout
    done = python("experiments/train.py", "--resume", str(out), "--total-steps", "6000")
    assert "finished: 6,016 steps" in done.stdout


@pytest.mark.slow
def test_tabular_on_ray_writes_the_same_table(tmp_path):
    flags = "--mdp FourRooms --method distributed --num-workers 2 --local-steps 500 --total-steps 20000 --quiet".split()
    for where, more in (("here", []), ("there", ["--engine", "ray"])):
        python("experiments/tabular.py", *flags, *more, "--out", str(tmp_path / where))
    here, there = (np.load(tmp_path / where / "table.npz") for where in ("here", "there"))
    np.testing.assert_array_equal(here["q"], there["q"])


@pytest.fixture
def silent_port():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "address, words",
    [
        ("nonsense", '"host:port"'),
        ("127.0.0.1:1", "nothing answers"),
        ("127.0.0.1:99999", "nothing answers"),
        ("127.0.0.1:SILENT", "no Ray answers"),
    ],
)
def test_addresses_without_ray(address, words, silent_port, monkeypatch):
    monkeypatch.setattr(ray_engine, "PROBE_SECONDS", 3.0)
    with pytest.raises(UserError, match=words), ray_engine.cluster(address.replace("SILENT", str(silent_port))):
        pass


def test_ray_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install"), ray_engine.cluster():
        pass


@pytest.mark.parametrize(
    "chosen, name, words",
    [("a3c", "rya", "did you mean"), ("fused", "ray", "asynchronous"), ("lockstep_dqn", "ray", "lockstep")],
)
def test_engines_that_cannot_be(chosen, name, words):
    preset = axes.preset(chosen)
    config, hparams = axes.over(preset, servers.REPLAYED, servers.H)
    settings = Settings(engine=name, progress=False)
    with pytest.raises(UserError, match=words):
        experiment.train(config, hparams, axes=preset.axes, settings=settings)


def test_an_address_needs_the_engine():
    with pytest.raises(UserError, match="is for engine"), ray_engine.running("local", "auto"):
        pass


def test_ray_leaves_sigterm_alone():
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with ray_engine._signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before
