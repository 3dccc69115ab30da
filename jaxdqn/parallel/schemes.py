"""The parallel schemes by name. A scheme is a file, and a line in `SCHEMES`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxdqn.components import Components
from jaxdqn.config import INT32_MAX, Config, HParams, check_fields, plain
from jaxdqn.errors import UserError, shown, unknown_name
from jaxdqn.parallel import hosts
from jaxdqn.parallel.asynchronous.actor_learner import ACTOR_LEARNER
from jaxdqn.parallel.asynchronous.parameter_server import PARAMETER_SERVER
from jaxdqn.parallel.asynchronous.ray_engine import Engine
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled.averaging import AVERAGING
from jaxdqn.parallel.compiled.fused import FUSED
from jaxdqn.parallel.compiled.model_sharding import SHARDING
from jaxdqn.parallel.compiled.population import Assignment
from jaxdqn.parallel.scheme import Built, Devices, Job, Scheme, choose_devices

SCHEMES: dict[str, Scheme] = {
    "fused": FUSED,
    "actor_learner": ACTOR_LEARNER,
    "parameter_server": PARAMETER_SERVER,
    "averaging": AVERAGING,
    "sharding": SHARDING,
}
MOST_UPDATES = 1_000  # of an iteration, in schemes that do not divide it
MAX_THREADS = 256


def of(axes: Axes) -> Scheme:
    """The scheme that `axes` name. Raises `UserError` for an unknown one."""
    if not isinstance(axes, Axes):
        raise UserError(f"axes is {shown(axes)}; it must be Axes, such as Axes('averaging', workers=4).")
    if not isinstance(axes.scheme, str) or axes.scheme not in SCHEMES:
        raise unknown_name("scheme", axes.scheme, SCHEMES)
    return SCHEMES[axes.scheme]


def complete(axes: Axes) -> Axes:
    """`axes` with the defaults of those that are left out. Raises `UserError` for an axis that the scheme has not."""
    declared = of(axes).axes
    given = axes.to_dict()
    del given["scheme"]
    for name in given:
        if name not in declared._fields:
            has = ", ".join(sorted(declared._fields)) or "none; choose one with --parallel"
            raise UserError(f"axes.{name} is no axis of scheme {axes.scheme!r}; it has: {has}.")
    return Axes(axes.scheme, declared(**{name: plain(value) for name, value in given.items()}))


def of_saved(values: Mapping[str, Any]) -> Axes:
    """The axes that a file has, which may name those of other schemes too. Raises `UserError` for unknown names."""
    axes = Axes(values.get("scheme", "fused"))
    own = of(axes).axes
    known = {name for scheme in SCHEMES.values() for name in getattr(scheme.axes, "_fields")}  # noqa: B009
    for name in values:
        if name not in known | {"scheme"}:
            raise unknown_name("axis", name, ["scheme", *known])
    return complete(Axes(axes.scheme, **{name: value for name, value in values.items() if name in own._fields}))


def validate(axes: Axes, num_processes: int = 1) -> None:
    """Raises `UserError` for an unknown value, an axis that the scheme does not have, or a scheme that does not run in
    `num_processes` processes."""
    scheme, own = of(axes), complete(axes).own
    check_fields(type(own), own._asdict(), "axes.")
    for name, value in own._asdict().items():
        if type(own).__annotations__[name] is int and not (type(value) is int and 0 <= value <= INT32_MAX):
            raise UserError(
                f"axes.{name} is {shown(value)}; it must be a whole number of at least 0, at most {INT32_MAX:,}."
            )
    if getattr(own, "workers", 1) < 1:
        raise UserError(f"axes.workers is {own.workers}; it must be at least 1.")
    if num_processes > 1 and not scheme.population:
        raise UserError(
            f"scheme {axes.scheme!r} does not run on several hosts; the fused one does (populations, data "
            "parallelism): leave out --parallel and --axes."
        )
    if scheme.threaded and own.workers > MAX_THREADS:
        raise UserError(
            f"axes.workers is {own.workers}: each is a thread, and one learner or server cannot serve more than "
            f"{MAX_THREADS}."
        )


def check(axes: Axes, config: Config, devices_per_agent: int) -> None:
    """Raises `UserError` for axes that do not fit the configuration, before anything is compiled."""
    validate(axes, hosts.count())
    scheme = of(axes)
    if not scheme.population and devices_per_agent != 1:
        raise UserError(
            f"devices_per_agent {devices_per_agent} belongs to the fused scheme; with {axes.scheme!r} use axes.workers."
        )
    if not scheme.divides_iterations and config.updates_per_iteration > MOST_UPDATES:
        raise UserError(
            f"updates_per_iteration {config.updates_per_iteration} is too many for scheme {axes.scheme!r}, which only "
            f"stops between iterations; use at most {MOST_UPDATES:,}."
        )
    scheme.check(complete(axes).own, config)


def check_engine(axes: Axes, engine: str) -> None:
    """Raises `UserError` for a scheme whose nodes cannot live elsewhere."""
    if engine != "local" and not of(axes).remote(complete(axes).own):
        coupled = " in lockstep" if of(axes).threaded else ""
        raise UserError(
            f"engine {engine!r} is for asynchronous presets, such as gorila, a3c and parallel_dqn; "
            f"scheme {axes.scheme!r}{coupled} runs in one process."
        )


def check_telemetry(axes: Axes, asked: bool) -> None:
    """Raises `UserError` for telemetry of a scheme that does not have learner and replay at hand between two chunks."""
    if asked and not of(axes).measured:
        able = " and ".join(repr(name) for name, scheme in SCHEMES.items() if scheme.measured)
        raise UserError(
            f"telemetry is for the schemes {able}, not for {axes.scheme!r}: leave out --telemetry, or --parallel and "
            "--axes."
        )


def check_components(axes: Axes, components: Components) -> None:
    """Raises `UserError` for a network that the axes cannot divide, and environments that the scheme cannot step."""
    environment = components.environment
    if environment.on_host is not None and not of(axes).steps_hosts:
        raise UserError(
            f"environment {environment.spec.name!r} runs on the host, and scheme {axes.scheme!r} steps environments in "
            "JAX; use --parallel parallel_dqn, apex or lockstep_dqn of train.py, or in Python the axes of one of them."
        )
    of(axes).check_components(complete(axes).own, components)


def needed_devices(axes: Axes) -> Devices:
    """How many devices the scheme needs, and can use."""
    return of(axes).devices(complete(axes).own)


def num_shards(axes: Axes, devices_per_agent: int) -> int:
    """Into how many parts an agent's environments, batch and replay are divided."""
    return max(of(axes).shards(complete(axes).own), devices_per_agent)


