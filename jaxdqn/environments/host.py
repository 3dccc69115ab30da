"""Environments on the host: the record that stands for them, their stacks of frames, and a guard against the broken."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array, Environment, Frames, HostEnvironments, HostStep, Key, PyTree, Spec, TimeStep, zeros_of
from jaxdqn.errors import UserError, shortened

ATTEMPTS = 3  # at one rollout or evaluation, with new environments each time
SEEDS = 2**31  # the number of seeds that environments take
CLOSING_SECONDS = 2.0  # for which closing environments is waited for
_closing = threading.Lock()  # many draw by one library, and two that close it at once can hang


def on_host(spec: Spec, make: Callable[[int], HostEnvironments]) -> Environment:
    """The record of an environment that JAX cannot see; make(num_envs) -> HostEnvironments."""

    def reset(key: Key) -> tuple[PyTree, PyTree]:
        del key
        return (), zeros_of(spec)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        raise UserError(f"environment {spec.name!r} runs on the host, where no compiled program steps it.")

    return Environment(reset, step, spec, make)


def begun(spec: Spec, newest: PyTree) -> PyTree:
    """Observations [N, *O] at an episode's start, of the newest: stacks of it alone, as their padding says."""

    def stack(leaf: Any, frame: Array) -> Array:
        frame = jnp.asarray(frame, leaf.dtype)
        if not isinstance(leaf, Frames):
            return frame
        older = frame if leaf.padding == "first" else jnp.zeros_like(frame)
        return jnp.concatenate([older] * (leaf.shape[-1] - 1) + [frame], axis=-1)

    return jax.tree.map(stack, spec.observation, newest)


def followed(spec: Spec, before: PyTree, newest: PyTree) -> PyTree:
    """Observations [N, *O] one step after those `before` [N, *O] in the same episode, of the newest."""

    def stack(leaf: Any, old: Array, frame: Array) -> Array:
        frame = jnp.asarray(frame, leaf.dtype)
        return jnp.concatenate([old[..., 1:], frame], axis=-1) if isinstance(leaf, Frames) else frame

    return jax.tree.map(stack, spec.observation, before, newest)


def horizon(spec: Spec) -> int:
    """H: how many steps back the frames of a stack reach; at least 1, so that a count of steps up to H tells an
    episode's first."""
    stacks = (leaf.shape[-1] - 1 for leaf in jax.tree.leaves(spec.observation) if isinstance(leaf, Frames))
    return max(stacks, default=0) or 1


def stacked(spec: Spec, newest: PyTree, since: Array) -> PyTree:
    """Observations [T, N, *O] of consecutive steps, of the `newest` observations [H + T, N, ...] in these and in the H
    steps before; `since` [T, N] counts the steps from the episode's start to each, no more than H."""
    before, count = horizon(spec), len(since)

    def put_together(leaf: Any, frames: Array) -> Array:
        frames = jnp.asarray(frames, leaf.dtype)
        if not isinstance(leaf, Frames):
            return frames[before:]
        frames, since_t = frames[..., 0], since.reshape(*since.shape, *(1,) * (frames.ndim - 3))
        stack = [frames[before:]]
        for age in range(1, leaf.shape[-1]):
            padding = stack[0] if leaf.padding == "first" else jnp.zeros_like(stack[0])
            stack.insert(0, jnp.where(since_t >= age, frames[before - age : before - age + count], padding))
        return jnp.stack(stack, axis=-1)

    return jax.tree.map(put_together, spec.observation, newest)


def timestep(spec: Spec, observation: PyTree, step: HostStep) -> TimeStep:
    """A step [N] as one in JAX returns it, taken at `observation` [N, *O]."""
    produced = followed(spec, observation, step.final_observation)

    def after(first: Array, other: Array) -> Array:
        return jnp.where(jnp.reshape(step.episode_end, (-1, *(1,) * (other.ndim - 1))), first, other)

    following = jax.tree.map(after, begun(spec, step.observation), produced)
    return TimeStep(
        following, jnp.asarray(step.reward), jnp.asarray(step.discount), produced, jnp.asarray(step.episode_end)
    )


def seed_of(key: Key) -> Array:
    """A seed for environments, int32 []."""
    return (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)


class Broken(Exception):
    """Environments that raised, or did not answer in time; the text says which."""


class Guarded:
    """Environments that are made, stepped and closed in a thread of their own, so that others can go on without them.

    A thread that hangs cannot be ended: it is left behind. `timeout` is in seconds; inf waits.
    """

    def __init__(self, environment: Environment, num_envs: int, timeout: float) -> None:
        assert environment.on_host is not None
        self._timeout = None if timeout == float("inf") else timeout
        self._calls: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._made: list[HostEnvironments] = []
        self._asked = 0
        self._thread = threading.Thread(target=self._serve, args=(environment.on_host, num_envs), daemon=True)
        self._thread.start()

    def _serve(self, make: Callable[[int], HostEnvironments], num_envs: int) -> None:
        while (call := self._calls.get()) is not None:
            number, name, given = call
            try:
                if not self._made:
                    self._made.append(make(num_envs))
                self._answers.put((number, getattr(self._made[0], name)(*given), None))
            except BaseException as error:  # of any kind: it is other people's code
                self._answers.put((number, None, error))
        for made in self._made:
            alone = _closing.acquire(timeout=CLOSING_SECONDS)  # others may hang in theirs
            with contextlib.suppress(Exception):  # what is broken may not close, either
                made.close()
            if alone:
                _closing.release()

    def _call(self, name: str, *given: Any) -> Any:
        self._asked += 1
        self._calls.put((self._asked, name, given))
        until, number = None if self._timeout is None else time.monotonic() + self._timeout, 0
        while number != self._asked:  # there may be a late answer to what is not waited for any more
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                number, answer, error = self._answers.get(timeout=left)
            except queue.Empty:
                raise Broken(f"no answer to {name} within {self._timeout:g} s") from None
        if error is not None:
            raise Broken(f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}") from error
        return answer

    def reset(self, seed: int) -> PyTree:
        """`HostEnvironments.reset`. Raises `Broken`, as `step` does."""
        return self._call("reset", seed)

    def step(self, actions: np.ndarray) -> Any:
        """`HostEnvironments.step`."""
        return self._call("step", actions)

    def render(self) -> np.ndarray | None:
        """A picture, where there is one: what it is drawn with may not be installed."""
        if not self._made or self._made[0].render is None:
            return None
        try:
            return self._call("render")
        except Broken:
            return None

    def abandon(self) -> None:
        """Has done with them, broken or not: they are closed by their thread, if that ever returns."""
        for made in self._made:
            made.kill()
        self._calls.put(None)

    def close(self) -> None:
        """They are closed by their thread, for which this waits a moment: the interpreter may be about to end."""
        self._calls.put(None)
        self._thread.join(CLOSING_SECONDS)
