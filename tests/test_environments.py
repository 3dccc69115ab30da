"""One contract for all environments, on random rollouts; what each suite and wrapper promises beyond it."""

import functools
import math
import subprocess
import sys
from typing import NamedTuple

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
import scipy.stats
from flax import struct
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn.base import Array, Environment, Frames, PyTree, Spec, TimeStep
from jaxdqn.environments import encoding, registry
from jaxdqn.environments.gymnax_adapter import BINARY, UNREAD
from jaxdqn.environments.names import CONTINUOUS, GYMNAX
from jaxdqn.environments.sticky import sticky
from jaxdqn.errors import UserError

STEPS, ENVS, LIMIT = 50, 4, 20
SIGNIFICANCE = 1e-3  # keys are fixed: a test passes always or never


class Rollout(NamedTuple):
    """Random actions, as NumPy arrays [STEPS, ENVS, ...]; `observed` is what each action was chosen on."""

    observed: np.ndarray
    action: np.ndarray
    state: PyTree  # after the step, and after its reset if there was one
    step: TimeStep


@functools.cache
def limited(name: str) -> Environment:
    return registry.make(name, {"max_steps_in_episode": LIMIT})


def random_inputs(num_actions: int):
    reset_key, action_key, step_key = jax.random.split(jax.random.key(0), 3)
    action = jax.random.randint(action_key, (STEPS, ENVS), 0, num_actions)
    return jax.random.split(reset_key, ENVS), jax.random.split(step_key, (STEPS, ENVS)), action


@functools.cache
def rollout(name: str) -> Rollout:
    environment = limited(name)

    def run(reset_keys, step_keys, actions):
        def step(carry, inputs):
            state, observed = carry
            state, timestep = jax.vmap(environment.step)(inputs[0], state, inputs[1])
            return (state, timestep.observation), (observed, state, timestep)

        return jax.lax.scan(step, jax.vmap(environment.reset)(reset_keys), (step_keys, actions))[1]

    inputs = random_inputs(environment.spec.num_actions)
    observed, state, step = jax.tree.map(np.asarray, jax.jit(run)(*inputs))
    return Rollout(observed, np.asarray(inputs[2]), state, step)


def lengths(end: np.ndarray) -> np.ndarray:
    """[STEPS, ENVS] steps of the episode so far, the one under way included."""
    length, rows = np.zeros(ENVS, int), []
    for row in end:
        length = length + 1
        rows.append(length)
        length = np.where(row, 0, length)
    return np.stack(rows)


# The contract.


@pytest.mark.parametrize("name", GYMNAX)
def test_shapes_and_dtypes_are_those_of_the_spec(name):
    step, spec = rollout(name).step, limited(name).spec
    for observation in (step.observation, step.final_observation):
        assert (observation.shape[2:], observation.dtype) == (spec.observation.shape, spec.observation.dtype)
    assert (step.reward.dtype, step.discount.dtype, step.episode_end.dtype) == (np.float32, np.float32, np.bool_)
    assert step.reward.shape == step.discount.shape == step.episode_end.shape == (STEPS, ENVS)


@pytest.mark.parametrize("name", GYMNAX)
def test_values_are_finite(name):
    values = rollout(name).step
    assert all(np.all(np.isfinite(x)) for x in (values.observation, values.final_observation, values.reward))


@pytest.mark.parametrize("name", GYMNAX)
def test_nothing_is_weakly_typed(name):
    """A weakly typed reset state makes the second call of a jitted loop compile again."""
    environment = limited(name)
    state, observation = jax.eval_shape(environment.reset, jax.random.key(0))
    stepped = jax.eval_shape(environment.step, jax.random.key(0), state, jnp.int32(0))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, observation, stepped)))


@pytest.mark.parametrize("name", GYMNAX)
def test_episodes_end_by_termination_or_at_the_limit(name):
    """Discount 0 where the MDP terminated, and only there; an end with discount 1 comes exactly at the limit."""
    step = rollout(name).step
    terminated, end, length = step.discount == 0.0, step.episode_end, lengths(step.episode_end)
    assert np.all(terminated | (step.discount == 1.0))
    assert np.any(end) and np.all(end[terminated])
    np.testing.assert_array_equal(end & ~terminated, (length == LIMIT) & ~terminated)
    assert np.max(length) <= LIMIT


@pytest.mark.parametrize("name", GYMNAX)
def test_the_limit_is_in_the_spec(name):
    assert limited(name).spec.max_episode_steps == LIMIT


