"""Where stages run: one after the other in this process, or side by side in others (`processes`, or Ray's tasks).

An engine is a function of stages that returns when all have trained to their ends. Each stage is a run directory with
checkpoints: a task that is lost is started again, and goes on from there.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxdqn.errors import UserError, unknown_name
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.stage import Stage

ENGINES = ("local", "processes", "ray")
ATTEMPTS = 5


class Stopped(Exception):
    """The sweep was asked to stop; what was trained is saved."""


class Run(NamedTuple):
    """What an engine needs to know beside the stages.

    on_rows(rows): new rows of metrics; say(line); stopping() -> whether to stop.
    """

    folder: pathlib.Path
    checkpoint_seconds: float
    on_rows: Callable[[list[dict[str, Any]]], None]
    say: Callable[[str], None]
    stopping: Callable[[], bool]


Engine = Callable[[Sequence[Stage], Run], None]


@contextlib.contextmanager
def running(name: str, address: str | None = None, num_devices: int | None = None) -> Iterator[Engine]:
    """The engine called `name`, with `num_devices` in all; ended afterwards. Raises `UserError`."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    if address is not None and name != "ray":
        raise UserError(f"ray_address {address!r} is for engine 'ray', not {name!r}.")
    if name == "local":
        yield lambda stages, run: local(stages, run, num_devices)
    elif name == "processes":
        from jaxdqn.sweeps import processes

        yield processes.engine(num_devices)
    else:
        from jaxdqn.sweeps import ray_tasks

        with ray_tasks.running(address, num_devices) as engine:
            yield engine


def local(stages: Sequence[Stage], run: Run, num_devices: int | None) -> None:
    """One stage after the other, each on all devices. Raises `Stopped`."""
    from jaxdqn.runs.settings import INTERRUPTED

    for stage in stages:
        if _stage.finished(run.folder, stage):
            continue
        if run.stopping():
            raise Stopped
        status = _stage.execute(stage, run.folder, num_devices, run.checkpoint_seconds, run.on_rows)
        if status == INTERRUPTED:
            raise Stopped
        if not _stage.finished(run.folder, stage):
            raise RuntimeError(f"stage {stage.name} ended as {status!r}.")


class Lost(Exception):
    """A task ended without an answer: its process was killed, or its machine went."""


class Tasks(NamedTuple):
    """How an engine runs stages elsewhere; a task is whatever `start` returns.

    start(stage, run, num_devices, slot) -> task;  wait(tasks, seconds) -> those that have ended
    result(task) -> the status of its stage; raises `Lost`, and `UserError`.  stop(task): asks it to save and end
    """

    num_devices: int
    start: Callable[[Stage, Run, int, int], Any]
    wait: Callable[[list[Any], float], list[Any]]
    result: Callable[[Any], str]
    stop: Callable[[Any], None]


def side_by_side(stages: Sequence[Stage], run: Run, tasks: Tasks) -> None:
    """Each stage as a task with its share of the devices; lost ones are started again.

    Raises `Stopped`, and `UserError` for a stage that cannot run or is lost again and again.
    """
    from jaxdqn.runs.settings import INTERRUPTED

    waiting = [stage for stage in stages if not _stage.finished(run.folder, stage)][::-1]
    share = max(1, tasks.num_devices // max(len(waiting), 1))
    free = list(range(tasks.num_devices // share))[::-1]
    attempts = {stage.name: 0 for stage in waiting}
    flying: list[tuple[Any, Stage, int]] = []
    follow = _Follower(run)
    try:
        while waiting or flying:
            if run.stopping():
                raise Stopped
            while waiting and free:
                stage, slot = waiting.pop(), free.pop()
                attempts[stage.name] += 1
                flying.append((tasks.start(stage, run, share, slot), stage, slot))
            done = tasks.wait([task for task, _, _ in flying], 1.0)
            for entry in [entry for entry in flying if any(entry[0] is task for task in done)]:
                flying.remove(entry)
                task, stage, slot = entry
                free.append(slot)
                try:
                    status = tasks.result(task)
                except Lost as loss:
                    if attempts[stage.name] == ATTEMPTS:
                        raise UserError(
                            f"stage {stage.name} was lost {ATTEMPTS} times; the last time: {loss}."
                        ) from None
                    run.say(f"warning: stage {stage.name} was lost ({loss}); it goes on from its last checkpoint.")
                    waiting.append(stage)
                    continue
                if status == INTERRUPTED:
                    raise Stopped
            follow.new_rows(stages)
    finally:
        for task, _, _ in flying:
            tasks.stop(task)
        end = 30.0
        while flying and end > 0:
            done = tasks.wait([task for task, _, _ in flying], 1.0)
            flying = [entry for entry in flying if not any(entry[0] is task for task in done)]
            end -= 1.0


class _Follower:
    """Shows rows of stages that run elsewhere, from their files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: set[pathlib.Path] = set()

    def new_rows(self, stages: Sequence[Stage]) -> None:
        import pandas as pd

        for stage in stages:
            path = _stage.path_of(self.run.folder, stage.name) / "metrics.parquet"
            for part in sorted(path.glob("part-*.parquet")) if path.is_dir() else []:
                if part not in self.seen:
                    self.seen.add(part)
                    with contextlib.suppress(OSError):
                        rows: list[dict[Any, Any]] = pd.read_parquet(part).to_dict("records")
                        self.run.on_rows(rows)
