"""`train` and `resume`: configuration -> fleet -> driver -> run directory -> `Result`."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxdqn import acting, driver, evaluation
from jaxdqn.analysis.curves import final_score
from jaxdqn.analysis.intervals import bootstrap_ci
from jaxdqn.axes import THREADED, Axes
from jaxdqn.base import PyTree
from jaxdqn.config import Config, HParams, advice, members, timeline, validate, validate_hparams
from jaxdqn.driver import Hooks, Point, Progressed
from jaxdqn.errors import UserError
from jaxdqn.parallel import devices as _devices
from jaxdqn.parallel import engine, hosts, memory, population, schemes
from jaxdqn.parallel import fleet as _fleet
from jaxdqn.parallel.fleet import Fleet, Parts
from jaxdqn.progress import Progress
from jaxdqn.runs import checkpoints, directory, metrics, reporting
from jaxdqn.runs.directory import RunDirectory, RunSpec
from jaxdqn.runs.files import provenance

FLUSH_SECONDS = 5.0
MAX_WATCHED = 2_500  # steps of an episode that is drawn
OK, INTERRUPTED, SOLVED, TIMEOUT, DIVERGED = "finished", "interrupted", "solved", "out of time", "diverged"


class Settings(NamedTuple):
    """What does not change a run's result: when to stop, save and speak.

    stop_at_return: stop once every member's greedy return reaches it; max_seconds: wall time of this session;
    checkpoint_seconds: at least this long between checkpoints. on_chunk(rows) is called with each logging point's rows.
    engine: where workers live, "local" (threads) or "ray", there on this machine or on the cluster at `ray_address`.
    """

    stop_at_return: float | None = None
    max_seconds: float | None = None
    checkpoint_seconds: float = 60.0
    progress: bool = True
    tensorboard: bool = True
    wandb: str | None = None
    profile: bool = False
    init_from: str | None = None
    init_member: int = 0
    on_chunk: Callable[[list[dict[str, Any]]], None] | None = None
    engine: str = "local"
    ray_address: str | None = None


@dataclasses.dataclass
class Result:
    """A run: `metrics` has one row per member and logging point, `params` leaves have a leading axis [M]."""

    metrics: pd.DataFrame
    params: PyTree
    summary: dict[str, Any]
    config: Config
    members: list[tuple[int, HParams]]
    parts: Parts
    varying: tuple[str, ...] = ()
    path: pathlib.Path | None = None

    def plot(self) -> Any:
        """Learning curves, as a matplotlib figure."""
        title = f"{self.config.agent} on {self.config.env}"
        return reporting.plot(self.metrics, title, self.varying)

    def evaluate(self, episodes: int = 100, member: int = 0, seed: int = 1) -> evaluation.Episodes:
        """Greedy episodes of one member on fresh start states: NumPy arrays [episodes]."""
        return evaluate_params(self.parts, member_params(self.params, member), episodes, seed)


def member_params(params: PyTree, member: int) -> PyTree:
    """One member's parameters out of [M, ...]. Raises `UserError` for a member there is not."""
    leaves = jax.tree.leaves(params)
    count = len(leaves[0]) if leaves else 1
    if not 0 <= member < count:
        raise UserError(f"member {member} does not exist; the run has members 0 to {count - 1}.")
    return jax.tree.map(lambda x: jnp.asarray(x[member]), params)


def evaluate_params(parts: Parts, params: PyTree, episodes: int, seed: int) -> evaluation.Episodes:
    """Greedy episodes with given parameters, as NumPy arrays [episodes]."""
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; it must be at least 1.")

    @jax.jit
    def run(params: PyTree, key: Any) -> evaluation.Episodes:
        bound = parts.config.eval_max_steps
        return evaluation.evaluate(parts.environment, parts.agent, params, key, episodes, bound)

    return jax.tree.map(np.asarray, run(params, jax.random.key(seed)))


