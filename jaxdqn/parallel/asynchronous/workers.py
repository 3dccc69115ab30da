"""Worker threads that share a chunk of work: tickets, a stop flag, bounded waits, deaths that are reported once and
what they leave, and what threads count.

Every wait has a time-out and looks at the stop flag, so that no thread outlives its chunk. Threads add to Python's
counters; at the end of a chunk these move into `training.Metrics.seen`, so that they are of the same window as every
other sum there, over whatever chunks and sessions it had.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, PyTree
from jaxdqn.errors import UserError

POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # for each thread, when the chunk is abandoned
T = TypeVar("T")


class NodeDied(RuntimeError):
    """A node's process ended, or could not be made."""


class Work:
    """The tickets of one chunk and the state its threads share. `condition` guards everything that changes."""

    def __init__(self, tickets: range, report: Callable[[str], None]) -> None:
        self.condition = threading.Condition()
        self.stopping = False
        self.finished = 0  # tickets done
        self.dead: dict[int, str] = {}  # worker -> cause
        self._tickets, self._total = iter(tickets), len(tickets)
        self._returned: list[int] = []
        self._report = report

    def take(self) -> int | None:
        """The next ticket that nobody else has; None when all are done.

        Waits while others work on the last ones: whoever dies hands its own back, and then somebody must be there.
        """
        with self.condition:
            while not self.stopping and self.finished < self._total:
                ticket = self._returned.pop() if self._returned else next(self._tickets, None)
                if ticket is not None:
                    return ticket
                self.condition.wait(POLL_SECONDS)
        return None

    def stop(self) -> None:
        """Ends the chunk early: no more tickets, and every wait is over."""
        with self.condition:
            self.stopping = True
            self.condition.notify_all()

    def done(self) -> None:
        """Counts a ticket as finished and wakes who waits for that."""
        with self.condition:
            self.finished += 1
            self.condition.notify_all()

    def wait_until(self, ready: Callable[[], bool]) -> float:
        """Waits for `ready()` (called under the condition) or the stop flag; the seconds it took."""
        began = time.perf_counter()
        with self.condition:
            while not (ready() or self.stopping):
                self.condition.wait(POLL_SECONDS)
        return time.perf_counter() - began

    def bury(self, worker: int, ticket: int | None, error: BaseException) -> None:
        """Notes a worker's death, says it once, and hands its ticket to another."""
        # The last line: a program's error comes with the whole story of the callback in which it began.
        cause = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
        with self.condition:
            self.dead[worker] = cause
            if ticket is not None:
                self._returned.append(ticket)
            self.condition.notify_all()
        self._report(f"warning: worker {worker} died and the others go on without it: {cause}")


class WorkerPool:
    """Threads 0 .. count-1 that work chunk after chunk; a worker that died stays dead."""

    def __init__(self, count: int, report: Callable[[str], None]) -> None:
        self._count = count
        self.alive = list(range(count))
        self._report = report

    def start(
        self, tickets: range, work_on: Callable[[Work, int, int], None]
    ) -> tuple[Work, Sequence[threading.Thread]]:
        """Starts the living workers on a chunk: each calls work_on(work, worker, ticket) for the tickets it takes."""
        work = Work(tickets, self._report)

        def life(worker: int) -> None:
            ticket: int | None = None
            try:
                while (ticket := work.take()) is not None:
                    work_on(work, worker, ticket)
                    work.done()
            except Exception as error:  # its cause is reported, and the others go on
                work.bury(worker, ticket, error)

        threads = [threading.Thread(target=life, args=(w,), name=f"worker-{w}", daemon=True) for w in self.alive]
        for thread in threads:
            thread.start()
        return work, threads

    @property
    def num_dead(self) -> int:
        """How many workers have died so far."""
        return self._count - len(self.alive)

    def join(self, work: Work, threads: Sequence[threading.Thread]) -> None:
        """Waits for the threads and buries the dead. Raises `UserError` when none is left."""
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(POLL_SECONDS)
        except BaseException:  # a second Ctrl-C, say
            work.stop()
            for thread in threads:
                thread.join(GRACE_SECONDS)
            raise
        self._leave(work)

    def answered(self, work: Work, worker: int, ask: Callable[[], T]) -> T | None:
        """What a worker's node answers after the chunk; None where it is dead, and cannot. One whose process ended
        since is buried as others are. Raises `UserError` when none is left."""
        try:
            return ask()
        except Exception as error:
            if worker not in self.alive:
                return None
            if not isinstance(error, NodeDied):
                raise
            work.bury(worker, None, error)
            self._leave(work)
            return None

    def ended(self, work: Work, worker: int, end: Callable[[], PyTree]) -> PyTree:
        """What a worker's node made of a chunk, its `end()`; None where a dead one took that with it."""
        made = self.answered(work, worker, end)
        return made if intact(made) else None

    def _leave(self, work: Work) -> None:
        self.alive = [worker for worker in self.alive if worker not in work.dead]
        if not self.alive:
            raise UserError(f"every worker died; the last cause: {list(work.dead.values())[-1]}")


