"""From a loss to an update: gradient, mean over shards, apply. Devices enter here and nowhere else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdqn.base import Agent, Array, Key, LearnerState, LossOutput, Network, Policy, PyTree
from jaxdqn.exploration import linear_schedule


class Shards(NamedTuple):
    """One agent spread over `size` devices of a mapped axis; `groups` partitions the axis where it holds several."""

    axis_name: str
    size: int
    groups: tuple[tuple[int, ...], ...] | None = None


def mean_over_shards(tree: PyTree, shards: Shards | None) -> PyTree:
    """The average over an agent's shards; the identity on a single one."""
    if shards is None:
        return tree
    groups = None if shards.groups is None else [list(group) for group in shards.groups]
    return jax.lax.pmean(tree, shards.axis_name, axis_index_groups=groups)


def shard_index(shards: Shards | None) -> Array | int:
    """This device's place among the agent's shards."""
    return 0 if shards is None else jax.lax.axis_index(shards.axis_name) % shards.size


def update(
    agent: Agent, learner: LearnerState, batch: Any, key: Key, hparams: Any, shards: Shards | None = None
) -> tuple[LearnerState, LossOutput, Array]:
    """One gradient update: (learner, LossOutput of this shard with the loss of all, gradient norm []).

    The gradient is the mean over shards, clipped after that. Shards hold equal parts of the batch, so that the mean of
    means is the mean.
    """
    gradients, output = agent.gradient(learner, batch, key, hparams)
    gradients, loss = mean_over_shards((gradients, output.loss), shards)
    learner, gradient_norm = agent.apply(learner, gradients, loss, hparams)
    return learner, output._replace(loss=loss), gradient_norm


Optimizer = Callable[[Any], optax.GradientTransformation]

OPTIMIZERS: dict[str, Optimizer] = {
    "adam": lambda h: optax.adam(h.learning_rate, eps=h.optimizer_epsilon),
    "adamw": lambda h: optax.adamw(h.learning_rate, eps=h.optimizer_epsilon, weight_decay=h.weight_decay),
    "rmsprop": lambda h: optax.rmsprop(h.learning_rate, decay=0.95, eps=h.optimizer_epsilon, centered=True),
    "radam": lambda h: optax.radam(h.learning_rate, eps=h.optimizer_epsilon),
}
"""Optimizers are built from `HParams` at trace time, so that their settings are traced; only their state is carried."""


def sgd_agent(
    network: Network,
    loss: Callable[[PyTree, PyTree, Any, Key, Any], LossOutput],
    policy: Policy,
    optimizer: Optimizer,
    initial_carry: Callable[[int], PyTree] = lambda num_envs: (),
) -> Agent:
    """An agent that descends loss(params, target_params, batch, key, hparams), with a target network.

    The target network moves a fraction target_tau towards the parameters every target_period updates. Where loss or
    gradient are not finite, the learner keeps its parameters from then on and `first_bad_update` says since when.
    """

    def init(key: Key, hparams: Any) -> LearnerState:
        params = network.init(key)
        # A copy: donating a state whose leaves alias one another fails.
        target_params = jax.tree.map(jnp.copy, params)
        return LearnerState(params, target_params, optimizer(hparams).init(params), jnp.int32(0), jnp.int32(-1))

    def gradient(learner: LearnerState, batch: Any, key: Key, hparams: Any) -> tuple[PyTree, LossOutput]:
        def scalar_loss(params: PyTree) -> tuple[Array, LossOutput]:
            output = loss(params, learner.target_params, batch, key, hparams)
            return output.loss, output

        return jax.grad(scalar_loss, has_aux=True)(learner.params)

    def apply(learner: LearnerState, gradients: PyTree, loss: Array, hparams: Any) -> tuple[LearnerState, Array]:
        updates = learner.updates + 1
        gradient_norm = optax.global_norm(gradients)
        bad = jnp.logical_not(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
        first_bad = jnp.where(bad & (learner.first_bad_update < 0), updates, learner.first_bad_update)
        healthy = first_bad < 0

        # A frozen learner takes steps of size 0 along a gradient of 0: one select, not one for each array it keeps.
        scale = jnp.minimum(1.0, hparams.max_grad_norm / gradient_norm)
        gradients = jax.tree.map(lambda g: jnp.where(healthy, g * scale, 0.0), gradients)
        end = hparams.learning_rate * hparams.learning_rate_end
        rate = linear_schedule(hparams.learning_rate, end, hparams.learning_rate_updates, learner.updates)
        annealed = hparams._replace(learning_rate=jnp.where(healthy, rate, 0.0))
        steps, opt_state = optimizer(annealed).update(gradients, learner.opt_state, learner.params)
        params = optax.apply_updates(learner.params, steps)

        due = healthy & (updates.astype(jnp.float32) % hparams.target_period < 1.0)
        mix = jnp.where(due, hparams.target_tau, 0.0)
        target_params = jax.tree.map(lambda p, t: mix * p + (1.0 - mix) * t, params, learner.target_params)
        return LearnerState(params, target_params, opt_state, updates, first_bad), gradient_norm

    return Agent(init, initial_carry, policy.act, policy.greedy, gradient, apply)
