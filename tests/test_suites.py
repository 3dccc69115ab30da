"""The table of suites, and one contract for all of their environments; one of each suite is stepped beside it."""

import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

from jaxdqn import agents, networks
from jaxdqn.base import Codes, Environment, Spec, TimeStep
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.environments import auto_reset, registry, suites
from jaxdqn.errors import UserError
from jaxdqn.masks import Masked
from jaxdqn.parallel.compiled.runner import transition_bytes

GOLDEN_STEPS, GOLDEN_LIMIT = 500, 60
STEPS, LIMIT = 48, 20  # of the contract
ENVS = 2
QUICKLY = {"xla_backend_optimization_level": 0}  # compiled, which is all that the contract takes time for
GOLDEN = (
    "octax/brix",
    "xminigrid/MiniGrid-EmptyRandom-6x6",
    "pgx/minatar-breakout",
    "pgx/2048",
    "craftax/Craftax-Classic-Symbolic-v1",
)
BY_DEFAULT = (*GOLDEN, "octax/target_shooter1", "xminigrid/MiniGrid-DoorKey-5x5")
ALL = [name for suite in suites.SUITES[1:] if not suite.on_host for name in suite.names]
OF_SUITES = usual(ALL, *BY_DEFAULT)
BESIDE = [name for name in ALL if name in GOLDEN or not name.startswith("craftax/")]  # the others compile for minutes


class Itself(NamedTuple):
    """A suite without our adapter: reset(key) -> (state, observation), and step(key, state, action) -> (state,
    observation, reward, terminated, truncated)."""

    reset: object
    step: object


def octax(name: str) -> Itself:
    from octax.environments import create_environment

    game, _ = create_environment(name.partition("/")[2], max_num_steps_per_episodes=GOLDEN_LIMIT)
    show = lambda frames: frames.transpose(2, 1, 0)  # noqa: E731
    reset = lambda key: (game.reset(key)[0], show(game.reset(key)[1]))  # noqa: E731

    def step(key, state, action):
        state, frames, *rest, _ = game.step(state, action)
        return state, show(frames), *rest

    return Itself(reset, step)


def xminigrid(name: str) -> Itself:
    import xminigrid
    from xminigrid.core.constants import Tiles

    env, params = xminigrid.make(name.partition("/")[2], max_steps=GOLDEN_LIMIT)

    def reset(key):
        timestep = env.reset(params, key)
        return timestep, timestep.observation

    def step(key, timestep, action):
        after = env.step(params, timestep, action)
        terminated = after.discount == 0
        place = after.state.agent.position
        # Elsewhere what the goal is differs from world to world.
        solved = after.state.grid[place[0], place[1], 0] == Tiles.GOAL if "Empty" in name else after.reward > 0
        return after, after.observation, after.reward, terminated, after.last() & ~terminated, {"solved": solved}

    return Itself(reset, step)


def pgx(name: str) -> Itself:
    import pgx

    env = pgx.make(name.partition("/")[2])
    shown = lambda s: Masked(s.observation, s.legal_action_mask) if name == "pgx/2048" else s.observation  # noqa: E731

    def reset(key):
        state = env.init(key)
        return state, shown(state)

    def step(key, state, action):
        after = env.step(state, legal(action, shown(state)), key)
        return after, shown(after), after.rewards[0], after.terminated, after.truncated

    return Itself(reset, step)


def craftax(name: str) -> Itself:
    from craftax.craftax_env import make_craftax_env_from_name

    symbolic, suite = "Symbolic" in name, "craftax.craftax_classic" if "Classic" in name else "craftax.craftax"
    module = importlib.import_module(f"{suite}.envs.craftax_{'symbolic' if symbolic else 'pixels'}_env")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{suite}.constants.BLOCK_PIXEL_SIZE_HUMAN", 16)  # whose textures take minutes
        patch.setattr(f"{suite}.constants.save_compressed_pickle", lambda *_: None)
        env = make_craftax_env_from_name(name.partition("/")[2], auto_reset=False)
    params = env.default_params.replace(max_timesteps=GOLDEN_LIMIT)

    def show(observation):
        if not symbolic:
            return jnp.round(255 * observation).astype(jnp.int32)
        shape = module.get_map_obs_shape()
        cells, numbers = jnp.split(observation, [np.prod(shape)])
        return {"map": cells.reshape(shape), "numbers": numbers}

    def reset(key):
        observation, state = env.reset(key, params)
        return state, show(observation)

    def step(key, state, action):
        observation, state, reward, done, info = env.step(key, state, action, params)
        achieved = {name.partition("/")[2]: x > 0 for name, x in info.items() if name.startswith("Achievements/")}
        dead = state.player_health <= 0  # in lava, too; no random agent meets the last boss
        return state, show(observation), reward, dead, done & (state.timestep >= GOLDEN_LIMIT), achieved

    # The noise that worlds are made of is wrong in batches, on a CPU; in a loop it is not.
    return Itself(jax.custom_batching.sequential_vmap(reset), step)


