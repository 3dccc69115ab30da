"""The four records admit what is to come: a recurrent and a prioritised agent, forty lines each, on the one loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
from quantile_agent import prioritised

import jaxdqn
from jaxdqn import agents, learning, networks, replay, td, training
from jaxdqn.base import Environment, LossOutput, Network, Policy, RecurrentNetwork, Spec, TimeStep
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams, replay_rows
from jaxdqn.errors import UserError
from jaxdqn.exploration import epsilon_greedy
from jaxdqn.timeline import timeline
from jaxdqn.validation import validate

KEY = jax.random.key(0)
H = jax.tree.map(jnp.float32, HParams(learning_rate=5e-3, gamma=0.9, target_period=20.0, epsilon_steps=500.0))
CONFIG = Config(num_envs=8, batch_size=32, replay_capacity=2_000, learning_starts=200, hidden_sizes=(16,))


def train(environment, agent, store, iterations):
    trainer = training.make_trainer(environment, agent, store, CONFIG)
    state = jax.jit(trainer.init)(jax.random.key(0), jax.random.key(1), H)
    prefill, step = (jax.jit(training.loop(f), donate_argnums=0) for f in (trainer.prefill, trainer.step))
    state, _ = prefill(state, trainer.zero_metrics(), H, 0, 30)
    return step(state, trainer.zero_metrics(), H, 30, 30 + iterations)[0]


# -- prioritised ------------------------------------------------------------------------------------------------------


def test_a_prioritised_replay_fits_the_records():
    environment = probe_environments.observed_action()
    agent = make_agent(CONFIG, environment.spec)
    example = training.transition_example(environment.spec, agent)
    state = train(environment, agent, prioritised(example, replay_rows(CONFIG), 8, 32, lambda hparams: 1.0), 600)
    # The priorities that were written are the losses' errors, and the agent learned: errors are near zero.
    assert float(jnp.max(state.replay.highest)) >= 1.0
    assert float(jnp.median(state.replay.priorities[:75])) < 0.2
    assert int(state.learner.updates) == 600


# -- recurrent --------------------------------------------------------------------------------------------------------


def remember() -> Environment:
    """A sign is shown once; two steps later the action must repeat it for reward 1. Without memory: 0.5 on average."""

    def reset(key):
        sign = jax.random.bernoulli(key).astype(jnp.int32)
        return (sign, jnp.int32(0)), jnp.array([2.0 * sign - 1.0])

    def step(key, state, action):
        sign, time = state
        end = time == 2
        reward = jnp.where(end & (action == sign), 1.0, 0.0)
        (new_sign, _), first = reset(key)
        blank = jnp.zeros(1)
        next_state = (jnp.where(end, new_sign, sign), jnp.where(end, 0, time + 1))
        return next_state, TimeStep(jnp.where(end, first, blank), reward, 1.0 - end.astype(jnp.float32), blank, end)

    return Environment(reset, step, Spec("Remember", jax.ShapeDtypeStruct((1,), jnp.float32), 2, 3))


def recurrent_dqn() -> "agents.Agent":
    """DQN over a simple recurrent cell; trained on sequences, from the stored recurrent state."""
    width = 16

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = {"in": (1, width), "rec": (width, width), "out": (width, 2)}
        return {name: jax.random.normal(k, s) / s[0] ** 0.5 for (name, s), k in zip(shapes.items(), keys, strict=True)}

    def cell(params, carry, observation, key=None):
        carry = jnp.tanh(observation @ params["in"] + carry @ params["rec"])
        return carry, carry @ params["out"]

    network = RecurrentNetwork(init, lambda num: jnp.zeros((num, width)), cell)

    def act(params, carry, observation, key, epsilon):
        new, q = cell(params, carry, observation)
        return epsilon_greedy(key, q, epsilon), new, carry

    def greedy(params, carry, observation, key):
        new, q = cell(params, carry, observation)
        return jnp.argmax(q, axis=-1), new, carry

    def loss(params, target_params, batch, key, hparams):
        rows = batch.transitions
        q, q_target = (
            networks.unroll(network, p, batch.carry, rows.observation, rows.episode_end, key)[1]
            for p in (params, target_params)
        )
        q, q_target = q[:-1], q_target[1:]
        discount = (hparams.gamma * rows.discount * (1.0 - rows.episode_end))[:-1]
        errors = jax.vmap(jax.vmap(td.q_learning))(q, rows.action[:-1], rows.reward[:-1], discount, q_target)
        return LossOutput(jnp.mean(jnp.square(errors)), jnp.max(jnp.abs(errors), axis=0), {})

    return learning.sgd_agent(
        Network(init, None), loss, Policy(act, greedy), learning.OPTIMIZERS["adam"], network.initial_carry
    )


def test_a_recurrent_agent_fits_the_records():
    environment, agent = remember(), recurrent_dqn()
    example = training.transition_example(environment.spec, agent)
    assert example.extras.shape == (16,)
    state = train(environment, agent, replay.sequences(example, replay_rows(CONFIG), 8, 32, length=6), 1_500)
    from jaxdqn.evaluation import evaluate

    returns = evaluate(environment, agent, state.learner.params, jax.random.key(2), 64, 10).returns
    # Exactly 1 with memory; chance is 0.5.
    np.testing.assert_array_equal(np.asarray(returns), 1.0)


def test_an_unrolled_state_begins_anew_after_an_episodes_end():
    """Against a loop that starts each episode from zero."""
    step = lambda params, carry, x, key=None: (carry + x, 2.0 * (carry + x))  # noqa: E731
    network = RecurrentNetwork(None, jnp.zeros, step)
    x, end = np.arange(1.0, 11.0).reshape(5, 2), np.zeros((5, 2), bool)
    end[1, 0] = end[3, 1] = True
    last, outputs = networks.unroll(network, (), jnp.array([10.0, 20.0]), jnp.array(x), jnp.array(end), KEY)
    expected, carry = [], np.array([10.0, 20.0])
    for row, over in zip(x, end, strict=True):
        carry = carry + row
        expected.append(2.0 * carry)
        carry = np.where(over, 0.0, carry)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(last, carry)


# -- what else flows --------------------------------------------------------------------------------------------------


def two_arrays() -> Environment:
    """`observed_action`, whose sign is one of two arrays; the other, bits that are packed, is noise."""
    inner = probe_environments.observed_action()

    def both(observation, key):
        return {"noise": jax.random.bernoulli(key, shape=(9,)), "sign": observation}

    def reset(key):
        state, observation = inner.reset(key)
        return state, both(observation, key)

    def step(key, state, action):
        state, found = inner.step(key, state, action)
        seen, final = both(found.observation, key), both(found.final_observation, key)
        return state, found._replace(observation=seen, final_observation=final)

    kinds = {"noise": jax.ShapeDtypeStruct((9,), jnp.bool_), "sign": inner.spec.observation}
    return Environment(reset, step, inner.spec._replace(name="TwoArrays", observation=kinds))


@pytest.mark.parametrize("replay_name", ["uniform", "latest"])
def test_observations_may_be_trees_of_arrays(replay_name):
    jaxdqn.register("TwoArrays", two_arrays)
    config = dataclasses.replace(CONFIG, env="TwoArrays", replay=replay_name, total_steps=16_000, eval_max_steps=10)
    settings = jaxdqn.Settings(progress=False)
    result = jaxdqn.train(config, HParams(learning_rate=3e-3, epsilon_end=0.3, epsilon_steps=4_000), settings=settings)
    assert result.summary["final_return_mean"] == 1.0


def test_what_an_agent_prepares_comes_back_in_its_batches():
    """Targets of a block are computed once, by the parameters of before the updates, and sampled with the rows."""
    environment = probe_environments.observed_action()
    agent = make_agent(CONFIG, environment.spec)
    seen = []

    def prepare(params, block, key, hparams):
        return block._replace(extras=block.reward * hparams.gamma)

    def gradient(learner, batch, key, hparams):
        jax.debug.callback(lambda a, b: seen.append((a, b)), batch.carry, batch.transitions.reward[0])
        zeros = jax.tree.map(jnp.zeros_like, learner.params)
        return zeros, LossOutput(jnp.float32(0), jnp.zeros(batch.weights.shape), {})

    agent = agent._replace(prepare=prepare, gradient=gradient)
    example = training.transition_example(environment.spec, agent)
    assert example.extras.shape == () and example.extras.dtype == jnp.float32
    train(environment, agent, replay.sequences(example, replay_rows(CONFIG), 8, 32, length=3), 3)
    jax.effects_barrier()
    assert len(seen) == 3
    for extras, reward in seen:
        np.testing.assert_allclose(extras, 0.9 * reward, rtol=1e-6)


@pytest.mark.parametrize("rows, prefill", [(1, 25), (26, 26), (100, 100)])
def test_rows_that_a_replay_needs_drive_the_prefill(rows, prefill, monkeypatch):
    monkeypatch.setitem(replay.REPLAYS, "uniform", replay.REPLAYS["uniform"]._replace(rows_needed=lambda config: rows))
    assert timeline(CONFIG).prefill == prefill  # 200 steps of 8 environments are 25 rows


def test_a_replay_that_can_never_be_sampled_is_refused(monkeypatch):
    monkeypatch.setitem(replay.REPLAYS, "uniform", replay.REPLAYS["uniform"]._replace(rows_needed=lambda config: 251))
    with pytest.raises(UserError, match="needs 251 rows before it can be sampled, and holds 250"):
        validate(CONFIG)
