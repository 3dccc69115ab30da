"""Telemetry against loops in NumPy, matrices of known rank and dead units; and that it changes nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow, usual

import jaxdqn
from jaxdqn import agents, networks, replay, telemetry
from jaxdqn.base import Progress, Spec, Transition
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import Axes, preset

QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
ASKED = QUIET._replace(telemetry=True)
NETWORK = {"dormant_units", "effective_rank"}
HISTOGRAM = [f"priorities_below_1e{exponent}" for exponent in range(-4, 2)]
H = HParams(priority_epsilon=0.0)
CONFIG = Config(
    num_envs=4,
    batch_size=32,
    replay_capacity=400,
    learning_starts=160,
    total_steps=800,
    log_interval=80,
    eval_interval=160,
    eval_episodes=2,
    eval_max_steps=20,
    final_episodes=2,
    hidden_sizes=(16,),
)


# -- of the network ---------------------------------------------------------------------------------------------------


def test_dormant_units_are_those_of_the_loop():
    features = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    features[:, :5] = 0.0  # dead
    features[:, 5] *= 0.01  # all but dead
    activity = [np.mean([abs(x) for x in unit]) for unit in features.T]
    dormant = sum(a / np.mean(activity) <= 0.025 for a in activity)
    assert dormant == 6 and float(telemetry.dormant_units(features)) == pytest.approx(0.5)
    assert float(telemetry.dormant_units(1e-6 * features)) == pytest.approx(0.5)  # whatever their scale
    assert float(telemetry.dormant_units(features, threshold=0.0)) == pytest.approx(5 / 12)
    assert float(telemetry.dormant_units(np.zeros((8, 3)))) == 1.0


def with_values(values, rows, columns):
    """A matrix with these singular values."""
    left, right = (np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))[0] for n in (rows, columns))
    return (left[:, : len(values)] * values @ right[: len(values)]).astype(np.float32)


@pytest.mark.parametrize(
    "values, rank",
    [
        ([1.0] * 5, 5),
        ([100.0, 0.5, 0.5], 1),
        ([90.0, 9.5, 0.5], 2),
        ([1.0] * 20, 20),
        ([0.0], 0),
        ([97, 1.5, 1, 0.5], 3),
    ],
)
def test_effective_rank_of_known_singular_values(values, rank):
    for shape in ((40, 20), (20, 40)):
        assert float(telemetry.effective_rank(with_values(np.array(values), *shape))) == rank


def test_effective_rank_is_that_of_the_loop():
    features = np.maximum(np.random.default_rng(0).normal(size=(100, 30)) @ np.diag(0.8 ** np.arange(30)), 0)
    values, k = np.linalg.svd(features, compute_uv=False), 0
    while values[:k].sum() < 0.99 * values.sum():
        k += 1
    assert 1 < k < 30 and float(telemetry.effective_rank(features.astype(np.float32))) == k


def test_features_are_what_the_head_reads():
    spec = Spec("x", jax.ShapeDtypeStruct((10, 10, 4), jnp.bool_), 3)
    observation = np.random.default_rng(0).random((5, 10, 10, 4)) < 0.5
    network = networks.q_network(spec)
    params = network.init(jax.random.key(0))
    head = params["Dense_1"]
    features = network.features(params, observation)
    expected = network.apply(params, observation)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", agents.AGENTS)
def test_every_agent_with_one_network_has_features(name):
    """For one with a memory the torso's, before the cell; random has no network, ensembles and partitions several."""
    spec = Spec("x", jax.ShapeDtypeStruct((3,), jnp.float32), 2)
    agent = make_agent(Config(agent=name, hidden_sizes=(8, 6)), spec)
    if name == "random" or agents.of(name).stacked:
        assert agent.features is None
        return
    params = agent.init(jax.random.key(0), agent.defaults).params
    assert agent.features(params, jnp.ones((5, 3))).shape == (5, 6)


# -- of the replay ----------------------------------------------------------------------------------------------------

NUMBER, SEEN = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
ROW = Transition(SEEN, jax.ShapeDtypeStruct((), jnp.uint8), NUMBER, NUMBER, SEEN, jax.ShapeDtypeStruct((), jnp.bool_))


def block(first, length, envs=3):
    """Rows that observe when they were written."""
    time = jnp.broadcast_to(jnp.arange(first, first + length, dtype=jnp.float32)[:, None], (length, envs))
    zeros = jnp.zeros_like(time)
    return Transition(time[..., None], zeros.astype(jnp.uint8), zeros, zeros + 1, time[..., None], zeros > 0)


def filled(record, rows, length=2):
    add, state = jax.jit(record.add), record.init()
    for first in range(0, rows, length):
        state = add(state, block(first, length), jnp.int32(first), H)
    return state


def described(record, state, written, hparams=H):
    progress = Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0))
    return {name: float(x) for name, x in record.describe(state, progress, hparams).items()}


