"""What a run is: `Config` (static: shapes, loop lengths, callables) and `HParams` (traced: only arithmetic).

One question decides: does the value reach Python, or only arithmetic? A sweep over `HParams` is a `vmap` with one
compilation; a sweep over `Config` is a loop over compiled groups. Nothing here imports JAX, so `--help` is quick.
"""

import contextlib
import dataclasses
import itertools
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxdqn.errors import UserError, shown, unknown_name

INT32_MAX, UINT32_MAX = 2**31 - 1, 2**32 - 1
FLOAT_WHOLE = 2**24  # up to here a float32 counts every whole number
MAX_MEMBERS = 100_000
MOST, MOST_WIDE = 10**15, 10**6
LARGEST, LEAST = 1e38, 1.1754944e-38  # of a float32; smaller ones are 0 on most devices
LEAST_ITERATIONS = 2_000
MOST_EPISODES = 1_000_000
LONGEST_NAME = 100  # directories are named after environments and agents


class HParams(NamedTuple):
    """Hyperparameters that are traced as float32 scalars; any may differ between the members of a population."""

    learning_rate: float = 5e-4
    """Step size of the optimizer."""
    learning_rate_end: float = 1.0
    """Factor on the learning rate from learning_rate_updates on, approached linearly; 1 keeps it constant."""
    learning_rate_updates: float = 50_000.0
    """Gradient updates over which the learning rate changes."""
    gamma: float = 0.99
    """Discount per environment step."""
    target_period: float = 500.0
    """Gradient updates between two updates of the target network; a whole number."""
    target_tau: float = 1.0
    """How far the target network moves towards the online one at each of its updates; 1 copies it."""
    epsilon_begin: float = 1.0
    """Exploration at environment step 0."""
    epsilon_end: float = 0.05
    """Exploration after epsilon_steps."""
    epsilon_steps: float = 100_000.0
    """Environment steps (of all environments together) over which epsilon falls."""
    ladder_power: float = 0.0
    """Spread of the per-environment epsilons: environment i of N has epsilon^(1 + power * i / (N - 1)); 0 is none."""
    max_grad_norm: float = 10.0
    """Bound on the global gradient norm; inf turns it off."""
    huber_delta: float = 1.0
    """Where the Huber loss becomes linear; unused by the squared loss."""
    reward_scale: float = 1.0
    """Factor on every reward the learner sees; reported returns are unscaled."""
    optimizer_epsilon: float = 0.0
    """Denominator constant; 0 takes the optimizer's usual one: 1e-8, and .01 of RMSProp, whose constant is added to the
    variance (Mnih et al., 2015)."""
    value_weight: float = 0.5
    """Weight of the squared value error of actor-critic agents."""
    entropy_weight: float = 0.01
    """Weight of the entropy bonus of actor-critic agents."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW; unused by the other optimizers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The static half of a run. Sizes are per agent: of D devices each holds 1/D of environments, batch, replay."""

    env: str = "CartPole-v1"
    """Environment id; `python experiments/list.py` shows all."""
    env_params: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Environment parameters: --env-params.max-steps-in-episode 200."""
    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Environment constructor arguments: --env-kwargs.use-minimal-action-set False."""
    sticky_actions: float = 0.0
    """Probability that the environment repeats the previous action instead (Machado et al., 2018)."""

    agent: str = "dqn"
    """Agent: dqn, double_dqn, ensemble_dqn, partitioned_dqn, a2c or random."""
    network: Literal["auto", "mlp", "minatar", "nature"] = "auto"
    """Torso; auto takes mlp for vectors, minatar for small grids, nature for images of at least 36 x 36."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of the dense layers of the mlp torso."""
    dueling: bool = False
    """Separate value and advantage heads (Wang et al., 2016)."""
    layer_norm: bool = False
    """LayerNorm before each activation of the torso."""
    activation: Literal["relu", "tanh", "silu", "gelu", "elu"] = "relu"
    """Activation function."""
    initializer: Literal["default", "orthogonal"] = "default"
    """Weight initialisation: LeCun normal (flax's default) or orthogonal."""
    convolution: Literal["patches", "lax"] = "patches"
    """How the MinAtar torso convolves: patches times a matrix, or XLA's convolution. Same parameters, same result."""

    ensemble_size: int = 5
    """Networks of ensemble_dqn."""
    ensemble_act: Literal["mean", "vote"] = "mean"
    """How ensemble_dqn acts: by the mean of its members' values, or by their majority vote."""
    num_partitions: int = 4
    """Owners of partitioned_dqn: networks that each own a part of the state space."""

    num_envs: int = 16
    """N: environments stepped in parallel."""
    rollout_length: int = 1
    """T: steps of each environment per iteration."""
    batch_size: int = 128
    """B: transitions per gradient update."""
    updates_per_iteration: int = 1
    """U: gradient updates per iteration; samples per insert are U * B / (T * N)."""
    replay_capacity: int = 100_000
    """Transitions the replay holds; rounded up to whole blocks of T * N."""
    replay: Literal["auto", "uniform", "latest"] = "auto"
    """What is learned from: the ring (uniform), or only the block just acted (latest: on-policy, all T * N of it at
    once, whatever batch_size says); auto takes latest for actor-critic agents."""
    n_step: int = 1
    """Length of the returns; with the latest block at most rollout_length, and what is left of the block."""
    learning_starts: int = 1_000
    """Environment steps with random actions before the first update; 0 for on-policy agents, which forget them."""
    loss: Literal["squared", "huber"] = "squared"
    """Loss on the TD error."""
    optimizer: Literal["adam", "adamw", "rmsprop", "radam"] = "adam"
    """Optimizer; rmsprop is centred with decay .95 (Mnih et al., 2015)."""
    epsilon_schedule: Literal["linear", "exponential"] = "linear"
    """How epsilon falls."""

    total_steps: int = 500_000
    """Environment steps in all; rounded up to whole iterations."""
    log_interval: int | None = None
    """Environment steps between two rows of metrics; default a hundredth of total_steps."""
    eval_interval: int | None = None
    """Environment steps between two greedy evaluations, rounded to rows of metrics; default a 25th of total_steps."""
    eval_episodes: int = 20
    """Greedy episodes per evaluation on the curve, on environments of their own."""
    final_episodes: int = 100
    """Greedy episodes of the kept parameters, once at the end: what final_return is the mean of; 0 leaves them out."""
    eval_max_steps: int = 10_000
    """Bound on the length of a greedy episode, in environment steps."""
    eval_epsilon: float = 0.0
    """Probability of a random action at each step of an evaluation; for games in which nothing else is random."""
    common_evaluation: bool = False
    """Judge all seeds on the same episodes, for paired comparisons; else each seed and evaluation has its own."""

    def __post_init__(self) -> None:
        """NumPy's numbers become Python's, and a list of widths a tuple."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if isinstance(self.hidden_sizes, list):
            object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))

    def resolved(self) -> "Config":
        """The same with every default that depends on another field filled in."""
        log = self.log_interval or max(1, self.total_steps // 100)
        evaluation = self.eval_interval or max(log, self.total_steps // 25)
        return dataclasses.replace(self, log_interval=log, eval_interval=evaluation)


ON_POLICY = ("a2c",)
"""Agents whose loss holds only for actions of the policy they learn: they learn from the latest block."""


def learns_from_latest(config: Config) -> bool:
    """Whether the agent learns from the block just acted, and keeps no other experience. Raises `UserError` where it is
    to have a replay that is wrong for it."""
    if config.agent in ON_POLICY and config.replay == "uniform":
        raise UserError(f"agent {config.agent!r} is on-policy: it cannot learn from replay 'uniform'; leave it 'auto'.")
    return config.agent in ON_POLICY or config.replay == "latest"


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
    # Sampling a ring needs n complete rows; the block just acted is there at once.
    needed = 0 if learns_from_latest(config) else math.ceil(config.n_step / config.rollout_length)
    return Timeline(
        steps_per_iteration=steps,
        prefill=max(prefill, needed),
        total=math.ceil(config.total_steps / steps),
        log_every=log_every,
        eval_every=log_every * max(1, round(config.eval_interval / steps / log_every)),
    )


def advice(config: Config) -> list[str]:
    """What runs, but seldom learns; one line each."""
    iterations, steps = timeline(config).total, config.num_envs * config.rollout_length
    if steps == 1 or iterations >= LEAST_ITERATIONS:
        return []
    return [
        f"num_envs {config.num_envs} x rollout_length {config.rollout_length} leaves {iterations:,} iterations in "
        f"{config.total_steps:,} steps; below {LEAST_ITERATIONS:,} an agent seldom learns. Raise total_steps or lower "
        "num_envs."
    ]


def replay_rows(config: Config) -> int:
    """Rows of N transitions in the ring: capacity rounded up to whole blocks of T rows."""
    block = config.num_envs * config.rollout_length
    return math.ceil(config.replay_capacity / block) * config.rollout_length


def validate(config: Config, num_shards: int = 1) -> None:
    """Raises `UserError` for a configuration that cannot run, in words and with the numbers."""
    if not isinstance(config, Config):
        raise UserError(f"config is {shown(config)}; it must be a Config, such as Config(env='CartPole-v1').")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is str and not (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME):
            raise UserError(f"{field.name} is {shown(value)}; it must be a name.")
        if field.type is float and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{field.name} is {shown(value)}; it must be a number.")
        if field.name.startswith("env_"):
            _validate_arguments(field.name, value)
        allowed = getattr(field.type, "__args__", ())
        if getattr(field.type, "__origin__", None) is Literal and value not in allowed:
            raise unknown_name(field.name, value, allowed)
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{field.name} is {shown(value)}; it must be True or False.")
    _validate_sizes(config)
    _validate_shards(config, num_shards)
    if not 0.0 <= config.sticky_actions < 1.0 - 1e-7:  # nearer to 1, it is 1 as a float32
        raise UserError(f"sticky_actions is {shown(config.sticky_actions)}; it is a probability in [0, 1).")
    if not 0.0 <= config.eval_epsilon <= 1.0:
        raise UserError(f"eval_epsilon is {shown(config.eval_epsilon)}; it is a probability in [0, 1].")
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
    _validate_latest(config)
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
        "eval_max_steps log_interval eval_interval ensemble_size num_partitions"
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
    for name in ("ensemble_size", "num_partitions"):
        if getattr(config, name) > MOST_WIDE:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at most {MOST_WIDE:,}.")
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


def _validate_arguments(name: str, given: Any) -> None:
    """What config.yaml can hold, and no more: {name: value} of plain values."""
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UserError(f"{name} is {shown(given)}; it must be {{name: value}}.")
    for key, value in given.items():
        if not _is_plain(value):
            raise UserError(f"{name}.{key} is {shown(value)}; it must be a number, a text, or a list or dict of these.")


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 10 and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return depth < 10 and all(isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _validate_counters(config: Config, line: Timeline) -> None:
    """Counters on the device are int32, and sums between two logging points float32: exact, or refused here."""
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
    if window > FLOAT_WHOLE or steps > INT32_MAX // 2:
        raise UserError(
            f"{window:,} updates and {steps:,} environment steps lie between two logging points; a mean over more "
            f"than {FLOAT_WHOLE:,} and {INT32_MAX // 2:,} of them is not exact. Lower log_interval."
        )


def _validate_latest(config: Config) -> None:
    if learns_from_latest(config) and config.n_step > config.rollout_length:
        raise UserError(
            f"n_step {config.n_step} is longer than the block of rollout_length {config.rollout_length} that agent "
            f"{config.agent!r} learns from; raise rollout_length or lower n_step to {config.rollout_length}."
        )
    if config.agent in ON_POLICY and config.learning_starts:
        raise UserError(
            f"learning_starts is {config.learning_starts}, but agent {config.agent!r} is on-policy and would throw "
            "these steps away; use learning_starts 0."
        )


def check_whole(name: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raises `UserError` for what is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= operator.index(value) <= most:
        raise UserError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most:,}.")


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raises `UserError` for what is no number of at least `least`; infinity is one, NaN is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= least:
        raise UserError(
            f"{name} is {shown(value)}; it must be a number{f' of at least {least:g}' if least > -math.inf else ''}."
        )


def check_probability(name: str, value: Any) -> None:
    """Raises `UserError` for what is no number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name} is {shown(value)}; it is a probability in [0, 1].")


