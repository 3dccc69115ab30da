"""What a sweep will take, before anything is compiled: trials, groups, bytes, and roughly how long."""

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdqn.components import make_components
from jaxdqn.config import Config
from jaxdqn.sweeps import rounds, samplers
from jaxdqn.sweeps.evolution import generation_ends
from jaxdqn.sweeps.space import Choices
from jaxdqn.sweeps.sweep import Sweep, Trial, grouped
from jaxdqn.timeline import advice, timeline

MAX_STATIC = 1_000
OVERHEAD = 4.0  # all else an iteration does, and what its matrix products lose; measured on CartPole and Breakout


class Plan(NamedTuple):
    """Numbers of a sweep. With a sampler that learns from scores, groups are those that may come up.

    bytes_per_device: of the largest batch of members; seconds: a rough estimate of the training, by the arithmetic of
    its gradient updates.
    """

    num_trials: int
    num_members: int
    num_groups: int
    batches_per_group: int
    bytes_per_device: int
    num_devices: int
    env_steps: int
    seconds: float


def plan(sweep: Sweep, num_devices: int | None) -> Plan:
    """Checks every trial or, where they are not known before, every combination of static values.

    Raises `UserError`.
    """
    from jaxdqn.runs import experiment

    sampler = sweep.sampler
    if sampler.adaptive:
        samplers.next_round(sweep.space, sampler, 0, [])  # a missing package is an error of now
        trials, count = _static_combinations(sweep), sampler.trials or 0
    else:
        values_of = samplers.points if sweep.population_based else samplers.once
        trials = [Trial(number, values) for number, values in enumerate(values_of(sweep.space, sampler))]
        count = len(trials)
    groups = grouped(sweep, trials)
    seeds = sweep.seeds.all
    ends = generation_ends(sweep) if sweep.population_based else ()
    largest, batches, devices, seconds, steps = 0, 1, 1, 0.0, 0
    for group in groups:
        share = len(group.trials) if not sampler.adaptive else min(sampler.batch, count)
        fractions = _kept(sweep, ends or rounds.ends_of(sweep, group.config))
        spec, _, budget = experiment.plan(
            group.config, sweep.hparams_of(group.config), seeds, [{}] * share, num_devices, 1
        )
        lanes = -(-spec.members_per_batch // spec.num_devices)
        largest = max(largest, budget.shard_bytes * lanes)
        batches, devices = max(batches, budget.num_batches), max(devices, spec.num_devices)
        members = (len(group.trials) if not sampler.adaptive else count / len(groups)) * len(seeds) * fractions
        members += sweep.winners.trials * sweep.winners.seeds / len(groups)
        line = timeline(group.config)
        steps += int(members * line.total * line.steps_per_iteration)
        seconds += (
            members * line.updates(line.total, 1) * group.config.updates_per_iteration * _update_flops(group.config)
        )
    return Plan(
        count,
        count * len(seeds),
        len(groups),
        batches,
        largest,
        devices,
        steps,
        OVERHEAD * seconds / (_flops_per_second() * devices),
    )


def described(plan: Plan, sweep: Sweep) -> list[str]:
    """The plan for people, one line each."""
    from jaxdqn.parallel.compiled import memory

    up_to = "up to " if sweep.sampler.adaptive else ""
    batches = f" in {plan.batches_per_group} batches" if plan.batches_per_group > 1 else ""
    lines = [f"warning: {line}" for line in advice(sweep.config, sweep.hparams)]
    lines += [
        f"{plan.num_trials} trials x {len(sweep.seeds.all)} seeds = {plan.num_members} members, in {up_to}"
        f"{plan.num_groups} compiled group(s){batches}; {memory.gib(plan.bytes_per_device)} per device, "
        f"{plan.num_devices} device(s)",
        f"about {plan.env_steps:,} environment steps, very roughly {duration(plan.seconds)} of training (by the "
        "arithmetic of the gradient updates and the speed of this machine's matrix products), and some seconds for "
        "each program that is compiled",
    ]
    asked = sweep.sampler.trials
    if asked is not None and plan.num_trials < asked:
        lines.append(f"note: of {asked} points {asked - plan.num_trials} repeat others, and are left out.")
    elif sweep.sampler.name == "sobol" and plan.num_trials & (plan.num_trials - 1):
        lines.append(f"note: Sobol points are even for powers of two; {plan.num_trials} trials are not one.")
    if plan.num_groups > 50:
        lines.append(
            f"note: {plan.num_groups} groups are compiled one by one; search fewer static fields, or in choices."
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _static_combinations(sweep: Sweep) -> list[Trial]:
    """A trial for every combination of static values; of ranges only the ends."""
    axes = []
    for parameter in sweep.space.parameters:
        domain = parameter.domain
        ends = domain.values if isinstance(domain, Choices) else (domain.at(0.0), domain.at(1.0))
        axes.append(ends if not parameter.traced else ends[:1])
    points = itertools.islice(itertools.product(*axes), MAX_STATIC)
    return [
        Trial(number, sweep.space.active(dict(zip(sweep.space.names, point, strict=True))))
        for number, point in enumerate(points)
    ]


def _kept(sweep: Sweep, ends: Sequence[int]) -> float:
    """The part of the whole budget that is trained where the rest is stopped early."""
    if sweep.halving is None:
        return 1.0
    lengths = np.diff([0, *ends]) / ends[-1]
    return float(sum(length * sweep.halving.keep**rung for rung, length in enumerate(lengths)))


def _update_flops(config: Config) -> float:
    """Floating-point operations of one gradient update, counted in its program before compilation."""
    import jax
    import jax.numpy as jnp

    from jaxdqn import training
    from jaxdqn.base import Progress

    components = make_components(config)

    def update(key: jax.Array) -> object:
        agent, replay = components.agent, components.replay
        progress = Progress(jnp.int32(config.n_step), jnp.int32(0), jnp.int32(0))
        learner, ring = agent.init(key, agent.defaults), replay.init()
        return training.update_once(agent, replay, None, learner, ring, progress, (key, key), agent.defaults)[0]

    cost = jax.jit(update).lower(jax.random.key(0)).cost_analysis()
    return float(cost.get("flops", 0.0)) if cost else 0.0


def _flops_per_second(size: int = 64, repeats: int = 200) -> float:
    """What one core does in small matrix products: the best of many, since others may use it, too."""
    one = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)