LIMITS = {
    "octax": ("env_kwargs", "max_num_steps_per_episodes"),
    "xminigrid": ("env_params", "max_steps"),
    "craftax": ("env_params", "max_timesteps"),
}


def required(name: str) -> None:
    for module in suites.of(name).modules:
        pytest.importorskip(module)


def limited(name: str, limit: int) -> tuple[Environment, bool]:
    """Our record, and whether it has a time limit, which is then this one."""
    required(name)
    where = LIMITS.get(name.partition("/")[0])
    return registry.make(name, **({where[0]: {where[1]: limit}} if where else {})), where is not None


class Rollout(NamedTuple):
    """Random actions through our record: the first observations, `TimeStep`s [T, ENVS, ...], and the observations
    [T, ENVS, ...] of resets with the second half of each step's key, which is what an adapter resets with."""

    first: object
    step: TimeStep
    starts: object


def legal(action, observation):
    """`action`, or where there is a mask one of the legal actions."""
    if not isinstance(observation, Masked):
        return action
    return jnp.argsort(~observation.legal, stable=True)[action % jnp.sum(observation.legal)]


def inputs(num_actions: int, length: int):
    reset_key, action_key, step_key = jax.random.split(jax.random.key(0), 3)
    action = jax.random.randint(action_key, (length, ENVS), 0, num_actions)
    return jax.random.split(reset_key, ENVS), jax.random.split(step_key, (length, ENVS)), action


def rollout(environment: Environment, length: int, options: dict | None = None) -> Rollout:
    @functools.partial(jax.jit, compiler_options=options)
    def run(reset_keys, step_keys, actions):
        def one(key, state, observation, action):
            state, step = environment.step(key, state, legal(action, observation))
            return (state, step.observation), step

        now = jax.vmap(environment.reset)(reset_keys)
        step = lambda now, x: jax.vmap(one)(x[0], *now, x[1])  # noqa: E731
        start = lambda key: environment.reset(jax.random.split(key)[1])[1]  # noqa: E731
        steps = jax.lax.scan(step, now, (step_keys, actions))[1]
        return Rollout(now[1], steps, jax.vmap(jax.vmap(start))(step_keys))

    given = inputs(environment.spec.num_actions, length)
    once, again = (jax.tree.map(np.asarray, run(*given)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)  # keys fix everything
    return once


@pytest.mark.parametrize("name", OF_SUITES)
def test_the_contract(name):
    environment, has_limit = limited(name, LIMIT)
    (_, step, starts), spec = rollout(environment, STEPS, QUICKLY), environment.spec
    for observation in (step.observation, step.final_observation):
        assert jax.tree.structure(observation) == jax.tree.structure(spec.observation)
        for seen, like in zip(jax.tree.leaves(observation), jax.tree.leaves(spec.observation), strict=True):
            assert (seen.shape[2:], seen.dtype) == (like.shape, like.dtype)
            if isinstance(like, Codes):
                assert np.all(seen < np.asarray(like.sizes))
    assert (step.reward.dtype, step.discount.dtype, step.episode_end.dtype) == (np.float32, np.float32, np.bool_)
    assert np.all(np.isfinite(step.reward)) and np.all((step.discount == 0) | (step.discount == 1))
    assert np.all(step.episode_end[step.discount == 0])
    # What follows is a start after an end, else what the step produced.
    end = lambda x: step.episode_end.reshape(STEPS, ENVS, *(1,) * (x.ndim - 2))  # noqa: E731
    following = jax.tree.map(lambda new, old: np.where(end(new), new, old), starts, step.final_observation)
    jax.tree.map(np.testing.assert_array_equal, step.observation, following)
    assert spec.max_episode_steps == (LIMIT if has_limit else None)
    for end, discount in zip(step.episode_end.T, step.discount.T, strict=True):
        lengths = np.diff(np.flatnonzero(end), prepend=-1)
        assert not has_limit or (lengths.size and lengths.max() <= LIMIT)
        # Only a limit ends an episode that would go on.
        cut = discount[end] == 1
        assert np.all(lengths[cut] == LIMIT) and (has_limit or not cut.any())
    state, observation = jax.eval_shape(environment.reset, jax.random.key(0))
    stepped = jax.eval_shape(environment.step, jax.random.key(0), state, jnp.int32(0))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, observation, stepped)))


