"""Partitions of a state space by ranges, grids and clusters: what a person may give a partitioned agent as its owners.

A region function has the form of an owner, with more regions than owners; `assigned` hands its regions out, and `pack`
says to whom, so that all have the same load.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting
from jaxdqn.agents.multi.ownership import Owner, flat, loads
from jaxdqn.agents.random import random
from jaxdqn.base import Array, Environment, Key, Network


def state_ranges(num_states: int, num_owners: int) -> Owner:
    """For one-hot states [S]: equally long ranges of consecutive states."""
    return lambda observation: (jnp.argmax(flat(observation)) * num_owners // num_states).astype(jnp.int32)


def grid(low: Sequence[float], high: Sequence[float], bins: Sequence[int], dimensions: Sequence[int]) -> Owner:
    """Cells of a grid over the chosen `dimensions` of the flattened observation, prod(bins) of them, row-major.

    Each dimension is cut between `low` and `high` into `bins` equal intervals; what lies outside goes to the outermost.
    """
    lows, highs, counts = (np.asarray(x, np.float32) for x in (low, high, bins))
    strides = np.array([np.prod(bins[i + 1 :]) for i in range(len(bins))], np.int32)

    def owner(observation: Array) -> Array:
        position = (flat(observation)[jnp.asarray(dimensions)] - lows) / (highs - lows)
        cell = jnp.clip(jnp.floor(position * counts), 0, counts - 1).astype(jnp.int32)
        return jnp.sum(cell * strides)

    return owner


def nearest(centroids: Array, scale: Array | float = 1.0) -> Owner:
    """The nearest of `centroids` [K, D] in Euclidean distance, after division by `scale` [D]."""

    def owner(observation: Array) -> Array:
        distances = jnp.sum(jnp.square((flat(observation) - centroids) / scale), axis=-1)
        return jnp.argmin(distances).astype(jnp.int32)

    return owner


def assigned(region: Owner, assignment: Sequence[int] | np.ndarray) -> Owner:
    """Region r belongs to owner assignment[r]."""
    table = np.asarray(assignment, np.int32)
    return lambda observation: jnp.asarray(table)[region(observation)]


def pack(visits: Sequence[float] | np.ndarray, num_owners: int) -> np.ndarray:
    """An owner for each region, int32 [R], so that loads are even: the largest region to the least loaded, and so on.

    The largest load is at most (4/3 - 1/(3K)) of the best possible. Graham (1969), "LPT".
    """
    assignment, loads, held = np.zeros(len(visits), np.int32), np.zeros(num_owners), np.zeros(num_owners, int)
    for region in np.argsort(-np.asarray(visits, float), kind="stable"):
        # Among equal loads the one with fewest regions, so that regions nobody has visited yet are spread too.
        chosen = np.lexsort((held, loads))[0]
        assignment[region] = chosen
        loads[chosen] += visits[region]
        held[chosen] += 1
    return assignment


def kmeans(observation: Array, num_centroids: int, key: Key, rounds: int = 20) -> Owner:
    """`nearest` of the centroids that Lloyd's algorithm (1982) finds for observations [B, *O], B >= num_centroids.

    Distances are in standard deviations of each dimension. A centroid that is nearest to none stays where it is.
    """
    points = jax.vmap(flat)(observation)
    deviation = jnp.std(points, axis=0)
    scale = jnp.where(deviation > 0, deviation, 1.0)
    start = points[jax.random.choice(key, points.shape[0], (num_centroids,), replace=False)]

    def move(_: int, centroids: Array) -> Array:
        region = jax.vmap(nearest(centroids, scale))(points)
        belongs = (region[:, None] == jnp.arange(num_centroids)).astype(jnp.float32)  # [B, K]
        count = jnp.sum(belongs, axis=0)[:, None]
        return jnp.where(count > 0, belongs.T @ points / jnp.maximum(count, 1.0), centroids)

    return nearest(jax.lax.fori_loop(0, rounds, move, start), scale)


def random_observations(environment: Environment, num_envs: int, length: int, key: Key) -> Array:
    """What a uniformly random policy sees, [length * num_envs, *O]."""
    spec = environment.spec
    zeros = lambda params, observation, key=None: jnp.zeros((len(observation), spec.num_actions))  # noqa: E731
    agent = random(Network(lambda key: (), zeros))
    start_key, rollout_key = jax.random.split(key)
    state = acting.start(environment, agent, num_envs, start_key)
    _, block, _ = acting.rollout(environment, agent, (), state, rollout_key, jnp.ones(num_envs), length)
    return block.observation.reshape(-1, *spec.observation.shape)


def balanced(observation: Array, num_owners: int, regions_each: int, key: Key) -> Owner:
    """K owners of about equal load on observations [B, *O]: K * regions_each regions by `kmeans`, handed out by `pack`.

    More regions even the load out better, and cut an owner's part of the space into more pieces.
    """
    num_regions = num_owners * regions_each
    region = kmeans(observation, num_regions, key)
    return assigned(region, pack(np.asarray(loads(region, num_regions, observation)), num_owners))
