"""Trials, and their groups: those that differ only in traced fields are one compiled population."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from jaxdqn.config import Config, HParams, validate_hparams
from jaxdqn.errors import UserError
from jaxdqn.sweeps.space import Parameter, Values
from jaxdqn.sweeps.sweep import Sweep
from jaxdqn.validation import validate


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
        table[parameter.name] = _cell(parameter, values.get(parameter.name, default))
    return table


def in_use(sweep: Sweep, table: pd.DataFrame, name: str) -> pd.Series:
    """Which rows of a table of trials have the field `name` in use: its condition holds, and those of fields in it."""
    parameters = {parameter.name: parameter for parameter in sweep.space.parameters}
    holds = pd.Series(True, index=table.index)
    for other, allowed in parameters[name].when.items():
        cells = [_cell(parameters[other], value) for value in allowed]
        holds &= table[other].isin(cells) & in_use(sweep, table, other)
    return holds


def hparams_of(sweep: Sweep, trial: Trial) -> HParams:
    """A trial's hyperparameters."""
    return sweep.hparams._replace(**sweep.setting_of(trial.values))


def _checked(check: Any, trial: Trial) -> None:
    try:
        check()
    except UserError as error:
        raise UserError(f"trial {trial.number} ({described(trial.values)}) cannot run: {error}") from None


def _cell(parameter: Parameter, value: Any) -> Any:
    if parameter.traced:
        return float(value)
    return "-".join(map(str, value)) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
