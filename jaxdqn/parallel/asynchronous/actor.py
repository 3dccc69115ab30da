"""Who acts in an asynchronous scheme, and lives in a thread or in a process of its own.

An actor has a local replay: it acts with the parameters it is given, and hands its replay over when that is full. A
worker of a parameter server has a replay of its own: it pulls, acts, computes gradients with that, and pushes.
An `ActorNode` or `WorkerNode` is one of them where it lives.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, agents, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, Batch, Key, LearnerState, Progress, PyTree, Transition
from jaxdqn.components import Components
from jaxdqn.config import Config, HParams
from jaxdqn.parallel.compiled.memory import once_each
from jaxdqn.parallel.compiled.runner import EXPERIENCE_STREAM, PARAMS_STREAM, Program
from jaxdqn.replay.latest import block_batch


class Actor(NamedTuple):
    """One actor. `acted` [] counts its iterations; local [M * T, n, ...] holds the last acted % M of them, in their
    `local_form`, of which the first was made with the parameters of broadcast `begun` []."""

    state: ActorState
    key: Key
    local: Transition
    acted: Array
    begun: Array


class Local(NamedTuple):
    """A full local replay [M * T, n, ...]; and its priorities [M * T, n] as the actor's parameters have them (Horgan et
    al., 2018), where the learner draws single transitions by priority."""

    block: Transition
    priorities: Array | None


class Full(NamedTuple):
    """A full local replay, and the number of the broadcast with which it was begun; `broke` says that it does not
    follow on the one before."""

    local: Local
    begun: int
    broke: bool


class ActorPrograms(NamedTuple):
    """What an actor computes, compiled; and the sums it starts a chunk with.

    broke(index) -> whether an actor's stream broke off right after its last full local replay; asked once
    notes() -> what there is to say since this was asked last
    close(): has done with environments on the host, until the next call
    """

    act: Program
    prefill: Program
    full: Program
    zeros: EpisodeSums
    broke: Callable[[int], bool] = lambda index: False
    notes: Callable[[], list[str]] = list
    close: Callable[[], None] = lambda: None


def start_actor(components: Components, num_actors: int, merge_every: int, stream: Key) -> Actor:
    """An actor at the start of its `stream`, with an empty local replay."""
    key, actor_key = jax.random.split(stream)
    each = components.config.num_envs // num_actors
    example = training.transition_example(components.environment.spec, components.agent)
    rows = merge_every * components.config.rollout_length
    block = jax.tree.map(lambda x: jnp.zeros((rows, each, *x.shape), x.dtype), example)
    local = local_form(components)(block)
    state = acting.start(components.environment, components.agent, each, actor_key)
    return Actor(state, key, local, acted=jnp.int32(0), begun=jnp.int32(0))


def local_form(components: Components) -> Callable[[Transition], Transition]:
    """What an actor holds of a block: what the learner's replay keeps of it, or all where it computes priorities."""
    return (lambda block: block) if _gives_priorities(components) else components.replay.kept


def _gives_priorities(components: Components) -> bool:
    return components.replay.weighted is not None and agents.replay_of(components.config).batch is Batch


def extended(actor: Actor, state: ActorState, block: Transition, merge_every: int) -> Actor:
    """`actor` after one more rollout, whose block [T, n], in its local form, goes into the local replay."""
    row = actor.acted % merge_every * len(block.reward)
    local = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0), actor.local, block)
    return actor._replace(state=state, local=local, acted=actor.acted + 1)


@once_each
def compile_actor(components: Components, num_actors: int, merge_every: int) -> ActorPrograms:
    """The actor's programs; jit compiles them where and when they are first called."""
    config = components.config
    each, form = config.num_envs // num_actors, local_form(components)
    own = dataclasses.replace(config, num_envs=each)
    rollout = training.make_act(components.environment, components.agent, own, config.num_envs)
    random_rollout = training.make_prefill(components.environment, components.agent, own)

    def act(
        params: PyTree, actor: Actor, sums: EpisodeSums, hparams: HParams, iteration: Array, index: Array
    ) -> tuple[Actor, EpisodeSums, Array]:
        key, _ = training.stream_keys(actor.key, actor.acted)
        acted, block, new, epsilon = rollout(params, actor.state, key, iteration, index * each, hparams)
        return extended(actor, acted, form(block), merge_every), jax.tree.map(jnp.add, sums, new), epsilon

    def prefill(
        params: PyTree, actor: Actor, sums: EpisodeSums, hparams: HParams, index: Array
    ) -> tuple[Actor, EpisodeSums]:
        del index  # nothing of it depends on which actor this is
        key, _ = training.stream_keys(actor.key, actor.acted)
        acted, block, new = random_rollout(params, actor.state, key, hparams)
        return extended(actor, acted, form(block), merge_every), jax.tree.map(jnp.add, sums, new)

    def full(params: PyTree, actor: Actor, hparams: HParams) -> Local:
        # A copy: the next rollout is given the original.
        block = jax.tree.map(jnp.copy, actor.local)
        if not _gives_priorities(components):
            return Local(block, None)
        learner = LearnerState(params, params, (), jnp.int32(0), jnp.int32(-1))
        _, key = training.stream_keys(actor.key, actor.acted)
        # Returns end with the local replay. Nobody asks for the gradient, so that it is not computed.
        batch = block_batch(actor.local, config.n_step, hparams)
        _, output = components.agent.gradient(learner, batch, key, hparams)
        return Local(block, output.priorities.reshape(block.reward.shape))

    zero = jax.jit(lambda _: training.zero_metrics(components.agent, components.replay, config).episodes)
    return ActorPrograms(
        act=jax.jit(act, donate_argnums=(1, 2)),
        prefill=jax.jit(prefill, donate_argnums=(1, 2)),
        full=jax.jit(full),
        zeros=zero(np.float32(0)),
    )


