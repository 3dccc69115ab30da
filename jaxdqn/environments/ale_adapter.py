"""Atari 2600 games of the Arcade Learning Environment (Bellemare et al., 2013), on the host, by its own vector
environments in C++.

Observations are stacks of the last four screens, 84 x 84 and grey, each the larger of the last two frames of four. A
protocol says how an episode begins and ends, and what the actions are; single flags change it. Rewards are the game's
own: `--hparams.reward-clip 1` is what the learner may do with them.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.spaces import Discrete

from jaxdqn.base import Environment, Frames, HostEnvironments, HostStep, Spec
from jaxdqn.environments import arguments
from jaxdqn.environments.host import on_host
from jaxdqn.errors import UserError, unknown_name

SIDE = 84
PROTOCOLS: dict[str, dict[str, Any]] = {
    # Machado et al. (2018), section 5; with four frames a step, as everybody has, where they have five.
    "machado": {"sticky": 0.25, "all_actions": True, "noops": 0, "life_loss": False},
    # Mnih et al. (2015), methods.
    "classic": {"sticky": 0.0, "all_actions": False, "noops": 30, "life_loss": True},
    # Nothing is random: for tests, and games that are learned soon.
    "bare": {"sticky": 0.0, "all_actions": False, "noops": 0, "life_loss": False},
}
COMMON = {"frame_skip": 4, "max_frames": 108_000, "fire_reset": False, "frames": 4, "threads": 1}
POSITIVE = ("frame_skip", "max_frames", "threads")


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The game `name`, ALE/Pong-v5 say, with observations uint8 [84, 84, 4], the newest frame last.

    env_kwargs: `protocol` machado (default), classic or bare, and over it sticky (the probability that the last action
    is repeated), all_actions (18, or those that the game has), noops (at most, at a start), life_loss (a lost life is a
    termination for the learner, and ends no episode), frame_skip, max_frames (of the game, in an episode), fire_reset,
    frames (in a stack), threads (of one actor). Raises `UserError` for parameters, and wrong arguments.
    """
    if env_params:
        raise UserError(f"environment {name!r} takes no env_params; it got {', '.join(sorted(env_params))}.")
    given = dict(env_kwargs)
    protocol = given.pop("protocol", "machado")
    if protocol not in PROTOCOLS:
        raise unknown_name(f"env_kwargs.protocol of {name}", str(protocol), PROTOCOLS)
    usual = {**PROTOCOLS[str(protocol)], **COMMON}
    chosen = {**usual, **arguments.among("env_kwargs", name, given, usual, positive=POSITIVE)}
    for field, right, words in (
        ("sticky", 0.0 <= chosen["sticky"] <= 1.0, "a probability in [0, 1]"),
        ("noops", chosen["noops"] >= 0, "at least 0"),
        ("frames", chosen["frames"] >= 2, "at least 2"),
    ):
        if not right:
            raise UserError(f"env_kwargs.{field} of {name} is {chosen[field]}; it must be {words}.")
    rom = _rom(name)
    actions = int(cast(Discrete, _vector(rom, 1, chosen).single_action_space).n)
    screen = Frames((SIDE, SIDE, chosen["frames"]), np.uint8, "zeros")
    spec = Spec(name, screen, actions, math.ceil(chosen["max_frames"] / chosen["frame_skip"]))

    def vector(num_envs: int) -> HostEnvironments:
        env, lives = _vector(rom, num_envs, chosen), np.zeros(num_envs, np.int32)

        def stored(screens: np.ndarray) -> np.ndarray:
            return np.array(screens).reshape(num_envs, SIDE, SIDE, 1)  # a copy: memory of ALE's own may be used again

        def reset(seed: int) -> np.ndarray:
            screens: np.ndarray
            screens, info = env.reset(seed=seed)
            lives[:] = info["lives"]
            return stored(screens)

        def step(actions: np.ndarray) -> HostStep:
            screens, reward, terminated, truncated, info = env.step(actions)
            end = terminated | truncated
            # Of an episode that ended there are the lives of the next one.
            lost = chosen["life_loss"] & ~end & (info["lives"] < lives)
            lives[:] = info["lives"]
            seen, rest = stored(screens), (reward.astype(np.float32), 1.0 - (terminated | lost).astype(np.float32))
            final = stored(np.where(end[:, None, None, None], info["final_obs"], screens)) if end.any() else seen
            return HostStep(seen, *rest, final, np.array(end))

        return HostEnvironments(reset, step, env.close)

    return on_host(spec, vector)


def painter(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What draws an observation: its newest screen, in greys."""
    del name
    return lambda observation: np.repeat(np.asarray(observation)[..., -1:], 3, axis=-1)


def _rom(name: str) -> str:
    """The ROM of a game. Raises `UserError` where ale-py has none of that name."""
    game = name.removeprefix("ALE/").removesuffix("-v5").lower()
    found = [rom for rom in roms.get_all_rom_ids() if rom.replace("_", "") == game]
    if not found or roms.get_rom_path(found[0]) is None:
        raise UserError(f"environment {name!r} needs the ROM {game!r}, which this ale-py does not have.")
    return str(found[0])


def _vector(rom: str, num_envs: int, chosen: dict[str, Any]) -> AtariVectorEnv:
    return AtariVectorEnv(
        rom,
        num_envs,
        num_threads=chosen["threads"],
        max_num_frames_per_episode=chosen["max_frames"],
        repeat_action_probability=chosen["sticky"],
        full_action_space=chosen["all_actions"],
        # The true last screen comes with the reset; else a step of its own would follow that nobody chose.
        autoreset_mode="SameStep",
        img_height=SIDE,
        img_width=SIDE,
        stack_num=1,  # stacks are put together where they are used
        frameskip=chosen["frame_skip"],
        noop_max=chosen["noops"],
        use_fire_reset=chosen["fire_reset"],
        reward_clipping=False,
    )