@pytest.mark.parametrize("written", [8, 20, 26])  # of 20 rows
@pytest.mark.parametrize("n_step, copies", [(1, 2), (3, 2), (3, 1)])
def test_uniform_age_is_that_of_what_is_drawn(written, n_step, copies):
    record = replay.uniform(ROW, 20, 3, 2_000, n_step, copies)
    state, progress = filled(record, written), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0))
    drawn = set(np.asarray(record.sample(state, jax.random.key(0), progress, H).observation)[:, 0].tolist())
    assert described(record, state, written) == {"replay_age": np.mean([written - 1 - time for time in drawn])}


@pytest.mark.parametrize("written", [12, 20, 26])
@pytest.mark.parametrize("period", [1, 2])
def test_the_age_of_sequences_is_that_of_their_rows(written, period):
    record = replay.sequences(ROW, 20, 3, 2_000, 6, period)
    state, progress = filled(record, written), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0))
    rows = np.asarray(record.sample(state, jax.random.key(0), progress, H).transitions.observation)[..., 0]
    drawn = {tuple(column) for column in rows.T.tolist()}
    assert described(record, state, written)["replay_age"] == written - 1 - np.mean(list(drawn))


@pytest.mark.parametrize("written", [8, 20, 26])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_prioritised_age_and_histogram_are_those_of_the_loop(written, n_step, alpha):
    record = replay.prioritised(ROW, 20, 3, 4, n_step, 2)
    hparams = H._replace(priority_exponent=alpha)
    state = filled(record, written)
    priorities = 10 ** np.random.default_rng(written).uniform(-5, 2, 60).astype(np.float32)
    there = np.flatnonzero(np.asarray(state.tree.levels[0][:60]))[1:]  # the first keeps the priority of what is new
    state = record.update_priorities(state, there, priorities[there], hparams)
    found = described(record, state, written, hparams)

    total, age, seen = 0.0, 0.0, []
    for place in range(60):
        mass = float(state.tree.levels[0][place])
        if mass > 0:
            total, age = total + mass, age + mass * (written - 1 - float(state.data.observation[divmod(place, 3)][0]))
            seen.append(mass ** (1 / alpha))
    assert 10 < len(seen) <= 60 - 3 * (n_step - 1)
    assert found.pop("replay_age") == pytest.approx(age / total, rel=1e-5)
    expected = {name: np.mean(np.array(seen) < float(name.removeprefix("priorities_below_"))) for name in HISTOGRAM}
    assert found == pytest.approx(expected) and 0 < found["priorities_below_1e-2"] < found["priorities_below_1e1"] < 1


