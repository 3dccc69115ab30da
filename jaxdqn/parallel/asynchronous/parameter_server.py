"""A parameter server and its workers: asynchronous pulls of parameters and pushes of gradients.

Each worker has its own environments, key and replay: it pulls, acts, computes a gradient with what it pulled, and
pushes; the server applies pushes as they come. With the latest block as replay this is asynchronous n-step Q-learning
and A3C (Mnih et al., 2016), with a ring of its own per worker Gorila's learners (Nair et al., 2015). An iteration is
one worker's rollout of config.num_envs environments with U pushes, so that one worker is the fused loop.

The iterations of a chunk are tickets. A thread for each worker takes them and has its node do them: here, or, with an
engine, in a process of its own that finds the server in another.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import training
from jaxdqn.base import Array, LearnerState
from jaxdqn.config import Config, HParams
from jaxdqn.environments import registry
from jaxdqn.parallel.asynchronous import telemetry
from jaxdqn.parallel.asynchronous.engine import Engine, remake
from jaxdqn.parallel.asynchronous.server import Axes, Server, put, take, validate
from jaxdqn.parallel.asynchronous.server_worker import Node, Worker, compile_programs, first_learner, start
from jaxdqn.parallel.asynchronous.survivors import ended, mended
from jaxdqn.parallel.asynchronous.telemetry import Seen, rollouts_of
from jaxdqn.parallel.asynchronous.workers import Work, WorkerPool
from jaxdqn.parallel.compiled.memory import tree_bytes
from jaxdqn.parallel.compiled.runner import Components, Runner, greedy_episodes, of_scheme, on_one, over_members


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

    `fault_hook(worker, rollouts)` is called before every rollout: tests make it sleep or fail. Raises `UserError`.
    """
    validate(axes)
    return of_scheme(lambda: _Scheme(components, devices[0], settings[0], axes, report, fault_hook, engine), seeds[0])


def first_state(components: Components, axes: Axes, seed: Array, hparams: Any) -> ServerState:
    """The learner and the workers of a run's seed."""
    key = jax.random.key(seed)
    learner = first_learner(components, key, hparams)
    workers = tuple(start(components, learner, key, index, axes.own_statistics) for index in range(axes.num_workers))
    return ServerState(learner, workers)


def state_bytes(components: Components, axes: Axes) -> tuple[int, int]:
    """Bytes of the whole state, and of the workers' replays in it."""
    state = jax.eval_shape(functools.partial(first_state, components, axes), 0, HParams())
    return tree_bytes(state), tree_bytes([worker.replay for worker in state.workers])


def make_node(config: Config, factory: Callable[..., Any] | None, hparams: Any) -> Node:
    """A worker in a process of its own; `factory` makes its environment where that is a user's."""
    components = remake(config, factory)
    return Node(compile_programs(components, jax.devices()[0], hparams), hparams, config)


def make_server(config: Config, factory: Callable[..., Any] | None, hparams: Any, axes: Axes) -> Server:
    """The server in a process of its own."""
    return Server(compile_apply(remake(config, factory), jax.devices()[0], hparams), axes)


def compile_apply(components: Components, device: jax.Device, hparams: Any) -> Callable[..., Any]:
    """apply(learner, gradients, loss, scale [1, 1], part=None) -> (learner, gradient norm): a step of `scale` times the
    rate, of the whole learner or of one part of it alone."""

    def apply(
        learner: LearnerState, gradients: Any, loss: Array, scale: Array, hparams: Any
    ) -> tuple[LearnerState, Array]:
        scaled = hparams._replace(learning_rate=hparams.learning_rate * scale)
        return components.agent.apply(learner, gradients, loss, scaled)

    @functools.cache
    def program(part: int | None) -> Any:
        def step(*args: Any) -> tuple[Any, Array]:
            stepped, norm = apply(*args)
            # What is not returned is not computed.
            return stepped if part is None else take(stepped, part), norm

        return on_one(device, step, 5)

    def run(
        learner: LearnerState, gradients: Any, loss: Array, scale: Array, part: int | None = None
    ) -> tuple[LearnerState, Array]:
        stepped, norm = program(part)(learner, gradients, loss, scale, hparams)
        return (stepped if part is None else put(learner, part, stepped)), norm

    return run


