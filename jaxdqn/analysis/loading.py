"""Runs and sweeps from their directories into one DataFrame."""

import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jaxdqn.errors import UserError

Path = str | os.PathLike[str]

REQUIRED = ("member", "env_steps")
LABELS = ("run", "env", "agent", "scheme", "num_envs", "sweep")

_PART = re.compile(r"part-(\d+)-\d+\.parquet")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there


class _Run(NamedTuple):
    path: pathlib.Path
    labels: dict[str, Any]  # without the name
    table: pa.Table


def load(paths: Path | Iterable[Path]) -> pd.DataFrame:
    """The metrics of all runs under `paths`: one row per run, member and logging point, in that order.

    A path is a run directory, a sweep directory, or a folder that is searched for either. Beside the columns of
    metrics.parquet there are `run` (the directory's name, with as many parents as make it unique), `env`, `agent`,
    `scheme`, `num_envs`, and `sweep` (name of the sweep's directory) where any run belongs to one. A column that a run
    lacks is NaN in its rows. `seconds` counts from the start of the member's own batch, without compilation: batches
    of a run train one after the other.

    Unfinished runs load as far as they got. A run that cannot be read is named in one warning and left out. Raises
    `UserError` for a path that does not exist or holds no run, and where no run can be read or has metrics yet.
    """
    directories = _find([paths] if isinstance(paths, str | os.PathLike) else list(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # more only get in each other's way: the files are small
        outcomes = list(pool.map(_attempt, directories))
    runs = [outcome for outcome in outcomes if isinstance(outcome, _Run)]
    damaged = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not runs:
        raise UserError(f"no run can be read: {'; '.join(damaged)}.")
    if damaged:
        warnings.warn(f"{len(damaged)} of {len(outcomes)} runs left out: {'; '.join(damaged)}.", stacklevel=2)
    written = [run for run in runs if run.table.num_rows]
    if not written:
        raise UserError(f"no metrics yet in {', '.join(str(run.path) for run in runs)}; wait for a logging point.")
    return _joined(written)


def trials(path: Path) -> pd.DataFrame:
    """The table of a sweep's trials, trials.parquet in its directory. Raises `UserError` where there is none."""
    file = pathlib.Path(path) / "trials.parquet"
    if not file.is_file():
        raise UserError(f"{path} holds no sweep with trials: there is no trials.parquet in it.")
    try:
        return pq.read_table(file).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {_line(error)}.") from error


def is_sweep(path: Path) -> bool:
    """Whether `path` is a sweep's directory."""
    return (pathlib.Path(path) / "space.yaml").is_file()


def _find(paths: Sequence[Path]) -> list[pathlib.Path]:
    """Run directories in and below `paths`, each once. Raises `UserError`."""
    if not paths:
        raise UserError("no path to load runs from.")
    found: dict[pathlib.Path, None] = {}
    for path in paths:
        below = _search(pathlib.Path(path).resolve())
        if not below:
            missing = not pathlib.Path(path).exists()
            raise UserError(f"{path} does not exist." if missing else f"{path} holds no run (no config.yaml below it).")
        found.update(dict.fromkeys(below))
    return list(found)


def _search(root: pathlib.Path) -> list[pathlib.Path]:
    runs = []
    for folder, folders, files in os.walk(root):
        if "space.yaml" in files:
            folders[:] = ["runs"]  # beside them a sweep has copies of their metrics
        elif "config.yaml" in files or "metrics.parquet" in folders:
            runs.append(pathlib.Path(folder))
            folders.clear()  # what lies in a run is its own
        folders.sort()
    return runs


def _attempt(path: pathlib.Path) -> _Run | str:
    """The run, or what is wrong with it."""
    try:
        return _Run(path, _labels(path), _metrics(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, pa.ArrowException, KeyError, TypeError) as error:
        return f"{path} ({_line(error)})"


def _labels(path: pathlib.Path) -> dict[str, Any]:
    values = yaml.load(path.joinpath("config.yaml").read_text(), _Loader)
    config = values["config"]
    of_sweep = is_sweep(path.parent.parent)
    return {
        **{name: config[name] for name in ("env", "agent", "num_envs")},
        "scheme": values.get("axes", {}).get("scheme", "fused"),  # the only one before there were axes
        "sweep": path.parent.parent.name if of_sweep else None,
    }


def _metrics(path: pathlib.Path) -> pa.Table:
    """All parts of a run by member and environment steps. Raises KeyError for a missing column."""
    files = sorted(path.glob("metrics.parquet/part-*.parquet"))
    # Many small files: the time goes to opening them, and read-ahead and threads of each file only add to it.
    parts = [pq.ParquetFile(file, pre_buffer=False).read(use_threads=False) for file in files]
    if not parts:
        return pa.table({})
    table = pa.concat_tables(parts, promote_options="permissive")
    for name in REQUIRED:
        if name not in table.column_names:
            raise KeyError(f"metrics without a column {name}")
    if "seconds" in table.column_names:
        batches = [int(match[1]) if (match := _PART.fullmatch(file.name)) else 0 for file in files]
        batch = np.repeat(batches, [part.num_rows for part in parts])
        table = _with_own_seconds(table, batch)
    member, steps = (table.column(name).to_numpy() for name in REQUIRED)
    order = np.lexsort((steps, member))
    return table if (np.diff(order) == 1).all() else table.take(order)


def _with_own_seconds(table: pa.Table, batch: np.ndarray) -> pa.Table:
    """`seconds` counted from the start of each row's batch, [rows]: from the end of the batch before."""
    seconds = table.column("seconds").to_numpy()
    batches, index = np.unique(batch, return_inverse=True)
    ends = [seconds[batch == earlier].max() for earlier in batches[:-1]]
    own = seconds - np.array([0.0, *ends])[index]
    return table.set_column(table.column_names.index("seconds"), "seconds", pa.array(own))


def _joined(runs: Sequence[_Run]) -> pd.DataFrame:
    names = _unique_names([run.path for run in runs])
    table = pa.concat_tables([run.table for run in runs], promote_options="permissive")
    frame = table.to_pandas(strings_to_categorical=True, split_blocks=True, self_destruct=True)
    lengths = [run.table.num_rows for run in runs]
    labels = {"run": names, **{name: [run.labels[name] for run in runs] for name in LABELS[1:]}}
    if not any(labels["sweep"]):
        del labels["sweep"]
    added = {name: _repeated(values, lengths) for name, values in labels.items()}
    own = {name: frame[name] for name in frame if name not in added}
    return pd.DataFrame({**added, **own}, copy=False)


def _repeated(values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Each run's value in all of its rows; strings as a category, which costs a byte or two a row."""
    if all(isinstance(value, int) for value in values):
        return np.repeat(np.asarray(values), lengths)
    codes, names = pd.factorize(np.asarray(values, object))
    return pd.Categorical.from_codes(np.repeat(codes, lengths), categories=pd.Index(names))


def _unique_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last part of each path, with as many parents as make it unique."""
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        seen = pd.Series(names).duplicated(keep=False)
        longer = ["/".join(path.parts[-depth:]) for path in paths]
        names = [long if again else name for long, name, again in zip(longer, names, seen, strict=True)]
    return names


def _line(error: Exception) -> str:
    if isinstance(error, KeyError):  # whose str() is the quoted key
        return f"no {error.args[0]} in config.yaml" if " " not in str(error.args[0]) else str(error.args[0])
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
