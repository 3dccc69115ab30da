"""The search space: fields of `HParams` and `Config`, each with choices or a range, some under a condition.

`HParams` fields are traced: trials that differ only in them share one compiled population. `Config` fields are static:
every combination of their values is a group that is compiled on its own.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

from jaxdqn import agents
from jaxdqn.config import COUNTS, LARGEST, check_in
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.files.documents import Fields

Values = Fields
NOT_SEARCHED = ("env_params", "env_kwargs", "final_episodes")
MAX_GRID = 100_000


class Choices(NamedTuple):
    """A finite set of values."""

    values: tuple[object, ...]

    def at(self, u: float) -> object:
        """The value at u in [0, 1), all equally wide."""
        return self.values[int(u * len(self.values))]

    def grid(self) -> tuple[object, ...]:
        """All values."""
        return self.values


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included; on a grid, `points` of them."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    points: int | None = None

    def at(self, u: float) -> float | int:
        """The number at u in [0, 1): even on the linear or the logarithmic scale."""
        if self.integer:
            return self._inside(round(self._between(self.low - 0.5, self.high + 0.5, u)))
        return self._inside(self._between(self.low, self.high, u))

    def grid(self) -> tuple[float | int, ...]:
        """`points` numbers at even distances, both ends included. Raises `UserError` without `points`."""
        if self.points is None:
            raise UserError(
                "a range on a grid needs points, how many values to take: {low: ..., high: ..., points: 5}."
            )
        values = (np.geomspace if self.log else np.linspace)(self.low, self.high, self.points).tolist()
        return tuple(dict.fromkeys(map(round, values) if self.integer else values))

    def _between(self, low: float, high: float, u: float) -> float:
        if self.log:
            return math.exp(math.log(low) + (math.log(high) - math.log(low)) * u)
        return low + (high - low) * u

    def _inside(self, value: float) -> float | int:
        inside = min(max(value, self.low), self.high)
        return int(inside) if self.integer and float(inside).is_integer() else inside


class Parameter(NamedTuple):
    """One field that is searched, where every parameter named in `when` has one of the values given there."""

    name: str
    domain: Choices | Range
    when: dict[str, tuple[object, ...]]

    @property
    def traced(self) -> bool:
        return self.name in agents.ranges()

    def cell(self, value: Any) -> object:
        """`value` as a cell of a table: a number where it is traced, text where it is a tuple."""
        if self.traced:
            return float(value)
        return "-".join(map(str, value)) if isinstance(value, tuple) else value


class Space(NamedTuple):
    """The parameters, in an order in which each comes after those of its condition."""

    parameters: tuple[Parameter, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    def at(self, point: Iterable[float]) -> Values:
        """The values at a point of the unit cube, those whose condition does not hold left out."""
        values = {p.name: p.domain.at(u) for p, u in zip(self.parameters, point, strict=True)}
        return self.active(values)

    def active(self, values: Mapping[str, object]) -> Values:
        """`values` without those whose condition does not hold; so are those that depend on them."""
        kept: Values = {}
        for parameter in self.parameters:
            holds = all(name in kept and kept[name] in allowed for name, allowed in parameter.when.items())
            if holds:
                kept[parameter.name] = values[parameter.name]
        return kept

    def grid(self) -> list[Values]:
        """Every combination of grid values once. Raises `UserError` for ranges without points, and for too many."""
        axes = [parameter.domain.grid() for parameter in self.parameters]
        count = math.prod(len(axis) for axis in axes)
        if count > MAX_GRID:
            raise UserError(
                f"the grid has {count:,} points; at most {MAX_GRID:,}. Use fewer points, or another sampler."
            )
        return distinct(self.active(dict(zip(self.names, point, strict=True))) for point in itertools.product(*axes))


def distinct(values: Iterable[Values]) -> list[Values]:
    """Each of `values` once."""
    return list({tuple(each.items()): each for each in values}.values())


def parse(given: object) -> Space:
    """The space in a sweep file: field -> [choices], or {low, high, log, integer, points, choices, when}.

    Raises `UserError`.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"space is {given!r}; it must be {{field: choices or a range}}.")
    if not given:
        raise UserError("space is empty; it needs at least one field with choices or a range.")
    parameters = {name: _parameter(name, value) for name, value in given.items()}
    for parameter in parameters.values():
        for other, allowed in parameter.when.items():
            _check_condition(parameter.name, other, allowed, parameters)
    return Space(tuple(_in_order(parameters)))


