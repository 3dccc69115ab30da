"""A parameter server and its workers: asynchronous pulls of parameters and pushes of gradients.

Each worker has its own environments, key and replay: it pulls, acts, computes a gradient with what it pulled, and
pushes; the server applies pushes as they come. With the latest block as replay this is asynchronous n-step Q-learning
and A3C (Mnih et al., 2016), with a ring of its own per worker Gorila's learners (Nair et al., 2015). An iteration is
one worker's rollout of config.num_envs environments with U pushes, so that one worker is the fused loop.

The iterations of a chunk are tickets. A thread for each worker takes them and has its node do them: here, or, with an
engine, in a process of its own that finds the server in another.

Locks. "global" applies one push at a time. "leaf" first counts the push, under a lock for all that is counted
(`updates`, `first_bad_update`, the optimizer's counts): that gives it a number of its own. Then it steps one parameter
after the other, with its target and moments, from what they are now, under that parameter's own lock. No part of a push
is lost, and the target moves at every number that is due; but a pull may see some parameters before and some after a
push. "none" is Hogwild's read-modify-write (Recht et al., 2011) emulated: immutable arrays have no races, so the whole
learner is read, stepped and written back without a lock, and every push that another one overwrote is counted as lost.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import training
from jaxdqn.base import Array, LearnerState, PyTree, Scalar
from jaxdqn.components import Components
from jaxdqn.config import Config, HParams, traced
from jaxdqn.environments import registry
from jaxdqn.parallel.asynchronous.actor import Worker, WorkerNode, compile_worker, first_learner, start_worker
from jaxdqn.parallel.asynchronous.ray_engine import Engine, remake
from jaxdqn.parallel.asynchronous.workers import LAGS, Seen, Work, WorkerPool, added, mended, rollouts_of, zeros
from jaxdqn.parallel.compiled.memory import once_each, tree_bytes
from jaxdqn.parallel.compiled.runner import GoOn, Program, Runner, of_host_loop, traced_hparams, without
from jaxdqn.parallel.scheme import Built, Devices, Job, Scheme


class Axes(NamedTuple):
    """How workers and server are coupled."""

    workers: int = 4
    """W, threads that act and compute gradients."""
    lock: Literal["global", "leaf", "none"] = "global"
    """One lock; one for each parameter with its target and moments; or none (Hogwild, emulated)."""
    max_lag: int = 0
    """Gradients computed with parameters more than this many versions old are dropped and counted; 0 for no limit."""
    scale_by_lag: bool = False
    """Multiply a push's learning rate by 1 / (1 + lag) (Zhang et al., 2016)."""
    own_statistics: bool = False
    """Each worker keeps its own optimizer state."""


COUNTED = -1
"""The part of a learner that belongs to no parameter: `updates`, `first_bad_update`, and the optimizer's counts."""


def part_of(learner: LearnerState) -> PyTree:
    """For each array of a learner the number of the parameter it belongs to, in the order of `jax.tree.leaves`: its
    value, its target, or a moment of the optimizer; or COUNTED."""
    structure: Any = jax.tree.structure(learner.params)
    numbers = jax.tree.unflatten(structure, range(structure.num_leaves))

    def like_params(tree: PyTree) -> bool:
        return bool(jax.tree.structure(tree) == structure)

    return jax.tree.map(lambda x: numbers if like_params(x) else COUNTED, learner, is_leaf=like_params)


def take(learner: LearnerState, part: int) -> list[Array]:
    """The arrays of one part of a learner."""
    numbered = zip(jax.tree.leaves(part_of(learner)), jax.tree.leaves(learner), strict=True)
    return [array for number, array in numbered if number == part]


def put(learner: LearnerState, part: int, arrays: list[Array]) -> LearnerState:
    """`learner` with other arrays, as `take` gives them, for one part."""
    new = iter(arrays)
    return jax.tree.map(lambda p, x: next(new) if p == part else x, part_of(learner), learner)


def replaced(old: LearnerState, new: LearnerState, part: int) -> LearnerState:
    """`old` with one part of `new`."""
    return put(old, part, take(new, part))


