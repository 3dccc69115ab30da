"""Masks of legal actions: an agent under a mask is the same agent of an environment that has only the legal actions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from cases import slow
from hypothesis import given
from hypothesis import strategies as st

import jaxdqn
from jaxdqn import agents, exploration, masks, networks, td, training
from jaxdqn.agents import distributional
from jaxdqn.base import Batch, Environment, LearnerState, Network, Spec, TimeStep
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.environments import contract, sticky
from jaxdqn.errors import UserError
from jaxdqn.masks import Masked
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs import export, rendering, results

QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)

A, LEGAL, ALL = 5, (0, 2, 3), tuple(range(5))
SEEN = jax.ShapeDtypeStruct((4,), jnp.float32)
SPEC = Spec("masked", Masked(SEEN, jax.ShapeDtypeStruct((A,), jnp.bool_)), A)


T, N = 16, 8
SMALL = {"num_envs": N, "rollout_length": T, "batch_size": 16, "hidden_sizes": (8,), "replay_capacity": 2 * T * N}


def of(actions, x):
    """The part of parameters, or their gradient, that belongs to some of A actions, and only to these."""
    return x.reshape(*x.shape[:-1], A, -1)[..., jnp.array(actions), :].reshape(*x.shape[:-1], -1)


def sliced(params, like, legal):
    """Parameters of a network with A actions as those of one that has only the legal ones, shaped `like` them. Layers
    that draw have other noise for other shapes: theirs is taken away."""

    def one(path, x, like):
        if "sigma" in str(path[-1]):
            return jnp.zeros(like.shape)
        return x if x.shape == like.shape else of(legal, x)

    return jax.tree.map_with_path(one, params, like)


def learned(config, legal, masked, params=None):
    """(parameters, actions [T, N] of `act` and of `greedy`, gradients, LossOutput) of a batch that the agent's replay
    drew of rows that are the same for all. Unless `masked`, the agent knows only the legal actions, and the parameters
    are what there is for these in `params`."""
    spec = SPEC if masked else Spec("narrow", SEEN, len(legal))
    agent, (config, hparams) = make_agent(config, spec), agents.complete(config, HParams())
    example = training.transition_example(spec, agent)
    replay = agents.replay_of(config).make(example, config)
    shapes = jax.eval_shape(lambda key: agent.init(key, hparams), jax.random.key(0))
    params = sliced(agent.init(jax.random.key(0), hparams).params if params is None else params, shapes.params, legal)

    draw = np.random.default_rng(0)
    seen = jnp.asarray(draw.normal(size=(T + 1, N, 4)), jnp.float32)
    taken = draw.integers(len(legal), size=(T, N))
    reward, terminated, limit = draw.normal(size=(T, N)), *(draw.random((2, T, N)) < 0.1)
    if masked:
        seen = Masked(seen, jnp.broadcast_to(np.isin(ALL, legal), (T + 1, N, A)))
        taken = np.array(legal)[taken]
    now, following = (jax.tree.map(lambda x: x[rows], seen) for rows in (slice(-1), slice(1, None)))
    keys, carry, acted = jax.random.split(jax.random.key(1), T), agent.initial_carry(N), []
    act, greedy = jax.jit(agent.act), jax.jit(agent.greedy)
    for row in range(T):
        given = params, carry, jax.tree.map(lambda x: x[row], now), keys[row]
        action, carry, extras = act(*given, jnp.full(N, 0.5))
        acted.append((action, greedy(*given)[0], extras))
    acted, best, extras = jax.tree.map(lambda *x: jnp.stack(x), *acted)

    @jax.jit
    def drawn(block):
        block = training.as_stored(spec, agent, params, block, keys[0], hparams)
        ring = replay.add(replay.init(), block, jnp.int32(0), hparams)
        return replay.sample(ring, keys[1], training.Progress(jnp.int32(T), jnp.int32(0), jnp.int32(0)), hparams)

    numbers = (jnp.asarray(x, jnp.float32) for x in (reward, ~terminated))
    batch = drawn(training.Transition(now, jnp.asarray(taken), *numbers, following, terminated | limit, extras))
    target_params = jax.tree.map(lambda x: 0.9 * x, params)
    learner = LearnerState(params, target_params, (), jnp.int32(0), jnp.int32(-1))
    return params, acted, best, *jax.jit(agent.gradient)(learner, batch, keys[2], hparams)


SEQUENCES = {"own": {"burn_in": 2, "sequence_length": 4, "period": 4}}
BY_DEFAULT = [
    ("double_dqn", {"dueling": True}),
    ("munchausen", {}),
    ("c51", {}),
    ("a2c", {}),
    ("pqn", {}),
]
OTHERS = [
    ("iqn", {"dueling": True}),
    ("r2d2", SEQUENCES),
    *((name, {}) for name in ("dqn", "hl_gauss", "iqn", "rainbow", "ensemble_dqn", "partitioned_dqn")),
    ("qr_dqn", {"dueling": True}),
    ("drqn", SEQUENCES),
    ("ensemble_c51", {"own": {"ensemble_act": "vote"}}),
]
EVERY = [*BY_DEFAULT, *(slow(*each) for each in OTHERS)]


@pytest.mark.parametrize("name, changes", EVERY)
def test_an_agent_is_that_of_the_legal_actions(name, changes):
    """What it does, its targets, loss, priorities and metrics, and its gradient, which is 0 for illegal actions."""
    asked = Config(agent=name, **SMALL, **changes)
    params, acted, best, gradients, output = learned(asked, LEGAL, True)
    _, acted_of, best_of, gradients_of, output_of = learned(asked, LEGAL, False, params)
    if name != "a2c":  # which draws as many numbers as there are actions
        np.testing.assert_array_equal(acted, np.array(LEGAL)[acted_of])
    np.testing.assert_array_equal(best, np.array(LEGAL)[best_of])
    assert np.isin(acted, LEGAL).all()
    close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5))
    close(output, output_of)
    close(sliced(gradients, gradients_of, LEGAL), sliced(gradients_of, gradients_of, LEGAL))
    for x, like in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_of), strict=True):
        assert x.shape == like.shape or not of([a for a in ALL if a not in LEGAL], x).any()
        assert np.isfinite(x).all()


def test_where_all_is_legal_it_is_the_agent_without_a_mask_bitwise():
    asked = Config(agent="double_dqn", **SMALL)
    params, *found = learned(asked, ALL, True)
    jax.tree.map(np.testing.assert_array_equal, found, list(learned(asked, ALL, False, params)[1:]))


def test_every_agent_is_tested():
    assert set(agents.AGENTS) - {"random"} <= {name for name, _ in [*BY_DEFAULT, *OTHERS]}


# Each row has a mask of its own.

ROWS = 2000
LOTS = np.random.default_rng(1).random((ROWS, A)) < 0.4  # some have none
AMONG = LOTS | ~LOTS.any(axis=1, keepdims=True)
NAMES = ["dqn", "c51", "a2c", "random", *map(slow, ("iqn", "r2d2", "pqn"))]


@pytest.mark.parametrize("name", [*NAMES, slow("ensemble_c51")])
def test_an_agent_never_takes_an_illegal_action(name):
    """Drawn 10 times for 2,000 masks; at epsilon 1 uniformly among the legal."""
    agent = make_agent(Config(agent=name, **{**SMALL, "num_envs": ROWS}), SPEC)
    hparams, act, greedy = agent.defaults, jax.jit(agent.act), jax.jit(agent.greedy)
    params, carry = agent.init(jax.random.key(0), hparams).params, agent.initial_carry(ROWS)
    seen = Masked(jax.random.normal(jax.random.key(2), (ROWS, 4)), jnp.asarray(LOTS))
    for epsilon in (0.0, 0.5, 1.0):
        drawn = np.array([act(params, carry, seen, key, jnp.full(ROWS, epsilon))[0] for key in KEYS])
        assert AMONG[np.arange(ROWS), drawn].all() and drawn.dtype == np.int32
    assert AMONG[np.arange(ROWS), greedy(params, carry, seen, KEYS[0])[0]].all()
    if name != "a2c":  # whose policy draws, whatever epsilon is
        rank = np.cumsum(AMONG, axis=1)[np.arange(ROWS), drawn] - 1
        for number, rows in ((3, AMONG.sum(axis=1) == 3), (A, ~LOTS.any(axis=1))):
            assert scipy.stats.chisquare(np.bincount(rank[:, rows].reshape(-1), minlength=number)).pvalue > 1e-3


KEYS = jax.random.split(jax.random.key(3), 10)


def test_the_last_actions_are_as_likely_as_the_first():
    """epsilon_random beside a loop over the same uniform numbers."""
    coin, choice = np.asarray(jax.random.uniform(KEYS[0], (2, ROWS)))
    action = exploration.epsilon_random(KEYS[0], jnp.zeros(ROWS, jnp.int32), A, jnp.float32(0.7), jnp.asarray(AMONG))
    legal = [np.flatnonzero(row) for row in AMONG]
    expected = [a[int(c * len(a))] if u < np.float32(0.7) else 0 for a, c, u in zip(legal, choice, coin, strict=True)]
    np.testing.assert_array_equal(action, expected)
    everything = jnp.ones((ROWS, A), jnp.bool_)
    bitwise = [exploration.epsilon_random(KEYS[0], action, A, jnp.float32(0.7), legal) for legal in (None, everything)]
    np.testing.assert_array_equal(*bitwise)


def values_of(rng):
    return jnp.asarray(rng.normal(size=A), jnp.float32)


@given(st.lists(st.tuples(*[st.booleans()] * A), min_size=2, max_size=2), st.integers(0, 2**31), st.booleans())
def test_targets_are_those_of_the_legal_actions_alone(legal, seed, terminated):
    rng = np.random.default_rng(seed)
    before, after = (np.flatnonzero(row) if any(row) else np.arange(A) for row in legal)
    legal = [masks.legal_of(Masked(None, jnp.array(row))) for row in legal]
    q_tm1, q_t, selector, policy = (values_of(rng) for _ in range(4))
    action, reward, discount = rng.choice(before), jnp.float32(rng.normal()), jnp.float32(0.9 * (not terminated))
    q, t, s, p = (
        masks.masked(x, m) for x, m in ((q_tm1, legal[0]), (q_t, legal[1]), (selector, legal[1]), (policy, legal[0]))
    )
    taken = float(q_tm1[action])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(td.q_learning(q, action, reward, discount, t), reward + discount * max(q_t[after]) - taken)
    best = after[np.argmax(selector[after])]
    close(td.double_q_learning(q, action, reward, discount, t, s), reward + discount * q_t[best] - taken)
    rescaled = td.rescaled_double_q_learning(q, action, reward, discount, t, s)
    close(rescaled, td.rescaled(reward + discount * td.unscaled(q_t[best])) - taken)
    log_policy = 0.1 * np.asarray(scipy.special.log_softmax(np.asarray(policy, float)[before] / 0.1))
    bonus = 0.9 * np.clip(log_policy[list(before).index(action)], -1.0, 0.0)
    soft = 0.1 * scipy.special.logsumexp(np.asarray(q_t, float)[after] / 0.1)
    found = td.munchausen_q_learning(q, action, reward, discount, t, p, 0.9, 0.1, -1.0)
    close(found, reward + bonus + discount * soft - taken)


def rows_of(head, num=6):
    """What a head puts out for rows with and without masks, of the same parameters."""
    draw = np.random.default_rng(2)
    seen, legal = jnp.asarray(draw.normal(size=(num, 4)), jnp.float32), jnp.asarray(draw.random((num, A)) < 0.6)
    plain, masked = (
        networks.network(spec, head, "mlp", (8,), *OPTIONS) for spec in (SPEC._replace(observation=SEEN), SPEC)
    )
    params = plain.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, masked.init(jax.random.key(0)))
    found = plain.apply(params, seen), masked.apply(params, Masked(seen, legal))
    assert masked.features is not None
    np.testing.assert_array_equal(masked.features(params, Masked(seen, legal)), plain.features(params, seen))
    return *jax.tree.map(np.asarray, found), np.asarray(legal | ~legal.any(1, keepdims=True))


OPTIONS = (False, "relu", "default", "patches", False)


def test_heads_mask_values_and_duel_among_the_legal():
    raw, found, legal = rows_of(networks.action_values(A))
    np.testing.assert_array_equal(found, np.where(legal, raw, masks.ILLEGAL))
    (logits, value), (masked, same), legal = rows_of(networks.policy_and_value(A))
    np.testing.assert_array_equal(masked, np.where(legal, logits, masks.ILLEGAL))
    np.testing.assert_array_equal(value, same)
    raw, found, legal = rows_of(networks.action_atoms(A, 3))
    np.testing.assert_array_equal(found, raw)
    for head in (networks.action_values(A, dueling=True), networks.action_atoms(A, 3, dueling=True)):
        raw, found, legal = rows_of(head)
        for r, f, among in zip(raw, found, legal, strict=True):
            advantage = r - r.mean(axis=0)
            expected = r.mean(axis=0) + advantage[among] - advantage[among].mean(axis=0)
            np.testing.assert_allclose(f[among], expected, atol=1e-6)
    (raw, _), (found, _), legal = rows_of(networks.sampled_quantiles(A, 3, 4))
    np.testing.assert_array_equal(found, np.where(legal[..., None], raw, masks.ILLEGAL))


def test_the_greedy_action_of_distributions_is_that_of_the_bootstraps_mask():
    draw = np.random.default_rng(3)
    z = jnp.asarray(draw.normal(size=(ROWS, A, 3)), jnp.float32)
    network = Network(lambda key: (), lambda params, observation, key: z)
    nothing, wrong = jnp.zeros(ROWS), Masked(None, jnp.ones((ROWS, A), jnp.bool_))
    batch = Batch(wrong, jnp.zeros(ROWS, jnp.int32), nothing, nothing, Masked(None, jnp.asarray(LOTS)), nothing)
    mean = functools.partial(jnp.mean, axis=-1)
    _, best = distributional.taken_and_greedy(network, mean, False, (), (), batch, KEYS[0])
    values = np.asarray(mean(z))
    expected = [max(np.flatnonzero(row), key=lambda a: values[i, a]) for i, row in enumerate(AMONG)]
    np.testing.assert_array_equal(best, np.asarray(z)[np.arange(ROWS), expected])


# Runs.


def environment() -> Environment:
    """Random observations and masks, and episodes that end by chance, with no legal action left, or at a limit. The
    reward is the observation's number at the action, and NaN where that is illegal."""

    def observed(key):
        drawn = jax.random.uniform(key, (4 + A,))
        return Masked(drawn[:4], (drawn[4:] < 0.5).at[2].set(True))

    def reset(key):
        return (observed(key), jnp.int32(0)), observed(key)

    def step(key, state, action):
        (observation, age), (end_key, key, reset_key) = state, jax.random.split(key, 3)
        reward = jnp.where(observation.legal[action], jnp.append(observation.observation, 0.0)[action], jnp.nan)
        terminated, final = jax.random.bernoulli(end_key, 0.2), observed(key)
        final = final._replace(legal=final.legal & ~terminated)
        end = terminated | (age == 6)
        following = jax.tree.map(lambda new, old: jnp.where(end, new, old), observed(reset_key), final)
        after = following, jnp.where(end, 0, age + 1)
        return after, TimeStep(following, reward, 1.0 - terminated.astype(jnp.float32), final, end)

    return Environment(reset, step, SPEC)


