"""Distributional targets and losses against rlax, SciPy and loops in float64; the agents that learn by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import scipy.stats
from cases import slow
from hypothesis import given
from hypothesis import strategies as st

import jaxdqn
from jaxdqn import acting, agents, networks, td
from jaxdqn.agents import iqn, qr_dqn
from jaxdqn.analysis import figures
from jaxdqn.base import Batch, Network, Spec
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams, values_of
from jaxdqn.errors import UserError
from jaxdqn.learning import OPTIMIZERS
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs import export, results
from jaxdqn.runs.results import Result

B, A, K = 32, 3, 7
KEY = jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
SIZES = st.sampled_from([(2, 2), (4, 9), (11, 3)])  # few: each is compiled anew
REWARDS, DISCOUNTS = st.floats(-6, 6, width=32), st.sampled_from([0.0, 0.5, 0.97, 1.0])
SEEDS = st.integers(0, 999)


def masses(seed, num):
    return np.random.default_rng(seed).dirichlet(np.ones(num)).astype(np.float32)


def projection_loop(z_p, p, z_q):
    """Atom by atom: each mass to the atoms below and above."""
    found, step = np.zeros(len(z_q)), (z_q[-1] - z_q[0]) / (len(z_q) - 1)
    for z, mass in zip(np.asarray(z_p, float), np.asarray(p, float), strict=True):
        place = (np.clip(z, z_q[0], z_q[-1]) - z_q[0]) / step
        below = int(np.floor(place))
        found[below] += mass * (1 - (place - below))
        if place > below:
            found[below + 1] += mass * (place - below)
    return found


@pytest.mark.parametrize(
    "reward, discount, expected",
    [(0.5, 0.9, [0.03, 0.15, 0.32, 0.32, 0.18]), (5.0, 0.9, [0, 0, 0, 0, 1]), (1.0, 1.0, [0, 0.1, 0.2, 0.4, 0.3])],
)
def test_projections_known_by_hand(reward, discount, expected):
    z, p = jnp.linspace(-2, 2, 5), jnp.array([0.1, 0.2, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(td.categorical_projection(reward + discount * z, p, z), expected, atol=1e-6)


@given(SIZES, REWARDS, DISCOUNTS, SEEDS)
def test_the_projection_is_rlaxs_and_that_of_a_loop(sizes, reward, discount, seed):
    z_q, p = jnp.linspace(-3, 5, sizes[1]), jnp.asarray(masses(seed, sizes[0]))
    z_p = reward + discount * jnp.linspace(-3, 5, sizes[0])
    found = td.categorical_projection(z_p, p, z_q)
    np.testing.assert_allclose(found, projection_loop(z_p, p, np.linspace(-3, 5, sizes[1])), atol=2e-6)
    np.testing.assert_allclose(found, rlax.categorical_l2_project(z_p, p, z_q), atol=2e-6)
    assert abs(float(jnp.sum(found)) - 1) < 1e-6
    beyond = np.asarray((z_p < -3.1) | (z_p > 5.1))
    if not np.any((z_p < -3) | (z_p > 5)):
        np.testing.assert_allclose(found @ z_q, p @ z_p, atol=1e-5)
        assert td.mass_outside(z_p, p, z_q) == 0
    assert float(td.mass_outside(z_p, p, z_q)) >= np.asarray(p)[beyond].sum() - 1e-6


def test_an_atom_that_lands_on_an_atom_keeps_its_mass():
    z, p = jnp.linspace(-10, 10, 51), jnp.asarray(masses(0, 51))
    np.testing.assert_allclose(td.categorical_projection(z, p, z), p, atol=1e-6)


def test_mass_outside_is_no_rounding():
    z, p = jnp.array([-1.001, -1.1, 0.0, 1.2]), jnp.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(td.mass_outside(z, p, jnp.linspace(-1, 1, 5)), 0.6, rtol=1e-6)


@given(st.floats(-9, 9), st.floats(0.3, 3.0), st.sampled_from([2, 10, 51]))
def test_histograms_are_differences_of_scipys_normal_distribution(mean, sigma, num):
    edges = np.linspace(-6, 6, num + 1)
    below = scipy.stats.norm.cdf(edges, np.clip(mean, -6, 6), sigma)
    below[0], below[-1] = 0, 1  # the tails are in the end bins
    found = td.gaussian_masses(jnp.float32(mean), jnp.float32(sigma), jnp.asarray(edges, jnp.float32))
    np.testing.assert_allclose(found, np.diff(below), atol=2e-6)
    np.testing.assert_allclose(jnp.sum(found), 1, atol=1e-6)


def test_the_mean_of_a_histogram_is_its_target_from_four_sigma_inside_on():
    edges = jnp.linspace(-100, 100, 52)
    step = float(edges[1] - edges[0])
    y = jnp.linspace(-100 + 4 * 0.75 * step, 100 - 4 * 0.75 * step, 301)
    found = jax.vmap(td.gaussian_masses, (0, None, None))(y, 0.75 * step, edges) @ (0.5 * (edges[1:] + edges[:-1]))
    assert float(jnp.max(jnp.abs(found - y))) < 1e-3 * step


def quantile_loop(z_tm1, taus, z_t, kappa):
    """Sum over quantiles of the mean over samples, one pair after the other."""
    loss = 0.0
    for z, tau in zip(np.asarray(z_tm1, float), np.asarray(taus, float), strict=True):
        for sample in np.asarray(z_t, float):
            u = sample - z
            huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
            loss += abs(tau - (u < 0)) * (huber if kappa else abs(u)) / len(z_t)
    return loss


@pytest.mark.parametrize("kappa, expected", [(1.0, 1.683594), (0.0, 2.375)])
def test_quantile_losses_known_by_hand(kappa, expected):
    tau = jnp.array([0.125, 0.375, 0.625, 0.875])
    loss = td.quantile_huber(jnp.array([0.0, 1.0, 2.0, 4.0]), tau, jnp.array([-1.0, 0.5, 3.0, 3.5]), kappa)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@given(SIZES, st.sampled_from([0.0, 0.3, 1.0, 2.5]), REWARDS, DISCOUNTS, SEEDS)
def test_the_quantile_loss_is_rlaxs_and_that_of_a_loop(sizes, kappa, reward, discount, seed):
    random = np.random.default_rng(seed)
    z_tm1, z_t = (jnp.asarray(random.normal(size=(num, 1)) * 2, jnp.float32) for num in sizes)
    taus = jnp.asarray(random.random(sizes[0]), jnp.float32)
    found = td.quantile_huber(z_tm1[:, 0], taus, reward + discount * z_t[:, 0], jnp.float32(kappa))
    np.testing.assert_allclose(
        found, quantile_loop(z_tm1[:, 0], taus, reward + discount * z_t[:, 0], kappa), rtol=1e-4, atol=1e-5
    )
    transition = jnp.int32(0), jnp.float32(reward), jnp.float32(discount)
    expected = rlax.quantile_q_learning(z_tm1, taus, *transition, z_t, z_t, huber_param=kappa)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_quantile_regression_on_a_fixed_distribution_ends_at_its_quantiles():
    samples = jnp.asarray(np.random.default_rng(0).exponential(size=2_001), jnp.float32)
    taus = td.quantile_midpoints(5)
    gradient = jax.grad(td.quantile_huber)

    @jax.jit
    def descend(z):
        return jax.lax.fori_loop(0, 300, lambda _, z: z - gradient(z, taus, samples, 0.0), z)

    np.testing.assert_allclose(descend(jnp.zeros(5)), np.quantile(samples, taus), atol=5e-3)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return Batch(
        observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
        action=jnp.asarray(random.integers(A, size=B), jnp.int32),
        return_m=jnp.asarray(random.normal(size=B), jnp.float32),
        bootstrap_discount=jnp.asarray(0.9 * (random.random(B) < 0.8), jnp.float32),
        bootstrap_observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
        weights=jnp.asarray(random.random(B), jnp.float32),
    )


def config_of(agent, **own):
    return Config(agent=agent, hidden_sizes=(8,), own=own)


def agent_and_network(config, **hparams):
    """The agent, its network, a learner whose target is another network, and traced hyperparameters."""
    agent, declared = make_agent(config, SPEC), agents.of(config.agent)
    head = declared.head(A, config.dueling, agents.settings_of(config))
    traced = agents.complete(config, HParams(own=hparams))[1]
    traced = jax.tree.map(jnp.float32, traced)
    learner = agent.init(jax.random.key(0), traced)
    learner = learner._replace(
        target_params=jax.tree.map(lambda x: 1.5 * x, agent.init(jax.random.key(1), traced).params)
    )
    return agent, networks.configured(SPEC, head, config), learner, traced


def outputs(network, learner, batch):
    """Of the batch, and of the bootstraps by the target and by the online network."""
    return (
        network.apply(learner.params, batch.observation),
        network.apply(learner.target_params, batch.bootstrap_observation),
        network.apply(learner.params, batch.bootstrap_observation),
    )


def assert_descends(agent, learner, batch, hparams, expected):
    """The agent's loss and gradient are those of expected(params) -> losses [B]; returns its output."""
    weighted = lambda params: jnp.mean(batch.weights * expected(params))  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(weighted))(learner.params)
    found, output = jax.jit(agent.gradient)(learner, batch, KEY, hparams)
    np.testing.assert_allclose(output.loss, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, gradients)
    return output


