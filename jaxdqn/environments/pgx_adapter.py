"""pgx's ports of MinAtar (Koyamada et al., 2023) as our `Environment` record."""

import inspect

import jax
import jax.numpy as jnp
import pgx

from jaxdqn.base import Array, Environment, Key, PyTree, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.auto_reset import Step, auto_reset
from jaxdqn.errors import UserError


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The game `name`, pgx/minatar-breakout say, with observations bool [10, 10, C] and no time limit.

    Raises `UserError` for parameters, of which there are none, and wrong arguments.
    """
    if env_params:
        raise UserError(f"environment {name!r} takes no env_params; it got {', '.join(sorted(env_params))}.")
    game = type(pgx.make(name.partition("/")[2]))
    defaults = {field: x.default for field, x in inspect.signature(game).parameters.items()}
    given = arguments.among("env_kwargs", name, env_kwargs, defaults)
    if not 0.0 <= given.get("sticky_action_prob", 0.0) <= 1.0:
        raise UserError(f"env_kwargs.sticky_action_prob of {name} is {given['sticky_action_prob']}; it is from 0 to 1.")
    env = game(**given)

    def reset(key: Key) -> tuple[PyTree, Array]:
        state = env.init(key)
        return state, state.observation

    def step(key: Key, state: PyTree, action: Array) -> Step:
        after = env.step(state, action, key)
        return Step(after, after.observation, after.rewards[0], after.terminated, after.truncated)

    seen = jax.ShapeDtypeStruct(tuple(env.observation_shape), jnp.bool_)
    return auto_reset(reset, step, Spec(name, seen, int(env.num_actions)))
