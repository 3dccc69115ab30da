"""What people watch while a sweep runs: the stage, and the best trials so far. Lines where there is no terminal."""

import time
from types import TracebackType
from typing import Any

from jaxdqn.runs.progress import stderr, tell
from jaxdqn.sweeps.sweep import Sweep

PLAIN_EVERY, REDRAWN_EVERY, SHOWN = 10.0, 0.5, 8


class Board:
    """A live table. A context manager; `update` takes rows of metrics as they come."""

    def __init__(self, sweep: Sweep, enabled: bool = True):
        self._names, self._enabled = sweep.space.names, enabled
        self._latest: dict[tuple[int, int], dict[str, Any]] = {}  # by trial and seed
        self._began = self._drawn = time.perf_counter()
        self._live: Any = None

    def __enter__(self) -> "Board":
        if self._enabled and stderr().isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=stderr()), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def update(self, rows: list[dict[str, Any]]) -> None:
        """New rows of metrics."""
        for row in rows:
            if row["eval_return"] == row["eval_return"]:
                self._latest[row["trial"], row["seed"]] = row
        now = time.perf_counter()
        if not self._enabled or not rows or now - self._drawn < (REDRAWN_EVERY if self._live else PLAIN_EVERY):
            return
        self._drawn = now
        if self._live:
            self._live.update(self._table(), refresh=True)
        else:
            self.say(self.line(rows[-1]))

    def say(self, line: str) -> None:
        """One line, above the table where there is one."""
        if self._live:
            self._live.console.print(line, highlight=False, markup=False)
        elif self._enabled or line.startswith("warning"):
            tell(line)

    def line(self, row: dict[str, Any]) -> str:
        """Where the sweep stands, in one line."""
        best = self.best()
        leader = f"; best so far: trial {best[0][0]}, return {best[0][1]:.1f}" if best else ""
        return f"{row['stage']}  {row['env_steps']:,} steps  {time.perf_counter() - self._began:.0f} s{leader}"

    def best(self) -> list[tuple[int, float, dict[str, Any]]]:
        """Trials by their latest mean greedy return, the best first: number, return, a row."""
        by_trial: dict[int, list[dict[str, Any]]] = {}
        for (trial, _), row in self._latest.items():
            by_trial.setdefault(trial, []).append(row)
        means = [(trial, sum(r["eval_return"] for r in rows) / len(rows), rows[-1]) for trial, rows in by_trial.items()]
        return sorted(means, key=lambda entry: (-entry[1], entry[0]))

    def _table(self) -> Any:
        from rich.table import Table

        best = self.best()
        title = self.line(next(reversed(self._latest.values()))) if self._latest else "compiling"
        table = Table(title=title, title_justify="left")
        for name in ("trial", "return", "steps", *self._names):
            table.add_column(name, justify="right")
        for trial, mean, row in best[:SHOWN]:
            values = [f"{row[n]:.3g}" if isinstance(row.get(n), float) else str(row.get(n, "-")) for n in self._names]
            table.add_row(str(trial), f"{mean:.1f}", f"{row['env_steps']:,}", *values)
        return table
