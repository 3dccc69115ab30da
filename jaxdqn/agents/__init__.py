"""Agents by name, and what each declares. An agent is a file, and a line in `AGENTS`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TypeVar, get_type_hints

from jaxdqn.agents.actor_critic import A2C, actor_critic
from jaxdqn.agents.c51 import C51
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import DOUBLE_DQN, DQN, double_dqn, dqn
from jaxdqn.agents.hl_gauss import HL_GAUSS
from jaxdqn.agents.iqn import IQN
from jaxdqn.agents.multi.ensemble import ensemble_dqn, ensemble_of
from jaxdqn.agents.multi.partitioned import PARTITIONED_DQN, partitioned_dqn
from jaxdqn.agents.munchausen import MUNCHAUSEN
from jaxdqn.agents.pqn import PQN
from jaxdqn.agents.qr_dqn import QR_DQN
from jaxdqn.agents.r2d2 import DRQN, R2D2, r2d2
from jaxdqn.agents.rainbow import RAINBOW
from jaxdqn.agents.random import RANDOM, random
from jaxdqn.config import (
    MOST_WIDE,
    Config,
    HParams,
    Range,
    check_fields,
    check_record,
    check_together,
    fields_of,
    own_values,
    plain,
    ranges_of,
    values_of,
)
from jaxdqn.errors import UserError, shown, unknown_name
from jaxdqn.files.documents import Fields
from jaxdqn.replay import REPLAYS, Kind

__all__ = ["AGENTS", "actor_critic", "double_dqn", "dqn", "ensemble_dqn", "partitioned_dqn", "r2d2", "random"]

T = TypeVar("T")
AGENTS: dict[str, Declaration] = {
    "dqn": DQN,
    "double_dqn": DOUBLE_DQN,
    "munchausen": MUNCHAUSEN,
    "c51": C51,
    "hl_gauss": HL_GAUSS,
    "qr_dqn": QR_DQN,
    "iqn": IQN,
    "rainbow": RAINBOW,
    "ensemble_dqn": ensemble_of("dqn", DQN),
    "partitioned_dqn": PARTITIONED_DQN,
    "r2d2": R2D2,
    "drqn": DRQN,
    "a2c": A2C,
    "pqn": PQN,
    "random": RANDOM,
}


def of(name: str) -> Declaration:
    """What the agent called `name` declares; "ensemble_NAME" is an ensemble of any other. Raises `UserError` for an
    unknown one, and for what there are no ensembles of."""
    if isinstance(name, str) and name in AGENTS:
        return AGENTS[name]
    if member_of(name) in AGENTS:
        return _ensemble(member_of(name), AGENTS[member_of(name)])
    raise unknown_name("agent", name, AGENTS, "`python experiments/list.py` shows all.")


_ensemble = functools.lru_cache(maxsize=32)(ensemble_of)


def member_of(name: str) -> str:
    """The agent that an ensemble is of; of others the agent itself."""
    return name.removeprefix("ensemble_") if isinstance(name, str) else name


def replay_of(config: Config) -> Kind:
    """The replay that the agent learns from. Raises `UserError` where it cannot learn from what is asked for."""
    declared = of(config.agent)
    asked = declared.replay if config.replay == "auto" else config.replay
    if isinstance(asked, str) and asked not in REPLAYS:
        raise unknown_name("replay", asked, ["auto", *REPLAYS])
    kind = REPLAYS[asked] if isinstance(asked, str) else asked
    if declared.on_policy and not kind.newest_only:
        raise UserError(
            f"agent {config.agent!r} is on-policy: it cannot learn from replay {config.replay!r}; leave it 'auto'."
        )
    if declared.batch is not kind.batch:
        raise UserError(
            f"agent {config.agent!r} learns from a {declared.batch.__name__}, and replay {config.replay!r} gives a "
            f"{kind.batch.__name__}; leave it 'auto'."
        )
    return kind


def settings_of(config: Config) -> object:
    """The agent's own settings, with its defaults for those that `config` leaves out. Raises `UserError` for others."""
    return _filled("configuration field", of(config.agent).settings, config.own, fields_of(config))


