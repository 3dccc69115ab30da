"""A sweep's directory: space.yaml, trials.parquet, metrics.parquet, lineage.parquet, runs/ and the report.

space.yaml says what is searched, and runs/ what was trained; all else is computed from these, so that a sweep that was
killed at any moment goes on from them.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jaxdqn.errors import UserError
from jaxdqn.files.paths import write_atomically, write_text
from jaxdqn.runs import metrics
from jaxdqn.runs.directory import RunDirectory
from jaxdqn.runs.directory import create as _create
from jaxdqn.sweeps import reading
from jaxdqn.sweeps.stage import RUNS, Stage, path_of
from jaxdqn.sweeps.sweep import Sweep

SPACE = "space.yaml"


def create(folder: pathlib.Path, sweep: Sweep) -> RunDirectory:
    """A new sweep's directory, locked when entered. Raises `UserError` where there is already something."""
    if (folder / SPACE).exists():
        raise UserError(f"{folder} already holds a sweep; continue it with --resume {folder}, or choose another --out.")
    locked = _create(folder)
    with locked:
        locked.check_unused()
        write_text(folder / SPACE, yaml.safe_dump(reading.to_plain(sweep), sort_keys=False))
        (folder / RUNS).mkdir()
    return locked


def load(folder: pathlib.Path) -> Sweep:
    """The sweep in `folder`. Raises `UserError` where there is none."""
    if not (folder / SPACE).is_file():
        raise UserError(f"{folder} holds no sweep: there is no {SPACE} in it.")
    return reading.load(folder / SPACE)


def write_table(folder: pathlib.Path, name: str, rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Writes `rows` as the table `name`.parquet; returns it."""
    frame = pd.DataFrame(list(rows))
    write_atomically(folder / f"{name}.parquet", lambda path: frame.to_parquet(path, index=False))
    return frame


def add_metrics(folder: pathlib.Path, stages: Sequence[Stage]) -> None:
    """Copies the metrics of finished stages into metrics.parquet, a folder with a part for each."""
    whole = folder / "metrics.parquet"
    whole.mkdir(exist_ok=True)
    for stage in stages:
        part = whole / f"{stage.name}.parquet"
        if not _is_whole(part):
            frame = metrics.read(path_of(folder, stage.name) / "metrics.parquet")
            write_atomically(part, functools.partial(frame.to_parquet, index=False))


def _is_whole(part: pathlib.Path) -> bool:
    try:
        return bool(pq.read_metadata(part))
    except (OSError, pa.ArrowException):
        return False
