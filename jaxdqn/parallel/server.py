"""The server of a parameter server: a versioned learner that is pulled, and pushed gradients under a lock, or none.

Locks: "global" applies one push at a time. "leaf" computes the step outside of any lock and adds it to each parameter
under that parameter's own lock: no step is lost, but a pull may see some parameters before and some after a push.
"none" is Hogwild's read-modify-write (Recht et al., 2011) emulated: immutable arrays have no races, so the whole
learner is read, stepped and written back without a lock, and every push that another one overwrote is counted as lost.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdqn.base import Array, LearnerState, PyTree
from jaxdqn.errors import UserError
from jaxdqn.parallel.telemetry import Seen

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


class Server:
    """A versioned learner. `begin` gives it one, `pull` and `push` may come from any thread, `end` takes it back.

    `apply(learner, gradients, loss, scale [1, 1]) -> (learner, gradient norm)` is the agent's.
    """

    def __init__(self, apply: Callable[..., Any], axes: Axes) -> None:
        self._apply, self._axes, self._seen = apply, axes, Seen()
        self._lock = threading.Lock()

    def begin(self, learner: LearnerState) -> None:
        """Serves `learner`, as version 0."""
        self.learner, self.version = learner, 0
        self._survived = 0  # pushes that the learner holds: less than the version where some were lost
        self._leaf_locks = [threading.Lock() for _ in jax.tree.leaves(learner.params)]

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

    def _stepped(self, learner: LearnerState, gradients: PyTree, loss: Array, scale: Any, own: PyTree) -> Any:
        shared = learner.opt_state
        if self._axes.own_statistics:
            learner = learner._replace(opt_state=own)
        learner, norm = jax.block_until_ready(self._apply(learner, gradients, loss, scale))
        if self._axes.own_statistics:
            return learner._replace(opt_state=shared), norm, learner.opt_state
        return learner, norm, ()

    def _push_global(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        began = time.perf_counter()
        with self._lock:
            self._seen.wait("lock_wait", time.perf_counter() - began)
            if (scale := self._admitted(version)) is None:
                return None, own
            self.learner, norm, own = self._stepped(self.learner, gradients, loss, scale, own)
            self.version += 1
        return norm, own

    def _push_none(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        if (scale := self._admitted(version)) is None:
            return None, own
        with self._lock:
            learner, survived = self.learner, self._survived
        stepped, norm, own = self._stepped(learner, gradients, loss, scale, own)
        with self._lock:  # the write-back is atomic; between read and write anyone may have pushed
            self._seen.count("lost", self._survived - survived)
            self.learner, self._survived = stepped, survived + 1
            self.version += 1
        return norm, own

    def _push_leaf(self, gradients: PyTree, loss: Array, version: int, own: PyTree) -> tuple[Any, PyTree]:
        if (scale := self._admitted(version)) is None:
            return None, own
        before = self.learner
        stepped, norm, own = self._stepped(before, gradients, loss, scale, own)
        old, new = jax.tree.leaves(before.params), jax.tree.leaves(stepped.params)
        structure = jax.tree.structure(before.params)
        for index, lock in enumerate(self._leaf_locks):
            began = time.perf_counter()
            with lock:
                self._seen.wait("lock_wait", time.perf_counter() - began)
                self._add_to_leaf(index, new[index] - old[index], structure)
        with self._lock:
            rest = stepped._replace(params=self.learner.params, updates=self.learner.updates + 1)
            self.learner = rest
            self.version += 1
        return norm, own

    def _add_to_leaf(self, index: int, step: Array, structure: Any) -> None:
        # The tree that holds the leaves is swapped under the server's lock; the addition is outside of it.
        value = jax.block_until_ready(jax.tree.leaves(self.learner.params)[index] + step)
        with self._lock:
            leaves = jax.tree.leaves(self.learner.params)
            leaves[index] = value
            self.learner = self.learner._replace(params=jax.tree.unflatten(structure, leaves))