def watch(result: Result, member: int, seed: int) -> np.ndarray:
    """The observations of one greedy episode, [L, *O], as stored."""
    parts = result.parts
    params = member_params(result.params, member)
    bound = min(parts.environment.spec.max_episode_steps or MAX_WATCHED, MAX_WATCHED)

    @jax.jit
    def run(key: Any) -> Any:
        actor = acting.start(parts.environment, parts.agent, 1, key)
        block = acting.rollout(parts.environment, parts.agent, params, actor, key, jnp.zeros(1), bound)[1]
        return block.observation[:, 0], block.next_observation[:, 0], block.episode_end[:, 0]

    before, after, end = jax.tree.map(np.asarray, run(jax.random.key(seed)))
    length = int(end.argmax()) + 1 if end.any() else bound
    return np.concatenate([before[:length], after[length - 1 : length]])


def plan(
    config: Config,
    hparams: HParams,
    seeds: Sequence[int],
    vary: Mapping[str, Any] | None,
    num_devices: int | None,
    devices_per_agent: int,
    axes: Axes | None = None,
) -> tuple[RunSpec, Parts, memory.Plan]:
    """Validates everything, computes bytes, and fixes devices and batches; nothing is allocated.

    Raises `UserError`.
    """
    if devices_per_agent < 1:
        raise UserError(f"devices_per_agent is {devices_per_agent}; it must be at least 1.")
    axes = axes or Axes()
    validate(config, devices_per_agent)
    validate_hparams(hparams, config.epsilon_schedule)
    schemes.check(axes, config, devices_per_agent)
    everyone = members(hparams, tuple(seeds), vary, config.epsilon_schedule)
    devices = schemes.choose_devices(axes, num_devices, devices_per_agent, len(everyone))
    parts = _fleet.make_parts(config, schemes.num_shards(axes, devices_per_agent))
    schemes.check_parts(axes, parts)
    groups = len(devices) // devices_per_agent
    state_bytes, replay_bytes = schemes.state_bytes(axes, parts)
    own = devices[_devices.own(devices)]
    # Threads leave the state on one device, and the others of a CPU take nothing away from it.
    shares = min(hosts.exchange(memory.available_bytes(own[:1] if axes.scheme in THREADED else own)))
    state_bytes += _fleet.evaluation_bytes(parts)
    budget = memory.plan(state_bytes, replay_bytes, len(everyone), groups, shares)
    if axes.scheme != "fused":  # one member after the other: each has all the devices
        budget = budget._replace(members_per_batch=1, num_batches=len(everyone))
    varied = {name: [float(value) for value in values] for name, values in (vary or {}).items()}
    spec = RunSpec(
        config.resolved(),
        hparams,
        tuple(seeds),
        varied,
        len(devices),
        devices_per_agent,
        budget.members_per_batch,
        axes,
    )
    return spec, parts, budget