@pytest.mark.parametrize("written", [12, 20, 26])
@pytest.mark.parametrize("period", [1, 2])
def test_prioritised_sequences_are_weighted_by_mass(written, period):
    record = replay.prioritised_sequences(ROW, 20, 3, 4, 6, period)
    state, slots = filled(record, written), 20 // period
    there = np.flatnonzero(np.asarray(state.tree.levels[0][: 3 * slots]))
    state = record.update_priorities(state, there, np.linspace(0.5, 50, len(there)), H)
    total, age = 0.0, 0.0
    for leaf in there:
        rows, mass = (leaf // 3 * period + np.arange(6)) % 20, float(state.tree.levels[0][leaf])
        times = np.asarray(state.data.observation)[rows, leaf % 3, 0]
        assert np.all(np.diff(times) == 1)
        total, age = total + mass, age + mass * np.mean(written - 1 - times)
    found = described(record, state, written)
    assert found["replay_age"] == pytest.approx(age / total, rel=1e-5)
    assert found["priorities_below_1e1"] == pytest.approx(np.mean(np.linspace(0.5, 50, len(there)) < 10))


def test_a_batch_of_at_least_256_rows_is_looked_at():
    for changes, rows in (
        ({}, 256),
        ({"batch_size": 96}, 288),
        ({"agent": "r2d2"}, 32 * (4 + 12 + 1)),
        ({"agent": "a2c", "rollout_length": 5, "learning_starts": 0}, 260),  # its only block, again and again
    ):
        components = make_components(agents.complete(dataclasses.replace(CONFIG, **changes), HParams())[0])
        progress = Progress(jnp.int32(0), jnp.int32(0), jnp.int32(0))
        ring = jax.eval_shape(components.replay.init)
        seen = jax.eval_shape(
            lambda ring, at, c=components: telemetry.drawn(c, ring, jax.random.key(0), at, c.agent.defaults),
            ring,
            progress,
        )
        assert seen.shape == (rows, 4), changes


# -- in a run ---------------------------------------------------------------------------------------------------------

SMALL = {
    "dqn": {},
    "rainbow": {"n_step": 3},
    "pqn": {"rollout_length": 10, "updates_per_iteration": 2, "batch_size": 20, "learning_starts": 0},
    "r2d2": {"rollout_length": 4},
}


@pytest.mark.parametrize("name", usual(SMALL, "dqn", "pqn"))
def test_columns_appear_where_greedy_episodes_are_played(name):
    config = dataclasses.replace(CONFIG, agent=name, **SMALL[name])
    hparams = HParams(own={"v_min": 0.0, "v_max": 20.0}) if name == "rainbow" else HParams()
    frame = jaxdqn.train(config, hparams, settings=ASKED).metrics
    prioritised = HISTOGRAM if name in ("rainbow", "r2d2") else []
    columns = {x for x in frame if x.startswith(telemetry.COLUMNS)}
    assert columns == {*NETWORK, "replay_age", *prioritised}
    judged = frame.eval_return.notna() & (frame.env_steps >= config.learning_starts)
    learned = frame[judged]
    assert 2 <= len(learned) < len(frame)
    assert learned[sorted(columns)].notna().all(axis=None) and frame[~judged][sorted(columns)].isna().all(axis=None)
    assert learned.dormant_units.between(0, 1).all() and learned.effective_rank.between(1, 16).all()
    assert (learned.replay_age < 400).all()
    assert (np.diff(learned[prioritised], axis=1) >= 0).all()


def test_a_run_is_the_same_bits_with_and_without():
    plain, asked = (jaxdqn.train(CONFIG, seeds=(3,), settings=settings) for settings in (QUIET, ASKED))
    for x, y in zip(jax.tree.leaves(plain.params), jax.tree.leaves(asked.params), strict=True):
        np.testing.assert_array_equal(x, y)
    frames = [result.metrics.drop(columns="seconds") for result in (plain, asked)]
    assert set(frames[1]) - set(frames[0]) == {*NETWORK, "replay_age"}
    assert frames[1][list(frames[0])].equals(frames[0])


def test_without_being_asked_for_it_is_not_even_traced(monkeypatch):
    monkeypatch.setattr(telemetry, "measure", None)
    config = dataclasses.replace(CONFIG, hidden_sizes=(17,), total_steps=320)  # that no other test has compiled
    jaxdqn.train(config, settings=QUIET)
    with pytest.raises(TypeError):
        jaxdqn.train(config, settings=ASKED)


def test_members_have_columns_of_their_own():
    config = dataclasses.replace(CONFIG, replay="prioritised")
    frame = jaxdqn.train(config, vary={"priority_exponent": [0.0, 0.9]}, settings=ASKED).metrics
    flat, steep = (frame[(frame.member == member) & frame.replay_age.notna()] for member in (0, 1))
    # An exponent of 0 forgets the priorities, and draws what is there as uniform replay does.
    assert flat[HISTOGRAM].isna().all(axis=None) and steep[HISTOGRAM].notna().all(axis=None)
    rows = np.minimum(flat.env_steps / 4, 100)
    np.testing.assert_allclose(flat.replay_age, 4 * (rows - 1) / 2, rtol=1e-5)
    assert not np.allclose(flat.replay_age, steep.replay_age, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"devices_per_agent": 2, "num_devices": 2}, slow({"axes": Axes("averaging", workers=2)})]
)
def test_over_shards_ages_are_in_steps_of_all(options):
    frame = jaxdqn.train(CONFIG, settings=ASKED, **options).metrics
    last = frame.iloc[-1]
    assert last.replay_age == 4 * (100 - 1) / 2 and 0 < last.effective_rank <= 16


@pytest.mark.parametrize("name", ["a3c", "gorila", "parallel_dqn", "sharded"])
def test_other_schemes_refuse_it(name, tmp_path):
    axes = preset(name).axes
    with pytest.raises(UserError, match=r"telemetry is for the schemes 'fused' and 'averaging', not for '\w+': leave"):
        jaxdqn.train(CONFIG, axes=axes, settings=ASKED, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_session_that_goes_on_may_have_it_or_not(tmp_path):
    whole = jaxdqn.train(CONFIG, settings=ASKED, out=tmp_path / "whole").metrics
    # 400 is no evaluation on the way to 800: what was measured there at the end is taken away.
    jaxdqn.train(dataclasses.replace(CONFIG, total_steps=400), settings=ASKED, out=tmp_path / "parts")
    parts = jaxdqn.resume(tmp_path / "parts", total_steps=800, settings=ASKED).metrics
    columns = [x for x in whole if x != "seconds"]
    others = [x for x in columns if x not in (*NETWORK, "replay_age")]
    assert parts[columns].equals(whole[columns])

    jaxdqn.train(dataclasses.replace(CONFIG, total_steps=400), settings=QUIET, out=tmp_path / "later")
    later = jaxdqn.resume(tmp_path / "later", total_steps=800, settings=ASKED).metrics
    assert later[others].equals(whole[others])
    assert later[later.env_steps > 400][columns].equals(whole[whole.env_steps > 400][columns])
    assert later[later.env_steps <= 400].replay_age.isna().all()
