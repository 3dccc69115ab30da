"""How the processes of one run meet: at process 0, over plain connections, before JAX knows of them.

JAX aborts a process without a word of ours where one is missing or comes twice; here such a thing is one line in all of
them. A message is one line of JSON.
"""

import contextlib
import json
import math
import queue
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jaxdqn.errors import UserError, shown

RETRY = 0.2  # seconds between two attempts to reach process 0
SAME = "start every process with the same command, apart from --process-id."

Message = dict[str, Any]


class Link:
    """A connection to another process; once it listens, a thread takes in what comes."""

    def __init__(self, process: int, connection: socket.socket):
        self.process = process
        self.inbox: queue.Queue[Message] = queue.Queue()
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
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


def meet(address: str, num_processes: int, process_id: int, settings: Mapping[str, Any], timeout: float) -> list[Link]:
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


def _difference(process: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
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
