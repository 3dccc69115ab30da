"""`run` and `resume`: a sweep from its file or values to its table and report, and what people watch meanwhile."""

import pathlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import pandas as pd

from jaxdqn.files import paths
from jaxdqn.files.documents import Fields
from jaxdqn.runs.directory import RunDirectory
from jaxdqn.runs.progress import stderr, tell
from jaxdqn.runs.signals import catch_signals
from jaxdqn.sweeps import directory, engines, planning, reading, report
from jaxdqn.sweeps.evolution import evolve
from jaxdqn.sweeps.record import Record
from jaxdqn.sweeps.rounds import RoundSearch
from jaxdqn.sweeps.sweep import Sweep

PLAIN_EVERY, REDRAWN_EVERY, SHOWN = 10.0, 0.5, 8


class Options(NamedTuple):
    """What does not change a sweep's result.

    engine: see `engines.running`; checkpoint_seconds: at least this long between checkpoints, what a kill can lose.
    """

    engine: str = "local"
    ray_address: str | None = None
    num_devices: int | None = None
    checkpoint_seconds: float = 20.0
    progress: bool = True


def run(sweep: Sweep | Mapping[str, Any] | str | pathlib.Path, out: str | pathlib.Path, **options: Any) -> pd.DataFrame:
    """Runs a sweep (its YAML file, what would be in one, or the records) in the new directory `out`; `options` are
    those of `Options`. Returns the table of trials.

    Raises `UserError`, and `engines.Stopped` after Ctrl-C.
    """
    sweep = as_sweep(sweep)
    return train(sweep, paths.expanded(out), Options(**options), lambda folder: directory.create(folder, sweep))


def resume(out: str | pathlib.Path, **options: Any) -> pd.DataFrame:
    """Goes on with the sweep in `out` to its end; as `run`."""
    folder = paths.expanded(out)
    return train(directory.load(folder), folder, Options(**options), RunDirectory)


def as_sweep(given: Sweep | Mapping[str, object] | str | pathlib.Path) -> Sweep:
    """The records of a sweep. Raises `UserError`."""
    if isinstance(given, Sweep):
        return given
    return reading.parse(given) if isinstance(given, Mapping) else reading.load(paths.expanded(given))


def plan(sweep: Sweep, options: Options) -> planning.Plan:
    """What a sweep will take; everything is checked. Raises `UserError`."""
    return planning.plan(sweep, options.num_devices if options.engine == "local" else None)


def train(
    sweep: Sweep, folder: pathlib.Path, options: Options, lock: Callable[[pathlib.Path], RunDirectory]
) -> pd.DataFrame:
    """Plans, trains and reports the sweep in `folder`, whose directory `lock` makes or opens."""
    with engines.running(options.engine, options.ray_address, options.num_devices) as engine:
        planned = plan(sweep, options)
        if options.progress:
            tell("\n".join(planning.described(planned, sweep)))
        with lock(folder), Board(sweep, options.progress) as board, catch_signals() as interrupted:
            around = engines.Run(folder, options.checkpoint_seconds, board.update, board.say, interrupted)
            record = execute(sweep, engine, around)
            if not record.trained:
                board.say("every stage had been trained before; the report is written again.")
            report.write(folder, sweep)
    return record.write()


def execute(sweep: Sweep, engine: engines.Engine, run: engines.Run) -> Record:
    """Trains what is left of the sweep in `run.folder`, and writes its tables. Raises `Stopped`, and `UserError`."""
    record = Record(sweep, engine, run)
    if sweep.population_based is not None:
        evolve(record)
    else:
        RoundSearch(record).execute()
    record.write()
    return record


class Board:
    """A live table. A context manager; `update` takes rows of metrics as they come."""

    def __init__(self, sweep: Sweep, enabled: bool = True):
        self._names, self._enabled = sweep.space.names, enabled
        self._latest: dict[tuple[int, int], Fields] = {}  # by trial and seed
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

    def update(self, rows: list[Fields]) -> None:
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

    def line(self, row: Fields) -> str:
        """Where the sweep stands, in one line."""
        best = self.best()
        leader = f"; best so far: trial {best[0][0]}, return {best[0][1]:.1f}" if best else ""
        return f"{row['stage']}  {row['env_steps']:,} steps  {time.perf_counter() - self._began:.0f} s{leader}"

    def best(self) -> list[tuple[int, float, Fields]]:
        """Trials by their latest mean greedy return, the best first: number, return, a row."""
        by_trial: dict[int, list[Fields]] = {}
        for (trial, _), row in self._latest.items():
            by_trial.setdefault(trial, []).append(row)
        means = [(trial, sum(r["eval_return"] for r in rows) / len(rows), rows[-1]) for trial, rows in by_trial.items()]
        return sorted(means, key=lambda entry: (-entry[1], entry[0]))

    def _table(self) -> object:
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