@pytest.mark.parametrize("name", GYMNAX)
def test_final_observation_differs_from_the_next_only_at_ends(name):
    step = rollout(name).step
    differs = np.any((step.observation != step.final_observation).reshape(STEPS, ENVS, -1), axis=-1)
    assert not np.any(differs & ~step.episode_end)
    # By chance the two may be equal at some ends; the bandit has but one observation.
    assert np.any(differs) == (name != "SimpleBandit-bsuite")


# Within 20 random steps, these always terminate, the next do either, and all others only reach the limit.
TERMINATE_EARLY = (
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "SimpleBandit-bsuite",
    "FrozenLake-misc",
)
EITHER = ("CartPole-v1", "Breakout-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar")


@pytest.mark.parametrize("name", [name for name in GYMNAX if name not in TERMINATE_EARLY])
def test_a_time_limit_keeps_discount_1(name):
    step = rollout(name).step
    assert np.any(step.episode_end & (step.discount == 1.0))


@pytest.mark.parametrize("name", (*TERMINATE_EARLY, *EITHER))
def test_termination_has_discount_0(name):
    step = rollout(name).step
    assert np.any(step.episode_end & (step.discount == 0.0))


# gymnax.


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-MinAtar", "FrozenLake-misc"])
def test_the_adapter_steps_as_gymnax_does(name):
    environment, params = gymnax.make(name)
    params = params.replace(max_steps_in_episode=LIMIT)

    def run(reset_keys, step_keys, actions):
        def step(state, inputs):
            out = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(inputs[0], state, inputs[1], params)
            return out[1], (out[0], *out[2:])

        state = jax.vmap(environment.reset, in_axes=(0, None))(reset_keys, params)[1]
        return jax.lax.scan(step, state, (step_keys, actions))[1]

    observation, reward, terminated, truncated, info = jax.jit(run)(*random_inputs(limited(name).spec.num_actions))
    step = rollout(name).step
    np.testing.assert_array_equal(decoded(name, step.observation), observation)
    np.testing.assert_array_equal(decoded(name, step.final_observation), info["final_observation"])
    np.testing.assert_array_equal(step.reward, reward)
    np.testing.assert_array_equal(step.discount == 0.0, terminated)
    np.testing.assert_array_equal(step.episode_end, terminated | truncated)


def decoded(name: str, observation: np.ndarray) -> np.ndarray:
    return np.argmax(observation, axis=-1) if name == "FrozenLake-misc" else observation


@pytest.mark.parametrize("name", sorted(BINARY))
def test_grids_stored_as_bool_are_0_or_1_in_gymnax(name):
    get_obs = gymnax.make(name)[0].get_obs
    raw = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda state: get_obs(state))))(rollout(name).state))
    assert rollout(name).step.observation.dtype == bool and np.issubdtype(raw.dtype, np.floating)
    np.testing.assert_array_equal(raw, rollout(name).step.observation)


@pytest.mark.parametrize("name", ["FourRooms-misc", "FrozenLake-misc"])
def test_integer_observations_are_one_hot(name):
    environment, params = gymnax.make(name)
    shape = jax.eval_shape(environment.reset, jax.random.key(0), params)[0]
    assert np.issubdtype(shape.dtype, np.integer)
    observation = rollout(name).step.observation
    hot = observation.reshape(STEPS, ENVS, *(shape.shape or (1,)), -1)
    np.testing.assert_array_equal(hot.sum(axis=-1), 1)


def test_four_rooms_one_hot_is_gymnaxs_observation():
    get_obs = gymnax.make("FourRooms-misc")[0].get_obs
    raw = jax.vmap(jax.vmap(lambda state: get_obs(state)))(rollout("FourRooms-misc").state)
    hot = rollout("FourRooms-misc").step.observation.reshape(*raw.shape, -1)
    np.testing.assert_array_equal(np.argmax(hot, axis=-1), raw)


def test_the_registry_knows_gymnaxs_names():
    assert set(GYMNAX) | set(CONTINUOUS) <= set(gymnax.registered_envs)
    assert not set(GYMNAX) & set(CONTINUOUS)


def test_names_are_known_without_importing_gymnax():
    code = "import sys; from jaxdqn.environments import registry; registry.names(); assert 'gymnax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Starting states.


