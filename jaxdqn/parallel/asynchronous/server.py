"""The server of a parameter server: a versioned learner that is pulled, and pushed gradients under a lock, or none.

Locks. "global" applies one push at a time. "leaf" first counts the push, under a lock for all that is counted
(`updates`, `first_bad_update`, the optimizer's counts): that gives it a number of its own. Then it steps one parameter
after the other, with its target and moments, from what they are now, under that parameter's own lock. No part of a push
is lost, and the target moves at every number that is due; but a pull may see some parameters before and some after a
push. "none" is Hogwild's read-modify-write (Recht et al., 2011) emulated: immutable arrays have no races, so the whole
learner is read, stepped and written back without a lock, and every push that another one overwrote is counted as lost.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdqn.base import Array, LearnerState, PyTree
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous.telemetry import LAGS, Seen

LOCKS = ("global", "leaf", "none")


class Axes(NamedTuple):
    """How workers and server are coupled.

    num_workers: W threads; lock: "global", "leaf" or "none"; max_lag: pushes computed with parameters more than this
    many versions old are dropped and counted, 0 for any; scale_by_lag: multiply a push's learning rate by 1 / (1 + lag)
    (Zhang et al., 2016); own_statistics: each worker keeps its own optimizer state.
    """

    num_workers: int = 4
    lock: str = "global"
    max_lag: int = 0
    scale_by_lag: bool = False
    own_statistics: bool = False


def validate(axes: Axes) -> None:
    """Raises `UserError` for axes that cannot work."""
    if not isinstance(axes.num_workers, int) or axes.num_workers < 1:
        raise UserError(f"num_workers is {axes.num_workers!r}; it must be a whole number of at least 1.")
    if axes.lock not in LOCKS:
        raise UserError(f"lock is {axes.lock!r}; it is one of {', '.join(LOCKS)}.")
    if axes.max_lag < 0:
        raise UserError(f"max_lag is {axes.max_lag}; it must be at least 0 (0: no limit).")


COUNTED = -1
"""The part of a learner that belongs to no parameter: `updates`, `first_bad_update`, and the optimizer's counts."""


def part_of(learner: LearnerState) -> PyTree:
    """For each array of a learner the number of the parameter it belongs to, in the order of `jax.tree.leaves`: its
    value, its target, or a moment of the optimizer; or COUNTED."""
    structure: Any = jax.tree.structure(learner.params)
    numbers = jax.tree.unflatten(structure, range(structure.num_leaves))

    def like_params(tree: PyTree) -> bool:
        return bool(jax.tree.structure(tree) == structure)

    return jax.tree.map(lambda x: numbers if like_params(x) else COUNTED, learner, is_leaf=like_params)


def take(learner: LearnerState, part: int) -> list[Array]:
    """The arrays of one part of a learner."""
    numbered = zip(jax.tree.leaves(part_of(learner)), jax.tree.leaves(learner), strict=True)
    return [array for number, array in numbered if number == part]


def put(learner: LearnerState, part: int, arrays: list[Array]) -> LearnerState:
    """`learner` with other arrays, as `take` gives them, for one part."""
    new = iter(arrays)
    both: LearnerState = jax.tree.map(lambda p, x: next(new) if p == part else x, part_of(learner), learner)
    return both


def replaced(old: LearnerState, new: LearnerState, part: int) -> LearnerState:
    """`old` with one part of `new`."""
    return put(old, part, take(new, part))


