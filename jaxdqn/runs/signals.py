"""Ctrl-C and its like as a flag, for work that ends in good order."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT, SIGTERM and SIGHUP into a flag; a second of its kind acts as it always does. What is
    ignored (SIGHUP under nohup) stays so."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def handler(number: int, frame: object) -> None:
        del frame
        caught.append(number)
        signal.signal(number, previous[number])

    with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)
    try:
        yield lambda: bool(caught)
    finally:
        for known, old in previous.items():
            signal.signal(known, old)
