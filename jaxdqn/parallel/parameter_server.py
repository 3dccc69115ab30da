"""A parameter server and its workers: asynchronous pulls of parameters and pushes of gradients.

Each worker has its own environments, key and replay: it pulls, acts, computes a gradient with what it pulled, and
pushes; the server applies pushes as they come. With the latest block as replay this is asynchronous n-step Q-learning
and A3C (Mnih et al., 2016), with a ring of its own per worker Gorila's learners (Nair et al., 2015). An iteration is
one worker's rollout of config.num_envs environments with U pushes, so that one worker is the fused loop.

Locks: "global" applies one push at a time. "leaf" computes the step outside of any lock and adds it to each parameter
under that parameter's own lock: no step is lost, but a pull may see some parameters before and some after a push.
"none" is Hogwild's read-modify-write (Recht et al., 2011) emulated: immutable arrays have no races, so the whole
learner is read, stepped and written back without a lock, and every push that another one overwrote is counted as lost.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, agents, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, Key, LearnerState, PyTree
from jaxdqn.config import HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import population
from jaxdqn.parallel.fleet import EXPERIENCE_STREAM, PARAMS_STREAM, Fleet, Parts, greedy_episodes, on_one
from jaxdqn.parallel.memory import tree_bytes
from jaxdqn.parallel.survivors import intact, mended
from jaxdqn.parallel.telemetry import Seen
from jaxdqn.parallel.workers import Crew, Work

LOCKS = ("global", "leaf", "none")


class Axes(NamedTuple):
    """How workers and server are coupled.

    num_workers: W threads; lock: "global", "leaf" or "none"; max_lag: pushes computed with parameters more than this
    many versions old are dropped and counted, 0 for any; scale_by_lag: multiply a push's learning rate by 1 / (1 + lag)
    (Zhang et al., 2016); own_statistics: each worker keeps its own optimizer state.
    """

    num_workers: int = 4
    lock: str = "global"
    max_lag: int = 0
    scale_by_lag: bool = False
    own_statistics: bool = False


class Worker(NamedTuple):
    """One worker. `acted` [] counts its iterations; `opt_state` is () unless it has statistics of its own."""

    state: ActorState
    replay: PyTree
    key: Key
    acted: Array
    opt_state: PyTree


class ServerState(NamedTuple):
    """The server's learner, whose `updates` is the version, and the workers."""

    learner: LearnerState
    workers: tuple[Worker, ...]


