"""State partitions: one owner is DQN, one-hot owners are tabular Q-learning, and separate nodes are the same thing."""

import functools

import jax
import jax.numpy as jnp
import nodes
import numpy as np
import optax
import pytest
import regions_of_states
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn import learning, td
from jaxdqn.agents.dqn import double_dqn, dqn
from jaxdqn.agents.multi import ownership, stacked
from jaxdqn.agents.multi.partitioned import merge, partitioned, partitioned_agent, partitioned_dqn
from jaxdqn.base import Batch, Network, Spec, Transition
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.environments import registry
from jaxdqn.learning import OPTIMIZERS
from jaxdqn.networks import q_network

B, A, K = 32, 3, 4
KEY = jax.random.key(0)
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
H = jax.tree.map(jnp.float32, HParams(learning_rate=1e-2, target_period=3.0))
NETWORK = q_network(SPEC, hidden_sizes=(8,))
OWNER = ownership.directions(SPEC, K)
ADAM = OPTIMIZERS["adam"]


def sgd(hparams):
    return optax.sgd(hparams.learning_rate)


def batches(count, observe=lambda random, size: random.normal(size=(size, 4)), size=B, num_actions=A):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield Batch(
            observation=jnp.asarray(observe(random, size), jnp.float32),
            action=jnp.asarray(random.integers(num_actions, size=size), jnp.int32),
            return_m=jnp.asarray(3 * random.normal(size=size), jnp.float32),
            bootstrap_discount=jnp.asarray(0.9 * (random.random(size) < 0.8), jnp.float32),
            bootstrap_observation=jnp.asarray(observe(random, size), jnp.float32),
            weights=jnp.asarray(random.random(size), jnp.float32),
        )


def owned_rows(batch, owners):
    """The batch, moved into the region of `owners`: the rows that are not theirs are replaced by ones that are."""
    theirs = np.flatnonzero(np.isin(np.asarray(jax.vmap(OWNER)(batch.observation)), owners))
    rows = np.resize(theirs, B)
    return jax.tree.map(lambda x: x[rows], batch)


def trained(agent, data, hparams=H):
    learner = agent.init(KEY, hparams)
    update = jax.jit(functools.partial(learning.update, agent))
    for batch in data:
        learner, _, _ = update(learner, batch, KEY, hparams)
    return learner


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("max_grad_norm", [10.0, 0.01])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("algorithm", [dqn, double_dqn])
def test_one_owner_is_the_plain_agent_bitwise_with_adam(algorithm, optimizer, max_grad_norm):
    hparams = H._replace(max_grad_norm=jnp.float32(max_grad_norm))
    options = (NETWORK, OPTIMIZERS[optimizer])
    plain = trained(algorithm(*options), batches(50), hparams)
    one = trained(partitioned_agent(algorithm, *options, td.squared, lambda o: jnp.int32(0), 1), batches(50), hparams)
    # The compiler fuses RMSProp's multiplications and additions differently in the two programs: the last bit differs.
    tolerance = {"rtol": 0} if optimizer == "adam" else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in [(one.params, plain.params), (one.target_params, plain.target_params)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, **tolerance), ours, theirs)
    assert one.updates == plain.updates == 50


def test_the_configured_agent_with_one_partition_is_the_configured_dqn_bitwise():
    plain, one = (
        trained(make_agent(Config(agent=name, own=own, hidden_sizes=(16, 16)), SPEC), batches(20))
        for name, own in (("dqn", {}), ("partitioned_dqn", {"num_partitions": 1}))
    )
    assert_equal(jax.tree.map(lambda x: x[0], one.params), plain.params)


def test_a_merge_is_by_ownership_and_not_a_mean():
    random = np.random.default_rng(0)
    q, owners = random.normal(size=(K, B, A)).astype(np.float32), random.integers(K, size=B)
    merged = merge(jnp.asarray(q), jnp.asarray(owners))
    np.testing.assert_array_equal(merged, q[owners, np.arange(B)])
    assert np.abs(merged - q.mean(axis=0)).max() > 0.1
    # A partition of unity: where all owners agree, so does the merge.
    np.testing.assert_array_equal(merge(jnp.asarray(np.stack([q[0]] * K)), jnp.asarray(owners)), q[0])


def test_what_others_think_of_an_owners_states_does_not_matter():
    network = partitioned(NETWORK, OWNER, K)
    params, (batch,) = network.init(KEY), batches(1)
    owners = np.asarray(jax.vmap(OWNER)(batch.observation))
    assert set(owners) == set(range(K))
    for k in range(K):
        alone = NETWORK.apply(jax.tree.map(lambda x: x[k], params), batch.observation)
        np.testing.assert_allclose(network.apply(params, batch.observation)[owners == k], alone[owners == k], rtol=1e-5)


