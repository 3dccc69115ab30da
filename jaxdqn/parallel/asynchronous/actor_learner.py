"""Actors with local replays and one learner: the classic parallel DQN, Gorila's and Ape-X's shape.

N actors, each with its own environments, key, epsilons and local replay D_i of M iterations. A full D_i moves, in its
order, into the actor's region of the learner's replay; the learner samples and updates there; every K updates the
actors get its parameters. Nair et al. (2015); Horgan et al. (2018).

Two couplings over the same three programs (act, insert, learn). `lockstep`: one thread, deterministic, with parameters
that reach the actors `lag` broadcasts late. `async`: a thread for each actor and the calling thread as the learner.
An iteration is one rollout of all actors and U updates in both, so that schedules and budgets mean the same.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import training
from jaxdqn.base import PyTree, Scalar
from jaxdqn.components import Components
from jaxdqn.config import Config, HParams
from jaxdqn.environments import registry
from jaxdqn.parallel.asynchronous.actor import Actor, ActorNode, Local
from jaxdqn.parallel.asynchronous.host_actor import actor_programs
from jaxdqn.parallel.asynchronous.learner import (
    ActorLearnerState,
    Axes,
    check,
    compile_learner,
    global_replay,
    state_bytes,
)
from jaxdqn.parallel.asynchronous.ray_engine import Engine, remake
from jaxdqn.parallel.asynchronous.workers import (
    LAGS,
    POLL_SECONDS,
    Seen,
    Work,
    WorkerPool,
    added,
    mended,
    rollouts_of,
    zeros,
)
from jaxdqn.parallel.compiled.memory import tree_bytes
from jaxdqn.parallel.compiled.runner import GoOn, Runner, in_parts, of_host_loop, traced_hparams, without
from jaxdqn.parallel.scheme import Built, Devices, Job, Scheme
from jaxdqn.timeline import timeline
from jaxdqn.training import Metrics


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

    `fault_hook(actor, acted)` is called before an async actor's every rollout: tests make it sleep or fail.
    """
    runner, states = of_host_loop(
        lambda: ActorLearner(components, devices, settings[0], axes, report, fault_hook, engine), seeds[0]
    )
    return runner._replace(adopted=adopted), states


def adopted(states: list[ActorLearnerState]) -> list[ActorLearnerState]:
    """The same with broadcasts of the learner's parameters."""
    # Copies: the learner's own are donated to its next update.
    return [s._replace(broadcast=tuple(jax.tree.map(jnp.copy, s.learner.params) for _ in s.broadcast)) for s in states]


def make_node(
    config: Config, factory: Callable[..., PyTree] | None, axes: Axes, hparams: HParams, index: int
) -> ActorNode:
    """An actor in a process of its own; `factory` makes its environment where that is a user's."""
    components = remake(config, factory)
    programs = actor_programs(components, axes.workers, axes.merge_every)
    return ActorNode(programs, hparams, index, axes.merge_every)


