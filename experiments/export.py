"""Exports a run's greedy policy as one file that needs only JAX: observation [B, *O] -> action [B].

    python experiments/export.py runs/NAME
    >>> policy = jax.export.deserialize(pathlib.Path("policy.jax").read_bytes())
    >>> actions = policy.call(observations)

A recurrent agent's policy also takes its state, zeros at an episode's start, and gives the next one:

    >>> actions, state = policy.call(observations, state)

The file is loaded again and must choose the same actions as the run.
"""

import dataclasses
import pathlib
import sys
from typing import Annotated

import tyro

from jaxdqn.config import check_whole
from jaxdqn.files import paths
from jaxdqn.runs import cli


@dataclasses.dataclass(frozen=True)
class Args:
    """Which policy to export, and where to."""

    run: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("RUN")
    """Run directory."""
    member: int = 0
    """Member of the population."""
    out: pathlib.Path | None = None
    """File to write; by default policy-member-K.jax in the run directory."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    check_whole("member", args.member, 0)
    from jaxdqn.runs import directory

    spec, _ = directory.load(args.run)
    path = args.run / f"policy-member-{args.member}.jax" if args.out is None else paths.followed(args.out)
    paths.check_file(path)
    cli.prepare_backend(spec.config, 1, 1, 1)
    from jaxdqn.runs import export as exporting

    agreed = exporting.export_policy(args.run, args.member, path)
    cli.say(f"policy: {path} ({path.stat().st_size / 1024:.0f} KiB); {agreed} reloaded actions equal the run's")
    return 0


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
