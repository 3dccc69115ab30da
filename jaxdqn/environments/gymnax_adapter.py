"""gymnax 1.x as our `Environment` record; the only place that imports gymnax."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Environment, Key, PyTree, Spec, TimeStep
from jaxdqn.environments import encoding, trial
from jaxdqn.environments.contract import line, one_array
from jaxdqn.environments.names import GYMNAX
from jaxdqn.errors import UserError, shown, unknown_name

# Observations that hold only 0 and 1 and arrive as float32: stored as bool (tests/test_environments.py checks each).
BINARY = {
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "Pong-misc",
}


TINIEST, LARGEST = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
MOST_SIZE = 1_000  # of what a constructor makes arrays of


def construct(name: str, factory: Callable[..., object] | None, env_kwargs: dict[str, object]) -> Any:
    """The registered factory's environment, or gymnax's of that name. Raises `UserError` for a wrong argument."""
    own = factory is None
    factory = factory or gymnax.registration._builtins[name]
    parameters = inspect.signature(factory).parameters
    known = [p.name for p in parameters.values() if p.kind != p.VAR_KEYWORD]
    given = {}
    for argument, value in env_kwargs.items():
        if argument not in known and len(known) == len(parameters):
            if not known:
                raise UserError(f"environment {name!r} takes no env_kwargs; it got {argument!r}.")
            raise unknown_name(f"env_kwargs field of {name}", argument, known)
        what = f"env_kwargs.{argument} of {name}"
        given[argument] = _argument(what, value, parameters[argument].default) if own else value
    try:
        return factory(**given)
    except UserError:
        raise
    except Exception as error:  # of any kind: it is other people's code
        raise UserError(f"environment {name!r} cannot be made with env_kwargs {shown(given)}: {line(error)}") from error


def _argument(what: str, value: object, default: object) -> object:
    """`value` as the type of `default`, where that is a single value; a size within reason."""
    if not isinstance(default, (bool, int, float)):
        return value
    given = _like(what, value, default)
    least = min(default, 1)
    if type(default) is int and not least <= given <= MOST_SIZE and "seed" not in what:
        raise UserError(f"{what} is {given}; it must be a whole number from {least} to {MOST_SIZE:,}.")
    return given


def adapt(name: str, env: Any, env_params: dict[str, object]) -> Environment:
    """A gymnax environment as our record.

    Raises `UserError` for an unknown parameter, a value of another type than the default's, continuous actions, what
    cannot be stored, and a user's environment that does not stand a short trial.
    """
    params = _replace_params(name, env.default_params, env_params)
    actions = env.action_space(params)
    if not hasattr(actions, "n"):
        raise UserError(f"environment {name!r} has no discrete action space ({shown(actions)}); jaxdqn needs one.")
    raw = one_array(name, jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0)))
    encode = _encoder(name, raw, env.observation_space(params))
    first_action = int(getattr(actions, "start", 0))
    if name not in GYMNAX:
        _try(name, env, params, raw, (first_action, int(actions.n)))

    def reset(key: Key) -> tuple[PyTree, Array]:
        observation, state = env.reset(key, params)
        return _strong(state), encode(observation)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        observation, next_state, reward, terminated, truncated, info = env.step(
            key, state, action + first_action, params
        )
        # A branch of gymnax's reset select may widen a dtype; the carry of a loop must keep it.
        next_state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), next_state, state)
        return next_state, TimeStep(
            observation=encode(observation),
            reward=jnp.asarray(reward, jnp.float32),
            discount=1.0 - jnp.asarray(terminated, jnp.float32),
            final_observation=encode(info["final_observation"]),
            episode_end=jnp.logical_or(terminated, truncated),
        )

    example = jax.eval_shape(reset, jax.random.key(0))[1]
    limit = getattr(params, "max_steps_in_episode", None)
    spec = Spec(name, jax.ShapeDtypeStruct(example.shape, example.dtype), int(actions.n), limit and int(limit))
    return Environment(reset, step, spec)


def _encoder(name: str, raw: jax.ShapeDtypeStruct, space: Any) -> Callable[[Array], Array]:
    if name in BINARY:
        return lambda observation: jnp.asarray(observation).astype(jnp.bool_)
    return encoding.encoder(name, raw, space)


def _try(name: str, env: Any, params: PyTree, raw: jax.ShapeDtypeStruct, actions: tuple[int, int]) -> None:
    trial.check_values(name, env, params, actions[0])
    trial.check_limit(name, env, params, actions)
    if encoding.categorical(raw):
        trial.check_bounds(name, env, params, actions, encoding.bounds(name, raw, env.observation_space(params)))


def _replace_params(name: str, params: PyTree, changes: dict[str, object]) -> PyTree:
    known = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    converted = {}
    for field, value in changes.items():
        if field not in known:
            raise unknown_name(f"env_params field of {name}", field, known)
        converted[field] = _like(f"env_params.{field} of {name}", value, known[field])
        if field == "max_steps_in_episode" and converted[field] < 1:
            raise UserError(f"env_params.{field} of {name} is {value!r}; it must be at least 1.")
    return params.replace(**converted)


def _like(what: str, value: object, default: object) -> Any:
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


def _strong(tree: PyTree) -> PyTree:
    """Without weak types: a weakly typed reset state makes the second call of a jitted function compile again."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), tree)