class Ended(NamedTuple):
    """An actor after a chunk, its sums of it, and its last epsilon [] (zero where it only acted at random)."""

    actor: Actor
    episodes: EpisodeSums
    epsilon: Array


class ActorNode:
    """One actor and what it did in a chunk of work."""

    def __init__(self, programs: ActorPrograms, hparams: HParams, index: int, merge_every: int) -> None:
        self._programs, self._hparams, self._index, self._merge_every = programs, hparams, index, merge_every

    def begin(self, actor: Actor) -> None:
        """Takes over an actor for a chunk of iterations."""
        self._now = Ended(actor, jax.tree.map(jnp.copy, self._programs.zeros), jnp.float32(0))
        self._acted, self._begun = (int(count) for count in (actor.acted, actor.begun))

    def act(self, params: PyTree, version: int, iteration: int, learning: bool) -> Full | None:
        """One rollout with the parameters of broadcast `version`, into the local replay: that, where it is full now."""
        (actor, episodes, epsilon), index = self._now, np.int32(self._index)
        if learning:
            new = self._programs.act(params, actor, episodes, self._hparams, np.int32(iteration), index)
        else:
            new = *self._programs.prefill(params, actor, episodes, self._hparams, index), epsilon
        # Waited for first: what a failing program returns is nobody's state.
        self._now = Ended(*jax.block_until_ready(new))
        if self._acted % self._merge_every == 0:
            self._begun = version
        self._acted += 1
        if self._acted % self._merge_every:
            return None
        local = self._programs.full(params, self._now.actor, self._hparams)
        return Full(local, self._begun, self._programs.broke(self._index))

    def notes(self) -> list[str]:
        """What there is to say of its environments since this was asked last."""
        return self._programs.notes()

    def close(self) -> None:
        """Has done with environments on the host, until it acts again."""
        self._programs.close()

    def end(self) -> Ended:
        """The actor after the chunk."""
        actor = self._now.actor
        return self._now._replace(actor=actor._replace(begun=jnp.full_like(actor.begun, self._begun)))


class Worker(NamedTuple):
    """One worker. `acted` [] counts its iterations; `opt_state` is () unless it has statistics of its own."""

    state: ActorState
    replay: PyTree
    key: Key
    acted: Array
    opt_state: PyTree


class WorkerPrograms(NamedTuple):
    """What a worker computes, compiled; and the sums it starts a chunk with."""

    act: Program
    prefill: Program
    gradient: Program
    zeros: training.Metrics


class Pushed(Protocol):
    """What a worker needs of a server: see `server.Server`."""

    def pull(self) -> tuple[LearnerState, int]:
        """The learner now, and its version."""

    def push(self, gradients: PyTree, loss: Array, version: int, opt_state: PyTree) -> tuple[Array | None, PyTree]:
        """(gradient norm, or None where the push was too old; the worker's own optimizer state)."""


def start_worker(components: Components, learner: LearnerState, key: Key, index: int, own_statistics: bool) -> Worker:
    """Worker `index` of the run's `key`: its stream is that of shard `index` of a data-parallel agent."""
    stream, actor_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, EXPERIENCE_STREAM), index))
    state = acting.start(components.environment, components.agent, components.config.num_envs, actor_key)
    own = jax.tree.map(jnp.copy, learner.opt_state) if own_statistics else ()
    return Worker(state, components.replay.init(), stream, jnp.int32(0), own)


def first_learner(components: Components, key: Key, hparams: HParams) -> LearnerState:
    """The learner of the run's `key`."""
    return components.agent.init(jax.random.fold_in(key, PARAMS_STREAM), hparams)


