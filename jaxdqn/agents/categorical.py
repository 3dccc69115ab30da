"""What agents share whose distributions are masses on an even support: C51, HL-Gauss."""

import dataclasses
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.agents.declaration import Alarm, Around
from jaxdqn.agents.distributional import taken_and_greedy
from jaxdqn.agents.dqn import epsilon_greedy_policy
from jaxdqn.base import Agent, Array, Batch, Key, LossOutput, PyTree
from jaxdqn.config import FINITE, HParams
from jaxdqn.errors import UserError
from jaxdqn.learning import sgd_agent
from jaxdqn.networks import Head, action_atoms

CLIPPED = Alarm(
    "clipped",
    0.01,
    "{value:.1%} of the mass of the targets lay outside of the support, from hparams.v_min {v_min:g} to hparams.v_max "
    "{v_max:g}, and was moved to its ends; widen it to the returns that are to be learned.",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the head, and of the target."""

    num_atoms: int = 51
    """Atoms, or bins, into which the support is divided."""
    double: bool = False
    """The online network selects the action that the target network values (van Hasselt et al., 2016)."""

    def check(self) -> None:
        """Raises `UserError` for what is no distribution."""
        if self.num_atoms < 2:
            raise UserError(f"num_atoms is {self.num_atoms}; a distribution needs at least 2.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Support:
    """The returns that are told apart: discounted, and scaled by reward_scale."""

    v_min: Annotated[float, FINITE] = -100.0
    """Lowest return of the support, discounted and scaled by reward_scale."""
    v_max: Annotated[float, FINITE] = 100.0
    """Highest return of the support, discounted and scaled by reward_scale."""

    def check(self) -> None:
        """Raises `UserError` for a support without width, in float32."""
        if not np.float32(self.v_min) < np.float32(self.v_max):
            raise UserError(f"hparams.v_min {self.v_min} is not below hparams.v_max {self.v_max}, as float32.")


class Atoms(Protocol):
    """Where the masses lie."""

    def __call__(self, own: Any, num: int) -> Array:
        """The returns [K] that K = `num` outputs stand for, evenly spaced; `own` are hyperparameters."""


class Target(Protocol):
    """What the masses of the action that was taken should be."""

    def __call__(self, r_t: Array, discount_t: Array, p_t: Array, own: Any) -> tuple[Array, Array]:
        """(masses [K], the part [] of them that the support cut off), of the greedy action's masses p_t [K]."""


def logits(num_actions: int, dueling: bool, settings: Settings) -> Head:
    """Logits of the masses of each action, [B, A, K]."""
    return action_atoms(num_actions, settings.num_atoms, dueling)


def categorical(around: Around, atoms: Atoms, target: Target, own: Any) -> Agent:
    """Descends the cross-entropy to `target`; acts by the mean. The divergence from the target is the priority."""
    network, num, double = around.network, around.settings.num_atoms, around.settings.double

    def mean(outputs: Array) -> Array:
        # In steps of the support, whose ends are traced: wherever they are, the order of the actions is the same.
        return jax.nn.softmax(outputs) @ jnp.arange(num, dtype=outputs.dtype)

    def q_values(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return mean(network.apply(params, observation, key))

    def loss(params: PyTree, target_params: PyTree, batch: Batch, key: Key, hparams: HParams) -> LossOutput:
        taken, best = taken_and_greedy(network, mean, double, params, target_params, batch, key)
        masses = batch.return_m, batch.bootstrap_discount, jax.nn.softmax(best)
        p, clipped = jax.vmap(target, (0, 0, 0, None))(*masses, hparams.own)
        log_q = jax.nn.log_softmax(taken)
        cross_entropy = -jnp.sum(p * log_q, axis=-1)
        divergence = jnp.maximum(0.0, cross_entropy + jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1))
        q_tm1, y = jnp.exp(log_q) @ (z := atoms(hparams.own, num)), p @ z
        metrics = {"q_mean": jnp.mean(q_tm1), "td_error": jnp.mean(jnp.abs(y - q_tm1)), "clipped": jnp.mean(clipped)}
        return LossOutput(jnp.mean(batch.weights * cross_entropy), divergence, metrics)

    def distribution(params: PyTree, observation: PyTree, hparams: HParams) -> tuple[Array, Array]:
        p = jax.nn.softmax(network.apply(params, observation))
        return jnp.broadcast_to(atoms(hparams.own, num), p.shape), p

    agent = sgd_agent(network, loss, epsilon_greedy_policy(q_values), around.optimizer, own=own)
    return agent._replace(distribution=distribution)
