"""Gymnasium's environments on the host: each step is that of the environment itself, and so is a judged episode."""

import multiprocessing
import os
import signal
import time
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

import jaxdqn
from jaxdqn import evaluation, evaluation_on_host
from jaxdqn.base import Codes
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config
from jaxdqn.environments import contract, gymnasium_adapter, host, registry
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs import checkpoints, driver, results
from jaxdqn.timeline import timeline

STEPS, ENVS, SEED = 300, 3, 11


def alone(identity: str, actions: np.ndarray, **kwargs):
    """Rows (observation, reward, terminated, end, next observation) of single environments, reset by hand."""
    columns = []
    for index in range(actions.shape[1]):
        env = gymnasium.make(identity, **kwargs)
        first, _ = env.reset(seed=SEED + index)
        column = []
        for action in actions[:, index]:
            observation, reward, terminated, truncated, _ = env.step(int(action))
            end = terminated or truncated
            column.append((observation, reward, terminated, end, env.reset()[0] if end else observation))
        columns.append((first, column))
    firsts = np.stack([first for first, _ in columns])
    rows = [np.stack([[row[k] for row in column] for _, column in columns], axis=1) for k in range(5)]
    return firsts, *rows


@pytest.mark.parametrize(
    "identity, kwargs, how",
    [
        ("CartPole-v1", {"max_episode_steps": 15}, "sync"),
        ("CartPole-v1", {}, "async"),
        ("FrozenLake-v1", {"is_slippery": True}, "sync"),
    ],
)
def test_steps_are_those_of_the_environment_itself(identity, kwargs, how):
    environment = registry.make(f"gymnasium/{identity}", env_kwargs={**kwargs, "vectorization": how})
    spec = environment.spec
    actions = np.random.default_rng(0).integers(0, spec.num_actions, (STEPS, ENVS))
    guarded = host.Guarded(environment, ENVS, 60.0)
    first, steps = guarded.reset(SEED), [guarded.step(row) for row in actions]
    guarded.close()
    expected_first, observation, reward, terminated, end, following = alone(identity, actions, **kwargs)

    def stored(raw):
        return np.asarray(raw, spec.observation.dtype).reshape(*raw.shape[:-1], -1, *spec.observation.shape[1:])

    if isinstance(spec.observation, Codes):  # numbers, where ours are vectors of one
        expected_first, observation, following = (x[..., None] for x in (expected_first, observation, following))
    seen = jax.tree.map(lambda *rows: np.stack(rows), *steps)
    np.testing.assert_array_equal(first, stored(expected_first))
    np.testing.assert_array_equal(seen.final_observation, stored(observation))
    np.testing.assert_array_equal(seen.observation, stored(following))
    np.testing.assert_array_equal(seen.reward, reward.astype(np.float32))
    np.testing.assert_array_equal(seen.discount, 1.0 - terminated)  # so a time limit keeps 1
    np.testing.assert_array_equal(seen.episode_end, end)
    assert end.any() and (terminated != end).any() == ("max_episode_steps" in kwargs)
    assert spec.max_episode_steps == kwargs.get("max_episode_steps", gymnasium.spec(identity).max_episode_steps)


def test_a_process_that_dies_breaks_the_step_and_nothing_hangs():
    environment = registry.make("gymnasium/CartPole-v1", env_kwargs={"vectorization": "async"})
    guarded = host.Guarded(environment, 2, 20.0)
    guarded.reset(SEED)
    before = {child.pid for child in multiprocessing.active_children()}
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(host.Broken):
        for _ in range(3):  # the pipes may hold an answer still
            guarded.step(np.zeros(2, np.int64))
    guarded.abandon()
    assert before


def test_processes_do_not_hear_ctrl_c():
    environment = registry.make("gymnasium/CartPole-v1", env_kwargs={"vectorization": "async"})
    guarded = host.Guarded(environment, 2, 30.0)
    guarded.reset(SEED)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    for _ in range(3):
        assert guarded.step(np.zeros(2, np.int64)).reward.tolist() == [1.0, 1.0]
    guarded.close()


def test_judged_episodes_are_those_that_the_policy_plays():
    """The same greedy policy played by hand, one environment at a time."""
    environment = registry.make("gymnasium/CartPole-v1")
    agent = make_agent(Config(hidden_sizes=(16,)), environment.spec)
    params, key = agent.init(jax.random.key(1), agent.defaults).params, jax.random.key(2)
    play = evaluation_on_host.player(environment, agent, 4, 120, 0.0, 60.0)
    episodes = jax.tree.map(np.asarray, play(params, key))
    seed = int(host.seed_of(jax.random.split(key)[0]))
    values = jax.jit(lambda observation: agent.values(params, observation[None])[0])
    for index in range(4):
        env, total, length, ended = gymnasium.make("CartPole-v1"), 0.0, 0, False
        observation, _ = env.reset(seed=seed + index)
        while not ended and length < 120:
            observation, reward, terminated, truncated, _ = env.step(int(np.argmax(values(observation))))
            total, length, ended = total + reward, length + 1, terminated or truncated
        assert (episodes.returns[index], episodes.lengths[index]) == (total, length)
        assert episodes.finished[index] == ended
    assert len(set(episodes.fingerprints)) == 4


