"""What a session is told that does not change a run's result, and how it can end. Needs no JAX."""

import os
from collections.abc import Callable
from typing import NamedTuple

from jaxdqn.config import check_number, check_whole
from jaxdqn.errors import UserError, shown

OK, INTERRUPTED, SOLVED, TIMEOUT, DIVERGED = "finished", "interrupted", "solved", "out of time", "diverged"
UNFINISHED = "unfinished"  # it trains now, or was killed


class Settings(NamedTuple):
    """What does not change a run's result: when to stop, save and speak.

    stop_at_return: stop once every member's greedy return reaches it; max_seconds: wall time of this session;
    stop_diverged: stop once no member's parameters change any more; checkpoint_seconds: at least this long between
    checkpoints; checkpoint_replay: whether they hold the replay, which is otherwise filled anew when the run goes on
    (None: as the run had it, at first they do); tensorboard_members: how many members, and means of settings, have
    curves there; figure: draw curves.png; telemetry: measure network and replay where greedy episodes are played
    (`telemetry.py`).
    on_chunk(rows) is called with each logging point's rows. engine: where workers live, "local" (threads) or "ray",
    there on this machine or on the cluster at `ray_address`.
    """

    stop_at_return: float | None = None
    max_seconds: float | None = None
    stop_diverged: bool = True
    checkpoint_seconds: float = 60.0
    checkpoint_replay: bool | None = None
    progress: bool = True
    tensorboard: bool = True
    tensorboard_members: int = 8
    figure: bool = True
    telemetry: bool = False
    wandb: str | None = None
    profile: bool = False
    init_from: str | None = None
    init_member: int = 0
    on_chunk: Callable[[list[dict[str, object]]], None] | None = None
    engine: str = "local"
    ray_address: str | None = None


def check(settings: Settings) -> None:
    """Raises `UserError` for values that no session can have."""
    if not isinstance(settings, Settings):
        raise UserError(f"settings is {shown(settings)}; it must be Settings, such as Settings(max_seconds=60).")
    if settings.stop_at_return is not None:
        check_number("stop_at_return", settings.stop_at_return)
    if settings.max_seconds is not None:
        check_number("max_seconds", settings.max_seconds, 0)
    check_number("checkpoint_seconds", settings.checkpoint_seconds, 0)
    if settings.checkpoint_replay not in (True, False, None):
        raise UserError(f"checkpoint_replay is {shown(settings.checkpoint_replay)}; it must be True, False or None.")
    check_whole("tensorboard_members", settings.tensorboard_members, 0)
    check_whole("init_member", settings.init_member, 0)
    if settings.init_from is not None and not isinstance(settings.init_from, str | os.PathLike):
        raise UserError(f"init_from is {shown(settings.init_from)}; it must be the directory of a run.")