@pytest.mark.parametrize("present", [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("algorithm", [dqn, double_dqn])
def test_gradients_reach_the_owners_of_the_batch_and_nobody_else(algorithm, present):
    agent = partitioned_agent(algorithm, NETWORK, ADAM, td.squared, OWNER, K)
    learner, (batch,) = agent.init(KEY, H), batches(1)
    gradients, output = agent.gradient(learner, owned_rows(batch, present), KEY, H)
    for k in range(K):
        biggest = max(float(jnp.abs(leaf[k]).max()) for leaf in jax.tree.leaves(gradients))
        assert (biggest > 0) == (k in present)  # exactly zero, and not small
        assert (output.metrics[f"load_{k}"] > 0) == (k in present)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_owner_without_data_stands_still_in_spite_of_its_moments(optimizer):
    agent = partitioned_dqn(NETWORK, OPTIMIZERS[optimizer], owner=OWNER, num_owners=K)
    data = list(batches(10))
    before = trained(agent, data)
    after, _, _ = learning.update(agent, before, owned_rows(data[0], [0, 2]), KEY, H)

    def of(k, learner):
        return jax.tree.map(lambda x: x[k], (learner.params, learner.opt_state))

    for k in range(K):
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (of(k, before), of(k, after))), strict=True)]
        assert all(same) if k in (1, 3) else not any(same)
    # The oracle of the fault: without the wrapper Adam would move them.
    careless = dqn(partitioned(NETWORK, OWNER, K), OPTIMIZERS["adam"])
    before = trained(careless, data)
    after, _, _ = learning.update(careless, before, owned_rows(data[0], [0, 2]), KEY, H)
    assert not np.array_equal(*(jax.tree.leaves(x.params)[0][1] for x in (before, after)))


def test_each_owners_gradient_is_clipped_by_its_own_norm():
    agent = partitioned_dqn(NETWORK, sgd, owner=OWNER, num_owners=K)
    hparams = H._replace(learning_rate=jnp.float32(1.0), max_grad_norm=jnp.float32(0.1))
    learner = agent.init(KEY, hparams)
    gradients = jax.tree.map(
        lambda x: jnp.ones_like(x) * jnp.array([1e-6, 1.0, 1e3, 0.0])[(...,) + (None,) * (x.ndim - 1)], learner.params
    )
    after, norm = agent.apply(learner, gradients, jnp.float32(0), hparams)
    steps = jax.tree.map(jnp.subtract, learner.params, after.params)
    norms = jax.vmap(optax.global_norm)(gradients)
    np.testing.assert_allclose(jax.vmap(optax.global_norm)(steps), jnp.minimum(norms, 0.1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(norm, optax.global_norm(gradients), rtol=1e-5)


def test_an_overflowing_norm_freezes_the_learner():
    agent = partitioned_dqn(NETWORK, sgd, owner=OWNER, num_owners=K)
    learner = agent.init(KEY, H)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e30), learner.params)
    after, _ = agent.apply(learner, gradients, jnp.float32(0), H)
    assert after.first_bad_update == 1
    assert_equal(after.params, learner.params)


S = 12


def one_hot(random, size):
    return np.eye(S)[random.integers(S, size=size)]


def linear(num_states, num_actions):
    """Q(s) = s^T W, without a bias: a table where s is one-hot."""

    def init(key):
        return jax.random.normal(key, (num_states, num_actions))

    return Network(init, lambda params, observation, key=None: observation @ params)


