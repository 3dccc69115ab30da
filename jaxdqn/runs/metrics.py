"""metrics.parquet: a folder of parts, one row per member and logging point; `pandas.read_parquet` reads it whole."""

import os
import pathlib
import re
from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdqn import telemetry
from jaxdqn.errors import UserError
from jaxdqn.files.paths import write_atomically
from jaxdqn.timeline import Timeline

_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


def append(path: pathlib.Path, batch: int, iteration: int, table: pa.Table) -> None:
    """Writes the rows of `table`, the last of them of `iteration`, as one part; atomic."""
    path.mkdir(exist_ok=True)
    part = path / f"part-{batch:04d}-{iteration:012d}.parquet"
    write_atomically(part, lambda temporary: pq.write_table(table, temporary))


def read(path: pathlib.Path) -> pd.DataFrame:
    """All rows, by member and environment steps; empty where there are none yet. Raises `UserError` for damage."""
    found = parts(path)
    if not found:
        return pd.DataFrame()
    frame = pd.concat([_read_part(part) for part in found], ignore_index=True)
    return tidy(frame)


def parts(path: pathlib.Path, batch: int | None = None, until: int | None = None) -> list[pathlib.Path]:
    """The parts (of one batch, with rows until that iteration), in their order. Raises `UserError` where they cannot be
    listed."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read the metrics in {path}: {error.strerror}.") from None
    matches = [match for match in map(_PART.fullmatch, sorted(names)) if match]
    matches = [match for match in matches if batch is None or int(match[1]) == batch]
    return [path / match[0] for match in matches if until is None or int(match[2]) <= until]


def span(part: pathlib.Path) -> tuple[int, int]:
    """The first and last iteration that `part` has rows of; all of it is read. Raises `UserError` for damage."""
    frame = _read_part(part)
    if "iteration" not in frame or not len(frame) or not pd.api.types.is_integer_dtype(frame.iteration):
        raise _damaged(part, "no iterations in it")
    return int(frame.iteration.min()), int(frame.iteration.max())


def _read_part(part: pathlib.Path) -> pd.DataFrame:
    if not part.is_file():  # a pipe would be waited for
        raise _damaged(part, "it is no file")
    try:
        # By a path that cannot be taken for one below a home directory.
        return pd.read_parquet(part.absolute())
    except (OSError, pa.ArrowException) as error:
        raise _damaged(part, str(error)) from None


def _damaged(part: pathlib.Path, reason: str) -> UserError:
    reason = " ".join(reason.split()).rstrip(".")
    run = part.parent.parent
    return UserError(
        f"{part} is damaged ({reason}). Bring it back from a copy, or move {run} away to have that run trained again."
    )


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows by member and environment steps."""
    return frame.sort_values(["member", "env_steps"], ignore_index=True) if len(frame) else frame


def drop_after(path: pathlib.Path, reached: Mapping[int, int]) -> None:
    """Removes what lies after the checkpoints: parts of a batch beyond the iteration that it has `reached`."""
    for part in parts(path):
        _, batch, iteration = part.stem.split("-")
        if int(iteration) > reached.get(int(batch), -1):
            part.unlink()


def drop_extra(path: pathlib.Path, reached: Mapping[int, int], line: Timeline) -> None:
    """Removes what a run measured at its end, but would not have on its way to the end that it has now: the row there,
    or its evaluation. What an extended run leaves is what the longer run leaves."""
    for batch, iteration in reached.items():
        part = path / f"part-{batch:04d}-{iteration:012d}.parquet"
        if (line.is_point(iteration) and line.is_evaluated(iteration)) or not part.exists():
            continue
        frame = _read_part(part)
        before = (frame.iteration < iteration).to_numpy()
        if line.is_point(iteration):
            for name in frame.columns[frame.columns.str.startswith(("eval_", *telemetry.COLUMNS))]:
                frame[name] = frame[name].where(before)
        else:
            frame = frame[before]
        if len(frame):
            append(path, batch, iteration, pa.Table.from_pandas(frame, preserve_index=False))
        else:
            part.unlink()


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
