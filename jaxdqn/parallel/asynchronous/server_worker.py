"""A worker of a parameter server: it pulls, acts, computes gradients with what it pulled, and pushes.

A `Node` is one worker where it lives: beside the server in the process of its thread, or in a process of its own.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, Key, LearnerState, PyTree
from jaxdqn.config import Config, learns_from_latest
from jaxdqn.parallel.compiled.runner import EXPERIENCE_STREAM, PARAMS_STREAM, Components, on_one


class Worker(NamedTuple):
    """One worker. `acted` [] counts its iterations; `opt_state` is () unless it has statistics of its own."""

    state: ActorState
    replay: PyTree
    key: Key
    acted: Array
    opt_state: PyTree


class Programs(NamedTuple):
    """What a worker computes, compiled, each of [1, 1, ...] arrays; and the sums it starts a chunk with."""

    act: Any
    explore: Any
    gradient: Any
    zeros: training.Metrics


class Pushed(Protocol):
    """What a worker needs of a server: see `server.Server`."""

    def pull(self) -> tuple[LearnerState, int]:
        """The learner now, and its version."""

    def push(self, gradients: PyTree, loss: Array, version: int, opt_state: PyTree) -> tuple[Any, PyTree]:
        """(gradient norm, or None where the push was too old; the worker's own optimizer state)."""


def start(components: Components, learner: LearnerState, key: Key, index: int, own_statistics: bool) -> Worker:
    """Worker `index` of the run's `key`: its stream is that of shard `index` of a data-parallel agent."""
    stream, actor_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, EXPERIENCE_STREAM), index))
    state = acting.start(components.environment, components.agent, components.config.num_envs, actor_key)
    own = jax.tree.map(jnp.copy, learner.opt_state) if own_statistics else ()
    return Worker(state, components.replay.init(), stream, jnp.int32(0), own)


def first_learner(components: Components, key: Key, hparams: Any) -> LearnerState:
    """The learner of the run's `key`."""
    return components.agent.init(jax.random.fold_in(key, PARAMS_STREAM), hparams)


def compile_programs(components: Components, device: jax.Device, hparams: Any) -> Programs:
    """The worker's programs; jit compiles them when they are first called."""
    config = components.config
    rollout = training.make_act(components.environment, components.agent, config, config.num_envs)
    always = jnp.ones(config.num_envs)

    def store(worker: Worker, state: ActorState, block: PyTree) -> Worker:
        ring = components.replay.add(worker.replay, block, worker.acted * config.rollout_length)
        return worker._replace(state=state, replay=ring, acted=worker.acted + 1)

    def act(
        params: PyTree, worker: Worker, sums: EpisodeSums, hparams: Any, iteration: Array
    ) -> tuple[Worker, EpisodeSums, Array]:
        key, _ = training.stream_keys(worker.key, worker.acted)
        state, block, new, epsilon = rollout(params, worker.state, key, iteration, 0, hparams)
        return store(worker, state, block), jax.tree.map(jnp.add, sums, new), epsilon

    def explore(params: PyTree, worker: Worker, sums: EpisodeSums) -> tuple[Worker, EpisodeSums]:
        key, _ = training.stream_keys(worker.key, worker.acted)
        state, block, new = acting.rollout(
            components.environment, components.agent, params, worker.state, key, always, config.rollout_length
        )
        return store(worker, state, block), jax.tree.map(jnp.add, sums, new)

    def gradient(
        learner: LearnerState, worker: Worker, hparams: Any, index: Array
    ) -> tuple[PyTree, Array, dict[str, Array]]:
        # `acted` counts the rollout just made.
        _, key = training.stream_keys(worker.key, worker.acted - 1)
        sample_key, loss_key = training.stream_keys(key, index)
        batch = components.replay.sample(worker.replay, sample_key, worker.acted * config.rollout_length, hparams)
        gradients, output = components.agent.gradient(learner, batch, loss_key, hparams)
        return gradients, output.loss, {"loss": output.loss, **output.metrics}

    zero = on_one(device, lambda _: training.zero_metrics(components.agent, components.replay, config), 1)
    # What is pulled is shared with other threads and never donated.
    return Programs(
        act=on_one(device, act, 4, 1, donate=(1, 2)),
        explore=on_one(device, explore, 3, donate=(1, 2)),
        gradient=on_one(device, gradient, 3, 1),
        zeros=zero(hparams.gamma),
    )


class Node:
    """One worker and what it did in a chunk of work."""

    def __init__(self, programs: Programs, hparams: Any, config: Config) -> None:
        self._programs, self._hparams, self._num_updates = programs, hparams, config.updates_per_iteration
        latest = learns_from_latest(config)
        self._needed = 0 if latest else -(-config.n_step // config.rollout_length) - 1  # rollouts before a gradient

    def begin(self, worker: Worker) -> None:
        """Takes over a worker for a chunk of iterations."""
        self.worker = worker
        self._missing = max(0, self._needed - int(np.asarray(worker.acted)[0, 0])) if self._needed else 0
        self.sums = jax.tree.map(jnp.copy, self._programs.zeros)

    def explore(self, server: Pushed) -> None:
        """One iteration before there is anything to learn from: a random rollout."""
        self._explore(server.pull()[0])

    def _explore(self, pulled: LearnerState) -> None:
        self.worker, episodes = self._programs.explore(pulled.params, self.worker, self.sums.episodes)
        self.sums = self.sums._replace(episodes=jax.block_until_ready(episodes))
        self._missing -= 1

    def learn(self, server: Pushed, iteration: int) -> int:
        """One iteration: a rollout, and U gradients, each of what was pulled just before. How many rollouts were needed
        beside that one."""
        pulled, version = server.pull()
        missing = max(0, self._missing)
        # Iterations go to whoever is free: one that slept through the prefill has no n-step return to learn from yet.
        while self._missing > 0:
            self._explore(pulled)
        worker, episodes, epsilon = self._programs.act(
            pulled.params, self.worker, self.sums.episodes, self._hparams, np.int32(iteration)
        )
        self.worker = worker
        self.sums = self.sums._replace(episodes=episodes, epsilon=epsilon)
        for update in range(self._num_updates):
            if update:
                pulled, version = server.pull()
            gradients, loss, values = self._programs.gradient(pulled, self.worker, self._hparams, np.int32(update))
            norm, own = server.push(gradients, loss, version, self.worker.opt_state)
            self.worker = self.worker._replace(opt_state=own)
            if norm is not None:  # a push that was dropped counts in no mean
                learning = jax.tree.map(jnp.add, self.sums.learning, {**values, "gradient_norm": norm})
                self.sums = self.sums._replace(learning=learning, updates=self.sums.updates + 1)
        return missing

    def end(self) -> tuple[Worker, training.Metrics]:
        """The worker after the chunk, and the sums of its iterations."""
        return self.worker, self.sums
