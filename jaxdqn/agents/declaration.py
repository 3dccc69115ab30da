"""What an agent's file declares around its loss, from which `components.py` makes it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxdqn.base import Agent, Batch, Spec
from jaxdqn.config import Config
from jaxdqn.learning import Optimizer
from jaxdqn.networks import Cell, Head, action_values
from jaxdqn.replay import Kind
from jaxdqn.td import Penalty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing:
    """The settings, or hyperparameters, of agents without any of their own."""


MakeHead = Callable[[int, bool, Any], Head]
"""head(num_actions, dueling, settings) -> the head of a network."""


class Around(NamedTuple):
    """What is there when an agent is made. `settings` are its own, as its declaration has them, and `with_head` makes
    another network on the same torso; a network is a `RecurrentNetwork` where the agent declares a memory, else a
    `Network`."""

    spec: Spec
    network: Any
    optimizer: Optimizer
    penalty: Penalty
    settings: Any
    with_head: Callable[[MakeHead], Any]


class Alarm(NamedTuple):
    """A metric that warns once in a run where it is above `most`: in `words`, a format of it as `value` and of the
    hyperparameters by name."""

    metric: str
    most: float
    words: str


class Declaration(NamedTuple):
    """An agent by name.

    make(around) -> Agent
    head(num_actions, dueling, settings) -> the head of its network, by default the values of actions
    always: switches of `Config` that are on for its network, whatever is asked for
    memory(settings) -> the recurrent cell between the torso and the head of its network; None for none
    replay: what it learns from where the configuration says "auto": a name in `replay.REPLAYS`, or a kind of its own
    settings: a frozen dataclass of static settings with defaults, each with a line of help; types as in `Config`
    hparams: the same of traced hyperparameters, each `name: Annotated[float, RANGE] = default` with a line of help,
    registered as a pytree; it may have a `check()`, as settings may, that refuses values that do not go together
    batch: what its loss takes, `Batch`, `SequenceBatch` or `TargetBatch`
    on_policy: whether its loss holds only for actions of the policy it learns
    alarms: metrics of its loss about which people are warned
    stacked: whether its parameters are those of several networks, with a leading axis
    unused: fields of `Config` without effect on it, which are refused where they are not at their defaults
    check(config): raises `UserError` for what it would learn wrongly with
    """

    make: Callable[[Around], Agent]
    head: MakeHead = lambda num_actions, dueling, settings: action_values(num_actions, dueling)
    always: tuple[str, ...] = ()
    memory: Callable[[Any], Cell] | None = None
    replay: str | Kind = "uniform"
    settings: type = Nothing
    hparams: type = Nothing
    batch: type = Batch
    on_policy: bool = False
    stacked: bool = False
    alarms: tuple[Alarm, ...] = ()
    unused: tuple[str, ...] = ()
    check: Callable[[Config], None] = lambda config: None
