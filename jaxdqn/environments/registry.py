"""Which environments exist, by name: those of the suites, and those a user registers."""

import importlib
from collections.abc import Callable

import jax

from jaxdqn.base import Environment
from jaxdqn.environments import suites
from jaxdqn.environments.contract import check, line
from jaxdqn.environments.names import CONTINUOUS
from jaxdqn.errors import UserError, shown, unknown_name

_registered: dict[str, Callable[..., object]] = {}


def register(name: str, factory: Callable[..., object]) -> None:
    """Makes `factory(**env_kwargs)` available as environment `name`.

    The factory returns our `Environment` record, or a gymnax environment, which is adapted. Registering a name again
    replaces it, as re-running a notebook cell does. Raises `UserError` for a name that a suite has.
    """
    owner = suites.GYMNAX if name in CONTINUOUS else suites.of(name)
    if owner:
        raise UserError(f"environment {name!r} is {owner.title}'s; register yours under another name.")
    _registered[name] = factory


def factory(name: str) -> Callable[..., object] | None:
    """What a user registered as `name`; None for those of suites and unknown ones."""
    return _registered.get(name)


def names() -> tuple[str, ...]:
    """All environment names, gymnax's first, those of suites that are not installed included."""
    return (*suites.NAMES, *_registered)


def make(
    name: str,
    env_params: dict[str, object] | None = None,
    env_kwargs: dict[str, object] | None = None,
    sticky_actions: float = 0.0,
) -> Environment:
    """The environment called `name`, its contract checked.

    env_params replace fields of the environment's parameters; env_kwargs go to its constructor. Raises `UserError` for
    unknown names, parameters and arguments, a suite that is not installed, continuous actions, and a step that breaks
    the contract.
    """
    if name in CONTINUOUS:
        raise UserError(f"environment {name!r} has continuous actions; jaxdqn needs discrete ones, as in CartPole-v1.")
    if name not in _registered and suites.of(name) is None:
        raise unknown_name("environment", name, names(), "`python experiments/list.py` shows all.")
    from jaxdqn.environments import gymnax_adapter, sticky

    given = env_params or {}, env_kwargs or {}
    try:
        if name in _registered:
            environment = gymnax_adapter.make(name, *given, _registered[name])
        else:
            environment = importlib.import_module(suites.find(name).adapter).make(name, *given)
    except UserError:
        raise
    except Exception as error:  # of any kind: it is other people's code
        asked = f" with env_params {shown(env_params)}" if env_params else ""
        raise UserError(f"environment {name!r} cannot be used{asked}: {line(error)}") from error
    check(environment, jax.random.key(0))
    return sticky.sticky(environment, sticky_actions) if sticky_actions else environment
