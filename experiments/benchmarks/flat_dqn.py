"""A flat DQN loop on CartPole, written by hand in `jnp`: the yardstick for the library's own trainer.

The work is that of the well-known single-file JAX DQN: 10 environments, a 120-84 relu MLP, every iteration one step of
each environment, one uniform batch of 128 from a ring of 10,000 transitions, one Adam update on the squared TD error,
and a hard target update every 50 updates; gamma .99, linear epsilon. No abstraction, no option, no library of ours:
own matmuls, own Adam, own ring, `env.step` vmapped as gymnax's users do, all in one `fori_loop`. Few random draws and
no scatter, because those were measured to cost.
"""

from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp

NUM_ENVS, CAPACITY, BATCH, HIDDEN = 10, 10_000, 128, (120, 84)
GAMMA, LEARNING_RATE, TARGET_PERIOD = 0.99, 2.5e-4, 50
EPSILON_BEGIN, EPSILON_END, EPSILON_STEPS = 1.0, 0.05, 250_000
BETA1, BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8

ENV, ENV_PARAMS = gymnax.make("CartPole-v1")
NUM_ACTIONS = ENV.action_space(ENV_PARAMS).n
Array = jax.Array


class Ring(NamedTuple):
    """Transitions, [CAPACITY, ...]."""

    observation: Array
    action: Array
    reward: Array
    not_terminated: Array
    next_observation: Array


class State(NamedTuple):
    """Everything the loop carries; `params`, `target`, `mean` and `square` are lists of (weight, bias)."""

    params: Any
    target: Any
    mean: Any
    square: Any
    env_state: Any
    observation: Array
    ring: Ring
    key: Array
    episode_return: Array
    finished: Array
    finished_return: Array
    loss: Array


def init(key: Array) -> State:
    """Fresh networks and environments, an empty ring."""
    key, reset_key, *layer_keys = jax.random.split(key, 5)
    sizes = (4, *HIDDEN, NUM_ACTIONS)
    params = [
        (jax.random.truncated_normal(k, -2, 2, (m, n)) / jnp.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(layer_keys, sizes[:-1], sizes[1:], strict=True)
    ]
    mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    observation, env_state = jax.vmap(ENV.reset, in_axes=(0, None))(jax.random.split(reset_key, NUM_ENVS), ENV_PARAMS)
    ring = Ring(
        jnp.zeros((CAPACITY, 4)),
        jnp.zeros(CAPACITY, jnp.int32),
        jnp.zeros(CAPACITY),
        jnp.zeros(CAPACITY),
        jnp.zeros((CAPACITY, 4)),
    )
    target = jax.tree.map(jnp.copy, params)
    zeros = (jnp.zeros(NUM_ENVS), jnp.float32(0), jnp.float32(0), jnp.float32(0))
    return State(params, target, mean, square, env_state, observation, ring, key, *zeros)


def q_values(params: Any, x: Array) -> Array:
    """[B, 4] -> [B, A]."""
    (w1, b1), (w2, b2), (w3, b3) = params
    x = jnp.maximum(x @ w1 + b1, 0.0)
    x = jnp.maximum(x @ w2 + b2, 0.0)
    return x @ w3 + b3


def iteration(i: Array, s: State) -> State:
    """Iteration i: one step of every environment, one update."""
    keys = jax.random.split(s.key, 3 + NUM_ENVS)
    key, act_key, sample_key, step_keys = keys[0], keys[1], keys[2], keys[3:]

    epsilon = EPSILON_BEGIN + (EPSILON_END - EPSILON_BEGIN) * jnp.minimum(i * NUM_ENVS / EPSILON_STEPS, 1.0)
    coin, choice = jax.random.uniform(act_key, (2, NUM_ENVS))
    greedy = jnp.argmax(q_values(s.params, s.observation), axis=-1).astype(jnp.int32)
    action = jnp.where(coin < epsilon, (choice * NUM_ACTIONS).astype(jnp.int32), greedy)

    observation, env_state, reward, terminated, truncated, info = jax.vmap(ENV.step, in_axes=(0, 0, 0, None))(
        step_keys, s.env_state, action, ENV_PARAMS
    )
    done = terminated | truncated
    episode_return = s.episode_return + reward
    new = Ring(s.observation, action, reward, 1.0 - terminated, info["final_observation"])
    start = i * NUM_ENVS % CAPACITY
    ring = jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, 0), s.ring, new)

    # Not `randint`, which draws three times.
    filled = jnp.minimum((i + 1) * NUM_ENVS, CAPACITY).astype(jnp.uint32)
    index = jax.random.bits(sample_key, (BATCH,)) % filled
    batch = jax.tree.map(lambda x: x[index], ring)
    next_value = jnp.max(q_values(s.target, batch.next_observation), axis=-1)
    y = batch.reward + GAMMA * batch.not_terminated * next_value

    def loss_function(params: Any) -> Array:
        # Not `take_along_axis`, whose gradient is a scatter.
        q = jnp.sum(q_values(params, batch.observation) * jax.nn.one_hot(batch.action, NUM_ACTIONS), axis=-1)
        return 0.5 * jnp.mean(jnp.square(q - y))

    loss, gradient = jax.value_and_grad(loss_function)(s.params)
    t = (i + 1).astype(jnp.float32)
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, s.mean, gradient)
    square = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, s.square, gradient)
    scale_mean, scale_square = 1 / (1 - BETA1**t), 1 / (1 - BETA2**t)
    params = jax.tree.map(
        lambda p, m, v: p - LEARNING_RATE * m * scale_mean / (jnp.sqrt(v * scale_square) + ADAM_EPSILON),
        s.params,
        mean,
        square,
    )
    target = jax.tree.map(lambda p, t: jnp.where((i + 1) % TARGET_PERIOD == 0, p, t), params, s.target)

    return State(
        params,
        target,
        mean,
        square,
        env_state,
        observation,
        ring,
        key,
        jnp.where(done, 0.0, episode_return),
        s.finished + jnp.sum(done),
        s.finished_return + jnp.sum(jnp.where(done, episode_return, 0.0)),
        s.loss + loss,
    )


def run(state: State, start: Array, stop: Array) -> State:
    """Iterations start <= i < stop."""
    return jax.lax.fori_loop(start, stop, iteration, state)
