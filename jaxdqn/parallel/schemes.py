"""Which fleet a scheme builds, and on how many devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdqn.axes import Axes, validate
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import actor_learner, devices, fleet, parameter_server
from jaxdqn.parallel.fleet import Fleet, Parts
from jaxdqn.parallel.population import Assignment


def check(axes: Axes, config: Config, devices_per_agent: int) -> None:
    """Raises `UserError` for axes that do not fit the configuration, before anything is compiled."""
    validate(axes)
    if axes.scheme != "fused" and devices_per_agent != 1:
        raise UserError(
            f"devices_per_agent {devices_per_agent} belongs to the fused scheme; with {axes.scheme!r} use axes.workers."
        )
    if axes.scheme == "actor_learner":
        actor_learner.validate(config, _actor_learner(axes))


def choose_devices(axes: Axes, num_devices: int | None, devices_per_agent: int, num_members: int) -> list[jax.Device]:
    """The devices to use. Raises `UserError` where there are too few."""
    if axes.scheme == "fused":
        return devices.choose(num_devices, devices_per_agent, num_members)
    useful = axes.useful_devices
    return devices.choose(min(num_devices or len(jax.local_devices()), useful), 1, useful)


def build(
    axes: Axes,
    parts: Parts,
    used: Sequence[jax.Device],
    devices_per_agent: int,
    assignment: Assignment,
    seeds: Sequence[int],
    settings: Sequence[HParams],
    report: Callable[[str], None],
) -> tuple[Fleet, list[Any]]:
    """The scheme's fleet and its first states. `assignment` is that of the fused scheme; others have one member."""
    if axes.scheme == "actor_learner":
        return actor_learner.build(parts, used, seeds, settings, _actor_learner(axes), report)
    if axes.scheme == "parameter_server":
        chosen = parameter_server.Axes(axes.workers, axes.lock, axes.max_lag, axes.scale_by_lag, axes.own_statistics)
        return parameter_server.build(parts, used, seeds, settings, chosen, report)
    return fleet.build(parts, used, devices_per_agent, assignment, seeds, settings)


def _actor_learner(axes: Axes) -> actor_learner.Axes:
    return actor_learner.Axes(
        axes.workers, axes.merge_every, axes.broadcast_every, axes.coupling, axes.lag, axes.slack, axes.max_lag
    )
