"""Stages as Ray tasks, on this machine or on a cluster. Optional: the extra `ray`.

The sweep's directory must be the same for all machines: a shared file system.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous import ray_engine
from jaxdqn.sweeps import engines
from jaxdqn.sweeps import stage as _stage
from jaxdqn.sweeps.engines import Engine, Lost, Run, Tasks
from jaxdqn.sweeps.stage import Stage


@contextlib.contextmanager
def running(address: str | None, num_devices: int | None) -> Iterator[Engine]:
    """Stages as tasks of the cluster at `address`, or of a Ray of their own. Raises `UserError`."""
    with ray_engine.cluster(address):
        import ray

        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        available = int(resources[kind])
        if num_devices is not None and num_devices > available:
            raise UserError(f"num_devices {num_devices} asked, but Ray has {available} {kind}s; ask for at most that.")

        def start(stage: Stage, run: Run, share: int, slot: int) -> Any:
            del slot
            # One task a process: the next one may get other devices, and memory is given back.
            options: dict[str, Any] = {"max_calls": 1, "max_retries": 0, "num_cpus": share}
            if kind == "GPU":
                on_gpu = {"env_vars": {"JAX_PLATFORMS": ""}}
                options = {**options, "num_gpus": share, "num_cpus": 1, "runtime_env": on_gpu}
            task: Any = ray.remote(**options)(_task)
            return task.remote(stage, str(run.folder.resolve()), share, run.checkpoint_seconds)

        tasks = Tasks(num_devices or available, start, _wait, _result, ray.cancel)
        yield lambda stages, run: engines.side_by_side(stages, run, tasks)


def _task(stage: Stage, folder: str, num_devices: int, checkpoint_seconds: float) -> tuple[str, str]:
    from jaxdqn.sweeps import processes

    processes.prepare(num_devices)
    try:
        return "status", _stage.execute(stage, pathlib.Path(folder), num_devices, checkpoint_seconds)
    except UserError as error:
        return "error", str(error)


def _wait(tasks: list[Any], seconds: float) -> list[Any]:
    import ray

    return list(ray.wait(tasks, num_returns=1, timeout=seconds)[0])


def _result(task: Any) -> str:
    import ray

    try:
        kind, value = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise Lost(type(error).__name__) from None
    if kind == "error":
        raise UserError(value)
    return str(value)
