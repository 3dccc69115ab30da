"""What `--telemetry` measures: how much of the network is in use, and what the replay would draw now."""

import math

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Key, Progress, PyTree, SequenceBatch
from jaxdqn.components import Components
from jaxdqn.config import HParams
from jaxdqn.training import TrainState

LEAST_ROWS = 256
KEY = 0x74656C65  # far from what training draws of the same key
COLUMNS = ("dormant_units", "effective_rank", "replay_age", "priorities_below_")
"""How the names of what `measure` gives begin."""


def dormant_units(features: Array, threshold: float = 0.025) -> Array:
    """The fraction of units, features [B, F], whose mean absolute activation is at most `threshold` times the layer's.

    Sokar et al. (2023), definition 1; a layer that is 0 throughout is dormant.
    """
    activity = jnp.mean(jnp.abs(features), axis=0)
    return jnp.mean(activity <= threshold * jnp.mean(activity))


def effective_rank(features: Array, delta: float = 0.01) -> Array:
    """The smallest k such that the k largest singular values of features [B, F] sum to at least 1 - delta of all.

    srank of Kumar et al. (2021), section 3; at most min(B, F), and 0 for zeros.
    """
    # Not from eigenvalues of the product with itself: in float32 the small ones, which the sum is about, are noise.
    values = jnp.linalg.svd(features, compute_uv=False)
    before = jnp.cumsum(values) - values
    return jnp.sum(before < (1 - delta) * jnp.sum(values)).astype(jnp.float32)


def drawn(components: Components, ring: PyTree, key: Key, progress: Progress, hparams: HParams) -> PyTree:
    """The observations [B, *O] of as many of the replay's batches as have at least LEAST_ROWS rows, all rows of
    sequences being rows."""

    def draw(key: Key, turn: Array) -> PyTree:
        batch = components.replay.sample(ring, key, progress._replace(turn=turn), hparams)
        return batch.transitions.observation if isinstance(batch, SequenceBatch) else batch.observation

    one = components.environment.spec.observation
    (shape, *_), (array, *_) = (jax.tree.leaves(x) for x in (one, jax.eval_shape(draw, key, jnp.int32(0))))
    count = math.ceil(LEAST_ROWS * math.prod(shape.shape) / array.size)
    batches = jax.vmap(draw)(jax.random.split(key, count), jnp.arange(count))
    return jax.tree.map(lambda x, like: x.reshape(-1, *like.shape), batches, one)


def measure(
    components: Components, state: TrainState, iteration: Array, hparams: HParams, shards: int = 1
) -> dict[str, Array]:
    """Scalars by column, of one of an agent's `shards` after `iteration` iterations, the prefill being done.

    dormant_units and effective_rank are those of what the mean network makes of batches that the replay draws, NaN
    where that is not finite; without them where the agent has no `features`. replay_age is in environment steps of all
    shards. Nothing in `state` changes, nor is a key used that training uses.
    """
    config, agent, replay = components.config, components.agent, components.replay
    progress = Progress(iteration * config.rollout_length, state.learner.updates, jnp.int32(0))
    columns: dict[str, Array] = {}
    if agent.features is not None:
        key = jax.random.fold_in(jax.random.fold_in(state.key, KEY), iteration)
        features = agent.features(state.learner.params, drawn(components, state.replay, key, progress, hparams))
        found = {"dormant_units": dormant_units(features), "effective_rank": effective_rank(features)}
        known = jnp.all(jnp.isfinite(features))
        columns |= {name: jnp.where(known, value, jnp.nan) for name, value in found.items()}
    if replay.describe is not None:
        columns |= replay.describe(state.replay, progress, hparams)
        columns["replay_age"] *= config.num_envs * shards
    return columns
