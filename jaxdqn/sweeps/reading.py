"""From a sweep's YAML file to its records and back, every default filled in; what its parts demand of each other."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from jaxdqn import agents, presets
from jaxdqn.config import (
    LARGEST,
    Config,
    HParams,
    fields_of,
    from_dict,
    to_dict,
    validate_hparams,
    values_of,
    with_values,
)
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.files import documents
from jaxdqn.sweeps import space as _space
from jaxdqn.sweeps.samplers import check_storage
from jaxdqn.sweeps.space import Choices, Space
from jaxdqn.sweeps.sweep import OBJECTIVES, SAMPLERS, Halving, PopulationBased, Sampler, Seeds, Sweep, Winners
from jaxdqn.validation import validate

N = TypeVar("N", bound=NamedTuple)
FIRST_RUNG, LEAST_SEEDS = 0.2, 3
MAX_TRIALS, MAX_SEED = 100_000, 2_000_000_000


def load(path: pathlib.Path) -> Sweep:
    """The sweep in a YAML file. Raises `UserError`."""
    values = _numbers(documents.read_yaml(path))
    try:
        return parse(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse(values: Mapping[str, Any]) -> Sweep:
    """A sweep from plain values. Raises `UserError`."""
    known = "preset env config hparams space sampler seeds objective halving population_based winners".split()
    for name in values:
        if name not in known:
            raise unknown_name("part of a sweep", name, known)
    for name in ("space", "sampler"):
        if name not in values:
            raise UserError(f"{name} is missing.")
    space = _space.parse(values["space"])
    config, hparams = _base(values, space)
    sweep = Sweep(
        config,
        hparams,
        space,
        _sampler(values["sampler"]),
        _seeds(values.get("seeds", 3)),
        values.get("objective", "auc"),
        _part(Halving, "halving", values),
        _part(PopulationBased, "population_based", values),
        _part(Winners, "winners", values) or Winners(),
    )
    _check(sweep)
    return sweep


def to_plain(sweep: Sweep) -> dict[str, object]:
    """Plain values that `parse` reads as the same sweep, whatever the presets become."""

    def domain(parameter: _space.Parameter) -> dict[str, object]:
        options = {key: value for key, value in parameter.domain._asdict().items() if value is not None}
        if "values" in options:
            options = {"choices": [list(value) if isinstance(value, tuple) else value for value in options["values"]]}
        when = {"when": {name: list(allowed) for name, allowed in parameter.when.items()}} if parameter.when else {}
        return {**options, **when}

    def part(value: NamedTuple) -> dict[str, object]:
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value._asdict().items()}

    # What is searched under a condition has a fixed value, too: that of trials where the condition does not hold.
    names = [parameter.name for parameter in sweep.space.parameters if not parameter.when]
    stages = {"halving": sweep.halving, "population_based": sweep.population_based, "winners": sweep.winners}
    return {
        "config": {key: value for key, value in to_dict(sweep.config).items() if key not in names},
        "hparams": {key: value for key, value in values_of(sweep.hparams).items() if key not in names},
        "space": {parameter.name: domain(parameter) for parameter in sweep.space.parameters},
        "sampler": part(sweep.sampler),
        "seeds": part(sweep.seeds),
        "objective": sweep.objective,
        **{name: part(value) for name, value in stages.items() if value is not None},
    }


def _base(values: Mapping[str, Any], space: Space) -> tuple[Config, HParams]:
    """The fixed settings: a preset (by default that of environment and agent), changed by config and hparams.

    What is searched without a condition has the first value of its domain: no preset's value can be in the way.
    """
    fixed = _fixed(values, space)
    env, agent = (_text(field, fixed["config"].get(field)) for field in ("env", "agent"))
    name = _text("preset", values.get("preset"))
    chosen = presets.preset(name) if name else presets.for_environment(env or Config.env, agent)
    given = {**fields_of(chosen.config), "final_episodes": 0, **fixed["config"]}
    given["env"] = env or chosen.config.env
    hparams = with_values(chosen.hparams, fixed["hparams"])
    sweep = Sweep(from_dict(given), hparams, space, Sampler("grid", None), Seeds(1))
    _check_first_trial(sweep)
    first = {parameter.name: parameter.domain.at(0.0) for parameter in space.parameters if not parameter.when}
    config = sweep.config_of(first)
    if not {"total_steps", "eval_interval"} & set(space.names):
        # A row for each evaluation: hundreds of members with a hundred rows each are more than anybody looks at.
        config = dataclasses.replace(config, log_interval=config.log_interval or config.resolved().eval_interval)
    setting = with_values(sweep.hparams, sweep.setting_of(first))
    if "learning_rate_updates" in {*fixed["hparams"], *space.names}:
        return config, setting
    return config, presets.falling(setting, chosen.config, config)


def _fixed(values: Mapping[str, Any], space: Space) -> dict[str, Mapping[str, Any]]:
    """The parts config and hparams. Raises `UserError` for fields in the wrong one, and for those that are searched."""
    fixed = {part: {} if values.get(part) is None else values[part] for part in ("config", "hparams")}
    for part, given in fixed.items():
        if not isinstance(given, Mapping):
            raise UserError(f"{part} is {given!r}; it must be {{field: value}}.")
    for name in fixed["config"]:
        if name in agents.ranges():
            raise UserError(f"{name} is traced: it belongs under hparams, not under config.")
    for name, value in fixed["hparams"].items():
        if name in agents.static_types():
            raise UserError(f"{name} is static: it belongs under config, not under hparams.")
        if name not in agents.ranges():
            raise unknown_name("hyperparameter", name, agents.ranges())
        if isinstance(value, list):
            raise UserError(f"hparams.{name} is {value}; it must be one number. Search several in space.{name}.")
    if fixed["config"].get("final_episodes", 0) != 0:
        raise UserError("config.final_episodes is for single runs: a sweep scores curves. Raise config.eval_episodes.")
    if values.get("env") is not None:
        if fixed["config"].get("env", values["env"]) != values["env"]:
            raise UserError(f"env is {values['env']!r}, but config.env is {fixed['config']['env']!r}; keep one.")
        fixed["config"] = {**fixed["config"], "env": values["env"]}
    for part, given in fixed.items():
        for parameter in space.parameters:
            if parameter.name in given and not parameter.when:
                raise UserError(f"{parameter.name} is both fixed under {part} and searched in space; keep one.")
    return fixed


def _check_first_trial(sweep: Sweep) -> None:
    values = sweep.space.at([0.0] * len(sweep.space.parameters))
    config = sweep.config_of(values)
    validate(config)
    hparams = with_values(sweep.hparams_of(config), sweep.setting_of(values))
    validate_hparams(hparams, config.epsilon_schedule)


def _text(name: str, given: object) -> str | None:
    if given is not None and (not isinstance(given, str) or not given):
        raise UserError(f"{name} is {given!r}; it must be a name.")
    return given


def _sampler(given: object) -> Sampler:
    given = given if isinstance(given, Mapping) else {"name": given}
    sampler = _named(Sampler, "sampler", {"trials": None, **given}, required=("name",))
    if sampler.name not in SAMPLERS:
        raise unknown_name("sampler", sampler.name, SAMPLERS)
    if sampler.name == "grid" and sampler.trials is not None:
        raise UserError("sampler.trials is not for the grid: it has as many trials as points.")
    if sampler.storage is not None:
        if not sampler.adaptive:
            raise UserError(f"sampler.storage is for Optuna's samplers; {sampler.name!r} needs none.")
        check_storage(sampler.storage)
    return sampler


def _seeds(given: object) -> Seeds:
    given = given if isinstance(given, Mapping) else {"number": given}
    return _named(Seeds, "seeds", given, required=("number",))


def _part(kind: type[N], name: str, values: Mapping[str, object]) -> N | None:
    return None if values.get(name) is None else _named(kind, name, values[name])


def _named(kind: type[N], name: str, given: object, required: tuple[str, ...] = ()) -> N:
    """`kind`, a NamedTuple, from plain values. Raises `UserError` for anything else."""
    if not isinstance(given, Mapping):
        raise UserError(f"{name} is {given!r}; it must be {{field: value}}, with {', '.join(kind._fields)}.")
    for field in given:
        if field not in kind._fields:
            raise unknown_name(f"field of {name}", field, kind._fields)
    for field in required:
        if field not in given:
            raise UserError(f"{name}.{field} is missing.")
    lists = {field for field, default in kind._field_defaults.items() if isinstance(default, tuple)}
    for field in lists & given.keys():
        if not isinstance(given[field], list):
            raise UserError(f"{name}.{field} is {given[field]!r}; it must be a list.")
    values = {field: tuple(value) if field in lists else value for field, value in given.items()}
    return kind(**values)  # type: ignore[call-overload]


def _numbers(value: object) -> Any:
    """1e-3 and 5e5 as people mean them: YAML 1.1 reads them as text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+|inf", value):
        number = float(value)
        return int(number) if re.fullmatch(r"\+?\d+(\.\d+)?[eE]\+?\d+", value) and number.is_integer() else number
    return value


