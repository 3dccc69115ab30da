"""From the names in a configuration to environment, agent and replay: the one place, for every scheme."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from jaxdqn import agents, networks, td, training
from jaxdqn.agents.declaration import Around, Declaration, MakeHead
from jaxdqn.base import Agent, Environment, Network, RecurrentNetwork, Replay, Spec
from jaxdqn.config import Config
from jaxdqn.environments import registry
from jaxdqn.errors import UserError
from jaxdqn.learning import OPTIMIZERS
from jaxdqn.replay import Kind


class Components(NamedTuple):
    """The records of one shard, and the configuration they were made from."""

    config: Config
    environment: Environment
    agent: Agent
    replay: Replay


def make_components(config: Config, shards: int = 1) -> Components:
    """The components of one of an agent's shards; the same records for the same configuration, so that what was
    compiled of them serves again. Raises `UserError`."""
    local = shard_config(config, shards)
    declared = agents.of(config.agent), agents.replay_of(config), registry.factory(config.env)
    return _records(in_programs(local), *declared)._replace(config=local)


@functools.lru_cache(maxsize=32)
def _records(config: Config, declared: Declaration, kind: Kind, factory: Callable[..., object] | None) -> Components:
    """`declared`, `kind` and `factory` are what the names in `config` stand for now: they may be given to others."""
    environment = registry.make(config.env, config.env_params, config.env_kwargs, config.sticky_actions)
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    return Components(config, environment, agent, kind.make(example, agents.with_settings(config)))


def in_programs(config: Config) -> Config:
    """`config` as far as compiled programs depend on it: what only says how long, and when, is at its defaults."""
    when = ("learning_starts", "total_steps", "log_interval", "eval_interval", "final_episodes")
    return dataclasses.replace(config, **{name: getattr(Config, name) for name in when})


def make_agent(config: Config, spec: Spec) -> Agent:
    """The agent that `config` describes, for an environment's spec. Raises `UserError`."""
    declared, settings = agents.of(config.agent), agents.settings_of(config)
    config = agents.with_always(config)
    optimizer, penalty = OPTIMIZERS[config.optimizer], td.PENALTIES[config.loss]

    def with_head(make: MakeHead) -> Network | RecurrentNetwork:
        head = make(spec.num_actions, config.dueling, settings)
        if declared.memory is None:
            return networks.configured(spec, head, config)
        return networks.recurrent(spec, head, config, declared.memory(settings))

    return declared.make(Around(spec, with_head(declared.head), optimizer, penalty, settings, with_head))


def make_regions(components: Components, num_actors: int, block: int) -> Replay:
    """The replay of a learner with a region for each actor, of whole blocks of `block` rows. Raises `UserError` where
    the agent's replay has no such form."""
    config, kind = agents.with_settings(components.config), agents.replay_of(components.config)
    if kind.regions is None:
        raise UserError(
            f"agent {config.agent!r} with replay {config.replay!r}: that replay has no regions for several actors, "
            "which this scheme needs."
        )
    example = training.transition_example(components.environment.spec, components.agent)
    return kind.regions(example, config, num_actors, block)


def shard_config(config: Config, shards: int) -> Config:
    """The configuration of one of an agent's shards: its part of environments, batch and replay."""
    return dataclasses.replace(
        config,
        num_envs=config.num_envs // shards,
        batch_size=config.batch_size // shards,
        replay_capacity=-(-config.replay_capacity // shards),
    )
