"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from types import TracebackType
from typing import Any, TextIO, cast

PLAIN_EVERY = 5.0  # seconds between plain lines


class Dropping:
    """A stream that drops what cannot be written: its terminal or reader has gone, its disk is full. No reason to end
    what is being done."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except ValueError:  # closed
            return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def stderr() -> TextIO:
    """The present stderr, which drops what cannot be written."""
    return cast(TextIO, Dropping(sys.stderr))


def tell(line: str) -> None:
    """A line on stderr, where it can be written."""
    print(line, file=stderr(), flush=True)


class Progress:
    """Shows steps, rate, return (or what `quantity` names) and time left. A context manager.

    Work of several `parts`, one after the other, has `total_steps` in each and begins with part `first`; `update` with
    fewer steps than before begins the next. Rate and time left are those of all.
    """

    def __init__(
        self,
        total_steps: int,
        label: str,
        enabled: bool = True,
        quantity: str = "return",
        digits: int = 1,
        parts: int = 1,
        first: int = 0,
    ):
        self._total, self._label, self._enabled, self._parts = total_steps, label, enabled, parts
        self._part, self._latest = first, 0
        self._quantity, self._digits = quantity, digits
        self._bar: Any = None
        self._task = 0
        self._last_line = 0.0
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        if self._enabled and stderr().isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(file=stderr()))
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total * self._parts, text="compiling")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, env_steps: int, value: float, final: bool = False) -> None:
        """`env_steps` done per member, and the latest mean return (or other quantity)."""
        if not self._enabled:
            return
        now = time.perf_counter()
        self._part += env_steps < self._latest
        self._latest = env_steps
        overall = self._part * self._total + env_steps
        self._start = self._start or (now, overall)
        elapsed, done = now - self._start[0], overall - self._start[1]
        rate = done / elapsed if elapsed > 0 else 0.0
        part = f"{self._part + 1} of {self._parts}: " if self._parts > 1 else ""
        text = f"{part}{env_steps:,}/{self._total:,} steps  {rate:,.0f}/s  {self._quantity} {value:.{self._digits}f}"
        if self._bar:
            self._bar.update(self._task, completed=overall, text=text)
        elif final or now - self._last_line > PLAIN_EVERY:
            self._last_line = now
            remaining = self._total * self._parts - overall
            left = f"  {remaining / rate:,.0f} s left" if rate > 0 and remaining > 0 else ""
            self.say(f"{self._label}  {text}{left}")

    def say(self, line: str) -> None:
        """One line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            tell(line)
