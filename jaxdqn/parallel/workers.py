"""Worker threads that share a chunk of work: tickets, a stop flag, bounded waits, and deaths that are reported once.

Every wait has a time-out and looks at the stop flag, so that no thread outlives its chunk.
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence

from jaxdqn.errors import UserError

POLL_SECONDS = 0.05


class Work:
    """The tickets of one chunk and the state its threads share. `condition` guards everything that changes."""

    def __init__(self, tickets: range, report: Callable[[str], None]) -> None:
        self.condition = threading.Condition()
        self.stopping = False
        self.finished = 0  # tickets done
        self.dead: dict[int, str] = {}  # worker -> cause
        self._tickets = iter(tickets)
        self._returned: list[int] = []
        self._report = report

    def take(self) -> int | None:
        """The next ticket, each handed out once; None when there are no more."""
        with self.condition:
            if self.stopping:
                return None
            return self._returned.pop() if self._returned else next(self._tickets, None)

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
        cause = "".join(traceback.format_exception_only(error)).strip()
        with self.condition:
            self.dead[worker] = cause
            if ticket is not None:
                self._returned.append(ticket)
            self.condition.notify_all()
        self._report(f"warning: worker {worker} died and the others go on without it: {cause}")


class Crew:
    """Threads 0 .. count-1 that work chunk after chunk; a worker that died stays dead."""

    def __init__(self, count: int, report: Callable[[str], None]) -> None:
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

    def join(self, work: Work, threads: Sequence[threading.Thread]) -> None:
        """Waits for the threads and buries the dead. Raises `UserError` when none is left."""
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        self.alive = [worker for worker in self.alive if worker not in work.dead]
        if not self.alive:
            raise UserError(f"every worker died; the last cause: {list(work.dead.values())[-1]}")
