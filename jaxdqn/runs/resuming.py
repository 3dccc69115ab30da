"""Whether a run can go on from where it is, before anything of it is touched: nothing that is there may be lost."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdqn.errors import UserError
from jaxdqn.runs import checkpoints, directory, metrics
from jaxdqn.runs.checkpoints import Checkpoint
from jaxdqn.runs.directory import Continuation

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


def last(path: pathlib.Path) -> list[Checkpoint]:
    """The last checkpoint of every batch of the run in `path`. Raises `UserError` where one is missing or damaged."""
    spec, _ = directory.load(path)
    found = [checkpoints.newest(path / "checkpoints", batch)[0] for batch in range(len(spec.batches))]
    complete = [checkpoint for checkpoint in found if checkpoint is not None]
    if len(complete) < len(found) or len({checkpoint.meta["iteration"] for checkpoint in complete}) > 1:
        raise UserError(
            f"{path} cannot be continued from: a checkpoint is missing or damaged. Bring it back from a copy, or move "
            "that run and those that went on from it away to have them trained again."
        )
    return complete


def selected(sources: Sequence[Checkpoint], origin: Continuation, members: Sequence[int]) -> Checkpoint:
    """The states of `members` of the run that continues `origin`, whose batches' last checkpoints are `sources`."""
    whole = {name: np.concatenate([source.arrays[name] for source in sources]) for name in sources[0].arrays}

    def rows(name: str) -> list[int]:
        taken = origin.learners if name.startswith("state/learner/") else origin.states
        return [taken[member] for member in members]

    arrays = {name: values[rows(name)] for name, values in whole.items()}
    sizes = [len(next(iter(source.arrays.values()))) for source in sources]
    batches = np.repeat(np.arange(len(sources)), sizes)[[origin.states[member] for member in members]]
    seconds = max(sources[batch].meta["batch_seconds"] for batch in batches)
    return Checkpoint(arrays, {**sources[-1].meta, "batch_seconds": seconds})
