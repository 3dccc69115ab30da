"""Recurrent Q-learning: R2D2 (Kapturowski et al., 2019), and DRQN (Hausknecht and Stone, 2015), which draws uniformly.

A sequence is burn_in rows for the state alone, sequence_length to learn from, and n_step to bootstrap from.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxdqn import masks, td
from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.agents.dqn import recurrent_policy
from jaxdqn.base import Agent, Key, LossOutput, PyTree, SequenceBatch
from jaxdqn.config import FRACTION, NOT_NEGATIVE, HParams
from jaxdqn.learning import sgd_agent
from jaxdqn.networks import CELLS, unroll_after
from jaxdqn.replay.sequence import n_step_errors


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the sequences, the network and the loss."""

    burn_in: Annotated[int, NOT_NEGATIVE] = 4
    """Rows of a sequence, before the trained ones, from which only the recurrent state is taken."""
    sequence_length: int = 12
    """Rows of a sequence that are trained."""
    period: int = 4
    """Rows between the starts of two sequences; it divides rollout_length, or is a multiple of it."""
    memory: Literal["gru", "lstm"] = "gru"
    """Recurrent cell."""
    memory_size: int = 64
    """Width of the recurrent cell."""
    rescale: bool = True
    """Learn h(Q) with h(x) = sgn(x) (sqrt(|x| + 1) - 1) + .001 x instead of Q."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Of the priorities."""

    priority_eta: Annotated[float, FRACTION] = 0.9
    """Weight of a sequence's largest error in its priority; the mean error has the rest."""


def r2d2(around: Around) -> Agent:
    """Double Q-learning over time: y = h(R_m + gamma^m discount h^-1(Q_target(s_m, argmax_a Q(s_m, a)))), m <= n_step.

    Kapturowski et al., section 2.3; the loss of a sequence is the mean over its trained rows.
    """
    network, settings = around.network, around.settings
    error = td.rescaled_double_q_learning if settings.rescale else td.double_q_learning

    def loss(params: PyTree, target_params: PyTree, batch: SequenceBatch, key: Key, hparams: HParams) -> LossOutput:
        online_key, target_key = jax.random.split(key)
        q = unroll_after(network, params, batch, settings.burn_in, online_key)  # [S + n, B, A]
        q_target = unroll_after(network, target_params, batch, settings.burn_in, target_key)
        rows = jax.tree.map(lambda x: x[settings.burn_in :], batch.transitions)
        errors = n_step_errors(error, q, q_target, rows, settings.sequence_length, hparams)
        absolute, eta = jnp.abs(errors), hparams.own.priority_eta
        priorities = eta * jnp.max(absolute, axis=0) + (1.0 - eta) * jnp.mean(absolute, axis=0)
        total = jnp.mean(batch.weights * jnp.mean(around.penalty(errors, hparams.huber_delta), axis=0))
        q_mean = jnp.mean(q, where=masks.legal_of(rows.observation))
        return LossOutput(total, priorities, {"q_mean": q_mean, "td_error": jnp.mean(absolute)})

    return sgd_agent(network, loss, recurrent_policy(network), around.optimizer, network.initial_carry, own=Hyper())


DRQN = Declaration(
    r2d2,
    memory=lambda settings: CELLS[settings.memory](settings.memory_size),
    replay="sequences",
    settings=Settings,
    hparams=Hyper,
    batch=SequenceBatch,
)
R2D2 = DRQN._replace(replay="prioritised_sequences")
