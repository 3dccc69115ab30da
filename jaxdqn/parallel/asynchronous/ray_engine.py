"""Ray: nodes in processes of this machine, or of a cluster, instead of threads. Optional: the extra `ray`.

A node is any object; `Cluster.spawn` makes it in a process of its own (a Ray actor) and returns something with its
methods, whose calls carry arrays as NumPy arrays. What a node computes is the same wherever it lives. Nodes compute on
CPUs, with one thread each. A call to a node that died raises `NodeDied`: who calls decides what that means.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import PyTree
from jaxdqn.components import Components, make_components
from jaxdqn.config import Config
from jaxdqn.environments import registry
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.parallel.asynchronous.workers import NodeDied

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 60.0
POLL_SECONDS = 1.0


class KeyData(NamedTuple):
    """A typed key on its way between processes."""

    data: np.ndarray


def pack(tree: PyTree) -> PyTree:
    """A tree whose JAX arrays are NumPy's, and keys their data; other leaves stay."""

    def leaf(x: object) -> object:
        if not isinstance(x, jax.Array):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return KeyData(np.asarray(jax.random.key_data(x)))
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def unpack(tree: PyTree) -> PyTree:
    """The inverse of `pack`: NumPy arrays become JAX's."""

    def leaf(x: object) -> object:
        if isinstance(x, KeyData):
            return jax.random.wrap_key_data(jnp.array(x.data))
        # A copy: what came is memory shared between processes, and these may be donated.
        return jnp.array(x) if isinstance(x, np.ndarray) else x

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, KeyData))


class _Host:
    """Holds a node in its process."""

    def __init__(self, make: Callable[..., PyTree], *args: object) -> None:
        self._node = make(*args)

    def call(self, name: str, *args: PyTree) -> PyTree:
        return pack(getattr(self._node, name)(*unpack(args)))

    def pid(self) -> int:
        return os.getpid()


class Remote:
    """A node somewhere else: it has the methods of what it holds, and may be given to other nodes."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Callable[..., PyTree]:
        if name.startswith("_"):  # what pickling asks for
            raise AttributeError(name)
        return lambda *args: wait(self.submit(name, *args))

    def submit(self, name: str, *args: PyTree) -> Any:
        """Starts a call; `wait` has its result."""
        return self._handle.call.remote(name, *pack(args))

    def process(self) -> int:
        """The process number on its machine."""
        import ray

        return ray.get(self._handle.pid.remote())


def wait(call: Any) -> PyTree:
    """The result of a submitted call. Raises `NodeDied`, and what the call itself raised."""
    import ray

    try:
        return unpack(ray.get(call))
    except ray.exceptions.RayActorError as error:
        # Ray's text of a node that could not be made ends with what its maker raised.
        made = not getattr(error, "actor_init_failed", False)
        raise NodeDied("its process ended" if made else str(error).strip().splitlines()[-1]) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NodeDied):  # not the node that was asked, but one that it asked itself
            raise RuntimeError(f"a node that it called died: {error.cause}") from None
        raise error.cause from None


class Cluster:
    """A running Ray that nodes are spawned on."""

    def spawn(self, make: Callable[..., PyTree], *args: object, threads: int = 1) -> Remote:
        """make(*args) in a process of its own; up to `threads` calls run in it at once.

        `make` and `args` are pickled. What they raise comes with the first call.
        """
        import ray

        # Spread: a cluster's machines share the nodes. Placing one needs a CPU, running it needs none.
        actor: Any = ray.remote(_Host)
        placed = actor.options(max_concurrency=threads, scheduling_strategy="SPREAD")
        return Remote(placed.remote(make, *pack(args)))


def check_ray(address: str | None) -> None:
    """Raises `UserError` where Ray is not installed, or nothing answers at the address."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError('engine "ray" needs the ray package: pip install "jaxdqn[ray]".') from None
    if address is not None:
        _probe(address)


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[Cluster]:
    """Ray on this machine, ended afterwards; or the cluster at `address`, "host:port" or "auto".

    Raises `UserError` as `check_ray` does.
    """
    check_ray(address)
    import ray

    with _signals_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that JAX has threads where Ray forks: it executes at once
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            configure_logging=False,
            log_to_driver=False,
            runtime_env={"env_vars": _environment()},
        )
    try:
        yield Cluster()
    finally:
        ray.shutdown()