def golden(suite: Itself, num_actions: int):
    """The same with the suite's own functions, reset by hand: (observation, reward, terminated, truncated, the next
    observation, which is a start's after an end; and where it says so, what was achieved), each [GOLDEN_STEPS, ENVS,
    ...]."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(reset_keys, step_keys, actions):
        def one(state, key, action):
            step_key, reset_key = jax.random.split(key)
            after, observation, reward, terminated, truncated, *achieved = suite.step(step_key, state, action)
            start, first = suite.reset(reset_key)
            end = terminated | truncated
            # A weak type, and score * 1.0 of a uint8, change in the first step.
            select = lambda new, old: jnp.where(end, new, jnp.asarray(old).astype(new.dtype))  # noqa: E731
            state = jax.tree.map(select, jax.tree.map(strong, start), after)
            following = jax.tree.map(lambda new, old: jnp.where(end, new, old), first, observation)
            return state, (observation, reward, terminated, truncated, following, *achieved)

        state, first = jax.vmap(suite.reset)(reset_keys)
        step = lambda state, x: jax.vmap(one)(state, *x)  # noqa: E731
        return first, jax.lax.scan(step, jax.tree.map(strong, state), (step_keys, actions))[1]

    return jax.tree.map(np.asarray, run(*inputs(num_actions, GOLDEN_STEPS)))


def strong(x):
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, x.dtype)


@pytest.mark.parametrize("name", usual(BESIDE, *GOLDEN[:4]))  # that of Craftax takes 40 seconds
def test_a_trajectory_is_that_of_the_suite_itself(name):
    environment, _ = limited(name, GOLDEN_LIMIT)
    first, step, _ = rollout(environment, GOLDEN_STEPS, QUICKLY)
    suite = globals()[name.partition("/")[0]](name)
    expected_first, (observation, reward, terminated, truncated, following, *achieved) = golden(
        suite, environment.spec.num_actions
    )
    seen, expected = (first, step.final_observation, step.observation), (expected_first, observation, following)
    jax.tree.map(np.testing.assert_array_equal, seen, expected)
    np.testing.assert_array_equal(step.reward, reward)
    np.testing.assert_array_equal(step.discount, 1.0 - terminated)  # so a time limit keeps 1
    np.testing.assert_array_equal(step.episode_end, terminated | truncated)
    assert np.any(terminated | truncated) or name == "pgx/minatar-freeway"  # which lasts 2,501 steps
    assert len(achieved) == bool(environment.spec.achievements)
    for expected in achieved:
        # Craftax tells at an episode's end.
        seen, told = (jax.tree.map(lambda x: x[step.episode_end], done) for done in (step.achieved, expected))
        jax.tree.map(np.testing.assert_array_equal, dict(seen), told)
        assert set(told) == set(environment.spec.achievements)
        assert not np.all([*told.values()])
        assert np.any([*told.values()]) or name not in GOLDEN  # nobody walks through a memory by chance


def test_a_start_after_an_end_is_drawn_anew():
    """EmptyRandom begins anywhere: the starts of many episodes are as many kinds as those of many resets."""
    name = "xminigrid/MiniGrid-EmptyRandom-6x6"
    environment, _ = limited(name, LIMIT)
    _, step, _ = rollout(environment, GOLDEN_STEPS)
    after = {x.tobytes() for x in step.observation[step.episode_end]}
    fresh = jax.jit(jax.vmap(environment.reset))(jax.random.split(jax.random.key(1), 2000))[1]
    assert len(after) > 8 and after <= {x.tobytes() for x in np.asarray(fresh)}


@pytest.mark.parametrize("game, channels", [("breakout", 4), ("space_invaders", 6)])
def test_pgxs_minatar_has_the_rules_of_gymnaxs(game, channels):
    """The two games without chance but in the start, over the same actions until the first end."""
    pytest.importorskip("pgx")
    other = "".join(part.capitalize() for part in game.split("_")) + "-MinAtar"
    ours = registry.make(f"pgx/minatar-{game}", env_kwargs={"sticky_action_prob": 0.0}), registry.make(other)
    actions = jax.random.randint(jax.random.key(2), (GOLDEN_STEPS,), 0, ours[0].spec.num_actions)

    def run(environment, seed):
        state, first = environment.reset(jax.random.key(seed))
        step = lambda state, action: environment.step(jax.random.key(0), state, action)  # noqa: E731
        return first, jax.lax.scan(step, state, actions)[1]

    def by_start(environment):
        episodes = (jax.jit(run, static_argnums=0)(environment, seed) for seed in range(8))
        return {np.asarray(first).tobytes(): step for first, step in episodes}

    runs = [by_start(environment) for environment in ours]
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) == (2 if game == "breakout" else 1)
    for start, one in runs[0].items():
        two = runs[1][start]
        length = 1 + int(np.argmax(one.episode_end))
        assert one.episode_end.any() and one.final_observation.shape[-1] == channels
        for field in ("final_observation", "reward", "discount"):
            np.testing.assert_array_equal(getattr(one, field)[:length], getattr(two, field)[:length])


def test_2048_is_played_by_its_rules():
    """Move by move, beside a board in Python: a tile appears where there was none, and what merges is the reward."""
    environment, _ = limited("pgx/2048", LIMIT)
    first, step, _ = rollout(environment, GOLDEN_STEPS)
    assert environment.spec.observation.observation.shape == (4, 4, 31) and environment.spec.num_actions == 4
    board = lambda seen: np.argmax(seen.observation, axis=-1)  # noqa: E731
    assert np.all(np.sum(step.final_observation.observation, axis=-1) == 1) and np.all(step.reward >= 0)
    before = np.concatenate([board(first)[None], board(step.observation)[:-1]])
    mask = np.concatenate([first.legal[None], step.observation.legal[:-1]])
    for t, env in np.ndindex(step.reward.shape):
        moves = [moved(before[t, env], action) for action in range(4)]
        assert mask[t, env].tolist() == [not np.array_equal(to, before[t, env]) for to, _ in moves]
        action = legal_action(t, env, mask[t, env])
        to, reward = moves[action]
        new = np.argwhere(board(step.final_observation)[t, env] != to)
        assert step.reward[t, env] == reward and len(new) == 1 and to[tuple(new[0])] == 0
        last = board(step.final_observation)[t, env]
        stuck = all(np.array_equal(moved(last, a)[0], last) for a in range(4))
        assert step.episode_end[t, env] == stuck == (step.discount[t, env] == 0)
        assert not stuck or step.final_observation.legal[t, env].all()
    assert np.any(step.episode_end)


def legal_action(t, env, mask):
    action = np.asarray(inputs(4, GOLDEN_STEPS)[2])[t, env]
    return np.flatnonzero(mask)[action % mask.sum()]


def moved(board, action):
    """(the board after tiles slid left, up, right or down, and what merged), without the new tile."""
    turned, reward = np.rot90(board, action), 0
    rows = []
    for row in turned:
        row, out = [int(x) for x in row if x], []
        while row:
            tile = row.pop(0)
            if row and row[0] == tile:
                row.pop(0)
                tile += 1
                reward += 2**tile
            out.append(tile)
        rows.append(out + [0] * (4 - len(out)))
    return np.rot90(np.array(rows), -action), reward


def test_worlds_of_a_batch_are_those_of_single_resets():
    """Nine are enough to see the sums that jaxlib 0.10.2 gets wrong on a CPU."""
    name = "craftax/Craftax-Classic-Symbolic-v1"
    reset, keys = jax.jit(jax.vmap(limited(name, LIMIT)[0].reset)), jax.random.split(jax.random.key(3), 9)
    worlds = reset(keys)[0].map
    for key, world in zip(keys[-2:], worlds[-2:], strict=True):
        np.testing.assert_array_equal(world, reset(key[None])[0].map[0])


# Where starts are made.


def counter(renewal) -> Environment:
    """The state counts down from what a start draws; made of a key, too, as states of suites are."""
    reset = lambda key: ({"left": jax.random.randint(key, (), 1, 6), "key": key}, jax.random.uniform(key, (2,)))  # noqa: E731

    def step(key, state, action):
        left = jnp.float32(state["left"] - 1)  # another dtype than a start's
        return auto_reset.Step({**state, "left": left}, jnp.ones(2) * left, 1, left == 0, action == 0)

    return auto_reset.auto_reset(reset, step, Spec("counter", jax.ShapeDtypeStruct((2,), jnp.float32), 9), renewal)


@pytest.mark.parametrize("batch", [(), (200,), (2, 5)])
def test_starts_only_where_an_episode_ended_change_no_value(batch):
    def run(renewal):
        environment, keys = counter(renewal), jax.random.split(jax.random.key(0), (21, *batch))
        reset, step = environment.reset, environment.step
        for _ in batch:
            reset, step = jax.vmap(reset), jax.vmap(step)
        actions = jax.random.randint(jax.random.key(1), (20, *batch), 0, 9)
        last, steps = jax.lax.scan(lambda state, x: step(x[0], state, x[1]), reset(keys[0])[0], (keys[1:], actions))
        return {**last, "key": jax.random.key_data(last["key"])}, steps

    one, two = (jax.jit(run, static_argnums=0)(x) for x in (auto_reset.everywhere, auto_reset.where_ended))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert 3 * one[1].episode_end.size > 3 * one[1].episode_end.sum() > one[1].episode_end.size / 3


def test_where_nothing_ended_no_start_is_made():
    starts = []

    def start(key):
        jax.debug.callback(starts.append, key)
        return jnp.zeros(())

    end = jnp.arange(6) % 5 == 0
    jax.jit(jax.vmap(auto_reset.where_ended(start)))(jnp.arange(6), end, jnp.ones(6)).block_until_ready()
    jax.effects_barrier()
    assert sorted(int(key) for key in starts) == [0, 5]


# Bytes, which docs/environments.md and `train.py --dry-run` say.


@pytest.mark.parametrize(
    "name, size", [("octax/brix", 1030), ("xminigrid/MiniGrid-Empty-8x8", 104), ("pgx/minatar-breakout", 56)]
)
def test_a_transition_takes_the_bytes_that_the_ring_has_for_it(name, size):
    required(name)
    config = agents.complete(Config(env=name, num_envs=2, rollout_length=4, replay_capacity=24), HParams())[0]
    components = make_components(config)
    assert transition_bytes(components) == size
    assert sum(x.nbytes for x in jax.tree.leaves(components.replay.init())) == 24 * size


# The table.


def test_names_are_those_that_the_suites_have():
    for module in ("octax", "xminigrid", "pgx", "craftax"):
        pytest.importorskip(module)
    import octax.environments
    from octax.environments import get_rom_path

    modules = {module.name for module in pkgutil.iter_modules(octax.environments.__path__)}
    listed = {name.partition("/")[2] for name in suites.OCTAX.names}
    assert modules == {name if name in modules else name.rstrip("0123456789") for name in listed}
    for name in listed - modules:
        assert get_rom_path(f"{name}.ch8")
    known = importlib.import_module("xminigrid").registered_environments()
    no_goal = {name for name in known if name.startswith("XLand")} | {"MiniGrid-Playground"}
    assert {name.partition("/")[2] for name in suites.XMINIGRID.names} == set(known) - no_goal
    games = {name for name in importlib.import_module("pgx").available_envs() if name.startswith(("minatar", "2048"))}
    assert {name.partition("/")[2] for name in suites.PGX.names} == games
    makers = inspect.getsource(importlib.import_module("craftax.craftax_env").make_craftax_env_from_name)
    named = set(re.findall(r"Craftax-[\w-]*v1", makers))
    assert {name.partition("/")[2] for name in suites.CRAFTAX.names} == {x for x in named if "AutoReset" not in x}


def test_the_table_needs_neither_jax_nor_the_suites():
    code = (
        "import sys; from jaxdqn.environments import suites; [s.installed for s in suites.SUITES]; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"jax", "gymnax", "octax", "cv2", "xminigrid", "craftax", "gymnasium", "ale_py"} & set(loaded)


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("octax/brx", "octax/brix"),
        ("brix", "octax/brix"),
        ("MiniGrid-Empty-8x8", "xminigrid/MiniGrid-Empty-8x8"),
        ("CartPole", "CartPole-v1"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest_of_any_suite(wrong, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        registry.make(wrong)


def test_a_suite_that_is_not_installed_says_what_to_do(monkeypatch):
    monkeypatch.setattr(suites, "SUITES", [suite._replace(modules=("nowhere",)) for suite in suites.SUITES])
    with pytest.raises(UserError, match=r'is octax\'s, which is not installed: pip install -e ".\[octax\]"'):
        registry.make("octax/brix")


def test_the_name_of_a_suites_environment_is_taken():
    with pytest.raises(UserError, match="is octax's"):
        registry.register("octax/brix", lambda: None)


@pytest.mark.parametrize(
    "name, given, parts",
    [
        ("pgx/minatar-breakout", {"env_params": {"x": 1}}, ["takes no env_params"]),
        ("pgx/minatar-breakout", {"env_kwargs": {"sticky_action_prob": 2}}, ["is 2.0", "from 0 to 1"]),
        ("octax/brix", {"env_params": {"x": 1}}, ["takes no env_params"]),
        ("octax/brix", {"env_kwargs": {"frame_skp": 1}}, ["did you mean 'frame_skip'"]),
        ("octax/brix", {"env_kwargs": {"fps": 0}}, ["fps", "at least 1"]),
        ("xminigrid/MiniGrid-Empty-5x5", {"env_kwargs": {"x": 1}}, ["takes no env_kwargs"]),
        ("xminigrid/MiniGrid-Empty-5x5", {"env_params": {"max_step": 1}}, ["did you mean 'max_steps'"]),
        ("xminigrid/MiniGrid-Empty-5x5", {"env_params": {"view_size": 4}}, ["view_size", "odd"]),
        ("xminigrid/MiniGrid-Empty-5x5", {"env_params": {"height": 4}}, ["height", "at least 5"]),
        ("xminigrid/MiniGrid-MemoryS8", {"env_params": {"height": 9}}, ["height", "is 9", "can only be 7"]),
        ("xminigrid/MiniGrid-FourRooms", {"env_params": {"height": 9}}, ["9 x 19", "must be equal"]),
        ("pgx/2048", {"env_kwargs": {"x": 1}}, ["takes no env_kwargs"]),
        ("pgx/2048", {"sticky_actions": 0.1}, ["cannot have sticky actions"]),
        ("craftax/Craftax-Classic-Symbolic-v1", {"env_params": {"day_lenght": 4}}, ["did you mean 'day_length'"]),
        ("craftax/Craftax-Classic-Symbolic-v1", {"env_params": {"max_timesteps": 0}}, ["at least 1"]),
        ("craftax/Craftax-Symbolic-v1", {"env_kwargs": {"max_mele_mobs": 9}}, ["did you mean 'max_melee_mobs'"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name, given, parts):
    required(name)
    with pytest.raises(UserError) as error:
        registry.make(name, **given)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in (name, *parts))


def test_the_time_limit_follows_the_size_of_the_grid():
    required("xminigrid/MiniGrid-Empty-5x5")
    for height, limit in ((5, 100), (7, 140)):
        made = registry.make("xminigrid/MiniGrid-Empty-5x5", {"height": height})
        assert made.spec.max_episode_steps == limit


# Codes.


def test_networks_take_codes_one_hot():
    kind, rng = Codes((3, 4, 2), np.uint8, (5, 3)), np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, (6, 3, 4)) for size in kind.sizes], axis=-1).astype(np.uint8)
    expected = np.concatenate([np.eye(5)[codes[..., 0]], np.eye(3)[codes[..., 1]]], axis=-1)
    np.testing.assert_array_equal(networks.decoder(kind)(codes), expected)
    kernel = networks.q_network(Spec("test", kind, 3)).init(jax.random.key(0))["Conv3x3_0"]["kernel"]
    assert kernel.shape == (3, 3, 8, 16)
