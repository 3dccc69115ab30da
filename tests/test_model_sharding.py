"""A network split over devices learns what the whole network learns, and each device holds its part of it."""

import dataclasses
import functools

import jax
import numpy as np
import pandas as pd
import pytest
from cases import usual
from jax.sharding import PartitionSpec as P

import jaxdqn
from jaxdqn import evaluation
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import memory, model_sharding, population, runner
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import timeline

WIDE = Config(
    hidden_sizes=(256, 128),
    num_envs=8,
    batch_size=64,
    replay_capacity=400_000,
    learning_starts=200,
    total_steps=1_600,
    eval_episodes=4,
    final_episodes=4,
    env_params={"max_steps_in_episode": 50},
)
H = HParams(target_period=20, epsilon_steps=1_000)
PREFILL = timeline(WIDE).prefill
QUIET = Settings(progress=False, tensorboard=False)
NETWORKS = {
    "two layers": {},
    "three layers, dueling, with LayerNorm": {"hidden_sizes": (128, 64, 32), "dueling": True, "layer_norm": True},
    "actor-critic": {"hidden_sizes": (128,), "agent": "a2c"},
}
MESHES = [(2, 2), (4, 4), (4, 2)]  # devices, and of those how many share one copy of the network


def wide(network="two layers"):
    return dataclasses.replace(WIDE, **NETWORKS[network])


@functools.cache
def compiled(network, num_devices, model):
    return model_sharding.build(make_components(wide(network)), jax.devices()[:num_devices], [3], [H], model)


def build(network="two layers", num_devices=2, model=2):
    """A runner, compiled once for all tests, and states of its own: the programs take those they are given away."""
    built, states = compiled(network, num_devices, model)
    return built, runner.scatter(states, runner.gather(states))


def train(built, states, updates=100, chunk=100):
    """(states, metrics) as NumPy arrays after the prefill and `updates` iterations."""
    states, metrics = built.prefill(states, built.zero_metrics, 0, PREFILL)
    for start in range(PREFILL, PREFILL + updates, chunk):
        states, metrics = built.step(states, metrics, start, min(start + chunk, PREFILL + updates))
    return runner.gather(states), runner.gather(metrics)


@functools.cache
def unsharded(network):
    components = make_components(wide(network))
    return train(*runner.build(components, jax.devices()[:1], 1, population.assign(1, 1), [3], [H]))


def assert_trees(one, other, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), one, other)


CASES = [("two layers", *mesh) for mesh in MESHES] + [(name, 2, 2) for name in NETWORKS if name != "two layers"]


@pytest.mark.parametrize("network, num_devices, model", usual(CASES, ("two layers", 4, 2)))
def test_a_sharded_network_learns_what_the_whole_one_does(network, num_devices, model):
    state, metrics = train(*build(network, num_devices, model))
    expected_state, expected_metrics = unsharded(network)
    # Parameters, target, moments, environments, ring and keys: the sums of a layer are in another order, no more.
    assert_trees(state, expected_state, atol=1e-5)
    assert_trees(metrics, expected_metrics, rtol=1e-4, atol=1e-4)
    before = runner.gather(build(network, num_devices, model)[1]).learner.params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.learner.params)
    assert min(jax.tree.leaves(moved)) > 1e-3  # so the comparison is not one of initial values


@pytest.mark.parametrize("num_devices, model", MESHES)
def test_each_device_holds_its_part_of_parameters_target_and_moments(num_devices, model):
    _, states = build("two layers", num_devices, model)
    learner = states[0].learner
    for tree in (learner.params, learner.target_params, learner.opt_state[0].mu, learner.opt_state[0].nu):
        part = model_sharding.bytes_per_device(tree) / memory.tree_bytes(tree)
        assert 1 / model <= part < 1 / model + 0.02  # the head, and the biases of split inputs, are whole
    kernels = [learner.params[f"Dense_{i}"]["kernel"].sharding.shard_shape((1, 1, 256, 128)) for i in (0, 1)]
    assert kernels == [(1, 1, 256, 128 // model), (1, 1, 256 // model, 128)]


def test_parts_stay_in_place_through_training_and_ring_and_environments_are_split_over_data():
    built, states = build("two layers", 4, 2)
    states, metrics = built.prefill(states, built.zero_metrics, 0, PREFILL)
    states, _ = built.step(states, metrics, PREFILL, PREFILL + 5)
    after = states[0]
    jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail("moved"),
        after,
        *build("two layers", 4, 2)[1],
    )
    assert model_sharding.bytes_per_device(after.replay) * 2 == memory.tree_bytes(after.replay)
    assert model_sharding.bytes_per_device(after.actor.env_state) * 2 <= memory.tree_bytes(after.actor.env_state) + 64
    assert float(built.telemetry(states)["param_bytes_per_device"]) == model_sharding.bytes_per_device(
        after.learner.params
    )


@pytest.mark.parametrize("num_devices, model", MESHES)
def test_the_compiled_step_holds_the_ring_once_and_moves_only_batches(num_devices, model):
    built = compiled("two layers", num_devices, model)[0]
    ring_bytes = memory.tree_bytes(jax.eval_shape(built.components.replay.init)) // (num_devices // model)
    analysis = built.program.memory_analysis()
    assert analysis.alias_size_in_bytes >= ring_bytes
    assert analysis.temp_size_in_bytes < 0.05 * ring_bytes
    text = built.program.as_text()
    rows = f"[50000,{8 * model // num_devices}"
    assert rows in text and " conditional(" not in text
    inside = text[: text.rindex("ENTRY")]
    forbidden = [" copy(", " all-gather(", " all-to-all(", " collective-permute(", " all-reduce("]
    lines = [(line, kind) for line in inside.splitlines() for kind in forbidden if kind in line]
    assert not [line for line, kind in lines if "[50000," in line.split(kind)[0]]


def test_two_layers_cost_one_all_reduce_of_activations_in_each_pass():
    """Column, then row: of the batch's activations only the second layer's outputs, [B, 128], are summed."""
    text = compiled("two layers", 2, 2)[0].program.as_text()
    reduced = {line.split(" = ")[1].split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line}
    assert any("[64,128]" in shape for shape in reduced)
    assert not any("256" in shape for shape in reduced)


@pytest.mark.parametrize("num_devices, model", [(2, 2), (4, 2)])
def test_gather_and_scatter_are_inverse_and_chunks_and_resume_are_bitwise(num_devices, model):
    whole, _ = train(*build("two layers", num_devices, model))
    built, states = build("two layers", num_devices, model)
    states, metrics = built.prefill(states, built.zero_metrics, 0, PREFILL)
    states, metrics = built.step(states, metrics, PREFILL, PREFILL + 33)
    saved = runner.gather(states)
    template = build("two layers", num_devices, model)[1]
    restored = runner.scatter(template, saved)
    assert_trees(runner.gather(restored), saved)
    jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail("moved"), *restored, *states
    )
    for start, stop in ((33, 40), (40, 100)):
        restored, metrics = built.step(restored, metrics, PREFILL + start, PREFILL + stop)
    assert_trees(runner.gather(restored), whole)