@pytest.mark.parametrize("double", [False, True])
def test_c51_is_rlaxs_categorical_q_learning(double, batch):
    config = config_of("c51", num_atoms=K, double=double)
    agent, network, learner, hparams = agent_and_network(config, v_min=-2.0, v_max=3.0)
    z = jnp.linspace(-2, 3, K)

    def expected(params):
        tm1, t, selector = outputs(network, learner._replace(params=params), batch)
        transition = batch.action, batch.return_m, batch.bootstrap_discount
        if not double:
            return jax.vmap(lambda x, a, r, d, y: rlax.categorical_q_learning(z, x, a, r, d, z, y))(tm1, *transition, t)
        values = jax.nn.softmax(selector) @ z
        return jax.vmap(lambda x, a, r, d, y, q: rlax.categorical_double_q_learning(z, x, a, r, d, z, y, q))(
            tm1, *transition, t, values
        )

    output = assert_descends(agent, learner, batch, hparams, expected)
    tm1, t, selector = outputs(network, learner, batch)
    best = jnp.argmax(jax.nn.softmax(selector if double else t) @ z, axis=1)
    p_t, q = np.asarray(jax.nn.softmax(t)), np.asarray(jax.nn.softmax(tm1), float)
    clipped = 0.0
    for i in range(B):
        moved = float(batch.return_m[i]) + float(batch.bootstrap_discount[i]) * np.asarray(z, float)
        target = projection_loop(moved, p_t[i, best[i]], np.linspace(-2, 3, K))
        divergence = scipy.stats.entropy(target, q[i, batch.action[i]])
        np.testing.assert_allclose(output.priorities[i], divergence, rtol=1e-3, atol=1e-5)
        clipped += p_t[i, best[i]][(moved < -2.01) | (moved > 3.01)].sum() / B
    np.testing.assert_allclose(output.metrics["clipped"], clipped, rtol=1e-4)
    assert clipped > 0.01