class Server:
    """A versioned learner: `pull() -> LearnerState`, `push(gradients, loss, version, opt_state) -> (norm, opt_state)`.

    `apply(learner, gradients, loss, scale) -> (learner, gradient norm)` is the agent's.
    """

    def __init__(self, learner: LearnerState, apply: Callable[..., Any], axes: Axes, seen: Seen) -> None:
        self.learner, self.version = learner, 0
        self._survived = 0  # pushes that the learner holds: less than the version where some were lost
        self._apply, self._axes, self._seen = apply, axes, seen
        self._lock = threading.Lock()
        self._leaf_locks = [threading.Lock() for _ in jax.tree.leaves(learner.params)]

    def pull(self) -> tuple[LearnerState, int]:
        """The learner now, and its version."""
        with self._lock:
            return self.learner, self.version

    def push(self, gradients: PyTree, loss: Array, version: int, opt_state: PyTree = ()) -> tuple[Any, PyTree]:
        """Applies gradients that were computed at `version`; (None, opt_state) where they were too old."""
        lag = self.version - version
        self._seen.lag(lag)
        if self._axes.max_lag and lag > self._axes.max_lag:
            self._seen.count("dropped")
            return None, opt_state
        scale = np.full((1, 1), 1.0 / (1.0 + lag) if self._axes.scale_by_lag else 1.0, np.float32)
        return getattr(self, f"_push_{self._axes.lock}")(gradients, loss, scale, opt_state)

    def _stepped(self, learner: LearnerState, gradients: PyTree, loss: Array, scale: Any, own: PyTree) -> Any:
        shared = learner.opt_state
        if self._axes.own_statistics:
            learner = learner._replace(opt_state=own)
        learner, norm = jax.block_until_ready(self._apply(learner, gradients, loss, scale))
        if self._axes.own_statistics:
            return learner._replace(opt_state=shared), norm, learner.opt_state
        return learner, norm, ()

    def _push_global(self, gradients: PyTree, loss: Array, scale: Any, own: PyTree) -> tuple[Any, PyTree]:
        began = time.perf_counter()
        with self._lock:
            self._seen.wait("lock_wait", time.perf_counter() - began)
            self.learner, norm, own = self._stepped(self.learner, gradients, loss, scale, own)
            self.version += 1
        return norm, own

    def _push_none(self, gradients: PyTree, loss: Array, scale: Any, own: PyTree) -> tuple[Any, PyTree]:
        with self._lock:
            learner, survived = self.learner, self._survived
        stepped, norm, own = self._stepped(learner, gradients, loss, scale, own)
        with self._lock:  # the write-back is atomic; between read and write anyone may have pushed
            self._seen.count("lost", self._survived - survived)
            self.learner, self._survived = stepped, survived + 1
            self.version += 1
        return norm, own

    def _push_leaf(self, gradients: PyTree, loss: Array, scale: Any, own: PyTree) -> tuple[Any, PyTree]:
        before = self.learner
        stepped, norm, own = self._stepped(before, gradients, loss, scale, own)
        old, new = jax.tree.leaves(before.params), jax.tree.leaves(stepped.params)
        structure = jax.tree.structure(before.params)
        for index, lock in enumerate(self._leaf_locks):
            began = time.perf_counter()
            with lock:
                self._seen.wait("lock_wait", time.perf_counter() - began)
                self._add_to_leaf(index, new[index] - old[index], structure)
        with self._lock:
            rest = stepped._replace(params=self.learner.params, updates=self.learner.updates + 1)
            self.learner = rest
            self.version += 1
        return norm, own

    def _add_to_leaf(self, index: int, step: Array, structure: Any) -> None:
        # The tree that holds the leaves is swapped under the server's lock; the addition is outside of it.
        value = jax.block_until_ready(jax.tree.leaves(self.learner.params)[index] + step)
        with self._lock:
            leaves = jax.tree.leaves(self.learner.params)
            leaves[index] = value
            self.learner = self.learner._replace(params=jax.tree.unflatten(structure, leaves))


def validate(axes: Axes) -> None:
    """Raises `UserError` for axes that cannot work."""
    if not isinstance(axes.num_workers, int) or axes.num_workers < 1:
        raise UserError(f"num_workers is {axes.num_workers!r}; it must be a whole number of at least 1.")
    if axes.lock not in LOCKS:
        raise UserError(f"lock is {axes.lock!r}; it is one of {', '.join(LOCKS)}.")
    if axes.max_lag < 0:
        raise UserError(f"max_lag is {axes.max_lag}; it must be at least 0 (0: no limit).")


def build(
    parts: Parts,
    devices: Sequence[jax.Device],
    seeds: Sequence[int],
    settings: Sequence[HParams],
    axes: Axes,
    report: Callable[[str], None] = print,
    disturb: Callable[[int, int], None] | None = None,
) -> tuple[Fleet, list[ServerState]]:
    """The fleet of one member, all of it on the first device. `disturb(worker, acted)` is called before every rollout:
    tests make it sleep or fail. Raises `UserError`.
    """
    began = time.perf_counter()
    validate(axes)
    scheme = _Scheme(parts, devices[:1], settings[0], axes, report, disturb)
    state = scheme.init(seeds[0])
    scheme.warm_up(state)
    fleet = Fleet(
        parts=parts,
        assignment=population.assign(1, 1),
        shards=1,
        collect=functools.partial(scheme.run, learning=False),
        step=functools.partial(scheme.run, learning=True),
        evaluate=lambda states: [scheme.judge(states[0].learner.params)],
        zero_metrics=[scheme.zero_metrics],
        compile_seconds=time.perf_counter() - began,
        program=scheme.gradient,
        telemetry=scheme.telemetry,
    )
    return fleet, [state]


