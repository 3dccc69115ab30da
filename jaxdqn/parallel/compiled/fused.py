"""One compiled loop: single agents, populations of them, and agents over several devices."""

from typing import NamedTuple

from jaxdqn.parallel.compiled import runner
from jaxdqn.parallel.scheme import Built, Devices, Job, Scheme


class Axes(NamedTuple):
    """It has none: members and devices are asked for by --num-seeds, --vary, --num-devices and --devices-per-agent."""


def build(job: Job[Axes]) -> Built:
    """The runner of a batch of members."""
    return runner.build(job.components, job.devices, job.devices_per_agent, job.assignment, job.seeds, job.settings)


FUSED = Scheme(
    Axes,
    build,
    lambda axes, components: runner.shard_bytes(components),
    lambda axes: Devices(useful=None),
    population=True,
    divides_iterations=True,
    measured=True,
)