class Server:
    """A versioned learner. `begin` gives it one, `pull` and `push` may come from any thread, `end` takes it back.

    `apply(learner, gradients, loss, scale []) -> (learner, gradient norm)` is the agent's; with a fifth argument,
    the number of a part, it steps that part alone.
    """

    def __init__(self, apply: Callable[..., PyTree], axes: Axes) -> None:
        self._apply, self._axes = apply, axes
        self._seen = Seen((*LAGS, "dropped", "lost"), ["lock_wait"])
        self._lock = threading.Lock()  # of `learner` and `version`: held to read or swap them, not to compute
        self._pushing = threading.Lock()

    def begin(self, learner: LearnerState) -> None:
        """Serves `learner`, as version 0."""
        self.learner, self.version = learner, 0
        self._survived = 0  # pushes that the learner holds: less than the version where some were lost
        self._part_locks = {part: threading.Lock() for part in (COUNTED, *range(len(jax.tree.leaves(learner.params))))}

    def end(self) -> LearnerState:
        """The learner now."""
        return self.learner

    def take(self) -> dict[str, float]:
        """Telemetry since the last call: see `Seen.take`."""
        return self._seen.take()

    def pull(self) -> tuple[LearnerState, int]:
        """The learner now, and its version."""
        with self._lock:
            return self.learner, self.version

    def push(self, gradients: PyTree, loss: Array, version: int, opt_state: PyTree = ()) -> tuple[Array | None, PyTree]:
        """Applies gradients that were computed at `version`; (None, opt_state) where they were too old."""
        return getattr(self, f"_push_{self._axes.lock}")(gradients, loss, version, opt_state)

    def _admitted(self, version: int) -> np.float32 | None:
        """By what the learning rate is scaled, []; None for a push that is too old."""
        lag = self.version - version
        self._seen.lag(lag)
        if self._axes.max_lag and lag > self._axes.max_lag:
            self._seen.count("dropped")
            return None
        return np.float32(1.0 / (1.0 + lag) if self._axes.scale_by_lag else 1.0)

    @contextlib.contextmanager
    def _waiting_for(self, lock: threading.Lock) -> Iterator[None]:
        began = time.perf_counter()
        with lock:
            self._seen.wait("lock_wait", time.perf_counter() - began)
            yield

    def _with(self, own: PyTree) -> LearnerState:
        """The learner now, with the statistics of the worker that pushes if workers have their own."""
        return self.learner._replace(opt_state=own) if self._axes.own_statistics else self.learner

    def _shared(self, stepped: LearnerState) -> LearnerState:
        """What of `stepped` all workers share, over what they share now."""
        return stepped._replace(opt_state=self.learner.opt_state) if self._axes.own_statistics else stepped

    def _own(self, stepped: LearnerState) -> PyTree:
        return stepped.opt_state if self._axes.own_statistics else ()

    def _push_global(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Array | None, PyTree]:
        with self._waiting_for(self._pushing):
            if (scale := self._admitted(version)) is None:
                return None, own
            stepped, norm = jax.block_until_ready(self._apply(self._with(own), gradients, loss, scale))
            with self._lock:
                self.learner, self.version = self._shared(stepped), self.version + 1
        return norm, self._own(stepped)

    def _push_none(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Array | None, PyTree]:
        with self._lock:
            if (scale := self._admitted(version)) is None:
                return None, own
            learner, survived = self._with(own), self._survived
        stepped, norm = jax.block_until_ready(self._apply(learner, gradients, loss, scale))
        with self._lock:  # the write-back is atomic; between read and write anyone may have pushed
            self._seen.count("lost", self._survived - survived)
            self.learner, self._survived = self._shared(stepped), survived + 1
            self.version += 1
        return norm, self._own(stepped)

    def _push_leaf(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Array | None, PyTree]:
        with self._waiting_for(self._part_locks[COUNTED]):
            if (scale := self._admitted(version)) is None:
                return None, own
            before = self._with(own)
            counted, norm = self._step_part(COUNTED, before, gradients, loss, scale)
        kept = replaced(before, counted, COUNTED)
        for part in range(len(self._part_locks) - 1):
            with self._waiting_for(self._part_locks[part]):
                # The counts from before this push are its own; the parameter is what others have made of it by now.
                now = replaced(before, self._with(own), part)
                stepped, _ = self._step_part(part, now, gradients, loss, scale)
            kept = replaced(kept, stepped, part)
        with self._lock:
            self.version += 1
        return norm, self._own(kept)

    def _step_part(self, part: int, learner: LearnerState, *push: PyTree) -> tuple[LearnerState, Array]:
        stepped, norm = jax.block_until_ready(self._apply(learner, *push, part))
        with self._lock:  # of all parts: they lie in one tree
            self.learner = replaced(self.learner, self._shared(stepped), part)
        return stepped, norm


class ServerState(NamedTuple):
    """The server's learner, whose `updates` is the version, and the workers."""

    learner: LearnerState
    workers: tuple[Worker, ...]


