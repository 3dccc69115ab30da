"""Where stages run: one after the other in this process, or side by side: in processes of this machine, one per GPU, or
per core where there is none (no package is needed for it); or as Ray tasks, on this machine or on a cluster.

An engine is a function of stages that returns when all have trained to their ends. Each stage is a run directory with
checkpoints: a task that is lost is started again, and goes on from there. Ray is optional (the extra `ray`); on a
cluster the sweep's directory must be the same for all machines: a shared file system.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import pandas as pd

from jaxdqn.config import check_whole
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.files.documents import Fields
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.stage import Stage

T = TypeVar("T")
ENGINES = ("local", "processes", "ray")
ATTEMPTS = 5
PROBE_SECONDS = 120.0
STOP_SECONDS = 30.0


class Stopped(Exception):
    """The sweep was asked to stop; what was trained is saved."""


class Run(NamedTuple):
    """What an engine needs to know beside the stages.

    on_rows(rows): new rows of metrics; say(line); stopping() -> whether to stop.
    """

    folder: pathlib.Path
    checkpoint_seconds: float
    on_rows: Callable[[list[Fields]], None]
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
        yield in_processes(num_devices)
    else:
        with on_ray(address, num_devices) as engine:
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


class Tasks(NamedTuple, Generic[T]):
    """How an engine runs stages elsewhere; a task is whatever `start` returns.

    start(stage, run, num_devices, slot) -> task;  wait(tasks, seconds) -> those that have ended
    result(task) -> the status of its stage; raises `Lost`, and `UserError`.  stop(task): asks it to save and end
    """

    num_devices: int
    start: Callable[[Stage, Run, int, int], T]
    wait: Callable[[list[T], float], list[T]]
    result: Callable[[T], str]
    stop: Callable[[T], None]


def side_by_side(stages: Sequence[Stage], run: Run, tasks: Tasks[T]) -> None:
    """Each stage as a task with its share of the devices; lost ones are started again.

    Raises `Stopped`, and `UserError` for a stage that cannot run or is lost again and again.
    """
    from jaxdqn.runs.settings import INTERRUPTED

    waiting = [stage for stage in stages if not _stage.finished(run.folder, stage)][::-1]
    share = max(1, tasks.num_devices // max(len(waiting), 1))
    free = list(range(tasks.num_devices // share))[::-1]
    attempts = {stage.name: 0 for stage in waiting}
    flying: list[tuple[T, Stage, int]] = []
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
        _stop(tasks, [task for task, _, _ in flying])


def _stop(tasks: Tasks[T], flying: list[T]) -> None:
    """Asks the tasks to save and end, and gives them time for it."""
    for task in flying:
        tasks.stop(task)
    left = STOP_SECONDS
    while flying and left > 0:
        done = tasks.wait(flying, 1.0)
        flying = [task for task in flying if not any(task is other for other in done)]
        left -= 1.0


class _Follower:
    """Shows rows of stages that run elsewhere, from their files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: set[pathlib.Path] = set()

    def new_rows(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            path = _stage.path_of(self.run.folder, stage.name) / "metrics.parquet"
            for part in sorted(path.glob("part-*.parquet")) if path.is_dir() else []:
                if part not in self.seen:
                    self.seen.add(part)
                    with contextlib.suppress(OSError):
                        rows: list[dict[Any, Any]] = pd.read_parquet(part).to_dict("records")
                        self.run.on_rows(rows)


def _limited(num_devices: int | None, available: int, whose: str) -> int:
    """How many devices are used: `num_devices`, or all that are available. Raises `UserError` for more than these."""
    if num_devices is not None:
        check_whole("num_devices", num_devices)
    if num_devices is not None and num_devices > available:
        raise UserError(f"num_devices {num_devices} asked, but {whose}; ask for at most that.")
    return num_devices or available


def _status(answer: tuple[str, str]) -> str:
    """The status of a stage in a task's answer. Raises the `UserError` that there may be instead."""
    kind, value = answer
    if kind == "error":
        raise UserError(value)
    return value


def _prepare(num_devices: int, used: int) -> None:
    """Sets up JAX in a process that trains a stage on `num_devices` of the `used`; on the others are stages, too."""
    from jaxdqn.parallel.compiled import devices, host_memory

    cores = min(used, os.cpu_count() or 1)  # of a cluster, other machines have others
    os.environ[host_memory.SHARES] = str(max(1, cores // num_devices))
    devices.prepare_cache()
    devices.prepare_cpu(num_devices, one_thread_each=True)


class _Process(NamedTuple):
    """A process, where its answer comes from, and what it holds of ours: closed when this process ends, however."""

    process: multiprocessing.process.BaseProcess
    answer: multiprocessing.connection.Connection
    life: multiprocessing.connection.Connection


def in_processes(num_devices: int | None) -> Engine:
    """Stages in processes of their own. This process keeps off the GPUs. Raises `UserError`."""
    import jax

    gpus = count_gpus()
    jax.config.update("jax_platforms", "cpu")  # of this process alone, and only where its backend has not started
    available = gpus or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    used = _limited(num_devices, available, f"this machine has {available}")
    start = functools.partial(_start, used=used, on_gpu=gpus > 0)
    tasks = Tasks(used, start, _ended, _result, lambda task: task.process.terminate())
    return lambda stages, run: side_by_side(stages, run, tasks)


def count_gpus() -> int:
    """GPUs that JAX finds, asked in another process: whoever asks holds their memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    program = "import jax; print(sum(device.platform == 'gpu' for device in jax.devices()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
    except subprocess.SubprocessError:
        return 0
    return int(done.stdout.split()[-1])


def _start(stage: Stage, run: Run, num_devices: int, slot: int, used: int, on_gpu: bool) -> _Process:
    """Starts `stage` on devices slot * num_devices and following."""
    context = multiprocessing.get_context("spawn")  # a forked JAX hangs
    ours, theirs = context.Pipe(duplex=False)
    watched, life = context.Pipe(duplex=False)
    visible = visible_gpus(slot * num_devices, num_devices) if on_gpu else None
    arguments = (stage, str(run.folder), num_devices, used, run.checkpoint_seconds, visible, theirs, watched)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    theirs.close()
    watched.close()
    return _Process(process, ours, life)


def visible_gpus(first: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a task: `count` from the `first` on of those that this process may use."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(index) for index in range(first + count)]
    return ",".join(names[first : first + count])


def _ended(tasks: list[_Process], seconds: float) -> list[_Process]:
    """The tasks that have ended after at most `seconds`."""
    ended = set(multiprocessing.connection.wait([task.process.sentinel for task in tasks], seconds))
    return [task for task in tasks if task.process.sentinel in ended]


def _result(task: _Process) -> str:
    """The status of a task that has ended. Raises `Lost`, and the `UserError` of the stage."""
    task.process.join()
    try:
        answer = task.answer.recv() if task.answer.poll() else None
    except EOFError:
        answer = None
    if answer is None:
        raise Lost(f"its process ended with code {task.process.exitcode}")
    return _status(answer)


def _child(
    stage: Stage,
    folder: str,
    num_devices: int,
    used: int,
    checkpoint_seconds: float,
    visible: str | None,
    answer: multiprocessing.connection.Connection,
    parent: multiprocessing.connection.Connection,
) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's go to all; the parent tells us by SIGTERM
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    _prepare(num_devices, used)
    try:
        answer.send(("status", _stage.execute(stage, pathlib.Path(folder), num_devices, checkpoint_seconds)))
    except (UserError, OSError) as error:  # such as a full disk: another attempt would fail as this one
        with contextlib.suppress(OSError):  # nobody may be there any more
            answer.send(("error", str(error)))


def _end_with(parent: multiprocessing.connection.Connection) -> None:
    """Asks this process to save and end once its parent has gone, be it killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def on_ray(address: str | None, num_devices: int | None) -> Iterator[Engine]:
    """Stages as tasks of the cluster at `address`, or of a Ray of their own. Raises `UserError`."""
    from jaxdqn.parallel.asynchronous import ray_engine

    with ray_engine.cluster(address):
        import ray

        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        available = int(resources[kind])
        used = _limited(num_devices, available, f"Ray has {available} {kind}s")

        def start(stage: Stage, run: Run, share: int, slot: int) -> "ray.ObjectRef[tuple[str, str]]":
            del slot
            # One task a process: the next one may get other devices, and memory is given back.
            options: Fields = {"max_calls": 1, "max_retries": 0, "num_cpus": share}
            if kind == "GPU":
                on_gpu = {"env_vars": {"JAX_PLATFORMS": ""}}
                options = {**options, "num_gpus": share, "num_cpus": 1, "runtime_env": on_gpu}
            task: Any = ray.remote(**options)(_task)
            return task.remote(stage, str(run.folder.resolve()), share, used, run.checkpoint_seconds)

        def ended(tasks: list[ray.ObjectRef], seconds: float) -> list[ray.ObjectRef]:
            return list(ray.wait(tasks, num_returns=1, timeout=seconds)[0])

        def result(task: ray.ObjectRef) -> str:
            try:
                answer = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise Lost(type(error).__name__) from None
            return _status(answer)

        tasks = Tasks(used, start, ended, result, ray.cancel)
        yield lambda stages, run: side_by_side(stages, run, tasks)


def _task(stage: Stage, folder: str, num_devices: int, used: int, checkpoint_seconds: float) -> tuple[str, str]:
    _prepare(num_devices, used)
    try:
        return "status", _stage.execute(stage, pathlib.Path(folder), num_devices, checkpoint_seconds)
    except UserError as error:
        return "error", str(error)