def _validate_shards(config: Config, num_shards: int) -> None:
    for name in ("num_envs", "batch_size"):
        value = getattr(config, name)
        if value % num_shards:
            nearest = max(1, round(value / num_shards)) * num_shards
            raise UserError(
                f"{name} {value} cannot be divided over {num_shards} devices per agent; use {name} {nearest}, say."
            )


COUNTS = ("target_period",)
"""Hyperparameters that are whole numbers."""
COMPLEMENTS = ("gamma",)
"""Hyperparameters that mean their distance from 1, as in the horizon 1 / (1 - gamma); others mean that from 0."""

_RANGES: dict[str, tuple[str, Any]] = {
    "learning_rate": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "learning_rate_end": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "learning_rate_updates": ("above 0", lambda x: x > 0),
    "gamma": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "target_period": (f"from 1 to {FLOAT_WHOLE:,}, a whole one", lambda x: 1 <= x <= FLOAT_WHOLE and x % 1 == 0),
    "target_tau": ("in (0, 1]", lambda x: 0 < x <= 1),
    "epsilon_begin": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "epsilon_end": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "epsilon_steps": ("above 0", lambda x: x > 0),
    "ladder_power": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "max_grad_norm": ("above 0", lambda x: x > 0),
    "huber_delta": ("above 0 and finite", lambda x: 0 < x < math.inf),
    "reward_scale": ("finite", lambda x: abs(x) < math.inf),
    "optimizer_epsilon": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "value_weight": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "entropy_weight": ("finite", lambda x: abs(x) < math.inf),
    "weight_decay": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
}