@pytest.mark.parametrize("size, num_owners, period", [(1, 3, 1), (1, 4, 5), (16, 3, 1), (16, 12, 4)])
def test_linear_owners_of_one_hot_states_are_tabular_q_learning(size, num_owners, period):
    owner = regions_of_states.state_ranges(S, num_owners)
    agent = partitioned_dqn(linear(S, A), sgd, owner=owner, num_owners=num_owners)
    rate = 0.5
    hparams = H._replace(
        learning_rate=jnp.float32(rate), target_period=jnp.float32(period), max_grad_norm=jnp.float32(jnp.inf)
    )
    data = list(batches(200, one_hot, size))
    learner = trained(agent, data, hparams)

    start = np.asarray(agent.init(KEY, hparams).params)  # [K, S, A]
    owners = np.arange(S) * num_owners // S
    table = start[owners, np.arange(S)].copy()  # each state's row, from its owner
    target = table.copy()
    for count, batch in enumerate(data, 1):
        increment = np.zeros_like(table)
        for i in range(size):
            state, action = int(np.argmax(batch.observation[i])), int(batch.action[i])
            bootstrap = target[int(np.argmax(batch.bootstrap_observation[i]))].max()
            error = float(batch.return_m[i]) + float(batch.bootstrap_discount[i]) * bootstrap - table[state, action]
            increment[state, action] += rate * float(batch.weights[i]) * error / size
        table += increment
        if count % period == 0:
            target = table.copy()
    np.testing.assert_allclose(np.asarray(learner.params)[owners, np.arange(S)], table, rtol=1e-5, atol=1e-5)
    foreign = np.ones((num_owners, S), bool)
    foreign[owners, np.arange(S)] = False
    np.testing.assert_array_equal(np.asarray(learner.params)[foreign], start[foreign])


def make_nodes(optimizer, hparams):
    params = stacked.initialiser(NETWORK, K)(KEY)
    made = []
    for k in range(K):
        agent = nodes.node_agent(k, NETWORK, OWNER, K, optimizer)
        agent = agent._replace(gradient=jax.jit(agent.gradient), apply=jax.jit(agent.apply))
        made.append(nodes.Node(k, agent, jax.tree.map(lambda x: x[k], params), hparams))
    return made


@pytest.mark.parametrize("max_grad_norm", [10.0, 0.05])
def test_separate_nodes_equal_the_partitioned_agent(max_grad_norm):
    hparams = H._replace(max_grad_norm=jnp.float32(max_grad_norm))
    # Every other batch leaves owners out.
    data = [owned_rows(batch, [0, 2]) if i % 2 else batch for i, batch in enumerate(batches(21))]
    learner = trained(partitioned_dqn(NETWORK, ADAM, owner=OWNER, num_owners=K), data, hparams)
    separate = make_nodes(ADAM, hparams)
    sent = nodes.exchange(separate)
    for update, batch in enumerate(data, 1):
        for node in separate:
            node.learn(batch)  # of which a node uses its own rows
        if update % float(hparams.target_period) == 0:  # targets change here only: the only time to talk
            sent += nodes.exchange(separate)
    for k, node in enumerate(separate):
        for ours, theirs in [
            (learner.params, node.learner.params),
            (learner.target_params, node.learner.target_params),
            (learner.opt_state, node.learner.opt_state),
        ]:
            leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
            [np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5) for a, b in leaves]
    assert len(sent) == K * (1 + 7)
    own = jax.eval_shape(NETWORK.init, KEY)
    for message in sent:
        assert jax.eval_shape(lambda x: x, message.content) == own


def test_what_a_node_learns_depends_on_no_row_outside_its_region():
    (batch,) = batches(1)
    outside = np.asarray(jax.vmap(OWNER)(batch.observation)) != 1
    poisoned = batch._replace(
        return_m=jnp.where(outside, 1e6, batch.return_m), action=jnp.where(outside, 0, batch.action)
    )
    learned = []
    for data in (batch, poisoned):
        separate = make_nodes(ADAM, H)
        nodes.exchange(separate)
        separate[1].learn(data)
        learned.append(separate[1].learner.params)
    assert_equal(*learned)


def test_only_parameters_and_gradients_can_leave_a_node():
    params = NETWORK.init(KEY)
    (batch,) = batches(1)
    block = Transition(*(jnp.zeros((2, B)) for _ in range(6)))
    gradients = jax.grad(lambda p: jnp.sum(NETWORK.apply(p, batch.observation)))(params)
    for allowed in (params, gradients):
        assert nodes.node_message(0, allowed, params).content is allowed
    wider = q_network(SPEC, hidden_sizes=(9,)).init(KEY)
    stack = stacked.initialiser(NETWORK, K)(KEY)
    for refused in (batch, block, batch.observation, (params, batch), wider, stack, {}, None):
        with pytest.raises(TypeError, match="parameters or gradients only"):
            nodes.node_message(0, refused, params)


# ---- ownership


def test_state_ranges_are_consecutive_and_even():
    owner = regions_of_states.state_ranges(10, 4)
    owners = jax.vmap(owner)(jnp.eye(10))
    assert owners.dtype == jnp.int32
    assert owners.tolist() == sorted(owners.tolist())
    assert set(np.bincount(owners)) == {2, 3}


