"""XLand-MiniGrid's ports of MiniGrid (Nikulin et al., 2023) as our `Environment` record.

An observation is what the agent sees in front of it: for each cell the codes of its tile and its colour.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import xminigrid
from xminigrid.core.constants import NUM_COLORS, NUM_TILES, Tiles
from xminigrid.rendering.rgb_render import render_tile

from jaxdqn.base import Array, Codes, Environment, Key, PyTree, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.auto_reset import Step, auto_reset
from jaxdqn.errors import UserError

PARAMETERS = ("height", "width", "view_size", "max_steps")
SMALLEST = 5  # side of the smallest grid that the suite has


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The environment `name`, xminigrid/MiniGrid-Empty-8x8 say; observations uint8 [view_size, view_size, 2].

    Where env_params change the size of the grid alone, the time limit follows as it does by default. Raises `UserError`
    for arguments, of which there are none, and wrong parameters.
    """
    if env_kwargs:
        raise UserError(f"environment {name!r} takes no env_kwargs; it got {', '.join(sorted(env_kwargs))}.")
    suite, usual = xminigrid.make(name.partition("/")[2])
    defaults = {field: getattr(usual, field) for field in PARAMETERS}
    given = arguments.among("env_params", name, env_params, defaults, positive=PARAMETERS)
    for field, right, words in (
        ("height", lambda x: x >= SMALLEST, f"at least {SMALLEST}"),
        ("width", lambda x: x >= SMALLEST, f"at least {SMALLEST}"),
        ("view_size", lambda x: x >= 3 and x % 2, "an odd number from 3 on"),
    ):
        if field in given and not right(given[field]):
            raise UserError(f"env_params.{field} of {name} is {given[field]}; it must be {words}.")
    params = suite.default_params(**{**vars(usual), "max_steps": None, **given})
    # Other worlds than these the suite makes, but with walls where the way or the start is.
    if "Memory" in name and params.height != usual.height:
        raise UserError(f"env_params.height of {name} is {params.height}; it can only be {usual.height}.")
    if "FourRooms" in name and params.height != params.width:
        raise UserError(
            f"env_params of {name} make a grid of {params.height} x {params.width}; height and width must be equal."
        )

    def reset(key: Key) -> tuple[PyTree, PyTree]:
        timestep = suite.reset(params, key)
        return timestep, timestep.observation

    def step(key: Key, timestep: PyTree, action: Array) -> Step:
        del key  # only resets draw
        after = suite.step(params, timestep, action)
        terminated = after.discount == 0.0
        solved = {"solved": after.reward > 0.0}  # which ends the episode
        return Step(after, after.observation, after.reward, terminated, after.last() & ~terminated, solved)

    seen = Codes((params.view_size, params.view_size, 2), jnp.uint8, (NUM_TILES, NUM_COLORS))
    return auto_reset(reset, step, Spec(name, seen, suite.num_actions(params), params.max_steps, ("solved",)))


def painter(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What the agent sees, in the suite's own tiles, and black outside of the grid: it looks up from the middle of the
    last row."""
    del name

    def draw(codes: np.ndarray) -> np.ndarray:
        rows = [[render_tile(tuple(tile)) * (tile[0] != Tiles.EMPTY) for tile in row] for row in codes.tolist()]
        middle = len(codes) // 2
        rows[-1][middle] = render_tile(tuple(codes[-1, middle].tolist()), agent_direction=0)
        return np.concatenate([np.concatenate(row, axis=1) for row in rows]).astype(np.uint8)

    return draw
