"""metrics.parquet: a folder of parts, one row per member and logging point; `pandas.read_parquet` reads it whole."""

import pathlib
import re
from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdqn.config import Timeline
from jaxdqn.errors import UserError
from jaxdqn.runs.files import write_atomically

_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


def append(path: pathlib.Path, batch: int, iteration: int, table: pa.Table) -> None:
    """Writes the rows of `table`, the last of them of `iteration`, as one part; atomic."""
    path.mkdir(exist_ok=True)
    part = path / f"part-{batch:04d}-{iteration:012d}.parquet"
    write_atomically(part, lambda temporary: pq.write_table(table, temporary))


def read(path: pathlib.Path) -> pd.DataFrame:
    """All rows, by member and environment steps; empty where there are none yet. Raises `UserError` for damage."""
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else []
    if not parts:
        return pd.DataFrame()
    frame = pd.concat([_read_part(part) for part in parts], ignore_index=True)
    return tidy(frame)


def _read_part(part: pathlib.Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(part)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{part} is damaged ({reason}). Bring it back, or remove {part.parent.parent} to train that run again."
        ) from None


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows by member and environment steps."""
    return frame.sort_values(["member", "env_steps"], ignore_index=True) if len(frame) else frame


def drop_after(path: pathlib.Path, reached: Mapping[int, int]) -> None:
    """Removes what lies after the checkpoints: parts of a batch beyond the iteration that it has `reached`."""
    for part in path.glob("part-*.parquet") if path.is_dir() else []:
        match = _PART.fullmatch(part.name)
        if match and int(match[2]) > reached.get(int(match[1]), -1):
            part.unlink()


def drop_extra(path: pathlib.Path, reached: Mapping[int, int], line: Timeline) -> None:
    """Removes what a run measured at its end, but would not have on its way to the end that it has now: the row there,
    or its evaluation. What an extended run leaves is what the longer run leaves."""
    for batch, iteration in reached.items():
        part = path / f"part-{batch:04d}-{iteration:012d}.parquet"
        if (line.is_point(iteration) and line.is_evaluated(iteration)) or not part.exists():
            continue
        frame = _read_part(part)
        before = frame.iteration < iteration
        evaluation = frame.columns[frame.columns.str.startswith("eval_")]
        frame[evaluation] = frame[evaluation].where(before)
        kept = frame if line.is_point(iteration) else frame[before]
        append(path, batch, iteration, pa.Table.from_pandas(kept, preserve_index=False))


def join_parts(path: pathlib.Path) -> None:
    """One part for each batch, of all its rows in their order: for runs that have finished and are kept."""
    found: dict[str, list[pathlib.Path]] = {}
    for part in sorted(path.glob("part-*.parquet")):
        found.setdefault(part.name.split("-")[1], []).append(part)
    for parts in found.values():
        frame = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
        write_atomically(parts[-1], lambda temporary: frame.to_parquet(temporary, index=False))
        for part in parts[:-1]:
            part.unlink()
