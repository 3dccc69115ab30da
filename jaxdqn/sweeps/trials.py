"""Trials, and their groups: those that differ only in traced fields are one compiled population."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdqn.config import Config, HParams, validate, validate_hparams
from jaxdqn.errors import UserError
from jaxdqn.sweeps.space import Values
from jaxdqn.sweeps.sweep import Sweep


class Trial(NamedTuple):
    """One point of the space: its number in the sweep, and its values."""

    number: int
    values: Values


class Group(NamedTuple):
    """Trials of one configuration."""

    config: Config
    trials: tuple[Trial, ...]


def grouped(sweep: Sweep, trials: Sequence[Trial]) -> list[Group]:
    """The trials by configuration, in the order of their first trials.

    Raises `UserError` for a trial that cannot run.
    """
    groups: dict[str, list[Trial]] = {}
    configs: dict[str, Config] = {}
    for trial in trials:
        config = sweep.config_of(trial.values).resolved()
        key = repr(dataclasses.astuple(config))
        if key not in configs:
            configs[key] = config
            _checked(lambda config=config: validate(config), trial)
        hparams = sweep.hparams._replace(**sweep.setting_of(trial.values))
        _checked(lambda config=config, hparams=hparams: validate_hparams(hparams, config.epsilon_schedule), trial)
        groups.setdefault(key, []).append(trial)
    return [Group(configs[key], tuple(members)) for key, members in groups.items()]


def described(values: Values) -> str:
    """A trial's values for people: learning_rate=0.001, batch_size=64."""
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def columns(sweep: Sweep, values: Values) -> dict[str, Any]:
    """A trial's values as columns of a table: every field of the space; those that are not active as the sweep has
    them."""
    table: dict[str, Any] = {}
    for parameter in sweep.space.parameters:
        default = getattr(sweep.hparams if parameter.traced else sweep.config, parameter.name)
        value = values.get(parameter.name, default)
        table[parameter.name] = "-".join(map(str, value)) if isinstance(value, tuple) else value
        if parameter.traced:
            table[parameter.name] = float(value)
    return table


def hparams_of(sweep: Sweep, trial: Trial) -> HParams:
    """A trial's hyperparameters."""
    return sweep.hparams._replace(**sweep.setting_of(trial.values))


def _checked(check: Any, trial: Trial) -> None:
    try:
        check()
    except UserError as error:
        raise UserError(f"trial {trial.number} ({described(trial.values)}) cannot run: {error}") from None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