def test_hl_gauss_is_a_loop_over_scipys_normal_distribution(batch):
    agent, network, learner, hparams = agent_and_network(
        config_of("hl_gauss", num_atoms=K), v_min=-2.0, v_max=2.0, sigma=0.6
    )
    edges = np.linspace(-2, 2, K + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    t = outputs(network, learner, batch)[1]
    y = batch.return_m + batch.bootstrap_discount * jnp.max(jax.nn.softmax(t) @ jnp.asarray(centres), axis=1)
    target = np.stack([scipy.stats.norm.cdf(edges, np.clip(v, -2, 2), 0.6 * 4 / K) for v in np.asarray(y, float)])
    target[:, 0], target[:, -1] = 0, 1
    target = np.diff(target)

    def expected(params):
        log_q = jax.nn.log_softmax(network.apply(params, batch.observation))[jnp.arange(B), batch.action]
        return -jnp.sum(jnp.asarray(target, jnp.float32) * log_q, axis=1)

    output = assert_descends(agent, learner, batch, hparams, expected)
    np.testing.assert_allclose(output.metrics["clipped"], np.mean(np.abs(y) > 2 + 0.04 / K))


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("double", [False, True])
def test_qr_dqn_is_rlaxs_quantile_q_learning(double, kappa, batch):
    agent, network, learner, hparams = agent_and_network(
        config_of("qr_dqn", num_quantiles=K, double=double), kappa=kappa
    )
    taus = jnp.arange(0.5, K) / K

    def expected(params):
        tm1, t, selector = (x.swapaxes(1, 2) for x in outputs(network, learner._replace(params=params), batch))
        transition = batch.action, batch.return_m, batch.bootstrap_discount
        loss = lambda x, a, r, d, s, y: rlax.quantile_q_learning(x, taus, a, r, d, s, y, kappa)  # noqa: E731
        return jax.vmap(loss)(tm1, *transition, selector if double else t, t)

    output = assert_descends(agent, learner, batch, hparams, expected)
    np.testing.assert_allclose(output.priorities, expected(learner.params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_iqn_is_rlaxs_quantile_q_learning_at_three_draws_of_tau(double, batch):
    config = config_of("iqn", num_taus=4, num_target_taus=6, num_acting_taus=5, embedding_size=8, double=double)
    agent, _, learner, hparams = agent_and_network(config, kappa=1.0)
    draw = {
        num: networks.configured(SPEC, networks.sampled_quantiles(A, num, 8, shared=num == 5), config).apply
        for num in (4, 5, 6)
    }
    online_key, target_key, selector_key = jax.random.split(KEY, 3)

    def expected(params):
        tm1, taus = draw[4](params, batch.observation, online_key)
        t, _ = draw[6](learner.target_params, batch.bootstrap_observation, target_key)
        selector, _ = draw[5](params if double else learner.target_params, batch.bootstrap_observation, selector_key)
        transition = batch.action, batch.return_m, batch.bootstrap_discount
        loss = lambda *args: rlax.quantile_q_learning(*args, 1.0)  # noqa: E731
        return jax.vmap(loss)(tm1.swapaxes(1, 2), taus, *transition, selector.swapaxes(1, 2), t.swapaxes(1, 2))

    assert_descends(agent, learner, batch, hparams, expected)


def test_iqn_at_fixed_taus_is_qr_dqn(batch):
    network = networks.network(
        SPEC, networks.sampled_quantiles(A, K, 8), "mlp", (8,), False, "relu", "default", "lax", False
    )
    fixed = Network(network.init, lambda params, observation, key=None: network.apply(params, observation))
    quantiles = Network(network.init, lambda params, observation, key=None: network.apply(params, observation)[0])
    one = iqn.iqn(fixed, fixed, fixed, OPTIMIZERS["adam"])
    other = qr_dqn.qr_dqn(quantiles, OPTIMIZERS["adam"])
    learner = one.init(KEY, one.defaults)
    found, expected = (agent.gradient(learner, batch, KEY, agent.defaults) for agent in (one, other))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_taus_are_drawn_by_the_key_and_are_midpoints_without_one(batch):
    agent, network, learner, _ = agent_and_network(config_of("iqn", num_taus=64, embedding_size=8))
    draws = [network.apply(learner.params, batch.observation, key)[1] for key in jax.random.split(KEY, 2)]
    assert draws[0].shape == (B, 64) and not np.any(draws[0] == draws[1])
    assert scipy.stats.kstest(np.concatenate(draws).ravel(), "uniform").pvalue > 1e-3
    z, taus = network.apply(learner.params, batch.observation)
    assert z.shape == (B, A, 64)
    np.testing.assert_allclose(taus, np.broadcast_to((np.arange(64) + 0.5) / 64, (B, 64)), rtol=1e-6)
    actions = [agent.greedy(learner.params, (), batch.observation, key)[0] for key in jax.random.split(KEY, 2)]
    np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("name", ["munchausen", "c51", "hl_gauss", "qr_dqn", "iqn"])
def test_they_act_by_the_mean(name, batch):
    agent, network, learner, _ = agent_and_network(config_of(name))
    out = network.apply(learner.params, batch.observation)
    mean = {
        "munchausen": lambda x: x,
        "c51": lambda x: jax.nn.softmax(x) @ jnp.linspace(-100, 100, 51),
        "hl_gauss": lambda x: jax.nn.softmax(x) @ ((jnp.arange(51) + 0.5) / 51 * 200 - 100),
        "qr_dqn": lambda x: jnp.mean(x, axis=-1),
        "iqn": lambda x: jnp.mean(acting_network.apply(learner.params, batch.observation)[0], axis=-1),
    }[name]
    acting_network = networks.configured(SPEC, networks.sampled_quantiles(A, 32, 64), config_of(name))
    action, carry, extras = agent.greedy(learner.params, (), batch.observation, KEY)
    np.testing.assert_array_equal(action, jnp.argmax(mean(out), axis=-1))
    assert (action.dtype, carry, extras) == (jnp.int32, (), ())


@pytest.mark.parametrize("num_taus", [None, 6])
def test_dueling_is_for_each_atom_alone(num_taus, batch):
    """V + A - mean A of every atom, before any softmax, from the layers' own parameters."""
    head = networks.sampled_quantiles(A, num_taus, 8, True) if num_taus else networks.action_atoms(A, K, True)
    network = networks.network(SPEC, head, "mlp", (16,), False, "relu", "default", "patches", False)
    params = network.init(KEY)
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    dense = lambda i, x: x @ layers[i]["kernel"] + layers[i]["bias"]  # noqa: E731
    x = jax.nn.relu(dense(0, batch.observation))
    if num_taus:
        found, taus = network.apply(params, batch.observation)
        x = x[:, None] * jax.nn.relu(dense(1, jnp.cos(jnp.pi * taus[..., None] * jnp.arange(8))))
        value, advantage = dense(2, x)[..., 0][:, None], dense(3, x).swapaxes(1, 2)
    else:
        found = network.apply(params, batch.observation)
        value, advantage = dense(1, x)[:, None], dense(2, x).reshape(B, A, K)
    np.testing.assert_allclose(found, value + advantage - jnp.mean(advantage, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("temperature, lowest", [(0.03, -1.0), (1.0, -0.5)])
def test_munchausen_in_both_algebraic_forms(temperature, lowest, batch):
    own = {"munchausen_alpha": 0.8, "munchausen_temperature": temperature, "munchausen_clip": lowest}
    agent, network, learner, hparams = agent_and_network(config_of("munchausen"), **own)
    q, before = (
        np.asarray(network.apply(learner.target_params, x), np.longdouble)
        for x in (batch.bootstrap_observation, batch.observation)
    )
    target = []
    for i in range(B):
        shifted = np.exp((q[i] - q[i].max()) / temperature)
        policy = shifted / shifted.sum()
        seen = before[i] - before[i].max()
        log_before = (seen - temperature * np.log(np.exp(seen / temperature).sum()))[batch.action[i]]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(policy > 0, policy * (q[i] - temperature * np.log(policy)), 0).sum()
        bonus = 0.8 * min(max(log_before, lowest), 0)
        target.append(float(batch.return_m[i]) + bonus + float(batch.bootstrap_discount[i]) * value)
    target = jnp.asarray(np.array(target, np.float32))

    def errors(params):
        return target - network.apply(params, batch.observation)[jnp.arange(B), batch.action]

    output = assert_descends(agent, learner, batch, hparams, lambda params: 0.5 * errors(params) ** 2)
    np.testing.assert_allclose(output.priorities, jnp.abs(errors(learner.params)), rtol=1e-4, atol=1e-5)


def test_munchausen_without_bonus_and_temperature_is_q_learning():
    q_tm1, q_t = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, 5.0, -40.0])
    transition = jnp.int32(2), jnp.float32(0.5), jnp.float32(0.9)
    found = td.munchausen_q_learning(q_tm1, *transition, q_t, q_tm1, 0.0, 1e-6, -1.0)
    np.testing.assert_allclose(found, td.q_learning(q_tm1, *transition, q_t), rtol=1e-6)


@pytest.mark.parametrize(
    "agent, own, hparams, words",
    [
        ("c51", {}, {"v_min": 5.0, "v_max": 5.0}, "hparams.v_min 5.0 is not below hparams.v_max 5.0"),
        ("c51", {}, {"v_min": 16777216.0, "v_max": 16777217.0}, "is not below hparams.v_max 16777217.0, as float32"),
        ("hl_gauss", {}, {"sigma": 0.0}, "hparams.sigma is 0.0; it must be a number above 0"),
        ("hl_gauss", {"num_atoms": 1}, {}, "num_atoms is 1; a distribution needs at least 2"),
        ("qr_dqn", {"num_quantiles": 0}, {}, "num_quantiles is 0; it must be a whole number of at least 1"),
        ("iqn", {"num_taus": 0}, {}, "num_taus is 0; it must be a whole number of at least 1"),
        ("iqn", {}, {"kappa": -1.0}, "hparams.kappa is -1.0; it must be a number at least 0"),
        ("munchausen", {}, {"munchausen_clip": 0.5}, "hparams.munchausen_clip is 0.5; it must be a number at most 0"),
    ],
)
def test_values_that_cannot_be_are_refused(agent, own, hparams, words):
    with pytest.raises(UserError, match=words):
        jaxdqn.train(Config(agent=agent, own=own), HParams(own=hparams), settings=QUIET)


SMALL = {
    "env": "Catch-bsuite",
    "num_envs": 8,
    "batch_size": 16,
    "hidden_sizes": (8,),
    "replay_capacity": 800,
    "learning_starts": 200,
    "total_steps": 1_600,
    "log_interval": 400,
    "eval_episodes": 2,
    "final_episodes": 2,
}
OWN = {
    "munchausen": ({}, {"munchausen_alpha": [0.0, 0.9], "munchausen_temperature": [0.03], "munchausen_clip": [-1.0]}),
    "c51": ({"num_atoms": 11}, {"v_min": [-0.5, -2.0], "v_max": [2.0]}),
    "hl_gauss": ({"num_atoms": 11, "double": True}, {"sigma": [0.5, 1.0], "v_min": [-2.0], "v_max": [2.0]}),
    "qr_dqn": ({"num_quantiles": 7}, {"kappa": [0.0, 1.0]}),
    "iqn": ({"num_taus": 3, "num_target_taus": 4, "num_acting_taus": 5, "embedding_size": 8}, {"kappa": [0.0, 1.0]}),
}


SCHEMES = {
    "devices": (None, {"num_devices": 2, "devices_per_agent": 2}),
    "actor_learner": (Axes("actor_learner", workers=2), {}),
    "parameter_server": (Axes("parameter_server", workers=2), {}),
    "averaging": (Axes("averaging", workers=2), {}),
    "sharding": (Axes("sharding", workers=2), {}),
}


@pytest.mark.parametrize("agent", map(slow, OWN))
def test_a_population_over_its_own_fields_is_one_compilation(agent, tmp_path, capsys, monkeypatch):
    """It is judged and exported, too; only a support that cuts off mass is warned about, and once."""
    calls, inner = [], acting.rollout
    monkeypatch.setattr(acting, "rollout", lambda *args, **named: calls.append(1) or inner(*args, **named))
    own, vary = OWN[agent]
    config = Config(agent=agent, own=own, **SMALL)
    result = jaxdqn.train(config, vary=vary, out=tmp_path / "run", settings=QUIET)
    assert calls and np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()
    varied = next(iter(vary))
    assert [values_of(setting)[varied] for _, setting in result.members] == vary[varied]
    warned = [line for line in capsys.readouterr().err.splitlines() if "of the mass of the targets" in line]
    assert len(warned) == (agent == "c51")
    if warned:
        assert warned[0].startswith("warning: member 0 (seed 0): ")
        assert "hparams.v_min -0.5 to hparams.v_max 2" in warned[0]
    result.evaluate(episodes=2, member=1)
    observations = results.watch(result, 1, seed=0)
    expected = results.expected_returns(result, 1, observations)
    if agent == "munchausen":
        assert expected is None
    else:
        assert expected[0].shape == expected[1].shape and len(expected[0]) == len(observations)
        np.testing.assert_allclose(expected[1].sum(axis=1), 1, rtol=1e-5)
        assert expected[0].min() >= min(vary.get("v_min", [-np.inf])) and figures.return_distributions(*expected).axes
    assert export.export_policy(tmp_path / "run", 1, tmp_path / "policy.jax") > 0
    calls.clear()
    halved = {name: [value / 2 for value in values] for name, values in vary.items()}
    assert not jaxdqn.train(config, vary=halved, settings=QUIET).metrics.empty and not calls


@pytest.mark.parametrize("masses", [7, 2_000])
def test_returns_of_many_masses_are_drawn(masses):
    returns = np.linspace(0, 1, masses)[None].repeat(3, 0)
    assert figures.return_distributions(returns, np.full((3, masses), 1 / masses)).axes


def test_expected_returns_are_of_unscaled_rewards():
    """Of the rewards that are reported, whatever the learner sees."""
    config = Config(agent="c51", **SMALL)
    parts = make_components(config)
    one = HParams(own=parts.agent.own)
    params = jax.tree.map(lambda x: x[None], parts.agent.init(KEY, one).params)
    observations = parts.environment.reset(KEY)[1][None]
    returns = []
    for scale in (1.0, 0.1):
        scaled = Result(lambda: None, params, {}, config, [(0, one._replace(reward_scale=scale))], parts)
        returns.append(results.expected_returns(scaled, 0, observations)[0])
    np.testing.assert_allclose(returns[1], 10 * returns[0], rtol=1e-6)


# Every scheme and every agent twice: all pairs are in docs/compatibility.md.
PAIRS = [(name, scheme) for i, name in enumerate(OWN) for j, scheme in enumerate(SCHEMES) if (i + j) % len(OWN) < 2]


@pytest.mark.slow
@pytest.mark.parametrize("agent, scheme", PAIRS)
def test_every_scheme_carries_them(agent, scheme):
    axes, options = SCHEMES[scheme]
    result = jaxdqn.train(Config(agent=agent, own=OWN[agent][0], **SMALL), axes=axes, settings=QUIET, **options)
    assert result.summary["status"] == "finished"
    assert np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()


@pytest.mark.slow
def test_rainbow_is_c51_with_the_other_parts():
    """Bitwise: double selection, dueling streams, noisy layers, prioritised replay."""
    parts = {"n_step": 3, "own": {"num_atoms": 11, "double": True}}
    rainbow = jaxdqn.train(Config(agent="rainbow", **parts, **SMALL), settings=QUIET)
    by_hand = Config(agent="c51", dueling=True, noisy=True, replay="prioritised", **parts, **SMALL)
    other = jaxdqn.train(by_hand, settings=QUIET)
    jax.tree.map(np.testing.assert_array_equal, rainbow.params, other.params)
    layers = jax.tree.leaves_with_path(rainbow.params)
    assert any("kernel_sigma" in jax.tree_util.keystr(path) for path, _ in layers)
    plain = jaxdqn.train(Config(agent="rainbow", n_step=3, own={"num_atoms": 11}, **SMALL), settings=QUIET)
    jax.tree.map(np.testing.assert_array_equal, rainbow.params, plain.params)  # double is its default
