"""Agents by name. A value-based agent is its loss: one small file each."""

from collections.abc import Callable
from typing import Any

from jaxdqn import networks, td
from jaxdqn.agents import ownership
from jaxdqn.agents.actor_critic import actor_critic
from jaxdqn.agents.dqn import double_dqn, dqn
from jaxdqn.agents.ensemble import ensemble_dqn
from jaxdqn.agents.partitioned import partitioned_dqn
from jaxdqn.agents.random import random
from jaxdqn.base import Agent, Spec
from jaxdqn.config import ON_POLICY, Config
from jaxdqn.errors import unknown_name
from jaxdqn.learning import OPTIMIZERS

AGENTS: dict[str, Callable[..., Agent]] = {
    "dqn": dqn,
    "double_dqn": double_dqn,
    "ensemble_dqn": ensemble_dqn,
    "partitioned_dqn": partitioned_dqn,
    "a2c": actor_critic,
    "random": random,
}
STACKED = {"ensemble_dqn", "partitioned_dqn"}
"""Agents of several networks, whose parameters have a leading axis."""


def make(config: Config, spec: Spec) -> Agent:
    """The agent `config` describes, for an environment's spec. Raises `UserError` for an unknown name."""
    if config.agent not in AGENTS:
        raise unknown_name("agent", config.agent, AGENTS)
    options = (config.layer_norm, config.activation, config.initializer, config.convolution)
    if config.agent in ON_POLICY:
        network = networks.actor_critic(spec, config.network, config.hidden_sizes, *options)
    else:
        network = networks.q_network(spec, config.network, config.hidden_sizes, config.dueling, *options)
    penalty = {"squared": td.squared, "huber": td.huber}[config.loss]
    return AGENTS[config.agent](network, OPTIMIZERS[config.optimizer], penalty, **_options(config, spec))


def _options(config: Config, spec: Spec) -> dict[str, Any]:
    """What an agent takes beyond network, optimizer and penalty."""
    if config.agent == "ensemble_dqn":
        return {"size": config.ensemble_size, "aggregate": config.ensemble_act}
    if config.agent == "partitioned_dqn":
        count = config.num_partitions
        return {"owner": ownership.directions(spec, count), "num_owners": count}
    return {}
