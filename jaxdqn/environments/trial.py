"""A short trial of a user's gymnax environment: what its shapes do not show, and learning would never say.

A time limit that counts as a termination is learned as a death; an integer outside its bounds is stored as zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Key, PyTree
from jaxdqn.environments.encoding import Bounds
from jaxdqn.errors import UserError, shown

TRIALS, STEPS = 16, 64
LIMIT, NO_LIMIT = 2, 2**30


def check_values(name: str, env: Any, params: PyTree, first_action: int) -> None:
    """Raises `UserError` where step does not return gymnax 1.x's six values."""

    def step(key: Key) -> PyTree:
        return env.step(key, env.reset(key, params)[1], first_action, params)

    returned = jax.eval_shape(step, jax.random.key(0))
    if len(returned) != 6:
        raise UserError(
            f"environment {name!r}: step returns {len(returned)} values. Those of gymnax 1.x are observation, state, "
            "reward, terminated, truncated and info: where a time limit is not apart, it is learned as a death."
        )
    if not isinstance(returned[5], dict) or "final_observation" not in returned[5]:
        raise UserError(
            f"environment {name!r}: step's info lacks 'final_observation', the observation before the automatic reset."
        )


def check_limit(name: str, env: Any, params: PyTree, actions: tuple[int, int]) -> None:
    """Raises `UserError` where the time limit alone sets `terminated`, as gymnax 0.x's is_terminal did.

    The same first steps are taken with a limit of LIMIT steps, and without; `actions` are the lowest and their number.
    """
    limit = getattr(params, "max_steps_in_episode", None)
    if limit is None:
        return

    def ends(params: PyTree, key: Key) -> tuple[Array, Array]:
        """The step of the first end, and whether that was a termination; after LIMIT + 1 steps without one."""
        state, first, died = env.reset(key, params)[1], jnp.int32(LIMIT + 1), jnp.bool_(False)
        for index in range(LIMIT + 1):
            action_key, step_key = jax.random.split(jax.random.fold_in(key, index))
            action = actions[0] + jax.random.randint(action_key, (), 0, actions[1])
            _, state, _, terminated, truncated, _ = env.step(step_key, state, action, params)
            new = (first > LIMIT) & (terminated | truncated)
            first, died = jnp.where(new, index, first), jnp.where(new, terminated, died)
        return first, died

    run, keys = jax.jit(jax.vmap(ends, (None, 0))), jax.random.split(jax.random.key(0), TRIALS)
    (at_limit, died), (without, _) = (
        run(params.replace(max_steps_in_episode=type(limit)(steps)), keys) for steps in (LIMIT, NO_LIMIT)
    )
    if np.any(died & (at_limit < without)):
        raise UserError(
            f"environment {name!r} sets terminated where only its time limit max_steps_in_episode is reached, as in "
            "gymnax 0.x: it would be learned as a death. Leave the limit out of the done that step_env returns; if the "
            "length is part of the task, give that parameter another name."
        )


def check_bounds(name: str, env: Any, params: PyTree, actions: tuple[int, int], bounds: Bounds) -> None:
    """Raises `UserError` where an integer observation leaves its bounds within some random steps."""

    def run(key: Key) -> PyTree:
        observation, state = env.reset(key, params)

        def step(state: PyTree, key: Key) -> tuple[PyTree, tuple[Array, Array]]:
            action = actions[0] + jax.random.randint(key, (), 0, actions[1])
            seen, after, _, _, _, info = env.step(key, state, action, params)
            after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), after, state)
            return after, (jnp.asarray(seen), jnp.asarray(info["final_observation"]))

        state = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), state)
        return jnp.asarray(observation), jax.lax.scan(step, state, jax.random.split(key, STEPS))[1]

    seen = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), TRIALS))
    numbers = np.concatenate([np.asarray(x, np.int64).reshape(-1, len(bounds.low)) for x in jax.tree.leaves(seen)])
    outside = (numbers < bounds.low) | (numbers > bounds.high)
    if outside.any():
        row, place = np.argwhere(outside)[0]
        raise UserError(
            f"environment {name!r} observed {shown(int(numbers[row, place]))} where its space has "
            f"{bounds.low[place]} to {bounds.high[place]}; give the space the bounds that hold."
        )
