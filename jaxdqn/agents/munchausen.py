"""Munchausen DQN (Vieillard et al., 2020): soft Q-learning, with the policy's log-probability added to the reward.

Of a return of several steps only the first has the bonus: the policies on the way are not known when it is sampled.
"""

import dataclasses
from typing import Annotated

import jax

from jaxdqn import td
from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.agents.dqn import epsilon_greedy_policy, value_loss
from jaxdqn.base import Agent, Batch, Key, LossOutput, PyTree
from jaxdqn.config import FRACTION, NOT_POSITIVE, POSITIVE, HParams
from jaxdqn.learning import sgd_agent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Of the target."""

    munchausen_alpha: Annotated[float, FRACTION] = 0.9
    """Factor on the policy's log-probability that is added to the reward; 0 is soft DQN."""
    munchausen_temperature: Annotated[float, POSITIVE] = 0.03
    """Temperature of the softmax policy over the values."""
    munchausen_clip: Annotated[float, NOT_POSITIVE] = -1.0
    """Lowest value of temperature times log-probability."""


def munchausen(around: Around) -> Agent:
    """y = R_m + alpha clip(t log pi(a | s), clip, 0) + gamma^m discount t logsumexp(Q_target(s_m) / t), pi being the
    softmax of Q_target(s) / t. Acts epsilon-greedily."""
    network = around.network

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        online_key, target_key, policy_key = jax.random.split(key, 3)
        own = hparams.own
        settings = own.munchausen_alpha, own.munchausen_temperature, own.munchausen_clip
        q_tm1 = network.apply(params, batch.observation, online_key)
        q_t = network.apply(target_params, batch.bootstrap_observation, target_key)
        q_tm1_policy = network.apply(target_params, batch.observation, policy_key)
        errors = jax.vmap(td.munchausen_q_learning, (0,) * 6 + (None,) * 3)(
            q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t, q_tm1_policy, *settings
        )
        return value_loss(errors, q_tm1, batch, around.penalty, hparams)

    return sgd_agent(network, loss, epsilon_greedy_policy(network.apply), around.optimizer, own=Hyper())


MUNCHAUSEN = Declaration(munchausen, hparams=Hyper)
