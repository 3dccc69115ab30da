"""What a run is: `Config` (static: shapes, loop lengths, callables) and `HParams` (traced: only arithmetic).

One question decides: does the value reach Python, or only arithmetic? A sweep over `HParams` is a `vmap` with one
compilation; a sweep over `Config` is a loop over compiled groups. What belongs to one agent alone is declared in its
file, and lies in the field `own` of either. Nothing here imports JAX.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, SupportsIndex, get_args, get_origin, get_type_hints

import tyro

from jaxdqn.errors import UserError, shown, unknown_name

INT32_MAX, UINT32_MAX = 2**31 - 1, 2**32 - 1
FLOAT_WHOLE = 2**24  # up to here a float32 counts every whole number
MOST_SUMMED = 2**20  # equal numbers, of which a float32 sum is right to a percent
MAX_MEMBERS = 100_000
MOST, MOST_WIDE = 10**15, 10**6
LARGEST, LEAST = 1e38, 1.1754944e-38  # of a float32; smaller ones are 0 on most devices
LEAST_ITERATIONS = 2_000
MOST_EPISODES = 1_000_000
MOST_SECONDS = 1_000_000_000
LONGEST_NAME = 100  # directories are named after environments and agents


class Range(NamedTuple):
    """The numbers that a hyperparameter may be: in words, and as a test that NaN fails."""

    words: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("at least 0 and finite", lambda x: 0 <= x < math.inf)
POSITIVE = Range("above 0 and finite", lambda x: 0 < x < math.inf)
ABOVE_ZERO = Range("above 0", lambda x: x > 0)
FRACTION = Range("in [0, 1]", lambda x: 0 <= x <= 1)
FINITE = Range("finite", lambda x: abs(x) < math.inf)
NOT_POSITIVE = Range("at most 0 and finite", lambda x: -math.inf < x <= 0)
_PERIOD = Range(f"from 1 to {FLOAT_WHOLE:,}, a whole one", lambda x: 1 <= x <= FLOAT_WHOLE and x % 1 == 0)
_TAU = Range("in (0, 1]", lambda x: 0 < x <= 1)

Own = Annotated[Any, tyro.conf.arg(name="")]
"""A field for what an agent or a scheme declares: its record, whose flags have no prefix; or a dict of some of its
values, which `agents.complete` and `schemes.complete` complete."""


class HParams(NamedTuple):
    """Hyperparameters that are traced as float32 scalars; any may differ between the members of a population."""

    learning_rate: Annotated[float, NOT_NEGATIVE] = 5e-4
    """Step size of the optimizer."""
    learning_rate_end: Annotated[float, NOT_NEGATIVE] = 1.0
    """Factor on the learning rate from learning_rate_updates on, approached linearly; 1 keeps it constant."""
    learning_rate_updates: Annotated[float, ABOVE_ZERO] = 50_000.0
    """Gradient updates over which the learning rate changes."""
    gamma: Annotated[float, FRACTION] = 0.99
    """Discount per environment step."""
    target_period: Annotated[float, _PERIOD] = 500.0
    """Gradient updates between two updates of the target network; a whole number."""
    target_tau: Annotated[float, _TAU] = 1.0
    """How far the target network moves towards the online one at each of its updates; 1 copies it."""
    epsilon_begin: Annotated[float, FRACTION] = 1.0
    """Exploration at environment step 0."""
    epsilon_end: Annotated[float, FRACTION] = 0.05
    """Exploration after epsilon_steps."""
    epsilon_steps: Annotated[float, ABOVE_ZERO] = 100_000.0
    """Environment steps (of all environments together) over which epsilon falls."""
    ladder_power: Annotated[float, NOT_NEGATIVE] = 0.0
    """Spread of the per-environment epsilons: environment i of N has epsilon^(1 + power * i / (N - 1)); 0 is none."""
    max_grad_norm: Annotated[float, ABOVE_ZERO] = 10.0
    """Bound on the global gradient norm; inf turns it off."""
    huber_delta: Annotated[float, POSITIVE] = 1.0
    """Where the Huber loss becomes linear; unused by the squared loss."""
    reward_scale: Annotated[float, FINITE] = 1.0
    """Factor on every reward the learner sees; reported returns are unscaled."""
    reward_clip: Annotated[float, ABOVE_ZERO] = math.inf
    """Bound on the size of every reward the learner sees, before it is scaled; reported returns are unclipped."""
    optimizer_epsilon: Annotated[float, NOT_NEGATIVE] = 0.0
    """Denominator constant; 0 takes the optimizer's usual one: 1e-8, and .01 of RMSProp, whose constant is added to the
    variance (Mnih et al., 2015)."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Weight decay of AdamW; unused by the other optimizers."""
    priority_exponent: Annotated[float, FRACTION] = 0.6
    """Prioritised replay draws in proportion to priorities to this power, alpha; 0 is uniform (Schaul et al., 2016)."""
    importance_begin: Annotated[float, FRACTION] = 0.4
    """Beta: how far importance weights undo what prioritised replay prefers, at the first update; 1 is in full."""
    importance_end: Annotated[float, FRACTION] = 1.0
    """Beta from importance_updates on, approached linearly."""
    importance_updates: Annotated[float, ABOVE_ZERO] = 50_000.0
    """Gradient updates over which beta changes."""
    priority_epsilon: Annotated[float, POSITIVE] = 1e-6
    """What is added to the size of an error to make its priority."""
    own: Own = ()
    """The agent's own: see its file."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The static half of a run. Sizes are per agent: of D devices each holds 1/D of environments, batch, replay."""

    env: str = "CartPole-v1"
    """Environment id; `python experiments/list.py` shows all."""
    env_params: dict[str, object] = dataclasses.field(default_factory=dict)
    """Environment parameters: --env-params.max-steps-in-episode 200."""
    env_kwargs: dict[str, object] = dataclasses.field(default_factory=dict)
    """Environment constructor arguments: --env-kwargs.use-minimal-action-set False."""
    sticky_actions: float = 0.0
    """Probability that the environment repeats the previous action instead (Machado et al., 2018)."""
    env_timeout: float = 60.0
    """Seconds after which an environment on the host that does not answer is given up, and replaced; inf waits."""

    agent: str = "dqn"
    """Agent; `python experiments/list.py` shows all. Its own settings come with it: --agent NAME --help."""
    own: Own = ()
    """The agent's own settings: see its file."""
    network: Literal["auto", "mlp", "minatar", "nips", "nature", "impala"] = "auto"
    """Torso; auto takes mlp for vectors, minatar for small grids, nips for images of at least 32 x 32, nature for those
    of at least 36 x 36. impala is for a GPU."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of the dense layers of the mlp torso."""
    dueling: bool = False
    """Separate value and advantage heads (Wang et al., 2016)."""
    layer_norm: bool = False
    """LayerNorm before each activation of the torso."""
    noisy: bool = False
    """Dense layers with learned noise, the head's too (Fortunato et al., 2018), with their own initialisation; it
    explores, so that epsilon may be 0. Evaluated without noise."""
    activation: Literal["relu", "tanh", "silu", "gelu", "elu"] = "relu"
    """Activation function."""
    initializer: Literal["default", "orthogonal"] = "default"
    """Weight initialisation: LeCun normal (flax's default) or orthogonal."""
    convolution: Literal["patches", "lax"] = "patches"
    """How torsos convolve: patches times a matrix, or XLA's convolution. Same parameters, same result."""

    num_envs: int = 16
    """N: environments stepped in parallel."""
    rollout_length: int = 1
    """T: steps of each environment per iteration."""
    batch_size: int = 128
    """B: transitions, or sequences, per gradient update."""
    updates_per_iteration: int = 1
    """U: gradient updates per iteration; samples per insert are U * B / (T * N)."""
    replay_capacity: int = 100_000
    """Transitions the replay holds; rounded up to whole blocks of T * N."""
    replay: str = "auto"
    """What is learned from: the ring, by equal chances (uniform) or by the size of errors (prioritised); runs of it,
    for agents that learn over time (sequences, prioritised_sequences); or only the block just acted (latest: on-policy,
    all T * N of it at once, whatever batch_size says; minibatches: in shuffled parts of batch_size, for agents that
    compute targets once a block); auto takes what the agent declares."""
    replay_copies: Literal["auto", "one", "two"] = "auto"
    """How often the ring stores an observation: with one, what a step produced is the next row's observation, and
    returns stop one step before a time limit; auto takes one above 32 bytes."""
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

    def __hash__(self) -> int:
        return hash(repr(self))

    def resolved(self) -> "Config":
        """The same with every default that depends on another field filled in."""
        log = self.log_interval or max(1, self.total_steps // 100)
        evaluation = self.eval_interval or max(log, self.total_steps // 25)
        return dataclasses.replace(self, log_interval=log, eval_interval=evaluation)


def replay_rows(config: Config) -> int:
    """Rows of N transitions in the ring: capacity rounded up to whole blocks of T rows."""
    block = config.num_envs * config.rollout_length
    return math.ceil(config.replay_capacity / block) * config.rollout_length


def item_rows(config: Config) -> int:
    """Rows of the ring that an n-step transition reaches over: one more where the last observation is the next row's,
    which "auto" may choose when it sees the environment."""
    return config.n_step + (config.replay_copies != "two")


def check_fields(kind: type, values: Mapping[str, object], prefix: str = "") -> None:
    """Raises `UserError` for a value that is not of its field's type in `kind`, a dataclass or NamedTuple: a name, a
    number, True or False, or one of the choices of a Literal."""
    for name, hint in get_type_hints(kind).items():
        value, choices = values[name], get_args(hint) if get_origin(hint) is Literal else ()
        name = f"{prefix}{name}"
        if hint is str and not (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME):
            raise UserError(f"{name} is {shown(value)}; it must be a name.")
        if hint is float and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{name} is {shown(value)}; it must be a number.")
        if choices and value not in choices:
            raise unknown_name(name, value, choices)
        if hint is bool and not isinstance(value, bool):
            raise UserError(f"{name} is {shown(value)}; it must be True or False.")


def check_whole(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raises `UserError` for what is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or not least <= operator.index(value) <= most:
        raise UserError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most:,}.")


def check_number(name: str, value: object, least: float = -math.inf) -> None:
    """Raises `UserError` for what is no number of at least `least`; infinity is one, NaN is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= least:
        raise UserError(
            f"{name} is {shown(value)}; it must be a number{f' of at least {least:g}' if least > -math.inf else ''}."
        )


def check_probability(name: str, value: float) -> None:
    """Raises `UserError` for what is no number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name} is {shown(value)}; it is a probability in [0, 1].")


COUNTS = ("target_period",)
"""Hyperparameters that are whole numbers."""
COMPLEMENTS = ("gamma",)
"""Hyperparameters that mean their distance from 1, as in the horizon 1 / (1 - gamma); others mean that from 0."""


@functools.cache
def ranges_of(kind: type) -> dict[str, Range]:
    """The ranges in a record of hyperparameters, each of them `name: Annotated[float, RANGE] = default`."""
    hints = get_type_hints(kind, include_extras=True)
    found = {name: [x for x in get_args(hint)[1:] if isinstance(x, Range)] for name, hint in hints.items()}
    return {name: ranges[0] for name, ranges in found.items() if ranges}


def values_of(hparams: HParams) -> dict[str, float]:
    """All hyperparameters by name, the agent's own after the general ones."""
    return {**{name: getattr(hparams, name) for name in GENERAL}, **own_values(hparams.own)}


def with_values(hparams: HParams, values: Mapping[str, float]) -> HParams:
    """`hparams` with other values by name. Raises `UserError` for a name that neither is a general one nor the
    agent's."""
    own = {name: value for name, value in values.items() if name not in GENERAL}
    general = hparams._replace(**{name: value for name, value in values.items() if name in GENERAL})
    if not own:
        return general
    if dataclasses.is_dataclass(hparams.own):
        for name in own.keys() - own_values(hparams.own).keys():
            raise unknown_name("hyperparameter", name, values_of(hparams))
        return general._replace(own=dataclasses.replace(hparams.own, **own))  # type: ignore[type-var]
    return general._replace(own={**own_values(hparams.own), **own})


def traced(hparams: HParams, **values: Any) -> HParams:
    """`hparams` with some general ones replaced by traced numbers."""
    return hparams._replace(**values)


def own_values(own: Any) -> dict[str, Any]:
    """What a field `own` holds, by name. Raises `UserError` for what is no record, and no {name: value}."""
    if dataclasses.is_dataclass(own):
        return {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    if hasattr(own, "_asdict"):
        return dict(own._asdict())
    if not isinstance(own, Mapping) and own != ():
        raise UserError(f"own is {shown(own)}; it must be {{name: value}}.")
    return dict(own)


GENERAL = tuple(name for name in HParams._fields if name != "own")
"""The hyperparameters that every agent has."""


def validate_hparams(hparams: HParams, epsilon_schedule: str = "linear") -> None:
    """Raises `UserError` where a hyperparameter is out of its range, or another number once it is a float32."""
    check_record(hparams)
    ranges = ranges_of(HParams) | ranges_of(type(hparams.own))  # type: ignore[arg-type]
    for name, value in values_of(hparams).items():
        if name not in ranges:
            raise unknown_name("hyperparameter", name, ranges)
        check_in(f"hparams.{name}", value, ranges[name])
        if epsilon_schedule == "exponential" and name in ("epsilon_begin", "epsilon_end") and value == 0:
            raise UserError(f"hparams.{name} is 0; an exponential schedule needs it above 0.")
    check_together(hparams.own)


def check_together(own: Any) -> None:
    """Raises `UserError` where an agent's own values do not go together, if their record has a `check()`."""
    getattr(own, "check", lambda: None)()


def check_record(hparams: object) -> None:
    """Raises `UserError` for what is no `HParams`."""
    if not isinstance(hparams, HParams):
        raise UserError(f"hparams is {shown(hparams)}; it must be HParams, such as HParams(gamma=0.99).")


def check_in(name: str, value: object, allowed: Range) -> None:
    """Raises `UserError` for what is no number in the range, or another number once it is a float32."""
    # NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed.holds(value):
        raise UserError(f"{name} is {shown(value)}; it must be a number {allowed.words}.")
    if value and not (LEAST <= abs(value) <= LARGEST or abs(value) == math.inf):
        raise UserError(
            f"{name} is {shown(value)}; as a float32 that is 0 or infinite. It must be 0, or between "
            f"{LEAST:.3g} and {LARGEST:g} in size."
        )


Vary = Mapping[str, object] | Sequence[Mapping[str, object]]
"""Settings of `HParams`: field -> values, for every combination of them; or a list of settings, field -> value."""


def settings_of(vary: Vary | None) -> list[dict[str, float]]:
    """The settings that `vary` stands for, as plain numbers. Raises `UserError` for what is no list of values, and for
    too many settings."""
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
    return settings


def check_seeds(seeds: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """`seeds` as plain numbers; NumPy's are welcome. Raises `UserError` for none, for too many, and for what is no
    whole number in [0, 2^32): keys are made of 32 bits."""
    return tuple(_seed(seed) for seed in _listed("seeds", seeds, "whole numbers"))


def _seed(given: SupportsIndex) -> int:
    number = None
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError):  # a float, a text
            number = operator.index(given)
    if number is None or not 0 <= number <= UINT32_MAX:
        raise UserError(f"seed is {shown(given)}; seeds are whole numbers from 0 to {UINT32_MAX}.")
    return number


def _listed(name: str, given: object, what: str) -> list[Any]:
    """The items of a list, an array or a range."""
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
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
    if not isinstance(hparams, HParams):
        return hparams
    return with_values(hparams, {name: plain(value) for name, value in values_of(hparams).items()})


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
    seeds: Iterable[SupportsIndex],
    vary: Vary | None = None,
    epsilon_schedule: str = "linear",
) -> list[tuple[int, HParams]]:
    """Every setting of `vary` with every seed: (seed, HParams) pairs; `hparams` are complete. Raises `UserError`."""
    seeds = check_seeds(seeds)
    settings = [with_values(hparams, setting) for setting in settings_of(vary)]
    _check_count(len(settings) * len(seeds), f"members ({len(settings):,} settings x {len(seeds):,} seeds)")
    for setting in settings:
        validate_hparams(setting, epsilon_schedule)
    return [(seed, setting) for setting in settings for seed in seeds]


def check_replicates(everyone: Sequence[tuple[int, HParams]]) -> None:
    """Raises `UserError` for a (seed, setting) that is there twice: a replicate has a seed of its own."""
    seen: set[tuple[float, ...]] = set()
    for seed, setting in everyone:
        member = seed, *map(float, values_of(setting).values())
        if member in seen:
            raise UserError(
                f"two members are the same run: seed {seed} with the same hyperparameters. Give each seed, and each "
                "setting of vary, once."
            )
        seen.add(member)


def to_dict(config: Config) -> dict[str, object]:
    """Plain types only, for YAML; the agent's own settings among the general ones."""
    return {**fields_of(config), "hidden_sizes": list(config.hidden_sizes)}


def fields_of(config: Config) -> dict[str, object]:
    """All settings by name, the agent's own after the general ones."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = own_values(values.pop("own"))
    return {**values, **own}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. What is no field of `Config` is taken as the agent's own, for `agents.complete` to
    complete or refuse."""
    return with_fields(Config(), values)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values by name; what is no field of `Config` is the agent's own."""
    known = {field.name for field in dataclasses.fields(Config)} - {"own"}
    own = {name: value for name, value in values.items() if name not in known}
    changed = dataclasses.replace(config, **{name: value for name, value in values.items() if name in known})
    return dataclasses.replace(changed, own={**own_values(config.own), **own}) if own else changed