def build(
    components: Components,
    devices: Sequence[jax.Device],
    seeds: Sequence[int],
    settings: Sequence[HParams],
    axes: Axes,
    report: Callable[[str], None] = print,
    fault_hook: Callable[[int, int], None] | None = None,
    engine: Engine | None = None,
) -> tuple[Runner, list[ServerState]]:
    """The runner of one member, all of it on the first device, or with an `engine` in processes of their own.

    `fault_hook(worker, rollouts)` is called before every rollout: tests make it sleep or fail.
    """
    return of_host_loop(lambda: ParameterServer(components, settings[0], axes, report, fault_hook, engine), seeds[0])


def first_state(components: Components, axes: Axes, seed: Array, hparams: HParams) -> ServerState:
    """The learner and the workers of a run's seed."""
    key = jax.random.key(seed)
    learner = first_learner(components, key, hparams)
    workers = tuple(start_worker(components, learner, key, index, axes.own_statistics) for index in range(axes.workers))
    return ServerState(learner, workers)


def state_bytes(components: Components, axes: Axes) -> tuple[int, int]:
    """Bytes of the whole state, and of the workers' replays in it."""
    state = jax.eval_shape(functools.partial(first_state, components, axes), 0, components.agent.defaults)
    return tree_bytes(state), tree_bytes([worker.replay for worker in state.workers])


def make_node(config: Config, factory: Callable[..., PyTree] | None, hparams: HParams) -> WorkerNode:
    """A worker in a process of its own; `factory` makes its environment where that is a user's."""
    components = remake(config, factory)
    return WorkerNode(compile_worker(components), hparams, config)


def make_server(config: Config, factory: Callable[..., PyTree] | None, hparams: HParams, axes: Axes) -> Server:
    """The server in a process of its own."""
    return Server(compile_apply(remake(config, factory), hparams), axes)


@once_each
def _step_program(components: Components, part: int | None) -> Program:
    """step(learner, gradients, loss, scale [], hparams) -> (learner or the part of it, gradient norm)."""

    def step(
        learner: LearnerState, gradients: PyTree, loss: Array, scale: Array, hparams: HParams
    ) -> tuple[PyTree, Array]:
        scaled = traced(hparams, learning_rate=hparams.learning_rate * scale)
        stepped, norm = components.agent.apply(learner, gradients, loss, scaled)
        # What is not returned is not computed.
        return stepped if part is None else take(stepped, part), norm

    return jax.jit(step)


def compile_apply(components: Components, hparams: HParams) -> Callable[..., PyTree]:
    """apply(learner, gradients, loss, scale [], part=None) -> (learner, gradient norm): a step of `scale` times the
    rate, of the whole learner or of one part of it alone."""

    program = functools.cache(functools.partial(_step_program, components))  # looked up at every push

    def run(
        learner: LearnerState, gradients: PyTree, loss: Array, scale: Array, part: int | None = None
    ) -> tuple[LearnerState, Array]:
        stepped, norm = program(part)(learner, gradients, loss, scale, hparams)
        return (stepped if part is None else put(learner, part, stepped)), norm

    return run


@once_each
def _first_program(components: Components, axes: Axes) -> Program:
    return jax.jit(functools.partial(first_state, components, axes))


