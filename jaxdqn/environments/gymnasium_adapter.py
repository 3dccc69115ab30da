"""Any environment of Gymnasium (Towers et al., 2024) with discrete actions, on the host, through its vector API."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from jax.typing import DTypeLike

from jaxdqn.base import Codes, Environment, HostEnvironments, HostStep, Spec
from jaxdqn.environments import encoding
from jaxdqn.environments.contract import line
from jaxdqn.environments.host import on_host
from jaxdqn.errors import UserError, shown, unknown_name

HOW = ("sync", "async")
for _driver in ("SDL_AUDIODRIVER", "SDL_VIDEODRIVER"):  # pygame draws some, and complains where it can show nothing
    os.environ.setdefault(_driver, "dummy")


def make(name: str, env_params: dict[str, object], env_kwargs: dict[str, object]) -> Environment:
    """The environment `name`, gymnasium/CartPole-v1 say; env_kwargs go to `gymnasium.make`, but for `vectorization`:
    "sync" steps the environments one after the other, "async" each in a process.

    Boxes are stored as they are, but numbers of 64 bits with 32, uint8 that are no bytes from 0 to 255 as bool or
    float32, and images without channels get one; discrete observations are `Codes`. Raises `UserError` for an unknown
    id, parameters, wrong arguments, and other spaces than these.
    """
    if env_params:
        raise UserError(f"environment {name!r} takes no env_params; it got {', '.join(sorted(env_params))}.")
    identity = name.partition("/")[2]
    given: dict[str, Any] = dict(env_kwargs)
    how = given.pop("vectorization", "sync")
    if how not in HOW:
        raise unknown_name(f"env_kwargs.vectorization of {name}", str(how), HOW)
    if ":" not in identity and identity not in gymnasium.registry:
        raise unknown_name("environment", name, [f"gymnasium/{known}" for known in gymnasium.registry])
    try:
        one = gymnasium.make(identity, **given)
    except Exception as error:  # of any kind: it is other people's code
        asked = f" with env_kwargs {shown(given)}" if given else ""
        raise UserError(f"environment {name!r} cannot be made{asked}: {line(error)}") from error
    actions, observed, usual = one.action_space, one.observation_space, one.spec
    draws = "rgb_array" in one.metadata.get("render_modes", ())
    one.close()
    if not isinstance(actions, spaces.Discrete):
        raise UserError(
            f"environment {name!r} has actions in {shown(actions)}; jaxdqn needs discrete ones, as in CartPole-v1."
        )
    leaf, first = _stored(name, observed), int(actions.start)
    if draws:
        given.setdefault("render_mode", "rgb_array")

    def vector(num_envs: int) -> HostEnvironments:
        options: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
        if how == "async":  # JAX has threads, and a fork would copy them in whatever state they are
            options["context"] = "forkserver"
        wrappers: Any = [_deaf] if how == "async" else None
        env = gymnasium.make_vec(
            identity, num_envs, vectorization_mode=how, vector_kwargs=options, wrappers=wrappers, **given
        )

        def stored(observation: Any) -> np.ndarray:
            array = np.asarray(observation) - getattr(observed, "start", 0)
            return np.asarray(array, leaf.dtype).reshape(num_envs, *leaf.shape)

        def step(actions: np.ndarray) -> HostStep:
            observation, reward, terminated, truncated, info = env.step(actions + first)
            end = terminated | truncated
            final = np.array(observation)
            for index in np.flatnonzero(end):
                final[index] = info["final_obs"][index]
            return HostStep(
                stored(observation),
                np.asarray(reward, np.float32),
                1.0 - np.asarray(terminated, np.float32),
                stored(final),
                np.asarray(end, np.bool_),
            )

        def kill() -> None:
            for process in getattr(env, "processes", ()):
                process.terminate()
                env.closed = True  # else it would close what is gone when it is collected

        return HostEnvironments(
            lambda seed: stored(env.reset(seed=seed)[0]),
            step,
            env.close,
            kill,
            (lambda: np.asarray((env.render() or ())[0], np.uint8)) if draws else None,
        )

    return on_host(Spec(name, leaf, int(actions.n), usual.max_episode_steps if usual else None), vector)


def painter(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What draws a picture: that is one already, by the environment itself."""

    def draw(picture: np.ndarray) -> np.ndarray:
        if picture.dtype != np.uint8 or picture.shape[2:] not in ((1,), (3,)):
            raise UserError(f"cannot draw {name!r}: it has no mode 'rgb_array', or lacks a package (pygame, say).")
        return np.broadcast_to(picture, (*picture.shape[:2], 3))

    return draw


def _deaf(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """In a process of its own an environment does not hear Ctrl-C: the run that it belongs to does, and closes it."""
    if threading.current_thread() is threading.main_thread():  # not where one is made to look at its spaces
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return env


def _stored(name: str, observed: spaces.Space[Any]) -> Any:
    """The leaf of `Spec.observation` for a space. Raises `UserError` for one that is neither a box nor discrete, or has
    too many values."""
    if isinstance(observed, spaces.Discrete):
        return _codes(name, observed, (1,), [observed.n])
    if isinstance(observed, spaces.MultiDiscrete) and len(observed.shape) == 1:
        return _codes(name, observed, observed.shape, observed.nvec)
    if isinstance(observed, spaces.MultiBinary):
        return jax.ShapeDtypeStruct(observed.shape, np.bool_)
    if not isinstance(observed, spaces.Box):
        raise UserError(
            f"environment {name!r} has observations in {shown(observed)}; they must be one box, or discrete. Wrap it "
            "to join them, by gymnasium.wrappers.FlattenObservation, say."
        )
    is_plane = observed.dtype == np.uint8 and len(observed.shape) == 2
    dtype: DTypeLike = jax.dtypes.canonicalize_dtype(observed.dtype)
    if observed.dtype == np.uint8:
        dtype = encoding.of_grid(encoding.bounds(name, jax.ShapeDtypeStruct(observed.shape, np.uint8), observed))
    if observed.dtype in (np.int64, np.uint64):
        fits = np.iinfo(np.int32)
        dtype = np.int32 if np.all(observed.low >= fits.min) and np.all(observed.high <= fits.max) else np.float32
    return jax.ShapeDtypeStruct((*observed.shape, *(1,) * is_plane), dtype)


def _codes(name: str, observed: spaces.Space[Any], shape: tuple[int, ...], sizes: Iterable[Any]) -> Codes:
    codes = Codes(shape, np.int32, tuple(map(int, sizes)))
    if sum(codes.sizes) > encoding.MOST_BITS:
        raise UserError(
            f"environment {name!r} has observations in {shown(observed)}, of {sum(codes.sizes):,} values; one-hot "
            f"codes have at most {encoding.MOST_BITS:,}. Wrap it to return a box of float32."
        )
    return codes
