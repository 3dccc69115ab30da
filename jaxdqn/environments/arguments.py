"""Parameters and arguments that people give to an environment, as the types that it has them in."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdqn.errors import UserError, shown, unknown_name

TINIEST, LARGEST = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
MOST_SIZE = 1_000  # of what a constructor makes arrays of


def among(
    part: str, name: str, changes: Mapping[str, object], known: Mapping[str, object], positive: Collection[str] = ()
) -> dict[str, Any]:
    """`changes` of the `known` fields of a `part` (env_params, env_kwargs) of environment `name`, as their types.

    Raises `UserError` for another field, a value of another type, and one below 1 of a field that must be `positive`.
    """
    if changes and not known:
        raise UserError(f"environment {name!r} takes no {part}; it got {', '.join(sorted(changes))}.")
    converted = {}
    for field, value in changes.items():
        if field not in known:
            raise unknown_name(f"{part} field of {name}", field, known)
        converted[field] = like(f"{part}.{field} of {name}", value, known[field])
        if field in positive and converted[field] < 1:
            raise UserError(f"{part}.{field} of {name} is {value!r}; it must be at least 1.")
    return converted


def sized(what: str, value: object, default: object) -> object:
    """`value` as the type of `default`, where that is a single value; a size within reason."""
    if not isinstance(default, (bool, int, float)):
        return value
    given = like(what, value, default)
    least = min(default, 1)
    if type(default) is int and not least <= given <= MOST_SIZE and "seed" not in what:
        raise UserError(f"{what} is {given}; it must be a whole number from {least} to {MOST_SIZE:,}.")
    return given


def like(what: str, value: object, default: object) -> Any:
    """`value` as the type of `default`: gymnax selects between values of both, and neither mixes nor converts."""
    for kind, accepted, words in (
        (bool, (bool,), "True or False"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"{what} is {shown(value)}; it must be {words}, as its default {default!r} is.")
            if kind is int and abs(value) > jnp.iinfo(jnp.int32).max:
                raise UserError(f"{what} is {shown(value)}; it must lie within 32 bits.")
            if kind is float and not (value == 0 or TINIEST <= abs(value) <= LARGEST):
                raise UserError(
                    f"{what} is {shown(value)}; it must be 0, or between {TINIEST:.2g} and "
                    f"{LARGEST:.2g} in size, as a float32 is."
                )
            return kind(value)
    raise UserError(f"{what} is not a single value; it cannot be changed here.")