class Odd(gymnasium.Env):
    """Spaces as they come."""

    def __init__(self, observed=None, actions=None) -> None:
        self.observation_space = observed or spaces.Box(0, 255, (6, 5), np.uint8)
        self.action_space = actions or spaces.Discrete(3, start=2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(int(action))
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture(scope="module", autouse=True)
def odd():
    gymnasium.register("Odd-v0", Odd)
    yield
    del gymnasium.registry["Odd-v0"]


@pytest.mark.parametrize(
    "space, shape, dtype",
    [
        (spaces.Box(0, 255, (6, 5), np.uint8), (6, 5, 1), np.uint8),
        (spaces.Box(0, 255, (6, 5, 3), np.uint8), (6, 5, 3), np.uint8),
        (spaces.Box(0, 1, (6, 5, 4), np.uint8), (6, 5, 4), np.bool_),
        (spaces.Box(0, 9, (6, 5), np.uint8), (6, 5, 1), np.float32),
        (spaces.Box(-1, 1, (4,), np.float64), (4,), np.float32),
        (spaces.Box(0, 3, (4,), np.int64), (4,), np.int32),
        (spaces.Box(0, 2**40, (4,), np.int64), (4,), np.float32),
        (spaces.Discrete(5, start=7), (1,), np.int32),
        (spaces.MultiDiscrete([3, 4]), (2,), np.int32),
        (spaces.MultiBinary(3), (3,), np.bool_),
    ],
)
def test_spaces_become_what_is_stored(space, shape, dtype):
    environment = gymnasium_adapter.make("gymnasium/Odd-v0", {}, {"observed": space})
    leaf = environment.spec.observation
    assert (leaf.shape, leaf.dtype) == (shape, dtype)
    made = environment.on_host(2)
    for observation in (made.reset(0), made.step(np.array([0, 2])).final_observation):  # actions 2 and 4 there
        assert (observation.shape, observation.dtype) == ((2, *shape), dtype)
        if isinstance(leaf, Codes):
            assert np.all((observation >= 0) & (observation < leaf.sizes))
    made.close()


@pytest.mark.parametrize("space", [spaces.Discrete(2**40), spaces.MultiDiscrete([2**13, 2**13 + 1])])
def test_codes_of_too_many_values_are_refused(space):
    with pytest.raises(UserError, match=r"values; one-hot codes have at most 16,384\. Wrap it"):
        gymnasium_adapter.make("gymnasium/Odd-v0", {}, {"observed": space})


def test_an_observation_without_a_number_is_refused():
    environment = gymnasium_adapter.make("gymnasium/Odd-v0", {}, {"observed": spaces.Box(0, 1, (0,))})
    with pytest.raises(UserError, match=r"observations of shape \(0,\), without a number"):
        contract.check(environment, jax.random.key(0))


class Drawn(gymnasium.Env):
    """Episodes of four steps, whose observation and picture are their number; the first picture may take a while."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space, action_space = spaces.Box(0, 10, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, render_mode=None, slowly=0.0) -> None:
        self.render_mode, self.slowly, self.steps = render_mode, slowly, 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.float32([0]), {}

    def step(self, action):
        self.steps += 1
        return np.float32([self.steps]), 1.0, self.steps == 4, False, {}

    def render(self):
        time.sleep(self.slowly)
        self.slowly = 0.0
        return np.full((8, 8, 3), self.steps, np.uint8)


@pytest.fixture
def drawn():
    gymnasium.register("Drawn-v0", Drawn)
    yield
    del gymnasium.registry["Drawn-v0"]


@pytest.mark.parametrize("fails", [0, 1])
def test_no_picture_is_of_another_episode(drawn, fails, monkeypatch):
    """The environments have begun the next one when the last step is looked at; or a new one, where they failed."""
    left, step = [fails], Drawn.step

    def failing(env, action):
        if env.steps == 2 and left[0]:
            left[0] -= 1
            raise RuntimeError("it fails once")
        return step(env, action)

    monkeypatch.setattr(Drawn, "step", failing)
    components = make_components(Config(env="gymnasium/Drawn-v0", hidden_sizes=(8,)))
    params = components.agent.init(jax.random.key(0), components.agent.defaults).params
    batch = jax.tree.map(lambda x: x[None], params)
    result = types.SimpleNamespace(components=components, params=batch, members=[(0, components.agent.defaults)])
    observations, pictures = results.filmed(result, 0, 0)
    assert observations[:, 0].tolist() == [0, 1, 2, 3, 4] and pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 3]


def test_a_picture_that_comes_too_late_is_no_answer_to_the_next_step(drawn):
    environment = registry.make("gymnasium/Drawn-v0", env_kwargs={"slowly": 1.0})
    guarded = host.Guarded(environment, 1, 0.7)
    guarded.reset(0)
    assert guarded.render() is None
    assert guarded.step(np.zeros(1, np.int64)).observation.tolist() == [[1.0]]
    assert guarded.render().max() == 1
    guarded.close()


def test_more_episodes_than_are_played_at_once_are_judged_in_parts():
    components = make_components(Config(env="gymnasium/CartPole-v1", hidden_sizes=(8,), eval_episodes=3))
    params = components.agent.init(jax.random.key(0), components.agent.defaults).params
    few, many = (results.evaluate_params(components, params, count, 5) for count in (3, 7))
    assert many.returns.shape == (7,) and len(set(many.fingerprints)) == 7
    np.testing.assert_array_equal(many.fingerprints[:3], few.fingerprints)


class Flaky(Drawn):
    """Fails in its 30th step, and an episode has 40."""

    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 30:
            raise RuntimeError("simulator lost")
        return np.float32([1]), 1.0, self.count % 40 == 0, False, {}


def test_a_run_whose_evaluations_always_fail_keeps_what_it_learned(tmp_path):
    gymnasium.register("Flaky-v0", Flaky)
    config = Config(
        env="gymnasium/Flaky-v0", num_envs=4, batch_size=8, hidden_sizes=(4,), learning_starts=40, total_steps=400,
        log_interval=200, eval_interval=200, eval_episodes=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="failed 3 times in an evaluation: RuntimeError: simulator lost"):
        jaxdqn.train(config, axes=Axes("actor_learner", workers=2), out=tmp_path / "run")
    assert checkpoints.newest(tmp_path / "run" / "checkpoints")[0].meta["iteration"] == 50


def test_a_stop_that_is_asked_for_during_an_evaluation_is_heard_right_after_it():
    """An evaluation on the host may take minutes: neither a chunk nor another one comes before the save."""
    config = Config(num_envs=4, learning_starts=40, total_steps=400, log_interval=100, eval_interval=200).resolved()
    evaluated, saved = [], []
    go_on = lambda states, metrics, start, stop: (states, metrics)  # noqa: E731
    runner = types.SimpleNamespace(
        components=types.SimpleNamespace(config=config), part=None, measured=False, zero_metrics=jnp.zeros(()),
        evaluate=lambda states, iteration: evaluated.append(iteration), telemetry=lambda states: {}, step=go_on,
        prefill=go_on,
    )  # fmt: skip
    hooks = driver.Hooks(
        lambda point: False,
        lambda: bool(evaluated),
        lambda: False,
        lambda at, stopped: saved.append(at),
        lambda count: None,
    )
    at = driver.drive(runner, driver.Progressed([], jnp.zeros(()), 0), timeline(config), hooks)
    assert evaluated == [50] and at.iteration == 50 and [each.iteration for each in saved] == [50]


@pytest.mark.parametrize(
    "name, given, parts",
    [
        ("gymnasium/CartPole-v7", {}, ["did you mean 'gymnasium/CartPole-v"]),
        ("gymnasium/CartPole-v1", {"env_kwargs": {"vectorization": "asink"}}, ["did you mean 'async'"]),
        ("gymnasium/CartPole-v1", {"env_kwargs": {"gravity": 3}}, ["cannot be made with env_kwargs", "gravity"]),
        ("gymnasium/CartPole-v1", {"env_params": {"x": 3}}, ["takes no env_params"]),
        ("gymnasium/CartPole-v1", {"sticky_actions": 0.5}, ["sticky_actions 0.5", "on the host"]),
        ("gymnasium/Pendulum-v1", {}, ["discrete"]),
        ("gymnasium/Blackjack-v1", {}, ["Tuple", "FlattenObservation"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(name, given, parts):
    with pytest.raises(UserError) as error:
        registry.make(name, **given)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in (name, *parts))


def test_an_epsilon_is_the_share_of_random_actions():
    """With 1, both actions are taken as often; by the sign of what a policy of one action gets otherwise."""
    environment = registry.make("gymnasium/CartPole-v1")
    agent = make_agent(Config(hidden_sizes=(16,)), environment.spec)
    params = jax.tree.map(np.zeros_like, agent.init(jax.random.key(1), agent.defaults).params)
    always, never = (
        evaluation_on_host.player(environment, agent, 20, 500, epsilon, 60.0)(params, jax.random.key(0))
        for epsilon in (1.0, 0.0)
    )
    assert isinstance(always, evaluation.Episodes)
    assert np.mean(always.lengths) > 1.5 * np.mean(never.lengths)  # of action 0 alone an episode has 9 steps
