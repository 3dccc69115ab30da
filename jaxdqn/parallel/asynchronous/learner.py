"""What the learner of an actor-learner scheme is and computes: axes, state, and compiled programs.

Its replay has a region for each actor, to which full local replays move; the loops over the programs are in
`actor_learner`.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn import agents, training
from jaxdqn.base import Array, Key, LearnerState, PyTree, Replay
from jaxdqn.components import Components, make_regions
from jaxdqn.config import INT32_MAX, Config, HParams, replay_rows
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous.actor import Actor, Local, start_actor
from jaxdqn.parallel.compiled.memory import once_each, tree_bytes
from jaxdqn.parallel.compiled.runner import EXPERIENCE_STREAM, PARAMS_STREAM, Program
from jaxdqn.timeline import timeline


class Axes(NamedTuple):
    """How actors and learner are coupled."""

    workers: int = 4
    """N, actors."""
    merge_every: int = 8
    """M, iterations after which a local replay moves to the learner's."""
    broadcast_every: int = 8
    """K, gradient updates between two broadcasts of parameters."""
    coupling: Literal["lockstep", "async"] = "lockstep"
    """Deterministic, in one thread, or a thread for each actor."""
    lag: int = 0
    """In lockstep: broadcasts by which parameters are late, 0 or 1."""
    slack: int = 32
    """Async: iterations by which actors and learner may be ahead of each other."""
    max_lag: int = 0
    """Async: oldest parameters, in broadcasts, that experience may come from (older blocks are dropped and counted); 0
    for no limit."""


class ActorLearnerState(NamedTuple):
    """`merged` [N] counts the rows of each region; `broadcast` are the parameters the actors have or get next, oldest
    first (lag + 1 of them), and `version` [] counts the broadcasts so far."""

    learner: LearnerState
    actors: tuple[Actor, ...]
    replay: PyTree
    merged: Array
    broadcast: tuple[PyTree, ...]
    version: Array
    key: Key


class Programs(NamedTuple):
    """The learner's compiled functions."""

    first: Program
    zeros: Program
    insert: Program
    cut: Program
    learn: Program
    copy: Program