def _check(sweep: Sweep) -> None:
    """Raises `UserError` for parts that do not go together."""
    if sweep.objective not in OBJECTIVES:
        raise unknown_name("objective", sweep.objective, OBJECTIVES)
    _check_numbers(sweep)
    _check_ranges(sweep)
    halving, pbt = sweep.halving, sweep.population_based
    if halving is not None and pbt is not None:
        raise UserError("halving and population_based are two ways to stop early; keep one.")
    if halving is not None:
        _check_halving(halving, sweep.seeds.number)
    if pbt is not None:
        _check_population_based(sweep, pbt)
    tuned = set(sweep.seeds.all)
    if sweep.winners.trials and tuned & set(sweep.fresh_seeds):
        raise UserError(
            f"winners.first_seed is {sweep.winners.first_seed}, and tuning uses seeds {min(tuned)} to {max(tuned)}: "
            "the winners need seeds that tuning has not seen."
        )


def _check_numbers(sweep: Sweep) -> None:
    sampler, seeds, winners = sweep.sampler, sweep.seeds, sweep.winners
    whole = {
        "sampler.batch": (sampler.batch, 1, MAX_TRIALS),
        "seeds.number": (seeds.number, 1, MAX_TRIALS),
        "winners.seeds": (winners.seeds, 1, MAX_TRIALS),
        **({} if sampler.name == "grid" else {"sampler.trials": (sampler.trials, 1, MAX_TRIALS)}),
        "sampler.seed": (sampler.seed, 0, MAX_SEED),
        "seeds.first": (seeds.first, 0, MAX_SEED),
        "winners.trials": (winners.trials, 0, MAX_SEED),
        "winners.first_seed": (winners.first_seed, 0, MAX_SEED),
    }
    for name, (value, least, most) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{name} is {value!r}; it must be a whole number from {least} to {most:,}.")


