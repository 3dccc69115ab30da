"""The four records admit what is to come: a recurrent and a prioritised agent, forty lines each, on the one loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments

from jaxdqn import acting, agents, learning, replay, td, training
from jaxdqn.base import Array, Environment, LossOutput, Network, Policy, Replay, Spec, TimeStep, Transition
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams, replay_rows
from jaxdqn.exploration import epsilon_greedy
from jaxdqn.replay import ring

H = jax.tree.map(jnp.float32, HParams(learning_rate=5e-3, gamma=0.9, target_period=20.0, epsilon_steps=500.0))
CONFIG = Config(num_envs=8, batch_size=32, replay_capacity=2_000, learning_starts=200, hidden_sizes=(16,))


def train(environment, agent, store, iterations):
    trainer = training.make_trainer(environment, agent, store, CONFIG)
    state = jax.jit(trainer.init)(jax.random.key(0), jax.random.key(1), H)
    prefill, step = (jax.jit(training.loop(f), donate_argnums=0) for f in (trainer.prefill, trainer.step))
    state, _ = prefill(state, trainer.zero_metrics(), H, 0, 30)
    return step(state, trainer.zero_metrics(), H, 30, 30 + iterations)[0]


# -- prioritised ------------------------------------------------------------------------------------------------------


class Prioritised(NamedTuple):
    data: Transition
    priorities: Array  # [rows, N]; 0 where nothing was written
    highest: Array


def prioritised(example: Transition, rows: int, num_envs: int, batch_size: int) -> Replay:
    """Proportional prioritised replay, by a full cumulative sum: slow and obvious."""
    layout = ring.layout(example, rows, num_envs)

    def add(state, block, written):
        new = jnp.full(block.reward.shape, state.highest)
        start = (written % rows, 0)
        priorities = jax.lax.dynamic_update_slice(state.priorities, new, start)
        return state._replace(data=ring.write(layout, state.data, block, written), priorities=priorities)

    def sample(state, key, written, hparams):
        total = jnp.cumsum(state.priorities.reshape(-1))
        flat = jnp.searchsorted(total, jax.random.uniform(key, (batch_size,)) * total[-1])
        flat = jnp.minimum(flat, total.size - 1)
        row, env = flat // num_envs, flat % num_envs
        batch = ring.n_step_batch(layout, state.data, row, env, 1, hparams)
        weights = 1.0 / (state.priorities[row, env] / total[-1] * jnp.minimum(written, rows) * num_envs)
        return batch._replace(weights=weights / jnp.max(weights))

    def update_priorities(state, indices, priorities):
        changed = state.priorities.at[indices].set(priorities + 1e-3)
        return state._replace(priorities=changed, highest=jnp.maximum(state.highest, jnp.max(changed)))

    zeros = lambda: Prioritised(ring.empty(layout), jnp.zeros((rows, num_envs)), jnp.float32(1))  # noqa: E731
    return Replay(zeros, add, sample, update_priorities)


def test_a_prioritised_replay_fits_the_records():
    environment = probe_environments.observed_action()
    agent = make_agent(CONFIG, environment.spec)
    example = training.transition_example(environment.spec, agent)
    state = train(environment, agent, prioritised(example, replay_rows(CONFIG), 8, 32), 600)
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

    def cell(params, carry, observation):
        carry = jnp.tanh(observation @ params["in"] + carry @ params["rec"])
        return carry, carry @ params["out"]

    def act(params, carry, observation, key, epsilon):
        new, q = cell(params, carry, observation)
        return epsilon_greedy(key, q, epsilon), new, carry

    def greedy(params, carry, observation, key):
        new, q = cell(params, carry, observation)
        return jnp.argmax(q, axis=-1), new, carry

    def unroll(params, sequence):
        """Q-values [L, B, A], the state reset to zero after each episode's end."""

        def step(carry, inputs):
            observation, end = inputs
            carry, q = cell(params, carry, observation)
            return acting.reset_where(end, jnp.zeros_like(carry), carry), q

        return jax.lax.scan(step, sequence.extras[0], (sequence.observation, sequence.episode_end))[1]

    def loss(params, target_params, sequence, key, hparams):
        q, q_target = unroll(params, sequence)[:-1], unroll(target_params, sequence)[1:]
        discount = (hparams.gamma * sequence.discount * (1.0 - sequence.episode_end))[:-1]
        errors = jax.vmap(jax.vmap(td.q_learning))(q, sequence.action[:-1], sequence.reward[:-1], discount, q_target)
        return LossOutput(jnp.mean(jnp.square(errors)), jnp.max(jnp.abs(errors), axis=0), {})

    network = Network(init, lambda params, observation, key=None: None)
    initial = lambda num_envs: jnp.zeros((num_envs, width))  # noqa: E731
    return learning.sgd_agent(network, loss, Policy(act, greedy), learning.OPTIMIZERS["adam"], initial)


def test_a_recurrent_agent_fits_the_records():
    environment, agent = remember(), recurrent_dqn()
    example = training.transition_example(environment.spec, agent)
    assert example.extras.shape == (16,)
    state = train(environment, agent, replay.sequences(example, replay_rows(CONFIG), 8, 32, length=6), 1_500)
    from jaxdqn.evaluation import evaluate

    returns = evaluate(environment, agent, state.learner.params, jax.random.key(2), 64, 10).returns
    # Exactly 1 with memory; chance is 0.5.
    np.testing.assert_array_equal(np.asarray(returns), 1.0)
