"""What an agent declares to be without effect on it is exactly what its program does not depend on; it is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from cases import usual

import jaxdqn
from jaxdqn import agents, presets, training
from jaxdqn.components import make_components
from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.runs import directory
from jaxdqn.validation import validate

OTHERS = {"loss": "huber", "dueling": True, "replay_copies": "one", "n_step": 2}
SMALL = Config(
    env="FourRooms-misc",
    num_envs=4,
    rollout_length=16,
    batch_size=16,
    hidden_sizes=(8,),
    replay_capacity=1_000,
)
NAMES = [*sorted(set(agents.AGENTS) - {"random"}), "ensemble_c51"]


def program(config):
    """The text of what a run compiles: the start, a prefill and an iteration."""
    parts = make_components(config)
    trainer, hparams = training.make_trainer(*parts[1:], parts.config), parts.agent.defaults

    def run(key):
        state = trainer.init(key, key, hparams)
        metrics = training.zero_metrics(parts.agent, parts.replay, parts.config)
        return trainer.step(*trainer.prefill(state, metrics, jnp.int32(0), hparams), jnp.int32(1), hparams)

    return re.sub("0x[0-9a-f]+", "", jax.jit(run).lower(jax.random.key(0)).as_text())


def unused(config):
    return {*agents.of(config.agent).unused, *agents.replay_of(config).unused}


@pytest.mark.parametrize("agent", usual(NAMES, "c51", "pqn"))
def test_a_program_is_the_same_exactly_where_a_setting_is_declared_unused(agent):
    config = dataclasses.replace(SMALL, agent=agent)
    asked = {name: value for name, value in OTHERS.items() if name not in agents.of(agent).always}
    usual_program = program(config)
    same = {
        name for name, value in asked.items() if program(dataclasses.replace(config, **{name: value})) == usual_program
    }
    assert same == unused(config)


@pytest.mark.parametrize("agent", NAMES)
def test_what_is_without_effect_is_refused_in_a_line(agent):
    config = jaxdqn.preset(
        "cartpole-pqn" if agent == "pqn" else "cartpole-a2c" if agent == "a2c" else "cartpole"
    ).config
    config = agents.config_for(agent, config)
    for name, value in OTHERS.items():
        changed = dataclasses.replace(config, **{name: value})
        if name in unused(config):
            with pytest.raises(UserError, match=rf"{name} \S+ has no effect on agent '{agent}' or its replay; leave"):
                validate(changed)
        else:
            validate(changed)


def test_another_agent_takes_over_only_what_has_an_effect_on_it():
    config = Config(agent="dqn", loss="huber", dueling=True)
    assert agents.config_for("c51", config) == Config(agent="c51", dueling=True)
    assert agents.config_for("a2c", config) == Config(agent="a2c")


def test_what_a_file_of_before_sets_without_effect_is_at_its_default():
    config, hparams = agents.complete(Config(agent="c51", loss="huber"), jaxdqn.HParams())
    values = directory.RunSpec(config, hparams, (0,), ({},), 1, 1, 1).to_dict()
    assert values["config"]["loss"] == "huber"
    assert directory.RunSpec.from_dict(values).config == dataclasses.replace(config, loss="squared")


def not_at_default(config):
    """The settings without effect on the agent that are set all the same."""
    return [name for name in unused(config) if getattr(config, name) != getattr(Config, name)]


@pytest.mark.parametrize("env", ["CartPole-v1", "Breakout-MinAtar", "Asterix-MinAtar"])
def test_every_agents_preset_sets_nothing_without_effect(env):
    configs = {agent: presets.for_environment(env, agent).config for agent in (*agents.AGENTS, "ensemble_c51")}
    configs |= {name: preset.config for name, preset in presets.PRESETS.items()}
    assert [name for name, config in configs.items() if not_at_default(config)] == []
