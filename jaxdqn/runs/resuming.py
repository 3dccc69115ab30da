"""Where a session of a run begins: at the beginning, at the run's checkpoints, or where another run's members ended.

All is checked before anything is touched: nothing that is there may be lost.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxdqn.errors import UserError
from jaxdqn.files.documents import Fields
from jaxdqn.parallel import hosts
from jaxdqn.runs import checkpoints, directory, metrics
from jaxdqn.runs.checkpoints import Checkpoint
from jaxdqn.runs.directory import Continuation, RunSpec
from jaxdqn.runs.progress import tell
from jaxdqn.runs.settings import INTERRUPTED, TIMEOUT, UNFINISHED

ADVICE = "Nothing was changed. Bring it back from a copy, or train anew with another --out."


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a session of `spec` begins.

    checkpoint: the newest of the run itself, in the directory `source`; None where the session is its first. ends: the
    meta of the newest checkpoint of each batch that has begun. broken_off: whether the session before was broken off,
    so that batches which it had stopped for good stay as they are; of a run that had ended they go on.
    """

    spec: RunSpec
    source: pathlib.Path | None = None
    checkpoint: Checkpoint | None = None
    ends: Mapping[int, Fields] = dataclasses.field(default_factory=dict)
    broken_off: bool = False

    @property
    def batch(self) -> int:
        """The batch that trains first."""
        return self.checkpoint.meta["batch"] if self.checkpoint else 0

    @property
    def reached(self) -> dict[int, int]:
        """The iterations that batches go on from."""
        return {batch: meta["iteration"] for batch, meta in self.ends.items()}

    def stopped(self, batch: int) -> str | None:
        """Why a batch ended before its time, where it is not to go on."""
        return self.ends.get(batch, {}).get("stopped") if self.broken_off else None

    def seconds(self) -> tuple[float, float]:
        """Of training and of compiling before the session."""
        training = [meta["seconds"] for meta in self.ends.values() or [origin.meta for origin in self._origins]]
        return max(training, default=0.0), max((meta["compile_seconds"] for meta in self.ends.values()), default=0.0)

    @functools.cached_property
    def _origins(self) -> list[Checkpoint]:
        """The last checkpoint of every batch of the run whose members go on here, if they are of another. Read late:
        that run may have gone once all batches have begun."""
        return last(pathlib.Path(self.spec.continues.run)) if self.spec.continues else []

    def of_batch(self, batch: int, members: range) -> Checkpoint | None:
        """What `members`, the batch of that number, begin with. Raises `UserError` where it is damaged."""
        if self.source is None or self.checkpoint is None or batch > self.batch:
            origin = self.spec.continues
            return None if origin is None else selected(self._origins, origin, members)
        if batch == self.batch:
            return self.checkpoint
        found, _ = checkpoints.newest(self.source / "checkpoints", batch)
        if found is None:
            raise UserError(f"the checkpoints of batch {batch} are damaged; nothing can be resumed.")
        return found


def find(spec: RunSpec, source: pathlib.Path | None, provenance: Mapping[str, object]) -> Start:
    """Where a session of `spec` begins that continues the run in `source`, if any: the same in every process.

    Warns of checkpoints that are damaged or of another `provenance`. Raises `UserError` where none is left.
    """
    if source is None:
        return Start(spec)
    folder = source / "checkpoints"
    found, warnings = checkpoints.newest(folder)
    if checkpoints.listing(folder) and found is None:
        raise UserError(f"every checkpoint in {folder} is damaged. {ADVICE}")
    _warn(warnings)
    # Before all processes meet: after that the first removes the summary.
    broken_off = directory.status(source) in (INTERRUPTED, TIMEOUT, UNFINISHED)
    everywhere = hosts.exchange(found and [found.meta["batch"], found.meta["iteration"], found.meta["seconds"]])
    if any(other != everywhere[0] for other in everywhere):
        raise UserError(f"the processes find different checkpoints in {source}: it must be one shared directory.")
    ends = checkpoints.ends(folder)
    saved = found.meta if found else provenance
    _warn(
        f"the checkpoint was written with {name} {saved[name]}, this is {provenance[name]}; the run continues, but not "
        "bit for bit."
        for name in ("device", "versions")
        if saved[name] != provenance[name]
    )
    return Start(spec, source, found, ends, broken_off)


def _warn(lines: Iterable[str]) -> None:
    for line in lines if hosts.is_first() else ():
        tell(f"warning: {line}")


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
    common = set[str].intersection(*(set(source.arrays) for source in sources))  # some may be without a replay
    whole = {name: np.concatenate([source.arrays[name] for source in sources]) for name in sorted(common)}

    def rows(name: str) -> list[int]:
        taken = origin.learners if name.startswith("state/learner/") else origin.states
        return [taken[member] for member in members]

    arrays = {name: values[rows(name)] for name, values in whole.items()}
    sizes = [len(next(iter(source.arrays.values()))) for source in sources]
    batches = np.repeat(np.arange(len(sources)), sizes)[[origin.states[member] for member in members]]
    seconds = max(sources[batch].meta["batch_seconds"] for batch in batches)
    return Checkpoint(arrays, {**sources[-1].meta, "batch_seconds": seconds})
