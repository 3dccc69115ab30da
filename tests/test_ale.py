"""Atari games: each step, stack and end is that of ALE's own vector environment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

from jaxdqn import networks, replay, training
from jaxdqn.base import Progress
from jaxdqn.components import make_agent
from jaxdqn.config import Config
from jaxdqn.environments import host, names, registry
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled.memory import tree_bytes

pytest.importorskip("ale_py")
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv

from jaxdqn.environments import ale_adapter

ENVS, SEED = 2, 5
GAMES = ("Breakout", "Pong", "Seaquest", "SpaceInvaders", "Qbert", "Freeway", "MsPacman", "BeamRider")
PARTS = usual(GAMES, "Breakout")
LIMIT = 600  # frames: 150 steps, so that there are time limits in each


def itself(game: str, **options) -> AtariVectorEnv:
    rom = next(rom for rom in roms.get_all_rom_ids() if rom.replace("_", "") == game.lower())
    return AtariVectorEnv(
        rom, ENVS, autoreset_mode="SameStep", reward_clipping=False, use_fire_reset=False, num_threads=1, **options
    )


@functools.cache
def played(game: str, protocol: str, steps: int, limit: int):
    """Random actions through our record: the environment, first screens, `HostStep`s, and `TimeStep`s with stacks."""
    environment = registry.make(f"ALE/{game}-v5", env_kwargs={"protocol": protocol, "max_frames": limit})
    actions = np.random.default_rng(1).integers(0, environment.spec.num_actions, (steps, ENVS))
    made, spec = environment.on_host(ENVS), environment.spec
    timestep = jax.jit(functools.partial(host.timestep, spec))
    first = host.begun(spec, made.reset(SEED))
    observation, seen, stacked = first, [], []
    for row in actions:
        seen.append(made.step(row))
        stacked.append(jax.tree.map(np.asarray, timestep(observation, seen[-1])))
        observation = stacked[-1].observation
    made.close()
    together = [jax.tree.map(lambda *x: np.stack(x), *rows) for rows in (seen, stacked)]
    return environment, actions, np.asarray(first), *together


@pytest.mark.parametrize("game", PARTS)
def test_steps_and_stacks_are_those_of_ale_itself(game):
    """1,000 steps, sticky actions and all of them: screens rebuilt from single ones, rewards, ends."""
    _, actions, first, _, step = played(game, "machado", 1_000, LIMIT)
    ale = itself(
        game, repeat_action_probability=0.25, full_action_space=True, noop_max=0, max_num_frames_per_episode=LIMIT
    )
    screens, _ = ale.reset(seed=SEED)
    np.testing.assert_array_equal(first, np.moveaxis(screens, 1, -1))
    ends = 0
    for count, row in enumerate(actions):
        screens, reward, terminated, truncated, info = ale.step(row)
        end = terminated | truncated
        final = np.where(end[:, None, None, None], info["final_obs"], screens) if end.any() else screens
        np.testing.assert_array_equal(step.observation[count], np.moveaxis(screens, 1, -1))
        np.testing.assert_array_equal(step.final_observation[count], np.moveaxis(final, 1, -1))
        np.testing.assert_array_equal(step.reward[count], reward)
        np.testing.assert_array_equal(step.discount[count], 1.0 - terminated)
        np.testing.assert_array_equal(step.episode_end[count], end)
        ends += truncated.sum()
    assert ends >= 2  # time limits, whose discount is 1
    ale.close()


def test_a_lost_life_ends_what_is_learned_and_not_what_is_reported():
    """The classic protocol: a discount of 0 where ALE says that a life is lost, in the midst of an episode."""
    _, actions, _, seen, _ = played("Breakout", "classic", 600, 108_000)
    ale = itself("Breakout", life_loss_info=True, noop_max=30)
    ale.reset(seed=SEED)
    lost = over = 0
    for count, row in enumerate(actions):
        _, reward, terminated, _, info = ale.step(row)
        np.testing.assert_array_equal(seen.reward[count], reward)
        np.testing.assert_array_equal(seen.discount[count] == 0.0, terminated)
        begun = info["episode_frame_number"] <= 30  # only a start has so few: of an episode that is over
        np.testing.assert_array_equal(seen.episode_end[count], terminated & begun)
        lost, over = lost + np.sum(terminated & ~begun), over + np.sum(terminated & begun)
    assert lost >= 8 and over >= 2
    ale.close()


def test_the_replay_holds_each_screen_once_and_gives_its_stacks_back():
    """7.3 KB a transition; what is drawn are the stacks of the episode, over resets and lost lives."""
    environment, actions, first, _, step = played("Breakout", "classic", 600, 108_000)
    agent = make_agent(Config(network="nips"), environment.spec)
    example = training.transition_example(environment.spec, agent)
    memory = replay.uniform(example, 640, ENVS, 64, n_step=1, copies=1)
    state = memory.init()
    assert tree_bytes(jax.eval_shape(memory.init)) / (640 * ENVS) <= 7_300
    before = np.concatenate([first[None], step.observation[:-1]])
    block = example._replace(
        observation=before,
        action=jnp.asarray(actions, jnp.uint8),
        reward=step.reward,
        discount=step.discount,
        next_observation=step.final_observation,
        episode_end=step.episode_end,
        extras=(),
    )
    add = jax.jit(memory.add)
    for start in range(0, 600, 40):
        rows = jax.tree.map(lambda x: jnp.asarray(x[start : start + 40]), block)
        state = add(state, rows, jnp.int32(start), agent.defaults)
    batch = jax.jit(memory.sample)(
        state, jax.random.key(0), Progress(jnp.int32(600), jnp.int32(0), jnp.int32(0)), agent.defaults
    )
    (row, env), kept = jax.tree.map(np.asarray, batch.indices), np.asarray(batch.weights) > 0
    np.testing.assert_array_equal(np.asarray(batch.observation), before[row, env])
    alive = kept & (np.asarray(batch.bootstrap_discount) > 0)
    np.testing.assert_array_equal(
        np.asarray(batch.bootstrap_observation)[alive], step.final_observation[row, env][alive]
    )
    assert alive.sum() > 20


ARGUMENTS = {
    "frame_skip": 3,
    "max_frames": 100,
    "fire_reset": True,
    "threads": 2,
    "sticky": 0.125,
    "all_actions": True,
    "noops": 7,
}
TO_ALE = (
    "frameskip",
    "max_num_frames_per_episode",
    "use_fire_reset",
    "num_threads",
    "repeat_action_probability",
    "full_action_space",
    "noop_max",
)


def test_every_argument_reaches_ale(monkeypatch):
    given = []
    record = lambda *parts, **options: (given.append(options), AtariVectorEnv(*parts, **options))[1]  # noqa: E731
    monkeypatch.setattr(ale_adapter, "AtariVectorEnv", record)
    spec = registry.make("ALE/Breakout-v5", env_kwargs={**ARGUMENTS, "protocol": "bare", "frames": 2}).spec
    assert (spec.max_episode_steps, spec.observation.shape, spec.num_actions) == (34, (84, 84, 2), 18)
    assert [given[-1][name] for name in TO_ALE] == list(ARGUMENTS.values())
    registry.make("ALE/Breakout-v5", env_kwargs={"protocol": "bare"})
    assert [given[-1][name] for name in TO_ALE] == [4, 108_000, False, 1, 0.0, False, 0]


def test_the_network_is_that_of_atari():
    environment = registry.make("ALE/Pong-v5", env_kwargs={"protocol": "bare"})
    assert environment.spec.num_actions == 6 and environment.spec.max_episode_steps == 27_000
    params = jax.eval_shape(networks.q_network(environment.spec).init, jax.random.key(0))
    assert params["Conv_0"]["kernel"].shape == (8, 8, 4, 32)
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_687_206  # Mnih et al. (2015), with six actions


def test_names_are_those_of_the_roms():
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    known = {name.removeprefix("ALE/") for name in gymnasium.registry if name.startswith("ALE/")}
    assert set(names.ATARI) == {name for name in known if name.endswith("-v5")}


@pytest.mark.parametrize(
    "given, parts",
    [
        ({"env_kwargs": {"protocol": "clasic"}}, ["did you mean 'classic'"]),
        ({"env_kwargs": {"sticky": 1.5}}, ["sticky", "1.5", "[0, 1]"]),
        ({"env_kwargs": {"noops": -1}}, ["noops", "at least 0"]),
        ({"env_kwargs": {"frames": 1}}, ["frames", "at least 2"]),
        ({"env_kwargs": {"frame_skp": 1}}, ["did you mean 'frame_skip'"]),
        ({"env_params": {"x": 1}}, ["takes no env_params"]),
        ({"sticky_actions": 0.25}, ["--env-kwargs.sticky"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line(given, parts):
    with pytest.raises(UserError) as error:
        registry.make("ALE/Pong-v5", **given)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in ("ALE/Pong-v5", *parts))


def test_a_rom_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(roms, "get_rom_path", lambda rom: None)
    with pytest.raises(UserError, match="needs the ROM 'pong'"):
        registry.make("ALE/Pong-v5")
