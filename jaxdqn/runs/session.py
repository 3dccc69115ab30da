"""`Session`: one execution of a run, from its start or a checkpoint to its end or a stop."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxdqn.base import PyTree
from jaxdqn.components import Components
from jaxdqn.files import paths
from jaxdqn.parallel import hosts, schemes
from jaxdqn.parallel.asynchronous import ray_engine
from jaxdqn.parallel.compiled import memory, population
from jaxdqn.parallel.compiled.runner import Runner, measuring
from jaxdqn.runs import checkpoints, driver, metrics, recording, results, resuming
from jaxdqn.runs import summary as _summary
from jaxdqn.runs.directory import RunDirectory, RunSpec
from jaxdqn.runs.driver import Hooks, Point, Progressed
from jaxdqn.runs.provenance import provenance
from jaxdqn.runs.recording import Batch, Recorder
from jaxdqn.runs.results import Result, read_params
from jaxdqn.runs.settings import DIVERGED, INTERRUPTED, OK, SOLVED, TIMEOUT, Settings
from jaxdqn.runs.signals import catch_signals
from jaxdqn.timeline import timeline


class Session:
    """One execution of a run: batch after batch of members.

    source: the directory whose checkpoints it continues; run_directory: the one that it writes, in process 0.
    Raises `UserError` where it cannot begin; until it trains, nothing in `run_directory` has changed.
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
        schemes.check_engine(spec.axes, settings.engine)
        schemes.check_telemetry(spec.axes, settings.telemetry)
        self.spec, self.components, self.budget, self.settings = spec, components, budget, settings
        self.directory, self.line = run_directory, timeline(spec.config)
        self.population = recording.population_of(spec)
        self.devices = schemes.choose(
            spec.axes, spec.num_devices, spec.devices_per_agent, len(self.population.everyone)
        )
        self.origin = provenance(self.devices)
        self.start = resuming.find(spec, source, self.origin)
        self.earlier, self.compile_seconds = self.start.seconds()
        self.seconds = self.earlier  # of training, in all batches and sessions before this batch
        if source is not None and run_directory is not None:
            resuming.check(run_directory.path, self.start.reached, self.line.log_every, spec.continues is None)
        path = run_directory.path if run_directory else None
        self.recorder = Recorder(spec, self.population, settings, path, self.start.batch)
        self.begun = False
        self.status = OK  # of the batch that trains
        self.last_save = 0.0
        self.finals: dict[int, _summary.Final] = {}

    def execute(self) -> Result:
        """Trains what is left of the run, or as much of it as is wanted."""
        params, statuses = [], []
        with (
            catch_signals() as interrupted,
            ray_engine.running(self.settings.engine, self.settings.ray_address) as workers,
            self.recorder.bar,
        ):
            self.recorder.introduce(self.origin["device"], new=self.start.checkpoint is None)
            if self.start.checkpoint is not None and self.components.environment.on_host is not None:
                self.recorder.say("environments on the host are in no checkpoint: they begin new episodes")
            for number, members in enumerate(self.spec.batches):
                self.status = OK
                params.append(self._run_batch(number, members, workers, interrupted))
                statuses.append(self.status)
                if self.status in (INTERRUPTED, TIMEOUT):
                    break
        if self.status not in (INTERRUPTED, TIMEOUT) and len(set(statuses)) > 1:
            self.status = OK
        return self._finish(jax.tree.map(lambda *leaves: np.concatenate(leaves), *params))

    def _run_batch(
        self, number: int, members: range, workers: ray_engine.Engine | None, interrupted: Callable[[], bool]
    ) -> PyTree:
        """Trains a batch of members; their kept parameters, [M, ...]."""
        runner, at, before = self._build(number, members, workers)
        # Of these an earlier session has warned.
        self.recorder.diverged |= recording.first_bad_updates(runner, members, at.states)
        self._begin()
        batch = Batch(number, members, runner, time.perf_counter(), before)
        hooks = Hooks(
            on_point=lambda point: self._on_point(batch, point),
            interrupted=lambda: self._asked_to_stop(batch, interrupted) is not None,
            checkpoint_due=lambda: self._checkpoint_due(batch),
            save=lambda at, stopped: self._save(batch, at, stopped),
            refilling=self._say_refilling,
        )
        stopped = self.start.stopped(number)
        try:
            if stopped is None:
                with self._profiled():
                    at = driver.drive(runner, at, self.line, hooks)
        except Exception:  # such as the death of every worker: what was measured until then remains
            self.recorder.flush(batch)
            raise
        if stopped is not None:
            self.status = stopped
        elif at.iteration < self.line.total:
            self.status = self._asked_to_stop(batch, interrupted) or self.status
        trained = batch.elapsed()
        self.recorder.diverged |= recording.first_bad_updates(runner, members, at.states)
        if self.status == OK and self._has_diverged(batch):
            self.status = DIVERGED
        if self.status != INTERRUPTED:
            self._judge(batch, at, interrupted)
        self.seconds += trained
        return jax.tree.map(lambda x: x[:, 0], checkpoints.policy(runner, at.states))

    def _build(
        self, number: int, members: range, workers: ray_engine.Engine | None
    ) -> tuple[Runner, Progressed, float]:
        """The runner of a batch, where it begins, and after which seconds of training. Nothing else holds the states:
        they are donated chunk by chunk."""
        spec, devices, each, say = self.spec, self.devices, self.spec.devices_per_agent, self.recorder.say
        assignment = population.assign(len(members), len(devices) // each, spec.least_lanes)
        seeds, hparams = zip(*[self.population.everyone[m] for m in members], strict=True)
        memory.forget_programs()
        runner, states = schemes.build(
            spec.axes, self.components, devices, each, assignment, seeds, hparams, say, workers
        )
        if self.settings.telemetry:
            runner = measuring(runner, states)
        self.compile_seconds += runner.compile_seconds
        at = Progressed(states, runner.zero_metrics, 0)
        found = self.start.of_batch(number, members)
        if found is not None:
            return runner, checkpoints.restored(runner, at, found, devices), found.meta["batch_seconds"]
        if self.settings.init_from:
            params = read_params(paths.expanded(self.settings.init_from), self.settings.init_member)
            at = at._replace(states=runner.adopted(checkpoints.with_params(states, params)))
        return runner, at, 0.0

    def _begin(self) -> None:
        """Makes the directory this session's, once it is certain to train: until then nothing in it has changed."""
        if self.directory is None or self.begun:
            return
        self.begun = True
        path, source, reached = self.directory.path, self.settings.init_from, self.start.reached
        source = source and str(paths.expanded(source).resolve())
        started = {**self.origin, "init_from": source, "init_member": self.settings.init_member}
        started["checkpoint_replay"] = self.settings.checkpoint_replay is not False
        self.recorder.cut_events(reached)
        self.directory.remove_summary()
        self.directory.write_config(self.spec, started)
        (path / "checkpoints").mkdir(exist_ok=True)
        metrics.drop_after(path / "metrics.parquet", reached)
        metrics.drop_extra(path / "metrics.parquet", reached, self.line)

    def _on_point(self, batch: Batch, point: Point) -> bool:
        """Records a logging point; whether the batch is to stop."""
        table, target = self.recorder.add(batch, point), self.settings.stop_at_return
        if target is not None and np.all(table.column("eval_return").to_numpy() >= target):
            self.status = SOLVED
        elif self.settings.stop_diverged and self._has_diverged(batch):
            self.status = DIVERGED
        else:
            return False
        return True

    def _has_diverged(self, batch: Batch) -> bool:
        return all(member in self.recorder.diverged for member in batch.members)

    def _asked_to_stop(self, batch: Batch, interrupted: Callable[[], bool]) -> str | None:
        """Why the session is to end before its time, whichever process was asked: INTERRUPTED, TIMEOUT or None."""
        limit = self.settings.max_seconds
        late = limit is not None and self.seconds + batch.elapsed() - self.earlier > limit
        asked = hosts.exchange(INTERRUPTED if interrupted() else TIMEOUT if late else None)
        return next((reason for reason in (INTERRUPTED, TIMEOUT) if reason in asked), None)

    def _checkpoint_due(self, batch: Batch) -> bool:
        waited = time.perf_counter() - max(self.last_save, batch.began)
        return hosts.exchange(waited)[0] > self.settings.checkpoint_seconds

    def _save(self, batch: Batch, at: Progressed, stopped: bool) -> None:
        values = checkpoints.values_of(batch.runner, at, self.settings.checkpoint_replay is not False)
        self.recorder.flush(batch)
        if self.directory is None:
            return
        elapsed = batch.elapsed()
        meta = {
            "batch": batch.number,
            "iteration": at.iteration,
            "update": at.update,
            "stopped": self.status if stopped else None,
            "seconds": self.seconds + elapsed,
            "batch_seconds": batch.before + elapsed,
            "compile_seconds": self.compile_seconds,
            **{name: self.origin[name] for name in ("device", "versions")},
        }
        checkpoints.save(self.directory.path / "checkpoints", values, meta, checkpoints.KEEP)
        self.last_save = time.perf_counter()

    def _say_refilling(self, iterations: int) -> None:
        steps = iterations * self.line.steps_per_iteration
        self.recorder.say(
            f"the checkpoint holds no replay: {steps:,} steps of each member, acted with what it has learned, fill it "
            "again; they are counted nowhere, and environments begin anew"
        )

    def _profiled(self) -> contextlib.AbstractContextManager[None]:
        if not self.settings.profile or self.directory is None:
            return contextlib.nullcontext()
        return jax.profiler.trace(str(self.directory.path / "profile"))

    def _judge(self, batch: Batch, at: Progressed, interrupted: Callable[[], bool]) -> None:
        """Judges the parameters that are kept, by episodes of their own, unless it is interrupted."""
        runner, config = batch.runner, self.spec.config
        episodes = []
        for part in range(math.ceil(config.final_episodes / (config.eval_episodes * runner.shards))):
            if self._asked_to_stop(batch, interrupted) == INTERRUPTED:
                self.status = INTERRUPTED
                return
            found = runner.evaluate(at.states, at.iteration, 1 + part)
            episodes.append(jax.tree.map(runner.assignment.collect, runner.gather(found)))
        if episodes:
            self.finals |= dict(zip(batch.members, _summary.finals(episodes, config.final_episodes), strict=True))

    def _finish(self, params: PyTree) -> Result:
        frame, everyone = self.recorder.close(), self.population.everyone
        replays = len(everyone) * schemes.num_replays(self.spec.axes, self.spec.devices_per_agent)
        outcome = _summary.Outcome(
            self.status,
            self.seconds,
            self.compile_seconds,
            self.finals,
            self.recorder.diverged,
            self.budget.replay_bytes * replays,
            self.origin,
        )
        summary = _summary.whole(self.spec, self.population.settings(), frame, outcome)
        path = self.directory.path if self.directory else None
        rest = self.spec.config, everyone, self.components, self.population.varying, path
        result = Result(lambda: frame, params, summary, *rest)
        if self.directory is not None:
            results.write(result, self.directory, self.settings.figure, self.recorder.say)
        return result
