"""Actors with local replays and one learner: the classic parallel DQN, Gorila's and Ape-X's shape.

N actors, each with its own environments, key, epsilons and local replay D_i of M iterations. A full D_i moves, in its
order, into the actor's region of the learner's replay; the learner samples and updates there; every K updates the
actors get its parameters. Nair et al. (2015); Horgan et al. (2018).

Two couplings over the same three programs (act, insert, learn). `lockstep`: one thread, deterministic, with parameters
that reach the actors `lag` broadcasts late. `async`: a thread for each actor and the calling thread as the learner.
An iteration is one rollout of all actors and U updates in both, so that schedules and budgets mean the same.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import replay, training
from jaxdqn.base import Array, Key, LearnerState, PyTree, Transition
from jaxdqn.config import INT32_MAX, Config, HParams, learns_from_latest, replay_rows, timeline
from jaxdqn.environments import registry
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous import actor, couplings, telemetry
from jaxdqn.parallel.asynchronous.actor import Actor, Node
from jaxdqn.parallel.asynchronous.engine import Engine, remake
from jaxdqn.parallel.asynchronous.telemetry import LAGS, Seen, rollouts_of
from jaxdqn.parallel.asynchronous.workers import WorkerPool
from jaxdqn.parallel.compiled.memory import tree_bytes
from jaxdqn.parallel.compiled.runner import (
    EXPERIENCE_STREAM,
    PARAMS_STREAM,
    Components,
    Runner,
    greedy_episodes,
    of_scheme,
    on_one,
    over_members,
)


class Axes(NamedTuple):
    """How actors and learner are coupled.

    num_actors: N; merge_every: M, iterations a local replay holds; broadcast_every: K, gradient updates between two
    broadcasts; coupling: "lockstep" or "async"; lag: broadcasts by which lockstep parameters are late, 0 or 1; slack:
    iterations by which async actors and learner may be ahead of each other; max_lag: oldest parameters, in broadcasts,
    that an async actor's experience may come from (older blocks are dropped and counted), 0 for any.
    """

    num_actors: int = 4
    merge_every: int = 8
    broadcast_every: int = 8
    coupling: str = "lockstep"
    lag: int = 0
    slack: int = 32
    max_lag: int = 0


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
    """The learner's compiled functions, each of [1, 1, ...] arrays."""

    insert: Any
    cut: Any
    learn: Any
    copy: Any


