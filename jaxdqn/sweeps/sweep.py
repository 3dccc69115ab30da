"""A sweep and its trials, as records; `reading` makes a sweep from a YAML file."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxdqn import agents
from jaxdqn.config import Config, HParams, fields_of, validate_hparams, values_of, with_fields, with_values
from jaxdqn.errors import UserError
from jaxdqn.sweeps.space import Space, Values
from jaxdqn.validation import validate

SAMPLERS = ("grid", "random", "sobol", "tpe", "cmaes", "gp", "nsga2")
OBJECTIVES = ("auc", "final")


class Sampler(NamedTuple):
    """Where trials come from: `trials` of them, for those that learn from earlier ones in rounds of `batch`.

    storage: an Optuna storage that finished trials are also written to, sqlite:///FILE or journal:FILE.
    """

    name: str
    trials: int | None
    seed: int = 0
    batch: int = 8
    storage: str | None = None

    @property
    def adaptive(self) -> bool:
        """Whether it learns from the scores of earlier trials: Optuna's."""
        return self.name not in ("grid", "random", "sobol")


class Seeds(NamedTuple):
    """`number` seeds from `first` on."""

    number: int
    first: int = 0

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.number))


class Halving(NamedTuple):
    """After each rung, a fraction of the budget, the best `keep` of the trials go on (Jamieson and Talwalkar, 2016).

    exact: survivors go on in a program of the same width, so bitwise as if never interrupted also where members are
    vmapped (GPUs), at the cost of dead lanes.
    """

    rungs: tuple[float, ...] = (0.25, 0.5)
    keep: float = 0.5
    exact: bool = False


class PopulationBased(NamedTuple):
    """After each `interval`, a fraction of the budget, the worst `quantile` of the members take over learner and values
    of members among the best, and each value is multiplied by one of `factors` (Jaderberg et al., 2017)."""

    interval: float = 0.1
    quantile: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.25)


class Winners(NamedTuple):
    """The best trials are trained again, with seeds that tuning has not seen; 0 trials turns it off."""

    trials: int = 1
    seeds: int = 10
    first_seed: int = 10_000


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep; see docs/sweeps.md for the file. `objective` is what trials are ranked by: the area under the curve of
    greedy returns (auc), or their mean over the last fifth of the budget (final)."""

    config: Config
    hparams: HParams
    space: Space
    sampler: Sampler
    seeds: Seeds
    objective: Literal["auc", "final"] = "auc"
    halving: Halving | None = None
    population_based: PopulationBased | None = None
    winners: Winners = dataclasses.field(default_factory=Winners)

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """The seeds of the winners."""
        return Seeds(self.winners.seeds, self.winners.first_seed).all

    def config_of(self, values: Values) -> Config:
        """The static half of a trial with these values."""
        static = {name: value for name, value in values.items() if name in agents.static_types()}
        return with_fields(agents.config_for(static.get("agent", self.config.agent), self.config), static)

    def hparams_of(self, config: Config) -> HParams:
        """What all trials of this configuration have in common, complete. Raises `UserError`."""
        return agents.complete(config, agents.hparams_for(config.agent, self.hparams))[1]

    def setting_of(self, values: Values) -> dict[str, float]:
        """The traced half, as changes of `hparams`."""
        return {k: float(v) for k, v in values.items() if k not in agents.static_types()}


class Trial(NamedTuple):
    """One point of the space: its number in the sweep, and its values."""

    number: int
    values: Values


class Group(NamedTuple):
    """Trials of one configuration: they differ only in traced fields, and are one compiled population."""

    config: Config
    trials: tuple[Trial, ...]


def grouped(sweep: Sweep, trials: Sequence[Trial]) -> list[Group]:
    """The trials by configuration, in the order of their first trials.

    Raises `UserError` for a trial that cannot run.
    """
    groups: dict[str, tuple[Config, list[Trial]]] = {}
    for trial in trials:
        config = sweep.config_of(trial.values).resolved()
        key = repr(fields_of(config))
        try:
            if key not in groups:
                validate(config)
            hparams = with_values(sweep.hparams_of(config), sweep.setting_of(trial.values))
            validate_hparams(hparams, config.epsilon_schedule)
        except UserError as error:
            values = ", ".join(f"{name}={short(value)}" for name, value in trial.values.items())
            raise UserError(f"trial {trial.number} ({values}) cannot run: {error}") from None
        groups.setdefault(key, (config, []))[1].append(trial)
    return [Group(config, tuple(members)) for config, members in groups.values()]


def columns(sweep: Sweep, values: Values) -> Values:
    """A trial's values as columns of a table: every field of the space; those that are not active as the sweep has
    them."""
    given = {**agents.defaults(), **fields_of(sweep.config), **values_of(sweep.hparams), **values}
    return {parameter.name: parameter.cell(given[parameter.name]) for parameter in sweep.space.parameters}


def short(value: object) -> str:
    """A value of a trial for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