@pytest.mark.parametrize(
    "agent, axes",
    [
        ("c51", Axes()),
        slow("c51", Axes("actor_learner", workers=2)),
        *(slow(name, Axes()) for name in ("r2d2", "a2c", "pqn", "random")),
        slow("dqn", Axes("averaging", workers=2)),
        slow("a2c", Axes("parameter_server", workers=2)),
    ],
)
def test_a_run_takes_no_illegal_action(agent, axes, tmp_path):
    """Prefill, acting, evaluation with random actions, and what is done with a run: an illegal action pays NaN."""
    jaxdqn.register("masked-probe", environment)
    on_policy = agents.of(agent).on_policy
    small = {"num_envs": 8, "rollout_length": 4, "batch_size": 16, "hidden_sizes": (8,), "replay_capacity": 1_024}
    config = Config(
        agent=agent,
        env="masked-probe",
        learning_starts=0 if on_policy else 400,
        total_steps=1_600,
        eval_interval=800,
        eval_episodes=4,
        final_episodes=4,
        eval_epsilon=0.3,
        updates_per_iteration=1 if agent == "a2c" else 2,
        **small,
    )
    result = jaxdqn.train(config, axes=axes, settings=QUIET, out=tmp_path / "run")
    assert result.summary["status"] == "finished" and result.metrics.loss.notna().any()
    for column in ("loss", "episode_return", "eval_return"):
        assert np.isfinite(result.metrics[column].dropna()).all() and result.metrics[column].notna().any(), column
    if "q_mean" in result.metrics:
        assert result.metrics.q_mean.abs().max() < 100  # of the legal alone
    if agent in ("c51", "r2d2"):
        observations = results.watch(result, 0, seed=0)
        if agent == "c51":
            assert results.expected_returns(result, 0, observations)[0].max() < 101
        assert export.export_policy(tmp_path / "run", 0, tmp_path / "policy.jax") > 0
        policy = jax.export.deserialize(bytearray((tmp_path / "policy.jax").read_bytes()))
        start = result.components.agent.initial_carry(len(observations.legal))
        action = policy.call(tuple(observations), *([start] if agent == "r2d2" else []))
        action = np.asarray(action[0] if agent == "r2d2" else action)
        assert masks.legal_of(observations)[np.arange(len(action)), action].all()


