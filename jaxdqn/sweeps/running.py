"""`run` and `resume`: a sweep from its file or values to its table and report."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from jaxdqn.files import paths
from jaxdqn.runs.directory import RunDirectory
from jaxdqn.runs.progress import tell
from jaxdqn.runs.signals import catch_signals
from jaxdqn.sweeps import directory, engines, planning, reading, report, search
from jaxdqn.sweeps.board import Board
from jaxdqn.sweeps.sweep import Sweep


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


def as_sweep(given: Sweep | Mapping[str, Any] | str | pathlib.Path) -> Sweep:
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
            record = search.execute(sweep, folder, engine, around)
            if not record.trained:
                board.say("every stage had been trained before; the report is written again.")
            report.write(folder, sweep)
    return record.write()
