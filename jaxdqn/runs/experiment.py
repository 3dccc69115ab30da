"""`train` and `resume`: configuration -> plan -> run directory -> `Session` -> `Result`."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxdqn import agents
from jaxdqn.components import Components, make_components
from jaxdqn.config import (
    Config,
    HParams,
    Vary,
    check_replicates,
    check_seeds,
    check_whole,
    members,
    plain_hparams,
    settings_of,
    validate_hparams,
)
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.parallel import hosts, schemes
from jaxdqn.parallel.asynchronous import ray_engine
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled import memory
from jaxdqn.parallel.compiled import runner as _runner
from jaxdqn.runs import checkpoints, directory, disk
from jaxdqn.runs.directory import Continuation, RunDirectory, RunSpec
from jaxdqn.runs.results import Result, load, read_params
from jaxdqn.runs.session import Session
from jaxdqn.runs.settings import OK, Settings
from jaxdqn.runs.settings import check as check_settings
from jaxdqn.runs.summary import is_complete
from jaxdqn.timeline import timeline
from jaxdqn.validation import validate


def plan(
    config: Config,
    hparams: HParams,
    seeds: Sequence[int],
    vary: Vary | None,
    num_devices: int | None,
    devices_per_agent: int,
    axes: Axes | None = None,
) -> tuple[RunSpec, Components, memory.Plan]:
    """Validates everything, computes bytes, and fixes devices and batches; nothing is allocated.

    Raises `UserError`.
    """
    check_whole("devices_per_agent", devices_per_agent)
    if num_devices is not None:
        check_whole("num_devices", num_devices)
    axes = schemes.complete(Axes() if axes is None else axes)
    hparams = plain_hparams(hparams)
    validate(config, devices_per_agent)
    config, hparams = agents.complete(config, hparams)
    validate_hparams(hparams, config.epsilon_schedule)
    schemes.check(axes, config, devices_per_agent)
    seeds = check_seeds(seeds)
    everyone = members(hparams, seeds, vary, config.epsilon_schedule)
    devices = schemes.choose(axes, num_devices, devices_per_agent, len(everyone))
    components = make_components(config, schemes.num_shards(axes, devices_per_agent))
    schemes.check_components(axes, components)
    groups = len(devices) // devices_per_agent
    state_bytes, replay_bytes = schemes.state_bytes(axes, components)
    own = devices[_devices.own(devices)]
    # Threads leave the state on one device, and the others of a CPU take nothing away from it.
    shares = min(hosts.exchange(memory.available_bytes(own[:1] if schemes.of(axes).threaded else own)))
    state_bytes += _runner.evaluation_bytes(components)
    budget = memory.plan(state_bytes, replay_bytes, len(everyone), groups, shares)
    if not schemes.of(axes).population:  # one member after the other: each has all the devices
        budget = budget._replace(members_per_batch=1, num_batches=len(everyone))
    spec = RunSpec(
        config.resolved(),
        hparams,
        seeds,
        tuple({name: float(value) for name, value in setting.items()} for setting in settings_of(vary)),
        len(devices),
        devices_per_agent,
        budget.members_per_batch,
        axes,
    )
    return spec, components, budget


def train(
    config: Config | None = None,
    hparams: HParams | None = None,
    *,
    seeds: Sequence[int] = (0,),
    vary: Vary | None = None,
    out: str | pathlib.Path | None = None,
    num_devices: int | None = None,
    devices_per_agent: int = 1,
    axes: Axes | None = None,
    settings: Settings | None = None,
    on_chunk: Callable[[list[dict[str, object]]], None] | None = None,
    labels: Sequence[Mapping[str, object]] = (),
    continues: Continuation | None = None,
    least_lanes: int = 1,
) -> Result:
    """Trains every setting of `vary` (HParams field -> values, in every combination; or a list of settings) with every
    seed, as one population; with `axes` of another scheme than "fused", one after the other.

    Uses the devices JAX has (all that have work, or `num_devices`), `devices_per_agent` for each member. With `out`
    the run is kept in a directory and can be resumed; without it everything stays in memory. On several hosts
    (`hosts.join`) all processes return the same result, and process 0 alone writes and calls `on_chunk`. For `labels`,
    `continues` and `least_lanes` see `RunSpec`. Raises `UserError`.
    """
    settings = Settings() if settings is None else settings
    check_settings(settings)
    spec, components, budget = plan(
        Config() if config is None else config,
        HParams() if hparams is None else hparams,
        seeds,
        vary,
        num_devices,
        devices_per_agent,
        axes,
    )
    spec = dataclasses.replace(
        spec, labels=tuple(dict(label) for label in labels), continues=continues, least_lanes=least_lanes
    )
    if not labels and continues is None:  # either tells members apart, too
        check_replicates(members(spec.hparams, spec.seeds, spec.vary))
    schemes.check_engine(spec.axes, settings.engine)
    schemes.check_telemetry(spec.axes, settings.telemetry)
    ray_engine.check(settings.engine, settings.ray_address)
    settings = settings._replace(on_chunk=on_chunk or settings.on_chunk)
    if settings.init_member and not settings.init_from:
        raise UserError(f"init_member is {settings.init_member}, but there is no init_from whose member it is.")
    if out is None or not hosts.is_first():
        return Session(spec, components, budget, settings).execute()
    if settings.init_from:
        read_params(paths.expanded(settings.init_from), settings.init_member)  # its errors come before a directory
    with directory.create(paths.expanded(out)) as run_directory:
        run_directory.check_unused()
        disk.check(run_directory.path, spec, budget, settings.checkpoint_replay is not False)
        return Session(spec, components, budget, settings, run_directory=run_directory).execute()


def steps_done(path: pathlib.Path, config: Config) -> int:
    """Environment steps of each member at the newest checkpoint of the run in `path`."""
    names = [checkpoint.name for checkpoint in checkpoints.listing(path / "checkpoints")]
    return max((int(name[5:17]) for name in names), default=0) * timeline(config).steps_per_iteration


def _finished(path: pathlib.Path, spec: RunSpec) -> Result | None:
    """The run in `path`, where it has nothing left to do."""
    total = timeline(spec.config).total
    if steps_done(path, spec.config) < total or directory.status(path) != OK:
        return None
    ends = checkpoints.ends(path / "checkpoints")
    if {batch: meta["iteration"] for batch, meta in ends.items()} != dict.fromkeys(range(len(spec.batches)), total):
        return None
    result = load(path)
    return result if is_complete(result.summary) else None


def resume(out: str | pathlib.Path, total_steps: int | None = None, settings: Settings | None = None) -> Result:
    """Continues the run in `out` from its newest good checkpoint, bit for bit; `total_steps` extends it.

    On several hosts every process reads `out`: it must be on a file system that they share.
    """
    path = paths.expanded(out)
    spec, values = directory.load(path)
    settings = Settings() if settings is None else settings
    settings = settings._replace(init_from=values.get("init_from"), init_member=values.get("init_member", 0))
    if settings.checkpoint_replay is None:
        settings = settings._replace(checkpoint_replay=values.get("checkpoint_replay"))
    check_settings(settings)
    schemes.check_engine(spec.axes, settings.engine)
    if total_steps is not None:
        spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, total_steps=total_steps))
        validate(spec.config, spec.devices_per_agent)
        done = steps_done(path, spec.config)
        if timeline(spec.config).total * timeline(spec.config).steps_per_iteration < done:
            raise UserError(f"total_steps is {total_steps}, and {path} has done {done} steps: it cannot be less.")
    finished = _finished(path, spec)
    if finished is not None:
        return finished
    per_agent = spec.devices_per_agent
    available = max(per_agent, jax.process_count() * len(jax.local_devices()) // per_agent * per_agent)
    spec = dataclasses.replace(spec, num_devices=min(spec.num_devices, available))
    fresh, components, budget = plan(
        spec.config, spec.hparams, spec.seeds, spec.vary, spec.num_devices, per_agent, spec.axes
    )
    if fresh.members_per_batch < spec.members_per_batch:
        raise UserError(
            f"the run has {spec.members_per_batch} members at a time, and now only {fresh.members_per_batch} fit in "
            "memory; free some and resume again."
        )
    if not hosts.is_first():
        return Session(spec, components, budget, settings, source=path).execute()
    with RunDirectory(path) as run_directory:
        disk.check(path, spec, budget, settings.checkpoint_replay is not False)
        return Session(spec, components, budget, settings, source=path, run_directory=run_directory).execute()