@pytest.mark.parametrize(
    "legal, words",
    [
        (jax.ShapeDtypeStruct((A,), jnp.int32), r"the mask of legal actions is int32\[5\], expected bool\[5\]"),
        (jax.ShapeDtypeStruct((3,), jnp.bool_), r"the mask of legal actions is bool\[3\], expected bool\[5\]"),
        (None, "of NoneType; they must be one array"),
    ],
)
def test_a_wrong_mask_is_refused(legal, words):
    made = environment()
    with pytest.raises(UserError, match=words):
        contract.check(made._replace(spec=SPEC._replace(observation=Masked(SEEN, legal))), jax.random.key(0))


def test_an_environment_that_forgets_its_mask_is_refused():
    forgets = environment()._replace(reset=lambda key: (environment().reset(key)[0], jnp.zeros(4)))
    with pytest.raises(UserError, match="reset's observation has another structure than the spec's"):
        contract.check(forgets, jax.random.key(0))


def test_sticky_actions_are_refused():
    with pytest.raises(UserError, match="'masked' cannot have sticky actions"):
        sticky.sticky(environment(), 0.1)


def test_pictures_are_of_what_is_seen():
    grid = np.random.default_rng(0).random((3, 4, 4, 2)) < 0.3
    spec = Spec("Mine", jax.ShapeDtypeStruct((4, 4, 2), np.bool_), A)
    masked = Masked(grid, np.ones((3, A), bool))
    with_mask = spec._replace(observation=Masked(spec.observation, SPEC.observation.legal))
    np.testing.assert_array_equal(
        rendering.frames(with_mask, rendering.thin(masked, 2)), rendering.frames(spec, rendering.thin(grid, 2))
    )
