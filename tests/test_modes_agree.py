"""The same functions, run in different ways, give the same training.

Here: members and their own runs, chunks, devices, resume, data parallelism, lockstep; of DQN, and of an agent of each
other kind (`KINDS`). With the helpers of their schemes:

    lockstep with one actor = the fused loop     test_actor_learner.py   test_one_actor_in_lockstep_is_the_fused_loop
    on-policy agents have no actors and learner  test_pqn.py             test_actors_with_a_replay_are_refused
    one worker of a server = the fused loop      test_parameter_server.py      test_one_worker_is_the_fused_loop
    averaging every step of SGD = gradient mean  test_averaging.py
                                                 test_averaging_every_update_of_sgd_equals_the_mean_of_gradients
    one replica = the fused loop                 test_averaging.py       test_one_replica_equals_plain_training_bitwise
    sharded network = whole network              test_model_sharding.py
                                                 test_a_sharded_network_learns_what_the_whole_one_does
    partitioned table, refreshed = one table     test_tabular.py
                                                 test_refresh_every_transition_is_unpartitioned_bitwise
    one update by shards of a batch = by all     test_learning.py     test_shards_make_the_update_of_the_whole_batch
"""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import optax
import pandas as pd
import pytest
from cases import slow, usual

import jaxdqn
from jaxdqn import acting, agents, learning, training
from jaxdqn.base import Batch
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams, with_values
from jaxdqn.learning import Shards, mean_over_shards
from jaxdqn.parallel.asynchronous import actor_learner
from jaxdqn.parallel.compiled import devices, population, runner
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import timeline

SMALL = Config(
    hidden_sizes=(32,),
    num_envs=8,
    batch_size=32,
    replay_capacity=2_000,
    learning_starts=200,
    total_steps=8_000,
    n_step=2,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 100},
)
H = HParams(target_period=50, epsilon_steps=2_000)
QUIET = Settings(progress=False, tensorboard=False)
SETTINGS = [H, H._replace(learning_rate=2e-3), H._replace(gamma=0.9, target_tau=0.5), H]
SEEDS = [3, 4, 5, 6]


def run_fleet(num_devices, devices_per_agent, seeds, settings, width=None, iterations=500, chunk=None, config=SMALL):
    """Parameters [M, shards, ...] after `iterations` beyond the prefill, in chunks."""
    components = make_components(config, devices_per_agent)
    assignment = population.assign(len(seeds), num_devices // devices_per_agent)
    used = jax.devices()[:num_devices]
    built, states = runner.build(components, used, devices_per_agent, assignment, seeds, settings, width)
    metrics, prefill = built.zero_metrics, timeline(config).prefill
    states, metrics = built.prefill(states, metrics, 0, prefill)
    stop = prefill + iterations
    for start in range(prefill, stop, chunk or iterations):
        states, metrics = built.step(states, metrics, start, min(start + (chunk or iterations), stop))
    gathered = runner.gather([state.learner.params for state in states])
    return jax.tree.map(assignment.collect, gathered)


def assert_equal(one, other, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), one, other)


ROUNDING = 1e-5
"""Between vmapped members and their own runs, over a few hundred iterations. What rounds differently is the step that
Adam makes of its moments: in one update of DQN gradients and moments are equal bitwise, parameters to 2e-9. After 100
iterations 1e-7 were measured for DQN, and 7e-7, 2e-6, 2e-7 and 6e-8 for KINDS, in their order."""


@pytest.fixture(scope="module")
def alone():
    """Each member's own single run, [M, 1, ...]."""
    runs = [run_fleet(1, 1, [seed], [setting]) for seed, setting in zip(SEEDS, SETTINGS, strict=True)]
    return jax.tree.map(lambda *x: np.concatenate(x), *runs)


@pytest.mark.parametrize("num_devices", [slow(1), 2, slow(3)])
def test_members_one_after_the_other_equal_their_own_runs_bitwise(alone, num_devices):
    # Three devices leave dead lanes.
    assert_equal(run_fleet(num_devices, 1, SEEDS, SETTINGS), alone)


