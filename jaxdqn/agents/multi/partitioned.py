"""Deep state-partitioned Q-learning: K owners, each of a region of the state space, merged by ownership.

    Q(s) = sum_k 1[owner(s) = k] Q_k(s)

A merge by ownership, and not a mean: each Q_k is only ever trained on its own region, and knows nothing of the others.
Owners bootstrap from the owner of the next state, since the target is a merge too.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import dqn
from jaxdqn.agents.multi import stacked
from jaxdqn.agents.multi.ownership import Owner, directions, loads
from jaxdqn.base import Agent, Array, Key, LearnerState, LossOutput, Network, PyTree
from jaxdqn.config import HParams
from jaxdqn.learning import Optimizer
from jaxdqn.td import Penalty


def merge(q: Array, owners: Array) -> Array:
    """sum_k 1[owners = k] q_k: of q [K, B, A] each row's owner's, [B, A]; owners int [B] in [0, K)."""
    owned = owners == jnp.arange(q.shape[0])[:, None]
    return jnp.sum(jnp.where(owned[..., None], q, 0.0), axis=0)


def partitioned(network: Network, owner: Owner, num_owners: int) -> Network:
    """The merge of K networks, params [K, ...]: any agent's network.

    The gradient with respect to an owner's parameters comes from the rows it owns alone. All owners are evaluated on
    all rows: K times the arithmetic of one, which is the price of fixed shapes.
    """

    def apply(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return merge(stacked.apply(network, params, observation, key), jax.vmap(owner)(observation))

    return Network(stacked.initialiser(network, num_owners), apply)


def partitioned_agent(
    algorithm: Callable[..., Agent],
    network: Network,
    optimizer: Optimizer,
    penalty: Penalty,
    owner: Owner,
    num_owners: int,
) -> Agent:
    """`algorithm` (dqn, double_dqn) over K owners, each with an optimizer and a bound on its gradient of its own.

    An owner without data in a batch does not change at all. One owner is the algorithm itself.
    """
    # A lone owner has data in every batch, so a gradient of zero is one to Adam's moments as well.
    alone = optimizer if num_owners == 1 else stacked.unless_zero(optimizer)
    agent = algorithm(partitioned(network, owner, num_owners), stacked.each(alone), penalty)
    return with_loads(stacked.clip_each(agent), owner, num_owners)


def partitioned_dqn(
    network: Network, optimizer: Optimizer, penalty: Penalty = td.squared, *, owner: Owner, num_owners: int
) -> Agent:
    """DQN over K owners."""
    return partitioned_agent(dqn, network, optimizer, penalty, owner, num_owners)


def with_loads(agent: Agent, owner: Owner, num_owners: int) -> Agent:
    """`agent`, with the fraction of the batch that each owner learned from as metrics load_0, load_1, ..."""

    def gradient(learner: LearnerState, batch: PyTree, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        gradients, output = agent.gradient(learner, batch, key, hparams)
        load = loads(owner, num_owners, batch.observation)
        metrics = {f"load_{k}": load[k] for k in range(num_owners)}
        return gradients, output._replace(metrics={**output.metrics, **metrics})

    return agent._replace(gradient=gradient)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Into how many parts the state space is divided."""

    num_partitions: int = 4
    """Owners of partitioned_dqn: networks that each own a part of the state space."""


PARTITIONED_DQN = Declaration(
    lambda around: partitioned_dqn(
        around.network,
        around.optimizer,
        around.penalty,
        owner=directions(around.spec, around.settings.num_partitions),
        num_owners=around.settings.num_partitions,
    ),
    settings=Settings,
    stacked=True,
)