def train(
    config: Config | None = None,
    hparams: HParams | None = None,
    *,
    seeds: Sequence[int] = (0,),
    vary: Mapping[str, Any] | None = None,
    out: str | pathlib.Path | None = None,
    num_devices: int | None = None,
    devices_per_agent: int = 1,
    axes: Axes | None = None,
    settings: Settings | None = None,
    on_chunk: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Result:
    """Trains every combination of `vary` (HParams field -> values) with every seed, as one population; with `axes` of
    another scheme than "fused", one after the other.

    Uses the devices JAX has (all that have work, or `num_devices`), `devices_per_agent` for each member. With `out`
    the run is kept in a directory and can be resumed; without it everything stays in memory. On several hosts
    (`hosts.join`) all processes return the same result, and process 0 alone writes and calls `on_chunk`. Raises
    `UserError`.
    """
    spec, parts, budget = plan(
        config or Config(), hparams or HParams(), seeds, vary, num_devices, devices_per_agent, axes
    )
    settings = settings or Settings()
    settings = settings._replace(on_chunk=on_chunk or settings.on_chunk)
    if out is None or not hosts.is_first():
        return _Run(spec, parts, budget, settings).execute()
    if settings.init_from:
        _load_params(pathlib.Path(str(settings.init_from)), settings.init_member)  # its errors come before a directory
    with directory.create(pathlib.Path(out)) as run_directory:
        run_directory.check_unused()
        return _Run(spec, parts, budget, settings, run_directory=run_directory).execute()


def resume(out: str | pathlib.Path, total_steps: int | None = None, settings: Settings | None = None) -> Result:
    """Continues the run in `out` from its newest good checkpoint, bit for bit; `total_steps` extends it.

    On several hosts every process reads `out`: it must be on a file system that they share.
    """
    path = pathlib.Path(out)
    spec, values = directory.load(path)
    settings = (settings or Settings())._replace(
        init_from=values.get("init_from"), init_member=values.get("init_member", 0)
    )
    if total_steps is not None:
        spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, total_steps=total_steps))
    per_agent = spec.devices_per_agent
    available = max(per_agent, jax.process_count() * len(jax.local_devices()) // per_agent * per_agent)
    spec = dataclasses.replace(spec, num_devices=min(spec.num_devices, available))
    fresh, parts, budget = plan(
        spec.config, spec.hparams, spec.seeds, spec.vary, spec.num_devices, per_agent, spec.axes
    )
    if fresh.members_per_batch < spec.members_per_batch:
        raise UserError(
            f"the run has {spec.members_per_batch} members at a time, and now only {fresh.members_per_batch} fit in "
            "memory; free some and resume again."
        )
    if not hosts.is_first():
        return _Run(spec, parts, budget, settings, source=path).execute()
    with directory.create(path) as run_directory:
        return _Run(spec, parts, budget, settings, source=path, run_directory=run_directory).execute()


class _Run:
    """One execution of a run: batch after batch of members.

    source: the directory whose checkpoints it continues; run_directory: the one that it writes, in process 0.
    """

    def __init__(
        self,
        spec: RunSpec,
        parts: Parts,
        budget: memory.Plan,
        settings: Settings,
        *,
        source: pathlib.Path | None = None,
        run_directory: RunDirectory | None = None,
    ):
        if not hosts.is_first():
            settings = settings._replace(progress=False, tensorboard=False, wandb=None, profile=False, on_chunk=None)
        self.spec, self.parts, self.budget, self.settings = spec, parts, budget, settings
        schemes.check_engine(spec.axes, settings.engine)
        self.source, self.directory = source, run_directory
        self.line = timeline(spec.config)
        self.everyone = members(spec.hparams, spec.seeds, spec.vary)
        self.devices = schemes.choose_devices(spec.axes, spec.num_devices, spec.devices_per_agent, len(self.everyone))
        self.varying = tuple(name for name, values in spec.vary.items() if len(set(values)) > 1)
        self.rows: list[dict[str, Any]] = []
        self.unwritten: list[dict[str, Any]] = []
        self.scalars: reporting.Scalars | None = None
        self.status = OK
        self.seconds = 0.0  # of the loop, over all batches and resumes
        self.compile_seconds = 0.0
        self.batch = 0
        self.diverged: dict[int, int] = {}
        self.earlier = 0.0  # of that, in sessions before this one

    # -- the whole run ------------------------------------------------------------------------------------------------

    def execute(self) -> Result:
        start = self._open()
        size = self.spec.members_per_batch
        batches = [range(i, min(i + size, len(self.everyone))) for i in range(0, len(self.everyone), size)]
        params, statuses = [], []
        label = f"{self.spec.config.agent} on {self.spec.config.env}"
        total_steps, first = self.line.total * self.line.steps_per_iteration, start.meta["batch"] if start else 0
        with (
            _catch_signals() as interrupted,
            engine.running(self.settings.engine, self.settings.ray_address) as self.engine,
            Progress(total_steps, label, self.settings.progress, parts=len(batches), first=first) as bar,
        ):
            self.bar = bar
            for warning in advice(self.spec.config) if start is None else ():
                self._say(f"warning: {warning}")
            self._say(f"{len(self.everyone)} member(s) in {len(batches)} batch(es) on {self.origin['device']}")
            for self.batch, batch in enumerate(batches):
                self.status = OK
                params.append(self._run_batch(batch, start, interrupted))
                statuses.append(self.status)
                if self.status in (INTERRUPTED, TIMEOUT):
                    break
        if self.status not in (INTERRUPTED, TIMEOUT) and len(set(statuses)) > 1:
            self.status = OK
        stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves), *params)
        return self._finish(stacked)

    def _open(self) -> checkpoints.Checkpoint | None:
        """Prepares the directory; the checkpoint to start from, or None."""
        start = None
        origin = provenance(self.devices)
        if self.source is not None:
            start = self._newest(self.source)
        if start is not None:
            self._warn_differences(start.meta, origin)
            self.seconds = self.earlier = start.meta["seconds"]
            self.compile_seconds = start.meta["compile_seconds"]
        if self.directory is not None:
            path = self.directory.path
            batch, iteration = (start.meta["batch"], start.meta["iteration"]) if start else (0, -1)
            metrics.drop_after(path / "metrics.parquet", batch, iteration)
            source = self.settings.init_from
            started = {
                "init_from": source and str(pathlib.Path(source).resolve()),
                "init_member": self.settings.init_member,
            }
            self.directory.write_config(self.spec, {**origin, **started})
        tensorboard = self.directory.path / "tensorboard" if self.directory and self.settings.tensorboard else None
        purge = start.meta["iteration"] * self.line.steps_per_iteration + 1 if start else 0
        self.scalars = reporting.Scalars(tensorboard, purge, self.settings.wandb, self.spec.to_dict())
        self.origin = origin
        return start

    def _newest(self, source: pathlib.Path) -> checkpoints.Checkpoint | None:
        """The checkpoint to start from: the same in every process."""
        start, warnings = checkpoints.newest(source / "checkpoints")
        if checkpoints.listing(source / "checkpoints") and start is None:
            raise UserError(f"every checkpoint in {source} is damaged; nothing can be resumed.")
        for warning in warnings:
            self._say(f"warning: {warning}")
        found = hosts.exchange(start and [start.meta["batch"], start.meta["iteration"], start.meta["seconds"]])
        if any(other != found[0] for other in found):
            raise UserError(f"the processes find different checkpoints in {source}: it must be one shared directory.")
        return start

    def _warn_differences(self, meta: dict[str, Any], origin: dict[str, Any]) -> None:
        for name in ("device", "versions"):
            if meta[name] != origin[name]:
                self._say(
                    f"warning: the checkpoint was written with {name} {meta[name]}, this is {origin[name]}; the run "
                    "continues, but not bit for bit."
                )

    # -- one batch of members -----------------------------------------------------------------------------------------

    def _run_batch(self, batch: range, start: checkpoints.Checkpoint | None, interrupted: Callable[[], bool]) -> PyTree:
        groups = len(self.devices) // self.spec.devices_per_agent
        assignment = population.assign(len(batch), groups)
        seeds, settings = zip(*[self.everyone[m] for m in batch], strict=True)
        fleet, states = schemes.build(
            self.spec.axes,
            self.parts,
            self.devices,
            self.spec.devices_per_agent,
            assignment,
            seeds,
            settings,
            self._say,
            self.engine,
        )
        assignment = fleet.assignment
        self.compile_seconds += fleet.compile_seconds
        at = Progressed(states, fleet.zero_metrics, 0)
        found = self._checkpoint_of_batch(start)
        if found is not None:
            at = self._restored(at, found, assignment)
        elif self.settings.init_from:
            at = at._replace(states=fleet.adopted(self._with_params(states)))
        # The states are donated chunk by chunk: nobody else may hold them.
        del states
        began, base = time.perf_counter(), self.seconds
        self.clock = lambda: base + time.perf_counter() - began
        self.last_save = self.last_flush = time.perf_counter()

        checkpoint_seconds = self.settings.checkpoint_seconds
        hooks = Hooks(
            on_point=lambda point: self._on_point(fleet, batch, point),
            interrupted=lambda: self._asked_to_stop(interrupted) is not None,
            checkpoint_due=lambda: hosts.exchange(time.perf_counter() - self.last_save)[0] > checkpoint_seconds,
            save=lambda at: self._save(fleet, at),
        )
        try:
            with self._profiled():
                at = driver.drive(fleet, at, self.line, hooks)
        except Exception:  # such as the death of every worker: what was measured until then remains
            self._flush()
            raise
        self.seconds = self.clock()
        if at.iteration < self.line.total:
            self.status = self._asked_to_stop(interrupted) or self.status
        first_bad = assignment.collect(_fleet.gather([state.learner.first_bad_update for state in at.states]))[:, 0]
        self.diverged |= {m: int(update) for m, update in zip(batch, first_bad, strict=True) if update >= 0}
        if all(m in self.diverged for m in batch) and self.status == OK:
            self.status = DIVERGED
        return jax.tree.map(lambda x: x[:, 0], _policy(fleet, at.states))

    def _asked_to_stop(self, interrupted: Callable[[], bool]) -> str | None:
        """Why the session is to end before its time, whichever process was asked: INTERRUPTED, TIMEOUT or None."""
        limit = self.settings.max_seconds
        late = limit is not None and self.clock() - self.earlier > limit
        asked = hosts.exchange(INTERRUPTED if interrupted() else TIMEOUT if late else None)
        return next((reason for reason in (INTERRUPTED, TIMEOUT) if reason in asked), None)

    def _checkpoint_of_batch(self, start: checkpoints.Checkpoint | None) -> checkpoints.Checkpoint | None:
        if start is None or self.source is None or self.batch > start.meta["batch"]:
            return None
        if start.meta["batch"] == self.batch:
            return start
        found, _ = checkpoints.newest(self.source / "checkpoints", self.batch)
        if found is None:
            raise UserError(f"the checkpoints of batch {self.batch} are damaged; nothing can be resumed.")
        return found

    def _restored(self, at: Progressed, found: checkpoints.Checkpoint, assignment: population.Assignment) -> Progressed:
        by_member = checkpoints.fill(_as_saved(assignment, at.states, at.metrics), found.arrays)
        own = _devices.own(self.devices)
        values = jax.tree.map(lambda x: assignment.place(x)[own], by_member)
        states, sums = _fleet.scatter(at.states, values["state"]), _fleet.scatter(at.metrics, values["metrics"])
        return Progressed(states, sums, found.meta["iteration"])

    def _with_params(self, states: list[Any]) -> list[Any]:
        """`states` with every member's parameters and target replaced by those of one member of another run."""
        source = _load_params(pathlib.Path(str(self.settings.init_from)), self.settings.init_member)

        def replaced(state: Any) -> Any:
            learner = state.learner
            leading = learner.updates.shape
            arrays = {name: np.broadcast_to(x, (*leading, *x.shape)) for name, x in source.items()}
            values = checkpoints.fill(learner.params, arrays)
            params, target = (_fleet.scatter([tree], values)[0] for tree in (learner.params, learner.target_params))
            return state._replace(learner=learner._replace(params=params, target_params=target))

        return [replaced(state) for state in states]

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_point(self, fleet: Fleet, batch: range, point: Point) -> bool:
        rows = self._rows(fleet, batch, point)
        self.rows += rows
        self.unwritten += rows
        shown = [row["eval_return"] for row in self.rows[-len(rows) * 5 :] if not math.isnan(row["eval_return"])]
        shown = shown or [row["episode_return"] for row in rows]
        self.bar.update(rows[0]["env_steps"], float(np.mean(shown)), point.iteration == self.line.total)
        if self.settings.on_chunk:
            self.settings.on_chunk(rows)
        if time.perf_counter() - self.last_flush > FLUSH_SECONDS:
            self._flush()
        returns = [row["eval_return"] for row in rows]
        target = self.settings.stop_at_return
        if target is not None and min(returns) >= target:
            self.status = SOLVED
            return True
        if all(member in self.diverged for member in batch):
            self.status = DIVERGED
            return True
        return False

    def _rows(self, fleet: Fleet, batch: range, point: Point) -> list[dict[str, Any]]:
        collect = fleet.assignment.collect
        values = jax.tree.map(collect, _fleet.gather(point.metrics))  # [M, shards]
        sums = jax.tree.map(lambda x: x.sum(axis=1), values.episodes)
        config, line = self.spec.config, self.line
        previous = (point.iteration - 1) // line.log_every * line.log_every
        updates = line.updates(point.iteration, config.updates_per_iteration)
        window = updates - line.updates(previous, config.updates_per_iteration)
        evaluated = point.episodes and jax.tree.map(collect, _fleet.gather(point.episodes))  # [M, shards, E]
        rows = []
        for index, member in enumerate(batch):
            seed, setting = self.everyone[member]
            episodes = sums.episodes[index]
            first_bad = int(values.first_bad_update[index, 0])
            if first_bad >= 0 and member not in self.diverged:
                self.diverged[member] = first_bad
                self._say(
                    f"warning: member {member} (seed {seed}): loss or gradient not finite at update {first_bad}; its "
                    "last finite parameters are kept. Lower hparams.learning_rate or use --loss huber."
                )
            means = {name: x[index].mean() / window if window else math.nan for name, x in values.learning.items()}
            row = {
                "member": member,
                "seed": seed,
                **{name: getattr(setting, name) for name in self.varying},
                "iteration": point.iteration,
                "env_steps": point.iteration * line.steps_per_iteration,
                "updates": updates,
                "seconds": self.clock(),
                "episodes": int(episodes),
                "episode_return": sums.returns[index] / episodes if episodes else math.nan,
                "episode_length": sums.lengths[index] / episodes if episodes else math.nan,
                **means,
                "epsilon": values.epsilon[index, 0],
                "eval_return": evaluated.returns[index].mean() if evaluated else math.nan,
                "eval_length": evaluated.lengths[index].mean() if evaluated else math.nan,
                **{name: float(value) for name, value in point.telemetry.items()},
            }
            rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
        return rows

    def _flush(self) -> None:
        self.last_flush = time.perf_counter()
        if self.directory is not None and self.unwritten:
            last = self.unwritten[-1]["iteration"]
            metrics.append(self.directory.path / "metrics.parquet", self.batch, last, self.unwritten)
        if self.scalars is not None:
            self.scalars.write(self.unwritten)
            self.scalars.flush()
        self.unwritten = []

    def _save(self, fleet: Fleet, at: Progressed) -> None:
        iteration = at.iteration
        values = _as_saved(fleet.assignment, at.states, at.metrics)
        if fleet.policy is None:
            _assert_replicas_equal(values["state"].learner)
        else:
            values["policy"] = _policy(fleet, at.states)
        self._flush()
        if self.directory is None:
            return
        meta = {
            "batch": self.batch,
            "iteration": iteration,
            "seconds": self.clock(),
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
            print(line, file=sys.stderr, flush=True)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, params: PyTree) -> Result:
        if self.scalars is not None:
            self.scalars.close()
        frame = metrics.tidy(pd.DataFrame(self.rows))
        if self.directory is not None:
            frame = metrics.read(self.directory.path / "metrics.parquet")
        summary = self._summary(frame)
        result = Result(
            frame,
            params,
            summary,
            self.spec.config,
            self.everyone,
            self.parts,
            self.varying,
            self.directory.path if self.directory else None,
        )
        if self.directory is not None:
            self.directory.write_summary(summary)
            if len(frame):
                reporting.save_figure(result.plot(), self.directory.path / "curves.png")
        return result

    def _summary(self, frame: pd.DataFrame) -> dict[str, Any]:
        finals = final_score(frame, by=["member"]).tolist() if len(frame) else []
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
            "final_return_mean": _number(float(np.mean(finals))) if finals else None,
            "final_return_ci95": bootstrap_ci(finals),
            "final_return_per_member": [_number(final) for final in finals],
            "first_bad_update_per_member": {str(member): update for member, update in self.diverged.items()},
            "replay_bytes": self.budget.replay_bytes * replays * len(self.everyone),
            "dead_workers": int(frame["dead_workers"].max()) if "dead_workers" in frame else 0,
            "jax_version": jax.__version__,
            "device": self.origin["device"],
            "commit": self.origin["commit"],
            "versions": self.origin["versions"],
        }


