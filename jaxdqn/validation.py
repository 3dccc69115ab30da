"""What cannot run, said in words and with the numbers before anything is made or compiled."""

import dataclasses
import math

from jaxdqn import agents
from jaxdqn.config import (
    FLOAT_WHOLE,
    INT32_MAX,
    MOST,
    MOST_EPISODES,
    MOST_SECONDS,
    MOST_SUMMED,
    MOST_WIDE,
    Config,
    check_fields,
    check_number,
    replay_rows,
)
from jaxdqn.errors import UserError, shown
from jaxdqn.timeline import Timeline, timeline


def validate(config: Config, num_shards: int = 1) -> None:
    """Raises `UserError` for a configuration that cannot run, in words and with the numbers."""
    if not isinstance(config, Config):
        raise UserError(f"config is {shown(config)}; it must be a Config, such as Config(env='CartPole-v1').")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    check_fields(Config, values)
    for name in ("env_params", "env_kwargs"):
        _validate_arguments(name, values[name])
    _validate_sizes(config)
    agents.check(config)
    check_divides(config, num_shards, "devices per agent")
    if not 0.0 <= config.sticky_actions < 1.0 - 1e-7:  # nearer to 1, it is 1 as a float32
        raise UserError(f"sticky_actions is {shown(config.sticky_actions)}; it is a probability in [0, 1).")
    if not 0.0 <= config.eval_epsilon <= 1.0:
        raise UserError(f"eval_epsilon is {shown(config.eval_epsilon)}; it is a probability in [0, 1].")
    check_number("env_timeout", config.env_timeout)
    if config.env_timeout != math.inf and not 0 < config.env_timeout <= MOST_SECONDS:
        raise UserError(
            f"env_timeout is {shown(config.env_timeout)}; it must be above 0 and at most {MOST_SECONDS:,}, in seconds; "
            "inf waits."
        )
    steps = config.num_envs * config.rollout_length
    capacity = replay_rows(config) * config.num_envs
    if config.batch_size > capacity:
        raise UserError(
            f"batch_size {config.batch_size} is larger than the replay of {capacity} transitions; "
            "lower batch_size or raise replay_capacity."
        )
    if config.n_step >= replay_rows(config):
        raise UserError(
            f"n_step {config.n_step} needs more than the {replay_rows(config)} rows of {config.num_envs} "
            "transitions the replay holds; lower n_step or raise replay_capacity."
        )
    agents.replay_of(config).check(agents.with_settings(config))
    needed = agents.rows_needed(config)
    if needed > replay_rows(config):
        raise UserError(
            f"the replay needs {needed} rows before it can be sampled, and holds {replay_rows(config)} of "
            f"{config.num_envs} transitions; raise replay_capacity."
        )
    if agents.of(config.agent).on_policy and config.learning_starts:
        raise UserError(
            f"learning_starts is {config.learning_starts}, but agent {config.agent!r} is on-policy and would throw "
            "these steps away; use learning_starts 0."
        )
    line = timeline(config)
    if line.prefill >= line.total:
        raise UserError(
            f"learning never starts: the first {line.prefill * steps} steps only fill the replay and total_steps is "
            f"{config.total_steps}; raise total_steps or lower learning_starts."
        )
    _validate_counters(config, line)


def _validate_sizes(config: Config) -> None:
    positive = (
        "num_envs rollout_length batch_size updates_per_iteration replay_capacity n_step total_steps eval_episodes "
        "eval_max_steps log_interval eval_interval"
    )
    for name in positive.split():
        value = getattr(config, name)
        if value is None and name.endswith("_interval"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {shown(value)}; it must be a whole number of at least 1.")
        if value > MOST:
            raise UserError(f"{name} is {shown(value)}; it must be at most {MOST:,}.")
    for name, most in (
        ("rollout_length", INT32_MAX),
        ("updates_per_iteration", INT32_MAX),
        ("eval_episodes", INT32_MAX),
        ("eval_max_steps", FLOAT_WHOLE),  # a longer episode's return would stand still
    ):
        if getattr(config, name) > most:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at most {most}.")
    for name, most in (("learning_starts", MOST), ("final_episodes", MOST_EPISODES)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise UserError(f"{name} is {shown(value)}; it must be a whole number of at least 0, at most {most:,}.")
    widths = config.hidden_sizes
    whole = isinstance(widths, tuple) and all(isinstance(w, int) and not isinstance(w, bool) for w in widths)
    if not whole or not widths or not all(0 < width <= MOST_WIDE for width in widths):
        raise UserError(
            f"hidden_sizes is {shown(widths)}; it must be one or more whole numbers above 0, at most {MOST_WIDE:,}."
        )


def _validate_arguments(name: str, given: object) -> None:
    """What config.yaml can hold, and no more: {name: value} of plain values."""
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UserError(f"{name} is {shown(given)}; it must be {{name: value}}.")
    for key, value in given.items():
        if not _is_plain(value):
            raise UserError(f"{name}.{key} is {shown(value)}; it must be a number, a text, or a list or dict of these.")


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 10 and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return depth < 10 and all(isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _validate_counters(config: Config, line: Timeline) -> None:
    """Counters on the device are int32, and sums between two logging points float32: exact, or right to a percent, or
    refused here."""
    length, updates = config.rollout_length, config.updates_per_iteration
    counted = {
        "transitions in the replay": (replay_rows(config) + config.n_step) * config.num_envs,
        "iterations": line.total,
        # Also those of a worker that fills its replay while others learn.
        "rows of experience (iterations x rollout_length)": (line.total + line.prefill) * length,
        "gradient updates": line.updates(line.total, updates),
    }
    for what, count in counted.items():
        if count >= INT32_MAX:
            raise UserError(
                f"the run has {count:,} {what}, and counters end at {INT32_MAX}; lower total_steps or "
                "replay_capacity, or raise num_envs."
            )
    iterations = min(line.log_every, line.total)
    window, steps = iterations * max(1, updates), iterations * line.steps_per_iteration
    if max(window, iterations * length) > MOST_SUMMED or steps > INT32_MAX // 2:
        raise UserError(
            f"{window:,} updates, {iterations * length:,} rows of experience and {steps:,} environment steps lie "
            f"between two logging points; of more than {MOST_SUMMED:,} updates or rows, or {INT32_MAX // 2:,} steps, a "
            "float32 mean is wrong. Lower log_interval."
        )


def check_divides(config: Config, count: int, what: str) -> None:
    """Raises `UserError` where environments and batch cannot be divided over `count` of something."""
    for name in ("num_envs", "batch_size"):
        value = getattr(config, name)
        if value % count:
            nearest = max(1, round(value / count)) * count
            raise UserError(f"{name} {value} cannot be divided over {count} {what}; use {name} {nearest}, say.")
