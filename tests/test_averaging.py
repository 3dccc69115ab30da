"""Replicas that combine their parameters now and then: the rules against loops in NumPy, the schedule, and resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow

import jaxdqn
from jaxdqn.base import LearnerState, LossOutput, Network, Policy
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.learning import sgd_agent, update
from jaxdqn.parallel.compiled import averaging, devices, memory, population, runner
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import timeline

SMALL = Config(
    hidden_sizes=(16,),
    num_envs=8,
    batch_size=16,
    replay_capacity=2_000,
    learning_starts=200,
    total_steps=2_400,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 50},
)
H = HParams(target_period=20, epsilon_steps=1_000)
QUIET = Settings(progress=False, tensorboard=False)
PREFILL = timeline(SMALL).prefill
RULES = {"mean": averaging.mean(), "outer": averaging.outer(), "elastic": averaging.elastic()}


@functools.cache
def compiled(rule, period, num_replicas, dense_updates):
    components = make_components(SMALL, num_replicas)
    used = jax.devices()[:num_replicas]
    return averaging.build(components, used, [3], [H], RULES[rule], period, dense_updates)


def build(rule="mean", period=10, num_replicas=2, dense_updates=0):
    """A runner, compiled once for all tests, and states of its own: the programs take those they are given away."""
    built, states = compiled(rule, period, num_replicas, dense_updates)
    return built, runner.scatter(states, runner.gather(states))


def advance(built, states, start, stop, chunk=None):
    metrics = built.zero_metrics
    for begin in range(start, stop, chunk or stop):
        states, metrics = built.step(states, metrics, begin, min(begin + (chunk or stop), stop))
    return states


def prefilled(built, states):
    return built.prefill(states, built.zero_metrics, 0, PREFILL)[0]


def assert_trees(one, other, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), one, other)


def vector(tree, replica):
    return np.concatenate([np.asarray(leaf[replica], np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


# -- the rules, against loops over replicas ---------------------------------------------------------------------------


def numpy_mean(x, kept):
    average = sum(x) / len(x)
    return [average for _ in x], kept


def numpy_outer(x, kept, rate=0.7, mu=0.9):
    """Sutskever et al. (2013), Nesterov momentum as torch.optim.SGD(nesterov=True) and DiLoCo's authors have it."""
    anchor, velocity = kept
    gradient = anchor - sum(x) / len(x)
    velocity = mu * velocity + gradient
    anchor = anchor - rate * (gradient + mu * velocity)
    return [anchor for _ in x], (anchor, velocity)


def numpy_elastic(x, center, beta=0.9):
    alpha = beta / len(x)
    pulled = [xi - alpha * (xi - center) for xi in x]
    return pulled, center + alpha * sum(xi - center for xi in x)