def with_settings(config: Config) -> Config:
    """`config` with all of the agent's own settings. Raises `UserError` as `settings_of` does."""
    return dataclasses.replace(config, own=settings_of(config))


def with_always(config: Config) -> Config:
    """`config` with the switches that are always on for the agent's network."""
    switches: Fields = dict.fromkeys(of(config.agent).always, True)
    return dataclasses.replace(config, **switches)


def rows_needed(config: Config) -> int:
    """How many rows must be written before the agent's replay can be sampled."""
    return replay_of(config).rows_needed(with_settings(config))


def complete(config: Config, hparams: HParams) -> tuple[Config, HParams]:
    """Both with all that the agent declares of its own, at its defaults where nothing is given. Raises `UserError` for
    what the agent does not have."""
    check_record(hparams)
    declared = of(config.agent)
    own = _filled("hyperparameter", declared.hparams, hparams.own, values_of(hparams))
    return with_settings(config), hparams._replace(own=own)


def _filled(kind: str, declared: type, given: object, known: Mapping[str, object]) -> object:
    values = own_values(given)
    names = _names(declared)
    for name in values:
        if name not in names:
            raise unknown_name(kind, name, [x for x in (*known, *names) if x not in values])
    return declared(**{name: plain(value) for name, value in values.items()})


def known_here(agent: str, values: Mapping[str, T]) -> dict[str, T]:
    """`values` by name, without those that other agents declare: a file that was written when all had them."""
    others = set().union(*(names_of(name) for name in AGENTS)) - set(names_of(agent))
    return {name: value for name, value in values.items() if name not in others}


def names_of(agent: str) -> tuple[str, ...]:
    """The names of what an agent declares of its own, settings and hyperparameters."""
    return (*_names(of(agent).settings), *_names(of(agent).hparams))


def _names(declared: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(declared))


def config_for(agent: str, config: Config) -> Config:
    """`config` for this agent, without what only others have of their own, and with what has no effect on it at its
    default."""
    unused: Fields = {name: getattr(Config, name) for name in of(agent).unused}
    own = known_here(agent, own_values(config.own)) or ()
    return dataclasses.replace(config, **unused, agent=agent, own=own)


def hparams_for(agent: str, hparams: HParams) -> HParams:
    """`hparams` without what only other agents have of their own."""
    return hparams._replace(own=known_here(agent, own_values(hparams.own)) or ())


def ranges() -> dict[str, Range]:
    """The range of every hyperparameter by name, whichever agent has it."""
    found = ranges_of(HParams)
    for declared in AGENTS.values():
        found = found | ranges_of(declared.hparams)
    return found


def static_types() -> dict[str, object]:
    """The type of every static setting by name, whichever agent has it."""
    types = {name: kind for name, kind in get_type_hints(Config).items() if name != "own"}
    for declared in AGENTS.values():
        types |= get_type_hints(declared.settings)
    return types


def defaults() -> dict[str, object]:
    """The default of everything that an agent has of its own, by name."""
    kinds: list[type] = [kind for declared in AGENTS.values() for kind in (declared.settings, declared.hparams)]
    return {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}


def check(config: Config) -> None:
    """Raises `UserError` for an unknown agent or replay, a replay that is wrong for the agent, settings without effect
    on either, and values that its own settings cannot have: whole numbers are at least 1, or 0 where they are declared
    `NOT_NEGATIVE`."""
    of(config.agent).check(config)
    for name in (*of(config.agent).unused, *replay_of(config).unused):
        value, default = getattr(config, name), getattr(Config, name)
        if value != default:
            raise UserError(
                f"{name} {shown(value)} has no effect on agent {config.agent!r} or its replay; leave it {default!r}."
            )
    declared, record = of(config.agent).settings, settings_of(config)
    settings = own_values(record)
    check_fields(declared, settings)
    hints, ranges = get_type_hints(declared), ranges_of(declared)
    for name, value in settings.items():
        if hints[name] is not int:
            continue
        least = 0 if name in ranges else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} is {shown(value)}; it must be a whole number of at least {least}.")
        if value > MOST_WIDE:
            raise UserError(f"{name} is {shown(value)}; it must be at most {MOST_WIDE:,}.")
    check_together(record)
