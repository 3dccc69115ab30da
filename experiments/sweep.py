"""Runs a hyperparameter sweep as compiled populations, and reports it.

    python experiments/sweep.py experiments/sweeps/cartpole-small.yaml             about a minute on two cores
    python experiments/sweep.py FILE.yaml --dry-run                               what it would take; no training
    python experiments/sweep.py --resume DIR                                       go on where it was stopped or killed
    python experiments/sweep.py FILE.yaml --engine processes                       a process per GPU (or core)
    python experiments/sweep.py FILE.yaml --engine ray [--ray-address HOST:PORT]   a Ray task per group

docs/sweeps.md explains the file.
"""

import dataclasses
import datetime
import os
import pathlib
import shlex
import sys

import tyro

from jaxdqn.config import check_number, check_whole
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.runs import cli
from jaxdqn.sweeps import reading
from jaxdqn.sweeps.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class Args:
    """What to sweep, where, and with what."""

    file: tyro.conf.Positional[pathlib.Path | None] = None
    """The sweep, a YAML file."""
    out: pathlib.Path | None = None
    """Its directory; by default sweeps/NAME-TIME."""
    resume: pathlib.Path | None = None
    """Continue the sweep in this directory."""
    engine: str = "local"
    """Where groups are trained: local (one after the other on all devices), processes, or ray."""
    ray_address: str | None = None
    """Cluster of --engine ray, HOST:PORT or auto; by default Ray is started on this machine."""
    num_devices: int | None = None
    """Devices used in all; by default every GPU, or every core."""
    checkpoint_seconds: float = 20.0
    """Least time between two checkpoints: what a kill can lose."""
    dry_run: bool = False
    """Check everything, print what it would take, and stop."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    if (args.file is None) == (args.resume is None):
        raise UserError("give either a sweep file or --resume DIR.")
    if args.num_devices is not None:
        check_whole("num_devices", args.num_devices)
    check_number("checkpoint_seconds", args.checkpoint_seconds, 0)
    if args.file is not None:
        sweep = reading.load(args.file)
        folder = args.out or pathlib.Path("sweeps") / f"{args.file.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    else:
        from jaxdqn.sweeps import directory

        assert args.resume is not None
        if args.out is not None:
            raise UserError("--out belongs to a new sweep; --resume names the directory to go on in.")
        sweep, folder = directory.load(args.resume), args.resume
    prepare(sweep, args)
    if args.out or args.resume or args.dry_run:
        return train(sweep, folder, args)
    with paths.fresh(folder) as folder:
        return train(sweep, folder, args)


def prepare(sweep: Sweep, args: Args) -> None:
    """Sets up JAX for what this process does: planning, and stages where the engine is local."""
    if args.engine == "ray":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    members = max(sweep.sampler.trials or 2**16, 1) * sweep.seeds.number
    cli.prepare_backend(sweep.config, members, args.num_devices, 1)


def train(sweep: Sweep, folder: pathlib.Path, args: Args) -> int:
    """Trains and reports the sweep in `folder`; returns the exit code."""
    from jaxdqn.sweeps import engines, planning, report, running

    names = running.Options._fields
    options = {name: getattr(args, name) for name in names if name != "progress"} | {"progress": not args.quiet}
    if args.dry_run:
        print("\n".join(planning.described(running.plan(sweep, running.Options(**options)), sweep)))
        return 0
    try:
        table = running.resume(folder, **options) if args.resume else running.run(sweep, folder, **options)
    except engines.Stopped:
        cli.say(f"interrupted: continue with: python experiments/sweep.py --resume {shlex.quote(str(folder))}")
        return 130
    cli.say("\n".join([*report.winner_lines(sweep, table), f"report: {folder / 'report.html'}"]))
    return 0


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
