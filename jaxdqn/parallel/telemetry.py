"""What a parallel scheme tells of itself between two logging points: lags, waits, losses, rates."""

import threading
import time
from collections import Counter

LAG_BINS = (0, 1, 2, 4, 8, 16, 32)  # lower edges, in versions


class Seen:
    """Thread-safe counters; `take` gives the columns of one logging point and starts anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(dropped=0)  # a column from the first row on
        self._waits: Counter[str] = Counter()
        self._lags: Counter[int] = Counter()

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter, such as dropped or lost."""
        with self._lock:
            self._counts[name] += by

    def wait(self, name: str, seconds: float) -> None:
        """Adds to a time spent waiting, seconds."""
        with self._lock:
            self._waits[name] += seconds  # type: ignore[assignment]

    def lag(self, versions: int) -> None:
        """How many versions old the parameters behind some experience or gradient were."""
        with self._lock:
            self._lags[versions] += 1

    def take(self) -> dict[str, float]:
        """lag_mean, lag_max (versions), lag_B (how many from B up to the next of LAG_BINS), every counter, and every
        wait (seconds of all threads)."""
        with self._lock:
            lags, total = self._lags, sum(self._lags.values())
            columns: dict[str, float] = {
                "lag_mean": sum(lag * n for lag, n in lags.items()) / max(total, 1),
                "lag_max": float(max(lags, default=0)),
                **{f"lag_{low}": float(_between(lags, low, high)) for low, high in zip(LAG_BINS, _UPPER, strict=True)},
                **{f"{name}": float(n) for name, n in self._counts.items()},
                **{f"{name}_seconds": seconds for name, seconds in self._waits.items()},
            }
            self._counts = Counter(dict.fromkeys(self._counts, 0))
            self._waits = Counter(dict.fromkeys(self._waits, 0))
            self._lags = Counter()
            return columns


class Rates:
    """Thread-safe rates of the workers; `take` gives the columns of one logging point and starts anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._by_worker: Counter[int] = Counter()

    def worked(self, worker: int) -> None:
        """One rollout of a worker."""
        with self._lock:
            self._by_worker[worker] += 1

    def take(self) -> dict[str, float]:
        """worker_rate_I, rollouts per second of each worker that ever worked (0 where it has died or hangs), with the
        slowest and the fastest of them."""
        with self._lock:
            now = time.perf_counter()
            elapsed, self._began = max(now - self._began, 1e-9), now
            rates = {worker: self._by_worker[worker] / elapsed for worker in sorted(self._by_worker)}
            self._by_worker = Counter(dict.fromkeys(self._by_worker, 0))
            return {
                "worker_rate_min": min(rates.values(), default=0.0),
                "worker_rate_max": max(rates.values(), default=0.0),
                **{f"worker_rate_{worker}": rate for worker, rate in rates.items()},
            }


_UPPER = (*LAG_BINS[1:], 2**62)


def _between(lags: Counter[int], low: int, high: int) -> int:
    return sum(n for lag, n in lags.items() if low <= lag < high)
