"""The disk that a run's checkpoints may take: counted before anything starts, and refused with numbers, as memory is.

What is written is compressed; how far that goes is not known before, and nothing here counts on it.
"""

import pathlib
import shutil
from typing import NamedTuple

from jaxdqn import agents
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.compiled.memory import Plan, gib
from jaxdqn.runs.checkpoints import KEEP
from jaxdqn.runs.directory import RunSpec


class Need(NamedTuple):
    """Bytes of one checkpoint, of the replay in it, and of all that are there at a time."""

    checkpoint: int
    replay: int
    total: int


def need(spec: RunSpec, budget: Plan, with_replay: bool) -> Need:
    """What the checkpoints of a run with this plan need."""
    shards = schemes.num_replays(spec.axes, spec.devices_per_agent) * spec.members_per_batch
    replay = budget.replay_bytes * shards if with_replay or agents.replay_of(spec.config).newest_only else 0
    checkpoint = (budget.shard_bytes - budget.replay_bytes) * shards + replay
    # The newest of every batch stay, and another one is written before the oldest goes.
    return Need(checkpoint, replay, checkpoint * (KEEP * len(spec.batches) + 1))


def free(folder: pathlib.Path) -> int:
    """Bytes that the checkpoints of the run in `folder`, which may not be there yet, can take: those of today too."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    taken = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    return shutil.disk_usage(there).free + taken


def check(folder: pathlib.Path, spec: RunSpec, budget: Plan, with_replay: bool) -> Need:
    """What the checkpoints of the run in `folder` need. Raises `UserError` where they do not fit."""
    wanted, have = need(spec, budget, with_replay), free(folder)
    if wanted.total > have:
        less = "use --checkpoint-replay off, lower replay_capacity, or " if wanted.replay else ""
        raise UserError(
            f"checkpoints need up to {gib(wanted.total)}, {gib(wanted.checkpoint)} each ({gib(wanted.replay)} of it "
            f"replay), and {gib(have)} are free for them in {folder}; {less}choose another --out."
        )
    return wanted
