"""Worker threads that share a chunk of work: tickets, a stop flag, bounded waits, and deaths that are reported once.

Every wait has a time-out and looks at the stop flag, so that no thread outlives its chunk.
"""

import threading
import time
from collections.abc import Callable, Sequence

from jaxdqn.errors import UserError

POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # for each thread, when the chunk is abandoned


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
        self.alive = [worker for worker in self.alive if worker not in work.dead]
        if not self.alive:
            raise UserError(f"every worker died; the last cause: {list(work.dead.values())[-1]}")
