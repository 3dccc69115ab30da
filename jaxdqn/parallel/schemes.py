"""Which runner a scheme builds, and on how many devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdqn.config import Config, HParams
from jaxdqn.config import validate as validate_config
from jaxdqn.errors import UserError
from jaxdqn.parallel import hosts
from jaxdqn.parallel.asynchronous import actor_learner, parameter_server
from jaxdqn.parallel.asynchronous.engine import Engine
from jaxdqn.parallel.axes import Axes, validate
from jaxdqn.parallel.compiled import averaging, devices, model_sharding, runner
from jaxdqn.parallel.compiled.population import Assignment
from jaxdqn.parallel.compiled.runner import Components, Runner

MOST_UPDATES = 1_000  # of an iteration, in schemes that do not divide it


def check(axes: Axes, config: Config, devices_per_agent: int) -> None:
    """Raises `UserError` for axes that do not fit the configuration, before anything is compiled."""
    validate(axes, hosts.count())
    if axes.scheme != "fused" and devices_per_agent != 1:
        raise UserError(
            f"devices_per_agent {devices_per_agent} belongs to the fused scheme; with {axes.scheme!r} use axes.workers."
        )
    if axes.scheme not in ("fused", "sharding") and config.updates_per_iteration > MOST_UPDATES:
        raise UserError(
            f"updates_per_iteration {config.updates_per_iteration} is too many for scheme {axes.scheme!r}, which only "
            f"stops between iterations; use at most {MOST_UPDATES:,}."
        )
    if axes.scheme == "actor_learner":
        actor_learner.validate(config, _actor_learner(axes))
    if axes.scheme == "averaging":
        validate_config(config, axes.workers)
        averaging.validate(axes.average_every, axes.average_each_until)
    if axes.scheme == "sharding" and (axes.data < 1 or axes.workers % axes.data):
        raise UserError(f"axes.data {axes.data} does not divide axes.workers {axes.workers}: the mesh is data x model.")


def check_engine(axes: Axes, engine: str) -> None:
    """Raises `UserError` for a scheme whose nodes cannot live elsewhere."""
    if engine != "local" and not (axes.scheme == "parameter_server" or axes.coupling == "async"):
        raise UserError(
            f"engine {engine!r} is for asynchronous presets, such as gorila, a3c and parallel_dqn; "
            f"scheme {axes.scheme!r}{' in lockstep' if axes.scheme == 'actor_learner' else ''} runs in one process."
        )


def check_components(axes: Axes, components: Components) -> None:
    """Raises `UserError` for a network that the axes cannot divide."""
    if axes.scheme == "sharding":
        model_sharding.check(components, axes.data, axes.workers // axes.data)


def num_shards(axes: Axes, devices_per_agent: int) -> int:
    """Into how many parts an agent's environments, batch and replay are divided."""
    return axes.workers if axes.scheme == "averaging" else devices_per_agent


def num_replays(axes: Axes, devices_per_agent: int) -> int:
    """How many devices hold a part of an agent's replay."""
    return axes.data if axes.scheme == "sharding" else num_shards(axes, devices_per_agent)


def state_bytes(axes: Axes, components: Components) -> tuple[int, int]:
    """Bytes of one member's state on the device that holds most of it, and of the replay in that; nothing is
    allocated. What is under way between threads is not in it."""
    if axes.scheme == "actor_learner":
        return actor_learner.state_bytes(components, _actor_learner(axes))
    if axes.scheme == "parameter_server":
        return parameter_server.state_bytes(components, _parameter_server(axes))
    if axes.scheme == "averaging":
        return averaging.state_bytes(components, averaging.make_rule(axes.combine))
    if axes.scheme == "sharding":
        return model_sharding.state_bytes(components, axes.data, axes.workers // axes.data)
    return runner.shard_bytes(components)


def choose_devices(axes: Axes, num_devices: int | None, devices_per_agent: int, num_members: int) -> list[jax.Device]:
    """The devices to use. Raises `UserError` where there are too few."""
    if axes.scheme == "fused":
        return devices.choose(num_devices, devices_per_agent, num_members)
    useful = axes.useful_devices
    if axes.scheme in ("averaging", "sharding") and num_devices not in (None, useful):
        raise UserError(f"num_devices {num_devices} and axes.workers {useful} differ: each needs a device of its own.")
    if axes.scheme in ("averaging", "sharding"):
        return devices.choose(useful, 1, useful)
    wanted = len(jax.local_devices()) if num_devices is None else num_devices
    return devices.choose(min(wanted, useful), 1, useful)


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
) -> tuple[Runner, list[Any]]:
    """The scheme's runner and its first states. `assignment` is that of the fused scheme; others have one member."""
    if axes.scheme == "actor_learner":
        return actor_learner.build(components, used, seeds, settings, _actor_learner(axes), report, engine=engine)
    if axes.scheme == "parameter_server":
        return parameter_server.build(components, used, seeds, settings, _parameter_server(axes), report, engine=engine)
    if axes.scheme == "averaging":
        rule = averaging.make_rule(axes.combine)
        return averaging.build(components, used, seeds, settings, rule, axes.average_every, axes.average_each_until)
    if axes.scheme == "sharding":
        return model_sharding.build(components, used, seeds, settings, axes.workers // axes.data)
    return runner.build(components, used, devices_per_agent, assignment, seeds, settings)


def _actor_learner(axes: Axes) -> actor_learner.Axes:
    return actor_learner.Axes(
        axes.workers, axes.merge_every, axes.broadcast_every, axes.coupling, axes.lag, axes.slack, axes.max_lag
    )


def _parameter_server(axes: Axes) -> parameter_server.Axes:
    return parameter_server.Axes(axes.workers, axes.lock, axes.max_lag, axes.scale_by_lag, axes.own_statistics)
