"""`Session`: one execution of a run, from its start or a checkpoint to its end or a stop, and what it writes."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa

from jaxdqn.base import PyTree
from jaxdqn.config import advice, members, timeline, varying
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.parallel import hosts, schemes
from jaxdqn.parallel.asynchronous import engine, telemetry
from jaxdqn.parallel.compiled import memory, population
from jaxdqn.parallel.compiled import runner as _runner
from jaxdqn.parallel.compiled.runner import Components, Runner
from jaxdqn.runs import (
    checkpoints,
    driver,
    metrics,
    recording,
    reporting,
    resuming,
    tensorboard,
    weights_and_biases,
)
from jaxdqn.runs import summary as _summary
from jaxdqn.runs.directory import RunDirectory, RunSpec
from jaxdqn.runs.driver import Hooks, Point, Progressed
from jaxdqn.runs.progress import Progress, tell
from jaxdqn.runs.provenance import provenance
from jaxdqn.runs.results import Result, read_params
from jaxdqn.runs.settings import DIVERGED, INTERRUPTED, OK, SOLVED, TIMEOUT, Settings
from jaxdqn.runs.signals import catch_signals

FLUSH_SECONDS = 5.0


class Session:
    """One execution of a run: batch after batch of members.

    source: the directory whose checkpoints it continues; run_directory: the one that it writes, in process 0.
    """

    def __init__(
        self,
        spec: RunSpec,
        components: Components,
        budget: memory.Plan,
        settings: Settings,
        *,
        source: pathlib.Path | None = None,
        run_directory: RunDirectory | None = None,
    ):
        if not hosts.is_first():
            settings = settings._replace(progress=False, tensorboard=False, wandb=None, profile=False, on_chunk=None)
        self.spec, self.components, self.budget, self.settings = spec, components, budget, settings
        schemes.check_engine(spec.axes, settings.engine)
        self.directory, self.line = run_directory, timeline(spec.config)
        everyone = members(spec.hparams, spec.seeds, spec.vary)
        self.labels = spec.labels or ({},) * len(everyone)
        # Members that go on from another run's have the seeds that they had there, which their labels say.
        self.everyone = [
            (label.get("seed", seed), setting) for label, (seed, setting) in zip(self.labels, everyone, strict=True)
        ]
        self.devices = schemes.choose_devices(spec.axes, spec.num_devices, spec.devices_per_agent, len(self.everyone))
        self.varying = varying(spec.vary)
        self.identity = recording.identity(self.everyone, self.varying, self.labels)
        self.origin = provenance(self.devices)
        self.start = resuming.find(spec, source, self.origin)
        self.seconds = self.earlier = self.start.seconds  # of training, in all batches and sessions before this batch
        self.compile_seconds = self.start.compile_seconds
        if source is not None and run_directory is not None:
            resuming.check(run_directory.path, self.start.reached, self.line.log_every, spec.continues is None)
        self.recorder = recording.Recorder(run_directory.path / "metrics.parquet" if run_directory else None)
        self.events = self._events()
        self.scalars = reporting.Scalars(self.events, self._log())
        self.begun = False
        self.status = OK
        self.batch = 0
        self.diverged: dict[int, int] = {}
        self.finals: dict[int, _summary.Final] = {}
        self.warned_unfinished = False

    # -- the whole run ------------------------------------------------------------------------------------------------

    def execute(self) -> Result:
        batches = self.spec.batches
        params, statuses = [], []
        label = f"{self.spec.config.agent} on {self.spec.config.env}"
        total_steps, first = self.line.total * self.line.steps_per_iteration, self.start.batch
        with (
            catch_signals() as interrupted,
            engine.running(self.settings.engine, self.settings.ray_address) as self.engine,
            Progress(total_steps, label, self.settings.progress, parts=len(batches), first=first) as bar,
        ):
            self.bar = bar
            for warning in advice(self.spec.config) if self.start.checkpoint is None and self.settings.progress else ():
                self._say(f"warning: {warning}")
            self._say(f"{len(self.everyone)} member(s) in {len(batches)} batch(es) on {self.origin['device']}")
            limit = self.settings.tensorboard_members
            if self.directory and self.settings.tensorboard and limit < len(self.everyone):
                self._say(
                    f"TensorBoard shows the first {limit} of {len(self.everyone)} members, and means over the seeds of "
                    f"the first {limit} settings (--tensorboard-members N for more); metrics.parquet has all."
                )
            for self.batch, batch in enumerate(batches):
                self.status = OK
                params.append(self._run_batch(batch, interrupted))
                statuses.append(self.status)
                if self.status in (INTERRUPTED, TIMEOUT):
                    break
        if self.status not in (INTERRUPTED, TIMEOUT) and len(set(statuses)) > 1:
            self.status = OK
        stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves), *params)
        return self._finish(stacked)

    def _begin(self) -> None:
        """Makes the directory this session's, once it is certain to train: until then nothing in it has changed."""
        if self.directory is None or self.begun:
            return
        self.begun = True
        path, source, line = self.directory.path, self.settings.init_from, self.line
        started = {
            "init_from": source and str(paths.expanded(source).resolve()),
            "init_member": self.settings.init_member,
        }
        if self.events is not None:
            last = {b: i * line.steps_per_iteration - (not line.is_point(i)) for b, i in self.start.reached.items()}
            self.events.cut(last)
        self.directory.remove_summary()
        self.directory.write_config(self.spec, {**self.origin, **started})
        (path / "checkpoints").mkdir(exist_ok=True)
        metrics.drop_after(path / "metrics.parquet", self.start.reached)
        metrics.drop_extra(path / "metrics.parquet", self.start.reached, line)

    def _events(self) -> tensorboard.Events | None:
        """TensorBoard's files."""
        if self.directory is None or not self.settings.tensorboard:
            return None
        limit = self.settings.tensorboard_members
        curves = tensorboard.curves(self.spec.batches, self.everyone, self.varying, limit)
        return tensorboard.Events(self.directory.path / "tensorboard", curves)

    def _log(self) -> weights_and_biases.Log | None:
        """The run at W&B, the same in all sessions of a directory."""
        if self.settings.wandb is None:
            return None
        file = self.directory.path / "wandb.json" if self.directory else None
        return weights_and_biases.Log(self.settings.wandb, self.spec.to_dict(), file)

    # -- one batch of members -----------------------------------------------------------------------------------------

    def _run_batch(self, batch: range, interrupted: Callable[[], bool]) -> PyTree:
        groups = len(self.devices) // self.spec.devices_per_agent
        assignment = population.assign(len(batch), groups, self.spec.least_lanes)
        seeds, settings = zip(*[self.everyone[m] for m in batch], strict=True)
        memory.forget_programs()
        runner, states = schemes.build(
            self.spec.axes,
            self.components,
            self.devices,
            self.spec.devices_per_agent,
            assignment,
            seeds,
            settings,
            self._say,
            self.engine,
        )
        assignment = runner.assignment
        self.compile_seconds += runner.compile_seconds
        at = Progressed(states, runner.zero_metrics, 0)
        found = self.start.of_batch(self.batch, batch)
        if found is not None:
            at = checkpoints.restored(at, found, assignment, self.devices)
        elif self.settings.init_from:
            source = read_params(paths.expanded(self.settings.init_from), self.settings.init_member)
            at = at._replace(states=runner.adopted(checkpoints.with_params(states, source)))
        self.diverged |= self._diverged(assignment, batch, at)  # of which an earlier session has warned
        # The states are donated chunk by chunk: nobody else may hold them.
        del states
        self._begin()
        began, before = time.perf_counter(), self.seconds
        self.batch_before = found.meta["batch_seconds"] if found else 0.0
        self.elapsed = lambda: time.perf_counter() - began
        self.last_save = self.last_flush = time.perf_counter()

        checkpoint_seconds = self.settings.checkpoint_seconds
        hooks = Hooks(
            on_point=lambda point: self._on_point(runner, batch, point),
            interrupted=lambda: self._asked_to_stop(interrupted) is not None,
            checkpoint_due=lambda: hosts.exchange(time.perf_counter() - self.last_save)[0] > checkpoint_seconds,
            save=lambda at: self._save(runner, at),
        )
        try:
            with self._profiled():
                at = driver.drive(runner, at, self.line, hooks)
        except Exception:  # such as the death of every worker: what was measured until then remains
            self._flush()
            raise
        self.seconds = before + self.elapsed()
        if at.iteration < self.line.total:
            self.status = self._asked_to_stop(interrupted) or self.status
        self.diverged |= self._diverged(assignment, batch, at)
        if all(m in self.diverged for m in batch) and self.status == OK:
            self.status = DIVERGED
        if self.status != INTERRUPTED:
            self._judge(runner, batch, at, interrupted)
        return jax.tree.map(lambda x: x[:, 0], checkpoints.policy(runner, at.states))

    def _judge(self, runner: Runner, batch: range, at: Progressed, interrupted: Callable[[], bool]) -> None:
        """Judges the parameters that are kept, by episodes of their own, unless it is interrupted."""
        wanted, each = self.spec.config.final_episodes, self.spec.config.eval_episodes * runner.shards
        episodes = []
        for part in range(math.ceil(wanted / each)):
            if self._asked_to_stop(interrupted) == INTERRUPTED:
                self.status = INTERRUPTED
                return
            found = runner.evaluate(at.states, at.iteration, 1 + part)
            episodes.append(jax.tree.map(runner.assignment.collect, _runner.gather(found)))
        if episodes:
            self.finals |= dict(zip(batch, _summary.finals(episodes, wanted), strict=True))

    def _diverged(self, assignment: population.Assignment, batch: range, at: Progressed) -> dict[int, int]:
        """The members of `batch` that diverged, and their first bad updates."""
        first_bad = assignment.collect(_runner.gather([state.learner.first_bad_update for state in at.states]))
        return first_of_shards(batch, first_bad)

    def _asked_to_stop(self, interrupted: Callable[[], bool]) -> str | None:
        """Why the session is to end before its time, whichever process was asked: INTERRUPTED, TIMEOUT or None."""
        limit = self.settings.max_seconds
        late = limit is not None and self.seconds + self.elapsed() - self.earlier > limit
        asked = hosts.exchange(INTERRUPTED if interrupted() else TIMEOUT if late else None)
        return next((reason for reason in (INTERRUPTED, TIMEOUT) if reason in asked), None)

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_point(self, runner: Runner, batch: range, point: Point) -> bool:
        table = self._table(runner, batch, point)
        self.recorder.add(table)
        steps = point.iteration * self.line.steps_per_iteration
        self.bar.update(steps, self.recorder.recent_return(), point.iteration == self.line.total)
        if self.settings.on_chunk:
            self.settings.on_chunk(recording.rows(table))
        if time.perf_counter() - self.last_flush > FLUSH_SECONDS:
            self._flush()
        target = self.settings.stop_at_return
        if target is not None and np.all(table.column("eval_return").to_numpy() >= target):
            self.status = SOLVED
            return True
        if self.settings.stop_diverged and all(member in self.diverged for member in batch):
            self.status = DIVERGED
            return True
        return False

    def _table(self, runner: Runner, batch: range, point: Point) -> pa.Table:
        """The rows of a logging point, and a warning for members that diverged since the one before."""
        collect = runner.assignment.collect
        sums = jax.tree.map(collect, _runner.gather(point.metrics))  # [M, shards]
        evaluated = point.episodes and jax.tree.map(collect, _runner.gather(point.episodes))  # [M, shards, E]
        self._note_diverged(first_of_shards(batch, sums.first_bad_update))
        if evaluated and not evaluated.finished.all():
            self._warn_unfinished(int((~evaluated.finished).sum()), point.iteration)
        counted = telemetry.columns({name: x[:, 0] for name, x in sums.seen.items()})
        columns = {
            "iteration": point.iteration,
            "env_steps": point.iteration * self.line.steps_per_iteration,
            "updates": self.line.updates(point.iteration, self.spec.config.updates_per_iteration),
            "seconds": self.batch_before + self.elapsed(),
            **recording.measured(sums, evaluated, counted),
            **{name: x if isinstance(x, int) else float(x) for name, x in point.telemetry.items()},
        }
        return recording.point(self.identity.slice(batch.start, len(batch)), columns)

    def _note_diverged(self, first_bad: dict[int, int]) -> None:
        new = {m: update for m, update in first_bad.items() if m not in self.diverged}
        self.diverged |= new
        self._warn_diverged(list(new))

    def _warn_unfinished(self, number: int, iteration: int) -> None:
        if self.warned_unfinished:
            return
        self.warned_unfinished = True
        self._say(
            f"warning: {number} greedy episodes of the evaluation at step "
            f"{iteration * self.line.steps_per_iteration:,} had not ended after eval_max_steps "
            f"{self.spec.config.eval_max_steps:,} steps; they count with what they had reached (see eval_unfinished)."
        )

    def _warn_diverged(self, members: list[int]) -> None:
        if not members:
            return
        seed, setting = self.everyone[members[0]]
        varied = "".join(f", {name} {getattr(setting, name):g}" for name in self.varying)
        others = f" and {len(members) - 1} more" if len(members) > 1 else ""
        self._say(
            f"warning: member {members[0]} (seed {seed}{varied}){others}: loss, gradient or step not finite at update "
            f"{self.diverged[members[0]]}; the last finite parameters are kept. Lower hparams.learning_rate or use "
            "--loss huber."
        )

    def _flush(self) -> None:
        self.last_flush = time.perf_counter()
        points = self.recorder.flush(self.batch)
        if self.scalars is not None:
            self.scalars.write(self.batch, self.spec.batches[self.batch], points)

    def _save(self, runner: Runner, at: Progressed) -> None:
        values = checkpoints.values_of(runner, at)
        self._flush()
        if self.directory is None:
            return
        meta = {
            "batch": self.batch,
            "iteration": at.iteration,
            "update": at.update,
            "seconds": self.seconds + self.elapsed(),
            "batch_seconds": self.batch_before + self.elapsed(),
            "compile_seconds": self.compile_seconds,
            "device": self.origin["device"],
            "versions": self.origin["versions"],
        }
        checkpoints.save(self.directory.path / "checkpoints", values, meta, keep=2)
        self.last_save = time.perf_counter()

    def _profiled(self) -> Any:
        if not self.settings.profile or self.directory is None:
            return contextlib.nullcontext()
        return jax.profiler.trace(str(self.directory.path / "profile"))

    def _say(self, line: str) -> None:
        if not hosts.is_first() or (not self.settings.progress and not line.startswith("warning")):
            return
        if hasattr(self, "bar"):
            self.bar.say(line)
        else:
            tell(line)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, params: PyTree) -> Result:
        if self.scalars is not None:
            self.scalars.close()
        frame = self.recorder.frame()
        summary = self._summary(frame)
        result = Result(
            lambda: frame,
            params,
            summary,
            self.spec.config,
            self.everyone,
            self.components,
            self.varying,
            self.directory.path if self.directory else None,
        )
        if self.directory is not None:
            self.directory.write_summary(summary)
            if len(frame) and self.settings.figure:
                try:
                    reporting.save_figure(result.plot(), self.directory.path / "curves.png")
                except (UserError, OSError) as error:  # what was trained is worth more than its picture
                    self._say(f"warning: no curves: {error}")
        return result

    def _summary(self, frame: pd.DataFrame) -> dict[str, Any]:
        settings = [
            {
                **{name: getattr(setting, name) for name in self.varying},
                **{k: v for k, v in label.items() if k != "seed"},
            }
            for label, (_, setting) in zip(self.labels, self.everyone, strict=True)
        ]
        steps = int(frame.groupby("member").env_steps.max().sum()) if len(frame) else 0
        updates = int(frame.groupby("member").updates.max().sum()) if len(frame) else 0
        seconds = max(self.seconds, 1e-9)
        replays = schemes.num_replays(self.spec.axes, self.spec.devices_per_agent)
        return {
            "env": self.spec.config.env,
            "agent": self.spec.config.agent,
            "status": self.status,
            "num_members": len(self.everyone),
            "seeds": list(self.spec.seeds),
            "env_steps": steps,
            "updates": updates,
            "env_steps_per_second": steps / seconds,
            "updates_per_second": updates / seconds,
            "compile_seconds": self.compile_seconds,
            "run_seconds": self.seconds,
            **_summary.returns(frame, settings, self.finals, self.spec.config),
            "first_bad_update_per_member": {str(member): update for member, update in self.diverged.items()},
            "replay_bytes": self.budget.replay_bytes * replays * len(self.everyone),
            "dead_workers": int(frame["dead_workers"].max()) if "dead_workers" in frame else 0,
            "jax_version": jax.__version__,
            "device": self.origin["device"],
            "commit": self.origin["commit"],
            "versions": self.origin["versions"],
        }


def first_of_shards(batch: range, first_bad: np.ndarray) -> dict[int, int]:
    """The members of `batch` that diverged, and their first bad updates, of [M, shards]: -1 is none, and shards that
    average now and then may differ."""
    bad = {member: [int(x) for x in each if x >= 0] for member, each in zip(batch, first_bad, strict=True)}
    return {member: min(updates) for member, updates in bad.items() if updates}
