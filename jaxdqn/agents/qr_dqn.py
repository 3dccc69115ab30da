"""QR-DQN (Dabney et al., 2018a): the distribution of the return by its quantiles."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.distributional import equally_likely, taken_and_greedy
from jaxdqn.agents.dqn import epsilon_greedy_policy
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, Network, PyTree
from jaxdqn.config import NOT_NEGATIVE, HParams
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.networks import action_atoms


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the head, and of the target."""

    num_quantiles: int = 51
    """Quantiles of the return of each action; 200 as published."""
    double: bool = False
    """The online network selects the action that the target network values (van Hasselt et al., 2016)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Of the loss."""

    kappa: Annotated[float, NOT_NEGATIVE] = 1.0
    """Where the Huber loss of quantiles becomes linear; 0 takes the absolute error throughout."""


def quantile_loss(z_tm1: Array, taus: Array, z_t: Array, batch: Batch, hparams: HParams) -> LossOutput:
    """Quantile regression of z_tm1 [B, N], at fractions taus [B, N], to R_m + gamma^m discount z_t [B, N'].

    The loss of each transition is its priority.
    """
    target = batch.return_m[:, None] + batch.bootstrap_discount[:, None] * z_t
    each = jax.vmap(td.quantile_huber, (0, 0, 0, None))(z_tm1, taus, target, hparams.own.kappa)
    errors = jnp.mean(target, axis=-1) - jnp.mean(z_tm1, axis=-1)
    metrics = {"q_mean": jnp.mean(z_tm1), "td_error": jnp.mean(jnp.abs(errors))}
    return LossOutput(jnp.mean(batch.weights * each), each, metrics)


def qr_dqn(network: Network, optimizer: Optimizer, double: bool = False) -> Agent:
    """Quantile regression at the midpoints of N intervals; acts by the mean of the quantiles."""

    def mean(quantiles: Array) -> Array:
        return jnp.mean(quantiles, axis=-1)

    def q_values(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return mean(network.apply(params, observation, key))

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        z_tm1, z_t = taken_and_greedy(network, mean, double, params, target_params, batch, key)
        taus = jnp.broadcast_to(td.quantile_midpoints(z_tm1.shape[1]), z_tm1.shape)
        return quantile_loss(z_tm1, taus, z_t, batch, hparams)

    agent = sgd_agent(network, loss, epsilon_greedy_policy(q_values), optimizer, own=Hyper())
    return agent._replace(distribution=equally_likely(network.apply))


QR_DQN = Declaration(
    lambda around: qr_dqn(around.network, around.optimizer, around.settings.double),
    head=lambda num_actions, dueling, settings: action_atoms(num_actions, settings.num_quantiles, dueling),
    settings=Settings,
    hparams=Hyper,
    unused=("loss",),
)