class Server:
    """A versioned learner. `begin` gives it one, `pull` and `push` may come from any thread, `end` takes it back.

    `apply(learner, gradients, loss, scale [1, 1]) -> (learner, gradient norm)` is the agent's; with a fifth argument,
    the number of a part, it steps that part alone.
    """

    def __init__(self, apply: Callable[..., Any], axes: Axes) -> None:
        self._apply, self._axes = apply, axes
        self._seen = Seen((*LAGS, "dropped", "lost"), ["lock_wait"])
        self._lock = threading.Lock()  # of `learner` and `version`: held to read or swap them, not to compute
        self._pushing = threading.Lock()

    def begin(self, learner: LearnerState) -> None:
        """Serves `learner`, as version 0."""
        self.learner, self.version = learner, 0
        self._survived = 0  # pushes that the learner holds: less than the version where some were lost
        self._part_locks = {part: threading.Lock() for part in (COUNTED, *range(len(jax.tree.leaves(learner.params))))}

    def end(self) -> LearnerState:
        """The learner now."""
        return self.learner

    def take(self) -> dict[str, float]:
        """Telemetry since the last call: see `Seen.take`."""
        return self._seen.take()

    def pull(self) -> tuple[LearnerState, int]:
        """The learner now, and its version."""
        with self._lock:
            return self.learner, self.version

    def push(self, gradients: PyTree, loss: Array, version: int, opt_state: PyTree = ()) -> tuple[Any, PyTree]:
        """Applies gradients that were computed at `version`; (None, opt_state) where they were too old."""
        return getattr(self, f"_push_{self._axes.lock}")(gradients, loss, version, opt_state)

    def _admitted(self, version: int) -> np.ndarray | None:
        """By what the learning rate is scaled, [1, 1]; None for a push that is too old."""
        lag = self.version - version
        self._seen.lag(lag)
        if self._axes.max_lag and lag > self._axes.max_lag:
            self._seen.count("dropped")
            return None
        return np.full((1, 1), 1.0 / (1.0 + lag) if self._axes.scale_by_lag else 1.0, np.float32)

    @contextlib.contextmanager
    def _waiting_for(self, lock: threading.Lock) -> Iterator[None]:
        began = time.perf_counter()
        with lock:
            self._seen.wait("lock_wait", time.perf_counter() - began)
            yield

    def _with(self, own: PyTree) -> LearnerState:
        """The learner now, with the statistics of the worker that pushes if workers have their own."""
        return self.learner._replace(opt_state=own) if self._axes.own_statistics else self.learner

    def _shared(self, stepped: LearnerState) -> LearnerState:
        """What of `stepped` all workers share, over what they share now."""
        return stepped._replace(opt_state=self.learner.opt_state) if self._axes.own_statistics else stepped

    def _own(self, stepped: LearnerState) -> PyTree:
        return stepped.opt_state if self._axes.own_statistics else ()

    def _push_global(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        with self._waiting_for(self._pushing):
            if (scale := self._admitted(version)) is None:
                return None, own
            stepped, norm = jax.block_until_ready(self._apply(self._with(own), gradients, loss, scale))
            with self._lock:
                self.learner, self.version = self._shared(stepped), self.version + 1
        return norm, self._own(stepped)

    def _push_none(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        with self._lock:
            if (scale := self._admitted(version)) is None:
                return None, own
            learner, survived = self._with(own), self._survived
        stepped, norm = jax.block_until_ready(self._apply(learner, gradients, loss, scale))
        with self._lock:  # the write-back is atomic; between read and write anyone may have pushed
            self._seen.count("lost", self._survived - survived)
            self.learner, self._survived = self._shared(stepped), survived + 1
            self.version += 1
        return norm, self._own(stepped)

    def _push_leaf(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        with self._waiting_for(self._part_locks[COUNTED]):
            if (scale := self._admitted(version)) is None:
                return None, own
            before = self._with(own)
            counted, norm = self._step_part(COUNTED, before, gradients, loss, scale)
        kept = replaced(before, counted, COUNTED)
        for part in range(len(self._part_locks) - 1):
            with self._waiting_for(self._part_locks[part]):
                # The counts from before this push are its own; the parameter is what others have made of it by now.
                now = replaced(before, self._with(own), part)
                stepped, _ = self._step_part(part, now, gradients, loss, scale)
            kept = replaced(kept, stepped, part)
        with self._lock:
            self.version += 1
        return norm, self._own(kept)

    def _step_part(self, part: int, learner: LearnerState, *push: Any) -> tuple[LearnerState, Array]:
        stepped, norm = jax.block_until_ready(self._apply(learner, *push, part))
        with self._lock:  # of all parts: they lie in one tree
            self.learner = replaced(self.learner, self._shared(stepped), part)
        return stepped, norm
