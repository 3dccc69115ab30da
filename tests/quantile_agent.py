"""An agent with a head, a replay, a setting and hyperparameters of its own: all of them in this one file.

Quantile regression (Dabney et al., 2018, equation 10) over a slow, obvious prioritised replay (Schaul et al., 2016).
Importing it registers nothing; a test adds the one line, `AGENTS["quantile"] = quantile_agent.QUANTILE`.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import epsilon_greedy_policy
from jaxdqn.base import Array, LossOutput, Replay, Transition
from jaxdqn.config import FRACTION, POSITIVE, replay_rows
from jaxdqn.learning import sgd_agent
from jaxdqn.masks import masked
from jaxdqn.networks import Head
from jaxdqn.replay import Kind, ring


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the head."""

    num_quantiles: int = 5
    """Quantiles of the return of each action."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Of the loss, and of the replay."""

    kappa: Annotated[float, POSITIVE] = 1.0
    """Where the quantile Huber loss becomes linear."""
    exponent: Annotated[float, FRACTION] = 0.6
    """Priorities to this power are what is drawn by; 0 is uniform."""


def quantile_head(num_actions, dueling, settings):
    """Quantiles [B, A, K]."""
    del dueling
    shape = (-1, num_actions, settings.num_quantiles)

    def apply(dense, x, legal):
        quantiles = dense(num_actions * settings.num_quantiles, 1.0)(x).reshape(shape)
        return quantiles if legal is None else masked(quantiles, legal[..., None])

    return Head(apply, 1)


def quantile_agent(around):
    """Descends the quantile Huber loss; acts by the mean of the quantiles."""
    network, count = around.network, around.settings.num_quantiles
    middle = (jnp.arange(count) + 0.5) / count

    def q_values(params, observation, key=None):
        return jnp.mean(network.apply(params, observation, key), axis=-1)

    def loss(params, target_params, batch, key, hparams):
        online_key, target_key = jax.random.split(key)
        rows = jnp.arange(len(batch.action))
        z_tm1 = network.apply(params, batch.observation, online_key)[rows, batch.action]  # [B, K]
        z_t = network.apply(target_params, batch.bootstrap_observation, target_key)
        z_t = z_t[rows, jnp.argmax(jnp.mean(z_t, axis=-1), axis=-1)]
        target = batch.return_m[:, None] + batch.bootstrap_discount[:, None] * z_t
        errors = target[:, None, :] - z_tm1[:, :, None]  # [B, K, K'], of target quantile k' for quantile k
        small = jnp.minimum(jnp.abs(errors), hparams.own.kappa)
        huber = small * (jnp.abs(errors) - 0.5 * small)
        each = jnp.mean(jnp.abs(middle[:, None] - (errors < 0)) * huber / hparams.own.kappa, axis=2).sum(axis=1)
        return LossOutput(jnp.mean(batch.weights * each), each, {"q_mean": jnp.mean(z_tm1)})

    return sgd_agent(network, loss, epsilon_greedy_policy(q_values), around.optimizer, own=Hyper())


class Prioritised(NamedTuple):
    """`priorities` [rows, N] are 0 where nothing was written."""

    data: Transition
    priorities: Array
    highest: Array


def prioritised(example, rows, num_envs, batch_size, exponent=lambda hparams: hparams.own.exponent):
    """Proportional prioritised replay of single steps, by a full cumulative sum: slow and obvious."""
    layout = ring.layout(example, rows, num_envs)

    def add(state, block, written, hparams, priorities=None):
        new = jnp.full(block.reward.shape, state.highest) if priorities is None else priorities
        priorities = jax.lax.dynamic_update_slice(state.priorities, new, (written % rows, 0))
        return state._replace(data=ring.write(layout, state.data, block, written), priorities=priorities)

    def sample(state, key, progress, hparams):
        drawn = jnp.where(state.priorities > 0, state.priorities ** exponent(hparams), 0.0)
        total = jnp.cumsum(drawn.reshape(-1))
        flat = jnp.searchsorted(total, jax.random.uniform(key, (batch_size,)) * total[-1])
        flat = jnp.minimum(flat, total.size - 1)
        row, env = flat // num_envs, flat % num_envs
        batch = ring.n_step_batch(layout, state.data, row, env, 1, hparams)
        weights = 1.0 / (drawn[row, env] / total[-1] * jnp.minimum(progress.written, rows) * num_envs)
        return batch._replace(weights=weights / jnp.max(weights))

    def update_priorities(state, indices, priorities, hparams):
        changed = state.priorities.at[indices].set(priorities + 1e-3)
        return state._replace(priorities=changed, highest=jnp.maximum(state.highest, jnp.max(changed)))

    zeros = lambda: Prioritised(ring.empty(layout), jnp.zeros((rows, num_envs)), jnp.float32(1))  # noqa: E731
    return Replay(zeros, add, sample, update_priorities)


QUANTILE = Declaration(
    quantile_agent,
    head=quantile_head,
    replay=Kind(
        lambda example, config: prioritised(example, replay_rows(config), config.num_envs, config.batch_size),
        rows_needed=lambda config: 1,
    ),
    settings=Settings,
    hparams=Hyper,
)