W = TypeVar("W", bound=PyTree)


def intact(tree: PyTree) -> bool:
    """Whether every array of `tree` can still be read: none was donated to a program that failed, or came from one."""
    try:
        jax.block_until_ready(tree)
    except Exception:  # whatever the program failed with
        return False
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def mended(workers: Sequence[W], dead: Collection[int]) -> list[W]:
    """`workers`, where the broken among the dead are copies of a living one with a key of their own.

    So a state with dead workers can be saved, and a resumed run has all of them again. A worker has a `key`;
    one that is not dead must be left.
    """
    living = next(worker for index, worker in enumerate(workers) if index not in dead)
    return [
        _twin(living, index) if index in dead and not intact(worker) else worker for index, worker in enumerate(workers)
    ]


def _twin(worker: W, index: int) -> W:
    key = jax.random.fold_in(worker.key, index)
    return jax.tree.map(jnp.copy, worker)._replace(key=key)


LAG_BINS = (0, 1, 2, 4, 8, 16, 32)  # lower edges, in versions
LAGS = ("lag_sum", "lag_max", *(f"lag_{low}" for low in LAG_BINS))


def rollouts_of(num_workers: int) -> list[str]:
    """The names under which the workers' rollouts are counted."""
    return [f"rollouts_{worker}" for worker in range(num_workers)]


class Seen:
    """Thread-safe sums: numbers called `counts`, and seconds called `waits`."""

    def __init__(self, counts: Iterable[str], waits: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        # Each lag may have been many versions: their sum is for a mean, and no count.
        sums = {name: 0.0 for name in ("lag_sum",) if name in counts} | {f"{name}_seconds": 0.0 for name in waits}
        self._zeros: dict[str, float] = {**dict.fromkeys(counts, 0), **sums}
        self._sums = dict(self._zeros)

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a number, such as dropped or lost."""
        with self._lock:
            self._sums[name] += by

    def wait(self, name: str, seconds: float) -> None:
        """Adds to a time that threads spent."""
        with self._lock:
            self._sums[f"{name}_seconds"] += seconds

    def lag(self, versions: int) -> None:
        """How many versions old the parameters behind some experience or gradient were."""
        with self._lock:
            self._sums["lag_sum"] += versions
            self._sums["lag_max"] = max(versions, self._sums["lag_max"])
            self._sums[f"lag_{max(low for low in LAG_BINS if low <= versions)}"] += 1

    def take(self) -> dict[str, float]:
        """All sums by name, always the same names; they start anew."""
        with self._lock:
            sums, self._sums = self._sums, dict(self._zeros)
            return sums


def zeros(sums: Mapping[str, float]) -> dict[str, Array]:
    """`Metrics.seen` of one member before anything is counted."""
    return {name: jnp.zeros((), jnp.int32 if isinstance(x, int) else jnp.float32) for name, x in sums.items()}


def added(seen: Mapping[str, Array], sums: Mapping[str, float]) -> dict[str, Array]:
    """`Metrics.seen` with what has been counted since."""
    return {name: (jnp.maximum if name == "lag_max" else jnp.add)(seen[name], x) for name, x in sums.items()}


def columns(seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of `Metrics.seen`, arrays [M]: its sums, and what is made of them.

    lag_mean, lag_max (versions), lag_B (how many from B up to the next of LAG_BINS), every number, every wait (seconds
    of all threads), rollouts_I of each worker, worker_rate_I per second of running, the slowest and the fastest.
    """
    if not seen:
        return {}
    count = sum(seen[f"lag_{low}"] for low in LAG_BINS)
    running = np.maximum(seen["running_seconds"], 1e-9)
    rates = {name.split("_")[1]: x / running for name, x in seen.items() if name.startswith("rollouts_")}
    return {
        "lag_mean": seen["lag_sum"] / np.maximum(count, 1),
        **{name: x for name, x in seen.items() if name != "lag_sum"},
        "worker_rate_min": np.min(list(rates.values()), axis=0),
        "worker_rate_max": np.max(list(rates.values()), axis=0),
        **{f"worker_rate_{worker}": rate for worker, rate in rates.items()},
    }
