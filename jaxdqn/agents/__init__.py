"""Agents by name. A value-based agent is its loss: one small file each."""

from collections.abc import Callable

from jaxdqn import networks, td
from jaxdqn.agents.actor_critic import actor_critic
from jaxdqn.agents.dqn import double_dqn, dqn
from jaxdqn.agents.random import random
from jaxdqn.base import Agent, Spec
from jaxdqn.config import Config
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.learning import OPTIMIZERS

AGENTS: dict[str, Callable[..., Agent]] = {"dqn": dqn, "double_dqn": double_dqn, "a2c": actor_critic, "random": random}
ON_POLICY = {"a2c"}
"""Agents whose loss holds only for actions of the policy they learn: they learn from the latest block."""


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
    return AGENTS[config.agent](network, OPTIMIZERS[config.optimizer], penalty)


def learns_from_latest(config: Config) -> bool:
    """Whether the agent learns from the block just acted. Raises `UserError` where a replay would be wrong for it."""
    if config.agent in ON_POLICY and config.replay == "uniform":
        raise UserError(f"agent {config.agent!r} is on-policy: it cannot learn from replay 'uniform'; leave it 'auto'.")
    return config.agent in ON_POLICY or config.replay == "latest"