def test_evaluation_plays_the_episodes_of_the_whole_network():
    built, states = build()
    params = jax.tree.map(lambda x: x[0, 0], runner.gather(states).learner.params)
    key = evaluation.episode_key(3, iteration=7, part=0)
    episodes = evaluation.evaluate(built.components.environment, built.components.agent, params, key, 4, 50)
    assert_trees(jax.tree.map(lambda x: x[0, 0], runner.gather(built.evaluate(states, 7))), episodes)


def test_a_run_logs_saves_resumes_and_loads(tmp_path, monkeypatch):
    original = runner.build

    def build_sharded(components, used, devices_per_agent, assignment, seeds, settings, *args, **options):
        if options.get("over"):
            return original(components, used, devices_per_agent, assignment, seeds, settings, *args, **options)
        return model_sharding.build(components, jax.devices()[:2], seeds, settings, model=2)

    monkeypatch.setattr(runner, "build", build_sharded)
    grid = {"log_interval": 200, "eval_interval": 400}
    half, whole = (dataclasses.replace(WIDE, total_steps=total, **grid) for total in (800, 1_600))
    longer = jaxdqn.train(whole, H, num_devices=1, settings=QUIET)
    jaxdqn.train(half, H, num_devices=1, out=tmp_path / "run", settings=QUIET)
    resumed = jaxdqn.resume(tmp_path / "run", total_steps=1_600, settings=QUIET)
    assert_trees(resumed.params, longer.params)
    assert_trees(jaxdqn.load(tmp_path / "run").params, longer.params)
    columns = [name for name in longer.metrics if name != "seconds"]
    pd.testing.assert_frame_equal(resumed.metrics[columns], longer.metrics[columns], check_exact=True)


# -- placements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_hidden, path, expected",
    [
        (2, "params/Dense_0/kernel", P(None, "model")),
        (2, "params/Dense_0/bias", P("model")),
        (2, "opt_state/0/mu/Dense_1/kernel", P("model", None)),
        (2, "target_params/Dense_1/bias", P()),
        (2, "params/Dense_2/kernel", P()),
        (2, "params/LayerNorm_0/scale", P("model")),
        (2, "params/LayerNorm_1/scale", P()),
        (1, "params/Dense_1/kernel", P("model", None)),
        (1, "params/Dense_2/kernel", P("model", None)),  # the second head
        (1, "params/Dense_2/bias", P()),
        (2, "params/Dense_3/kernel", P()),
        (1, "params/Conv3x3_0/kernel", P()),
        (2, "updates", P()),
    ],
)
def test_parameter_spec(num_hidden, path, expected):
    assert model_sharding.parameter_spec(f"learner/{path}", num_hidden) == expected


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, num_devices, model, words",
    [
        ({"hidden_sizes": (130, 64)}, 4, 4, "layer 1 has width 130.*model 4 devices; use 128"),
        ({"hidden_sizes": (64, 7, 33)}, 2, 2, "layer 3 has width 33.*use 32"),
        ({"hidden_sizes": (1,)}, 2, 2, "width 1, .*use 2"),
        ({"agent": "random"}, 2, 2, "no hidden dense layers"),
        ({"num_envs": 3}, 4, 2, "num_envs 3 .* 2 groups"),
        ({}, 3, 2, "3 devices cannot be divided into groups of model 2"),
    ],
)
def test_what_cannot_be_split_is_a_user_error(changes, num_devices, model, words):
    components = make_components(dataclasses.replace(WIDE, **changes))
    with pytest.raises(UserError, match=words):
        model_sharding.build(components, jax.devices()[:num_devices], [3], [H], model)


def test_inner_layers_of_any_width_can_be_split():
    assert model_sharding.check(make_components(dataclasses.replace(WIDE, hidden_sizes=(64, 7))), 1, 4) == 2
