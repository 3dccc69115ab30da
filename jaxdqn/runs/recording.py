"""What a run measures, as columns: a table [M rows] for each logging point, kept until it is on disk; and `Recorder`,
which writes and shows it while a session trains.

A population of hundreds with thousands of points has too many rows for one Python object each.
"""

import collections
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike

from jaxdqn import agents
from jaxdqn.base import PyTree
from jaxdqn.config import HParams, members, values_of, varying
from jaxdqn.parallel import hosts
from jaxdqn.parallel.asynchronous import workers
from jaxdqn.parallel.compiled.runner import Runner
from jaxdqn.runs import metrics, summary, tensorboard, weights_and_biases
from jaxdqn.runs.directory import RunSpec
from jaxdqn.runs.driver import Point
from jaxdqn.runs.progress import Progress
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import advice, of_rate, timeline

FLUSH_SECONDS = 5.0
RECENT_POINTS = 5  # that the mean shown to people is over
IDENTITY = ("member", "seed", "iteration", "env_steps", "updates", "seconds")


class Population(NamedTuple):
    """A run's members: seeds and hyperparameters, which of these vary, and labels, which are further columns."""

    everyone: list[tuple[int, HParams]]
    varying: tuple[str, ...]
    labels: Sequence[Mapping[str, object]]

    def settings(self) -> list[dict[str, object]]:
        """Each member's setting, its seed apart: replicates have equal ones."""
        own = [{name: values_of(setting)[name] for name in self.varying} for _, setting in self.everyone]
        apart = [{name: value for name, value in label.items() if name != "seed"} for label in self.labels]
        return [{**setting, **label} for setting, label in zip(own, apart, strict=True)]


def population_of(spec: RunSpec) -> Population:
    """The members of a run."""
    everyone = members(spec.hparams, spec.seeds, spec.vary)
    labels = spec.labels or ({},) * len(everyone)
    # Members that go on from another run's have the seeds that they had there, which their labels say.
    own = [(label.get("seed", seed), setting) for label, (seed, setting) in zip(labels, everyone, strict=True)]
    return Population(own, varying(spec.vary), labels)


class Batch(NamedTuple):
    """Members that train together: their number among the batches, their runner, and when the session began to train
    them (of `time.perf_counter`), after which seconds of training in earlier ones."""

    number: int
    members: range
    runner: Runner
    began: float
    before: float

    def elapsed(self) -> float:
        """Seconds of training in this session."""
        return time.perf_counter() - self.began


def identity(
    everyone: Sequence[tuple[int, HParams]], varying: Sequence[str], labels: Sequence[Mapping[str, object]]
) -> pa.Table:
    """The columns that stay: a row for each of a run's members, with its seed, varying settings and labels."""
    rows = [
        {"member": member, "seed": seed, **{name: values_of(setting)[name] for name in varying}, **label}
        for member, ((seed, setting), label) in enumerate(zip(everyone, labels, strict=True))
    ]
    return pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False).replace_schema_metadata(None)


