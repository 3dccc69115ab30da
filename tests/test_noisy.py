"""Noisy layers: the mean network, its moments, independent draws, and that noisy agents train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdqn
from jaxdqn import agents
from jaxdqn.base import Batch, Spec
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.networks import q_network
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs.export import export_policy

A, KEY = 3, jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
GRID = Spec("test", jax.ShapeDtypeStruct((6, 5, 4), jnp.bool_), A)
H = jax.tree.map(jnp.float32, HParams())
OBSERVATION = jax.random.normal(jax.random.key(1), (5, 4))
LINEAR = q_network(SPEC, hidden_sizes=(8,), noisy=True)


def shapes(params):
    return jax.tree.map(lambda x: x.shape, params)


def test_parameters_have_the_papers_shapes_and_first_values():
    params = q_network(SPEC, hidden_sizes=(64,), dueling=True, noisy=True).init(KEY)
    each = lambda i, o: {"kernel": (i, o), "bias": (o,), "kernel_sigma": (i, o), "bias_sigma": (o,)}  # noqa: E731
    layers = {"NoisyDense_0": each(4, 64), "NoisyDense_1": each(64, 1), "NoisyDense_2": each(64, A)}
    assert shapes(params) == layers
    for name, width in (("NoisyDense_0", 4), ("NoisyDense_2", 64)):
        layer, bound = params[name], width**-0.5
        np.testing.assert_allclose(layer["kernel_sigma"], 0.5 * bound, rtol=1e-6)
        np.testing.assert_allclose(layer["bias_sigma"], 0.5 * bound, rtol=1e-6)
        largest = np.abs(layer["kernel"]).max()
        assert 0.9 * bound < largest <= bound and np.abs(layer["bias"]).max() <= bound
        np.testing.assert_allclose(np.std(layer["kernel"]), bound / 3**0.5, rtol=0.15)


@pytest.mark.parametrize("spec, torso", [(SPEC, "mlp"), (GRID, "minatar")])
def test_without_a_key_it_is_the_dense_network_of_the_means(spec, torso):
    options = {"hidden_sizes": (8,), "dueling": True, "layer_norm": True}
    noisy, plain = (q_network(spec, torso, noisy=on, **options) for on in (True, False))
    params = noisy.init(KEY)
    means = {
        name.removeprefix("Noisy"): {field: x for field, x in layer.items() if not field.endswith("_sigma")}
        for name, layer in params.items()
    }
    assert shapes(means) == shapes(plain.init(KEY))
    observation = jax.random.bernoulli(KEY, 0.5, (7, *spec.observation.shape)).astype(spec.observation.dtype)
    np.testing.assert_allclose(noisy.apply(params, observation), plain.apply(means, observation), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(plain.apply(means, observation, KEY), plain.apply(means, observation))


def test_the_noise_has_the_moments_of_its_definition():
    """One linear layer: the mean over keys is the mean network, and the covariance that of f(e_o) (f(e_i)^T s x + s).

    f(e) has mean 0 and variance E|e| = sqrt(2 / pi), and both draws are independent: outputs are uncorrelated.
    """
    head = q_network(SPEC, hidden_sizes=(4,), activation="elu", noisy=True)
    params = head.init(KEY)
    # The hidden layer without noise, and as the identity where elu is.
    params["NoisyDense_0"] = {
        "kernel": jnp.eye(4),
        "bias": jnp.zeros(4),
        "kernel_sigma": jnp.zeros((4, 4)),
        "bias_sigma": jnp.zeros(4),
    }
    x = jnp.array([[0.5, 1.0, 2.0, 0.25]])
    keys = jax.random.split(jax.random.key(5), 20_000)
    outputs = np.asarray(jax.jit(jax.vmap(lambda key: head.apply(params, x, key)[0]))(keys))
    variance = (2 / np.pi) * 0.25**2 * float(np.sum(np.square(x))) + np.sqrt(2 / np.pi) * 0.25**2
    error = np.sqrt(variance / len(keys))
    np.testing.assert_allclose(outputs.mean(axis=0), head.apply(params, x)[0], atol=5 * error)
    covariance = np.cov(outputs.T)
    np.testing.assert_allclose(np.diag(covariance), variance, rtol=0.1)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.05 * variance)


def test_one_draw_serves_a_batch_and_another_key_is_another_draw():
    params = LINEAR.init(KEY)
    same = jnp.broadcast_to(OBSERVATION[:1], OBSERVATION.shape)
    first, second = (np.asarray(LINEAR.apply(params, same, jax.random.key(seed))) for seed in (1, 2))
    np.testing.assert_allclose(first, np.broadcast_to(first[:1], first.shape), rtol=1e-5)
    assert np.all(np.abs(first - second) > 1e-4)


@pytest.mark.parametrize("name, evaluations", [("dqn", 2), ("double_dqn", 3)])
def test_online_target_and_selector_draw_noise_of_their_own(name, evaluations, monkeypatch):
    """The keys with which a loss and an acting step call the network, of one update's and one step's key."""
    seen = []

    def recorded(module, variables, observation, rngs):
        seen.append(tuple(np.asarray(jax.random.key_data(rngs["noise"])).tolist()))
        return jnp.zeros((len(observation), A)) * sum(jnp.sum(x) for x in jax.tree.leaves(variables))

    agent = make_agent(Config(agent=name, hidden_sizes=(8,), noisy=True), SPEC)
    learner = agent.init(KEY, H)
    batch = Batch(OBSERVATION, jnp.zeros(5, jnp.int32), jnp.zeros(5), jnp.ones(5), OBSERVATION, jnp.ones(5))
    monkeypatch.setattr("jaxdqn.networks.TorsoAndHead.apply", recorded)
    for key in (1, 2):
        agent.gradient(learner, batch, jax.random.key(key), H)
        agent.act(learner.params, (), OBSERVATION, jax.random.key(key), jnp.zeros(5))
    assert len(seen) == len(set(seen)) == 2 * (evaluations + 1)


@pytest.mark.parametrize("name", ["dqn", "double_dqn", "ensemble_dqn", "partitioned_dqn", "pqn"])
def test_agents_act_with_noise_and_are_judged_without(name):
    agent = make_agent(Config(agent=name, hidden_sizes=(8,), noisy=True), SPEC)
    params = agent.init(KEY, H._replace(own=agents.of(name).hparams())).params
    many = jax.random.normal(KEY, (400, 4))
    chosen = lambda act, key, *more: np.asarray(act(params, (), many, jax.random.key(key), *more)[0])  # noqa: E731
    np.testing.assert_array_equal(chosen(agent.greedy, 1), chosen(agent.greedy, 2))
    assert np.any(chosen(agent.act, 1, jnp.zeros(400)) != chosen(agent.act, 2, jnp.zeros(400)))


# -- in training (in every mode: test_modes_agree.py) -----------------------------------------------------------------

SMALL = Config(
    env="Catch-bsuite",
    noisy=True,
    num_envs=8,
    batch_size=16,
    hidden_sizes=(16,),
    replay_capacity=800,
    learning_starts=200,
    total_steps=1_600,
    log_interval=400,
    eval_episodes=2,
    final_episodes=2,
)
GREEDY = HParams(epsilon_begin=0.0, epsilon_end=0.0)
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)


def test_sigma_is_learned_and_the_mean_is_exported(tmp_path):
    result = jaxdqn.train(SMALL, GREEDY, out=tmp_path / "run", settings=QUIET)
    sigma = result.params["NoisyDense_1"]["kernel_sigma"]
    assert np.ptp(sigma) > 1e-4 and result.metrics.loss.notna().any()
    assert export_policy(tmp_path / "run", 0, tmp_path / "policy.jax") > 0


def test_a_noisy_network_split_over_devices_learns_what_the_whole_one_does():
    # The noise is the same on every mesh. Not longer: greedy actions turn over by the last bit of a sum.
    short = dataclasses.replace(SMALL, total_steps=400)
    fused = jaxdqn.train(short, GREEDY, settings=QUIET)
    split = jaxdqn.train(short, GREEDY, settings=QUIET, axes=Axes("sharding", workers=2))
    assert fused.summary["updates"] == 25
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split.params, fused.params)
