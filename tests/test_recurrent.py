"""Recurrent Q-learning: its loss against loops in float64 and rlax, its states, its sequences, and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxdqn
from jaxdqn import acting, agents, networks, presets, replay, td
from jaxdqn.base import Progress, SequenceBatch, Transition
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import memory, population, runner
from jaxdqn.replay import ring
from jaxdqn.replay.sequence import n_step_errors
from jaxdqn.validation import validate

KEY = jax.random.key(0)
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
SMALL = Config(
    env="MemoryChain-bsuite",
    env_params={"memory_length": 3},
    agent="drqn",
    num_envs=4,
    rollout_length=2,
    n_step=2,
    batch_size=8,
    hidden_sizes=(8,),
    replay_capacity=200,
    learning_starts=100,
    total_steps=1_200,
    eval_episodes=2,
    final_episodes=4,
    own={"burn_in": 2, "sequence_length": 4, "period": 2, "memory_size": 8},
)
H = HParams(target_period=20, epsilon_steps=500)

# -- the error --------------------------------------------------------------------------------------------------------

S, N_STEP, B, A = 4, 3, 5, 3


def test_rescaling_has_its_pinned_values_and_its_inverse():
    np.testing.assert_allclose(td.rescaled(jnp.array([10.0, -100.0])), [2.326625, -9.149876], rtol=1e-6)
    x = jnp.concatenate([-jnp.logspace(4, -3, 50), jnp.zeros(1), jnp.logspace(-3, 4, 50)])
    np.testing.assert_allclose(td.unscaled(td.rescaled(x)), x, rtol=2e-6, atol=1e-6)


def h(x):
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 1e-3 * x


def h_inverse(y):
    return np.sign(y) * (((np.sqrt(1 + 4e-3 * (np.abs(y) + 1 + 1e-3)) - 1) / 2e-3) ** 2 - 1)


def loop_error(q, q_target, rows, start, length, gamma, scaled=True):
    """The TD error of one stream from row `start`, by the definition; 0 where its bootstrap is unknown."""
    (to, back) = (h, h_inverse) if scaled else (lambda x: x, lambda x: x)
    total, power = 0.0, 1.0
    for row in range(start, start + len(q) - length):
        total += power * rows.reward[row]
        power *= gamma * rows.discount[row]
        if rows.episode_end[row] and power:
            return 0.0
        if not power:
            break
    bootstrap = back(q_target[row + 1, q[row + 1].argmax()]) if power else 0.0
    return to(total + power * bootstrap) - q[start, rows.action[start]]


def doubles(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x), tree)


@st.composite
def outcomes(draw):
    """Rows [S + n, B] with ends of all kinds: terminations, time limits, lost lives."""
    shape = (S + N_STEP, B)
    kind = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 5)))
    reward = draw(hnp.arrays(np.float32, shape, elements=st.floats(-10, 10, width=32)))
    discount, end = np.isin(kind, (2, 4), invert=True).astype(np.float32), np.isin(kind, (2, 3))
    return Transition((), draw(hnp.arrays(np.int32, shape, elements=st.integers(0, A - 1))), reward, discount, (), end)


@functools.cache
def compiled_errors(scaled):
    error = td.rescaled_double_q_learning if scaled else td.double_q_learning
    return jax.jit(lambda q, q_target, rows, hparams: n_step_errors(error, q, q_target, rows, S, hparams))


def values(seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(2, S + N_STEP, B, A)).astype(np.float32)


@given(outcomes(), st.floats(0.125, 1.0, width=32), st.booleans())
def test_errors_are_those_of_a_loop(rows, gamma, scaled):
    """Also at a time limit, whose next row is another episode's: there is no error then."""
    q, q_target = values()
    errors = compiled_errors(scaled)(q, q_target, rows, HParams(gamma=np.float32(gamma)))
    exact = doubles((q, q_target, rows))
    expected = [
        [loop_error(*jax.tree.map(lambda x, b=b: x[:, b], exact), s, S, gamma, scaled) for b in range(B)]
        for s in range(S)
    ]
    np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-4)