@once_each
def compile_worker(components: Components) -> WorkerPrograms:
    """The worker's programs; jit compiles them when they are first called."""
    config = components.config
    rollout = training.make_act(components.environment, components.agent, config, config.num_envs)
    random_rollout = training.make_prefill(components.environment, components.agent, config)

    def store(worker: Worker, state: ActorState, block: PyTree, hparams: HParams) -> Worker:
        ring = components.replay.add(worker.replay, block, worker.acted * config.rollout_length, hparams)
        return worker._replace(state=state, replay=ring, acted=worker.acted + 1)

    def act(
        params: PyTree, worker: Worker, sums: EpisodeSums, hparams: HParams, iteration: Array
    ) -> tuple[Worker, EpisodeSums, Array]:
        key, _ = training.stream_keys(worker.key, worker.acted)
        state, block, new, epsilon = rollout(params, worker.state, key, iteration, 0, hparams)
        return store(worker, state, block, hparams), jax.tree.map(jnp.add, sums, new), epsilon

    def prefill(params: PyTree, worker: Worker, sums: EpisodeSums, hparams: HParams) -> tuple[Worker, EpisodeSums]:
        key, _ = training.stream_keys(worker.key, worker.acted)
        state, block, new = random_rollout(params, worker.state, key, hparams)
        return store(worker, state, block, hparams), jax.tree.map(jnp.add, sums, new)

    def gradient(
        learner: LearnerState, ring: PyTree, key: Key, acted: Array, hparams: HParams, index: Array
    ) -> tuple[PyTree, PyTree, Array, dict[str, Array]]:
        # `acted` counts the rollout just made.
        _, key = training.stream_keys(key, acted - 1)
        sample_key, loss_key = training.stream_keys(key, index)
        progress = Progress(acted * config.rollout_length, learner.updates, index)
        batch = components.replay.sample(ring, sample_key, progress, hparams)
        gradients, output = components.agent.gradient(learner, batch, loss_key, hparams)
        ring = components.replay.update_priorities(ring, batch.indices, output.priorities, hparams)
        return ring, gradients, output.loss, {"loss": output.loss, **output.metrics}

    zero = jax.jit(lambda _: training.zero_metrics(components.agent, components.replay, config))
    # What is pulled is shared with other threads and never donated.
    return WorkerPrograms(
        act=jax.jit(act, donate_argnums=(1, 2)),
        prefill=jax.jit(prefill, donate_argnums=(1, 2)),
        gradient=jax.jit(gradient, donate_argnums=(1,)),
        zeros=zero(np.float32(0)),
    )


class WorkerNode:
    """One worker and what it did in a chunk of work."""

    def __init__(self, programs: WorkerPrograms, hparams: HParams, config: Config) -> None:
        self._programs, self._hparams, self._num_updates = programs, hparams, config.updates_per_iteration
        rows = agents.rows_needed(config)
        self._needed = max(0, -(-rows // config.rollout_length) - 1)  # rollouts before a gradient

    def begin(self, worker: Worker) -> None:
        """Takes over a worker for a chunk of iterations."""
        self.worker = worker
        self._missing = max(0, self._needed - int(worker.acted)) if self._needed else 0
        self.sums = jax.tree.map(jnp.copy, self._programs.zeros)

    def prefill(self, server: Pushed) -> None:
        """One iteration before there is anything to learn from: a random rollout."""
        self._act_at_random(server.pull()[0])

    def _act_at_random(self, pulled: LearnerState) -> None:
        self.worker, episodes = self._programs.prefill(pulled.params, self.worker, self.sums.episodes, self._hparams)
        self.sums = self.sums._replace(episodes=jax.block_until_ready(episodes))
        self._missing -= 1

    def learn(self, server: Pushed, iteration: int) -> int:
        """One iteration: a rollout, and U gradients, each of what was pulled just before. How many rollouts were needed
        beside that one."""
        pulled, version = server.pull()
        missing = max(0, self._missing)
        # Iterations go to whoever is free: one that slept through the prefill has no n-step return to learn from yet.
        while self._missing > 0:
            self._act_at_random(pulled)
        worker, episodes, epsilon = self._programs.act(
            pulled.params, self.worker, self.sums.episodes, self._hparams, np.int32(iteration)
        )
        self.worker = worker
        self.sums = self.sums._replace(episodes=episodes, epsilon=epsilon)
        for update in range(self._num_updates):
            if update:
                pulled, version = server.pull()
            now = self.worker
            ring, gradients, loss, values = self._programs.gradient(
                pulled, now.replay, now.key, now.acted, self._hparams, np.int32(update)
            )
            self.worker = now._replace(replay=ring)
            norm, own = server.push(gradients, loss, version, self.worker.opt_state)
            self.worker = self.worker._replace(opt_state=own)
            if norm is not None:  # a push that was dropped counts in no mean
                learning = jax.tree.map(jnp.add, self.sums.learning, {**values, "gradient_norm": norm})
                self.sums = self.sums._replace(learning=learning, updates=self.sums.updates + 1)
        return missing

    def end(self) -> tuple[Worker, training.Metrics]:
        """The worker after the chunk, and the sums of its iterations."""
        return self.worker, self.sums