def test_vmapped_members_equal_their_own_runs(alone):
    # What rounds differently is named at ROUNDING.
    assert_equal(run_fleet(1, 1, SEEDS, SETTINGS, width=4), alone, atol=ROUNDING)


def test_vmapped_members_on_two_devices_equal_their_own_runs(alone):
    assert_equal(run_fleet(2, 1, SEEDS, SETTINGS, width=2), alone, atol=ROUNDING)


def test_chunks_do_not_matter_bitwise(alone):
    assert_equal(run_fleet(1, 1, [3], [H], chunk=37), jax.tree.map(lambda x: x[:1], alone))


def assert_shards_equal(params):
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[:, 0], x[:, 1]), params)


def test_shards_stay_equal_and_a_group_is_as_it_is_alone_bitwise():
    both = run_fleet(4, 2, [3, 4], [H, H])
    assert_shards_equal(both)
    first = run_fleet(2, 2, [3], [H])
    assert_equal(jax.tree.map(lambda x: x[:1], both), first)


def test_mean_over_groups_of_devices():
    shards = devices.make_shards(4, 2)
    values = np.arange(4.0)
    mean = devices.over_devices(lambda x: mean_over_shards(x, shards), jax.devices()[:4], num_mapped=1)
    np.testing.assert_array_equal(mean(values), [0.5, 0.5, 2.5, 2.5])
    assert devices.make_shards(2, 2) == Shards(devices.AXIS, 2) and devices.make_shards(2, 1) is None


def given_batches(num_updates, size):
    """Batches [U, B] for a network of four inputs and two actions."""
    random = np.random.default_rng(0)
    shape = (num_updates, size)
    return Batch(
        observation=random.normal(size=(*shape, 4)).astype(np.float32),
        action=random.integers(2, size=shape).astype(np.int32),
        return_m=random.normal(size=shape).astype(np.float32),
        bootstrap_discount=(0.9 * (random.random(shape) < 0.8)).astype(np.float32),
        bootstrap_observation=random.normal(size=(*shape, 4)).astype(np.float32),
        weights=np.ones(shape, np.float32),
    )


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("num_updates, tolerance", [(1, {"rtol": 1e-5, "atol": 1e-7}), (100, {"atol": 1e-4})])
def test_data_parallel_training_on_given_batches_is_that_of_one_device(num_devices, num_updates, tolerance):
    """After one update Adam's first moment is a tenth of the reduced gradient; after a hundred, the parameters."""
    agent, hparams = make_components(SMALL).agent, jax.tree.map(np.float32, H)
    batches = given_batches(num_updates, 32)

    def train(used):
        shards = devices.make_shards(used, used)

        def of_shard(mine):
            def one(learner, batch):
                return learning.update(agent, learner, batch, jax.random.key(0), hparams, shards)[0], ()

            return jax.lax.scan(one, agent.init(jax.random.key(1), hparams), mine)[0]

        split = jax.tree.map(lambda x: np.moveaxis(x.reshape(len(x), used, -1, *x.shape[2:]), 1, 0), batches)
        learner = jax.tree.map(np.asarray, devices.over_devices(of_shard, jax.devices()[:used], 1)(split))
        return learner.params if num_updates > 1 else optax.tree.get(learner.opt_state, "mu")

    whole, shards = train(1), train(num_devices)
    for shard in range(num_devices):
        assert_equal(jax.tree.map(lambda x: x[shard], shards), jax.tree.map(lambda x: x[0], whole), **tolerance)
    initial = agent.init(jax.random.key(1), hparams).params if num_updates > 1 else jax.tree.map(np.zeros_like, whole)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), initial, whole)
    assert min(jax.tree.leaves(moved)) > 1e-3  # so the comparison is not one of initial values


@pytest.mark.parametrize("num_members, num_groups", [(1, 1), (3, 2), (8, 3), (5, 4)])
@pytest.mark.parametrize("shards", [1, 2])
def test_assignment_spreads_and_collects(num_members, num_groups, shards):
    assignment = population.assign(num_members, num_groups)
    values = np.arange(num_members) * 10
    back = assignment.collect(assignment.spread(values, shards))
    np.testing.assert_array_equal(back, np.repeat(values[:, None], shards, axis=1))
    assert assignment.num_members == num_members