def validate(config: Config, axes: Axes) -> None:
    """Raises `UserError` for axes that cannot work, in words and with the numbers."""
    for name in ("num_actors", "merge_every", "broadcast_every", "slack"):
        value = getattr(axes, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if axes.max_lag < 0:
        raise UserError(f"max_lag is {axes.max_lag}; it must be at least 0 (0: no limit).")
    if axes.coupling not in ("lockstep", "async"):
        raise UserError(f"coupling is {axes.coupling!r}; it is 'lockstep' or 'async'.")
    if axes.lag not in (0, 1):
        raise UserError(f"lag is {axes.lag}; in lockstep it is 0 or 1.")
    if axes.coupling == "async" and axes.lag:
        raise UserError(f"lag {axes.lag} is for lockstep; async actors are late by themselves, see max_lag.")
    if axes.coupling == "lockstep" and axes.max_lag:
        raise UserError(f"max_lag {axes.max_lag} is for async; in lockstep, lag says how late the actors are.")
    if config.num_envs % axes.num_actors:
        nearest = max(1, round(config.num_envs / axes.num_actors)) * axes.num_actors
        raise UserError(
            f"num_envs {config.num_envs} cannot be divided over {axes.num_actors} actors; use {nearest}, say."
        )
    if learns_from_latest(config):
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
    most = line.total * axes.num_actors * config.rollout_length
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
    needed = -(-config.n_step // rows) * axes.merge_every
    if line.prefill < needed:
        steps = needed * config.num_envs * config.rollout_length
        raise UserError(
            f"learning_starts {config.learning_starts} ends before the first local replay is merged; raise it to at "
            f"least {steps}, or lower merge_every {axes.merge_every}."
        )


def global_replay(components: Components, axes: Axes) -> Any:
    """The learner's replay: one region for each actor, of whole merges."""
    config = components.config
    example = training.transition_example(components.environment, components.agent, HParams())
    block = axes.merge_every * config.rollout_length
    rows = -(-replay_rows(config) // block) * block
    each = config.num_envs // axes.num_actors
    return replay.regions(example, rows, axes.num_actors, each, config.batch_size, config.n_step)


def build(
    components: Components,
    devices: Sequence[jax.Device],
    seeds: Sequence[int],
    settings: Sequence[HParams],
    axes: Axes,
    report: Callable[[str], None] = print,
    fault_hook: Callable[[int, int], None] | None = None,
    engine: Engine | None = None,
) -> tuple[Runner, list[ActorLearnerState]]:
    """The runner of one member. The learner has the first device; async actors share the others, where there are any,
    or live with an `engine` in processes of their own.

    `fault_hook(actor, acted)` is called before an async actor's every rollout: tests make it sleep or fail. Raises
    `UserError`.
    """
    validate(components.config, axes)
    runner, states = of_scheme(
        lambda: Scheme(components, devices, settings[0], axes, report, fault_hook, engine), seeds[0]
    )
    return runner._replace(adopted=adopted), states


def state_bytes(components: Components, axes: Axes) -> tuple[int, int]:
    """Bytes of the whole state, and of the replays in it, the learner's and the local ones."""
    state = jax.eval_shape(functools.partial(first_state, components, axes), 0, HParams())
    return tree_bytes(state), tree_bytes((state.replay, [each.local for each in state.actors]))


def adopted(states: list[ActorLearnerState]) -> list[ActorLearnerState]:
    """The same with broadcasts of the learner's parameters."""
    # Copies: the learner's own are donated to its next update.
    return [s._replace(broadcast=tuple(jax.tree.map(jnp.copy, s.learner.params) for _ in s.broadcast)) for s in states]


def make_node(config: Config, factory: Callable[..., Any] | None, axes: Axes, hparams: Any, index: int) -> Node:
    """An actor in a process of its own; `factory` makes its environment where that is a user's."""
    components = remake(config, factory)
    programs = actor.compile_programs(components, axes.num_actors, axes.merge_every, jax.devices()[0])
    return Node(programs, hparams, index, axes.merge_every)


def first_state(components: Components, axes: Axes, seed: Array, hparams: Any) -> ActorLearnerState:
    """Actor i's stream is that of shard i of a data-parallel agent: one actor acts as the fused loop does."""
    key = jax.random.key(seed)
    experience = jax.random.fold_in(key, EXPERIENCE_STREAM)
    streams = [jax.random.fold_in(experience, index) for index in range(axes.num_actors)]
    learner = components.agent.init(jax.random.fold_in(key, PARAMS_STREAM), hparams)
    return ActorLearnerState(
        learner=learner,
        actors=tuple(actor.start(components, axes.num_actors, axes.merge_every, stream) for stream in streams),
        replay=global_replay(components, axes).init(),
        merged=jnp.zeros(axes.num_actors, jnp.int32),
        broadcast=tuple(jax.tree.map(jnp.copy, learner.params) for _ in range(axes.lag + 1)),
        version=jnp.int32(0),
        key=jnp.copy(jax.random.split(streams[0])[0]),
    )


class Scheme:
    """The programs, the nodes, and what the couplings need beside the state."""

    state_type = ActorLearnerState

    def __init__(
        self,
        components: Components,
        devices: Sequence[jax.Device],
        hparams: HParams,
        axes: Axes,
        report: Callable[[str], None],
        fault_hook: Callable[[int, int], None] | None,
        engine: Engine | None,
    ) -> None:
        self.components, self.axes, self.fault_hook = components, axes, fault_hook
        self.config = components.config
        self.devices = devices
        self.actor_devices = list(devices[1:]) or list(devices)
        self.hparams = over_members(hparams)
        self.pool = WorkerPool(axes.num_actors, report)
        self.seen = Seen(
            (*LAGS, "dropped", *rollouts_of(axes.num_actors)), ("actor_wait", "queue_wait", "learner_wait", "running")
        )
        self.acting = actor.compile_programs(components, axes.num_actors, axes.merge_every, devices[0])
        self.programs = self._learning()
        self.program = self.programs.learn
        self.judge = self._single(functools.partial(greedy_episodes, components), 2, 2)
        zero = self._single(lambda _: training.zero_metrics(components.agent, components.replay, self.config), 1)
        seen = telemetry.zeros(self.seen.take()) if axes.coupling == "async" else {}
        self.zero_metrics = zero(self.hparams.gamma)._replace(seen=seen)
        self.apart = engine is not None
        indices = range(axes.num_actors)
        if engine is None:
            placed = [jax.device_put(self.hparams, self.device_of(index)) for index in indices]
            self.nodes = [Node(self.acting, placed[index], index, axes.merge_every) for index in indices]
        else:
            recipe = self.config, registry.factory(self.config.env), axes, self.hparams
            self.nodes = [engine.spawn(make_node, *recipe, index) for index in indices]

    def _single(self, *args: Any, **options: Any) -> Any:
        return on_one(self.devices[0], *args, **options)

    def device_of(self, index: int) -> jax.Device:
        """Where an actor in this process acts."""
        return self.actor_devices[index % len(self.actor_devices)]

    def init(self, seed: int) -> ActorLearnerState:
        """The run's first state."""
        make = self._single(functools.partial(first_state, self.components, self.axes), 2)
        state: ActorLearnerState = make(np.full((1, 1), seed, np.uint32), self.hparams)
        return state

    def _learning(self) -> Programs:
        memory, rows = global_replay(self.components, self.axes), self.axes.merge_every * self.config.rollout_length
        updates = training.make_learn(self.components.agent, memory, self.config)
        each = self.config.num_envs // self.axes.num_actors

        def insert(data: PyTree, merged: Array, local: Transition, index: Array) -> tuple[PyTree, Array]:
            return memory.add(data, local, (index, merged[index])), merged.at[index].add(rows)

        def cut(episode_end: Array, merged: Array, index: Array) -> Array:
            return replay.cut(episode_end, merged[index], index * each, each)

        def learn(
            learner: LearnerState, data: PyTree, sums: Any, merged: Array, key: Key, hparams: Any, iteration: Array
        ) -> tuple[LearnerState, PyTree, Any]:
            _, sample_key = training.stream_keys(key, iteration)
            return updates(learner, data, sums, sample_key, merged, iteration, hparams)

        return Programs(
            insert=self._single(insert, 3, 1, donate=(0, 1)),
            cut=self._single(cut, 2, 1, donate=(0,)),
            learn=self._single(learn, 6, 1, donate=(0, 1, 2)),
            copy=self._single(lambda params: jax.tree.map(jnp.copy, params), 1),
        )

    def warm_up(self, state: ActorLearnerState) -> None:
        """Compiles every program, on copies; in all processes at once."""
        state, metrics = jax.tree.map(jnp.copy, (state, self.zero_metrics))

        def warm(index: int) -> None:
            params, first = jax.tree.map(jnp.copy, (state.broadcast[0], state.actors[0]))
            if not self.apart:
                params, first = jax.device_put((params, first), self.device_of(index))
            self.nodes[index].begin(first)
            for learning in (False, True):
                self.nodes[index].act(params, 0, 0, learning)

        # Threads wait for processes; in this one the first actor of a device compiles for all of them.
        count = self.axes.num_actors if self.apart else min(self.axes.num_actors, len(self.actor_devices))
        with ThreadPoolExecutor() as pool:
            list(pool.map(warm, range(count)))
        local = jax.tree.map(jnp.copy, state.actors[0].local)
        data, merged = self.programs.insert(state.replay, state.merged, local, np.int32(0))
        data = data._replace(episode_end=self.programs.cut(data.episode_end, merged, np.int32(0)))
        self.programs.learn(state.learner, data, metrics.learning, merged, state.key, self.hparams, np.int32(0))
        jax.block_until_ready(self.programs.copy(state.broadcast[0]))

    def telemetry(self, states: list[ActorLearnerState]) -> dict[str, Any]:
        """`bytes_per_update` counts broadcasts to every actor and the experience that moves to the learner."""
        params, local = tree_bytes(states[0].broadcast[0]), tree_bytes(states[0].actors[0].local)
        per_iteration = self.axes.num_actors * local / self.axes.merge_every
        moved = self.axes.num_actors * params / self.axes.broadcast_every
        moved += per_iteration / self.config.updates_per_iteration
        if self.axes.coupling == "lockstep":
            return {"bytes_per_update": moved}
        return {"bytes_per_update": moved, "dead_workers": self.pool.num_dead}

    def run(
        self,
        states: list[ActorLearnerState],
        metrics: list[training.Metrics],
        start: int,
        stop: int,
        learning: bool,
    ) -> tuple[list[ActorLearnerState], list[training.Metrics]]:
        """Iterations start <= i < stop."""
        # The sums are donated, and the zeros they start from are not ours to give away.
        chunk = couplings.Chunk(self, states[0], jax.tree.map(jnp.copy, metrics[0]), learning)
        (chunk.asynchronous if self.axes.coupling == "async" else chunk.lockstep)(start, stop)
        return [chunk.state()], [chunk.metrics()]