def _environment() -> dict[str, str]:
    """What JAX is to be in a node's process."""
    # What a user's environment was imported from here, a node finds there.
    kept = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    cache: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if cache:
        kept["JAX_COMPILATION_CACHE_DIR"] = cache
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        kept["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    return {**kept, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1"}


def _probe(address: str) -> None:
    """Raises `UserError` where no Ray answers: Ray itself would try for minutes, and then end this process."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f'ray_address is {address!r}; it is "host:port" (as `ray start --head` prints) or "auto".')
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"nothing answers at ray_address {address!r} ({error}); is `ray start --head` running?"
            ) from None
    program = f"import ray; ray.init(address={address!r}, configure_logging=False)"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise UserError(f"no Ray answers at ray_address {address!r}; is `ray start --head` running, of this version?")


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; a run saves on it."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if mine else None
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


class Pool:
    """Nodes that are alike: each task goes to whichever is free."""

    def __init__(self, nodes: Sequence[Remote], report: Callable[[str], None]) -> None:
        self._alive = dict(enumerate(nodes))
        self._report = report

    def map(self, name: str, tasks: Sequence[tuple[object, ...]]) -> list[PyTree]:
        """node.name(*task) for every task, results in the tasks' order.

        A node that dies is reported, and its task goes to another. Raises `UserError` when none is left.
        """
        import ray

        waiting, running = list(enumerate(tasks))[::-1], dict[Any, tuple[int, int, tuple[object, ...]]]()
        results: dict[int, PyTree] = {}
        free = list(self._alive)[::-1]
        while waiting or running:
            while waiting and free:
                (index, task), node = waiting.pop(), free.pop()
                running[self._alive[node].submit(name, *task)] = index, node, task
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for call in ready:
                index, node, task = running.pop(call)
                try:
                    results[index] = wait(call)
                    free.append(node)
                except NodeDied as error:
                    waiting.append((index, task))
                    self._bury(node, error)
        return [results[index] for index in range(len(tasks))]

    def _bury(self, node: int, error: NodeDied) -> None:
        del self._alive[node]
        if not self._alive:
            raise UserError(f"every node died; the last cause: {error}")
        self._report(f"warning: node {node} died and the others do its work: {error}")


ENGINES = ("local", "ray")


class Engine(Protocol):
    """Makes nodes elsewhere: `ray_engine.Cluster` is one."""

    def spawn(self, make: Callable[..., PyTree], *args: object, threads: int = 1) -> PyTree:
        """make(*args) in a process of its own: something with the methods of what it makes, up to `threads` of which
        may run at once."""


def remake(config: Config, factory: Callable[..., PyTree] | None) -> Components:
    """The parts of `config` in a process that does not know the user's environments: `factory` makes that."""
    if factory is not None:
        registry.register(config.env, factory)
    return make_components(config)


def check(name: str, address: str | None = None) -> None:
    """Raises `UserError` for an unknown engine, for an address without Ray, and where Ray is not there to be used."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    if name == "local" and address is not None:
        raise UserError(f'ray_address {address!r} is for engine "ray"; the engine is "local".')
    if name == "ray":
        check_ray(address)


@contextlib.contextmanager
def running(name: str, address: str | None = None) -> Iterator[Engine | None]:
    """The engine called `name`, started and ended: None for "local", "ray" on this machine or at `address`.

    Raises `UserError` as `check` does.
    """
    check(name, address)
    if name == "local":
        yield None
        return
    with cluster(address) as ray:
        yield ray
