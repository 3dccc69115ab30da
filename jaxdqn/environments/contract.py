"""The contract between an environment and the rest, checked on shapes alone before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Environment, Key, PyTree, TimeStep
from jaxdqn.errors import UserError


def check(environment: Environment, key: Key) -> None:
    """Raises `UserError` where reset or step return other shapes or dtypes than the spec and the record promise."""
    spec = environment.spec
    state, observation = jax.eval_shape(environment.reset, key)
    action = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        next_state, step = jax.eval_shape(environment.step, key, state, action)
    except TypeError as error:
        raise UserError(f"environment {spec.name!r}: step fails on the state reset returned: {_line(error)}") from error
    if not isinstance(step, TimeStep):
        raise UserError(f"environment {spec.name!r}: step must return (state, TimeStep), not {type(step).__name__}.")
    shape = (spec.observation.shape, jnp.dtype(spec.observation.dtype))
    _expect(spec.name, "reset's observation", observation, *shape)
    _expect(spec.name, "step's observation", step.observation, *shape)
    _expect(spec.name, "step's final_observation", step.final_observation, *shape)
    _expect(spec.name, "step's reward", step.reward, (), jnp.float32)
    _expect(spec.name, "step's discount", step.discount, (), jnp.float32)
    _expect(spec.name, "step's episode_end", step.episode_end, (), jnp.bool_)
    _expect_same_state(spec.name, state, next_state)


def _expect(name: str, what: str, value: Array, shape: tuple[int, ...], dtype: Any) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise UserError(
            f"environment {name!r}: {what} is {value.dtype}{list(value.shape)}, "
            f"expected {jnp.dtype(dtype)}{list(shape)}."
        )


def _expect_same_state(name: str, state: PyTree, next_state: PyTree) -> None:
    if str(jax.tree.structure(state)) != str(jax.tree.structure(next_state)):
        raise UserError(f"environment {name!r}: step returns a state of another structure than reset.")
    for (path, before), after in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(next_state), strict=True):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise UserError(
                f"environment {name!r}: state{jax.tree_util.keystr(path)} is {before.dtype}{list(before.shape)} after "
                f"reset and {after.dtype}{list(after.shape)} after step."
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
