"""From a loss to an update: shards, clipping, targets, optimizers and the guard, each against plain arithmetic."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import probe_environments
import pytest

from jaxdqn import learning, replay, training
from jaxdqn.base import Batch, LossOutput, Network, Policy, Spec
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams, replay_rows
from jaxdqn.learning import OPTIMIZERS, Shards, sgd_agent, update

KEY = jax.random.key(0)
POLICY = Policy(None, None)  # nobody acts here


def traced(**changes) -> HParams:
    """HParams as float32 scalars."""
    return jax.tree.map(jnp.float32, HParams(**changes))


def sgd(hparams):
    return optax.sgd(hparams.learning_rate)


def linear_agent(optimizer, start=(0.0, 0.0)):
    """Parameters w [2] and loss mean_b x_b . w on batches x [B, 2]: the gradient is the mean of x."""
    network = Network(lambda key: jnp.array(start), lambda params, observation, key=None: observation @ params)

    def loss(params, target_params, batch, key, hparams):
        values = network.apply(params, batch)
        return LossOutput(jnp.mean(values), jnp.abs(values), {})

    return sgd_agent(network, loss, POLICY, optimizer)


# Shards.


@pytest.fixture(scope="module")
def q_learner():
    """(agent, learner, Batch of 32) of a small double DQN whose target differs from its online network."""
    config = Config(agent="double_dqn", hidden_sizes=(16,))
    agent = make_agent(config, Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), 3))
    learner = agent.init(jax.random.key(0), traced())
    learner = learner._replace(target_params=agent.init(jax.random.key(1), traced()).params)
    random = np.random.default_rng(0)
    batch = Batch(
        observation=random.normal(size=(32, 4)),
        action=random.integers(3, size=32),
        return_m=random.normal(size=32),
        bootstrap_discount=0.9 * (random.random(32) < 0.8),
        bootstrap_observation=random.normal(size=(32, 4)),
        weights=random.random(32),
    )
    return agent, learner, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == int else jnp.float32), batch)


def test_shards_make_the_update_of_the_whole_batch(q_learner):
    agent, learner, batch = q_learner
    whole, output, norm = jax.jit(functools.partial(update, agent))(learner, batch, KEY, traced())

    def on_shard(part):
        return update(agent, learner, part, KEY, traced(), Shards("shards", 4))

    parts = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch)
    shards, outputs, norms = jax.jit(jax.vmap(on_shard, axis_name="shards"))(parts)
    for shard in range(4):
        # Another order of summation: moments that cancel to almost 0 over the batch differ by some 4e-9.
        chex.assert_trees_all_close(jax.tree.map(lambda x, s=shard: x[s], shards), whole, rtol=1e-5, atol=5e-8)
    np.testing.assert_allclose(outputs.loss, np.full(4, output.loss), rtol=1e-5)
    np.testing.assert_allclose(norms, np.full(4, norm), rtol=1e-5)
    np.testing.assert_allclose(outputs.priorities.reshape(32), output.priorities, rtol=1e-5)


def test_each_group_of_shards_has_its_own_mean():
    shards = Shards("devices", 2, ((0, 1), (2, 3)))
    mean = jax.pmap(lambda x: learning.mean_over_shards(x, shards), axis_name="devices")
    np.testing.assert_array_equal(mean(jnp.array([1.0, 3.0, 10.0, 30.0])), [2.0, 2.0, 20.0, 20.0])


def test_shards_are_counted_within_their_group():
    shards = Shards("devices", 2, ((0, 1), (2, 3)))
    index = jax.pmap(lambda _: learning.shard_index(shards), axis_name="devices")(jnp.zeros(4))
    np.testing.assert_array_equal(index, [0, 1, 0, 1])


# Clipping, by hand: with SGD at rate 1 from 0, parameters are minus the clipped gradient.


@pytest.mark.parametrize(
    "bound, clipped", [(2.5, [1.5, -2.0]), (5.0, [3.0, -4.0]), (100.0, [3.0, -4.0]), (np.inf, [3.0, -4.0])]
)
def test_the_gradient_is_clipped_by_its_norm(bound, clipped):
    agent, hparams = linear_agent(sgd), traced(learning_rate=1.0, max_grad_norm=bound)
    learner, _, norm = update(agent, agent.init(KEY, hparams), jnp.array([[3.0, -4.0]]), KEY, hparams)
    assert norm == 5.0  # as it was before clipping
    np.testing.assert_allclose(learner.params, np.negative(clipped), rtol=1e-6)


def test_a_zero_gradient_changes_nothing():
    agent, hparams = linear_agent(sgd, (1.0, 2.0)), traced(learning_rate=1.0)
    learner, _, norm = update(agent, agent.init(KEY, hparams), jnp.zeros((1, 2)), KEY, hparams)
    assert norm == 0.0 and learner.first_bad_update == -1
    np.testing.assert_array_equal(learner.params, [1.0, 2.0])


def test_the_gradient_is_clipped_after_the_mean_over_shards():
    """Two shards with large, nearly opposite gradients: clipped each for itself, they would cancel to almost 0."""
    agent, hparams = linear_agent(sgd), traced(learning_rate=1.0, max_grad_norm=2.0)
    learner = agent.init(KEY, hparams)
    batches = jnp.array([[[300.0, 0.0]], [[-300.0, 8.0]]])
    shards, _, norms = jax.vmap(
        lambda batch: update(agent, learner, batch, KEY, hparams, Shards("shards", 2)), axis_name="shards"
    )(batches)
    np.testing.assert_array_equal(norms, [4.0, 4.0])
    np.testing.assert_allclose(shards.params, [[0.0, -2.0]] * 2, rtol=1e-6)


# The target network.


@pytest.mark.parametrize("period, tau", [(1, 1.0), (3, 1.0), (1, 0.1), (4, 0.25)])
def test_the_target_follows_every_period_by_tau(period, tau):
    agent = linear_agent(sgd, (1.0, -1.0))
    hparams = traced(learning_rate=0.5, target_period=period, target_tau=tau)
    batch = jnp.array([[1.0, -2.0]])

    def step(learner, _):
        learner = update(agent, learner, batch, KEY, hparams)[0]
        return learner, learner.target_params

    _, targets = jax.lax.scan(step, agent.init(KEY, hparams), length=12)
    params = target = np.array([1.0, -1.0])
    for count in range(1, 13):
        params = params - 0.5 * np.array([1.0, -2.0])
        if count % period == 0:
            target = tau * params + (1 - tau) * target
        np.testing.assert_allclose(targets[count - 1], target, rtol=1e-6)


def test_the_target_starts_as_the_online_network(q_learner):
    learner = q_learner[0].init(KEY, traced())
    chex.assert_trees_all_equal(learner.target_params, learner.params)


# Optimizers, with settings that all show within five steps.

SETTINGS = {"learning_rate": 0.05, "optimizer_epsilon": 0.01, "weight_decay": 0.1}
PLAIN = {
    "adam": optax.adam(0.05, eps=0.01),
    "adamw": optax.adamw(0.05, eps=0.01, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.05, decay=0.95, eps=0.01, centered=True),
    "radam": optax.radam(0.05, eps=0.01),
}
GRADIENTS = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


def five_updates(name, hparams):
    agent = linear_agent(OPTIMIZERS[name], (1.0, -2.0))

    def step(learner, gradient):
        return update(agent, learner, gradient[None], KEY, hparams)[0], None

    return jax.lax.scan(step, agent.init(KEY, hparams), jnp.asarray(GRADIENTS))[0].params


def test_every_optimizer_is_tested():
    assert set(PLAIN) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", PLAIN)
def test_optimizers_with_traced_settings_are_optax_with_python_numbers(name):
    params = jnp.array([1.0, -2.0])
    state = PLAIN[name].init(params)
    for gradient in GRADIENTS:
        steps, state = PLAIN[name].update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, steps)
    actual = jax.jit(functools.partial(five_updates, name))(traced(**SETTINGS))
    np.testing.assert_allclose(actual, params, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_optimizer_settings_may_differ_between_members(name):
    settings = [traced(**SETTINGS), traced(learning_rate=0.01, optimizer_epsilon=0.1, weight_decay=0.5)]
    run = jax.jit(functools.partial(five_updates, name))
    together = jax.vmap(functools.partial(five_updates, name))(jax.tree.map(lambda *x: jnp.stack(x), *settings))
    np.testing.assert_allclose(together, [run(setting) for setting in settings], rtol=1e-5)


@pytest.mark.parametrize("name, usual", [("adam", 1e-8), ("adamw", 1e-8), ("rmsprop", 0.01), ("radam", 1e-8)])
def test_an_optimizer_has_its_usual_epsilon_unless_another_is_given(name, usual):
    """Of RMSProp, the constant that Mnih et al. (2015) add to the variance."""
    run = jax.jit(functools.partial(five_updates, name))
    default, given, other = (run(traced(learning_rate=0.01, optimizer_epsilon=x)) for x in (0.0, usual, 10 * usual + 1))
    np.testing.assert_array_equal(default, given)
    assert name == "radam" or not np.array_equal(default, other)  # RAdam's first five steps have no denominator


def test_rmsprop_takes_a_variance_below_0_as_0():
    """Which rounding makes of a constant gradient: of 1/3 in 263 steps; the root of what is below -epsilon is NaN."""
    hparams = traced(learning_rate=0.01, optimizer_epsilon=1e-8)
    optimizer, gradient = OPTIMIZERS["rmsprop"](hparams), jnp.array([1 / 3, 1 / 3])
    scaling, *rest = optimizer.init(gradient)
    scaling = scaling._replace(mu=gradient, nu=jnp.square(gradient) - jnp.array([1e-7, 0.0]))
    steps, _ = optimizer.update(gradient, (scaling, *rest))
    np.testing.assert_allclose(steps, [-0.01 / 3 / 1e-4] * 2, rtol=0.01)


# The guard against values that are not finite.


@pytest.mark.parametrize("loss, gradient", [(np.nan, 1.0), (np.inf, 1.0), (0.0, np.nan), (0.0, -np.inf)])
def test_an_update_that_is_not_finite_is_not_applied(loss, gradient):
    agent, hparams = linear_agent(OPTIMIZERS["adam"], (1.0, 2.0)), traced(target_period=1.0)
    before = agent.init(KEY, hparams)
    after, _ = agent.apply(before, jnp.array([gradient, 1.0]), jnp.float32(loss), hparams)
    chex.assert_trees_all_equal(after[:2], before[:2])
    chex.assert_tree_all_finite(after.opt_state)
    assert (after.updates, after.first_bad_update) == (1, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_step_that_leads_to_what_is_not_finite_is_not_taken(bad):
    """Loss and gradient are finite; the optimizer makes NaN, an infinity, or a step that overflows."""

    def faulty(hparams):
        def step(gradients, state, params):
            return jax.tree.map(lambda g: jnp.where(state == 2, bad, -g), gradients), state + 1

        return optax.GradientTransformation(lambda params: jnp.int32(0), step)

    start = (3e38, 2.0)
    agent, hparams = linear_agent(faulty, start), traced(target_period=1.0, target_tau=0.5)
    learner, seen = agent.init(KEY, hparams), []
    for _ in range(5):
        learner, _ = jax.jit(agent.apply)(learner, jnp.array([0.0, 1.0]), jnp.float32(0), hparams)
        seen.append(learner)
    np.testing.assert_array_equal([each.first_bad_update for each in seen], [-1, -1, 3, 3, 3])
    np.testing.assert_array_equal([each.params[1] for each in seen], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal([each.target_params[1] for each in seen], [1.5, 0.75, 0.75, 0.75, 0.75])
    np.testing.assert_array_equal([each.params[0] for each in seen], [np.float32(3e38)] * 5)


def test_parameters_that_are_large_are_finite():
    """Also where the sum of their squares, or of themselves, is not."""
    for value, expected in (
        (3e38, True),
        (-3e38, True),
        (0.0, True),
        (np.inf, False),
        (-np.inf, False),
        (np.nan, False),
    ):
        tree = {"a": jnp.full((3, 2), 3e38), "b": jnp.array([1.0, value])}
        assert jax.jit(learning.all_finite)(tree) == expected


@pytest.fixture(scope="module")
def guarded():
    """The learners [8, 3] after each of eight updates of three members; rewards of the second and third go bad."""
    agent, hparams = linear_agent(OPTIMIZERS["adam"], (1.0, 2.0)), traced(target_period=1.0, target_tau=0.1)
    batches = np.random.default_rng(0).normal(size=(8, 3, 4, 2)).astype(np.float32)
    batches[2, 1, 0] = np.nan  # the third update of member 1
    batches[4:6, 2] = np.inf  # the fifth and sixth of member 2

    def run(batches):  # [8, 4, 2]
        def step(learner, batch):
            learner = update(agent, learner, batch, KEY, hparams)[0]
            return learner, learner

        return jax.lax.scan(step, agent.init(KEY, hparams), batches)[1]

    return jax.jit(jax.vmap(run, in_axes=1, out_axes=1))(batches), jax.jit(run)(batches[:, 0])


def test_the_first_bad_update_is_recorded_and_stays(guarded):
    learners, _ = guarded
    np.testing.assert_array_equal(learners.first_bad_update[:, 0], [-1] * 8)
    np.testing.assert_array_equal(learners.first_bad_update[:, 1], [-1] * 2 + [3] * 6)
    np.testing.assert_array_equal(learners.first_bad_update[:, 2], [-1] * 4 + [5] * 4)


@pytest.mark.parametrize("member, good", [(1, 2), (2, 4)])
def test_a_member_keeps_its_last_finite_parameters(guarded, member, good):
    """Also when later batches are finite again."""
    learners, _ = guarded
    chex.assert_tree_all_finite(learners[:3])
    for leaf in jax.tree.leaves(learners[:2]):
        np.testing.assert_array_equal(
            leaf[good:, member], np.broadcast_to(leaf[good - 1, member], leaf[good:, 0].shape)
        )


def test_updates_are_counted_on(guarded):
    np.testing.assert_array_equal(guarded[0].updates[-1], [8, 8, 8])


def test_other_members_train_on(guarded):
    learners, alone = guarded
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, 0], learners), alone, rtol=1e-5)
    assert np.all(np.any(np.diff(learners.params[:, 0], axis=0) != 0, axis=1))


# Compilation.


def test_one_compilation_serves_all_hyperparameters_chunks_and_states():
    config = Config(hidden_sizes=(8,), num_envs=2, batch_size=4, replay_capacity=16, learning_starts=4)
    environment = probe_environments.observed_action()
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    ring = replay.uniform(example, replay_rows(config), config.num_envs, config.batch_size)
    trainer = training.make_trainer(environment, agent, ring, config)
    traces = []

    def step(*arguments):
        traces.append(arguments)
        return trainer.step(*arguments)

    init, run = jax.jit(trainer.init), jax.jit(training.loop(step), donate_argnums=(0, 1))
    for changes in ({}, {"learning_rate": 0.1, "gamma": 0.5, "target_period": 7.0, "max_grad_norm": np.inf}):
        hparams = traced(**changes)
        state, metrics = init(KEY, KEY, hparams), trainer.zero_metrics()
        for start, stop in ((2, 5), (5, 12)):
            state, metrics = run(state, metrics, hparams, jnp.int32(start), jnp.int32(stop))
    assert state.learner.updates == 10
    assert len(traces) == 1
    assert (init._cache_size(), run._cache_size()) == (1, 1)


def test_the_learning_rate_is_annealed_over_updates():
    # Under a constant gradient every step of Adam is as long as the learning rate.
    hparams = HParams(learning_rate=0.1, learning_rate_end=0.2, learning_rate_updates=4.0, max_grad_norm=math.inf)
    agent = sgd_agent(Network(lambda key: jnp.zeros(1), None), None, POLICY, OPTIMIZERS["adam"])
    learner, steps = agent.init(jax.random.key(0), hparams), []
    for _ in range(6):
        after, _ = agent.apply(learner, jnp.ones(1), jnp.float32(0), hparams)
        steps.append(float(learner.params[0] - after.params[0]))
        learner = after
    np.testing.assert_allclose(steps, [0.1, 0.08, 0.06, 0.04, 0.02, 0.02], rtol=1e-4)  # float32 sums of 0.1