def test_errors_are_rlaxs():
    q, q_target = values()
    random = np.random.default_rng(1)
    discount = (random.random((S + N_STEP, B)) > 0.2).astype(np.float32)
    action, reward = random.integers(A, size=discount.shape), random.normal(size=discount.shape).astype(np.float32)
    rows = Transition((), action.astype(np.int32), reward, discount, (), discount == 0)
    errors = compiled_errors(True)(q, q_target, rows, HParams(gamma=np.float32(0.9)))
    greedy = q.argmax(-1)
    for b in range(B):
        expected = rlax.transformed_n_step_q_learning(
            jnp.asarray(q[:-1, b]),
            jnp.asarray(rows.action[:-1, b]),
            jnp.asarray(q_target[1:, b]),
            jnp.asarray(greedy[1:, b]),
            jnp.asarray(reward[:-1, b]),
            jnp.asarray(0.9 * discount[:-1, b]),
            N_STEP,
            tx_pair=rlax.SIGNED_HYPERBOLIC_PAIR,
        )
        np.testing.assert_allclose(errors[:, b], expected[:S], rtol=1e-4, atol=2e-4)


# -- the loss ---------------------------------------------------------------------------------------------------------

BURN_IN, TRAINED, LENGTH = 2, 4, 8


@pytest.fixture(scope="module")
def parts():
    """(agent, components, learner with a target of its own, batch [8, B] in which episodes end)."""
    components = make_components(SMALL)
    agent, random = components.agent, np.random.default_rng(0)
    learner = agent.init(KEY, agent.complete(H))
    learner = learner._replace(target_params=agent.init(jax.random.key(1), agent.complete(H)).params)
    end = random.random((LENGTH, B)) < 0.25
    rows = Transition(
        random.normal(size=(LENGTH, B, 3)).astype(np.float32),
        random.integers(2, size=(LENGTH, B)).astype(np.int32),
        random.normal(size=(LENGTH, B)).astype(np.float32),
        1.0 - (end & (random.random(end.shape) < 0.5)).astype(np.float32),
        (),
        end,
    )
    carry = random.normal(size=(B, 8)).astype(np.float32)
    batch = SequenceBatch(rows, carry, np.float32([1, 0.5, 2, 1, 0.25]))
    return components, learner, jax.tree.map(jnp.asarray, batch)


@functools.cache
def recurrent_network():
    """The network of SMALL, as `components` makes it."""
    declared, settings = agents.of("drqn"), agents.settings_of(SMALL)
    spec = make_components(SMALL).environment.spec
    return networks.recurrent(spec, declared.head(2, False, settings), SMALL, declared.memory(settings))


def stepwise(params, batch):
    """Values [L, B, A] by one call a row, in which the state begins anew after an end."""
    step = jax.jit(recurrent_network().step)
    carry, found = batch.carry, []
    for row in range(LENGTH):
        carry, q = step(params, carry, batch.transitions.observation[row])
        carry = jnp.where(batch.transitions.episode_end[row][:, None], 0.0, carry)
        found.append(q)
    return np.stack(found)


