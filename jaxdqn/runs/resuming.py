"""Whether a run can go on from where it is, before anything of it is touched: nothing that is there may be lost."""

import pathlib
from collections.abc import Mapping

from jaxdqn.errors import UserError
from jaxdqn.runs import metrics

ADVICE = "Nothing was changed. Bring it back from a copy, or train anew with another --out."


def check(path: pathlib.Path, reached: Mapping[int, int], log_every: int, from_beginning: bool) -> None:
    """Raises `UserError` where checkpoints or metrics of the run in `path` are missing or damaged.

    reached: the iteration that each batch goes on from; those that are not in it begin anew. from_beginning: rows begin
    with the run, which continues no other.
    """
    folder, rows = path / "checkpoints", path / "metrics.parquet"
    # A run that has ended, whatever way, has saved before; one that was killed early has an empty folder.
    begun = (path / "summary.json").exists() or (not folder.is_dir() and metrics.parts(rows))
    if not reached and begun:
        raise UserError(f"{path} has no checkpoint to go on from: {folder} is missing or empty. {ADVICE}")
    for batch in range(max(reached, default=-1)):
        if batch not in reached:
            raise UserError(f"{path} has no undamaged checkpoint of batch {batch}. {ADVICE}")
    for batch, iteration in reached.items():
        _check_rows(rows, batch, iteration, log_every, from_beginning)


def _check_rows(rows: pathlib.Path, batch: int, iteration: int, log_every: int, from_beginning: bool) -> None:
    """Raises `UserError` where a logging point up to `iteration` has no rows."""
    done = 0 if from_beginning else None
    for part in metrics.parts(rows, batch, iteration):
        first, last = metrics.span(part)
        if done is not None and first - done > log_every:
            raise UserError(f"{rows} lacks the rows of iterations {done + 1} to {first - 1}. {ADVICE}")
        done = last
    if done is not None and iteration - done >= log_every:
        raise UserError(f"{rows} lacks the rows of iterations {done + 1} to {iteration}. {ADVICE}")