def load(path: str | pathlib.Path) -> Result:
    """The run in a directory, from its metrics and newest good checkpoints. Raises `UserError`."""
    path = pathlib.Path(path)
    spec, values = directory.load(path)
    parts = _fleet.make_parts(spec.config, spec.devices_per_agent)
    everyone = members(spec.hparams, spec.seeds, spec.vary)
    template = jax.eval_shape(lambda: parts.agent.init(jax.random.key(0), HParams()).params)
    pieces = []
    for batch in range(-(-len(everyone) // spec.members_per_batch)):
        found, warnings = checkpoints.newest(path / "checkpoints", batch)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if found is None:
            break
        size = min(spec.members_per_batch, len(everyone) - batch * spec.members_per_batch)
        prefix = "policy/" if any(name.startswith("policy/") for name in found.arrays) else "state/learner/params/"
        arrays = {name: x[:, 0] for name, x in found.arrays.items() if name.startswith(prefix)}
        lanes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), template)
        pieces.append(checkpoints.fill(lanes, arrays, prefix))
    if not pieces:
        raise UserError(f"{path} has no readable checkpoint yet.")
    params = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
    frame = metrics.read(path / "metrics.parquet")
    varying = tuple(name for name, options in spec.vary.items() if len(set(options)) > 1)
    return Result(frame, params, values, spec.config, everyone, parts, varying, path)


