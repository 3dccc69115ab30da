"""What the scripts share: flags that tyro cannot know, one-line errors, and the backend's set-up."""

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TextIO, TypeVar, get_args, get_origin, get_type_hints

import tyro

from jaxdqn.config import Config, HParams
from jaxdqn.environments.names import CONVOLVED
from jaxdqn.errors import UserError, shortened, unknown_name
from jaxdqn.files import documents, paths
from jaxdqn.parallel import hosts
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs.progress import stderr

T = TypeVar("T")
NOBODY_READS = 128 + signal.SIGPIPE
LONGEST_LINE = 2_000  # letters of an error: a value may have a million


def main(script: Callable[[], int | None]) -> NoReturn:
    """Runs a script: a `UserError` or a failing disk ends in one line and a non-zero exit, in all of its processes.

    What cannot be shown on stderr is dropped. Where nobody reads what is printed, the exit code is that of SIGPIPE,
    unless it was printed with `say`.
    """
    signal.signal(signal.SIGINT, _interrupted)
    _prepare_streams()
    try:
        code = script() or 0
        hosts.leave()
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(" ".join(str(error).split()), 2)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        hosts.abandon("nobody reads its output.", NOBODY_READS)
        os._exit(NOBODY_READS)
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


def say(line: str) -> None:
    """Prints a line on what is done and kept in files: the exit code stays that of the work if nobody reads it."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):
        _send_nowhere(sys.stdout)


def _prepare_streams() -> None:
    """Gives streams that are closed to the null device, before a file gets their numbers; a name that the locale cannot
    spell is printed with escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None or sys.stderr is None:
        null = pathlib.Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or null, sys.stderr or null
    sys.stderr = stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _send_nowhere(stream: TextIO) -> None:
    """What a broken stream holds, and will get, goes to the null device, or the exit would fail on it."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _interrupted(number: int, frame: object) -> NoReturn:
    """Ctrl-C where nothing waits for it: no KeyboardInterrupt, which in the midst of a save makes orbax's threads print
    tracebacks of their own."""
    del number, frame
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted.\n")
    hosts.abandon("interrupted.", 130)
    os._exit(130)


def _fail(line: str, code: int) -> NoReturn:
    line = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE * 2 // 3]} ... {line[-LONGEST_LINE // 3 :]}"
    print(f"error: {line}", file=sys.stderr)
    hosts.abandon(line, code)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _send_nowhere(sys.stdout)
    sys.exit(code)


def parse(kind: type[T], arguments: Sequence[str], default: T, description: str) -> T:
    """tyro's parsing into dataclass `kind`, its errors as one line. Raises `UserError`."""
    types = _types(default)
    arguments = _as_meant(arguments, types)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed: Any = tyro.cli(kind, args=arguments, default=default, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue(), arguments, ["--help", *types])) from None
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    return dataclasses.replace(parsed, **{name: _expanded(value) for name, value in values.items()})


def given(arguments: Sequence[str]) -> set[str]:
    """The names of the flags among the arguments, as fields are called; --no-x is x."""
    flags = [argument.partition("=")[0][2:] for argument in arguments if argument.startswith("--")]
    return {re.sub(r"(^|\.)no_", r"\1", flag.replace("-", "_")) for flag in flags}


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`, read before the parsing proper; as there, the last one counts."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.split("=", 1)[1]
    return value


def take_dotted(arguments: Sequence[str], prefix: str) -> tuple[dict[str, list[object]], list[str]]:
    """Takes `--prefix.some-name VALUE...` out of the arguments: ({some_name: values}, the rest).

    Values are read as YAML, so that 200, 0.1 and False have their types. Raises `UserError` for a flag without one.
    """
    taken: dict[str, list[object]] = {}
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


def single(values: dict[str, list[object]], prefix: str) -> dict[str, object]:
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
    from jaxdqn.parallel import schemes
    from jaxdqn.parallel.compiled import devices

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    needs = schemes.needed_devices(axes or Axes())
    useful = needs.useful or max(1, num_members) * max(1, devices_per_agent)
    required = max(devices_per_agent, needs.least)
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
        convolves = config.network not in ("auto", "mlp") or any(part in config.env for part in CONVOLVED)
        devices.prepare_cpu(count, one_thread_each=not convolves or count >= cores)
    devices.prepare_cache()


def _yaml(text: str) -> object:
    try:
        value = documents.parse_yaml(text)
    except ValueError as error:
        raise UserError(f"the value {shortened(text)!r} cannot be read: {shortened(str(error))}.") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _as_meant(arguments: Sequence[str], types: Mapping[str, object]) -> list[str]:
    """Values as people mean them, by the types of their flags: 5e5 of something that is counted is 500000; a path that
    is called None is one."""
    meant, flag = [], ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            flag = name.replace("_", "-")
            meant.append(f"{name}={_value(value, types.get(flag))}" if equals else argument)
        else:
            meant.append(_value(argument, types.get(flag)))
            flag = flag if get_origin(types.get(flag)) is tuple else ""
    return meant


def _value(text: str, kind: object) -> str:
    kinds = (kind, *get_args(kind))
    if int in kinds and re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+", text) and float(text).is_integer():
        return str(int(float(text)))
    return f"./{text}" if text == "None" and pathlib.Path in kinds else text


def _expanded(value: object) -> object:
    """A path, or each of several, with ~ for the home directory."""
    if type(value) is tuple:
        return tuple(map(_expanded, value))
    return paths.expanded(value) if isinstance(value, pathlib.Path) else value


def _one_line(text: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    """tyro's error box as one sentence; a misspelt flag gets the nearest right one."""
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag.replace("_", "-").replace("--no-", "--") not in known:
            return str(unknown_name("flag", flag, known, "`--help` shows all."))
    lines = [re.sub(r"[╭╮╰╯─│┌┐└┘]+|-{5,}", " ", line).strip() for line in text.splitlines()]
    words = " ".join(line for line in lines if line and "Parsing error" not in line and "--help" not in line)
    return " ".join(words.split()) or "the flags could not be read; see --help."


def _types(default: object, prefix: str = "--") -> dict[str, object]:
    """Every flag of a record that holds its defaults, and the type of its value."""
    types: dict[str, object] = {}
    whole = get_type_hints(type(default), include_extras=True)
    for name, hint in get_type_hints(type(default)).items():
        value = getattr(default, name)
        if tyro.conf.Positional in getattr(whole[name], "__metadata__", ()):
            continue  # no flag
        if name in ("config", "own"):  # without a prefix of their own
            types |= _types(value, prefix) if value != () else {}
        elif isinstance(value, HParams | Axes):
            types |= _types(value, f"{prefix}{name}.")
        else:
            types[f"{prefix}{name}".replace("_", "-")] = hint
    return types