class ActorLearner:
    """The programs, the nodes, and what the couplings need beside the state."""

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
        self.devices, self._report, self._restarts = devices, report, 0
        self.actor_devices = list(devices[1:]) or list(devices)
        self.hparams = traced_hparams(components.agent.complete(hparams))
        self.pool = WorkerPool(axes.workers, report)
        self.seen = Seen(
            (*LAGS, "dropped", *rollouts_of(axes.workers)), ("actor_wait", "queue_wait", "learner_wait", "running")
        )
        self.acting = actor_programs(components, axes.workers, axes.merge_every)
        self.programs = compile_learner(components, axes)
        seen = zeros(self.seen.take()) if axes.coupling == "async" else {}
        self.zero_metrics = self.programs.zeros(self.hparams.gamma)._replace(seen=seen)
        self.apart = engine is not None
        indices = range(axes.workers)
        if engine is None:
            placed = [jax.device_put(self.hparams, self.device_of(index)) for index in indices]
            self.nodes = [ActorNode(self.acting, placed[index], index, axes.merge_every) for index in indices]
        else:
            recipe = self.config, registry.factory(self.config.env), axes, self.hparams
            self.nodes = [engine.spawn(make_node, *recipe, index) for index in indices]

    def tell(self, notes: Sequence[str]) -> None:
        """Reports failures of environments, each of which made new ones."""
        self._restarts += len(notes)
        for note in notes:
            self._report(f"warning: {note}")

    def device_of(self, index: int) -> jax.Device:
        """Where an actor in this process acts."""
        return self.actor_devices[index % len(self.actor_devices)]

    def init(self, seed: int) -> ActorLearnerState:
        """The run's first state."""
        return self.programs.first(np.uint32(seed), self.hparams)

    def warm_up(self, state: ActorLearnerState) -> None:
        """Compiles every program, on copies; in all processes at once."""
        state, metrics = jax.tree.map(jnp.copy, (state, self.zero_metrics))

        def warm(index: int) -> None:
            params, first = jax.tree.map(jnp.copy, (state.broadcast[0], state.actors[0]))
            if not self.apart:
                params, first = jax.device_put((params, first), self.device_of(index))
            self.nodes[index].begin(first)
            for count in range(max(2, self.axes.merge_every)):  # until it has been full
                self.nodes[index].act(params, 0, 0, count > 0)

        # Threads wait for processes; in this one the first actor of a device compiles for all of them.
        count = self.axes.workers if self.apart else min(self.axes.workers, len(self.actor_devices))
        with ThreadPoolExecutor() as pool:
            list(pool.map(warm, range(count)))
        for node in self.nodes[:count]:  # when all have acted: those in this process share their environments
            node.close()
        shapes = jax.eval_shape(self.acting.full, state.broadcast[0], state.actors[0], self.hparams)
        local = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        data, merged = self.programs.insert(state.replay, state.merged, local, np.int32(0), self.hparams)
        data = self.programs.cut(data, merged, np.int32(0))
        self.programs.learn(state.learner, data, metrics.learning, merged, state.key, self.hparams, np.int32(0))
        jax.block_until_ready(self.programs.copy(state.broadcast[0]))

    def telemetry(self, states: list[ActorLearnerState]) -> Mapping[str, Scalar]:
        """`bytes_per_update` counts broadcasts to every actor and the experience that moves to the learner."""
        params, local = tree_bytes(states[0].broadcast[0]), tree_bytes(states[0].actors[0].local)
        per_iteration = self.axes.workers * local / self.axes.merge_every
        moved = self.axes.workers * params / self.axes.broadcast_every
        moved += per_iteration / self.config.updates_per_iteration
        figures: dict[str, Scalar] = {"bytes_per_update": moved}
        if self.components.environment.on_host is not None:
            figures["env_restarts"] = self._restarts
        if self.axes.coupling == "async":
            figures["dead_workers"] = self.pool.num_dead
        return figures

    def run(
        self,
        states: list[ActorLearnerState],
        metrics: list[training.Metrics],
        start: int,
        stop: int,
        learning: bool,
        exploring: bool = False,
    ) -> tuple[list[ActorLearnerState], list[training.Metrics]]:
        """Iterations start <= i < stop, with random actions where it neither is learning nor `exploring`."""
        # The sums are donated, and the zeros they start from are not ours to give away.
        chunk = Chunk(self, states[0], jax.tree.map(jnp.copy, metrics[0]), learning, exploring)
        (chunk.asynchronous if self.axes.coupling == "async" else chunk.lockstep)(start, stop)
        return [chunk.state()], [chunk.metrics()]

    def lean(self, state: ActorLearnerState) -> PyTree:
        """Without what is in the replays, and without what counts it."""
        actors = tuple(without(actor, "state", "local") for actor in state.actors)
        return without(state._replace(actors=actors), "replay", "merged")

    def refill(self, states: list[ActorLearnerState], iteration: int, go_on: GoOn) -> list[ActorLearnerState]:
        """The last merges that the learner's replay holds, and what the local ones had of the next."""
        every = self.axes.merge_every
        held = global_replay(self.components, self.axes).rows // (every * self.config.rollout_length)
        count = min(iteration // every, held) * every + iteration % every

        def emptied(actor: Actor) -> Actor:
            return actor._replace(acted=jnp.maximum(actor.acted - count, 0) // every * every)

        states = [state._replace(actors=tuple(map(emptied, state.actors))) for state in states]
        run = functools.partial(self.run, learning=False, exploring=True)
        return in_parts(run, states, [self.zero_metrics], iteration - count, iteration, go_on)


class Published(NamedTuple):
    """Parameters as the actors see them: by device, and how many broadcasts came before."""

    params: dict[jax.Device, PyTree]
    version: int


class Delivery(NamedTuple):
    """A full local replay on its way to the learner; `version` is that of the parameters it was begun with."""

    actor: int
    local: Local
    version: int
    broke: bool


class Chunk:
    """Takes an `ActorLearnerState` and metrics over some iterations, whose actions are random where it neither is
    `learning` nor `exploring`. `scheme` has the programs and the axes."""

    def __init__(
        self, scheme: ActorLearner, state: ActorLearnerState, metrics: Metrics, learning: bool, exploring: bool = False
    ) -> None:
        self.scheme, self.programs, self.axes = scheme, scheme.programs, scheme.axes
        self.learning, self.exploring = learning, learning or exploring
        self.learner, self.data, self.merged = state.learner, state.replay, state.merged
        self.actors, self.broadcast, self.key = list(state.actors), state.broadcast, state.key
        self.version_before, self.broadcasts = state.version, 0
        self.episodes, self.sums, self.epsilon = metrics.episodes, metrics.learning, metrics.epsilon
        self.updates_before, self.updates, self.seen = metrics.updates, 0, metrics.seen
        config = scheme.config
        self.per_iteration = config.updates_per_iteration
        self.prefill = timeline(config).prefill

    def state(self) -> ActorLearnerState:
        """What the chunk made of the state."""
        return ActorLearnerState(
            learner=self.learner,
            actors=tuple(self.actors),
            replay=self.data,
            merged=self.merged,
            broadcast=self.broadcast,
            version=self.version_before + self.broadcasts,
            key=self.key,
        )

    def metrics(self) -> Metrics:
        """The sums so far. The last value is a copy: the learner's own buffer is donated to the next chunk."""
        updates, first_bad = self.updates_before + self.updates, jnp.copy(self.learner.first_bad_update)
        return Metrics(self.episodes, self.sums, updates, self.epsilon, first_bad, self.seen)

    # -- the three steps ----------------------------------------------------------------------------------------------

    def insert(self, index: int, local: Local) -> None:
        """Moves a full local replay into its actor's region."""
        at = np.int32(index), self.scheme.hparams
        self.data, self.merged = self.programs.insert(self.data, self.merged, local, *at)

    def cut(self, index: int) -> None:
        """Ends the actor's stream in its region: what it delivers next does not follow on what lies there."""
        self.data = self.programs.cut(self.data, self.merged, np.int32(index))

    def learn(self, iteration: int) -> bool:
        """U updates; True where a broadcast was due."""
        self.learner, self.data, self.sums = self.programs.learn(
            self.learner, self.data, self.sums, self.merged, self.key, self.scheme.hparams, np.int32(iteration)
        )
        self.updates += self.per_iteration
        before = (iteration - self.prefill) * self.per_iteration
        due = (before + self.per_iteration) // self.axes.broadcast_every > before // self.axes.broadcast_every
        if due:
            # A copy: the learner's own parameters are donated to its next update.
            self.broadcast = (*self.broadcast[1:], self.programs.copy(self.learner.params))
            self.broadcasts += 1
        return due

    # -- couplings ----------------------------------------------------------------------------------------------------

    def lockstep(self, start: int, stop: int) -> None:
        """Every actor acts, full local replays move, the learner learns; one after the other."""
        for iteration in range(start, stop):
            for index in range(self.axes.workers):
                self._act(index, iteration)
            if (iteration + 1) % self.axes.merge_every == 0:
                for index, actor in enumerate(self.actors):
                    if self.scheme.acting.broke(index):
                        self.cut(index)
                    full = self.scheme.acting.full(self.broadcast[0], actor, self.scheme.hparams)
                    self.insert(index, full)
            if self.learning:
                self.learn(iteration)
        self.scheme.tell(self.scheme.acting.notes())

    def _act(self, index: int, iteration: int) -> None:
        programs, params, actor = self.scheme.acting, self.broadcast[0], self.actors[index]
        if self.exploring:
            at = self.scheme.hparams, np.int32(iteration), np.int32(index)
            self.actors[index], self.episodes, self.epsilon = programs.act(params, actor, self.episodes, *at)
        else:
            rest = self.scheme.hparams, np.int32(index)
            self.actors[index], self.episodes = programs.prefill(params, actor, self.episodes, *rest)

    def asynchronous(self, start: int, stop: int) -> None:
        """Actor threads take rollouts as tickets; this thread learns. Neither gets ahead by more than `slack`."""
        scheme, count = self.scheme, self.axes.workers
        self.deliveries: queue.Queue[Delivery] = queue.Queue(maxsize=2 * count)
        self.acted = [int(actor.acted) for actor in self.actors]
        self.learned, self.begun = 0, set[int]()
        self.latest: dict[int, int] = {}  # actor -> its last iteration
        self._publish(int(self.version_before))

        def rollout(work: Work, index: int, ticket: int) -> None:
            self._rollout(work, index, start + ticket // count, ticket // count)

        total, began = stop - start, time.perf_counter()
        work, threads = scheme.pool.start(range(total * count), rollout)
        try:
            self._learner(work, threads, start, total)
        finally:
            work.stop()
            scheme.pool.join(work, threads)
        self._collect(work)
        scheme.seen.wait("running", time.perf_counter() - began)
        self.seen = added(self.seen, scheme.seen.take())

    def _collect(self, work: Work) -> None:
        """The actors and their sums, from where they were."""
        home = self.scheme.devices[0]
        for index in sorted(self.begun, key=lambda index: self.latest.get(index, -1)):
            node, pool = self.scheme.nodes[index], self.scheme.pool
            self.scheme.tell(pool.answered(work, index, node.notes) or [])
            if end := pool.ended(work, index, node.end):
                self.actors[index], episodes, epsilon = jax.device_put(end, home)
                self.episodes = jax.tree.map(jnp.add, self.episodes, episodes)
                if self.learning and index in self.latest:
                    self.epsilon = epsilon
        self.actors = mended(self.actors, work.dead)
        # A resumed run has them again: where they were when the chunk began, or as copies of others.
        for index in work.dead:
            self.cut(index)

    def _publish(self, version: int) -> None:
        params = {device: jax.device_put(self.broadcast[-1], device) for device in self.scheme.actor_devices}
        jax.block_until_ready(list(params.values()))
        self.published = Published(params, version)

    def _rollout(self, work: Work, index: int, iteration: int, ahead: int) -> None:
        scheme, node, device = self.scheme, self.scheme.nodes[index], self.scheme.device_of(index)
        if index not in self.begun:
            node.begin(jax.device_put(self.actors[index], device))
            self.begun.add(index)
        if self.learning:
            scheme.seen.wait("actor_wait", work.wait_until(lambda: ahead < self.learned + self.axes.slack))
        if scheme.fault_hook is not None:
            scheme.fault_hook(index, self.acted[index])
        params, version = self.published
        full = node.act(params[device], version, iteration, self.exploring)
        self.acted[index] += 1
        self.latest[index] = iteration
        scheme.seen.count(f"rollouts_{index}")
        if full is not None:
            local = jax.device_put(full.local, scheme.devices[0])
            self._deliver(work, Delivery(index, local, full.begun, full.broke))

    def _deliver(self, work: Work, delivery: Delivery) -> None:
        while not work.stopping:
            try:
                self.deliveries.put(delivery, timeout=POLL_SECONDS)
            except queue.Full:
                self.scheme.seen.wait("queue_wait", POLL_SECONDS)
            else:
                with work.condition:
                    work.condition.notify_all()
                return

    def _learner(self, work: Work, threads: Sequence[threading.Thread], start: int, total: int) -> None:
        count, seen = self.axes.workers, self.scheme.seen

        def ended() -> bool:
            return not any(thread.is_alive() for thread in threads)

        def may_learn() -> bool:
            wanted = self.learning and self.learned < total
            return wanted and (ended() or work.finished + self.axes.slack * count >= (self.learned + 1) * count)

        def something_to_do() -> bool:
            return may_learn() or not self.deliveries.empty() or ended()

        while True:
            over = ended()  # looked at first: what was delivered before that is received now
            self._receive()
            if may_learn():
                if self.learn(start + self.learned):
                    self._publish(self.published.version + 1)
                jax.block_until_ready(self.learner.updates)
                with work.condition:
                    self.learned += 1
                    work.condition.notify_all()
            elif over:
                return
            else:
                seen.wait("learner_wait", work.wait_until(something_to_do))

    def _receive(self) -> None:
        while True:
            try:
                delivery = self.deliveries.get_nowait()
            except queue.Empty:
                return
            lag = self.published.version - delivery.version
            self.scheme.seen.lag(lag)
            if delivery.broke:
                self.cut(delivery.actor)
            if self.axes.max_lag and lag > self.axes.max_lag:
                self.scheme.seen.count("dropped")
                self.cut(delivery.actor)
            else:
                self.insert(delivery.actor, delivery.local)


def _build(job: Job[Axes]) -> Built:
    return build(job.components, job.devices, job.seeds, job.settings, job.axes, job.report, engine=job.engine)


ACTOR_LEARNER = Scheme(
    Axes,
    _build,
    lambda axes, components: state_bytes(components, axes),
    lambda axes: Devices(useful=1 + axes.workers if axes.coupling == "async" else 1),
    check,
    remote=lambda axes: bool(axes.coupling == "async"),
    threaded=True,
    steps_hosts=True,
)