ORACLES = {
    "mean": (numpy_mean, lambda start: ()),
    "outer": (numpy_outer, lambda start: (start, np.zeros_like(start))),
    "elastic": (numpy_elastic, lambda start: start),
}


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_rules_equal_a_loop_over_replicas(name, num_replicas):
    rule, (oracle, keep) = RULES[name], ORACLES[name]
    random = np.random.default_rng(0)
    start = random.normal(size=5)
    shards = devices.make_shards(num_replicas, num_replicas)
    used = jax.devices()[:num_replicas]

    def init(params):
        zero = jnp.int32(0)
        learner = LearnerState({"w": params}, {"w": 2 * params}, (), zero, jnp.int32(-1))
        return averaging.AveragedState(learner, (), (), (), rule.init(learner.params), jnp.float32(0))

    def noisy(state, noise):
        params = jax.tree.map(lambda x: x + noise, state.learner.params)
        state = state._replace(learner=state.learner._replace(params=params))
        return averaging.combine(state, rule, shards)

    start_all = np.tile(start, (num_replicas, 1)).astype(np.float32)
    state = devices.over_devices(init, used, 1)(start_all)
    combine = devices.over_devices(noisy, used, 2)
    x, kept = [start] * num_replicas, keep(start)
    for _ in range(4):
        noise = random.normal(size=(num_replicas, 5)).astype(np.float32)
        state = combine(state, noise)
        x = [xi + n for xi, n in zip(x, noise, strict=True)]
        middle = sum(x) / num_replicas
        drift = np.sqrt(sum(np.sum((xi - middle) ** 2) for xi in x) / num_replicas)
        x, kept = oracle(x, kept)
        np.testing.assert_allclose(state.learner.params["w"], np.stack(x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.drift, drift, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.learner.target_params["w"], 2 * start_all, rtol=1e-6)
    policy = rule.policy({"w": np.float32(sum(x) / num_replicas)}, jax.tree.map(lambda k: k[0], state.kept))
    expected = {"mean": lambda: x[0], "outer": lambda: kept[0], "elastic": lambda: kept}[name]()
    np.testing.assert_allclose(policy["w"], expected, rtol=1e-5, atol=1e-6)


def test_an_outer_step_of_rate_one_without_momentum_is_the_mean():
    rule = averaging.outer(1.0, 0.0)
    params = {"w": jnp.arange(3.0)}
    moved, _ = rule.combine(params, {"w": jnp.ones(3)}, rule.init(params), 2)
    np.testing.assert_allclose(moved["w"], 1.0, rtol=1e-6)


def test_averaging_every_update_of_sgd_equals_the_mean_of_gradients():
    """For a linear network under plain SGD, over 30 updates on the same batches; and not under Adam."""

    def run(optimizer, as_mean_of_gradients):
        shards = devices.make_shards(2, 2)

        def loss(params, target_params, batch, key, hparams):
            del target_params, key, hparams
            x, y = batch
            value = jnp.mean(jnp.square(x @ params["w"] - y))
            return LossOutput(value, jnp.zeros(len(y)), {})

        net = Network(lambda key: {"w": jnp.zeros(4)}, None)
        agent = sgd_agent(net, loss, Policy(None, None), optimizer)
        hparams = HParams(learning_rate=0.05, max_grad_norm=np.inf)

        def replica(xs, ys):
            learner = agent.init(jax.random.key(0), hparams)
            state = averaging.AveragedState(learner, (), (), (), (), jnp.float32(0))

            def one(state, batch):
                given = shards if as_mean_of_gradients else None
                learner, _, _ = update(agent, state.learner, batch, jax.random.key(0), hparams, given)
                state = state._replace(learner=learner)
                return state if as_mean_of_gradients else averaging.combine(state, RULES["mean"], shards), ()

            state, _ = jax.lax.scan(one, state, (xs, ys))
            return state.learner.params["w"]

        random = np.random.default_rng(1)
        xs = random.normal(size=(2, 30, 8, 4)).astype(np.float32)
        ys = random.normal(size=(2, 30, 8)).astype(np.float32)
        return np.asarray(devices.over_devices(replica, jax.devices()[:2], 2)(xs, ys))

    sgd, adam = (lambda h: optax.sgd(h.learning_rate)), (lambda h: optax.adam(h.learning_rate))
    np.testing.assert_allclose(run(sgd, False), run(sgd, True), rtol=1e-5, atol=1e-6)
    assert np.abs(run(adam, False) - run(adam, True)).max() > 1e-3


# -- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period, dense_updates", [(1, 0), (7, 0), (10, 12), (100, 3)])
def test_rounds_end_at_multiples_of_the_period_after_a_dense_phase(period, dense_updates):
    schedule = averaging.Schedule(period, dense_updates)
    prefill, per_iteration, total = 5, 2, 60
    ends, iteration = [], prefill
    while iteration < total:
        iteration = int(schedule.next(jnp.int32(iteration), jnp.int32((iteration - prefill) * per_iteration)))
        ends.append(iteration)
    expected = [
        i for i in range(prefill + 1, total + 1) if i % period == 0 or (i - 1 - prefill) * per_iteration < dense_updates
    ]
    assert [end for end in ends if end <= total] == expected


def spread_of(states):
    params = runner.gather(states).learner.params
    return np.abs(vector(params, 0) - vector(params, 1)).max()


@pytest.mark.parametrize("rule", ["mean", slow("outer")])
def test_replicas_are_equal_right_after_a_combination_and_only_then(rule):
    built, states = build(rule)
    states = prefilled(built, states)
    stop = (PREFILL // 10 + 2) * 10
    states = advance(built, states, PREFILL, stop - 1)
    assert spread_of(states) > 0
    states = advance(built, states, stop - 1, stop)
    assert spread_of(states) == 0
    figures = {name: float(value) for name, value in built.telemetry(states).items()}
    assert 0 < figures["drift"] < 1


def test_drift_is_that_just_before_the_last_combination():
    built, states = build()
    states = prefilled(built, states)
    assert float(built.telemetry(states)["drift"]) == 0
    stop = (PREFILL // 10 + 2) * 10
    states = advance(built, states, PREFILL, stop - 1)
    before = runner.gather(states)
    # The last step of a round with the combination left out: in another schedule none is due.
    other, _ = build(period=1_000, dense_updates=5)
    apart = runner.gather(advance(other, runner.scatter(states, before), stop - 1, stop)).learner.params
    states = advance(built, states, stop - 1, stop)
    x = [vector(apart, replica) for replica in range(2)]
    expected = np.sqrt(sum(np.sum((xi - (x[0] + x[1]) / 2) ** 2) for xi in x) / 2)
    np.testing.assert_allclose(float(built.telemetry(states)["drift"]), expected, rtol=1e-4)
    np.testing.assert_allclose(vector(runner.gather(states).learner.params, 1), (x[0] + x[1]) / 2, atol=1e-7)


def test_post_local_sgd_averages_every_iteration_at_first():
    built, states = build(period=1_000, dense_updates=5)
    states = prefilled(built, states)
    one = float(built.telemetry(states)["bytes_per_update"])
    states = advance(built, states, PREFILL, PREFILL + 5)
    assert spread_of(states) == 0
    assert float(built.telemetry(states)["bytes_per_update"]) == pytest.approx(one / 1_000)
    assert spread_of(advance(built, states, PREFILL + 5, PREFILL + 6)) > 0


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_bytes_per_update_are_those_of_a_ring_all_reduce(num_replicas):
    built, states = build(num_replicas=num_replicas)
    params = 4 * (4 * 16 + 16 + 16 * 2 + 2)
    expected = 2 * params * 2 * (num_replicas - 1) / num_replicas / 10  # parameters and target
    assert float(built.telemetry(states)["bytes_per_update"]) == pytest.approx(expected)


# -- equal to other ways of running -----------------------------------------------------------------------------------


def test_one_replica_equals_plain_training_bitwise():
    built, states = build(num_replicas=1)
    states = advance(built, prefilled(built, states), PREFILL, PREFILL + 200)
    components = make_components(SMALL)
    plain, alone = runner.build(components, jax.devices()[:1], 1, population.assign(1, 1), [3], [H])
    alone = advance(plain, prefilled(plain, alone), PREFILL, PREFILL + 200)
    assert_trees(runner.gather([states[0].train]), runner.gather(alone))


@pytest.mark.parametrize("rule", RULES)
def test_chunks_and_resume_are_bitwise(rule):
    built, states = build(rule)
    whole = runner.gather(advance(built, prefilled(built, states), PREFILL, PREFILL + 95))
    states = prefilled(built, build(rule)[1])
    saved = runner.gather(advance(built, states, PREFILL, PREFILL + 41, chunk=7))
    states = runner.scatter(build(rule)[1], saved)
    states = advance(built, states, PREFILL + 41, PREFILL + 95, chunk=13)
    assert_trees(runner.gather(states), whole)


def test_the_rule_sets_out_from_parameters_that_are_put_in():
    built, states = build("outer")
    learner = states[0].learner
    values = jax.tree.map(lambda x: np.full(x.shape, 0.25, x.dtype), runner.gather([learner.params]))
    states = [states[0]._replace(learner=learner._replace(params=runner.scatter([learner.params], values)[0]))]
    assert_trees(runner.gather(built.adopted(states)).kept.anchor, values)


def test_exploration_falls_with_the_environment_steps_of_all_replicas():
    built, states = build()
    states = prefilled(built, states)
    metrics = built.step(states, built.zero_metrics, PREFILL, PREFILL + 20)[1]
    steps = (PREFILL + 19) * SMALL.num_envs
    expected = 1 + (H.epsilon_end - 1) * steps / H.epsilon_steps
    np.testing.assert_allclose(runner.gather(metrics).epsilon, expected, rtol=1e-5)


# -- what the run directory and the evaluation see --------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_evaluation_judges_the_combined_parameters(rule):
    built, states = build(rule)
    states = advance(built, prefilled(built, states), PREFILL, PREFILL + 45)
    gathered, policy = runner.gather(states), runner.gather(built.policy(states))
    assert_trees(jax.tree.map(lambda x: x[0], policy), jax.tree.map(lambda x: x[1], policy))
    if rule == "mean":
        expected = jax.tree.map(lambda x: x.mean(axis=0, keepdims=True), gathered.learner.params)
    else:
        kept = gathered.kept
        expected = kept.anchor if rule == "outer" else kept
    assert_trees(jax.tree.map(lambda x: x[:1], policy), jax.tree.map(lambda x: x[:1], expected), atol=1e-7)
    # The same episodes as data parallelism plays with those parameters.
    components = make_components(SMALL, 2)
    shared, others = runner.build(components, jax.devices()[:2], 2, population.assign(1, 1), [3], [H])
    learner = others[0].learner
    others = [others[0]._replace(learner=learner._replace(params=runner.scatter([learner.params], policy)[0]))]
    assert_trees(runner.gather(built.evaluate(states, 60)), runner.gather(shared.evaluate(others, 60)))


@pytest.fixture
def averaged_run(monkeypatch):
    """`jaxdqn.train` with DiLoCo in place of data parallelism; every five iterations at most a logging point."""
    original = runner.build

    def build_averaged(components, used, devices_per_agent, assignment, seeds, settings, *args, **options):
        if options.get("lane"):
            return original(components, used, devices_per_agent, assignment, seeds, settings, *args, **options)
        return averaging.build(components, used, seeds, settings, RULES["outer"], period=40)

    monkeypatch.setattr(runner, "build", build_averaged)


def test_a_run_logs_saves_resumes_and_loads_the_combined_parameters(averaged_run, tmp_path):
    kind = {"num_devices": 2, "devices_per_agent": 2, "settings": QUIET}
    grid = {"log_interval": 200, "eval_interval": 400}
    half = dataclasses.replace(SMALL, total_steps=1_200, **grid)
    whole = dataclasses.replace(SMALL, total_steps=2_400, **grid)
    longer = jaxdqn.train(whole, H, **kind)
    assert longer.metrics.drift.iloc[-1] > 0 and (longer.metrics.bytes_per_update > 0).all()
    first = jaxdqn.train(half, H, out=tmp_path / "run", **kind)
    loaded = jaxdqn.load(tmp_path / "run")
    assert_trees(loaded.params, first.params)
    resumed = jaxdqn.resume(tmp_path / "run", total_steps=2_400, settings=QUIET)
    assert_trees(resumed.params, longer.params)
    assert_trees(jaxdqn.load(tmp_path / "run").params, longer.params)


def test_a_combination_that_is_not_finite_is_not_taken():
    """3e38 and its anchor at -3e38 are farther apart than a float32."""
    rule, far = averaging.outer(), {"w": jnp.array([3e38, 1.0])}
    learner = LearnerState(far, far, (), jnp.int32(7), jnp.int32(-1))
    kept = rule.init({"w": jnp.array([-3e38, 0.0])})
    state = averaging.AveragedState(learner, (), (), (), kept, jnp.float32(0))
    after = averaging.combine(state, rule, None)
    assert after.learner.first_bad_update == 7
    assert_trees((after.learner[:2], after.kept), (learner[:2], kept))
    healthy = averaging.combine(state._replace(kept=rule.init({"w": jnp.array([2.9e38, 0.0])})), rule, None)
    assert healthy.learner.first_bad_update == -1 and np.all(np.isfinite(healthy.learner.params["w"]))


def test_a_combination_of_targets_that_is_not_finite_is_not_taken():
    fine, far = {"w": jnp.ones(2)}, {"w": jnp.array([jnp.inf, 1.0])}
    learner = LearnerState(fine, far, (), jnp.int32(7), jnp.int32(-1))
    state = averaging.AveragedState(learner, (), (), (), (), jnp.float32(0))
    assert averaging.combine(state, averaging.mean(), None).learner.first_bad_update == 7


def test_a_replica_that_is_frozen_freezes_all_at_the_next_combination():
    built, states = build()
    states = prefilled(built, states)
    values = runner.gather(states)
    values.learner.first_bad_update[0] = 9
    values.learner.first_bad_update[1] = 3  # the first, by which they all go
    states = advance(built, runner.scatter(states, values), PREFILL, (PREFILL // 10 + 1) * 10)
    np.testing.assert_array_equal(runner.gather(states).learner.first_bad_update, 3)


# -- what is compiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "outer"])
def test_the_compiled_rounds_hold_the_ring_once_and_communicate_only_between_rounds(rule):
    config = dataclasses.replace(SMALL, hidden_sizes=(8,), replay_capacity=400_000)
    used = jax.devices()[:2]
    built, _ = averaging.build(make_components(config, 2), used, [3], [H], RULES[rule], period=10)
    ring_bytes = memory.tree_bytes(jax.eval_shape(built.components.replay.init))
    analysis = built.program.memory_analysis()
    assert analysis.alias_size_in_bytes >= ring_bytes
    assert analysis.temp_size_in_bytes < 0.05 * ring_bytes
    text = built.program.as_text()
    assert " conditional(" not in text
    rows = "[50000,4"
    assert rows in text
    inside = text[: text.rindex("ENTRY")]
    assert not [line for line in inside.splitlines() if " copy(" in line and rows in line.split(" copy(")[0]]
    # One computation, the round, holds all of the collectives.
    holders = {block.split(" ", 1)[0] for block in text.split("\n\n") if " all-reduce(" in block}
    assert len(holders) == 1


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"period": 0}, "average_every is 0"),
        ({"period": 2.5}, "whole number"),
        ({"dense_updates": -1}, "average_each_until is -1"),
    ],
)
def test_a_wrong_schedule_is_a_user_error(wrong, words):
    with pytest.raises(UserError, match=words):
        build(**wrong)


def test_a_wrong_rule_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'outer'"):
        averaging.make_rule("outr")
    with pytest.raises(UserError, match="beta is 1"):
        averaging.make_rule("elastic", beta=1.5)
    assert averaging.make_rule("outer", learning_rate=0.5).policy