# -- resume: train(2N) equals train(N), then resume ------------------------------------------------------------------

FORMS = {
    "single": {"num_devices": 1},
    "population": {"num_devices": 2, "seeds": (0, 1, 2), "vary": {"learning_rate": [1e-3]}},
    "data parallel": {"num_devices": 2, "devices_per_agent": 2},
}


def without_times(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="seconds")


@pytest.fixture(scope="module", params=FORMS)
def uninterrupted(request):
    return request.param, jaxdqn.train(SMALL, H, settings=QUIET, **FORMS[request.param])


def test_an_interrupted_run_resumes_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    form, whole = uninterrupted
    out = tmp_path / "run"
    seen = []

    def die(rows):
        seen.append(rows)
        if len(seen) == 60:
            raise KeyboardInterrupt  # as abrupt as kill -9 for what lies on disk

    often = QUIET._replace(checkpoint_seconds=0.0, on_chunk=die)
    with pytest.raises(KeyboardInterrupt):
        jaxdqn.train(SMALL, H, out=out, settings=often, **FORMS[form])
    # A checkpoint from well before the end, so that rows are recomputed.
    resumed = jaxdqn.resume(out, settings=QUIET)
    assert_equal(resumed.params, whole.params)
    pd.testing.assert_frame_equal(without_times(resumed.metrics), without_times(whole.metrics), check_exact=True)


def test_extending_a_finished_run_equals_the_longer_run(tmp_path):
    grid = {"log_interval": 400, "eval_interval": 1_600}
    half = dataclasses.replace(SMALL, total_steps=4_800, **grid)
    whole = dataclasses.replace(SMALL, total_steps=9_600, **grid)
    jaxdqn.train(half, H, out=tmp_path / "half", settings=QUIET, num_devices=1)
    extended = jaxdqn.resume(tmp_path / "half", total_steps=9_600, settings=QUIET)
    longer = jaxdqn.train(whole, H, settings=QUIET, num_devices=1)
    assert_equal(extended.params, longer.params)
    pd.testing.assert_frame_equal(without_times(extended.metrics), without_times(longer.metrics), check_exact=True)


def test_a_checkpoint_in_the_middle_of_a_window_loses_nothing(tmp_path, monkeypatch):
    """Ctrl-C falls between two logging points: the sums so far are in the checkpoint."""
    from jaxdqn.runs import driver

    monkeypatch.setattr(driver, "CHUNK_SECONDS", 1e-9)  # chunks of one iteration
    whole = jaxdqn.train(SMALL, H, settings=QUIET, num_devices=1)
    original, calls = driver.drive, []

    def interrupt_soon(built, at, line, hooks):
        def interrupted():
            calls.append(1)
            return len(calls) == 123

        return original(built, at, line, hooks._replace(interrupted=interrupted))

    monkeypatch.setattr(driver, "drive", interrupt_soon)
    jaxdqn.train(SMALL, H, settings=QUIET, num_devices=1, out=tmp_path / "run")
    monkeypatch.setattr(driver, "drive", original)
    resumed = jaxdqn.resume(tmp_path / "run", settings=QUIET)
    assert_equal(resumed.params, whole.params)
    pd.testing.assert_frame_equal(without_times(resumed.metrics), without_times(whole.metrics), check_exact=True)


def test_another_version_is_a_warning(tmp_path, capsys):
    jaxdqn.train(dataclasses.replace(SMALL, total_steps=800), H, out=tmp_path / "a", settings=QUIET, num_devices=1)
    meta = next((tmp_path / "a" / "checkpoints").glob("*/meta.json"))
    text = meta.read_text()
    meta.write_text(text.replace('"jax": "', '"jax": "0.'))
    # The manifest guards the meta data too: with it rewritten, only the version differs.
    from jaxdqn.runs import checkpoints

    manifest = meta.parent / "manifest.json"
    manifest.unlink()
    import json

    manifest.write_text(json.dumps(checkpoints._checksums(meta.parent)))
    jaxdqn.resume(tmp_path / "a", total_steps=1_600, settings=QUIET)
    assert "not bit for bit" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")


