"""Runs and sweeps from their directories into one DataFrame."""

import os
import pathlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdqn.errors import UserError, shortened, shown
from jaxdqn.files import documents
from jaxdqn.files.paths import expanded

Path = str | os.PathLike[str]

REQUIRED = ("member", "env_steps")
LABELS = ("run", "env", "agent", "scheme", "num_envs", "sweep")
UNLEARNED = {"log_interval", "eval_interval", "eval_episodes", "final_episodes", "env_timeout", *LABELS}
"""Fields of a configuration that say how a run is watched, and those that are labels."""


class _Run(NamedTuple):
    path: pathlib.Path
    labels: documents.Fields  # without the name
    settings: documents.Fields  # which all its members have; none of a sweep's run, which goes by its trial
    table: pa.Table


def load(paths: Path | Iterable[Path]) -> pd.DataFrame:
    """The metrics of all runs under `paths`: one row per run, member and logging point, in that order.

    A path is a run directory, a sweep directory, or a folder that is searched for either. Beside the columns of
    metrics.parquet there are `run` (the directory's name, with as many parents as make it unique), `env`, `agent`,
    `scheme`, `num_envs`, and `sweep` (name of the sweep's directory) where any run belongs to one; and the fields of
    configuration, hyperparameters and scheme that differ between runs outside sweeps (`loss_setting` beside a metric
    `loss`). A column that a run lacks is NaN in its rows. `seconds` counts from the start of the member's own batch,
    without compilation: batches of a run train one after the other.

    Symbolic links are followed, and a run that several paths lead to is loaded once. Hidden folders (`.name`) below a
    path are passed over: they are copies, and what is being written.

    Unfinished runs load as far as they got. A run that cannot be read is named in one warning and left out. Raises
    `UserError` for a path that does not exist or holds no run, and where no run can be read or has metrics yet.
    """
    directories, unseen = _find(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # more only get in each other's way: the files are small
        outcomes = [*_of_one_kind(list(pool.map(_attempt, directories))), *unseen]
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
    file = expanded(path) / "trials.parquet"
    if not file.is_file():
        raise UserError(f"{path} holds no sweep with trials: there is no trials.parquet in it.")
    return table(file)


def table(file: pathlib.Path) -> pd.DataFrame:
    """A table of a sweep, by its file. Raises `UserError` where it is damaged."""
    try:
        return pq.read_table(file).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {_line(error)}.") from error


def is_sweep(path: Path) -> bool:
    """Whether `path` is a sweep's directory."""
    return (expanded(path) / "space.yaml").is_file()


def sweeps(paths: Path | Iterable[Path]) -> list[pathlib.Path]:
    """The directories of the sweeps that runs under `paths` belong to. Raises `UserError` as `load` does."""
    return sorted({run.parent.parent for run in _find(paths)[0] if is_sweep(run.parent.parent)})


def _find(paths: Path | Iterable[Path]) -> tuple[list[pathlib.Path], list[str]]:
    """Run directories in and below `paths`, each once; and what is wrong with folders nobody could look into.

    Raises `UserError`.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise UserError("no path to load runs from.")
    found: dict[str, pathlib.Path] = {}  # by what they are, as links may lead to one run twice
    unseen: dict[str, None] = {}
    for path in paths:
        below, errors = _search(expanded(path))
        if not below and not errors:
            missing = not expanded(path).exists()
            raise UserError(f"{path} does not exist." if missing else f"{path} holds no run (no config.yaml below it).")
        found = {os.path.realpath(run): run for run in below} | found
        unseen.update(dict.fromkeys(f"{error.filename} ({_line(error)})" for error in errors))
    return list(found.values()), list(unseen)


def _search(root: pathlib.Path) -> tuple[list[pathlib.Path], list[OSError]]:
    """The directories of runs, each once, and errors of folders that cannot be listed."""
    runs: list[pathlib.Path] = []
    errors: list[OSError] = []
    seen: set[str] = set()  # a link may lead back
    for folder, folders, files in os.walk(root.resolve(), onerror=errors.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "space.yaml" in files:
            folders[:] = [name for name in folders if name == "runs"]  # beside them are copies of their metrics
        elif "config.yaml" in files or "metrics.parquet" in folders:
            # By its own name, unless a link made it a sweep's.
            own, linked = pathlib.Path(real), pathlib.Path(folder)
            runs.append(linked if is_sweep(linked.parent.parent) and not is_sweep(own.parent.parent) else own)
            folders.clear()  # what lies in a run is its own
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return runs, [error for error in errors if isinstance(error, PermissionError)]


def _attempt(path: pathlib.Path) -> _Run | str:
    """The run, or what is wrong with it."""
    try:
        return _Run(path, *_labels(path), _metrics(path))
    except UserError as error:
        return f"{path} ({str(error).rstrip('.')})"
    except (OSError, pa.ArrowException) as error:
        return f"{path} ({shortened(_line(error))})"


def _labels(path: pathlib.Path) -> tuple[documents.Fields, documents.Fields]:
    """The run's own labels, by column, and its settings. Raises `UserError`."""
    values = documents.read_yaml(path / "config.yaml")
    config, axes = values.get("config"), values.get("axes", {})  # there were no axes once
    if not isinstance(config, dict) or not isinstance(axes, dict):
        raise UserError("config.yaml is of no run")
    labels = {**{name: config.get(name) for name in ("env", "agent")}, "scheme": axes.get("scheme", "fused")}
    for name, value in labels.items():
        if not isinstance(value, str):
            raise UserError(f"{name} in config.yaml is {shown(value)}, no name")
    num_envs = config.get("num_envs")
    if not isinstance(num_envs, int) or not 0 < num_envs < 2**63:
        raise UserError(f"num_envs in config.yaml is {shown(num_envs)}, no number of environments")
    sweep = path.parent.parent.name if is_sweep(path.parent.parent) else None
    hparams, vary = values.get("hparams"), values.get("vary")
    known = {} if sweep else {**config, **(hparams if isinstance(hparams, dict) else {}), **axes}
    varied = [setting for setting in vary if isinstance(setting, dict)] if isinstance(vary, list) else []
    apart = UNLEARNED.union(*varied)  # what members differ in is in the metrics
    settings = {str(name): _plain(value) for name, value in known.items() if name not in apart}
    return {**labels, "num_envs": int(num_envs), "sweep": sweep}, settings


def _plain(value: object) -> object:
    """A setting as a value of a column: lists and the like as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else shown(value)


def _of_one_kind(outcomes: list[_Run | str]) -> list[_Run | str]:
    """The same, without runs in which a column is of another kind (number, text, truth) than in most runs."""
    kinds: dict[str, Counter[str]] = {}
    for run in outcomes:
        for name, kind in [] if isinstance(run, str) else _kinds(run.table).items():
            kinds.setdefault(name, Counter())[kind] += 1
    usual = {name: counted.most_common(1)[0][0] for name, counted in kinds.items()}

    def checked(run: _Run | str) -> _Run | str:
        odd = [] if isinstance(run, str) else [n for n, kind in _kinds(run.table).items() if kind != usual[n]]
        return run if isinstance(run, str) or not odd else f"{run.path} (its column {odd[0]} is no {usual[odd[0]]})"

    return [checked(run) for run in outcomes]


def _kinds(table: pa.Table) -> dict[str, str]:
    """What kind of values each column has, those without any left out."""
    kinds = {field.name: _kind(field.type) for field in table.schema}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(of: pa.DataType) -> str | None:
    if pa.types.is_null(of):
        return None
    if pa.types.is_integer(of) or pa.types.is_floating(of):
        return "number"
    if pa.types.is_boolean(of):
        return "truth value"
    return "text" if pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_dictionary(of) else "other"


def _metrics(path: pathlib.Path) -> pa.Table:
    """All parts of a run by member and environment steps. Raises `UserError` for columns that metrics do not have."""
    files = sorted(path.glob("metrics.parquet/part-*.parquet"))
    # Many small files: the time goes to opening them, and read-ahead and threads of each file only add to it.
    parts = [pq.ParquetFile(file, pre_buffer=False).read(use_threads=False) for file in files]
    if not parts:
        return pa.table({})
    table = pa.concat_tables(parts, promote_options="permissive")
    kinds = _kinds(table)
    for name in (*REQUIRED, *({"seconds"} & set(table.column_names))):
        if kinds.get(name) != "number" or table.column(name).null_count:
            raise UserError(f"metrics without a column {name} of numbers")
    odd = [name for name, kind in kinds.items() if kind == "other"]
    if odd:
        raise UserError(f"metrics with a column {odd[0]} of {table.schema.field(odd[0]).type}")
    member, steps = (table.column(name).to_numpy() for name in REQUIRED)
    order = np.lexsort((steps, member))
    return table if (np.diff(order) == 1).all() else table.take(order)


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
    for name, values in _settings(runs).items():
        added[name] = _repeated(values, lengths)
        if name in own:  # members of some runs differ in it
            added[name] = own.pop(name).combine_first(pd.Series(added[name]))
    return pd.DataFrame({**added, **own}, copy=False)


def _settings(runs: Sequence[_Run]) -> dict[str, Sequence[object]]:
    """The settings that differ between runs, by column."""
    columns: dict[str, Sequence[object]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name) for run in runs]
        holders = [run for run in runs if name in run.table.column_names]
        measured = any(name in run.settings for run in holders)  # else it differs between their members
        if (holders and not measured) or len({value for value in values if value is not None}) > 1:
            columns[f"{name}_setting" if measured else name] = values
    return columns


def _repeated(values: Sequence[object], lengths: Sequence[int]) -> np.ndarray | pd.Categorical:
    """Each run's value in all of its rows: numbers, truth values, or a category, which costs a byte or two a row."""
    if all(isinstance(value, int) for value in values):
        return np.repeat(np.asarray(values), lengths)
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return np.repeat(np.asarray(values, float), lengths)
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
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()).rstrip(".") or type(error).__name__
