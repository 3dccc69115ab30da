"""What an asynchronous scheme counts beside losses and episodes: lags, waits, drops, rollouts.

Threads add to Python's counters. At the end of a chunk these move into `training.Metrics.seen`, so that they are of the
same window as every other sum there, over whatever chunks and sessions it had.
"""

import threading
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxdqn.base import Array

LAG_BINS = (0, 1, 2, 4, 8, 16, 32)  # lower edges, in versions
LAGS = ("lag_sum", "lag_max", *(f"lag_{low}" for low in LAG_BINS))


def rollouts_of(num_workers: int) -> list[str]:
    """The names under which the workers' rollouts are counted."""
    return [f"rollouts_{worker}" for worker in range(num_workers)]


class Seen:
    """Thread-safe sums: numbers called `counts`, and seconds called `waits`."""

    def __init__(self, counts: Iterable[str], waits: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        # Each lag may have been many versions: their sum is for a mean, and no count.
        sums = {name: 0.0 for name in ("lag_sum",) if name in counts} | {f"{name}_seconds": 0.0 for name in waits}
        self._zeros: dict[str, float] = {**dict.fromkeys(counts, 0), **sums}
        self._sums = dict(self._zeros)

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a number, such as dropped or lost."""
        with self._lock:
            self._sums[name] += by

    def wait(self, name: str, seconds: float) -> None:
        """Adds to a time that threads spent."""
        with self._lock:
            self._sums[f"{name}_seconds"] += seconds

    def lag(self, versions: int) -> None:
        """How many versions old the parameters behind some experience or gradient were."""
        with self._lock:
            self._sums["lag_sum"] += versions
            self._sums["lag_max"] = max(versions, self._sums["lag_max"])
            self._sums[f"lag_{max(low for low in LAG_BINS if low <= versions)}"] += 1

    def take(self) -> dict[str, float]:
        """All sums by name, always the same names; they start anew."""
        with self._lock:
            sums, self._sums = self._sums, dict(self._zeros)
            return sums


def zeros(sums: Mapping[str, float]) -> dict[str, Array]:
    """`Metrics.seen` of one member, [1, 1], before anything is counted."""
    return {name: jnp.zeros((1, 1), jnp.int32 if isinstance(x, int) else jnp.float32) for name, x in sums.items()}


def added(seen: Mapping[str, Array], sums: Mapping[str, float]) -> dict[str, Array]:
    """`Metrics.seen` with what has been counted since."""
    return {name: (jnp.maximum if name == "lag_max" else jnp.add)(seen[name], x) for name, x in sums.items()}


def columns(seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of `Metrics.seen`, arrays [M]: its sums, and what is made of them.

    lag_mean, lag_max (versions), lag_B (how many from B up to the next of LAG_BINS), every number, every wait (seconds
    of all threads), rollouts_I of each worker, worker_rate_I per second of running, the slowest and the fastest.
    """
    if not seen:
        return {}
    count = sum(seen[f"lag_{low}"] for low in LAG_BINS)
    running = np.maximum(seen["running_seconds"], 1e-9)
    rates = {name.split("_")[1]: x / running for name, x in seen.items() if name.startswith("rollouts_")}
    return {
        "lag_mean": seen["lag_sum"] / np.maximum(count, 1),
        **{name: x for name, x in seen.items() if name != "lag_sum"},
        "worker_rate_min": np.min(list(rates.values()), axis=0),
        "worker_rate_max": np.max(list(rates.values()), axis=0),
        **{f"worker_rate_{worker}": rate for worker, rate in rates.items()},
    }
