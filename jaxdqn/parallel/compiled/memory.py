"""The memory planner: bytes are computed before anything is allocated, and refused with numbers."""

import functools
import gc
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax

from jaxdqn.base import PyTree
from jaxdqn.components import Components, in_programs
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled.host_memory import host_bytes

MOST_REGIONS = 20_000
MOST_KEPT = 32
T = TypeVar("T")
HEADROOM = 0.8  # of the free memory; the rest is for temporaries, the program and Python


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays (or `ShapeDtypeStruct`s) in a tree."""

    def leaf_bytes(leaf: PyTree) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return int(leaf.size) * leaf.dtype.itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def available_bytes(devices: list[jax.Device]) -> int:
    """Free memory for one of `devices`; host memory is shared among CPU devices."""
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return host_bytes() // len(devices)


def mapped_regions() -> int:
    """Memory regions that this process has mapped; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


_programs: dict[Hashable, Any] = {}  # by what they were compiled of, oldest first


def remembered(key: Hashable, compile_them: Callable[[], T]) -> T:
    """What was compiled for `key` in this process, or compile_them(): stages of a sweep, runs that go on and notebooks
    train the same programs again, and tracing them takes longer than many a chunk. The newest MOST_KEPT are kept."""
    found = _programs.pop(key, None) or compile_them()
    _programs[key] = found
    while len(_programs) > MOST_KEPT:
        del _programs[next(iter(_programs))]
    return found


def once_each(compile_them: Callable[..., T]) -> Callable[..., T]:
    """compile_them(components, *args), `remembered` by what the programs depend on; `args` are hashable."""

    @functools.wraps(compile_them)
    def found(components: Components, *args: Hashable) -> T:
        key = compile_them.__qualname__, components._replace(config=in_programs(components.config)), args
        return remembered(key, lambda: compile_them(components, *args))

    return found


def forget_programs(most: int = MOST_REGIONS) -> None:
    """Lets go of compiled programs that nobody uses, where there are many.

    Linux lets a process map 65,530 regions, and a runner's programs on a CPU take more than a thousand (measured); JAX
    keeps them in its caches, and XLA crashes where no region is left: after some fifty stages of a sweep.
    """
    if mapped_regions() > most:
        _programs.clear()
        gc.collect()
        jax.clear_caches()
        gc.collect()


class Plan(NamedTuple):
    """How a population fits: bytes of one shard of one member, of its replay alone, and members per batch."""

    shard_bytes: int
    replay_bytes: int
    members_per_batch: int
    num_batches: int


def plan(shard_bytes: int, replay_bytes: int, num_members: int, num_groups: int, bytes_per_device: int) -> Plan:
    """Splits `num_members` into the fewest batches whose lanes fit the memory of each device.

    Raises `UserError` where not even one fits.
    """
    usable = int(bytes_per_device * HEADROOM)
    lanes = usable // shard_bytes
    if lanes < 1:
        left = usable - (shard_bytes - replay_bytes)
        advice = f"lower replay_capacity to {100 * left // replay_bytes} % of what it is, or raise devices_per_agent"
        if left < replay_bytes / 100:
            advice = "use a smaller network, fewer environments or fewer eval_episodes"
        raise UserError(
            f"one agent needs {gib(shard_bytes)} per device ({gib(replay_bytes)} of it replay) and {gib(usable)} of "
            f"{gib(bytes_per_device)} free memory can be used; {advice}."
        )
    num_batches = -(-num_members // (lanes * num_groups))
    return Plan(shard_bytes, replay_bytes, -(-num_members // num_batches), num_batches)


def gib(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"
