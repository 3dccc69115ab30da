"""Ensembles of Q-networks: M members that learn apart, and act together.

Members differ in their initial parameters, and, with a mask, in the rows they learn from (Osband et al., 2016). Their
outputs are aggregated for acting only: by mean, by majority vote (Wiering and van Hasselt, 2008) or by ownership of the
state. Each bootstraps from its own target, unlike Ensemble-DQN (Anschel et al., 2017), whose target is the mean too.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import dqn_loss, epsilon_greedy_policy
from jaxdqn.agents.multi import stacked
from jaxdqn.agents.multi.ownership import Owner
from jaxdqn.agents.multi.partitioned import merge
from jaxdqn.base import Agent, Array, Batch, Key, LearnerState, Loss, LossOutput, Network, PyTree
from jaxdqn.config import HParams
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.td import Penalty

Aggregate = Callable[[Array, Array], Array]
"""aggregate(q [M, N, A], observation [N, *O]) -> scores [N, A], the greedy action being the highest score's."""


def mean(q: Array, observation: Array) -> Array:
    """The mean of the members' values."""
    del observation
    # Around the first member: equal members then give exactly their value, whatever M is.
    return q[0] + jnp.mean(q - q[0], axis=0)


def vote(q: Array, observation: Array) -> Array:
    """The action that most members find greedy; of actions with equally many votes the one with the highest mean value.

    Scores are the mean values of the actions with most votes, -inf for the rest; of equal ones the first is taken.
    """
    votes = jnp.sum(jax.nn.one_hot(jnp.argmax(q, axis=-1), q.shape[-1]), axis=0)
    return jnp.where(votes == jnp.max(votes, axis=-1, keepdims=True), mean(q, observation), -jnp.inf)


def ownership(owner: Owner) -> Aggregate:
    """The member that owns the state decides: sum_k 1[owner(s) = k] Q_k(s)."""
    return lambda q, observation: merge(q, jax.vmap(owner)(observation))


AGGREGATES: dict[str, Aggregate] = {"mean": mean, "vote": vote}


def ensemble(
    network: Network,
    loss: Loss,
    optimizer: Optimizer,
    size: int,
    aggregate: Aggregate = mean,
    keep_probability: float = 1.0,
) -> Agent:
    """M = `size` networks, params [M, ...]; each descends `loss` of its own, with a target of its own.

    `loss` is any of the project's, made for `network`. Below 1, `keep_probability` gives each member its own random
    part of every batch; drawn anew for every batch, where Osband et al. (2016) fix it for each transition. Loss,
    priorities and metrics are the members' means. A member that is not finite stops all.
    """
    stack = Network(stacked.initialiser(network, size), network.apply)

    def summed(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        def member(params: PyTree, target_params: PyTree, key: Key) -> LossOutput:
            if keep_probability == 1.0:
                return loss(params, target_params, batch, key, hparams)
            mask_key, key = jax.random.split(key)
            kept = jax.random.bernoulli(mask_key, keep_probability, batch.weights.shape)
            return loss(params, target_params, batch._replace(weights=batch.weights * kept), key, hparams)

        outputs = stacked.over_stack(member)(params, target_params, jax.random.split(key, size))
        # The sum has each member's own gradient; a mean would divide it by M.
        means = jax.tree.map(lambda x: jnp.mean(x, axis=0), (outputs.priorities, outputs.metrics))
        return LossOutput(jnp.sum(outputs.loss), *means)

    def scores(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return aggregate(stacked.apply(network, params, observation, key), observation)

    policy = epsilon_greedy_policy(scores)
    agent = stacked.clip_each(sgd_agent(stack, summed, policy, stacked.each(optimizer)))

    def gradient(learner: LearnerState, batch: Batch, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        gradients, output = agent.gradient(learner, batch, key, hparams)
        return gradients, output._replace(loss=output.loss / size)

    return agent._replace(gradient=gradient)


def ensemble_dqn(
    network: Network, optimizer: Optimizer, penalty: Penalty = td.squared, *, size: int, aggregate: str = "mean"
) -> Agent:
    """An ensemble of DQNs; `aggregate` is a name in `AGGREGATES`."""
    return ensemble(network, dqn_loss(network, penalty), optimizer, size, AGGREGATES[aggregate])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many networks, and how they act together."""

    ensemble_size: int = 5
    """Networks of ensemble_dqn."""
    ensemble_act: Literal["mean", "vote"] = "mean"
    """How ensemble_dqn acts: by the mean of its members' values, or by their majority vote."""


ENSEMBLE_DQN = Declaration(
    lambda around: ensemble_dqn(
        around.network,
        around.optimizer,
        around.penalty,
        size=around.settings.ensemble_size,
        aggregate=around.settings.ensemble_act,
    ),
    settings=Settings,
    stacked=True,
)
