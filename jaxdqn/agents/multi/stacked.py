"""K learners side by side: parameters with a leading axis [K], each initialised, clipped and stepped on its own.

What ensembles (`ensemble.py`) and state partitions (`partitioned.py`) have in common.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxdqn.base import Agent, Array, Key, LearnerState, Network, PyTree
from jaxdqn.config import HParams, traced
from jaxdqn.learning import Optimizer


def keys(key: Key, num: int) -> Key:
    """A key [num] for each learner, the first being `key` itself, so that a stack of one starts as the one."""
    return jnp.concatenate([key[None], jax.random.split(key, num)[1:]])


def initialiser(network: Network, num: int) -> Callable[[Key], PyTree]:
    """init(key) -> params [num, ...] of `num` independently initialised networks."""
    return lambda key: jax.vmap(network.init)(keys(key, num))


def over_stack(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A function of one learner, for K: run(*args [K, ...]) -> [K, ...]; vmapped, but for K = 1 as it is."""

    def run(*args: PyTree) -> PyTree:
        if size(args) > 1:
            return jax.vmap(function)(*args)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args)))

    return run


def apply(network: Network, params: PyTree, observation: PyTree, key: Key | None) -> Array:
    """What each of K networks, params [K, ...], makes of observation [B, *O]: [K, B, ...]. One key serves all."""
    return over_stack(lambda one: network.apply(one, observation, key))(params)


def size(stack: PyTree) -> int:
    """K, of arrays [K, ...]."""
    return int(jax.tree.leaves(stack)[0].shape[0])


def each(optimizer: Optimizer) -> Optimizer:
    """`optimizer` for each learner alone: its state, step counts included, is [K, ...]."""

    def build(hparams: HParams) -> optax.GradientTransformation:
        one = optimizer(hparams)
        return optax.GradientTransformation(over_stack(one.init), over_stack(one.update))

    return build


def unless_zero(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, but a gradient that is zero throughout changes neither parameters nor optimizer state.

    That is the gradient of a learner without data, which Adam would keep moving along its old moments. It is seen from
    the gradient and not from a count of rows, because the gradient is what every parallel mode reduces and sends.
    """

    def build(hparams: HParams) -> optax.GradientTransformation:
        one = optimizer(hparams)

        def update(gradients: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
            touched = jnp.any(jnp.array([jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients)]))
            steps, moved = one.update(gradients, state, params)
            steps = jax.tree.map(lambda step: jnp.where(touched, step, 0), steps)
            return steps, jax.tree.map(lambda new, old: jnp.where(touched, new, old), moved, state)

        return optax.GradientTransformation(one.init, update)

    return build


def clip_each(agent: Agent) -> Agent:
    """`agent`, with the norm of each learner's gradient bounded by itself: none shortens another's step.

    The gradient norm it reports is that of all, as before. One learner that is not finite stops all.
    """

    def apply(learner: LearnerState, gradients: PyTree, loss: Array, hparams: HParams) -> tuple[LearnerState, Array]:
        if size(gradients) == 1:
            return agent.apply(learner, gradients, loss, hparams)

        def clip(gradient: PyTree) -> tuple[PyTree, Array]:
            norm = optax.global_norm(gradient)
            return jax.tree.map(lambda g: g * jnp.minimum(1.0, hparams.max_grad_norm / norm), gradient), norm

        clipped, norms = over_stack(clip)(gradients)
        # A norm that overflows would be clipped to 0 and pass for a finite one.
        loss = jnp.where(jnp.all(jnp.isfinite(norms)), loss, jnp.nan)
        learner, _ = agent.apply(learner, clipped, loss, traced(hparams, max_grad_norm=jnp.inf))
        return learner, optax.global_norm(norms)

    return agent._replace(apply=apply)