class _Scheme:
    """Server and nodes, and a chunk of work for them."""

    def __init__(
        self,
        components: Components,
        device: jax.Device,
        hparams: HParams,
        axes: Axes,
        report: Callable[[str], None],
        fault_hook: Callable[[int, int], None] | None,
        engine: Engine | None,
    ) -> None:
        self.components, self.axes, self.device, self.fault_hook = components, axes, device, fault_hook
        config, self.hparams = components.config, over_members(hparams)
        self.pool = WorkerPool(axes.num_workers, report)
        self.seen = Seen((*rollouts_of(axes.num_workers), "extra_rollouts"), ["running"])
        self.rollouts = [0] * axes.num_workers
        self.programs = compile_programs(components, device, self.hparams)
        self.program = self.programs.gradient
        self.judge = on_one(device, functools.partial(greedy_episodes, components), 2, 2)
        workers = range(axes.num_workers)
        self.apart = engine is not None
        if engine is None:
            self.server = Server(compile_apply(components, device, self.hparams), axes)
            self.nodes = [Node(self.programs, self.hparams, config) for _ in workers]
        else:
            recipe = config, registry.factory(config.env), self.hparams
            self.server = engine.spawn(make_server, *recipe, axes, threads=axes.num_workers + 1)
            self.nodes = [engine.spawn(make_node, *recipe) for _ in workers]
        self.zero_metrics = self.programs.zeros._replace(seen=telemetry.zeros(self._counted()))

    def _counted(self) -> dict[str, float]:
        """What server and workers have counted since the last call."""
        return {**self.server.take(), **self.seen.take()}

    def init(self, seed: int) -> ServerState:
        """The run's first state."""
        make = on_one(self.device, functools.partial(first_state, self.components, self.axes), 2)
        state: ServerState = make(np.full((1, 1), seed, np.uint32), self.hparams)
        return state

    def warm_up(self, state: ServerState) -> None:
        """Compiles every program, on copies; in all processes at once."""

        def warm(node: Node) -> None:
            node.begin(jax.tree.map(jnp.copy, state.workers[0]))
            node.explore(self.server)
            node.learn(self.server, 0)

        self.server.begin(state.learner)
        # Threads wait for processes; in this one the first compiles, and the others would only wait for it.
        with ThreadPoolExecutor() as pool:
            list(pool.map(warm, self.nodes if self.apart else self.nodes[:1]))
        self._counted()

    def telemetry(self, states: list[ServerState]) -> dict[str, Any]:
        """`bytes_per_update`: a pull of parameters and target, and a push of a gradient."""
        learner = states[0].learner
        moved = 2 * tree_bytes(learner.params) + tree_bytes(learner.target_params)
        updates = int(np.asarray(learner.updates)[0, 0])  # fewer than gradients, where pushes were dropped or lost
        return {"updates": updates, "bytes_per_update": float(moved), "dead_workers": self.pool.num_dead}

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
                node.explore(self.server)
            self.seen.count(f"rollouts_{index}", 1 + extra)
            self.seen.count("extra_rollouts", extra)

        work, threads = self.pool.start(range(stop - start), work_on)
        self.pool.join(work, threads)
        total = metrics[0]
        for index in sorted(begun, key=lambda index: latest.get(index, -1)):
            if end := ended(self.nodes[index], index in self.pool.alive):
                workers[index], total = end[0], _add(total, end[1])
                if index in latest:
                    total = total._replace(epsilon=end[1].epsilon)
        workers = mended(workers, work.dead)
        learner = self.server.end()
        # A copy: the metrics outlive the chunk, and nothing may be shared between them and the state.
        self.seen.wait("running", time.perf_counter() - began)
        seen = telemetry.added(total.seen, self._counted())
        total = total._replace(first_bad_update=jnp.copy(learner.first_bad_update), seen=seen)
        return [ServerState(learner, tuple(workers))], [total]


def _add(total: training.Metrics, sums: training.Metrics) -> training.Metrics:
    return total._replace(
        episodes=jax.tree.map(jnp.add, total.episodes, sums.episodes),
        learning=jax.tree.map(jnp.add, total.learning, sums.learning),
        updates=total.updates + sums.updates,
    )
