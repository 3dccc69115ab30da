"""What the scripts share: flags that tyro cannot know, one-line errors, and the backend's set-up."""

import contextlib
import io
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from jaxdqn import documents
from jaxdqn.axes import Axes
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError, shortened, unknown_name
from jaxdqn.parallel import hosts

T = TypeVar("T")
LONGEST_LINE = 2_000  # letters of an error: a value may have a million


def main(script: Callable[[], int | None]) -> NoReturn:
    """Runs a script: a `UserError` or a failing disk ends in one line and a non-zero exit, in all of its processes."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        code = script() or 0
        hosts.leave()
        sys.exit(code)
    except UserError as error:
        _fail(" ".join(str(error).split()), 2)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os._exit(0)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    except Exception:
        reason = hosts.lost()
        if reason is not None:
            _fail(reason, 2)
        if hosts.count() > 1:
            traceback.print_exc()
        hosts.abandon("its output has the traceback.", 1)
        raise


def _interrupted(number: int, frame: Any) -> NoReturn:
    """Ctrl-C where nothing waits for it: no KeyboardInterrupt, which in the midst of a save makes orbax's threads print
    tracebacks of their own."""
    del number, frame
    os.write(2, b"error: interrupted.\n")
    hosts.abandon("interrupted.", 130)
    os._exit(130)


def _fail(line: str, code: int) -> NoReturn:
    line = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE * 2 // 3]} ... {line[-LONGEST_LINE // 3 :]}"
    print(f"error: {line}", file=sys.stderr)
    hosts.abandon(line, code)
    sys.exit(code)


def parse(kind: type[T], arguments: Sequence[str], default: T, description: str) -> T:
    """tyro's parsing into dataclass `kind`, its errors as one line. Raises `UserError`."""
    arguments = [_whole(argument) for argument in arguments]
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=arguments, default=default, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue(), arguments, kind, default)) from None


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`, read before the parsing proper."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def take_dotted(arguments: Sequence[str], prefix: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Takes `--prefix.some-name VALUE...` out of the arguments: ({some_name: values}, the rest).

    Values are read as YAML, so that 200, 0.1 and False have their types. Raises `UserError` for a flag without one.
    """
    taken: dict[str, list[Any]] = {}
    rest: list[str] = []
    name = None
    for argument in arguments:
        if argument.startswith(f"--{prefix}."):
            name, _, value = argument.removeprefix(f"--{prefix}.").partition("=")
            name = name.replace("-", "_")
            taken[name] = [_yaml(value)] if value else []
        elif name is not None and not argument.startswith("--"):
            taken[name].append(_yaml(argument))
        else:
            name = None
            rest.append(argument)
    for name, values in taken.items():
        if not values:
            raise UserError(f"--{prefix}.{name.replace('_', '-')} needs a value.")
    return taken, rest


def single(values: dict[str, list[Any]], prefix: str) -> dict[str, Any]:
    """Dotted flags that take one value each."""
    for name, given in values.items():
        if len(given) != 1:
            raise UserError(f"--{prefix}.{name.replace('_', '-')} takes one value; it got {given}.")
    return {name: given[0] for name, given in values.items()}


def prepare_backend(
    config: Config,
    num_members: int,
    num_devices: int | None,
    devices_per_agent: int,
    axes: Axes | None = None,
    num_processes: int = 1,
) -> None:
    """Sets up JAX for a script, before its backend starts: CPU devices, threads, and the compilation cache.

    Each core becomes a device where there are members for it; `num_devices` are those of all processes. Raises
    `UserError` for more CPU devices than sensible.
    """
    from jaxdqn.parallel import devices

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    axes = axes or Axes()
    useful = axes.useful_devices or max(1, num_members) * max(1, devices_per_agent)
    required = max(devices_per_agent, axes.required_devices)
    if num_devices is None:  # each process has equally many, and all together divide among agents
        least = math.lcm(required, num_processes) // num_processes
        count = max(least, min(cores, -(-useful // num_processes)))
    elif num_devices % num_processes:
        raise UserError(f"num_devices {num_devices} does not divide among {num_processes} processes; take a multiple.")
    else:
        count = num_devices // num_processes
    if count > devices.MAX_CPU_DEVICES and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        if num_devices is not None:
            raise UserError(f"num_devices {count} on a CPU with {cores} cores; at most {devices.MAX_CPU_DEVICES} work.")
        count = devices.MAX_CPU_DEVICES // devices_per_agent * devices_per_agent or devices_per_agent
    if count >= 1:
        if count > cores:
            print(f"warning: {count} CPU devices share {cores} cores; they will be slow.", file=sys.stderr)
        # Only a convolution gains from more than one thread, where there is a core to spare.
        convolves = config.network in ("minatar", "nature") or ("MinAtar" in config.env or "Pong" in config.env)
        devices.prepare_cpu(count, one_thread_each=not convolves or count >= cores)
    devices.prepare_cache()


def _yaml(text: str) -> Any:
    try:
        value = documents.parse_yaml(text)
    except ValueError as error:
        raise UserError(f"the value {shortened(text)!r} cannot be read: {shortened(str(error))}.") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _whole(argument: str) -> str:
    """5e5 as 500000, for people who count steps that way."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+", argument) and float(argument).is_integer():
        return str(int(float(argument)))
    return argument


def _one_line(text: str, arguments: Sequence[str], kind: type, default: Any) -> str:
    """tyro's error box as one sentence; a misspelt flag gets the nearest right one."""
    known = _flags(kind, default)
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag.replace("_", "-").replace("--no-", "--") not in known:
            return str(unknown_name("flag", flag, known, "`--help` shows all."))
    lines = [re.sub(r"[╭╮╰╯─│┌┐└┘]+", " ", line).strip() for line in text.splitlines()]
    words = " ".join(line for line in lines if line and "Parsing error" not in line and "--help" not in line)
    return " ".join(words.split()) or "the flags could not be read; see --help."


def _flags(kind: type, default: Any) -> list[str]:
    import dataclasses

    names = ["--help"]
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if isinstance(value, Config):
            names += [f"--{inner.name}" for inner in dataclasses.fields(value)]
        elif isinstance(value, HParams):
            names += [f"--{field.name}.{inner}" for inner in HParams._fields]
        else:
            names.append(f"--{field.name}")
    return [name.replace("_", "-") for name in names]
