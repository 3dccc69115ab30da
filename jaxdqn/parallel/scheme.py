"""What a parallel scheme is: a record that its file declares, by which all others reach it."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax

from jaxdqn.base import PyTree
from jaxdqn.components import Components
from jaxdqn.config import Config, HParams
from jaxdqn.parallel.asynchronous.ray_engine import Engine
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled.population import Assignment
from jaxdqn.parallel.compiled.runner import Runner

A = TypeVar("A")
Built = tuple[Runner, list[PyTree]]


class Job(NamedTuple, Generic[A]):
    """What a scheme is to train: members with `seeds` and `settings`, laid out by `assignment` where it has several."""

    axes: A
    components: Components
    devices: Sequence[jax.Device]
    devices_per_agent: int
    assignment: Assignment
    seeds: Sequence[int]
    settings: Sequence[HParams]
    report: Callable[[str], None]
    engine: Engine | None


class Devices(NamedTuple):
    """How many devices a scheme cannot do without, and for how many it has work; None where that depends on the
    members. `exact`: whether it uses so many, and no other number."""

    least: int = 1
    useful: int | None = 1
    exact: bool = False


class Scheme(NamedTuple, Generic[A]):
    """One way to take states from an iteration to a later one. `axes` below are its own, a NamedTuple with defaults.

    axes: the NamedTuple's type, each axis with a line of help
    build(job) -> (Runner, first states)
    state_bytes(axes, components) -> bytes of one member's state on the device that holds most of it, and of the replay
    in that; nothing is allocated. What is under way between threads is not in it
    devices(axes) -> Devices
    check(axes, config): raises `UserError` for axes that do not fit the configuration, before anything is made
    check_components(axes, components): the same for what can be seen of the components alone
    shards(axes) -> into how many parts it divides an agent's environments, batch and replay
    replays(axes) -> how many devices hold a part of an agent's replay
    remote(axes) -> whether its workers may live in other processes
    population: whether it trains many members at once, on agents of several devices and several hosts
    threaded: whether a worker is a thread, and the state lies on one device
    divides_iterations: whether it can stop within an iteration
    measured: whether its runner has a `measure`: each shard has all parameters, and a replay
    steps_hosts: whether its actors step environments on the host, too
    """

    axes: type[A]
    build: Callable[[Job[A]], Built]
    state_bytes: Callable[[A, Components], tuple[int, int]]
    devices: Callable[[A], Devices]
    check: Callable[[A, Config], None] = lambda axes, config: None
    check_components: Callable[[A, Components], None] = lambda axes, components: None
    shards: Callable[[A], int] = lambda axes: 1
    replays: Callable[[A], int] = lambda axes: 1
    remote: Callable[[A], bool] = lambda axes: False
    population: bool = False
    threaded: bool = False
    divides_iterations: bool = False
    measured: bool = False
    steps_hosts: bool = False


def choose_devices(needs: Devices, num_devices: int | None) -> list[jax.Device]:
    """The devices of a scheme with one member. Raises `UserError` where there are too few."""
    assert needs.useful is not None
    if needs.exact:
        return _devices.choose(needs.useful, 1, needs.useful)
    wanted = len(jax.local_devices()) if num_devices is None else num_devices
    return _devices.choose(min(wanted, needs.useful), 1, needs.useful)
