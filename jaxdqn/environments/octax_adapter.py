"""octax, CHIP-8 games on an emulator in JAX (Radji et al., 2025), as our `Environment` record.

An observation is the screen after each of the frames that a step runs, four by default. All of them are new in every
step, so that they are no stack from which older frames could be taken; after a reset all but the last are black.
"""

import inspect
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from octax.env import OctaxEnv
from octax.environments import create_environment

from jaxdqn.base import Array, Environment, Key, PyTree, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.auto_reset import Step, auto_reset
from jaxdqn.errors import UserError

# Said of octax's own code whenever a program is traced. `constraints.txt` has versions that work together.
warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)

ARGUMENTS = ("max_num_steps_per_episodes", "instruction_frequency", "fps", "frame_skip")


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The game `name`, octax/brix say, with observations bool [32, 64, frame_skip], the newest frame last.

    Raises `UserError` for parameters, of which there are none, and wrong arguments.
    """
    if env_params:
        raise UserError(f"environment {name!r} takes no env_params; it got {', '.join(sorted(env_params))}.")
    defaults = {field: inspect.signature(OctaxEnv).parameters[field].default for field in ARGUMENTS}
    given = arguments.among("env_kwargs", name, env_kwargs, defaults, positive=ARGUMENTS)
    game, _ = create_environment(name.partition("/")[2], **given)
    if game.instructions_per_step < 1:
        raise UserError(f"environment {name!r} runs no instruction in a frame: fps is above instruction_frequency.")

    def reset(key: Key) -> tuple[PyTree, Array]:
        state, frames, _ = game.reset(key)
        return state, _channels_last(frames)

    def step(key: Key, state: PyTree, action: Array) -> Step:
        del key  # the game draws from that of its reset
        state, frames, reward, terminated, truncated, _ = game.step(state, action)
        return Step(state, _channels_last(frames), reward, terminated, truncated)

    shape = jax.eval_shape(reset, jax.random.key(0))[1].shape
    spec = Spec(
        name, jax.ShapeDtypeStruct(shape, jnp.bool_), int(game.num_actions), int(game.max_num_steps_per_episodes)
    )
    return auto_reset(reset, step, spec)


def painter(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The newest frame, white on black."""
    del name
    return lambda frames: np.where(frames[..., -1:], 255, 0).astype(np.uint8).repeat(3, axis=-1)


def _channels_last(frames: Array) -> Array:
    """[frames, columns, rows] as rows and columns of an image, [rows, columns, frames]."""
    return jnp.transpose(frames, (2, 1, 0))
