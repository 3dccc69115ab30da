"""What a run measures, as columns: a table [M rows] for each logging point, kept until it is on disk.

A population of hundreds with thousands of points has too many rows for one Python object each.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from jaxdqn.config import HParams
from jaxdqn.runs import metrics, summary

RECENT_POINTS = 5  # that the mean shown to people is over


def identity(
    everyone: Sequence[tuple[int, HParams]], varying: Sequence[str], labels: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """The columns that stay: a row for each of a run's members, with its seed, varying settings and labels."""
    rows = [
        {"member": member, "seed": seed, **{name: getattr(setting, name) for name in varying}, **label}
        for member, ((seed, setting), label) in enumerate(zip(everyone, labels, strict=True))
    ]
    return pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False).replace_schema_metadata(None)


def measured(
    sums: Any, evaluated: Any, counted: Mapping[str, np.ndarray] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """The columns [M] of a logging point's `training.Metrics` [M, shards]: means over episodes, and over updates.

    evaluated: the `evaluation.Episodes` [M, shards, E], or None; counted: further columns [M], of the parallel scheme.
    NaN where nothing was measured.
    """
    episodes = sums.episodes.episodes.sum(axis=1)
    updates = sums.updates[:, 0].astype(np.float32)  # which every shard takes part in
    nothing = np.full(len(episodes), np.nan)

    def mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.divide(total, count, out=np.full(len(count), np.nan, np.float32), where=count > 0)

    columns: dict[str, Any] = {
        "episodes": episodes.astype(int),
        "episode_return": mean(sums.episodes.returns.sum(axis=1), episodes),
        "episode_length": mean(sums.episodes.lengths.sum(axis=1), episodes),
        **{name: mean(x.mean(axis=1), updates) for name, x in sums.learning.items()},
        "epsilon": sums.epsilon[:, 0],
        **counted,
        **(summary.columns(evaluated) if evaluated else dict.fromkeys(summary.EVALUATED, nothing)),
    }
    return {name: x.astype(float) if x.dtype.kind == "f" else x for name, x in columns.items()}


def point(members: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """`members` with further columns: arrays [M], or numbers that are the same for all.

    A label of the name of a measured column, such as the field `loss`, goes by `loss_setting`: neither is lost.
    """
    # NaN as null, as pandas writes it.
    arrays = {name: pa.array(np.broadcast_to(x, len(members)), from_pandas=True) for name, x in columns.items()}
    names = [f"{name}_setting" if name in columns else name for name in members.column_names]
    return pa.table({**dict(zip(names, members.columns, strict=True)), **arrays})


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """A table as dictionaries, for those who want them."""
    return list(table.to_pandas().to_dict("records"))


class Recorder:
    """The points of a run: those that are not yet in `path`, its metrics.parquet, or all of them without one."""

    def __init__(self, path: pathlib.Path | None):
        self._path = path
        self._kept: list[pa.Table] = []
        self._unwritten: list[pa.Table] = []
        self._recent: collections.deque[pa.Table] = collections.deque(maxlen=RECENT_POINTS)

    def add(self, table: pa.Table) -> None:
        """Takes a logging point."""
        self._unwritten.append(table)
        self._recent.append(table.select(["eval_return", "episode_return"]))

    def recent_return(self) -> float:
        """The mean greedy return of the latest points, else that of the episodes of training at the last one."""
        evaluated = pa.chunked_array([x for table in self._recent for x in table.column("eval_return").chunks])
        training = self._recent[-1].column("episode_return")
        return float(np.mean((evaluated.drop_null() if evaluated.null_count < len(evaluated) else training).to_numpy()))

    def flush(self, batch: int) -> list[pa.Table]:
        """Writes the points of `batch` that are not written yet, and returns them."""
        points, self._unwritten = self._unwritten, []
        if self._path is None:
            self._kept += points
        elif points:
            last = points[-1].column("iteration")[0].as_py()
            metrics.append(self._path, batch, last, joined(points))
        return points

    def frame(self) -> pd.DataFrame:
        """All rows that were flushed, by member and environment steps. Raises `UserError` for damage."""
        if self._path is not None:
            return metrics.read(self._path)
        return metrics.tidy(joined(self._kept).to_pandas()) if self._kept else pd.DataFrame()


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other; a column that one lacks is null there."""
    return pa.concat_tables(tables, promote_options="permissive")