def measured(
    sums: PyTree, evaluated: PyTree, counted: Mapping[str, np.ndarray] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """The columns [M] of a logging point's `training.Metrics` [M, shards]: means over episodes, and over updates.

    evaluated: the `evaluation.Episodes` [M, shards, E], or None; counted: further columns [M], of the parallel scheme
    and of telemetry. NaN where nothing was measured.
    """
    episodes = sums.episodes.episodes.sum(axis=1)
    updates = sums.updates[:, 0].astype(np.float32)  # which every shard takes part in
    nothing = np.full(len(episodes), np.nan)

    def mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.divide(total, count, out=np.full(len(count), np.nan, np.float32), where=count > 0)

    columns: dict[str, np.ndarray] = {
        "episodes": episodes.astype(int),
        "episode_return": mean(sums.episodes.returns.sum(axis=1), episodes),
        "episode_length": mean(sums.episodes.lengths.sum(axis=1), episodes),
        **{name: mean(x.mean(axis=1), updates) for name, x in sums.learning.items()},
        "epsilon": sums.epsilon[:, 0],
        **counted,
        **(summary.columns(evaluated) if evaluated else dict.fromkeys(summary.EVALUATED, nothing)),
    }
    return {name: x.astype(float) if x.dtype.kind == "f" else x for name, x in columns.items()}


def point(members: pa.Table, columns: Mapping[str, ArrayLike]) -> pa.Table:
    """`members` with further columns: arrays [M], or numbers that are the same for all.

    A label of the name of a measured column, such as the field `loss`, goes by `loss_setting`: neither is lost.
    """
    # NaN as null, as pandas writes it.
    arrays = {name: pa.array(np.broadcast_to(x, len(members)), from_pandas=True) for name, x in columns.items()}
    names = [f"{name}_setting" if name in columns else name for name in members.column_names]
    return pa.table({**dict(zip(names, members.columns, strict=True)), **arrays})


def rows(table: pa.Table) -> list[dict[str, object]]:
    """A table as dictionaries, for those who want them."""
    return list(table.to_pandas().to_dict("records"))


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other; a column that one lacks is null there."""
    return pa.concat_tables(tables, promote_options="permissive")


def scalars(point: pa.Table) -> dict[str, np.ndarray]:
    """The columns [M] that are curves: numbers, but for those of IDENTITY."""
    numbers = [
        field.name for field in point.schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    ]
    return {name: point.column(name).to_numpy() for name in numbers if name not in IDENTITY}


def first_bad_updates(runner: Runner, batch: range, states: Sequence[PyTree]) -> dict[int, int]:
    """The members of `batch` that diverged, and their first bad updates, of the states of its runner."""
    found = runner.gather([state.learner.first_bad_update for state in states])
    return first_of_shards(batch, runner.assignment.collect(found))


def first_of_shards(batch: range, first_bad: np.ndarray) -> dict[int, int]:
    """The members of `batch` that diverged, and their first bad updates, of [M, shards]: -1 is none, and shards that
    average now and then may differ."""
    bad = {member: [int(x) for x in each if x >= 0] for member, each in zip(batch, first_bad, strict=True)}
    return {member: min(updates) for member, updates in bad.items() if updates}


class Rows:
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


class Recorder:
    """What a session writes and shows while it trains: rows of metrics, curves, progress, and warnings.

    path: the directory of the run, in process 0; first: the batch that trains first. `diverged` has the members whose
    parameters do not change any more, and their first bad updates; `bar` is a context manager. Raises `UserError`
    where W&B's file cannot be written.
    """

    def __init__(
        self, spec: RunSpec, population: Population, settings: Settings, path: pathlib.Path | None, first: int
    ):
        self._spec, self._settings, self._path = spec, settings, path
        self._population, self._identity = population, identity(*population)
        self._line = timeline(spec.config)
        self._rows = Rows(path and path / "metrics.parquet")
        self._events: tensorboard.Events | None = None
        if path is not None and settings.tensorboard:
            shown = population.everyone, population.varying, settings.tensorboard_members
            self._events = tensorboard.Events(path / "tensorboard", tensorboard.curves(spec.batches, *shown))
        project, file = settings.wandb, path and path / "wandb.json"
        self._log = None if project is None else weights_and_biases.Log(project, spec.to_dict(), file)
        steps, label = self._line.total * self._line.steps_per_iteration, f"{spec.config.agent} on {spec.config.env}"
        self.bar = Progress(steps, label, settings.progress, parts=len(spec.batches), first=first)
        self.diverged: dict[int, int] = {}
        self._warned_unfinished = False
        self._alarms = list(agents.of(spec.config.agent).alarms)
        self._last_flush = 0.0

    def say(self, text: str) -> None:
        """A line for people: warnings always, others where progress is wanted."""
        if hosts.is_first() and (self._settings.progress or text.startswith("warning")):
            self.bar.say(text)

    def introduce(self, device: str, new: bool) -> None:
        """Says what will train, with advice; where the run is not `new`, of its learning rate."""
        given = (advice if new else of_rate)(self._spec.config, self._spec.hparams)
        for warning in given if self._settings.progress else ():
            self.say(f"warning: {warning}")
        count, limit = len(self._population.everyone), self._settings.tensorboard_members
        self.say(f"{count} member(s) in {len(self._spec.batches)} batch(es) on {device}")
        if self._path and self._settings.tensorboard and limit < count:
            self.say(
                f"TensorBoard shows the first {limit} of {count} members, and means over the seeds of the first "
                f"{limit} settings (--tensorboard-members N for more); metrics.parquet has all."
            )

    def cut_events(self, reached: Mapping[int, int]) -> None:
        """Removes what TensorBoard has after the iterations that batches go on from."""
        if self._events is not None:
            line = self._line
            self._events.cut({b: i * line.steps_per_iteration - (not line.is_point(i)) for b, i in reached.items()})

    def add(self, batch: Batch, at: Point) -> pa.Table:
        """Takes a logging point, and returns its rows."""
        table = self._table(batch, at)
        self._rows.add(table)
        steps = at.iteration * self._line.steps_per_iteration
        self.bar.update(steps, self._rows.recent_return(), at.iteration == self._line.total)
        if self._settings.on_chunk:
            self._settings.on_chunk(rows(table))
        if time.perf_counter() - max(self._last_flush, batch.began) > FLUSH_SECONDS:
            self.flush(batch)
        return table

    def flush(self, batch: Batch) -> None:
        """Writes what is not written yet of a batch."""
        self._last_flush = time.perf_counter()
        for table in self._rows.flush(batch.number):
            columns, env_steps = scalars(table), table.column("env_steps")[0].as_py()
            if self._events is not None:
                self._events.write(batch.number, env_steps, columns)
            if self._log is not None:
                self._log.write(batch.number, env_steps, batch.members, columns)
        if self._log is not None:
            self._log.flush()

    def close(self) -> pd.DataFrame:
        """Ends the recording; all rows of the run. Raises `UserError` where one of their files is damaged."""
        if self._log is not None:
            self._log.close()
        return self._rows.frame()

    def _table(self, batch: Batch, at: Point) -> pa.Table:
        """The rows of a logging point, and warnings of what happened since the one before."""
        runner, line = batch.runner, self._line
        collect = runner.assignment.collect
        sums = jax.tree.map(collect, runner.gather(at.metrics))  # [M, shards]
        evaluated = at.episodes and jax.tree.map(collect, runner.gather(at.episodes))  # [M, shards, E]
        self._note_diverged(first_of_shards(batch.members, sums.first_bad_update))
        if evaluated:
            self._note_unfinished(int((~evaluated.finished).sum()), at.iteration * line.steps_per_iteration)
        counted = workers.columns({name: x[:, 0] for name, x in sums.seen.items()})
        found = at.measured and jax.tree.map(collect, runner.gather(at.measured))  # [M, shards]
        unknown = dict.fromkeys(runner.measured, np.full(len(batch.members), np.nan))
        measures = {name: x.mean(axis=1) for name, x in found.items()} if found else unknown
        means = measured(sums, evaluated, {**counted, **measures})
        self._note_alarms(batch.members, means)
        columns = {
            "iteration": at.iteration,
            "env_steps": at.iteration * line.steps_per_iteration,
            "updates": line.updates(at.iteration, self._spec.config.updates_per_iteration),
            "seconds": batch.before + batch.elapsed(),
            **means,
            **{name: x if isinstance(x, int) else float(x) for name, x in at.telemetry.items()},
        }
        return point(self._identity.slice(batch.members.start, len(batch.members)), columns)

    def _note_diverged(self, first_bad: Mapping[int, int]) -> None:
        new = [member for member in first_bad if member not in self.diverged]
        self.diverged |= {member: first_bad[member] for member in new}
        if not new:
            return
        seed, setting = self._population.everyone[new[0]]
        varied = "".join(f", {name} {values_of(setting)[name]:g}" for name in self._population.varying)
        others = f" and {len(new) - 1} more" if len(new) > 1 else ""
        self.say(
            f"warning: member {new[0]} (seed {seed}{varied}){others}: loss, gradient or step not finite at update "
            f"{first_bad[new[0]]}; the last finite parameters are kept. Lower hparams.learning_rate or use "
            "--loss huber."
        )

    def _note_alarms(self, members: range, columns: Mapping[str, np.ndarray]) -> None:
        """Says once of each of the agent's alarms which member is furthest above it."""
        for alarm in [x for x in self._alarms if np.any(columns[x.metric] > x.most)]:
            self._alarms.remove(alarm)
            worst = int(np.nanargmax(columns[alarm.metric]))
            seed, setting = self._population.everyone[members[worst]]
            said = alarm.words.format(value=columns[alarm.metric][worst], **values_of(setting))
            self.say(f"warning: member {members[worst]} (seed {seed}): {said}")

    def _note_unfinished(self, number: int, env_steps: int) -> None:
        if number and not self._warned_unfinished:
            self._warned_unfinished = True
            self.say(
                f"warning: {number} greedy episodes of the evaluation at step {env_steps:,} had not ended after "
                f"eval_max_steps {self._spec.config.eval_max_steps:,} steps; they count with what they had reached "
                "(see eval_unfinished)."
            )
