"""How to train in parallel, by name: the papers as presets over the schemes' axes. Imports no JAX.

A preset changes *how* an agent is trained. Those that are methods of their own (A3C, asynchronous Q-learning) also set
the agent, by changes to the configuration that explicit flags override.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxdqn.config import Config, HParams, Own, own_values, with_values
from jaxdqn.errors import unknown_name


@dataclasses.dataclass(frozen=True, init=False)
class Axes:
    """How an agent is trained in parallel: Axes("averaging", workers=4)."""

    scheme: str = "fused"
    """One compiled loop (fused), or another scheme: actor_learner, parameter_server, averaging, sharding."""
    own: Own = ()
    """The scheme's own axes: see its file."""

    def __init__(self, scheme: str = "fused", own: object = None, **axes: object) -> None:
        """`axes` are the scheme's own by name, over those of `own`; `schemes.complete` has defaults for the rest."""
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "own", {**own_values(own or ()), **axes} if axes or own is None else own)

    def to_dict(self) -> dict[str, object]:
        """Plain values by name, the scheme's own among them."""
        return {"scheme": self.scheme, **own_values(self.own)}


class Parallel(NamedTuple):
    """A preset: its axes, what it sets of configuration and hyperparameters, which of the former it wants at least so
    large, in what pieces it acts and learns where rollouts are shorter, and in one line what it is good for."""

    summary: str
    axes: Axes
    config: Mapping[str, Any] = MappingProxyType({})
    hparams: Mapping[str, float] = MappingProxyType({})
    least: Mapping[str, int] = MappingProxyType({})
    pieces: Mapping[str, int] = MappingProxyType({})


DIVISIBLE = {"num_envs": 8}
# Replicas drift apart between averagings: at 1e-3 one seed in four fails with H = 64.
REPLICA_RATE = {"learning_rate": 5e-4}
# As many samples per step as one update a step, in fewer and longer pieces: threads pay for each.
ACTORS = {"num_envs": 16, "rollout_length": 4, "updates_per_iteration": 4}
# Double selection, dueling streams, returns of three steps (Horgan et al., 2018, appendix C), or of the environment's
# where those are more: on CartPole two of ten seeds end in a dip with three (179 and 358).
APEX = {"agent": "double_dqn", "dueling": True, "replay": "prioritised"}
APEX_LEAST = {"n_step": 3}
# With DQN's rate on CartPole, 1e-3, one of ten seeds ends in a dip (342).
APEX_RATE = {"learning_rate": 2.5e-4}
ON_POLICY = {"num_envs": 16, "rollout_length": 8, "n_step": 8, "learning_starts": 0, "total_steps": 2_000_000}
# Sixteen environments, five steps: with half the environments or longer blocks one seed in eight fails.
SHORT = {**ON_POLICY, "rollout_length": 5, "n_step": 5, "agent": "dqn", "replay": "latest"}
# An epsilon for each environment, as each thread of the paper has. With .05 for all, what a good policy never does is
# forgotten: one-step C51 ended near 110 at three rates; so it ends at 500 on three seeds of four, DQN on one of two.
Q_LEARNING = {
    "learning_rate": 1e-3,
    "learning_rate_end": 0.05,
    "learning_rate_updates": 24_000.0,
    "epsilon_end": 0.4,
    "ladder_power": 7.0,
    "epsilon_steps": 500_000.0,
    "target_period": 100.0,
}
CONSTANT_RATE = {"learning_rate": 5e-4, "learning_rate_end": 1.0}

PARALLEL: dict[str, Parallel] = {
    "fused": Parallel("one compiled loop; populations and data parallelism", Axes()),
    "parallel_dqn": Parallel(
        "actor threads with local replays, one learner (classic parallel DQN): slow or uneven environments",
        Axes("actor_learner", workers=4, coupling="async", merge_every=2, slack=8),
        pieces=ACTORS,
    ),
    "apex": Parallel(
        "actors with an epsilon for each environment and priorities of their own, one learner (Ape-X): many actors",
        Axes("actor_learner", workers=4, coupling="async", merge_every=4, broadcast_every=16, slack=8),
        APEX,
        {**APEX_RATE, "ladder_power": 7.0, "epsilon_end": 0.4, "importance_end": 0.4},
        APEX_LEAST,
        ACTORS,
    ),
    "apex-paper": Parallel(
        "apex with the settings of Horgan et al. (2018), with 64 environments instead of 360",
        Axes("actor_learner", workers=8, coupling="async", merge_every=10, broadcast_every=100, slack=32),
        {
            **APEX,
            "n_step": 3,
            "num_envs": 64,
            "rollout_length": 10,
            "batch_size": 512,
            "replay_capacity": 1_000_000,
            "learning_starts": 50_000,
            "optimizer": "rmsprop",
        },
        {
            "learning_rate": 6.25e-5,
            "learning_rate_end": 1.0,
            "optimizer_epsilon": 1.5e-7,
            "max_grad_norm": 40.0,
            "target_period": 2_500.0,
            "ladder_power": 7.0,
            "epsilon_begin": 0.4,
            "epsilon_end": 0.4,
            "importance_end": 0.4,
        },
    ),
    "lockstep_dqn": Parallel(
        "parallel_dqn, deterministic in one thread: debugging, exact resume",
        Axes("actor_learner", merge_every=2, slack=8),
        pieces=ACTORS,
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
    least = {name: max(getattr(config, name), value) for name, value in chosen.least.items()}
    shorter = config.rollout_length < chosen.pieces.get("rollout_length", 0)
    changes: dict[str, Any] = {**chosen.config, **least, **(chosen.pieces if shorter else {})}
    return dataclasses.replace(config, **changes), with_values(hparams, chosen.hparams)