def starts(environment: Environment, num: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations [num, *O] after a reset, and after the automatic one at the end of `steps` steps."""
    fresh_key, reset_key, step_key = jax.random.split(jax.random.key(0), 3)
    fresh = jax.vmap(environment.reset)(jax.random.split(fresh_key, num))[1]

    def step(state, keys):
        return jax.vmap(environment.step)(keys, state, jnp.zeros(num, jnp.int32))

    state = jax.vmap(environment.reset)(jax.random.split(reset_key, num))[0]
    steps_taken = jax.lax.scan(step, state, jax.random.split(step_key, (steps, num)))[1]
    assert np.all(steps_taken.episode_end[-1])
    return np.asarray(fresh), np.asarray(steps_taken.observation[-1])


def test_cartpole_starts_alike_after_reset_and_auto_reset():
    fresh, again = starts(registry.make("CartPole-v1", {"max_steps_in_episode": 2}), 4000, 2)
    assert np.all(np.std(fresh, axis=0) > 0.01)
    for dimension in range(4):
        assert scipy.stats.ks_2samp(fresh[:, dimension], again[:, dimension]).pvalue > SIGNIFICANCE


def test_catch_starts_alike_after_reset_and_auto_reset():
    fresh, again = starts(registry.make("Catch-bsuite"), 4000, 9)
    grids, index = np.unique(np.concatenate([fresh, again]).reshape(8000, -1), axis=0, return_inverse=True)
    table = [np.bincount(part, minlength=len(grids)) for part in np.split(index.reshape(-1), 2)]
    assert len(grids) == 5  # the ball's column
    assert scipy.stats.chi2_contingency(table).pvalue > SIGNIFICANCE


# Parameters and arguments.


def assert_refused(*parts: str, name: str = "CartPole-v1", **arguments) -> None:
    """One line that has all of `parts`."""
    with pytest.raises(UserError) as error:
        registry.make(name, **arguments)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("CartPole-v0", "CartPole-v1"),
        ("breakout-minatar", "Breakout-MinAtar"),
        ("breakout", "ALE/Breakout-v5"),
        ("FrozenLake-v1", "FrozenLake-misc"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(wrong, nearest):
    assert_refused(repr(wrong), f"did you mean {nearest!r}?", name=wrong)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_actions_are_refused(name):
    assert_refused(repr(name), "continuous", name=name)


def test_an_unknown_parameter_suggests_the_nearest():
    assert_refused("'max_steps'", "'max_steps_in_episode'", env_params={"max_steps": 5})


@pytest.mark.parametrize("name, field", [(name, field) for name, fields in UNREAD.items() for field in sorted(fields)])
def test_a_parameter_that_gymnax_does_not_read_is_refused(name, field):
    assert_refused(f"env_params.{field} of {name}", "has no effect", name=name, env_params={field: 7})
    env, params = gymnax.make(name)
    value = getattr(params, field)

    def walk(params):
        def step(state, key):
            observation, state, *rest = env.step(key, state, jax.random.randint(key, (), 0, 3), params)
            return state, (observation, *rest[:3])

        return jax.lax.scan(step, env.reset(jax.random.key(0), params)[1], jax.random.split(jax.random.key(1), 60))[1]

    there, changed = jax.jit(walk)(params), jax.jit(walk)(params.replace(**{field: type(value)(value + 7)}))
    jax.tree.map(np.testing.assert_array_equal, there, changed)


def test_a_pole_of_another_mass_and_length_moves_as_gymnasiums():
    """gymnax holds what follows from both as numbers of their own."""
    masses = {"masscart": 2.0, "masspole": 0.4, "length": 0.9}
    environment, theirs = registry.make("CartPole-v1", masses), gymnasium.make("CartPole-v1").unwrapped
    for name, value in {**masses, "total_mass": 2.4, "polemass_length": 0.36}.items():
        setattr(theirs, name, value)
    state, observation = environment.reset(jax.random.key(0))
    theirs.reset(seed=0)
    theirs.state, step = np.asarray(observation, np.float64), jax.jit(environment.step)
    for action in (1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0):
        state, ours = step(jax.random.key(0), state, action)
        np.testing.assert_allclose(ours.final_observation, theirs.step(action)[0], atol=1e-5)
    given = registry.make("CartPole-v1", {**masses, "total_mass": 9.0})  # is taken as it is
    (_, light), (_, heavy) = (of.step(jax.random.key(0), state, 1) for of in (environment, given))
    assert not np.allclose(light.observation, heavy.observation, atol=1e-2)


@pytest.mark.parametrize("value", ["5", None, True, 0, -3, 20.5])
def test_a_wrong_time_limit_is_refused_by_name_and_value(value):
    assert_refused("max_steps_in_episode", repr(value), "CartPole-v1", env_params={"max_steps_in_episode": value})


@pytest.mark.parametrize("value", [0.5, "yes", None])
def test_a_switch_is_neither_number_nor_text(value):
    assert_refused("ramping", repr(value), name="Asterix-MinAtar", env_params={"ramping": value})


def test_a_switch_can_be_turned():
    """Published MinAtar numbers depend on ramping, which makes the game faster from its hundredth step on."""

    def rewards(ramping):
        environment = registry.make("Asterix-MinAtar", {"ramping": ramping})

        def one(state, key):
            state, step = environment.step(key, state, 0)
            return state, step.observation.sum()

        start = environment.reset(jax.random.key(0))[0]
        return jax.lax.scan(one, start, jax.random.split(jax.random.key(1), 400))[1]

    ramped, even = rewards(True), rewards(False)
    assert np.array_equal(ramped[:100], even[:100]) and not np.array_equal(ramped, even)


def test_a_whole_number_serves_where_a_fraction_is_meant():
    environment = registry.make("BernoulliBandit-misc", {"max_steps_in_episode": 3, "min_lim": -1})
    assert environment.spec.max_episode_steps == 3


def test_parameters_reach_the_environment():
    plain, heavy = (registry.make("CartPole-v1", {"gravity": gravity}) for gravity in (9.8, 98.0))
    (state, _), key = plain.reset(jax.random.key(0)), jax.random.key(1)
    assert np.any(plain.step(key, state, 0)[1].observation != heavy.step(key, state, 0)[1].observation)


def test_an_unknown_argument_suggests_the_nearest():
    assert_refused(
        "'use_minimal_actions'",
        "'use_minimal_action_set'",
        name="Breakout-MinAtar",
        env_kwargs={"use_minimal_actions": False},
    )


def test_an_argument_where_none_is_taken_is_refused():
    assert_refused("CartPole-v1", "'size'", "no env_kwargs", env_kwargs={"size": 3})


@pytest.mark.parametrize(
    "name, argument, value, part",
    [
        ("Breakout-MinAtar", "use_minimal_action_set", "maybe", "True or False"),
        ("Breakout-MinAtar", "use_minimal_action_set", 1, "True or False"),
        ("DeepSea-bsuite", "size", 0, "from 1 to 1,000"),
        ("DeepSea-bsuite", "size", 10**9, "from 1 to 1,000"),
        ("DeepSea-bsuite", "size", "8", "a whole number"),
        ("DeepSea-bsuite", "action_mapping_key", [0], "cannot be"),
        ("Catch-bsuite", "rows", -1, "from 1 to 1,000"),
        ("SimpleBandit-bsuite", "num_actions", 0, "from 1 to 1,000"),
        ("UmbrellaChain-bsuite", "n_distractor", -1, "from 0 to 1,000"),
        ("FrozenLake-misc", "success_rate", math.nan, "a float32"),
        ("FrozenLake-misc", "map_name", "9x9", "cannot be made"),
        ("FrozenLake-misc", "desc", 3, "cannot be"),
        ("FourRooms-misc", "goal_fixed", "maybe", "cannot be"),
        ("MetaMaze-misc", "maze_size", 10, "cannot be"),
    ],
)
def test_arguments_that_a_constructor_cannot_take_are_refused(name, argument, value, part):
    assert_refused(name, argument, repr(value), part, name=name, env_kwargs={argument: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e40, 1e-50, 10**400, "9.8", [9.8], None])
def test_a_parameter_is_a_number_that_a_float32_holds(value):
    assert_refused("env_params.gravity of CartPole-v1", env_params={"gravity": value})


MINIMAL_ACTIONS = {"Asterix": 5, "Breakout": 3, "Freeway": 3, "Seaquest": 6, "SpaceInvaders": 4}


@pytest.mark.parametrize("game, minimal", MINIMAL_ACTIONS.items())
def test_minatar_has_its_minimal_and_its_full_action_set(game, minimal):
    name = f"{game}-MinAtar"
    assert registry.make(name).spec.num_actions == minimal
    assert registry.make(name, env_kwargs={"use_minimal_action_set": False}).spec.num_actions == 6


def test_the_minimal_actions_are_those_of_their_place_in_the_full_set():
    """Breakout: no-op, left, right are 0, 1, 3 of [n, l, u, r, d, f]."""
    key = jax.random.key(0)
    minimal = registry.make("Breakout-MinAtar")
    full = registry.make("Breakout-MinAtar", env_kwargs={"use_minimal_action_set": False})
    state = minimal.reset(key)[0]
    after_minimal = [minimal.step(key, state, jnp.int32(a))[1].observation for a in range(3)]
    after_full = [full.step(key, state, jnp.int32(a))[1].observation for a in (0, 1, 3)]
    np.testing.assert_array_equal(after_minimal, after_full)
    assert len(np.unique(np.asarray(after_minimal).reshape(3, -1), axis=0)) == 3


def test_constructor_arguments_shape_the_observation():
    assert registry.make("Catch-bsuite", env_kwargs={"rows": 6, "columns": 4}).spec.observation.shape == (6, 4)


# Sticky actions.

EPISODE = 7


def echo() -> Environment:
    """The reward is the action that was executed; episodes of EPISODE steps."""

    def reset(key):
        return jnp.int32(0), jnp.zeros(1)

    def step(key, state, action):
        end = state + 1 == EPISODE
        observation = jnp.zeros(1)
        reward = jnp.asarray(action, jnp.float32)
        return jnp.where(end, 0, state + 1), TimeStep(observation, reward, jnp.float32(1.0), observation, end)

    return Environment(reset, step, Spec("echo", jax.ShapeDtypeStruct((1,), jnp.float32), 10_000))


def executed(environment: Environment, requested: np.ndarray) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), len(requested))
    run = jax.jit(
        lambda keys, actions: (
            jax.lax.scan(
                lambda state, x: environment.step(x[0], state, x[1]), environment.reset(keys[0])[0], (keys, actions)
            )[1].reward
        )
    )
    return np.asarray(run(keys, requested)).astype(int)


REQUESTED = np.arange(1, 4201, dtype=np.int32)  # all different, so that every repeat shows, and none is 0


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_sticky_actions_repeat_the_last_executed_one_as_often_as_asked(probability):
    done = executed(sticky(echo(), probability), REQUESTED)
    last = np.concatenate([[0], done[:-1]])
    last[::EPISODE] = 0  # an episode's first action has nothing to repeat
    repeated = done != REQUESTED
    np.testing.assert_array_equal(done, np.where(repeated, last, REQUESTED))
    assert scipy.stats.binomtest(int(repeated.sum()), len(REQUESTED), probability).pvalue > SIGNIFICANCE


def test_sticky_coins_are_independent_in_time():
    repeated = executed(sticky(echo(), 0.5), REQUESTED) != REQUESTED
    assert scipy.stats.chisquare(np.bincount(2 * repeated[:-1] + repeated[1:], minlength=4)).pvalue > SIGNIFICANCE


def test_sticky_with_probability_0_is_the_identity():
    np.testing.assert_array_equal(executed(sticky(echo(), 0.0), REQUESTED), REQUESTED)


# Environments of the user.


@pytest.fixture
def register(monkeypatch):
    """registry.register, forgotten after the test."""
    monkeypatch.setattr(registry, "_registered", {})
    return registry.register


def test_make_adds_sticky_actions_when_asked(register):
    register("echo", echo)
    np.testing.assert_array_equal(executed(registry.make("echo"), REQUESTED), REQUESTED)
    assert np.any(executed(registry.make("echo", sticky_actions=0.25), REQUESTED) != REQUESTED)


def test_an_own_record_can_be_registered(register):
    register("mine", probe_environments.action)
    environment = registry.make("mine")
    state, _ = environment.reset(jax.random.key(0))
    assert environment.step(jax.random.key(0), state, jnp.int32(1))[1].reward == -1.0
    assert "mine" in registry.names()


def test_a_gymnax_class_can_be_registered(register):
    from gymnax.environments.bsuite.catch import Catch

    register("SmallCatch", Catch)
    environment = registry.make("SmallCatch", {"max_steps_in_episode": 3}, {"rows": 6})
    assert environment.spec.name == "SmallCatch"
    assert (environment.spec.observation.shape, environment.spec.max_episode_steps) == ((6, 5), 3)


def test_registering_again_replaces(register):
    register("mine", probe_environments.action)
    register("mine", echo)
    assert registry.make("mine").spec.name == "echo"


def test_gymnaxs_names_are_taken(register):
    for name in ("CartPole-v1", "Pendulum-v1"):
        with pytest.raises(UserError, match=name):
            register(name, echo)


def test_a_registered_name_is_suggested(register):
    register("warehouse", echo)
    assert_refused("'warehouse'", name="warehose")


def test_arguments_reach_the_factory(register):
    register("sized", lambda size=1: echo()._replace(spec=echo().spec._replace(num_actions=size)))
    assert registry.make("sized", env_kwargs={"size": 3}).spec.num_actions == 3
    assert_refused("'sise'", "'size'", name="sized", env_kwargs={"sise": 3})


def test_parameters_of_an_own_record_are_refused(register):
    register("mine", echo)
    assert_refused("'mine'", "no env_params", "speed", name="mine", env_params={"speed": 3})


def broken(**changes) -> Environment:
    """`echo` whose step returns other values in the fields named."""
    plain = echo()

    def step(key, state, action):
        state, timestep = plain.step(key, state, action)
        return state, timestep._replace(**changes)

    return plain._replace(step=step)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"observation": jnp.zeros(2)}, ("observation", "float32[2]", "float32[1]")),
        ({"observation": jnp.zeros(1, bool)}, ("observation", "bool[1]", "float32[1]")),
        ({"final_observation": jnp.zeros(())}, ("final_observation", "float32[]", "float32[1]")),
        ({"reward": jnp.int32(1)}, ("reward", "int32[]", "float32[]")),
        ({"reward": jnp.zeros(1)}, ("reward", "float32[1]", "float32[]")),
        ({"discount": jnp.bool_(True)}, ("discount", "bool[]", "float32[]")),
        ({"episode_end": jnp.float32(0)}, ("episode_end", "float32[]", "bool[]")),
        ({"achieved": {"won": jnp.bool_(True)}}, ("achieved", "(none)", "not won")),
        ({"achieved": jnp.zeros(3, bool)}, ("achieved", "(none)", "not a ")),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_step_of_wrong_shape_or_dtype_is_refused(register, changes, parts):
    register("broken", lambda: broken(**changes)._replace(spec=echo().spec._replace(name="broken")))
    assert_refused("'broken'", *parts, name="broken")


# gymnax environments of the user: integers, actions, and what ends an episode.


@struct.dataclass
class Place:
    time: int
    position: int


class Walk(gymnax.environments.environment.Environment):
    """A walk on -3 ... 3, one down or up, which ends at 3; `seen` is what is observed of a position."""

    first_action, merged, values, cut = 0, False, 6, True

    def __init__(self, seen, space, **attributes):
        self.seen, self.space = seen, space
        vars(self).update(attributes)

    @property
    def default_params(self):
        return gymnax.environments.environment.EnvParams(max_steps_in_episode=20)

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2, start=self.first_action)

    def observation_space(self, params):
        return self.space

    def reset_env(self, key, params):
        return self.seen(jnp.int32(0)), Place(jnp.int32(0), jnp.int32(0))

    def step_env(self, key, state, action, params):
        position = jnp.clip(state.position + jnp.where(action == self.first_action, -1, 1), -3, 3)
        state = Place(state.time + 1, position)
        done = position == 3
        if self.merged:
            done |= state.time >= params.max_steps_in_episode
        return self.seen(position), state, jnp.float32(action), done, {}

    def step(self, key, state, action, params=None):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        truncated &= self.cut
        if self.values == 5:
            return observation, state, reward, terminated | truncated, info
        return observation, state, reward, terminated, truncated, info


def positions(environment: Environment) -> list:
    """What is stored at 0, -1, -2, -3."""
    state, first = environment.reset(jax.random.key(0))
    seen = [first]
    for _ in range(3):
        state, step = environment.step(jax.random.key(0), state, jnp.int32(0))
        seen.append(step.final_observation)
    return [np.asarray(x) for x in seen]


BOX, GSPACES = gymnax.environments.spaces.Box, gymnasium.spaces
SPACES = {
    "box below 0": (BOX(-3, 3, (), jnp.int32), lambda p: p),
    "box above 0": (BOX(7, 13, (1,), jnp.int32), lambda p: p[None] + 10),
    "unsigned": (BOX(0, 6, (), jnp.uint8), lambda p: (p + 3).astype(jnp.uint8)),
    "discrete with a start": (GSPACES.Discrete(7, start=-3), lambda p: p),
    "many discrete": (GSPACES.MultiDiscrete([7], start=[-3]), lambda p: p[None]),
}


@pytest.mark.parametrize("case", SPACES)
def test_integers_are_one_hot_from_their_lowest_value_on(register, case):
    space, seen = SPACES[case]
    register("walk", lambda: Walk(seen, space))
    np.testing.assert_array_equal(positions(registry.make("walk")), np.eye(7, dtype=bool)[[3, 2, 1, 0]])


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 9)), min_size=1, max_size=5), st.integers(0, 2**16))
def test_a_vector_of_integers_can_be_read_from_its_code(ranges, seed):
    low = np.array([first for first, _ in ranges], np.int32)
    high = low + np.array([more for _, more in ranges], np.int32)
    encode = encoding.encoder("box", jax.ShapeDtypeStruct(low.shape, jnp.int32), BOX(low, high, low.shape, jnp.int32))
    value = np.random.default_rng(seed).integers(low, high + 1)
    parts = np.split(np.asarray(encode(value)), np.cumsum(high - low + 1)[:-1])
    assert all(part.sum() == 1 for part in parts)
    np.testing.assert_array_equal([part.argmax() for part in parts] + low, value)


@pytest.mark.parametrize("high, kind", [(255, jnp.uint8), (1, jnp.bool_), (9, jnp.float32)])
def test_a_grid_of_small_numbers_is_not_scaled_as_bytes_are(register, high, kind):
    """Networks divide bytes by 255: 0 and 1 would be all but the same to them."""
    register("walk", lambda: Walk(lambda p: jnp.full((2, 2), p == 0, jnp.uint8), BOX(0, high, (2, 2), jnp.uint8)))
    assert registry.make("walk").spec.observation.dtype == kind
    np.testing.assert_array_equal(positions(registry.make("walk"))[0], np.ones((2, 2)))


def test_bytes_stay_bytes(register):
    register("walk", lambda: Walk(lambda p: jnp.full(128, p + 100, jnp.uint8), BOX(0, 255, (128,), jnp.uint8)))
    environment = registry.make("walk")
    assert (environment.spec.observation.shape, environment.spec.observation.dtype) == ((128,), jnp.uint8)
    np.testing.assert_array_equal(positions(environment)[1], np.full(128, 99))


@pytest.mark.parametrize(
    "space, parts",
    [
        (BOX(-jnp.inf, jnp.inf, (), jnp.int32), ("-inf to inf", "small bounds")),
        (BOX(0, jnp.inf, (), jnp.int32), ("0 to inf",)),
        (BOX(jnp.nan, 3, (), jnp.int32), ("nan to 3",)),
        (BOX(-3, 1e12, (), jnp.int32), ("-3 to 1e+12",)),
        (BOX(0, 2**31 - 1, (), jnp.int32), ("2,147,483,648 values", "float32")),
        (GSPACES.Discrete(10**6), ("1,000,000 values",)),
        (BOX(0, 3, (), jnp.int32), ("observed -", "0 to 3")),
        (GSPACES.Discrete(7), ("observed -", "0 to 6")),
        (BOX(-3, 2, (), jnp.int32), ("observed 3", "-3 to 2")),
    ],
)
def test_integers_without_bounds_or_outside_of_them_are_refused(register, space, parts):
    register("walk", lambda: Walk(lambda p: p, space))
    assert_refused("'walk'", *parts, name="walk")


def test_actions_start_where_their_space_does(register):
    register("walk", lambda: Walk(lambda p: p, BOX(-3, 3, (), jnp.int32), first_action=5))
    environment = registry.make("walk")
    state, _ = environment.reset(jax.random.key(0))
    assert environment.spec.num_actions == 2
    assert [float(environment.step(jax.random.key(0), state, jnp.int32(a))[1].reward) for a in (0, 1)] == [5.0, 6.0]


def test_a_time_limit_that_is_a_termination_is_refused(register):
    """As in gymnax 0.x; in 1.x both flags are then set, and the limit would be learned as a death."""
    walk = functools.partial(Walk, lambda p: p.astype(jnp.float32), BOX(-3.0, 3.0, ()))
    for changes in ({}, {"cut": False}):
        register("walk", lambda changes=changes: walk(merged=True, **changes))
        assert_refused("'walk'", "sets terminated where only its time limit", "learned as a death", name="walk")
    register("walk", lambda: walk(values=5))
    assert_refused("'walk'", "step returns 5 values", "learned as a death", name="walk")
    register("walk", walk)
    environment = registry.make("walk", {"max_steps_in_episode": 3})
    state, _ = environment.reset(jax.random.key(0))
    discounts = []
    for action in (1, 1, 1, 0, 0, 0):
        state, step = environment.step(jax.random.key(0), state, jnp.int32(action))
        discounts.append((float(step.discount), bool(step.episode_end)))
    assert discounts == [(1, False), (1, False), (0, True), (1, False), (1, False), (1, True)]  # 3 in 3 steps, a limit


def test_an_end_of_every_first_step_is_no_time_limit(register):
    from gymnax.environments.misc.bernoulli_bandit import BernoulliBandit

    register("bandit", BernoulliBandit)
    assert registry.make("bandit").spec.num_actions == 2


def other_step(step) -> Environment:
    return echo()._replace(step=step)


@pytest.mark.parametrize(
    "step, parts",
    [
        (lambda key, state, action: (state, (jnp.zeros(1), 1.0)), ("TimeStep", "tuple")),
        (lambda key, state, action: (jnp.float32(0), echo().step(key, state, action)[1]), ("int32[]", "float32[]")),
        (lambda key, state, action: ((state, state), echo().step(key, state, action)[1]), ("structure",)),
    ],
    ids=["not a TimeStep", "another dtype of state", "another structure of state"],
)
def test_a_step_that_returns_something_else_is_refused(register, step, parts):
    register("echo", lambda: other_step(step))
    assert_refused("'echo'", *parts, name="echo")


def test_a_reset_of_wrong_shape_is_refused(register):
    register("echo", lambda: echo()._replace(reset=lambda key: (jnp.int32(0), jnp.zeros(3))))
    assert_refused("'echo'", "reset's observation", "float32[3]", "float32[1]", name="echo")


def raising(*_):
    raise RuntimeError("the simulator\nis not there")


def of_gymnax(**members):
    """Catch, with other members."""
    from gymnax.environments.bsuite.catch import Catch

    return type("Odd", (Catch,), members)


def of_observation(observation):
    return of_gymnax(reset=lambda self, key, params: (observation, None))


ODD = {
    "no actions": (lambda: echo()._replace(spec=echo().spec._replace(num_actions=0)), "0 actions"),
    "half an action": (lambda: echo()._replace(spec=echo().spec._replace(num_actions=1.5)), "1.5 actions"),
    "a stack of one frame": (
        lambda: echo()._replace(spec=echo().spec._replace(observation=Frames((1,), jnp.float32, "first"))),
        "frames lie on the last axis, two or more",
    ),
    "reset raises": (lambda: echo()._replace(reset=raising), "reset fails: RuntimeError: the simulator is not there"),
    "step raises": (lambda: echo()._replace(step=raising), "step fails on the state reset returned: RuntimeError"),
    "the factory raises": (raising, "cannot be made with env_kwargs {}: RuntimeError"),
    "a dict": (lambda: echo()._replace(reset=lambda key: (jnp.int32(0), {"a": jnp.zeros(1)})), "of dict; they must be"),
    "a tuple": (lambda: echo()._replace(reset=lambda key: (jnp.int32(0), (jnp.zeros(1),))), "of tuple; they must be"),
    "a dict of step": (lambda: broken(observation={"a": jnp.zeros(1)}), "of dict; they must be one array"),
    "a dict in the spec": (lambda: echo()._replace(spec=echo().spec._replace(observation={"a": 1})), "of int"),
    "complex": (
        lambda: echo()._replace(spec=echo().spec._replace(observation=jax.ShapeDtypeStruct((1,), complex))),
        "observations of complex",
    ),
    "reset of one": (lambda: echo()._replace(reset=lambda key: jnp.zeros(1)), "reset must return (state, observation)"),
    "step of five": (
        lambda: echo()._replace(step=lambda key, state, action: (0,) * 5),
        "step must return (state, Time",
    ),
    "gymnax's, a dict": (of_observation({"a": jnp.zeros(1)}), "of dict; they must be one array"),
    "gymnax's, a tuple": (of_observation((jnp.zeros(1), jnp.zeros(2))), "of tuple; they must be one array"),
    "gymnax's, reset raises": (of_gymnax(reset=raising), "cannot be used: RuntimeError"),
    "gymnax's, step raises": (of_gymnax(step=raising), "cannot be used: RuntimeError"),
    "gymnax's, no actions": (
        of_gymnax(action_space=lambda self, params: type("Space", (), {"n": 0})()),
        "0 actions; it needs at least 1",
    ),
    "gymnax's, no space": (of_gymnax(action_space=raising), "cannot be used: RuntimeError"),
    "no environment": (lambda: 3, "cannot be used: AttributeError"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_environment_that_cannot_be_learned_from_is_refused_in_one_line(register, name):
    factory, part = ODD[name]
    register("odd", factory)
    assert_refused("environment 'odd'" if "gymnax" in name else "environment", part, name="odd")


def test_probe_environments_keep_the_contract(register):
    for probe in ("value", "observed_value", "action", "observed_action", "discount", "time_limit"):
        register(probe, getattr(probe_environments, probe))
        assert isinstance(registry.make(probe).reset(jax.random.key(0))[1], Array)