def state_bytes(parts: Parts, axes: Axes) -> tuple[int, int]:
    """Bytes of the whole state, and of the workers' replays in it."""
    state = jax.eval_shape(lambda: _Scheme(parts, jax.devices()[:1], HParams(), axes, print, None).init(0))
    return tree_bytes(state), tree_bytes([worker.replay for worker in state.workers])


class _Scheme:
    """The programs, and a chunk of work for the threads."""

    def __init__(
        self,
        parts: Parts,
        devices: Sequence[jax.Device],
        hparams: HParams,
        axes: Axes,
        report: Callable[[str], None],
        disturb: Callable[[int, int], None] | None,
    ) -> None:
        self.parts, self.config, self.axes, self.devices, self.disturb = parts, parts.config, axes, devices, disturb
        self.hparams = jax.tree.map(lambda x: np.full((1, 1), x, np.float32), hparams)
        self.seen, self.crew = Seen(), Crew(axes.num_workers, report)
        config = self.config
        latest = agents.learns_from_latest(config)
        self.rollouts_before = 0 if latest else -(-config.n_step // config.rollout_length) - 1
        rollout = training.make_act(parts.environment, parts.agent, config, config.num_envs)
        always = jnp.ones(config.num_envs)

        def store(worker: Worker, state: ActorState, block: PyTree) -> Worker:
            ring = parts.replay.add(worker.replay, block, worker.acted * config.rollout_length)
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
                parts.environment, parts.agent, params, worker.state, key, always, config.rollout_length
            )
            return store(worker, state, block), jax.tree.map(jnp.add, sums, new)

        def gradient(
            learner: LearnerState, worker: Worker, hparams: Any, index: Array
        ) -> tuple[PyTree, Array, dict[str, Array]]:
            # `acted` counts the rollout just made.
            _, key = training.stream_keys(worker.key, worker.acted - 1)
            sample_key, loss_key = training.stream_keys(key, index)
            batch = parts.replay.sample(worker.replay, sample_key, worker.acted * config.rollout_length, hparams)
            gradients, output = parts.agent.gradient(learner, batch, loss_key, hparams)
            return gradients, output.loss, {"loss": output.loss, **output.metrics}

        def apply(
            learner: LearnerState, gradients: PyTree, loss: Array, scale: Array, hparams: Any
        ) -> tuple[LearnerState, Array]:
            scaled = hparams._replace(learning_rate=hparams.learning_rate * scale)
            return parts.agent.apply(learner, gradients, loss, scaled)

        # What is pulled is shared with other threads and never donated.
        self.act = self._single(act, 4, 1, donate=(1, 2))
        self.explore = self._single(explore, 3, donate=(1, 2))
        self.gradient = self._single(gradient, 3, 1)
        self.apply = self._single(apply, 5)
        self.judge = self._single(functools.partial(greedy_episodes, parts), 1)
        zero = self._single(lambda _: training.zero_metrics(parts.agent, parts.replay, config), 1)
        self.zero_metrics = zero(self.hparams.gamma)

    def _single(self, *args: Any, **options: Any) -> Any:
        return on_one(self.devices[0], *args, **options)

    def init(self, seed: int) -> ServerState:
        """Worker i's stream is that of shard i of a data-parallel agent."""
        parts, config, axes = self.parts, self.config, self.axes

        def make(seed: Array, hparams: Any) -> ServerState:
            key = jax.random.key(seed)
            experience = jax.random.fold_in(key, EXPERIENCE_STREAM)
            learner = parts.agent.init(jax.random.fold_in(key, PARAMS_STREAM), hparams)

            def worker(index: int) -> Worker:
                stream, actor_key = jax.random.split(jax.random.fold_in(experience, index))
                state = acting.start(parts.environment, parts.agent, config.num_envs, actor_key)
                own = jax.tree.map(jnp.copy, learner.opt_state) if axes.own_statistics else ()
                return Worker(state, parts.replay.init(), stream, jnp.int32(0), own)

            return ServerState(learner, tuple(worker(i) for i in range(axes.num_workers)))

        state: ServerState = self._single(make, 2)(np.full((1, 1), seed, np.uint32), self.hparams)
        return state

    def warm_up(self, state: ServerState) -> None:
        """Compiles every program, on copies."""
        worker, sums = jax.tree.map(jnp.copy, (state.workers[0], self.zero_metrics.episodes))
        worker, sums = self.explore(state.learner.params, worker, sums)
        worker, sums, _ = self.act(state.learner.params, worker, sums, self.hparams, np.int32(0))
        gradients, loss, _ = self.gradient(state.learner, worker, self.hparams, np.int32(0))
        self.apply(state.learner, gradients, loss, np.ones((1, 1), np.float32), self.hparams)
        jax.block_until_ready(self.judge(state.learner.params))

    def telemetry(self, states: list[ServerState]) -> dict[str, Any]:
        """`bytes_per_update`: a pull of parameters and target, and a push of a gradient."""
        learner = states[0].learner
        moved = 2 * tree_bytes(learner.params) + tree_bytes(learner.target_params)
        return {"bytes_per_update": float(moved), "dead_workers": self.crew.num_dead, **self.seen.take()}

    def run(
        self, states: list[ServerState], metrics: list[training.Metrics], start: int, stop: int, learning: bool
    ) -> tuple[list[ServerState], list[training.Metrics]]:
        """Iterations start <= i < stop, handed out to the workers as tickets."""
        learner, workers = states[0].learner, list(states[0].workers)
        server = Server(learner, lambda *args: self.apply(*args, self.hparams), self.axes, self.seen)
        zeros = jax.tree.map(jnp.zeros_like, self.zero_metrics)
        sums = [jax.tree.map(jnp.copy, zeros) for _ in workers]

        def work_on(work: Work, index: int, ticket: int) -> None:
            if self.disturb is not None:
                self.disturb(index, int(workers[index].acted[0, 0]))
            pulled, version = server.pull()
            if not learning:
                workers[index], episodes = self.explore(pulled.params, workers[index], sums[index].episodes)
                sums[index] = sums[index]._replace(episodes=jax.block_until_ready(episodes))
                return
            # Tickets go to whoever is free: one that slept through the prefill has no n-step return to learn from yet.
            while self.rollouts_before and int(workers[index].acted[0, 0]) < self.rollouts_before:
                workers[index], episodes = self.explore(pulled.params, workers[index], sums[index].episodes)
                sums[index] = sums[index]._replace(episodes=episodes)
            worker, episodes, epsilon = self.act(
                pulled.params, workers[index], sums[index].episodes, self.hparams, np.int32(start + ticket)
            )
            workers[index] = worker
            sums[index] = sums[index]._replace(episodes=episodes, epsilon=epsilon)
            for update in range(self.config.updates_per_iteration):
                if update:
                    pulled, version = server.pull()
                gradients, loss, values = self.gradient(pulled, worker, self.hparams, np.int32(update))
                norm, own = server.push(gradients, loss, version, worker.opt_state)
                worker = worker._replace(opt_state=own)
                values = {**values, "gradient_norm": jnp.zeros_like(loss) if norm is None else norm}
                added = jax.tree.map(jnp.add, sums[index].learning, values)
                sums[index] = sums[index]._replace(learning=added)
            workers[index] = worker
            self.seen.worked(index)

        work, threads = self.crew.start(range(stop - start), work_on)
        self.crew.join(work, threads)
        workers = mended(workers, work.dead)
        total = metrics[0]
        for each in filter(intact, sums):
            total = total._replace(
                episodes=jax.tree.map(jnp.add, total.episodes, each.episodes),
                learning=jax.tree.map(jnp.add, total.learning, each.learning),
                epsilon=jnp.where(each.epsilon > 0, each.epsilon, total.epsilon),
            )
        # A copy: the metrics outlive the chunk, and nothing may be shared between them and the state.
        total = total._replace(first_bad_update=jnp.copy(server.learner.first_bad_update))
        return [ServerState(server.learner, tuple(workers))], [total]