def check(axes: Axes, config: Config) -> None:
    """Raises `UserError` for axes that cannot work, in words and with the numbers."""
    for name in ("merge_every", "broadcast_every", "slack"):
        if getattr(axes, name) < 1:
            raise UserError(f"{name} is {getattr(axes, name)}; it must be at least 1.")
    if axes.lag not in (0, 1):
        raise UserError(f"lag is {axes.lag}; in lockstep it is 0 or 1.")
    if axes.coupling == "async" and axes.lag:
        raise UserError(f"lag {axes.lag} is for lockstep; async actors are late by themselves, see max_lag.")
    if axes.coupling == "lockstep" and axes.max_lag:
        raise UserError(f"max_lag {axes.max_lag} is for async; in lockstep, lag says how late the actors are.")
    if config.num_envs % axes.workers:
        nearest = max(1, round(config.num_envs / axes.workers)) * axes.workers
        raise UserError(f"num_envs {config.num_envs} cannot be divided over {axes.workers} actors; use {nearest}, say.")
    if agents.replay_of(config).newest_only:
        raise UserError(
            f"agent {config.agent!r} with replay {config.replay!r} learns from the latest block, and actors fill a "
            "replay; use --replay uniform or, for on-policy agents, --parallel a3c."
        )
    if axes.slack < axes.merge_every:
        raise UserError(f"slack {axes.slack} is below merge_every {axes.merge_every}: the learner would wait forever.")
    rows = axes.merge_every * config.rollout_length
    if rows > replay_rows(config):
        raise UserError(
            f"merge_every {axes.merge_every} x rollout_length {config.rollout_length} rows do not fit the replay of "
            f"{replay_rows(config)} rows; lower merge_every or raise replay_capacity."
        )
    line = timeline(config)
    most = line.total * axes.workers * config.rollout_length
    if axes.coupling == "async" and most >= INT32_MAX:
        raise UserError(
            f"one actor may act for all of them, {most:,} rows, and counters end at {INT32_MAX}; lower total_steps or "
            "raise num_envs."
        )
    if axes.broadcast_every > line.updates(line.total, config.updates_per_iteration):
        raise UserError(
            f"broadcast_every {axes.broadcast_every} is more than the run's gradient updates: the actors would never "
            "see what is learned."
        )
    # To the learner's replay a merge is a block.
    merges = dataclasses.replace(config, rollout_length=rows)
    needed = -(-agents.rows_needed(merges) // rows) * axes.merge_every
    if line.prefill < needed:
        steps = needed * config.num_envs * config.rollout_length
        raise UserError(
            f"learning_starts {config.learning_starts} ends before the first local replay is merged; raise it to at "
            f"least {steps}, or lower merge_every {axes.merge_every}."
        )


def global_replay(components: Components, axes: Axes) -> Replay:
    """The learner's replay: one region for each actor, of whole merges. Raises `UserError`."""
    return make_regions(components, axes.workers, axes.merge_every * components.config.rollout_length)


def state_bytes(components: Components, axes: Axes) -> tuple[int, int]:
    """Bytes of the whole state, and of the replays in it, the learner's and the local ones."""
    state = jax.eval_shape(functools.partial(first_state, components, axes), 0, components.agent.defaults)
    return tree_bytes(state), tree_bytes((state.replay, [each.local for each in state.actors]))


def first_state(components: Components, axes: Axes, seed: Array, hparams: HParams) -> ActorLearnerState:
    """Actor i's stream is that of shard i of a data-parallel agent: one actor acts as the fused loop does."""
    key = jax.random.key(seed)
    experience = jax.random.fold_in(key, EXPERIENCE_STREAM)
    streams = [jax.random.fold_in(experience, index) for index in range(axes.workers)]
    learner = components.agent.init(jax.random.fold_in(key, PARAMS_STREAM), hparams)
    return ActorLearnerState(
        learner=learner,
        actors=tuple(start_actor(components, axes.workers, axes.merge_every, stream) for stream in streams),
        replay=global_replay(components, axes).init(),
        merged=jnp.zeros(axes.workers, jnp.int32),
        broadcast=tuple(jax.tree.map(jnp.copy, learner.params) for _ in range(axes.lag + 1)),
        version=jnp.int32(0),
        key=jnp.copy(jax.random.split(streams[0])[0]),
    )


@once_each
def compile_learner(components: Components, axes: Axes) -> Programs:
    config = components.config
    memory, rows = global_replay(components, axes), axes.merge_every * config.rollout_length
    updates = training.make_learn(components.agent, memory, config)

    def insert(data: PyTree, merged: Array, local: Local, index: Array, hparams: HParams) -> tuple[PyTree, Array]:
        data = memory.add(data, local.block, (index, merged[index]), hparams, local.priorities)
        return data, merged.at[index].add(rows)

    def cut(data: PyTree, merged: Array, index: Array) -> PyTree:
        assert memory.cut  # of a replay with regions
        return memory.cut(data, (index, merged[index]))

    def learn(
        learner: LearnerState,
        data: PyTree,
        sums: training.Sums,
        merged: Array,
        key: Key,
        hparams: HParams,
        iteration: Array,
    ) -> tuple[LearnerState, PyTree, training.Sums]:
        _, sample_key = training.stream_keys(key, iteration)
        return updates(learner, data, sums, sample_key, merged, iteration, hparams)

    return Programs(
        first=jax.jit(functools.partial(first_state, components, axes)),
        zeros=jax.jit(lambda _: training.zero_metrics(components.agent, components.replay, config)),
        insert=jax.jit(insert, donate_argnums=(0, 1)),
        cut=jax.jit(cut, donate_argnums=(0,)),
        learn=jax.jit(learn, donate_argnums=(0, 1, 2)),
        copy=jax.jit(lambda params: jax.tree.map(jnp.copy, params)),
    )
