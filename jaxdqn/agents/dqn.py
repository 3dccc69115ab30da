"""Deep Q-networks: DQN (Mnih et al., 2015) and double DQN (van Hasselt et al., 2016).

The two differ in which network selects the action that the target network values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdqn import exploration, td
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, Network, Policy, PyTree
from jaxdqn.learning import Optimizer, sgd_agent

Penalty = Callable[[Array, Array], Array]
Loss = Callable[[PyTree, PyTree, Any, Key, Any], LossOutput]


def dqn(network: Network, optimizer: Optimizer, penalty: Penalty = td.squared) -> Agent:
    """DQN: epsilon-greedy over `dqn_loss`."""
    return sgd_agent(network, dqn_loss(network, penalty), epsilon_greedy_policy(network), optimizer)


def double_dqn(network: Network, optimizer: Optimizer, penalty: Penalty = td.squared) -> Agent:
    """Double DQN: epsilon-greedy over `double_dqn_loss`."""
    return sgd_agent(network, double_dqn_loss(network, penalty), epsilon_greedy_policy(network), optimizer)


def dqn_loss(network: Network, penalty: Penalty) -> Loss:
    """y = R_m + gamma^m discount max_a Q_target(s_m, a)."""

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: Any) -> LossOutput:
        del key  # no stochastic layers
        q_tm1 = network.apply(params, batch.observation)
        q_t = network.apply(target_params, batch.bootstrap_observation)
        errors = jax.vmap(td.q_learning)(q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t)
        return value_loss(errors, q_tm1, batch, penalty, hparams)

    return loss


def double_dqn_loss(network: Network, penalty: Penalty) -> Loss:
    """y = R_m + gamma^m discount Q_target(s_m, argmax_a Q(s_m, a))."""

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: Any) -> LossOutput:
        del key  # no stochastic layers
        q_tm1 = network.apply(params, batch.observation)
        q_t_value = network.apply(target_params, batch.bootstrap_observation)
        q_t_selector = network.apply(jax.lax.stop_gradient(params), batch.bootstrap_observation)
        errors = jax.vmap(td.double_q_learning)(
            q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t_value, q_t_selector
        )
        return value_loss(errors, q_tm1, batch, penalty, hparams)

    return loss


def value_loss(errors: Array, q_tm1: Array, batch: Batch, penalty: Penalty, hparams: Any) -> LossOutput:
    """The weighted mean of the penalised TD errors [B]; |error| as priority."""
    loss = jnp.mean(batch.weights * penalty(errors, hparams.huber_delta))
    absolute = jnp.abs(errors)
    return LossOutput(loss, absolute, {"q_mean": jnp.mean(q_tm1), "td_error": jnp.mean(absolute)})


def epsilon_greedy_policy(network: Network) -> Policy:
    """Epsilon-greedy over the values of a Q-network, without recurrent state or extras."""

    def act(
        params: PyTree, carry: PyTree, observation: Array, key: Key, epsilon: Array
    ) -> tuple[Array, PyTree, PyTree]:
        return exploration.epsilon_greedy(key, network.apply(params, observation), epsilon), carry, ()

    def greedy(params: PyTree, carry: PyTree, observation: Array, key: Key) -> tuple[Array, PyTree, PyTree]:
        del key
        return exploration.greedy(network.apply(params, observation)), carry, ()

    return Policy(act, greedy)