def _check_ranges(sweep: Sweep) -> None:
    domains = [parameter.domain for parameter in sweep.space.parameters]
    if sweep.sampler.name == "cmaes" and (len(domains) < 2 or any(isinstance(domain, Choices) for domain in domains)):
        raise UserError(
            "sampler 'cmaes' needs at least two fields, all of them ranges: it would draw anything else at random. "
            "Take tpe."
        )
    if sweep.sampler.name == "grid":
        sweep.space.grid()


def _check_halving(halving: Halving, seeds: int) -> None:
    rungs = halving.rungs
    if (
        not rungs
        or any(not _is_number(rung) or not 0 < rung < 1 for rung in rungs)
        or list(rungs) != sorted(set(rungs))
    ):
        raise UserError(f"halving.rungs is {list(rungs)}; it must be rising fractions of the budget between 0 and 1.")
    if rungs[0] < FIRST_RUNG:
        raise UserError(
            f"halving.rungs begins at {rungs[0]:g}; the first must be at least {FIRST_RUNG:g} of the budget, since "
            "earlier curves say little about later ones."
        )
    if not _is_number(halving.keep) or not 0 < halving.keep < 1:
        raise UserError(f"halving.keep is {halving.keep!r}; it must be a fraction between 0 and 1.")
    if not isinstance(halving.exact, bool):
        raise UserError(f"halving.exact is {halving.exact!r}; it must be true or false.")
    if seeds < LEAST_SEEDS:
        raise UserError(f"seeds.number is {seeds}; halving needs at least {LEAST_SEEDS}, to rank trials and not luck.")


def _check_population_based(sweep: Sweep, pbt: PopulationBased) -> None:
    static = [parameter.name for parameter in sweep.space.parameters if not parameter.traced]
    if static:
        raise UserError(
            f"population_based changes values during training, and {static[0]} is static (a field of Config); search "
            "only fields of HParams."
        )
    if sweep.sampler.adaptive:
        raise UserError(f"population_based with the sampler {sweep.sampler.name!r}: take grid, random or sobol.")
    if not _is_number(pbt.interval) or not 0 < pbt.interval <= 0.5:
        raise UserError(f"population_based.interval is {pbt.interval!r}; it must be a fraction above 0, at most 0.5.")
    if not _is_number(pbt.quantile) or not 0 < pbt.quantile <= 0.5:
        raise UserError(f"population_based.quantile is {pbt.quantile!r}; it must be a fraction above 0, at most 0.5.")
    if not pbt.factors or any(not _is_number(factor) or factor <= 0 for factor in pbt.factors):
        raise UserError(f"population_based.factors is {list(pbt.factors)}; it must be numbers above 0.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