def validate_hparams(hparams: HParams, epsilon_schedule: str = "linear") -> None:
    """Raises `UserError` where a hyperparameter is out of its range, or another number once it is a float32."""
    if not isinstance(hparams, HParams):
        raise UserError(f"hparams is {shown(hparams)}; it must be HParams, such as HParams(gamma=0.99).")
    for name, value in hparams._asdict().items():
        allowed, test = _RANGES[name]
        # NaN fails every comparison.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not test(value):
            raise UserError(f"hparams.{name} is {shown(value)}; it must be a number {allowed}.")
        if value and not (LEAST <= abs(value) <= LARGEST or abs(value) == math.inf):
            raise UserError(
                f"hparams.{name} is {shown(value)}; as a float32 that is 0 or infinite. It must be 0, or between "
                f"{LEAST:.3g} and {LARGEST:g} in size."
            )
        if epsilon_schedule == "exponential" and name in ("epsilon_begin", "epsilon_end") and value == 0:
            raise UserError(f"hparams.{name} is 0; an exponential schedule needs it above 0.")


Vary = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Settings of `HParams`: field -> values, for every combination of them; or a list of settings, field -> value."""


def settings_of(vary: Vary | None) -> list[dict[str, Any]]:
    """The settings that `vary` stands for, as plain numbers. Raises `UserError` for an unknown field, for what is no
    list of values, and for too many settings."""
    if isinstance(vary, Mapping):
        values = {name: _listed(f"vary.{name}", given, "values") for name, given in vary.items()}
        _check_count(math.prod(len(given) for given in values.values()), "settings of vary")
        settings = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    elif vary is None:
        settings = [{}]
    else:
        settings = _listed("vary", vary, "settings")
        for setting in settings:
            if not isinstance(setting, Mapping):
                raise UserError(f"vary holds {shown(setting)}; a setting is {{field: value}}.")
        settings = [{name: plain(value) for name, value in setting.items()} for setting in settings]
    for name in {name for setting in settings for name in setting}:
        if name not in HParams._fields:
            raise unknown_name("hyperparameter", name, HParams._fields)
    return settings


def check_seeds(seeds: Iterable[Any]) -> tuple[int, ...]:
    """`seeds` as plain numbers; NumPy's are welcome. Raises `UserError` for none, for too many, and for what is no
    whole number in [0, 2^32): keys are made of 32 bits."""
    return tuple(_seed(seed) for seed in _listed("seeds", seeds, "whole numbers"))


def _seed(given: Any) -> int:
    number = None
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError):  # a float, a text
            number = operator.index(given)
    if number is None or not 0 <= number <= UINT32_MAX:
        raise UserError(f"seed is {shown(given)}; seeds are whole numbers from 0 to {UINT32_MAX}.")
    return number


def _listed(name: str, given: Any, what: str) -> list[Any]:
    """The items of a list, an array or a range."""
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise UserError(f"{name} is {shown(given)}; it must be a list of {what}.")
    items = list(itertools.islice(map(plain, given), MAX_MEMBERS + 1))
    if not items:
        raise UserError(f"{name} is an empty list; it needs at least one of its {what}.")
    _check_count(len(items), f"or more {what} in {name}")
    return items


def plain(value: Any) -> Any:
    """NumPy's and JAX's numbers and arrays as Python's, also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def plain_hparams(hparams: HParams) -> HParams:
    """The same in plain numbers."""
    return HParams(*map(plain, hparams)) if isinstance(hparams, HParams) else hparams


