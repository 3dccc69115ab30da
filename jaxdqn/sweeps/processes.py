"""Stages as processes of this machine: one per GPU, or per core where there is none. No package is needed for it."""

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
from typing import Any, NamedTuple

from jaxdqn.errors import UserError
from jaxdqn.sweeps import engines
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.engines import Engine, Lost, Run, Tasks
from jaxdqn.sweeps.stage import Stage

PROBE_SECONDS = 120.0


class Task(NamedTuple):
    """A process, where its answer comes from, and what it holds of ours: closed when this process ends, however."""

    process: Any
    answer: Any
    life: Any


def engine(num_devices: int | None) -> Engine:
    """Stages in processes of their own. This process keeps off the GPUs. Raises `UserError`."""
    import jax

    gpus = count_gpus()
    jax.config.update("jax_platforms", "cpu")  # of this process alone, and only where its backend has not started
    available = gpus or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if num_devices is not None and num_devices > available:
        raise UserError(f"num_devices {num_devices} asked, but this machine has {available}; ask for at most that.")
    tasks = Tasks(num_devices or available, functools.partial(start, on_gpu=gpus > 0), wait, result, stop)
    return lambda stages, run: engines.side_by_side(stages, run, tasks)


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


def start(stage: Stage, run: Run, num_devices: int, slot: int, on_gpu: bool) -> Task:
    """Starts `stage` on devices slot * num_devices and following."""
    context = multiprocessing.get_context("spawn")  # a forked JAX hangs
    ours, theirs = context.Pipe(duplex=False)
    watched, life = context.Pipe(duplex=False)
    visible = visible_gpus(slot * num_devices, num_devices) if on_gpu else None
    arguments = (stage, str(run.folder), num_devices, run.checkpoint_seconds, visible, theirs, watched)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    theirs.close()
    watched.close()
    return Task(process, ours, life)


def visible_gpus(first: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a task: `count` from the `first` on of those that this process may use."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(index) for index in range(first + count)]
    return ",".join(names[first : first + count])


def wait(tasks: list[Task], seconds: float) -> list[Task]:
    """The tasks that have ended after at most `seconds`."""
    ended = set(multiprocessing.connection.wait([task.process.sentinel for task in tasks], seconds))
    return [task for task in tasks if task.process.sentinel in ended]


def result(task: Task) -> str:
    """The status of a task that has ended. Raises `Lost`, and the `UserError` of the stage."""
    task.process.join()
    if not task.answer.poll():
        raise Lost(f"its process ended with code {task.process.exitcode}")
    try:
        kind, value = task.answer.recv()
    except EOFError:
        raise Lost(f"its process ended with code {task.process.exitcode}") from None
    if kind == "error":
        raise UserError(value)
    return str(value)


def stop(task: Task) -> None:
    """Asks a task to save and end."""
    task.process.terminate()


def _child(
    stage: Stage,
    folder: str,
    num_devices: int,
    checkpoint_seconds: float,
    visible: str | None,
    answer: Any,
    parent: Any,
) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's go to all; the parent tells us by SIGTERM
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    prepare(num_devices)
    try:
        answer.send(("status", _stage.execute(stage, pathlib.Path(folder), num_devices, checkpoint_seconds)))
    except (UserError, OSError) as error:  # such as a full disk: another attempt would fail as this one
        with contextlib.suppress(OSError):  # nobody may be there any more
            answer.send(("error", str(error)))


def _end_with(parent: Any) -> None:
    """Asks this process to save and end once its parent has gone, be it killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os.kill(os.getpid(), signal.SIGTERM)


def prepare(num_devices: int) -> None:
    """Sets up JAX in a process that trains a stage."""
    from jaxdqn.parallel.compiled import devices

    devices.prepare_cache()
    devices.prepare_cpu(num_devices, one_thread_each=True)
