"""What agents that learn distributions of returns share: which of a network's outputs a transition is about."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdqn import masks
from jaxdqn.base import Apply, Array, Batch, Distribution, Key, Network, PyTree
from jaxdqn.config import HParams
from jaxdqn.exploration import greedy


def of_action(outputs: Array, action: Array) -> Array:
    """Those of one action in each row: of outputs [B, A, K] and action [B], [B, K]."""
    return jnp.take_along_axis(outputs, action[:, None, None], axis=1)[:, 0]


def taken_and_greedy(
    network: Network,
    mean: Callable[[Array], Array],
    double: bool,
    params: PyTree,
    target_params: PyTree,
    batch: Batch,
    key: Key,
) -> tuple[Array, Array]:
    """Outputs [B, K] for the action that was taken, and the target network's for the greedy one of the bootstrap.

    mean(outputs [B, A, K]) -> values [B, A]. The greedy action is the target network's, or with `double` the online
    network's (van Hasselt et al., 2016).
    """
    online_key, target_key, selector_key = jax.random.split(key, 3)
    taken = of_action(network.apply(params, batch.observation, online_key), batch.action)
    outputs = network.apply(target_params, batch.bootstrap_observation, target_key)
    selector = network.apply(params, batch.bootstrap_observation, selector_key) if double else outputs
    values = masks.masked(mean(selector), masks.legal_of(batch.bootstrap_observation))
    return taken, jax.lax.stop_gradient(of_action(outputs, greedy(values)))


def equally_likely(quantiles: Apply) -> Distribution:
    """Of the quantiles [N, A, K] at midpoints each stands for as much as another."""

    def distribution(params: PyTree, observation: PyTree, hparams: HParams) -> tuple[Array, Array]:
        del hparams
        z = quantiles(params, observation)
        return z, jnp.full_like(z, 1 / z.shape[-1])

    return distribution
