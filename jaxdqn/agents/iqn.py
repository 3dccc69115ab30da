"""Implicit quantile networks (Dabney et al., 2018b): quantiles at fractions tau that are drawn anew in every update.

Three networks of the same parameters differ in how many they draw: N of the loss, N' of its target, K to act and to
select.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.agents.distributional import of_action
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
    """K: fractions drawn to act, and to select the target's action; greedy evaluation takes the midpoints of K."""
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

    return sgd_agent(online, loss, epsilon_greedy_policy(q_values), optimizer, own=Hyper())


def make(around: Around) -> Agent:
    """The agent of a configuration."""
    settings = around.settings
    others = settings.num_target_taus, settings.num_acting_taus
    target, acting = (around.network_of(dataclasses.replace(settings, num_taus=num)) for num in others)
    return iqn(around.network, target, acting, around.optimizer, settings.double)


IQN = Declaration(
    make,
    head=lambda num_actions, dueling, settings: sampled_quantiles(
        num_actions, settings.num_taus, settings.embedding_size, dueling
    ),
    settings=Settings,
    hparams=Hyper,
)
