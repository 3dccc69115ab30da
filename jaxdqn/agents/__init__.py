"""Agents by name. A value-based agent is its loss: one small file each."""

from collections.abc import Callable

from jaxdqn import networks, td
from jaxdqn.agents.dqn import double_dqn, dqn
from jaxdqn.agents.random import random
from jaxdqn.base import Agent, Spec
from jaxdqn.config import Config
from jaxdqn.errors import unknown_name
from jaxdqn.learning import OPTIMIZERS

AGENTS: dict[str, Callable[..., Agent]] = {"dqn": dqn, "double_dqn": double_dqn, "random": random}


def make(config: Config, spec: Spec) -> Agent:
    """The agent `config` describes, for an environment's spec. Raises `UserError` for an unknown name."""
    if config.agent not in AGENTS:
        raise unknown_name("agent", config.agent, AGENTS)
    network = networks.q_network(
        spec,
        config.network,
        config.hidden_sizes,
        config.dueling,
        config.layer_norm,
        config.activation,
        config.initializer,
        config.convolution,
    )
    penalty = {"squared": td.squared, "huber": td.huber}[config.loss]
    return AGENTS[config.agent](network, OPTIMIZERS[config.optimizer], penalty)
