"""The parallel schemes by name: what their axes are, and the papers as presets over them. Imports no JAX.

A preset changes *how* an agent is trained. Those that are methods of their own (A3C, asynchronous Q-learning) also set
the agent, by changes to the configuration that explicit flags override.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jaxdqn.config import INT32_MAX, Config, HParams
from jaxdqn.errors import UserError, shown, unknown_name


@dataclasses.dataclass(frozen=True)
class Axes:
    """How an agent is trained in parallel. An axis that the scheme does not have is refused."""

    scheme: Literal["fused", "actor_learner", "parameter_server", "averaging", "sharding"] = "fused"
    """One compiled loop; actors and a learner; workers and a server; replicas that are averaged; a sharded network."""
    workers: int = 4
    """Actors, workers, replicas, or devices of the sharded network."""
    coupling: Literal["lockstep", "async"] = "lockstep"
    """Actor-learner: deterministic, in one thread, or a thread for each actor."""
    merge_every: int = 8
    """Actor-learner: M, iterations after which a local replay moves to the learner's."""
    broadcast_every: int = 8
    """Actor-learner: K, gradient updates between two broadcasts of parameters."""
    lag: int = 0
    """Actor-learner in lockstep: broadcasts by which parameters are late, 0 or 1."""
    slack: int = 32
    """Actor-learner async: iterations by which actors and learner may be ahead of each other."""
    lock: Literal["global", "leaf", "none"] = "global"
    """Parameter server: one lock; one for each parameter with its target and moments; or none (Hogwild, emulated)."""
    max_lag: int = 0
    """Async: older experience (in broadcasts) or gradients (in versions) are dropped; 0 for no limit."""
    scale_by_lag: bool = False
    """Parameter server: learning rate times 1 / (1 + lag)."""
    own_statistics: bool = False
    """Parameter server: optimizer statistics of each worker's own."""
    combine: Literal["mean", "outer", "elastic"] = "mean"
    """Averaging: parameter mean (local SGD), outer optimizer (DiLoCo), or elastic averaging."""
    average_every: int = 8
    """Averaging: H, iterations between two averagings."""
    average_each_until: int = 0
    """Averaging: average every iteration until this many updates (post-local SGD)."""
    data: int = 1
    """Sharding: the mesh is data x (workers / data)."""

    @property
    def required_devices(self) -> int:
        """How many devices the scheme cannot do without."""
        return self.workers if self.scheme in ("averaging", "sharding") else 1

    @property
    def useful_devices(self) -> int:
        """How many devices the scheme has work for; 0 where that depends on the members."""
        actors = 1 + self.workers if self.coupling == "async" else 1
        by_scheme = {"actor_learner": actors, "averaging": self.workers, "sharding": self.workers}
        return by_scheme.get(self.scheme, 1 if self.scheme == "parameter_server" else 0)


OF_SCHEME: dict[str, set[str]] = {
    "fused": set(),
    "actor_learner": {"workers", "coupling", "merge_every", "broadcast_every", "lag", "slack", "max_lag"},
    "parameter_server": {"workers", "lock", "max_lag", "scale_by_lag", "own_statistics"},
    "averaging": {"workers", "combine", "average_every", "average_each_until"},
    "sharding": {"workers", "data"},
}


THREADED = ("actor_learner", "parameter_server")  # a worker is a thread
MAX_THREADS = 256


class Parallel(NamedTuple):
    """A preset: its axes, what it sets of configuration and hyperparameters, and in one line what it is good for."""

    summary: str
    axes: Axes
    config: Mapping[str, Any] = MappingProxyType({})
    hparams: Mapping[str, Any] = MappingProxyType({})


DIVISIBLE = {"num_envs": 8}
# Replicas drift apart between averagings: at 1e-3 one seed in four fails with H = 64.
REPLICA_RATE = {"learning_rate": 5e-4}
# As many samples per step as one update a step, in fewer and longer pieces: threads pay for each.
ACTORS = {"num_envs": 16, "rollout_length": 4, "updates_per_iteration": 4}
ON_POLICY = {"num_envs": 16, "rollout_length": 8, "n_step": 8, "learning_starts": 0, "total_steps": 2_000_000}
# Sixteen environments, five steps: with half the environments or longer blocks one seed in eight fails.
SHORT = {**ON_POLICY, "rollout_length": 5, "n_step": 5, "agent": "dqn", "replay": "latest"}
Q_LEARNING = {
    "learning_rate": 1e-3,
    "learning_rate_end": 0.05,
    "learning_rate_updates": 24_000.0,
    "epsilon_end": 0.05,
    "epsilon_steps": 500_000.0,
    "target_period": 100.0,
}
CONSTANT_RATE = {"learning_rate": 5e-4, "learning_rate_end": 1.0}