def test_the_loss_is_that_of_a_loop(parts):
    """Burn-in for both networks, states that begin anew, masks, weights, priorities."""
    components, learner, batch = parts
    agent, hparams = components.agent, components.agent.complete(H)
    _, output = jax.jit(agent.gradient)(learner, batch, KEY, hparams)
    q, q_target = (stepwise(p, batch)[BURN_IN:] for p in (learner.params, learner.target_params))
    exact = doubles((q, q_target, jax.tree.map(lambda x: x[BURN_IN:], batch.transitions)))
    errors = np.array(
        [
            [loop_error(*jax.tree.map(lambda x, b=b: x[:, b], exact), s, TRAINED, H.gamma) for b in range(B)]
            for s in range(TRAINED)
        ]
    )
    assert (errors == 0).any() and (errors != 0).sum() > 10
    np.testing.assert_allclose(output.loss, np.mean(batch.weights * 0.5 * errors**2), rtol=1e-5)
    priorities = 0.9 * np.abs(errors).max(axis=0) + 0.1 * np.abs(errors).mean(axis=0)
    np.testing.assert_allclose(output.priorities, priorities, rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_through_the_burn_in(parts):
    """It is that of the loss from the burned-in state as a constant."""
    components, learner, batch = parts
    hparams = components.agent.complete(H)
    learner = learner._replace(target_params=learner.params)
    gradients, output = jax.jit(components.agent.gradient)(learner, batch, KEY, hparams)
    step, carry = jax.jit(recurrent_network().step), batch.carry
    for row in range(BURN_IN):
        carry, _ = step(learner.params, carry, batch.transitions.observation[row])
        carry = jnp.where(batch.transitions.episode_end[row][:, None], 0.0, carry)
    rest = batch._replace(transitions=jax.tree.map(lambda x: x[BURN_IN:], batch.transitions), carry=carry)
    own = {**SMALL.own, "burn_in": 0}
    without = make_components(dataclasses.replace(SMALL, own=own)).agent
    expected, plain = jax.jit(without.gradient)(learner, rest, KEY, hparams)
    np.testing.assert_allclose(output.loss, plain.loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients, expected)


def test_nothing_leaks_across_an_episodes_start(parts):
    """What was before the start, state and observations, changes neither the loss nor its gradient."""
    components, learner, batch = parts
    end = batch.transitions.episode_end.at[BURN_IN - 1].set(True)
    batch = batch._replace(transitions=batch.transitions._replace(episode_end=end))
    observation = batch.transitions.observation.at[:BURN_IN].add(1.0)
    other = batch._replace(transitions=batch.transitions._replace(observation=observation), carry=batch.carry + 1.0)
    gradient = jax.jit(components.agent.gradient)
    one, two = (gradient(learner, x, KEY, components.agent.complete(H)) for x in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_stored_state_is_that_from_the_episodes_start(parts):
    components, learner, _ = parts
    agent, environment = components.agent, components.environment
    actor = acting.start(environment, agent, 4, jax.random.key(3))
    roll = jax.jit(functools.partial(acting.rollout, environment, agent, length=13))
    _, block, _ = roll(learner.params, actor, jax.random.key(4), jnp.full(4, 0.5))
    assert block.episode_end.sum() >= 4
    step, carry = jax.jit(recurrent_network().step), jnp.zeros((4, 8))
    for row in range(13):
        np.testing.assert_allclose(block.extras[row], carry, rtol=1e-5, atol=1e-6)
        carry, _ = step(learner.params, carry, block.observation[row])
        carry = jnp.where(block.episode_end[row][:, None], 0.0, carry)


# -- sequences that start every `period` rows ----------------------------------------------------------------------

ROWS, COLUMNS = 12, 2


def history(rows):
    """[rows, COLUMNS]: the observation is (column, time), the state twice the time."""
    time, column = np.meshgrid(np.arange(1.0, rows + 1), np.arange(COLUMNS), indexing="ij")
    zeros, observation = np.zeros((rows, COLUMNS), np.float32), np.stack([column, time], axis=-1).astype(np.float32)
    return Transition(observation, zeros, zeros, zeros, observation, zeros > 0, 2 * observation[..., 1:])


@functools.cache
def sampler(kind, period, *actors, length=3):
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), history(1))
    made = getattr(replay, kind)(example, ROWS, *actors, COLUMNS // (*actors, 1)[0], 256, length, period)
    return made, jax.jit(made.add), jax.jit(made.sample)


def progress(written):
    return Progress(jnp.asarray(written), jnp.int32(0), jnp.int32(0))


def filled(add, state, data, size, actor=None):
    """`state` after all of `data` in blocks of `size` rows."""
    for start in range(0, len(data.reward), size):
        row = jnp.int32(start) if actor is None else (jnp.int32(actor), jnp.int32(start))
        state = add(state, jax.tree.map(lambda x, s=start: x[s : s + size], data), row, H)
    return state


@pytest.mark.parametrize("kind", ["sequences", "prioritised_sequences"])
@pytest.mark.parametrize(
    "size, period, length", [(1, 3, 3), (2, 2, 3), (4, 2, 3), (6, 3, 3), (3, 1, 3), (6, 1, 11), (4, 3, 10), (12, 2, 5)]
)
@pytest.mark.parametrize("most", [6, 13, 28])
def test_whole_sequences_start_every_period_rows_with_their_states(kind, size, period, length, most):
    """All of them are drawn, and no other: none that is incomplete, across the write head or not yet written; also
    where they are nearly as long as the ring, or as one block."""
    if size % period and period % size:
        size = period
    made, add, sample = sampler(kind, period, length=length)
    written = max(-(-most // size), -(-(length + period - 1) // size)) * size
    state = filled(add, made.init(), history(written), size)
    data = getattr(state, "data", state)
    assert data.extras.shape[0] == ROWS // period and data.next_observation == ()
    batch = sample(state, KEY, progress(written), H)
    column, time = np.moveaxis(np.asarray(batch.transitions.observation), -1, 0)
    allowed = {t + 1 for t in range(0, written - length + 1, period) if t >= written - ROWS}
    assert set(zip(column[0], time[0], strict=True)) == {(c, t) for c in range(COLUMNS) for t in allowed}
    np.testing.assert_array_equal(time - time[0], np.arange(length)[:, None] + 0 * time)
    np.testing.assert_array_equal(batch.carry[:, 0], 2 * time[0])
    np.testing.assert_array_equal(batch.weights, 1.0)


@pytest.mark.parametrize("kind", ["sequences", "prioritised_sequences"])
def test_a_ring_without_room_for_a_sequence_at_all_times_is_refused(kind):
    with pytest.raises(UserError, match=r"sequences of 11 rows, every 3 rows, .* need 13 rows .* holds 12; raise"):
        sampler(kind, 3, length=11)


@pytest.mark.parametrize("kind", ["sequence_regions", "prioritised_sequence_regions"])
def test_each_actor_has_a_region_of_sequences(kind):
    made, add, sample = sampler(kind, 2, 2)
    state, written = made.init(), [16, 4]
    for actor, rows in enumerate(written):
        state = filled(add, state, jax.tree.map(lambda x, a=actor: x[:, a : a + 1], history(rows)), 4, actor)
    batch = sample(state, KEY, progress(written), H)
    first = np.asarray(batch.transitions.observation[0])
    assert {tuple(x) for x in first.tolist()} == {*((0.0, float(t)) for t in (5, 7, 9, 11, 13)), (1.0, 1.0)}
    np.testing.assert_array_equal(batch.carry[:, 0], 2 * first[:, 1])
    before, state = (getattr(x, "data", x).ends for x in (state, made.cut(state, (jnp.int32(1), jnp.int32(4)))))
    np.testing.assert_array_equal(np.flatnonzero(ring.outcome(state)[1] & (state != before)), [3 * COLUMNS + 1])


def test_sequences_are_drawn_by_their_priorities():
    """And weighted for it, relative to the largest of the batch; new ones have the highest priority."""
    made, add, sample = sampler("prioritised_sequences", 2)
    state = filled(add, made.init(), history(8), 2)
    priorities = np.float32([0.1, 1.0, 2.0, 3.0, 0.5, 4.0])  # of three starts in two columns
    state = made.update_priorities(state, jnp.arange(6), jnp.asarray(priorities), H)
    state = filled(lambda s, block, row, h: add(s, block, row + 8, h), state, history(2), 2)
    batch = sample(state, KEY, progress(10), H)
    drawn = np.append(priorities + H.priority_epsilon, [4.0, 4.0]) ** H.priority_exponent
    weights = (drawn / drawn.sum()) ** -H.importance_begin
    indices = np.asarray(batch.indices)
    np.testing.assert_allclose(batch.weights, (weights / weights[indices].max())[indices], rtol=1e-5)
    counts = np.bincount(indices, minlength=8)
    assert scipy.stats.chisquare(counts, 256 * drawn / drawn.sum()).pvalue > 1e-3
    started = np.asarray(batch.transitions.observation[0])
    np.testing.assert_array_equal(started, np.stack([indices % 2, 1 + indices // 2 * 2], axis=-1))


# -- in training (in every mode: test_modes_agree.py) -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["drqn", "r2d2"])
@pytest.mark.parametrize(
    "axes, options",
    [
        (Axes(), {"num_devices": 2, "devices_per_agent": 2}),
        (Axes("parameter_server", workers=2), {}),
        (Axes("actor_learner", workers=2, merge_every=2), {}),
        (Axes("actor_learner", workers=2, merge_every=2, coupling="async"), {}),
        (Axes("averaging", workers=2), {}),
    ],
    ids=["devices", "server", "lockstep", "async", "averaging"],
)
def test_schemes_carry_it(agent, axes, options):
    result = jaxdqn.train(dataclasses.replace(SMALL, agent=agent), H, axes=axes, settings=QUIET, **options)
    assert result.summary["status"] == "finished"
    assert np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()


def test_the_compiled_step_copies_neither_sequences_nor_their_tree():
    own = {"period": 4, "memory_size": 4}
    config = Config(agent="r2d2", num_envs=8, batch_size=8, hidden_sizes=(8,), updates_per_iteration=2, own=own)
    config = dataclasses.replace(config, replay_capacity=400_000)
    components = make_components(config)
    hparams = components.agent.complete(HParams())
    built, _ = runner.build(components, jax.devices()[:1], 1, population.assign(1, 1), [0], [hparams])
    state = jax.eval_shape(components.replay.init)
    analysis = built.program.memory_analysis()
    assert analysis.alias_size_in_bytes >= memory.tree_bytes(state)
    assert analysis.temp_size_in_bytes < 0.5 * memory.tree_bytes(state.tree)


@pytest.mark.slow
def test_an_exported_policy_takes_its_state_and_gives_the_next(tmp_path):
    from jaxdqn.runs import export

    config = dataclasses.replace(SMALL, own={**SMALL.own, "memory": "lstm"})
    result = jaxdqn.train(config, H, out=tmp_path / "run", settings=QUIET, num_devices=1)
    assert export.export_policy(tmp_path / "run", 0, tmp_path / "policy.jax") == 5  # four steps, and what the last made
    policy = jax.export.deserialize(bytearray((tmp_path / "policy.jax").read_bytes()))
    agent, params = result.components.agent, jax.tree.map(lambda x: x[0], result.params)
    carry = state = agent.initial_carry(3)
    for seed in range(3):
        observation = np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32)
        expected, carry, _ = agent.greedy(params, carry, observation, KEY)
        action, state = policy.call(observation, state)
        np.testing.assert_array_equal(action, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, carry)
    assert len(state) == 2  # of an LSTM


@pytest.mark.parametrize(
    "changes, own, words",
    [
        ({}, {"burn_in": 5}, "burn_in 5 is longer than the 4 rows of sequence_length that are trained on after it"),
        ({}, {"burn_in": -1}, "burn_in is -1; it must be a whole number of at least 0"),
        ({}, {"sequence_length": 0}, "sequence_length is 0; it must be a whole number of at least 1"),
        ({}, {"period": 6}, "period 6 is longer than sequence_length 4"),
        ({}, {"period": 3}, "sequences start every period 3 rows, and blocks of 2 rows are written"),
        ({}, {"memory": "rnn"}, "unknown memory 'rnn'"),
        ({}, {"sequence_length": 60}, "the replay needs 65 rows before it can be sampled, and holds 50"),
        (
            {"agent": "dqn", "replay": "sequences", "own": ()},
            {},
            "'dqn' learns from a Batch, and replay 'sequences' gives",
        ),
        ({"replay": "uniform"}, {}, "'drqn' learns from a SequenceBatch, and replay 'uniform' gives a Batch"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changes, own, words):
    config = dataclasses.replace(SMALL, own={**SMALL.own, **own}) if own else SMALL
    with pytest.raises(UserError, match=words):
        validate(dataclasses.replace(config, **changes))


def test_sharding_refuses_it():
    with pytest.raises(UserError, match="agent 'drqn' is recurrent: its network and sequences are not split"):
        jaxdqn.train(SMALL, H, axes=Axes("sharding", workers=2), settings=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["r2d2", "zeroed", "dqn"])
def test_r2d2_learns_what_its_sequences_do_not_hold(kind, monkeypatch):
    """A bit is shown 20 steps before it is asked for, sequences are 17 rows: only stored states can hold it."""

    def zeroed(around):
        agent = agents.R2D2.make(around)

        def act(*args):
            action, carry, extras = agent.act(*args)
            return action, carry, jax.tree.map(jnp.zeros_like, extras)

        return agent._replace(act=act)

    if kind == "zeroed":
        monkeypatch.setitem(agents.AGENTS, "r2d2", agents.R2D2._replace(make=zeroed))
    _, config, hparams = presets.for_environment("MemoryChain-bsuite", "dqn" if kind == "dqn" else "r2d2")
    config = dataclasses.replace(config, final_episodes=1_000)
    final = jaxdqn.train(config, hparams, seeds=[0], settings=QUIET, num_devices=1).summary["final_return_mean"]
    assert final >= 0.9 if kind == "r2d2" else abs(final) <= 0.15