def test_another_number_of_devices_takes_up_a_checkpoint(tmp_path, monkeypatch, capsys):
    kind = {"num_devices": 3, "seeds": (0, 1, 2, 3)}
    whole = jaxdqn.train(SMALL, H, settings=QUIET, **kind)
    half = dataclasses.replace(SMALL.resolved(), total_steps=4_000)
    jaxdqn.train(half, H, settings=QUIET, out=tmp_path / "run", **kind)
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda *_: two)
    resumed = jaxdqn.resume(tmp_path / "run", total_steps=SMALL.total_steps, settings=QUIET)
    # A warning, though on CPU devices not even a bit differs: members run one after the other.
    assert "warning: the checkpoint was written with device 3 x cpu" in capsys.readouterr().err
    assert_equal(resumed.params, whole.params)


# -- an agent of each kind, with its own traced fields: DQN, which learns from items, is above ------------------------

CATCH = Config(
    env="Catch-bsuite",
    hidden_sizes=(16,),
    num_envs=8,
    batch_size=16,
    replay_capacity=800,
    learning_starts=200,
    total_steps=1_600,
    log_interval=400,
    eval_episodes=2,
    final_episodes=2,
    n_step=2,
)
SEQUENCES = {"burn_in": 2, "sequence_length": 4, "period": 2, "memory_size": 8}
EPOCHS = {"n_step": 1, "rollout_length": 8, "updates_per_iteration": 8, "learning_starts": 0, "layer_norm": True}
KINDS = {
    "sequences": ({"agent": "r2d2", "rollout_length": 2, "batch_size": 8, "own": SEQUENCES}, {"priority_eta": 0.1}),
    "on-policy epochs": ({"agent": "pqn", **EPOCHS}, {"td_lambda": 0.0}),
    "noisy": ({"noisy": True}, {"gamma": 0.9}),
    "prioritised": ({"replay": "prioritised"}, {"priority_exponent": 0.0}),
}
"""By name: what its configuration changes, and traced fields of its own, which two of three members vary."""
ITERATIONS = 60


def config_of(kind):
    return dataclasses.replace(CATCH, **KINDS[kind][0])


def members_of(kind):
    """Three members: two seeds, two settings."""
    usual = agents.complete(config_of(kind), HParams(learning_rate=5e-3, target_period=20, epsilon_steps=1_000))[1]
    varied = with_values(usual, KINDS[kind][1])
    return [3, 3, 4], [usual, varied, varied]


def run_kind(kind, num_devices=1, devices_per_agent=1, which=slice(None), **options):
    seeds, settings = (values[which] for values in members_of(kind))
    options = {"iterations": ITERATIONS, "config": config_of(kind), **options}
    return run_fleet(num_devices, devices_per_agent, seeds, settings, **options)


@functools.cache
def own_runs(kind):
    """Each member's own single run, [M, 1, ...], in chunks."""
    runs = [run_kind(kind, which=slice(m, m + 1), chunk=17) for m in range(3)]
    return jax.tree.map(lambda *x: np.concatenate(x), *runs)


@pytest.fixture
def lazily(monkeypatch):
    """Programs are compiled when they are called, so not those that a test has no use for."""
    monkeypatch.setattr(devices, "compiled", lambda program, *args: program)


def slow_but(*chosen):
    return pytest.mark.parametrize("kind", usual(KINDS, *chosen))


@slow_but("prioritised")
def test_of_each_kind_members_and_chunks_are_own_runs_bitwise(kind, monkeypatch):
    """And all members are one compilation, also those that vary what is the agent's own."""
    own = own_runs(kind)
    run_kind(kind, which=slice(1), iterations=1)  # compiled, whatever this process has forgotten since
    traced, rollout = [], acting.rollout
    monkeypatch.setattr(acting, "rollout", lambda *args, **named: traced.append(1) or rollout(*args, **named))
    assert_equal(run_kind(kind), own)
    assert not traced
    for one, other in ((0, 1), (1, 2)):  # the settings count, and so does the seed
        assert any(np.any(x[one] != x[other]) for x in jax.tree.leaves(own))


