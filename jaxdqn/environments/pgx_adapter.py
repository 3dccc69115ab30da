"""pgx's games of one player (Koyamada et al., 2023), 2048 and ports of MinAtar, as our `Environment` record."""

import inspect

import jax
import pgx

from jaxdqn.base import Array, Environment, Key, PyTree, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.auto_reset import Step, auto_reset
from jaxdqn.errors import UserError
from jaxdqn.masks import Masked


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The game `name`, pgx/minatar-breakout say, with observations bool [10, 10, C] and no time limit; 2048's are
    bool [4, 4, 31], the powers of two one-hot, with the mask of the moves that move a tile.

    Raises `UserError` for parameters, of which there are none, and wrong arguments.
    """
    arguments.among("env_params", name, env_params, {})
    game = type(pgx.make(name.partition("/")[2]))
    defaults = {field: x.default for field, x in inspect.signature(game).parameters.items()}
    given = arguments.among("env_kwargs", name, env_kwargs, defaults)
    if not 0.0 <= given.get("sticky_action_prob", 0.0) <= 1.0:
        raise UserError(f"env_kwargs.sticky_action_prob of {name} is {given['sticky_action_prob']}; it is from 0 to 1.")
    env = game(**given)

    def observed(state: PyTree) -> PyTree:
        return Masked(state.observation, state.legal_action_mask) if name == "pgx/2048" else state.observation

    def reset(key: Key) -> tuple[PyTree, PyTree]:
        state = env.init(key)
        return state, observed(state)

    def step(key: Key, state: PyTree, action: Array) -> Step:
        after = env.step(state, action, key)
        return Step(after, observed(after), after.rewards[0], after.terminated, after.truncated)

    seen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(reset, jax.random.key(0))[1])
    return auto_reset(reset, step, Spec(name, seen, int(env.num_actions)))
