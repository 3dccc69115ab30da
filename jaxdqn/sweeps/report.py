"""report.md and report.html: the result on fresh seeds, the tuning beside it, and figures."""

import pathlib

from jaxdqn.sweeps.sweep import Sweep


def write(folder: pathlib.Path, sweep: Sweep) -> list[str]:
    return []