PARALLEL: dict[str, Parallel] = {
    "fused": Parallel("one compiled loop; populations and data parallelism", Axes()),
    "parallel_dqn": Parallel(
        "actor threads with local replays, one learner (classic parallel DQN): slow or uneven environments",
        Axes("actor_learner", workers=4, coupling="async", merge_every=2, slack=8),
        ACTORS,
    ),
    "apex": Parallel(
        "parallel_dqn with an epsilon for each environment (Ape-X, uniform replay): many actors",
        Axes("actor_learner", workers=4, coupling="async", merge_every=1, broadcast_every=16, slack=8),
        ACTORS,
        {"ladder_power": 7.0, "epsilon_end": 0.4},
    ),
    "lockstep_dqn": Parallel(
        "parallel_dqn, deterministic in one thread: debugging, exact resume",
        Axes("actor_learner", merge_every=2, slack=8),
        ACTORS,
    ),
    "local_sgd": Parallel(
        "replicas on devices that average their parameters every H iterations (local SGD): slow links",
        Axes("averaging", workers=4),
        DIVISIBLE,
        REPLICA_RATE,
    ),
    "post_local_sgd": Parallel(
        "local SGD that averages every iteration at first (Lin et al., 2020)",
        Axes("averaging", workers=4, average_each_until=5_000),
        DIVISIBLE,
        REPLICA_RATE,
    ),
    "diloco": Parallel(
        "replicas with an outer Nesterov optimizer (DiLoCo): very slow links",
        Axes("averaging", workers=4, combine="outer", average_every=64),
        DIVISIBLE,
        REPLICA_RATE,
    ),
    "elastic": Parallel(
        "replicas tied to a centre by elastic averaging (EASGD): exploration between replicas",
        Axes("averaging", workers=4, combine="elastic"),
        DIVISIBLE,
        REPLICA_RATE,
    ),
    "sharded": Parallel(
        "one network split over devices, columns then rows (tensor parallel): networks too wide for one device",
        Axes("sharding", workers=2),
        DIVISIBLE,
    ),
    "gorila": Parallel(
        "workers with replays of their own push gradients to a server (Gorila)",
        Axes("parameter_server", workers=4, max_lag=32),
    ),
    "async_q": Parallel(
        "asynchronous n-step Q-learning without replay (Mnih et al., 2016)",
        Axes("parameter_server", workers=4),
        SHORT,
        Q_LEARNING,
    ),
    "async_q1": Parallel(
        "asynchronous one-step Q-learning without replay (Mnih et al., 2016)",
        Axes("parameter_server", workers=4),
        {**SHORT, "n_step": 1},
        Q_LEARNING,
    ),
    "a3c": Parallel(
        "asynchronous advantage actor-critic (Mnih et al., 2016)",
        Axes("parameter_server", workers=4),
        {**ON_POLICY, "agent": "a2c", "replay": "auto"},
        CONSTANT_RATE,
    ),
    "hogwild": Parallel(
        "a3c without locks: lost updates are counted (Recht et al., 2011, emulated)",
        Axes("parameter_server", workers=4, lock="none"),
        {**ON_POLICY, "agent": "a2c", "replay": "auto"},
        CONSTANT_RATE,
    ),
}


def preset(name: str) -> Parallel:
    """The parallel preset called `name`. Raises `UserError` for an unknown one."""
    if name not in PARALLEL:
        raise unknown_name("parallel preset", name, PARALLEL, "`python experiments/list.py` shows all.")
    return PARALLEL[name]


def over(chosen: Parallel, config: Config, hparams: HParams) -> tuple[Config, HParams]:
    """Configuration and hyperparameters with what the preset sets."""
    return dataclasses.replace(config, **chosen.config), hparams._replace(**chosen.hparams)


def validate(axes: Axes, num_processes: int = 1) -> None:
    """Raises `UserError` for an unknown value, an axis that the scheme does not have, or a scheme that does not run in
    `num_processes` processes."""
    if not isinstance(axes, Axes):
        raise UserError(f"axes is {shown(axes)}; it must be Axes, such as Axes('averaging', workers=4).")
    plain = Axes(axes.scheme)
    if axes.scheme not in OF_SCHEME:
        raise unknown_name("scheme", axes.scheme, OF_SCHEME)
    for field in dataclasses.fields(Axes):
        value = getattr(axes, field.name)
        allowed = getattr(field.type, "__args__", ())
        if allowed and value not in allowed:
            raise unknown_name(f"axes.{field.name}", value, allowed)
        if field.name != "scheme" and value != getattr(plain, field.name) and field.name not in OF_SCHEME[axes.scheme]:
            has = ", ".join(sorted(OF_SCHEME[axes.scheme])) or "none; choose one with --parallel"
            raise UserError(f"axes.{field.name} is no axis of scheme {axes.scheme!r}; it has: {has}.")
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"axes.{field.name} is {value!r}; it must be True or False.")
        if field.type is int and not (type(value) is int and 0 <= value <= INT32_MAX):
            raise UserError(
                f"axes.{field.name} is {shown(value)}; it must be a whole number of at least 0, at most {INT32_MAX:,}."
            )
    if axes.workers < 1:
        raise UserError(f"axes.workers is {axes.workers}; it must be at least 1.")
    if num_processes > 1 and axes.scheme != "fused":
        raise UserError(
            f"scheme {axes.scheme!r} does not run on several hosts; the fused one does (populations, data "
            "parallelism): leave out --parallel and --axes."
        )
    if axes.scheme in THREADED and axes.workers > MAX_THREADS:
        raise UserError(
            f"axes.workers is {axes.workers}: each is a thread, and one learner or server cannot serve more than "
            f"{MAX_THREADS}."
        )