def _parameter(name: str, given: object) -> Parameter:
    if name not in agents.ranges() and name not in agents.static_types():
        raise unknown_name("field of the space", name, [*agents.ranges(), *agents.static_types()])
    if name in NOT_SEARCHED:
        raise UserError(f"space.{name} cannot be searched; fix it under config.")
    options = given if isinstance(given, Mapping) else {"choices": given}
    of_range = ("low", "high", "log", "integer", "points")
    for option in options:
        if option not in ("choices", *of_range, "when"):
            raise unknown_name(f"option of space.{name}", option, ("choices", *of_range, "when"))
    superfluous = [option for option in of_range if option in options]
    if "choices" in options and superfluous:
        raise UserError(f"space.{name} has both choices and {superfluous[0]}, which is for ranges; keep one.")
    if "choices" not in options and not ("low" in options and "high" in options):
        raise UserError(f"space.{name} needs either choices, or low and high.")
    domain = _choices(name, options["choices"]) if "choices" in options else _range(name, options)
    return Parameter(name, domain, _conditions(name, options.get("when", {})))


def _conditions(name: str, given: object) -> dict[str, tuple[object, ...]]:
    """field -> the values with which the parameter is searched."""
    if not isinstance(given, Mapping):
        raise UserError(f"space.{name}.when is {given!r}; it must be {{other_field: value or list of values}}.")
    conditions = {
        key: tuple(map(_hashable, value if isinstance(value, list) else [value])) for key, value in given.items()
    }
    for other, allowed in conditions.items():
        if not allowed:
            raise UserError(f"space.{name}.when.{other} is empty; it must be a value or a list of values.")
    return conditions


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _choices(name: str, given: object) -> Choices:
    if not isinstance(given, list) or not given:
        raise UserError(f"space.{name} is {given!r}; it must be a list of at least one value, or have low and high.")
    values = tuple(map(_hashable, given))
    for value in values:
        _check_value(name, value)
    if len(set(values)) < len(values):
        raise UserError(f"space.{name} has a value twice: {given}.")
    return Choices(values)


def _range(name: str, options: Mapping[str, Any]) -> Range:
    ends = [options.get(end) for end in ("low", "high")]
    for end, value in zip(("low", "high"), ends, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise UserError(f"space.{name}.{end} is {value!r}; it must be a number of at most {LARGEST:g}.")
    for option in ("log", "integer"):
        if not isinstance(options.get(option, False), bool):
            raise UserError(f"space.{name}.{option} is {options[option]!r}; it must be true or false.")
    low, high = (float(value) for value in ends)  # type: ignore[arg-type]
    if low >= high:
        raise UserError(f"space.{name} goes from {low:g} to {high:g}; low must be below high.")
    log, integer = options.get("log", False), options.get("integer", False) or _type(name) is int
    if log and low <= 0:
        raise UserError(f"space.{name} is logarithmic and starts at {low:g}; its low must be above 0.")
    if integer and not (low.is_integer() and high.is_integer()):
        raise UserError(f"space.{name} goes from {low:g} to {high:g}; both must be whole numbers.")
    if _type(name) not in (int, float):
        raise UserError(f"space.{name} has a range, but it is no number; give its choices as a list.")
    points = options.get("points")
    if points is not None and (isinstance(points, bool) or not isinstance(points, int) or not 1 <= points <= MAX_GRID):
        raise UserError(f"space.{name}.points is {points!r}; it must be a whole number from 1 to {MAX_GRID:,}.")
    for value in (low, high):
        _check_value(name, int(value) if integer else value)
    return Range(low, high, log, integer, points)


def _type(name: str) -> Any:
    """float for a traced field, int where it counts, else the type of the static one; int also for `int | None`."""
    if name in agents.ranges():
        return int if name in COUNTS else float
    kind = agents.static_types()[name]
    return int if int in get_args(kind) else kind


def _check_value(name: str, value: object) -> None:
    kind = _type(name)
    if name in agents.ranges():
        if isinstance(value, tuple):
            raise UserError(f"space.{name} has the value {list(value)}; each must be one number.")
        check_in(f"hparams.{name}", value, agents.ranges()[name])
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown_name(name, value, get_args(kind))
    elif name == "hidden_sizes":
        if not isinstance(value, tuple) or any(type(width) is not int for width in value):
            raise UserError(
                f"space.hidden_sizes has the value {value!r}; each must be a list of widths, like [64, 64]."
            )
    elif not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"space.{name} has the value {value!r}; it must be of type {kind.__name__}.")


def _check_condition(name: str, other: str, allowed: tuple[object, ...], parameters: Mapping[str, Parameter]) -> None:
    if other not in parameters:
        raise unknown_name(f"field in space.{name}.when", other, parameters, "A condition names a field of the space.")
    domain = parameters[other].domain
    if not isinstance(domain, Choices):
        raise UserError(f"space.{name}.when names {other}, which has a range; it must have choices.")
    for value in allowed:
        if value not in domain.values:
            raise UserError(f"space.{name}.when never holds: {other} is never {value!r}, but one of {domain.values}.")


def _in_order(parameters: Mapping[str, Parameter]) -> list[Parameter]:
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parameters):
        ready = [p for p in parameters.values() if p.name not in ordered and all(name in ordered for name in p.when)]
        if not ready:
            circle = ", ".join(name for name in parameters if name not in ordered)
            raise UserError(f"the conditions of {circle} depend on each other in a circle.")
        ordered[ready[0].name] = ready[0]
    return list(ordered.values())
