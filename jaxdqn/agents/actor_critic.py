"""Actor-critic with n-step advantages: A2C; under a parameter server A3C; with long blocks REINFORCE with baseline.

On-policy: it learns from the block just acted (`replay/latest.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdqn import exploration
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, Network, Policy, PyTree
from jaxdqn.learning import Optimizer, sgd_agent


def actor_critic(network: Network, optimizer: Optimizer, *_: Any) -> Agent:
    """-log pi(a | s) sg(A) + value_weight (y - V(s))^2 - entropy_weight H(pi(. | s)), A = y - V(s).

    y = R_m + gamma^m discount V(s_m): 0 where the MDP terminated, bootstrapped at a time limit and at a block's end.
    Mnih et al. (2016), section 4; for blocks of whole episodes y is the return and this is REINFORCE with a learned
    baseline (Williams, 1992; Sutton and Barto, 2018, section 13.4). Acts by sampling its policy, whatever epsilon is;
    greedily it takes the most probable action. Its target network is carried but unused.
    """

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: Any) -> LossOutput:
        del target_params, key
        logits, value = network.apply(params, batch.observation)
        bootstrap = jax.lax.stop_gradient(network.apply(params, batch.bootstrap_observation)[1])
        errors = batch.return_m + batch.bootstrap_discount * bootstrap - value
        log_policy = jax.nn.log_softmax(logits)
        log_probability = jnp.take_along_axis(log_policy, batch.action[:, None], axis=-1)[:, 0]
        policy_loss = -jnp.mean(batch.weights * log_probability * jax.lax.stop_gradient(errors))
        value_loss = jnp.mean(batch.weights * jnp.square(errors))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1))
        total = policy_loss + hparams.value_weight * value_loss - hparams.entropy_weight * entropy
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": jnp.mean(value)}
        return LossOutput(total, jnp.abs(errors), metrics)

    def act(
        params: PyTree, carry: PyTree, observation: Array, key: Key, epsilon: Array
    ) -> tuple[Array, PyTree, PyTree]:
        del epsilon
        return jax.random.categorical(key, network.apply(params, observation)[0]).astype(jnp.int32), carry, ()

    def greedy(params: PyTree, carry: PyTree, observation: Array, key: Key) -> tuple[Array, PyTree, PyTree]:
        del key
        return exploration.greedy(network.apply(params, observation)[0]), carry, ()

    return sgd_agent(network, loss, Policy(act, greedy), optimizer)
