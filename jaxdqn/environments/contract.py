"""The contract between an environment and the rest, checked on shapes alone before anything is compiled."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdqn.base import Codes, Environment, Frames, Key, PyTree, Spec, TimeStep
from jaxdqn.errors import UserError, shortened, shown
from jaxdqn.masks import Masked, seen


def check(environment: Environment, key: Key) -> None:
    """Raises `UserError` where reset or step fail, or return other shapes or dtypes than the spec and the record
    promise; and for a spec that no agent can act on."""
    spec = environment.spec
    _check_spec(spec)
    returned = _traced(spec.name, "reset fails", environment.reset, key)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(f"environment {spec.name!r}: reset must return (state, observation).")
    state, observation = returned
    _expect_observation(spec, "reset's observation", observation)
    if environment.on_host is not None:  # seen only when it is stepped
        return
    action = jax.ShapeDtypeStruct((), jnp.int32)
    returned = _traced(spec.name, "step fails on the state reset returned", environment.step, key, state, action)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(f"environment {spec.name!r}: step must return (state, TimeStep).")
    next_state, step = returned
    if not isinstance(step, TimeStep):
        raise UserError(f"environment {spec.name!r}: step must return (state, TimeStep), not {type(step).__name__}.")
    _expect_observation(spec, "step's observation", step.observation)
    _expect_observation(spec, "step's final_observation", step.final_observation)
    _expect(spec.name, "step's reward", step.reward, (), jnp.float32)
    _expect(spec.name, "step's discount", step.discount, (), jnp.float32)
    _expect(spec.name, "step's episode_end", step.episode_end, (), jnp.bool_)
    achieved = {} if isinstance(step.achieved, tuple) and not step.achieved else step.achieved
    if not isinstance(achieved, Mapping) or sorted(achieved) != sorted(spec.achievements):
        found = ", ".join(map(str, achieved)) if isinstance(achieved, Mapping) else f"a {type(achieved).__name__}"
        raise UserError(
            f"environment {spec.name!r}: step's achieved is a dict of the spec's achievements "
            f"({', '.join(spec.achievements) or 'none'}), not {found or 'without any'}."
        )
    for achievement, done in achieved.items():
        _expect(spec.name, f"step's achieved {achievement!r}", done, (), jnp.bool_)
    _expect_same_state(spec.name, state, next_state)


def _check_spec(spec: Spec) -> None:
    if not isinstance(spec.num_actions, int) or spec.num_actions < 1:
        raise UserError(f"environment {spec.name!r} has {shown(spec.num_actions)} actions; it needs at least 1.")
    if not jax.tree.leaves(spec.observation):
        raise UserError(f"environment {spec.name!r} has observations without an array; they need at least one.")
    for leaf in jax.tree.leaves(spec.observation):
        dtype = one_array(spec.name, leaf).dtype
        if 0 in leaf.shape:
            raise UserError(f"environment {spec.name!r} has observations of shape {leaf.shape}, without a number.")
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
            raise UserError(f"environment {spec.name!r} has observations of {dtype}; they must be numbers or bool.")
        if isinstance(leaf, Frames) and (leaf.padding not in ("first", "zeros") or not math.prod(leaf.shape[-1:]) > 1):
            raise UserError(
                f"environment {spec.name!r} has {leaf}; frames lie on the last axis, two or more, and padding is "
                "'first' or 'zeros'."
            )
        if isinstance(leaf, Codes) and not (
            jnp.issubdtype(dtype, jnp.integer) and leaf.shape[-1:] == (len(leaf.sizes),)
        ):
            raise UserError(f"environment {spec.name!r} has {leaf}; codes are integers, one on the last axis per size.")
    if isinstance(spec.observation, Masked):
        _expect(spec.name, "the mask of legal actions", spec.observation.legal, (spec.num_actions,), jnp.bool_)


def one_array(name: str, observation: PyTree) -> jax.ShapeDtypeStruct:
    """The observation, or its shape and dtype. Raises `UserError` for a dict, a tuple, ..."""
    if not (hasattr(observation, "shape") and hasattr(observation, "dtype")):
        raise UserError(
            f"environment {name!r} has observations of {type(observation).__name__}; they must be one array. Wrap it "
            "to join them."
        )
    return observation


def _traced(name: str, what: str, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:  # of any kind: it is other people's code
        raise UserError(f"environment {name!r}: {what}: {line(error)}") from error


def _expect_observation(spec: Spec, what: str, value: PyTree) -> None:
    wanted = spec.observation
    if str(jax.tree.structure(value)) != str(jax.tree.structure(wanted)):
        for array in (value, wanted):  # of one array and another thing, that other is the one to name
            one_array(spec.name, seen(array))
        raise UserError(f"environment {spec.name!r}: {what} has another structure than the spec's.")
    for (path, leaf), given in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(value), strict=True):
        where = jax.tree_util.keystr(path)
        _expect(spec.name, f"{what}{where}", given, leaf.shape, jnp.dtype(leaf.dtype))


def _expect(name: str, what: str, value: PyTree, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    value = one_array(name, value)
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


def line(error: Exception) -> str:
    """An exception of other people's code, in one line."""
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