def _number(value: float) -> float | None:
    """`value` for JSON, which has no NaN."""
    return None if math.isnan(value) else value


def _as_saved(assignment: population.Assignment, states: list[Any], sums: list[Any]) -> dict[str, Any]:
    """What a checkpoint holds, [M, shards, ...]: by member, so that another number of devices can take it up."""
    return jax.tree.map(assignment.collect, {"state": _fleet.gather(states), "metrics": _fleet.gather(sums)})


def _policy(fleet: Fleet, states: list[Any]) -> PyTree:
    """The parameters by which each member is judged, [M, shards, ...]."""
    params = fleet.policy(states) if fleet.policy else [state.learner.params for state in states]
    return jax.tree.map(fleet.assignment.collect, _fleet.gather(params))


def _load_params(path: pathlib.Path, member: int) -> dict[str, np.ndarray]:
    params = member_params(load(path).params, member)
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _assert_replicas_equal(learner: PyTree) -> None:
    """Every shard of an agent must hold the same learner; anything else is a bug of ours."""
    for key, shards in jax.tree_util.tree_leaves_with_path(learner):
        if not np.array_equal(shards, np.broadcast_to(shards[:, :1], shards.shape), equal_nan=shards.dtype.kind == "f"):
            raise AssertionError(f"replicas differ in {jax.tree_util.keystr(key)}.")


@contextlib.contextmanager
def _catch_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as it always does."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def handler(number: int, frame: Any) -> None:
        del frame
        caught.append(number)
        for known, old in previous.items():
            signal.signal(known, old)

    with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    try:
        yield lambda: bool(caught)
    finally:
        for known, old in previous.items():
            signal.signal(known, old)
