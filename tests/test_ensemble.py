"""Ensembles: equal members are one member, and the three aggregations are what NumPy makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probe_environments
import pytest
from scripts import script

from jaxdqn import agents, learning, replay, training
from jaxdqn.agents.dqn import double_dqn, dqn
from jaxdqn.agents.multi import ensemble as ens
from jaxdqn.agents.multi import ownership
from jaxdqn.base import Batch, Network, Spec
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams, replay_rows
from jaxdqn.errors import UserError
from jaxdqn.learning import OPTIMIZERS
from jaxdqn.networks import q_network
from jaxdqn.timeline import timeline

B, A, M = 32, 3, 5
KEY = jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
H = jax.tree.map(jnp.float32, HParams(learning_rate=1e-2, target_period=3.0))
NETWORK = q_network(SPEC, hidden_sizes=(8,))
ADAM = OPTIMIZERS["adam"]
MEMBERS = {"dqn": dqn, "double_dqn": double_dqn}


def batches(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield Batch(
            observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
            action=jnp.asarray(random.integers(A, size=B), jnp.int32),
            return_m=jnp.asarray(3 * random.normal(size=B), jnp.float32),
            bootstrap_discount=jnp.asarray(0.9 * (random.random(B) < 0.8), jnp.float32),
            bootstrap_observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
            weights=jnp.asarray(random.random(B), jnp.float32),
        )


def trained(agent, learner, count, hparams=H):
    update = jax.jit(functools.partial(learning.update, agent))
    for batch in batches(count):
        learner, output, _ = update(learner, batch, KEY, hparams)
    return learner, output


def repeated(learner, one):
    """An ensemble's learner, all of whose members are that of `one`."""
    copies = [jax.tree.map(lambda x: jnp.stack([x] * M), tree) for tree in (one.params, one.target_params)]
    return learner._replace(params=copies[0], target_params=copies[1])


@pytest.mark.parametrize("name, max_grad_norm", [("dqn", 10.0), ("dqn", 0.01), ("double_dqn", 10.0)])
def test_equal_members_learn_as_one_member(name, max_grad_norm):
    plain = MEMBERS[name]
    hparams = H._replace(max_grad_norm=jnp.float32(max_grad_norm))
    agent, single = ens.ensemble(plain(NETWORK, ADAM), M), plain(NETWORK, ADAM)
    one = single.init(KEY, hparams)
    many, many_output = trained(agent, repeated(agent.init(KEY, hparams), one), 30, hparams)
    one, one_output = trained(single, one, 30, hparams)
    for ours, theirs in [(many.params, one.params), (many.target_params, one.target_params)]:
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, jnp.stack([a[0]] * M)), ours)
        # A batched product may add up in another order, and a power of vectors round differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), ours, theirs)
    np.testing.assert_allclose(many_output.loss, one_output.loss, rtol=1e-4)
    np.testing.assert_allclose(many_output.priorities, one_output.priorities, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_equal_members_are_one_member_bitwise_where_float32_is_exact(name):
    """Binary fractions of few digits: every sum is exact, so its order cannot matter, and only the algorithm can."""
    plain = MEMBERS[name]
    init = lambda key: jax.random.randint(key, (4, A), -8, 8) / 4.0  # noqa: E731
    network = Network(init, lambda w, observation, key=None: observation @ w)
    hparams = H._replace(learning_rate=jnp.float32(0.25), target_period=jnp.float32(2), max_grad_norm=jnp.float32(1e9))
    random = np.random.default_rng(0)
    data = Batch(
        observation=jnp.asarray(random.integers(-1, 2, size=(3, 8, 4)), jnp.float32),
        action=jnp.asarray(random.integers(A, size=(3, 8)), jnp.int32),
        return_m=jnp.asarray(random.integers(-3, 4, size=(3, 8)), jnp.float32),
        bootstrap_discount=jnp.asarray(random.integers(2, size=(3, 8)) / 2, jnp.float32),
        bootstrap_observation=jnp.asarray(random.integers(-1, 2, size=(3, 8, 4)), jnp.float32),
        weights=jnp.ones((3, 8)),
    )

    def sgd(hparams):
        return optax.sgd(hparams.learning_rate)

    agent, single = ens.ensemble(plain(network, sgd), M), plain(network, sgd)
    start = one = single.init(KEY, hparams)
    many = repeated(agent.init(KEY, hparams), one)
    for i in range(3):
        batch = jax.tree.map(lambda x: x[i], data)
        many, _, _ = learning.update(agent, many, batch, KEY, hparams)
        one, _, _ = learning.update(single, one, batch, KEY, hparams)
    assert not np.array_equal(one.params, start.params)
    np.testing.assert_array_equal(many.params, jnp.stack([one.params] * M))
    np.testing.assert_array_equal(many.target_params, jnp.stack([one.target_params] * M))


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("aggregate", [ens.mean, ens.vote, ens.ownership(ownership.directions(SPEC, M))])
def test_equal_members_act_as_one(aggregate, epsilon):
    agent = ens.ensemble(dqn(NETWORK, ADAM), M, aggregate)
    single = dqn(NETWORK, ADAM)
    one = single.init(KEY, H)
    many = repeated(agent.init(KEY, H), one)
    observation = jax.random.normal(KEY, (500, 4))
    ours, theirs = (
        a.act(learner.params, (), observation, KEY, jnp.full(500, epsilon))[0]
        for a, learner in ((agent, many), (single, one))
    )
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, theirs)


