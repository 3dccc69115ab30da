"""Implicit quantile networks (Dabney et al., 2018b): quantiles at fractions tau that are drawn anew in every update.

Three networks of the same parameters differ in how many they draw: N of the loss, N' of its target, K to act and to
select.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdqn.agents.declaration import Around, Declaration, MakeHead
from jaxdqn.agents.distributional import equally_likely, of_action
from jaxdqn.agents.dqn import epsilon_greedy_policy
from jaxdqn.agents.qr_dqn import Hyper, quantile_loss
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, Network, PyTree
from jaxdqn.config import HParams
from jaxdqn.exploration import greedy
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.networks import sampled_quantiles


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the head, and of the target."""

    num_taus: int = 8
    """N: fractions drawn for the loss; 64 as published."""
    num_target_taus: int = 8
    """N': fractions drawn for its target; 64 as published."""
    num_acting_taus: int = 32
    """K: fractions drawn to act, and to select the target's action; 32 as published. Greedily the midpoints of K."""
    embedding_size: int = 64
    """Cosines by which a fraction is embedded."""
    double: bool = False
    """The online network selects the action that the target network values (van Hasselt et al., 2016)."""


def iqn(online: Network, target: Network, acting: Network, optimizer: Optimizer, double: bool = False) -> Agent:
    """Quantile regression at drawn fractions; acts by the mean of drawn quantiles. Networks -> (quantiles, taus)."""

    def q_values(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return jnp.mean(acting.apply(params, observation, key)[0], axis=-1)

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        online_key, target_key, selector_key = jax.random.split(key, 3)
        z_tm1, taus = online.apply(params, batch.observation, online_key)
        z_t, _ = target.apply(target_params, batch.bootstrap_observation, target_key)
        best = greedy(q_values(params if double else target_params, batch.bootstrap_observation, selector_key))
        z_t = jax.lax.stop_gradient(of_action(z_t, best))
        return quantile_loss(of_action(z_tm1, batch.action), taus, z_t, batch, hparams)

    agent = sgd_agent(online, loss, epsilon_greedy_policy(q_values), optimizer, own=Hyper())
    return agent._replace(distribution=equally_likely(lambda *args: acting.apply(*args)[0]))


def head(size: Callable[[Settings], int], shared: bool = False) -> MakeHead:
    """The head with as many fractions as `size` of the settings says."""
    return lambda num_actions, dueling, settings: sampled_quantiles(
        num_actions, size(settings), settings.embedding_size, dueling, shared
    )


def make(around: Around) -> Agent:
    """The agent of a configuration. What all rows of a batch select their actions by is one draw."""
    target = around.with_head(head(lambda settings: settings.num_target_taus))
    acting = around.with_head(head(lambda settings: settings.num_acting_taus, shared=True))
    return iqn(around.network, target, acting, around.optimizer, around.settings.double)


IQN = Declaration(
    make, head=head(lambda settings: settings.num_taus), settings=Settings, hparams=Hyper, unused=("loss",)
)
