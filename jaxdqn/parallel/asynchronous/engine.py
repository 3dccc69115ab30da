"""Where the nodes of an asynchronous scheme live, if not in the process of their threads."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from jaxdqn.config import Config
from jaxdqn.environments import registry
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.parallel.compiled.runner import Components, make_components

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Makes nodes elsewhere: `ray_engine.Cluster` is one."""

    def spawn(self, make: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
        """make(*args) in a process of its own: something with the methods of what it makes, up to `threads` of which
        may run at once."""


def remake(config: Config, factory: Callable[..., Any] | None) -> Components:
    """The parts of `config` in a process that does not know the user's environments: `factory` makes that."""
    if factory is not None:
        registry.register(config.env, factory)
    return make_components(config)


def check(name: str, address: str | None = None) -> None:
    """Raises `UserError` for an unknown engine, for an address without Ray, and where Ray is not there to be used."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    if name == "local" and address is not None:
        raise UserError(f'ray_address {address!r} is for engine "ray"; the engine is "local".')
    if name == "ray":
        from jaxdqn.parallel.asynchronous import ray_engine

        ray_engine.check(address)


@contextlib.contextmanager
def running(name: str, address: str | None = None) -> Iterator[Engine | None]:
    """The engine called `name`, started and ended: None for "local", "ray" on this machine or at `address`.

    Raises `UserError` as `check` does.
    """
    check(name, address)
    if name == "local":
        yield None
        return
    from jaxdqn.parallel.asynchronous import ray_engine

    with ray_engine.cluster(address) as cluster:
        yield cluster