def test_an_ensemble_of_one_is_its_member_from_the_same_key():
    agent, single = ens.ensemble(dqn(NETWORK, ADAM), 1), dqn(NETWORK, ADAM)
    many, _ = trained(agent, agent.init(KEY, H), 20)
    one, _ = trained(single, single.init(KEY, H), 20)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), many.params, one.params)


def test_members_start_apart_and_learn_as_if_alone():
    agent, single = ens.ensemble(dqn(NETWORK, ADAM), M), dqn(NETWORK, ADAM)
    start = agent.init(KEY, H)
    kernels = np.asarray(start.params["Dense_0"]["kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == M
    many, _ = trained(agent, start, 20)
    for m in range(M):
        mine, targets = (jax.tree.map(lambda x: x[m], tree) for tree in (start.params, start.target_params))
        alone = single.init(KEY, H)._replace(params=mine, target_params=targets)
        alone, _ = trained(single, alone, 20)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[m], b, rtol=1e-4, atol=1e-5), many.params, alone.params)


@pytest.fixture(scope="module")
def values():
    """q [M, N, A] of members that often disagree, with equal votes among them, and observations [N, 4]."""
    random = np.random.default_rng(0)
    return random.normal(size=(M, 300, A)).astype(np.float32), random.normal(size=(300, 4)).astype(np.float32)


def test_mean(values):
    q, observation = values
    np.testing.assert_allclose(ens.mean(jnp.asarray(q), jnp.asarray(observation)), q.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_vote(values):
    q, observation = values
    action = np.argmax(ens.vote(jnp.asarray(q), jnp.asarray(observation)), axis=1)
    ties = 0
    for n in range(q.shape[1]):
        votes = np.bincount(q[:, n].argmax(axis=1), minlength=A)
        leaders = np.flatnonzero(votes == votes.max())
        ties += len(leaders) > 1
        assert action[n] == leaders[q[:, n].mean(axis=0)[leaders].argmax()]
    assert ties > 20


def test_a_vote_differs_from_a_mean_where_one_member_shouts():
    q = jnp.array([[[0.0, 1.0]], [[0.0, 1.0]], [[9.0, 0.0]]])
    observation = jnp.zeros((1, 4))
    assert jnp.argmax(ens.mean(q, observation)) == 0 and jnp.argmax(ens.vote(q, observation)) == 1


def test_ownership(values):
    q, observation = values
    owner = ownership.directions(SPEC, M)
    owners = np.asarray(jax.vmap(owner)(observation))
    assert len(set(owners)) == M
    merged = ens.ownership(owner)(jnp.asarray(q), jnp.asarray(observation))
    np.testing.assert_array_equal(merged, q[owners, np.arange(q.shape[1])])


def test_a_mask_gives_each_member_its_own_part_of_the_batch():
    agent = ens.ensemble(dqn(NETWORK, ADAM), M, keep_probability=0.5)
    start = agent.init(KEY, H)
    start = repeated(start, dqn(NETWORK, ADAM).init(KEY, H))
    (batch,) = batches(1)
    gradients, _ = agent.gradient(start, batch, KEY, H)
    bias = np.asarray(gradients["Dense_1"]["bias"])
    assert len({row.tobytes() for row in bias}) == M

    # On average the half of the whole batch's gradient.
    many = jax.jit(jax.vmap(lambda key: agent.gradient(start, batch, key, H)[0]["Dense_1"]["bias"]))(
        jax.random.split(KEY, 500)
    )
    whole, _ = dqn(NETWORK, ADAM).gradient(dqn(NETWORK, ADAM).init(KEY, H), batch, KEY, H)
    np.testing.assert_allclose(many.mean(axis=(0, 1)), 0.5 * whole["Dense_1"]["bias"], atol=0.02)


def test_one_bad_member_stops_all():
    agent = ens.ensemble(dqn(NETWORK, ADAM), M)
    start = agent.init(KEY, H)
    gradients = jax.tree.map(lambda x: jnp.zeros_like(x).at[2].set(jnp.nan), start.params)
    after, _ = agent.apply(start, gradients, jnp.float32(0), H)
    assert after.first_bad_update == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, start.params)