def _check_count(count: int, what: str) -> None:
    if count > MAX_MEMBERS:
        raise UserError(f"{count:,} {what}; at most {MAX_MEMBERS:,} members fit one run.")


def varying(vary: Vary | None) -> tuple[str, ...]:
    """The fields that differ between the settings of `vary`."""
    settings = settings_of(vary)
    names = dict.fromkeys(name for setting in settings for name in setting)
    return tuple(name for name in names if len({setting.get(name) for setting in settings}) > 1)


def members(
    hparams: HParams,
    seeds: Iterable[Any],
    vary: Vary | None = None,
    epsilon_schedule: str = "linear",
) -> list[tuple[int, HParams]]:
    """Every setting of `vary` with every seed: (seed, HParams) pairs. Raises `UserError`."""
    seeds = check_seeds(seeds)
    settings = [hparams._replace(**setting) for setting in settings_of(vary)]
    _check_count(len(settings) * len(seeds), f"members ({len(settings):,} settings x {len(seeds):,} seeds)")
    for setting in settings:
        validate_hparams(setting, epsilon_schedule)
    return [(seed, setting) for setting in settings for seed in seeds]


def check_replicates(everyone: Sequence[tuple[int, HParams]]) -> None:
    """Raises `UserError` for a (seed, setting) that is there twice: a replicate has a seed of its own."""
    seen: set[tuple[Any, ...]] = set()
    for seed, setting in everyone:
        member = seed, *map(float, setting)
        if member in seen:
            raise UserError(
                f"two members are the same run: seed {seed} with the same hyperparameters. Give each seed, and each "
                "setting of vary, once."
            )
        seen.add(member)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain types only, for YAML."""
    return {**dataclasses.asdict(config), "hidden_sizes": list(config.hidden_sizes)}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises `UserError` for an unknown field."""
    known = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in known:
            raise unknown_name("configuration field", name, known)
    return Config(**values)