def test_a_grid_counts_cells_row_major_and_takes_in_what_lies_outside():
    owner = regions_of_states.grid(low=(0, -1), high=(1, 1), bins=(2, 3), dimensions=(2, 0))
    points = jnp.array([[-1.0, 9, 0.1], [0.0, 9, 0.1], [0.9, 9, 0.1], [-1.0, 9, 0.6], [5.0, 9, 5.0], [-9.0, 9, -9.0]])
    assert jax.vmap(owner)(points).tolist() == [0, 1, 2, 3, 5, 0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 5))
def test_packing_is_within_grahams_bound(visits, num_owners):
    assignment = regions_of_states.pack(visits, num_owners)
    assert assignment.shape == (len(visits),) and set(assignment) <= set(range(num_owners))
    largest = np.bincount(assignment, visits, num_owners).max()
    # Largest-first ends at most one region's load above the mean.
    ordered = sorted(visits, reverse=True)
    last = ordered[num_owners] if len(visits) > num_owners else 0
    assert largest <= max(ordered[0], sum(visits) / num_owners + last)


def test_packing_balances_skewed_visits_and_spreads_the_unvisited():
    visits = 1000 / np.arange(1, 65)  # Zipf
    shares = np.bincount(regions_of_states.pack(visits, 4), visits, 4) / visits.sum()
    np.testing.assert_allclose(shares, 0.25, atol=2e-3)
    in_order = np.bincount(np.arange(64) * 4 // 64, visits, 4) / visits.sum()
    assert in_order.max() > 0.7  # what it saves from
    assert np.bincount(regions_of_states.pack(np.zeros(8), 4)).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["CartPole-v1", "Catch-bsuite"])
def test_owners_by_measured_visits_are_balanced_on_fresh_experience(name):
    environment = registry.make(name)
    seen, fresh = (regions_of_states.random_observations(environment, 32, 64, jax.random.key(seed)) for seed in (0, 1))
    assert seen.shape == (32 * 64, *environment.spec.observation.shape)
    regions_each = 8
    owner = regions_of_states.balanced(seen, K, regions_each, KEY)
    load = ownership.loads(owner, K, fresh)
    np.testing.assert_allclose(jnp.sum(load), 1, rtol=1e-5)
    np.testing.assert_allclose(load, 1 / K, atol=0.05)


def test_kmeans_finds_separate_clusters_at_any_scale():
    random = np.random.default_rng(0)
    centers = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * [1e3, 1e-3]
    points = np.concatenate([center + random.normal(size=(50, 2)) * [20, 2e-5] for center in centers])
    owners = np.asarray(
        jax.vmap(regions_of_states.kmeans(jnp.asarray(points, jnp.float32), 4, jax.random.key(1)))(points)
    )
    groups = [set(owners[i * 50 : (i + 1) * 50]) for i in range(4)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 4


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.uint8, jnp.float32, jnp.int32])
def test_directions_take_any_observation_and_are_always_the_same(dtype):
    spec = Spec("test", jax.ShapeDtypeStruct((6, 6, 2), dtype), A)
    observation = jnp.asarray(np.random.default_rng(0).integers(2, size=(400, 6, 6, 2)), dtype)
    first, again = (jax.vmap(ownership.directions(spec, K))(observation) for _ in range(2))
    assert first.dtype == jnp.int32 and set(first.tolist()) <= set(range(K))
    np.testing.assert_array_equal(first, again)


def test_directions_take_all_parts_of_an_observation():
    parts = {"a": jax.ShapeDtypeStruct((2, 3), jnp.uint8), "b": jax.ShapeDtypeStruct((), jnp.float32)}
    random = np.random.default_rng(0)
    observation = {"a": jnp.asarray(random.integers(9, size=(400, 2, 3)), jnp.uint8), "b": random.normal(size=400)}
    whole = np.concatenate([observation["a"].reshape(400, 6), observation["b"][:, None]], axis=1).astype(np.float32)
    owners = jax.vmap(ownership.directions(Spec("test", parts, A), K))(observation)
    as_one = ownership.directions(Spec("test", jax.ShapeDtypeStruct((7,), jnp.float32), A), K)
    np.testing.assert_array_equal(owners, jax.vmap(as_one)(whole))


def test_directions_spread_one_hot_states_over_the_owners():
    spec = Spec("test", jax.ShapeDtypeStruct((200,), jnp.bool_), A)
    load = ownership.loads(ownership.directions(spec, K), K, jnp.eye(200, dtype=jnp.bool_))
    np.testing.assert_allclose(load, 1 / K, atol=0.1)
