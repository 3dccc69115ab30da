"""Craftax and Craftax-Classic (Matthews et al., 2024) as our `Environment` record.

An observation is a picture, or the map around the player in bits with the numbers beside it.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Environment, Key, PyTree, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.auto_reset import Step, auto_reset, where_ended

NEVER = 2**31 - 1
PLAYER, OTHERS = (76, 201, 240), (249, 65, 68)


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The environment `name`, craftax/Craftax-Classic-Symbolic-v1 say.

    Observations are uint8 [H, W, 3] of Pixels, and of Symbolic {"map": bool [H, W, C], "numbers": float32 [K]}, which
    are side by side what the suite gives. Death, and the victory over Craftax's last boss, terminate; `max_timesteps`
    truncates. Raises `UserError` for wrong parameters and arguments.
    """
    version, kind = _parts(name)
    module = importlib.import_module(f"{version}.envs.craftax_{kind.lower()}_env")
    # The suite's own auto-reset would lose an episode's last observation.
    suite = getattr(module, f"Craftax{'Classic' if 'Classic' in name else ''}{kind}EnvNoAutoReset")
    usual, sizes = dataclasses.asdict(module.EnvParams()), dataclasses.asdict(module.StaticEnvParams())
    usual.pop("fractal_noise_angles")
    sizes = {field: size for field, size in sizes.items() if field.startswith("max_")}
    changes = arguments.among("env_params", name, env_params, usual, ("max_timesteps", "day_length"))
    static = module.StaticEnvParams(**arguments.among("env_kwargs", name, env_kwargs, sizes, sizes))
    if kind == "Pixels":
        env = _with_textures(version, module.BLOCK_PIXEL_SIZE_AGENT, lambda: suite(static))
        seen: Callable[[Array], PyTree] = _bytes
    else:
        env, seen = suite(static), _bits_and_numbers(module.get_map_obs_shape())
    params = env.default_params.replace(**changes)
    endless = params.replace(max_timesteps=NEVER)
    achievements = importlib.import_module(f"{version}.constants").Achievement
    places = {one.name.lower(): one.value for one in achievements}

    def reset(key: Key) -> tuple[PyTree, PyTree]:
        observation, state = env.reset(key, params)
        return state, seen(observation)

    def step(key: Key, state: PyTree, action: Array) -> Step:
        observation, after, reward, _, _ = env.step(key, state, action, params)
        terminated, truncated = env.is_terminal(after, endless), after.timestep >= params.max_timesteps
        achieved = {name: after.achievements[place].astype(jnp.bool_) for name, place in places.items()}
        return Step(after, seen(observation), reward, terminated, truncated, achieved)

    if jax.default_backend() == "cpu":
        # jaxlib 0.10.2 repeats results there after the first 2^15 sums of products (jax issue 39103), so that the ninth
        # world of a batch would look like its first. One at a time takes no longer.
        reset = jax.custom_batching.sequential_vmap(reset)
    observation = jax.eval_shape(reset, jax.random.key(0))[1]
    spec = Spec(name, observation, env.num_actions, params.max_timesteps, tuple(places))
    return auto_reset(reset, step, spec, where_ended)


def painter(name: str) -> Callable[[PyTree], np.ndarray]:
    """A picture as it is. A map by the textures of its blocks, with squares for the player in the middle and all else
    that stands on them; loading these takes about ten seconds."""
    version, kind = _parts(name)
    if kind == "Pixels":
        return lambda observation: observation
    constants = importlib.import_module(f"{version}.constants")
    size, blocks = constants.BLOCK_PIXEL_SIZE_IMG, len(constants.BlockType)
    textures = np.asarray(constants.load_all_textures_given_size(size)["block_textures"], np.uint8)
    # After the blocks come creatures; in Craftax an item "none" before them, and last whether a cell is lit.
    others = slice(blocks, None) if "Classic" in name else slice(blocks + 1, -1)

    def draw(observation: PyTree) -> np.ndarray:
        cells, square = observation["map"], slice(size // 4, -size // 4)
        height, width = cells.shape[:2]
        tiles = textures[cells[..., :blocks].argmax(-1)]  # [H, W, size, size, 3]
        tiles[~cells[..., :blocks].any(-1)] = 0
        tiles[cells[..., others].any(-1), square, square] = OTHERS
        tiles[height // 2, width // 2, square, square] = PLAYER
        return tiles.swapaxes(1, 2).reshape(height * size, width * size, 3)

    return draw


def _parts(name: str) -> tuple[str, str]:
    """The package of the version, and "Symbolic" or "Pixels"."""
    version = "craftax.craftax_classic" if "Classic" in name else "craftax.craftax"
    return version, "Pixels" if "Pixels" in name else "Symbolic"


def _bits_and_numbers(shape: tuple[int, ...]) -> Callable[[Array], PyTree]:
    """What parts a vector into the map [*shape], whose numbers are 0 and 1, and the rest."""
    size = math.prod(shape)

    def seen(observation: Array) -> PyTree:
        return {
            "map": observation[:size].reshape(shape).astype(jnp.bool_),
            "numbers": observation[size:].astype(jnp.float32),
        }

    return seen


def _bytes(observation: Array) -> Array:
    """A picture of 0 to 1 in bytes: mixtures of colours, at night say, are rounded."""
    return jnp.round(255.0 * observation).astype(jnp.uint8)


def _with_textures(version: str, size: int, build: Callable[[], Any]) -> Any:
    """`build()` with textures of one size: the suite would make three, and write them where it is installed."""
    constants, renderer = (importlib.import_module(f"{version}.{part}") for part in ("constants", "renderer"))

    def load() -> dict[int, PyTree]:
        return {size: constants.load_all_textures_given_size(size)}

    with mock.patch.object(renderer, "load_all_textures", load):
        return build()