def num_replays(axes: Axes, devices_per_agent: int) -> int:
    """How many devices hold a part of an agent's replay."""
    return max(of(axes).replays(complete(axes).own), devices_per_agent)


def state_bytes(axes: Axes, components: Components) -> tuple[int, int]:
    """Bytes of one member's state on the device that holds most of it, and of the replay in that."""
    return of(axes).state_bytes(complete(axes).own, components)


def choose(axes: Axes, num_devices: int | None, devices_per_agent: int, num_members: int) -> list[jax.Device]:
    """The devices to use. Raises `UserError` where there are too few, or another number than the scheme needs."""
    needs = needed_devices(axes)
    if needs.exact and num_devices not in (None, needs.useful):
        raise UserError(
            f"num_devices {num_devices} and axes.workers {needs.useful} differ: each needs a device of its own."
        )
    if needs.useful is None:
        return _devices.choose(num_devices, devices_per_agent, num_members)
    return choose_devices(needs, num_devices)


def build(
    axes: Axes,
    components: Components,
    used: Sequence[jax.Device],
    devices_per_agent: int,
    assignment: Assignment,
    seeds: Sequence[int],
    settings: Sequence[HParams],
    report: Callable[[str], None],
    engine: Engine | None = None,
) -> Built:
    """The scheme's runner and its first states."""
    own = complete(axes).own
    return of(axes).build(Job(own, components, used, devices_per_agent, assignment, seeds, settings, report, engine))
