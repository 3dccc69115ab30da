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
from jaxdqn.errors import UserError, unknown_name

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


def construct(name: str, factory: Callable[..., Any] | None, env_kwargs: dict[str, Any]) -> Any:
    """The registered factory's environment, or gymnax's of that name. Raises `UserError` for a wrong argument."""
    factory = factory or gymnax.registration._builtins[name]
    known = [p.name for p in inspect.signature(factory).parameters.values() if p.kind != p.VAR_KEYWORD]
    for argument in env_kwargs:
        if argument not in known and len(known) == len(inspect.signature(factory).parameters):
            if not known:
                raise UserError(f"environment {name!r} takes no env_kwargs; it got {argument!r}.")
            raise unknown_name(f"env_kwargs field of {name}", argument, known)
    try:
        return factory(**env_kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        if not env_kwargs:
            raise
        raise UserError(
            f"environment {name!r} does not accept env_kwargs {env_kwargs}: {error or 'refused'}."
        ) from error


def adapt(name: str, env: Any, env_params: dict[str, Any]) -> Environment:
    """A gymnax environment as our record.

    Raises `UserError` for an unknown parameter, a value of another type than the default's, or continuous actions.
    """
    params = _replace_params(name, env.default_params, env_params)
    actions = env.action_space(params)
    if not hasattr(actions, "n"):
        raise UserError(f"environment {name!r} has no discrete action space ({actions!r}); jaxdqn needs one.")
    raw = jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0))
    encode = _encoder(name, raw, env.observation_space(params))

    def reset(key: Key) -> tuple[PyTree, Array]:
        observation, state = env.reset(key, params)
        return _strong(state), encode(observation)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        observation, next_state, reward, terminated, truncated, info = env.step(key, state, action, params)
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


def _replace_params(name: str, params: Any, changes: dict[str, Any]) -> Any:
    known = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    converted = {}
    for field, value in changes.items():
        if field not in known:
            raise unknown_name(f"env_params field of {name}", field, known)
        converted[field] = _like(f"env_params.{field} of {name}", value, known[field])
        if field == "max_steps_in_episode" and value < 1:
            raise UserError(f"env_params.{field} of {name} is {value!r}; it must be at least 1.")
    return params.replace(**converted)


def _like(what: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`: gymnax selects between values of both, and neither mixes nor converts."""
    for kind, accepted, words in (
        (bool, (bool,), "True or False"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"{what} is {value!r}; it must be {words}, as its default {default!r} is.")
            if kind is int and abs(value) > jnp.iinfo(jnp.int32).max:
                raise UserError(f"{what} is {value!r}; it must lie within 32 bits.")
            return kind(value)
    raise UserError(f"{what} is not a single value; it cannot be changed here.")


def _strong(tree: PyTree) -> PyTree:
    """Without weak types: a weakly typed reset state makes the second call of a jitted function compile again."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), tree)


def _encoder(name: str, raw: jax.ShapeDtypeStruct, space: Any) -> Callable[[Any], Array]:
    """How to store an observation: 0/1 grids as bool, small integers one-hot as bool, the rest as it is."""
    if name in BINARY:
        return lambda observation: jnp.asarray(observation).astype(jnp.bool_)
    if jnp.issubdtype(raw.dtype, jnp.integer) and raw.ndim <= 1:
        # The observation's dtype decides: gymnax declares some integer observations as float boxes.
        size = space.n if hasattr(space, "n") else int(np.max(space.high)) + 1
        return lambda observation: jax.nn.one_hot(observation, size, dtype=jnp.bool_).reshape(-1)
    return lambda observation: jax.lax.convert_element_type(observation, raw.dtype)