GAMMA = 0.9
PROBE = Config(
    agent="ensemble_dqn",
    hidden_sizes=(32,),
    num_envs=4,
    batch_size=32,
    replay_capacity=512,
    learning_starts=64,
    total_steps=4 * 2000,
)


@pytest.mark.parametrize("agent", ["ensemble_dqn", "partitioned_dqn"])
@pytest.mark.parametrize(
    "name, expected",
    [("discount", {0.0: (GAMMA, GAMMA), 1.0: (1, 1)}), ("observed_action", {1.0: (1, -1), -1.0: (-1, 1)})],
)
def test_values_of_probes_are_exact(agent, name, expected):
    environment = getattr(probe_environments, name)()
    own = {"ensemble_dqn": {"ensemble_size": 3}, "partitioned_dqn": {"num_partitions": 3}}
    config = dataclasses.replace(PROBE, agent=agent, own=own[agent])
    hparams = HParams(learning_rate=3e-3, gamma=GAMMA, target_period=10.0, epsilon_begin=1.0, epsilon_end=1.0)
    hparams = jax.tree.map(jnp.float32, hparams)
    line = timeline(config)
    made = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, made)
    ring = replay.uniform(example, replay_rows(config), config.num_envs, config.batch_size)
    trainer = training.make_trainer(environment, made, ring, config)
    state = jax.jit(trainer.init)(jax.random.key(0), jax.random.key(1), hparams)
    prefill, step = (jax.jit(training.loop(f), donate_argnums=(0, 1)) for f in (trainer.prefill, trainer.step))
    state, metrics = prefill(state, trainer.zero_metrics(), hparams, jnp.int32(0), jnp.int32(line.prefill))
    state, _ = step(state, metrics, hparams, jnp.int32(line.prefill), jnp.int32(line.total))

    observations = jnp.array([[x] for x in expected])
    network = q_network(environment.spec, config.network, config.hidden_sizes)
    q = np.asarray(jax.vmap(network.apply, (0, None))(state.learner.params, observations))  # [M, N, A]
    if agent == "partitioned_dqn":
        owners = np.asarray(jax.vmap(ownership.directions(environment.spec, 3))(observations))
        q = q[owners, np.arange(len(expected))][None]
    np.testing.assert_allclose(q, np.broadcast_to(list(expected.values()), q.shape), atol=5e-3)


@pytest.mark.parametrize("aggregate", ["mean", "vote"])
def test_the_configured_ensemble_acts_as_it_says(aggregate):
    config = Config(agent="ensemble_dqn", own={"ensemble_size": 4, "ensemble_act": aggregate}, hidden_sizes=(8,))
    agent = make_agent(config, SPEC)
    params = agent.init(KEY, H).params
    observation = jax.random.normal(KEY, (200, 4))
    q = jax.vmap(NETWORK.apply, (0, None))(params, observation)
    assert q.shape == (4, 200, A)
    action, _, _ = agent.greedy(params, (), observation, KEY)
    np.testing.assert_array_equal(action, jnp.argmax(ens.AGGREGATES[aggregate](q, observation), axis=-1))


@pytest.mark.parametrize("agent", [name for name, declared in agents.AGENTS.items() if declared.stacked])
def test_stacks_are_not_split_over_devices_by_layer(agent):
    from jaxdqn.parallel.compiled import model_sharding

    config = Config(agent=agent, hidden_sizes=(8, 8), num_envs=4, batch_size=8, replay_capacity=64)
    with pytest.raises(UserError, match=rf"agent '{agent}'.*model 1"):
        model_sharding.check(make_components(config), 1, 2)


