"""One chunk of an actor-learner scheme: in lockstep, or with actor threads and the calling thread as the learner."""

import queue
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import PyTree, Transition
from jaxdqn.config import timeline
from jaxdqn.parallel.asynchronous import telemetry
from jaxdqn.parallel.asynchronous.survivors import ended, mended
from jaxdqn.parallel.asynchronous.workers import POLL_SECONDS, Work
from jaxdqn.training import Metrics


class Published(NamedTuple):
    """Parameters as the actors see them: by device, and how many broadcasts came before."""

    params: dict[jax.Device, PyTree]
    version: int


class Delivery(NamedTuple):
    """A full local replay on its way to the learner; `version` is that of the parameters it was begun with."""

    actor: int
    local: Transition
    version: int


class Chunk:
    """Takes an `ActorLearnerState` and metrics over some iterations. `scheme` has the programs and the axes."""

    def __init__(self, scheme: Any, state: Any, metrics: Metrics, learning: bool) -> None:
        self.scheme, self.programs, self.axes, self.learning = scheme, scheme.programs, scheme.axes, learning
        self.learner, self.data, self.merged = state.learner, state.replay, state.merged
        self.actors, self.broadcast, self.key = list(state.actors), state.broadcast, state.key
        self.version_before, self.broadcasts = state.version, 0
        self.episodes, self.sums, self.epsilon = metrics.episodes, metrics.learning, metrics.epsilon
        self.updates_before, self.updates, self.seen = metrics.updates, 0, metrics.seen
        config = scheme.config
        self.per_iteration = config.updates_per_iteration
        self.prefill = timeline(config).prefill

    def state(self) -> Any:
        """What the chunk made of the state."""
        return self.scheme.state_type(
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

    def insert(self, index: int, local: Transition) -> None:
        """Moves a full local replay into its actor's region."""
        self.data, self.merged = self.programs.insert(self.data, self.merged, local, np.int32(index))

    def cut(self, index: int) -> None:
        """Ends the actor's stream in its region: what it delivers next does not follow on what lies there."""
        end = self.programs.cut(self.data.episode_end, self.merged, np.int32(index))
        self.data = self.data._replace(episode_end=end)

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
            for index in range(self.axes.num_actors):
                self._act(index, iteration)
            if (iteration + 1) % self.axes.merge_every == 0:
                for index, actor in enumerate(self.actors):
                    self.insert(index, actor.local)
            if self.learning:
                self.learn(iteration)

    def _act(self, index: int, iteration: int) -> None:
        programs, params, actor = self.scheme.acting, self.broadcast[0], self.actors[index]
        if self.learning:
            at = self.scheme.hparams, np.int32(iteration), np.int32(index)
            self.actors[index], self.episodes, self.epsilon = programs.act(params, actor, self.episodes, *at)
        else:
            self.actors[index], self.episodes = programs.explore(params, actor, self.episodes)

    def asynchronous(self, start: int, stop: int) -> None:
        """Actor threads take rollouts as tickets; this thread learns. Neither gets ahead by more than `slack`."""
        scheme, count = self.scheme, self.axes.num_actors
        self.deliveries: queue.Queue[Delivery] = queue.Queue(maxsize=2 * count)
        self.acted = [int(np.asarray(actor.acted).ravel()[0]) for actor in self.actors]
        self.learned, self.begun = 0, set[int]()
        self.latest: dict[int, int] = {}  # actor -> its last iteration
        self._publish(int(np.asarray(self.version_before)[0, 0]))

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
        self.seen = telemetry.added(self.seen, scheme.seen.take())

    def _collect(self, work: Work) -> None:
        """The actors and their sums, from where they were."""
        home = self.scheme.devices[0]
        for index in sorted(self.begun, key=lambda index: self.latest.get(index, -1)):
            if end := ended(self.scheme.nodes[index], index in self.scheme.pool.alive):
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
        full = node.act(params[device], version, iteration, self.learning)
        self.acted[index] += 1
        self.latest[index] = iteration
        scheme.seen.count(f"rollouts_{index}")
        if full is not None:
            self._deliver(work, Delivery(index, jax.device_put(full.local, scheme.devices[0]), full.begun))

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

    def _learner(self, work: Work, threads: Any, start: int, total: int) -> None:
        count, seen = self.axes.num_actors, self.scheme.seen

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
            if self.axes.max_lag and lag > self.axes.max_lag:
                self.scheme.seen.count("dropped")
                self.cut(delivery.actor)
            else:
                self.insert(delivery.actor, delivery.local)
