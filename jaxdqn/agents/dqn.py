"""Deep Q-networks: DQN (Mnih et al., 2015) and double DQN (van Hasselt et al., 2016).

The two differ in which network selects the action that the target network values.
"""

import jax
import jax.numpy as jnp

from jaxdqn import masks, td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.base import (
    Agent,
    Array,
    Batch,
    Key,
    Loss,
    LossOutput,
    Network,
    Policy,
    PyTree,
    RecurrentNetwork,
    TargetBatch,
    Values,
)
from jaxdqn.config import HParams
from jaxdqn.exploration import epsilon_greedy
from jaxdqn.exploration import greedy as greedy_action
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.td import Penalty

NOISE = 0x6E6F6973


def dqn(network: Network, optimizer: Optimizer, penalty: Penalty = td.squared) -> Agent:
    """DQN: epsilon-greedy over `dqn_loss`."""
    return sgd_agent(network, dqn_loss(network, penalty), epsilon_greedy_policy(network.apply), optimizer)


def double_dqn(network: Network, optimizer: Optimizer, penalty: Penalty = td.squared) -> Agent:
    """Double DQN: epsilon-greedy over `double_dqn_loss`."""
    return sgd_agent(network, double_dqn_loss(network, penalty), epsilon_greedy_policy(network.apply), optimizer)


def dqn_loss(network: Network, penalty: Penalty) -> Loss:
    """y = R_m + gamma^m discount max_a Q_target(s_m, a)."""

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        online_key, target_key = jax.random.split(key)
        q_tm1 = network.apply(params, batch.observation, online_key)
        q_t = network.apply(target_params, batch.bootstrap_observation, target_key)
        errors = jax.vmap(td.q_learning)(q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t)
        return value_loss(errors, q_tm1, batch, penalty, hparams)

    return loss


def double_dqn_loss(network: Network, penalty: Penalty) -> Loss:
    """y = R_m + gamma^m discount Q_target(s_m, argmax_a Q(s_m, a))."""

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        online_key, target_key, selector_key = jax.random.split(key, 3)
        q_tm1 = network.apply(params, batch.observation, online_key)
        q_t_value = network.apply(target_params, batch.bootstrap_observation, target_key)
        q_t_selector = network.apply(jax.lax.stop_gradient(params), batch.bootstrap_observation, selector_key)
        errors = jax.vmap(td.double_q_learning)(
            q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t_value, q_t_selector
        )
        return value_loss(errors, q_tm1, batch, penalty, hparams)

    return loss


def value_loss(
    errors: Array, q_tm1: Array, batch: Batch | TargetBatch, penalty: Penalty, hparams: HParams
) -> LossOutput:
    """The weighted mean of the penalised TD errors [B]; |error| as priority."""
    loss = jnp.mean(batch.weights * penalty(errors, hparams.huber_delta))
    absolute = jnp.abs(errors)
    q_mean = jnp.mean(q_tm1, where=masks.legal_of(batch.observation))
    return LossOutput(loss, absolute, {"q_mean": q_mean, "td_error": jnp.mean(absolute)})


def epsilon_greedy_policy(q_values: Values) -> Policy:
    """Epsilon-greedy over the values of a network, without recurrent state or extras. The greedy policy draws nothing:
    without a key the values are those of the mean network."""

    def values(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        # Means of distributions are not masked before; the values of a head are, and stay as they are.
        return masks.masked(q_values(params, observation, key), masks.legal_of(observation))

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        # Exploration draws with `key` itself: the noise of a network has a key far from those draws.
        q = values(params, observation, jax.random.fold_in(key, NOISE))
        return epsilon_greedy(key, q, exploration, masks.legal_of(observation)), carry, ()

    def greedy(params: PyTree, carry: PyTree, observation: PyTree, key: Key) -> tuple[Array, PyTree, PyTree]:
        del key
        return greedy_action(values(params, observation)), carry, ()

    return Policy(act, greedy, values)


def recurrent_policy(network: RecurrentNetwork) -> Policy:
    """Epsilon-greedy over the values of a recurrent network; its extras are the state before the step."""

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        following, q = network.step(params, carry, observation, jax.random.fold_in(key, NOISE))
        return epsilon_greedy(key, q, exploration, masks.legal_of(observation)), following, carry

    def greedy(params: PyTree, carry: PyTree, observation: PyTree, key: Key) -> tuple[Array, PyTree, PyTree]:
        del key
        following, q = network.step(params, carry, observation)
        return greedy_action(q), following, ()

    return Policy(act, greedy)


DQN = Declaration(lambda around: dqn(around.network, around.optimizer, around.penalty))
DOUBLE_DQN = Declaration(lambda around: double_dqn(around.network, around.optimizer, around.penalty))
