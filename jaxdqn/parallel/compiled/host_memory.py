"""How much memory this process may still take: the least of what the machine, its control groups (systemd, containers,
batch systems), its resource limits and SLURM leave.

A process that takes more than one of them allows is killed without a word, or its next allocation fails.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from jaxdqn.errors import UserError

UNKNOWN = 8 * 2**30  # where the system tells nothing
ROOT = pathlib.Path("/")
SHARES = "JAXDQN_MEMORY_SHARES"  # how many processes side by side divide what there is


def host_bytes(root: pathlib.Path = ROOT, environ: Mapping[str, str] = os.environ) -> int:
    """Free bytes for this process, one of `SHARES`; `root` is where proc and the control groups are mounted. Raises
    `UserError` for shares that are no number."""
    shares = environ.get(SHARES, "1")
    if not re.fullmatch(r"[1-9]\d{0,5}", shares):
        raise UserError(f"{SHARES} is {shares!r}; it must be a whole number of at least 1.")
    status = _table(root / "proc/self/status")
    limits = [_machine(root), *_groups(root), *_resources(root, status), *_slurm(environ, status)]
    return max(0, min(limits)) // int(shares)


def _machine(root: pathlib.Path) -> int:
    found = _table(root / "proc/meminfo").get("MemAvailable")
    if found is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return UNKNOWN if found is None else found


def _groups(root: pathlib.Path) -> Iterator[int]:
    """What each control group that this process is in leaves it, from its own up to the outermost that can be seen."""
    own = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    paths = {
        "memory" if "memory" in names.split(",") else "": path for _, names, path in (x for x in own if len(x) == 3)
    }
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, of = line.partition(" - ")
        mounted, kind = fields.split(), of.split()
        if len(mounted) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup" and "memory" not in kind[2].split(","):
            continue
        path = paths.get("memory" if kind[0] == "cgroup" else "")
        if path is not None:
            top = root / mounted[4].lstrip("/")
            # A container sees the mount from its own group on: the part above it is not there.
            inside = path.removeprefix(mounted[3]) if mounted[3] != "/" else path
            for folder in _upwards(top, inside):
                yield from _left(folder)


def _upwards(top: pathlib.Path, inside: str) -> Iterator[pathlib.Path]:
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:depth])


def _left(folder: pathlib.Path) -> Iterator[int]:
    """What one control group leaves; caches of files that it would give back count as free."""
    stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    for limits, usage, cache in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        used, given_back = _number(_text(folder / usage)) or 0, _number(stat.get(cache, "")) or 0
        for name in limits:
            limit = _number(_text(folder / name))
            if limit is not None:
                yield limit - max(0, used - given_back)


def _resources(root: pathlib.Path, status: Mapping[str, int]) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    for line in _text(root / "proc/self/limits").splitlines():
        for name, used in (("Max address space", "VmSize"), ("Max data size", "VmData")):
            if line.startswith(name):
                limit = _number(line.removeprefix(name).split()[0])
                if limit is not None:
                    yield limit - status.get(used, 0)


def _slurm(environ: Mapping[str, str], status: Mapping[str, int]) -> Iterator[int]:
    """What SLURM granted on this node, in its unit, MiB, less what this process has; 0 is all there is."""
    for name, count in (
        ("SLURM_MEM_PER_NODE", "1"),
        ("SLURM_MEM_PER_CPU", environ.get("SLURM_CPUS_ON_NODE", "")),
        ("SLURM_MEM_PER_GPU", environ.get("SLURM_GPUS_ON_NODE", "")),
    ):
        each, many = _number(environ.get(name, "")), _number(count)
        if each and many:
            yield each * many * 2**20 - status.get("VmRSS", 0)


def _table(file: pathlib.Path) -> dict[str, int]:
    """`Name: 123 kB` lines, in bytes."""
    rows = [line.replace(":", " ").split() for line in _text(file).splitlines()]
    return {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3 and row[1].isdigit() and row[2] == "kB"}


def _number(text: str) -> int | None:
    """A whole number; None for "max", "unlimited", and whatever else is none."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 30 else None


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
