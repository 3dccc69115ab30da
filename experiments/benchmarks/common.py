"""What all benchmarks share: interleaved timing, medians, a table, and one JSON file per result.

The machine may be busy with other work, so nothing is reported from one run alone: the candidates take turns in one
process, and ratios are medians of per-round ratios, in which the load of the moment cancels.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")


def count(text: str) -> int:
    """A flag's value: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def seconds(text: str) -> float:
    """A flag's value: a time above 0, and below a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and below a day")
    return value


def compiled(function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> tuple[Any, float]:
    """`function` jitted and compiled ahead of time for `args`, and the seconds that took."""
    import jax

    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=tuple(donate)).lower(*args).compile()
    return program, time.perf_counter() - start


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` per candidate, in turn (a, b, a, b, ...); `warmup` rounds are thrown away.

    A candidate returns the arrays to wait for.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: values[warmup:] for name, values in seconds.items()}


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of numerator / denominator, each pair measured side by side."""
    return median([n / d for n, d in zip(numerator, denominator, strict=True)])


def in_subprocess(script: str, args: Sequence[str], environment: Mapping[str, str | None], python: str = "") -> Any:
    """The JSON on the last line that `script` prints, run with `environment` (None unsets a variable).

    For settings that must be made before the JAX backend starts. Raises RuntimeError with its output where it fails.
    """
    merged = {**os.environ, "JAX_PLATFORMS": "cpu", **{k: v for k, v in environment.items() if v is not None}}
    for name in (k for k, v in environment.items() if v is None):
        merged.pop(name, None)
    done = subprocess.run([python or sys.executable, script, *args], env=merged, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Side:
    """One candidate in a process of its own, on `cores` where any are named: `answer` lets it go on to its next
    `yield` in `serve`, and gives what it yielded and the seconds that took; `ask` and `answer` apart let several go on
    together."""

    def __init__(self, command: Sequence[str], cores: Sequence[int] = ()) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("PJRT_NPROC", None)
        pipe = subprocess.PIPE
        pin = (lambda: os.sched_setaffinity(0, set(cores))) if cores else None
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=sys.stderr, text=True, preexec_fn=pin
        )
        self._asked = False

    def ask(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._asked = True

    def answer(self) -> Any:
        if not self._asked:
            self.ask()
        assert self.process.stdout
        self._asked, line = False, self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def serve(steps: Iterator[Any]) -> None:
    """The other end of a `Side`: one step per line read, its value and seconds per line written."""
    for _ in sys.stdin:
        start = time.perf_counter()
        value = next(steps)
        print(json.dumps({"value": value, "seconds": time.perf_counter() - start}), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned first column, right-aligned others; floats with three significant digits."""

    def text(value: Any) -> str:
        return (
            f"{value:,.0f}"
            if isinstance(value, float) and abs(value) >= 1000
            else (f"{value:.3g}" if isinstance(value, float) else str(value))
        )

    lines = [[text(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def write_result(name: str, numbers: Mapping[str, Any]) -> Path:
    """Writes results/<name>.json: `numbers`, and where, when and with what they were measured."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, "measured": _circumstances(), **numbers}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "args": [_without_path(arg) for arg in sys.argv[1:]],
        "device": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _without_path(argument: str) -> str:
    return Path(argument).name if os.sep in argument else argument


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    # Results themselves are outputs: they do not make the measured code another.
    changed = git("status", "--porcelain", "--", ":/", ":!*/results/*")
    return (commit or "no commit yet") + (" with uncommitted changes" if changed else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