@slow_but("sequences")
def test_of_each_kind_a_resumed_run_is_the_longer_run_bitwise(kind, tmp_path):
    config, (seeds, settings) = config_of(kind), members_of(kind)
    options = {"settings": QUIET, "num_devices": 1}
    whole = jaxdqn.train(config, settings[1], seeds=seeds[1:], **options)
    half = dataclasses.replace(config.resolved(), total_steps=config.total_steps // 2)
    jaxdqn.train(half, settings[1], seeds=seeds[1:], out=tmp_path / "run", **options)
    resumed = jaxdqn.resume(tmp_path / "run", total_steps=config.total_steps, settings=QUIET)
    assert_equal(resumed.params, whole.params)
    pd.testing.assert_frame_equal(without_times(resumed.metrics), without_times(whole.metrics), check_exact=True)


@slow_but("prioritised")
def test_of_each_kind_vmapped_members_are_their_own_runs(kind, lazily):
    assert_equal(run_kind(kind, width=3), own_runs(kind), atol=ROUNDING)


@slow_but()
def test_of_each_kind_members_on_two_devices_are_their_own_runs_bitwise(kind, lazily):
    # In CartPole not, of sequences and with the generators of conftest.py: there the physics of a rollout of two steps
    # come to lie in other fusions, and observations differ by 4e-9 after one iteration. With XLA_FLAGS= they do not.
    assert_equal(run_kind(kind, 2), own_runs(kind))


@slow_but("prioritised")
def test_of_each_kind_shards_stay_equal_and_groups_know_nothing_of_each_other_bitwise(kind, lazily):
    both, turned = (run_kind(kind, 4, 2, which=order) for order in (slice(1, 3), slice(2, 0, -1)))
    assert_shards_equal(both)
    assert_equal(both, jax.tree.map(lambda x: x[::-1], turned))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequences", "noisy", "prioritised"])
def test_of_each_kind_one_actor_in_lockstep_is_the_fused_loop_bitwise(kind):
    # Actors bring priorities of their own (test_actor_learner.py); to the power 0, as member 1 has it, they are equal.
    config, (seeds, settings) = config_of(kind), members_of(kind)
    axes = actor_learner.Axes(workers=1, merge_every=1, broadcast_every=1)
    built, states = actor_learner.build(make_components(config), jax.devices()[:1], seeds[1:2], settings[1:2], axes)
    prefill = timeline(config).prefill
    states, metrics = built.prefill(states, built.zero_metrics, 0, prefill)
    states, _ = built.step(states, metrics, prefill, prefill + ITERATIONS)
    params = runner.gather_one([state.learner.params for state in states])
    assert_equal(params, jax.tree.map(lambda x: x[1:2], own_runs(kind)))


OWN_FIELDS = [name for name, declared in agents.AGENTS.items() if dataclasses.fields(declared.hparams)]


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_an_agents_own_fields_are_traced_so_that_a_population_over_them_is_one_compilation(name):
    """No value of theirs reaches Python: an iteration is traced without any."""
    own = SEQUENCES if name in ("r2d2", "drqn") else ()
    on_policy = EPOCHS if agents.of(name).on_policy else {}
    config = dataclasses.replace(CATCH, agent=name, own=own, **on_policy)
    parts = make_components(config)
    trainer = training.make_trainer(parts.environment, parts.agent, parts.replay, parts.config)
    hparams = jax.eval_shape(lambda: jax.tree.map(np.float32, parts.agent.defaults))
    assert jax.tree.leaves(hparams.own)

    def both(key, hparams):
        state, metrics = trainer.init(key, key, hparams), trainer.zero_metrics()
        state, metrics = trainer.prefill(state, metrics, np.int32(0), hparams)
        return trainer.step(state, metrics, np.int32(1), hparams)

    jax.eval_shape(both, jax.random.key(0), hparams)