class ParameterServer:
    """Server and nodes, and a chunk of work for them."""

    def __init__(
        self,
        components: Components,
        hparams: HParams,
        axes: Axes,
        report: Callable[[str], None],
        fault_hook: Callable[[int, int], None] | None,
        engine: Engine | None,
    ) -> None:
        self.components, self.axes, self.fault_hook = components, axes, fault_hook
        config, self.hparams = components.config, traced_hparams(components.agent.complete(hparams))
        self.pool = WorkerPool(axes.workers, report)
        self.seen = Seen((*rollouts_of(axes.workers), "extra_rollouts"), ["running"])
        self.rollouts = [0] * axes.workers
        self.programs = compile_worker(components)
        workers = range(axes.workers)
        self.apart = engine is not None
        if engine is None:
            self.server = Server(compile_apply(components, self.hparams), axes)
            self.nodes = [WorkerNode(self.programs, self.hparams, config) for _ in workers]
        else:
            recipe = config, registry.factory(config.env), self.hparams
            self.server = engine.spawn(make_server, *recipe, axes, threads=axes.workers + 1)
            self.nodes = [engine.spawn(make_node, *recipe) for _ in workers]
        self.zero_metrics = self.programs.zeros._replace(seen=zeros(self._counted()))

    def _counted(self) -> dict[str, float]:
        """What server and workers have counted since the last call."""
        return {**self.server.take(), **self.seen.take()}

    def init(self, seed: int) -> ServerState:
        """The run's first state."""
        return _first_program(self.components, self.axes)(np.uint32(seed), self.hparams)

    def warm_up(self, state: ServerState) -> None:
        """Compiles every program, on copies; in all processes at once."""

        def warm(node: WorkerNode) -> None:
            node.begin(jax.tree.map(jnp.copy, state.workers[0]))
            node.prefill(self.server)
            node.learn(self.server, 0)

        self.server.begin(state.learner)
        # Threads wait for processes; in this one the first compiles, and the others would only wait for it.
        with ThreadPoolExecutor() as pool:
            list(pool.map(warm, self.nodes if self.apart else self.nodes[:1]))
        self._counted()

    def telemetry(self, states: list[ServerState]) -> Mapping[str, Scalar]:
        """`bytes_per_update`: a pull of parameters and target, and a push of a gradient."""
        learner = states[0].learner
        moved = 2 * tree_bytes(learner.params) + tree_bytes(learner.target_params)
        updates = int(learner.updates)  # fewer than gradients, where pushes were dropped or lost
        return {"updates": updates, "bytes_per_update": float(moved), "dead_workers": self.pool.num_dead}

    def lean(self, state: ServerState) -> PyTree:
        """Without the workers' environments and replays."""
        return state._replace(workers=tuple(without(worker, "state", "replay") for worker in state.workers))

    def refill(self, states: list[ServerState], iteration: int, go_on: GoOn) -> list[ServerState]:
        """Each worker's last rollouts, one worker after the other."""
        learner, config = states[0].learner, self.components.config
        held = self.components.replay.rows // config.rollout_length
        counts = [min(int(worker.acted), held) for worker in states[0].workers]
        done, workers = 0, []
        for worker, count in zip(states[0].workers, counts, strict=True):
            worker, sums = worker._replace(acted=worker.acted - count), jax.tree.map(jnp.copy, self.programs.zeros)
            for left in range(count, 0, -1):
                if not go_on(done, sum(counts)):
                    break
                when = np.int32(max(0, iteration - left * len(counts)))  # about: iterations go to whoever is free
                worker, episodes, _ = jax.block_until_ready(
                    self.programs.act(learner.params, worker, sums.episodes, self.hparams, when)
                )
                sums, done = sums._replace(episodes=episodes), done + 1
            workers.append(worker)
        return [ServerState(learner, tuple(workers))]

    def run(
        self, states: list[ServerState], metrics: list[training.Metrics], start: int, stop: int, learning: bool
    ) -> tuple[list[ServerState], list[training.Metrics]]:
        """Iterations start <= i < stop, handed out to the workers as tickets."""
        workers, begun, began = list(states[0].workers), set[int](), time.perf_counter()
        latest: dict[int, int] = {}  # worker -> its last iteration
        self.server.begin(states[0].learner)

        def work_on(work: Work, index: int, ticket: int) -> None:
            node = self.nodes[index]
            if index not in begun:
                node.begin(workers[index])
                begun.add(index)
            if self.fault_hook is not None:
                self.fault_hook(index, self.rollouts[index])
            self.rollouts[index] += 1
            extra = 0
            if learning:
                extra = node.learn(self.server, start + ticket)
                latest[index] = ticket
            else:
                node.prefill(self.server)
            self.seen.count(f"rollouts_{index}", 1 + extra)
            self.seen.count("extra_rollouts", extra)

        work, threads = self.pool.start(range(stop - start), work_on)
        self.pool.join(work, threads)
        total = metrics[0]
        for index in sorted(begun, key=lambda index: latest.get(index, -1)):
            if end := self.pool.ended(work, index, self.nodes[index].end):
                workers[index], total = end[0], _add(total, end[1])
                if index in latest:
                    total = total._replace(epsilon=end[1].epsilon)
        workers = mended(workers, work.dead)
        learner = self.server.end()
        # A copy: the metrics outlive the chunk, and nothing may be shared between them and the state.
        self.seen.wait("running", time.perf_counter() - began)
        seen = added(total.seen, self._counted())
        total = total._replace(first_bad_update=jnp.copy(learner.first_bad_update), seen=seen)
        return [ServerState(learner, tuple(workers))], [total]


def _add(total: training.Metrics, sums: training.Metrics) -> training.Metrics:
    return total._replace(
        episodes=jax.tree.map(jnp.add, total.episodes, sums.episodes),
        learning=jax.tree.map(jnp.add, total.learning, sums.learning),
        updates=total.updates + sums.updates,
    )


def _build(job: Job[Axes]) -> Built:
    return build(job.components, job.devices, job.seeds, job.settings, job.axes, job.report, engine=job.engine)


PARAMETER_SERVER = Scheme(
    Axes,
    _build,
    lambda axes, components: state_bytes(components, axes),
    lambda axes: Devices(),
    remote=lambda axes: True,
    threaded=True,
)