OF_ANY = ["double_dqn", "munchausen", "c51", "hl_gauss", "qr_dqn", "iqn", "rainbow"]


@pytest.mark.parametrize("name", OF_ANY)
def test_members_of_an_ensemble_of_any_agent_learn_as_if_alone(name):
    config = Config(agent=name, hidden_sizes=(8,), batch_size=B)
    agent, single = (make_agent(dataclasses.replace(config, agent=x), SPEC) for x in (f"ensemble_{name}", name))
    hparams = jax.tree.map(jnp.float32, agent.complete(HParams(learning_rate=1e-2, target_period=1.0, target_tau=0.5)))
    start, (batch,) = agent.init(KEY, hparams), batches(1)
    many, output, _ = jax.jit(functools.partial(learning.update, agent))(start, batch, KEY, hparams)
    alone, losses = jax.jit(functools.partial(learning.update, single)), []
    for m, key in enumerate(jax.random.split(KEY, 5)):
        mine, targets = (jax.tree.map(lambda x: x[m], tree) for tree in (start.params, start.target_params))
        one = single.init(KEY, hparams)._replace(params=mine, target_params=targets)
        one, own, _ = alone(one, batch, key, hparams)
        losses.append(own.loss)
        for ours, theirs in [(many.params, one.params), (many.target_params, one.target_params)]:
            # Batched products add up in another order.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a[m], b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert len({float(loss) for loss in losses}) == 5
    np.testing.assert_allclose(output.loss, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("name", ["c51", "iqn"])
def test_the_return_distribution_of_an_ensemble_is_its_members_mixture(name):
    config = Config(agent=f"ensemble_{name}", own={"ensemble_size": 3}, hidden_sizes=(8,))
    agent, single = make_agent(config, SPEC), make_agent(Config(agent=name, hidden_sizes=(8,)), SPEC)
    hparams = agent.complete(HParams())
    params, observation = agent.init(KEY, hparams).params, jax.random.normal(KEY, (7, 4))
    returns, probabilities = agent.distribution(params, observation, hparams)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    means = [single.values(jax.tree.map(lambda x: x[m], params), observation) for m in range(3)]
    if name == "c51":  # whose values are in steps of the support, from its lower end
        own = hparams.own
        means = [own.v_min + (own.v_max - own.v_min) / 50 * q for q in means]
    np.testing.assert_allclose((returns * probabilities).sum(axis=-1), np.mean(means, axis=0), rtol=1e-4, atol=1e-4)


def test_an_ensemble_has_the_settings_of_its_members():
    assert {"ensemble_size", "ensemble_act", "num_atoms", "v_min"} <= set(agents.names_of("ensemble_c51"))
    with pytest.raises(UserError, match="num_atoms is 1"):
        agents.check(Config(agent="ensemble_c51", own={"num_atoms": 1}))


@pytest.mark.parametrize("name", ["a2c", "pqn", "r2d2", "partitioned_dqn", "ensemble_dqn", "random"])
def test_what_there_are_no_ensembles_of(name):
    with pytest.raises(UserError, match=rf"agent 'ensemble_{name}': ensembles are of agents that act by the values"):
        make_agent(Config(agent=f"ensemble_{name}", hidden_sizes=(8,)), SPEC)


def test_an_unknown_ensemble_is_an_unknown_agent():
    with pytest.raises(UserError, match="unknown agent 'ensemble_of_dqn'"):
        agents.of("ensemble_of_dqn")


def test_an_ensemble_has_the_flags_of_its_members_and_their_preset():
    flags = ["--agent", "ensemble_c51", "--ensemble-size", "3", "--num-atoms", "21", "--hparams.v-max", "50"]
    args, _ = script("train").parse(flags)
    assert (args.config.own.ensemble_size, args.config.own.num_atoms) == (3, 21)
    assert (args.hparams.own.v_min, args.hparams.own.v_max) == (0.0, 50.0) and args.config.n_step == 8
    with pytest.raises(UserError, match=r"--num-atoms belongs to agents .*, not to 'ensemble_dqn'"):
        script("train").parse(["--agent", "ensemble_dqn", "--num-atoms", "21"])
