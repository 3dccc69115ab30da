"""Devices: the only file that says `pmap`, and the only one that configures the backend.

A function over devices takes and returns arrays with a leading axis [D, ...], one slice per device; `shared`
arguments have none. One agent over several devices is a group of that axis (`Shards`), over which gradients are
averaged. On several hosts the devices are those of all processes, and each process holds only its own slices.
"""

import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax

from jaxdqn.base import PyTree
from jaxdqn.errors import UserError
from jaxdqn.learning import Shards

AXIS = "devices"
MAX_CPU_DEVICES = 8


def prepare_cpu(num_devices: int, one_thread_each: bool) -> None:
    """Makes the CPU appear as `num_devices` devices; call before the JAX backend starts, it is ignored after that.

    `one_thread_each` keeps XLA from spreading one small matmul over all cores, which costs a small network a quarter
    of its speed and gains a convolution. LAPACK, which SciPy loads later, gets one thread where nothing else is asked
    for: on cores that also do other work its threads wait for one another, some 700 ms in an SVD of 256 x 84 that takes
    one of them 0.6 ms (measured).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    jax.config.update("jax_num_cpu_devices", num_devices)
    if one_thread_each:
        os.environ["PJRT_NPROC"] = "1"


def prepare_cache() -> None:
    """Turns JAX's persistent compilation cache on, in JAXDQN_CACHE or the user's cache folder; where neither can be
    written, programs are compiled anew by every process."""
    try:
        cache = os.environ.get("JAXDQN_CACHE") or str(pathlib.Path.home() / ".cache" / "jaxdqn")
        os.makedirs(cache, exist_ok=True)
    except (RuntimeError, OSError):  # no home directory; one that is not there, or read-only
        return
    if not os.access(cache, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def choose(num_devices: int | None, devices_per_agent: int, num_members: int) -> list[jax.Device]:
    """The devices to use: `num_devices` of those JAX has, by default all that have work; equally many of each process,
    process by process.

    Raises `UserError` where there are too few, or they cannot be divided among agents or processes.
    """
    processes = jax.process_count()
    by_process = [jax.local_devices(process) for process in range(processes)]
    each = min(len(own) for own in by_process)
    available = [device for own in by_process for device in own[:each]]
    unit = math.lcm(max(devices_per_agent, 1), processes)
    useful = -(-devices_per_agent * num_members // unit) * unit
    wanted = num_devices if num_devices is not None else min(len(available) // unit * unit, useful)
    if wanted < 1 or devices_per_agent < 1 or wanted % devices_per_agent:
        raise UserError(
            f"num_devices {num_devices if num_devices is not None else len(available)} cannot be divided among agents "
            f"of devices_per_agent {devices_per_agent}; it must be a multiple of it, and at least 1."
        )
    if wanted > len(available):
        raise UserError(
            f"num_devices {wanted} asked, but JAX has {len(available)} ({available[0].device_kind}); ask for at most "
            f"{len(available)}."
        )
    if wanted % processes:
        raise UserError(f"num_devices {wanted} does not divide among {processes} processes; take a multiple.")
    # A group without a member would only repeat another's work.
    share = min(wanted, useful) // processes
    return [device for own in by_process for device in own[:share]]


def own(devices: Sequence[jax.Device]) -> slice:
    """Which of `devices`, as `choose` returns them, are this process's."""
    share = len(devices) // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def make_shards(num_devices: int, devices_per_agent: int) -> Shards | None:
    """How an agent of `devices_per_agent` devices finds its group; None where each agent has one device."""
    if devices_per_agent == 1:
        return None
    if devices_per_agent == num_devices:
        return Shards(AXIS, devices_per_agent)
    starts = range(0, num_devices, devices_per_agent)
    return Shards(AXIS, devices_per_agent, tuple(tuple(range(i, i + devices_per_agent)) for i in starts))


def over_devices(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    num_mapped: int,
    num_shared: int = 0,
    donate: Sequence[int] = (),
) -> jax.stages.Wrapped:
    """function(*mapped, *shared) on each device, compiled; shared arguments are the same on all of them.

    The result has `.lower(...)` as jitted functions have. Arguments numbered in `donate` are donated.
    """
    if len(devices) > 1:
        in_axes = (0,) * num_mapped + (None,) * num_shared
        return jax.pmap(function, AXIS, in_axes=in_axes, devices=devices, donate_argnums=tuple(donate))

    def on_one(*args: object) -> PyTree:
        mapped = jax.tree.map(lambda x: x[0], args[:num_mapped])
        return jax.tree.map(lambda x: x[None], function(*mapped, *args[num_mapped:]))

    return jax.jit(on_one, donate_argnums=tuple(donate))


def compiled(program: jax.stages.Wrapped, *args: PyTree) -> Callable[..., PyTree]:
    """A result of `over_devices`, compiled for arguments like these."""
    executable = program.lower(*args).compile()
    # Over several hosts the executable wants global arrays; `pmap` makes them of slices, and does not compile again.
    return executable if jax.process_count() == 1 else program
