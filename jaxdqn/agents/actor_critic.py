"""Actor-critic with n-step advantages: A2C; under a parameter server A3C; with long blocks REINFORCE with baseline.

On-policy: it learns from the block just acted (`replay/latest.py`).
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxdqn.agents.declaration import Declaration
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, Network, Policy, PyTree
from jaxdqn.config import FINITE, NOT_NEGATIVE, Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.exploration import greedy as greedy_action
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.networks import policy_and_value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The parts of the loss of actor-critic agents."""

    value_weight: Annotated[float, NOT_NEGATIVE] = 0.5
    """Weight of the squared value error of actor-critic agents."""
    entropy_weight: Annotated[float, FINITE] = 0.01
    """Weight of the entropy bonus of actor-critic agents."""


def actor_critic(network: Network, optimizer: Optimizer, *_: object) -> Agent:
    """-log pi(a | s) sg(A) + value_weight (y - V(s))^2 - entropy_weight H(pi(. | s)), A = y - V(s).

    y = R_m + gamma^m discount V(s_m): 0 where the MDP terminated, bootstrapped at a time limit and at a block's end.
    Mnih et al. (2016), section 4; for blocks of whole episodes y is the return and this is REINFORCE with a learned
    baseline (Williams, 1992; Sutton and Barto, 2018, section 13.4). Acts by sampling its policy, whatever epsilon is;
    greedily it takes the most probable action. Its target network is carried but unused.
    """

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        del target_params, key
        logits, value = network.apply(params, batch.observation)
        bootstrap = jax.lax.stop_gradient(network.apply(params, batch.bootstrap_observation)[1])
        errors = batch.return_m + batch.bootstrap_discount * bootstrap - value
        log_policy = jax.nn.log_softmax(logits)
        log_probability = jnp.take_along_axis(log_policy, batch.action[:, None], axis=-1)[:, 0]
        policy_loss = -jnp.mean(batch.weights * log_probability * jax.lax.stop_gradient(errors))
        value_loss = jnp.mean(batch.weights * jnp.square(errors))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1))
        total = policy_loss + hparams.own.value_weight * value_loss - hparams.own.entropy_weight * entropy
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": jnp.mean(value)}
        return LossOutput(total, jnp.abs(errors), metrics)

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        del exploration
        logits, _ = network.apply(params, observation)
        return jax.random.categorical(key, logits).astype(jnp.int32), carry, ()

    def greedy(params: PyTree, carry: PyTree, observation: PyTree, key: Key) -> tuple[Array, PyTree, PyTree]:
        del key
        return greedy_action(network.apply(params, observation)[0]), carry, ()

    return sgd_agent(network, loss, Policy(act, greedy), optimizer, own=Weights())


def check(config: Config) -> None:
    """Raises `UserError` where the policy whose gradient is taken would not be the one that acted."""
    if config.updates_per_iteration > 1:
        raise UserError(
            f"updates_per_iteration is {config.updates_per_iteration}, but agent 'a2c' is on-policy: after one update "
            "its block is of another policy; use 1."
        )
    if config.noisy:
        raise UserError(
            "agent 'a2c' cannot be noisy: each step acts with noise of its own, and the gradient would be of another "
            "policy; leave noisy off, and explore by hparams.entropy_weight."
        )


A2C = Declaration(
    lambda around: actor_critic(around.network, around.optimizer),
    head=lambda num_actions, dueling, settings: policy_and_value(num_actions),
    replay="latest",
    hparams=Weights,
    on_policy=True,
    unused=("loss", "dueling"),
    check=check,
)
