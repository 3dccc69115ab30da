"""From a loss to an update: gradient, mean over shards, apply. Devices enter here and nowhere else."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdqn.base import Agent, Array, Key, LearnerState, Loss, LossOutput, Network, Policy, PyTree, Replay, Scalar
from jaxdqn.config import HParams, traced
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
    return jax.lax.pmean(tree, shards.axis_name, axis_index_groups=_groups(shards))


def _groups(shards: Shards) -> list[list[int]] | None:
    return None if shards.groups is None else [list(group) for group in shards.groups]


def over_shards(replay: Replay, shards: Shards | None) -> Replay:
    """`replay` as that of one of an agent's shards: where it weights what it draws, by the largest weight of all, which
    costs a batch an all-reduce of one number."""
    if shards is None or replay.weighted is None:
        return replay
    axis, groups = shards.axis_name, _groups(shards)
    return replay._replace(sample=replay.weighted(lambda x: jax.lax.pmax(x, axis, axis_index_groups=groups)))


def shard_index(shards: Shards | None) -> Array | int:
    """This device's place among the agent's shards."""
    return 0 if shards is None else jax.lax.axis_index(shards.axis_name) % shards.size


def update(
    agent: Agent, learner: LearnerState, batch: PyTree, key: Key, hparams: HParams, shards: Shards | None = None
) -> tuple[LearnerState, LossOutput, Array]:
    """One gradient update: (learner, LossOutput of this shard with the loss of all, gradient norm []).

    The gradient is the mean over shards, clipped after that. Shards hold equal parts of the batch, so that the mean of
    means is the mean.
    """
    gradients, output = agent.gradient(learner, batch, key, hparams)
    gradients, loss = mean_over_shards((gradients, output.loss), shards)
    learner, gradient_norm = agent.apply(learner, gradients, loss, hparams)
    return learner, output._replace(loss=loss), gradient_norm


def centred_rmsprop(learning_rate: Scalar, epsilon: Array, decay: float = 0.95) -> optax.GradientTransformation:
    """RMSProp with the variance of the gradient, g / sqrt(E[g^2] - E[g]^2 + epsilon). Mnih et al. (2015), methods.

    `optax.rmsprop(centered=True)`, but for a variance that rounding makes negative: that counts as 0.
    """

    def init(params: PyTree) -> optax.ScaleByRStdDevState:
        return optax.ScaleByRStdDevState(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(gradients: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, optax.ScaleByRStdDevState]:
        del params
        mean = optax.tree.update_moment(gradients, state.mu, decay, 1)
        square = optax.tree.update_moment(gradients, state.nu, decay, 2)

        def scaled(g: Array, m: Array, s: Array) -> Array:
            return jax.lax.rsqrt(jnp.maximum(s - jnp.square(m), 0.0) + epsilon) * g

        return jax.tree.map(scaled, gradients, mean, square), optax.ScaleByRStdDevState(mean, square)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


Optimizer = Callable[[HParams], optax.GradientTransformation]


def epsilon_or(hparams: HParams, usual: float) -> Array:
    """The optimizer's denominator constant, `usual` where none was chosen."""
    return jnp.where(hparams.optimizer_epsilon > 0, hparams.optimizer_epsilon, jnp.float32(usual))


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": lambda h: optax.adam(h.learning_rate, eps=epsilon_or(h, 1e-8)),
    "adamw": lambda h: optax.adamw(h.learning_rate, eps=epsilon_or(h, 1e-8), weight_decay=h.weight_decay),
    "rmsprop": lambda h: centred_rmsprop(h.learning_rate, epsilon_or(h, 0.01)),
    "radam": lambda h: optax.radam(h.learning_rate, eps=epsilon_or(h, 1e-8)),
}
"""Optimizers are built from `HParams` at trace time, so that their settings are traced; only their state is carried."""


def all_finite(tree: PyTree) -> Array:
    """Whether every number in `tree` is finite, bool []."""
    # A dot product is the cheapest reduction on a CPU; times 1e-30 even the largest numbers have a finite sum.
    sums = [jnp.vdot(leaf, jnp.full_like(leaf, 1e-30)) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(jnp.sum(jnp.array(sums)))


def sgd_agent(
    network: Network,
    loss: Loss,
    policy: Policy,
    optimizer: Optimizer,
    initial_carry: Callable[[int], PyTree] = lambda num_envs: (),
    own: PyTree = (),
) -> Agent:
    """An agent that descends loss(params, target_params, batch, key, hparams), with a target network; `own` are the
    hyperparameters of its own, at their defaults.

    The target network moves a fraction target_tau towards the parameters every target_period updates. Where the loss,
    the gradient or what a step would make of the parameters is not finite, that step is not taken: the learner keeps
    its parameters and target from then on, and `first_bad_update` says since when.
    """

    def init(key: Key, hparams: HParams) -> LearnerState:
        params = network.init(key)
        # A copy: donating a state whose leaves alias one another fails.
        target_params = jax.tree.map(jnp.copy, params)
        return LearnerState(params, target_params, optimizer(hparams).init(params), jnp.int32(0), jnp.int32(-1))

    def gradient(learner: LearnerState, batch: PyTree, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        def scalar_loss(params: PyTree) -> tuple[Array, LossOutput]:
            output = loss(params, learner.target_params, batch, key, hparams)
            return output.loss, output

        return jax.grad(scalar_loss, has_aux=True)(learner.params)

    def apply(learner: LearnerState, gradients: PyTree, loss: Array, hparams: HParams) -> tuple[LearnerState, Array]:
        updates = learner.updates + 1
        gradient_norm = optax.global_norm(gradients)
        healthy = (learner.first_bad_update < 0) & jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

        # Moments are averages of gradients: with 0 for a gradient that is not finite they stay finite.
        scale = jnp.minimum(1.0, hparams.max_grad_norm / gradient_norm)
        gradients = jax.tree.map(lambda g: jnp.where(healthy, g * scale, 0.0), gradients)
        end = hparams.learning_rate * hparams.learning_rate_end
        rate = linear_schedule(hparams.learning_rate, end, hparams.learning_rate_updates, learner.updates)
        annealed = traced(hparams, learning_rate=jnp.where(healthy, rate, 0.0))
        steps, opt_state = optimizer(annealed).update(gradients, learner.opt_state, learner.params)
        moved = optax.apply_updates(learner.params, steps)
        healthy &= all_finite(moved)
        # The target is an average of parameters: finite where they are.
        params = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), moved, learner.params)
        first_bad = jnp.where(healthy | (learner.first_bad_update >= 0), learner.first_bad_update, updates)

        due = healthy & (updates % jnp.asarray(hparams.target_period).astype(jnp.int32) == 0)
        mix = jnp.where(due, hparams.target_tau, 0.0)
        target_params = jax.tree.map(lambda p, t: mix * p + (1.0 - mix) * t, params, learner.target_params)
        return LearnerState(params, target_params, opt_state, updates, first_bad), gradient_norm

    return Agent(
        init,
        initial_carry,
        policy.act,
        policy.greedy,
        gradient,
        apply,
        own=own,
        values=policy.values,
        features=network.features,
    )
