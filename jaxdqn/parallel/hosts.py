"""Several hosts: how the processes of one run decide alike, exchange arrays, and end together.

Arrays travel by JAX's collectives. Everything else goes through a star of plain connections to process 0, one line of
JSON a message: JAX aborts a process without a word of ours where one is missing, comes twice or dies, and a connection
that closes says so at once. A run in one process has no star, and every function here is then the identity.

The processes meet at process 0 before JAX knows of them: there, too, a process that is missing or comes twice is one
line in all of them.
"""

import contextlib
import json
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from jaxdqn.errors import UserError, shown

RETRY = 0.2  # seconds between two attempts to reach process 0
SAME = "start every process with the same command, apart from --process-id."

T = TypeVar("T")
Message = dict[str, Any]


class Link:
    """A connection to another process; once it listens, a thread takes in what comes."""

    def __init__(self, process: int, connection: socket.socket):
        self.process = process
        self.inbox: queue.Queue[Message] = queue.Queue()
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def send(self, **message: object) -> None:
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def read(self) -> Message:
        """The next message. Raises EOFError where there is none, ValueError where it is not one of ours."""
        line = self._lines.readline()
        if not line:
            raise EOFError
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(line)
        return message

    def expect(self, seconds: float | None) -> None:
        """How long `send` and `read` may take; None for ever."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


PIECE = 64 * 2**20  # bytes of each process in one collective: a whole replay need not fit on a device twice
GRACE = 3.0  # seconds for process 0 to close its files after another has gone


class _Star:
    """This process among `count`; `links` lead to all others from process 0, and to process 0 from the others."""

    def __init__(self, process: int, count: int, links: list[Link]):
        self.process, self.count, self.links = process, count, links
        self.over = False
        self.lost: str | None = None  # why the run cannot go on
        self._lock = threading.Lock()
        for link in links:
            link.expect(None)
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def exchange(self, value: T) -> list[T]:
        if self.process != 0:
            self._send(self.links[0], value=value)
            return list(self._receive(self.links[0])["values"])
        values = [value, *(self._receive(link)["value"] for link in self.links)]
        for link in self.links:
            self._send(link, values=values)
        return values

    def tell(self, reason: str) -> None:
        """Lets the others end, too."""
        for link in self.links:
            with contextlib.suppress(OSError):
                link.send(lost=reason)

    def _send(self, link: Link, **message: object) -> None:
        with contextlib.suppress(OSError):  # who listens knows better why
            link.send(**message)

    def _receive(self, link: Link) -> Message:
        message = link.inbox.get()
        if "lost" in message:
            raise UserError(message["lost"])
        return message

    def _listen(self, link: Link) -> None:
        reason = f"process {link.process} has gone; what it printed says why. Start all processes again with --resume."
        with contextlib.suppress(EOFError, OSError, ValueError):
            while "lost" not in (message := link.read()):
                link.inbox.put(message)
            reason = message["lost"]
        with self._lock:
            if not self.over:
                self._lose(reason)

    def _lose(self, reason: str) -> None:
        """Ends this process: in good order where its main thread is awake, else, in a collective, by force."""
        self.lost, self.over = reason, True
        self.tell(reason)
        if self.process == 0:  # the others hold no files, and JAX aborts them in a moment if process 0 has died
            for link in self.links:
                link.inbox.put({"lost": reason})
            time.sleep(GRACE)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(2)


_star: _Star | None = None


def join(address: str, num_processes: int, process_id: int, settings: Mapping[str, object], timeout: float) -> None:
    """Meets the other processes at process 0's `address` (HOST:PORT) and starts `jax.distributed`, before the backend.

    `settings` (by name) must be equal in all of them. Raises `UserError` where they are not, where two have one
    process_id, and where not all have come within `timeout` seconds.
    """
    global _star
    import jax

    links = _meet(address, num_processes, process_id, settings, timeout)
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address, num_processes, process_id, cluster_detection_method="deactivate", initialization_timeout=60
    )
    _star = _Star(process_id, num_processes, links)


def is_first() -> bool:
    """Whether this process writes, shows and prints."""
    return _star is None or _star.process == 0


def count() -> int:
    """How many processes run together."""
    return 1 if _star is None else _star.count


def name() -> str:
    """This process, for people."""
    return "process 0 of 1" if _star is None else f"process {_star.process} of {_star.count}"


def exchange(value: T) -> list[T]:
    """Every process's value (JSON types), in their order; all must call it at the same points.

    Raises `UserError` where another process has ended.
    """
    return [value] if _star is None else _star.exchange(value)


def gather(tree: T) -> T:
    """NumPy arrays [d, ...] of every process as [processes * d, ...], in their order, in every process."""
    if _star is None:
        return tree
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(tree)
    # As bytes of one array: one program for all types and shapes.
    mine = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
    pieces = [multihost_utils.process_allgather(mine[i : i + PIECE]) for i in range(0, mine.size, PIECE)]
    everyone = np.concatenate([np.asarray(piece) for piece in pieces], axis=1)  # [processes, bytes]
    ends = np.cumsum([leaf.nbytes for leaf in leaves])
    whole = [
        np.ascontiguousarray(everyone[:, end - leaf.nbytes : end])
        .view(leaf.dtype)
        .reshape(len(everyone) * leaf.shape[0], *leaf.shape[1:])
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)


def lost() -> str | None:
    """Why the run cannot go on, where a computation has just failed because another process ended; else None."""
    end = time.monotonic() + GRACE / 2  # the connection may close after the collective has failed
    while _star is not None and _star.lost is None and time.monotonic() < end:
        time.sleep(0.01)
    return _star.lost if _star is not None else None


def leave() -> None:
    """Waits until every process is done, and parts."""
    global _star
    if _star is None:
        return
    import jax

    _star.exchange("done")
    _star.over = True
    jax.distributed.shutdown()
    for link in _star.links:
        link.close()
    _star = None


def abandon(reason: str, code: int) -> None:
    """Ends this process with `code` and the others with `reason`; returns where there are none."""
    if _star is not None:
        _abandon(_star, reason, code)


def _abandon(star: _Star, reason: str, code: int) -> NoReturn:
    told = star.over
    star.over = True
    if not told:
        star.tell(f"process {star.process} stopped: {reason}")
    if star.process == 0:
        time.sleep(1.0)  # JAX aborts the others when process 0 has gone: let them end first
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # not sys.exit: JAX would wait for the others at exit


def _meet(address: str, num_processes: int, process_id: int, settings: Mapping[str, Any], timeout: float) -> list[Link]:
    """Links to all other processes from process 0, and to process 0 from the others. Raises `UserError`."""
    if num_processes < 1:
        raise UserError(f"num_processes is {num_processes}; it must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id is {process_id}; of {num_processes} processes it must be 0 to {num_processes - 1}."
        )
    if not (timeout > 0 and math.isfinite(timeout)):
        raise UserError(f"connect_seconds is {timeout}; it must be a number above 0.")
    host, port = _parse(address)
    hello = {"process": process_id, "settings": {"num_processes": num_processes, **settings}}
    hello = json.loads(json.dumps(hello, default=str))
    deadline = time.monotonic() + timeout
    if process_id == 0:
        return _wait_for_others(port, num_processes, hello, timeout, deadline)
    return [_reach_first(host, port, hello, timeout, deadline)]


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) < 2**16:
        raise UserError(f"coordinator is {shown(address)}; it must be HOST:PORT, such as 10.0.0.1:1234.")
    return host.strip("[]"), int(port)


def _wait_for_others(port: int, count: int, hello: Message, timeout: float, deadline: float) -> list[Link]:
    """Process 0: a link to each other process, in their order."""
    links: dict[int, Link] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} ({error.strerror}); another process 0 may be running here: give "
            "each process its own --process-id, or take another port."
        ) from error
    with listener:
        try:
            while len(links) < count - 1:
                listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                link = Link(0, listener.accept()[0])
                _admit(link, links, hello)
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(1, count) if i not in links)
            reason = f"process(es) {missing} of {count} did not come within {timeout:g} s; were they all started?"
            _refuse(links.values(), reason)
            raise UserError(reason) from None
        except UserError as error:
            _refuse(links.values(), str(error))
            raise
    # Only now, so that JAX finds the port free.
    for link in links.values():
        link.send(welcome=True)
    return [links[i] for i in sorted(links)]


def _admit(link: Link, links: dict[int, Link], hello: Message) -> None:
    """Reads who calls. Raises `UserError` where it cannot take part, after telling it."""
    link.expect(5.0)
    try:
        theirs = link.read()
        link.process, settings = int(theirs["process"]), dict(theirs["settings"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # a stranger, or one that has gone again
        link.close()
        return
    reason = _difference(link.process, hello["settings"], settings)
    if reason is None and (link.process == 0 or link.process in links):
        reason = f"two processes have --process-id {link.process}; give each its own."
    if reason is not None:
        _refuse([link], reason)
        raise UserError(reason)
    links[link.process] = link


def _refuse(links: Iterable[Link], reason: str) -> None:
    for link in links:
        with contextlib.suppress(OSError):
            link.send(lost=reason)
        link.close()


def _difference(process: int, ours: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    """What process 0 and `process` were told differently, as a sentence."""
    for name in [*ours, *theirs]:
        mine, other = ours.get(name), theirs.get(name)
        if json.dumps(mine) != json.dumps(other):  # as text: NaN equals itself
            return f"process {process} has {name} {other}, process 0 has {mine}: {SAME}"
    return None


def _reach_first(host: str, port: int, hello: Message, timeout: float, deadline: float) -> Link:
    """Another process: its link to process 0, once all have met."""
    at = f"{host}:{port}"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(f"process 0 did not answer at {at} within {timeout:g} s; is it running, and the port open?")
        try:
            link = Link(0, socket.create_connection((host, port), timeout=left))
            break
        except socket.gaierror as error:
            raise UserError(f"the coordinator's host {host!r} is unknown: {error.strerror}.") from None
        except OSError:
            time.sleep(min(RETRY, left))
    link.expect(timeout + 5.0)  # process 0 may have begun to wait later
    try:
        link.send(**hello)
        answer = link.read()
    except (OSError, EOFError, ValueError):
        link.close()
        raise UserError(
            f"{at} answers, but is not waiting for this process: another run may be using the port, or process "
            f"{hello['process']} may be taken."
        ) from None
    if "lost" in answer:
        raise UserError(answer["lost"])
    return link
