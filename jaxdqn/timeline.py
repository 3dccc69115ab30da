"""When things happen in a run, in iterations of T * N environment steps."""

import math
from typing import NamedTuple

from jaxdqn import agents
from jaxdqn.config import Config, HParams

LEAST_UPDATES = 2_000


class Timeline(NamedTuple):
    """When things happen, in iterations of T * N environment steps."""

    steps_per_iteration: int
    prefill: int
    total: int
    log_every: int
    eval_every: int

    def updates(self, iteration: int, updates_per_iteration: int) -> int:
        """Gradient updates done after `iteration` iterations."""
        return max(0, iteration - self.prefill) * updates_per_iteration

    def is_point(self, iteration: int) -> bool:
        """Whether metrics are logged after `iteration` iterations."""
        return iteration % self.log_every == 0 or iteration == self.total

    def is_evaluated(self, iteration: int) -> bool:
        """Whether a logging point has a greedy evaluation."""
        return iteration % self.eval_every == 0 or iteration == self.total


def timeline(config: Config) -> Timeline:
    """The iterations at which prefill ends, metrics are logged and evaluations happen."""
    config = config.resolved()
    assert config.log_interval and config.eval_interval
    steps = config.num_envs * config.rollout_length
    log_every = max(1, round(config.log_interval / steps))
    prefill = math.ceil(config.learning_starts / steps)
    needed = math.ceil(agents.rows_needed(config) / config.rollout_length)
    return Timeline(
        steps_per_iteration=steps,
        prefill=max(prefill, needed),
        total=math.ceil(config.total_steps / steps),
        log_every=log_every,
        eval_every=log_every * max(1, round(config.eval_interval / steps / log_every)),
    )


def num_updates(config: Config) -> int:
    """Gradient updates of a whole run."""
    line = timeline(config)
    return line.updates(line.total, config.updates_per_iteration)


def advice(config: Config, hparams: HParams) -> list[str]:
    """What runs, but seldom learns; one line each."""
    lines, updates = [], num_updates(config)
    steps = config.num_envs * config.rollout_length
    # On-policy, a few large updates are enough.
    if not agents.of(config.agent).on_policy and steps > 1 and updates < LEAST_UPDATES:
        lines.append(
            f"num_envs {config.num_envs} x rollout_length {config.rollout_length} leaves {updates:,} gradient updates "
            f"in {config.total_steps:,} steps; below {LEAST_UPDATES:,} an agent seldom learns. Raise total_steps or "
            "lower num_envs."
        )
    return [*lines, *of_rate(config, hparams)]


def of_rate(config: Config, hparams: HParams) -> list[str]:
    """Advice where the learning rate is 0 long before the end, which may be since a run was extended."""
    updates, falls = num_updates(config), hparams.learning_rate_updates
    if hparams.learning_rate_end != 0 or updates <= 1.1 * falls:
        return []
    return [
        f"the learning rate is 0 from update {falls:,g} on, of {updates:,}; raise learning_rate_updates to that, "
        "as only a new run can."
    ]
