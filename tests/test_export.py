"""Exported policies of observations of several parts, and what is not exported."""

import dataclasses
from typing import NamedTuple

import jax
import pytest
from cases import slow

import jaxdqn
from jaxdqn.config import Config
from jaxdqn.environments import registry
from jaxdqn.errors import UserError
from jaxdqn.runs.export import export_policy

QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
SMALL = Config(
    env="parts", num_envs=4, batch_size=8, hidden_sizes=(4,), replay_capacity=400, learning_starts=160,
    total_steps=320, eval_episodes=2, final_episodes=2,
)  # fmt: skip


class Halves(NamedTuple):
    """A class of observations that `jax.export` has never heard of."""

    left: jax.Array
    right: jax.Array


@pytest.fixture
def parts(monkeypatch):
    """parts(halves) registers Catch, whose board is seen as `halves(left, right)`."""
    monkeypatch.setattr(registry, "_registered", {})
    catch = registry.make("Catch-bsuite")

    def registered(halves):
        def seen(board):
            return halves(board[..., :2], board[..., 2:])

        def reset(key):
            state, observation = catch.reset(key)
            return state, seen(observation)

        def step(key, state, action):
            state, step = catch.step(key, state, action)
            return state, step._replace(
                observation=seen(step.observation), final_observation=seen(step.final_observation)
            )

        observation = jax.eval_shape(reset, jax.random.key(0))[1]
        spec = catch.spec._replace(name="parts", observation=observation)
        jaxdqn.register("parts", lambda: catch._replace(reset=reset, step=step, spec=spec))

    return registered


@pytest.mark.parametrize("agent", ["dqn", slow("r2d2")])
def test_observations_of_several_parts_are_exported(agent, parts, tmp_path):
    parts(lambda left, right: {"left": left, "right": right})
    jaxdqn.train(dataclasses.replace(SMALL, agent=agent), out=tmp_path / "run", settings=QUIET)
    assert export_policy(tmp_path / "run", 0, tmp_path / "policy.jax") > 0


def test_a_class_that_cannot_be_written_is_one_line(parts, tmp_path):
    parts(Halves)
    jaxdqn.train(SMALL, out=tmp_path / "run", settings=QUIET)
    with pytest.raises(UserError, match=r"the observations of 'parts' cannot be exported: .*Halves"):
        export_policy(tmp_path / "run", 0, tmp_path / "policy.jax")
    assert not (tmp_path / "policy.jax").exists()


def test_of_random_actions_every_member_is_judged_and_none_exported(tmp_path):
    config = dataclasses.replace(SMALL, env="Catch-bsuite", agent="random")
    result = jaxdqn.train(config, seeds=(0, 1, 2), out=tmp_path / "run", settings=QUIET, num_devices=1)
    assert result.evaluate(5, member=2).returns.shape == (5,)
    with pytest.raises(UserError, match="member 3 does not exist; the run has members 0 to 2"):
        result.evaluate(5, member=3)
    with pytest.raises(UserError, match="agent 'random' has learned nothing that could be exported"):
        export_policy(tmp_path / "run", 2, tmp_path / "policy.jax")
