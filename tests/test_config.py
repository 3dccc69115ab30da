"""Configurations that cannot run are refused in words; the timeline and the ring's size are exact."""

import dataclasses
import inspect
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxdqn
from jaxdqn import agents, presets
from jaxdqn.config import (
    Config,
    HParams,
    check_replicates,
    check_seeds,
    from_dict,
    members,
    plain_hparams,
    replay_rows,
    to_dict,
    validate_hparams,
    with_fields,
    with_values,
)
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.timeline import advice, timeline
from jaxdqn.validation import validate


def assert_one_line_with(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


POSITIVE = [
    "num_envs",
    "rollout_length",
    "batch_size",
    "updates_per_iteration",
    "replay_capacity",
    "n_step",
    "total_steps",
    "eval_episodes",
    "eval_max_steps",
    "log_interval",
    "eval_interval",
    "ensemble_size",
    "num_partitions",
]
WRONG = [
    *[({name: value}, name, repr(value)) for name in POSITIVE for value in (0, -3, 2.5, True)],
    *[({name: value}, name, repr(value)) for name in ("learning_starts", "final_episodes") for value in (-1, 1.5)],
    ({"final_episodes": 2_000_000}, "final_episodes", "1,000,000"),
    *[({"eval_epsilon": value}, "eval_epsilon", str(value)) for value in (-0.1, 1.1, math.nan)],
    *[({"hidden_sizes": value}, "hidden_sizes", repr(value)) for value in ((), (64, 0), (64, 1.5), (True,), "64", 64)],
    ({"hidden_sizes": (10**7,)}, "hidden_sizes", "10000000", "1,000,000"),
    *[({name: 10**7}, name, "10000000") for name in ("ensemble_size", "num_partitions")],
    *[({name: value}, name, repr(value)) for name in ("env", "agent") for value in ("", 3, ["CartPole-v1"], None)],
    *[({name: value}, name, repr(value)) for name in ("env_params", "env_kwargs") for value in ("a", None, {1: 2})],
    ({"env_kwargs": {"size": object}}, "env_kwargs.size", "class"),
    ({"env_kwargs": {"size": {1, 2}}}, "env_kwargs.size", "{1, 2}"),
    ({"network": ["mlp"]}, "network", "['mlp']"),
    ({"dueling": 1}, "dueling", "1"),
    ({"sticky_actions": 1 - 1e-12}, "sticky_actions"),
    ({"network": "x" * 10**6}, "network", "xxx"),
    *[({"sticky_actions": value}, "sticky_actions", str(value)) for value in (-0.1, 1.0, math.nan)],
    ({"network": "minatarr"}, "network", "'minatarr'", "'minatar'"),
    ({"activation": "rely"}, "activation", "'rely'", "'relu'"),
    ({"initializer": "ortogonal"}, "initializer", "'ortogonal'", "'orthogonal'"),
    ({"convolution": "patch"}, "convolution", "'patch'", "'patches'"),
    ({"ensemble_act": "votes"}, "ensemble_act", "'votes'", "'vote'"),
    ({"loss": "hubert"}, "loss", "'hubert'", "'huber'"),
    ({"optimizer": "Adam"}, "optimizer", "'Adam'", "'adam'"),
    ({"epsilon_schedule": "linaer"}, "epsilon_schedule", "'linaer'", "'linear'"),
    ({"batch_size": 65, "replay_capacity": 50}, "batch_size", "65", "64", "replay_capacity"),
    ({"n_step": 4, "replay_capacity": 64, "batch_size": 32}, "n_step", "4", "replay_capacity"),
    ({"total_steps": 1000, "learning_starts": 1000}, "total_steps", "1000", "1008", "learning_starts"),
    ({"replay_capacity": 2**31, "num_envs": 1}, "replay_capacity", str(2**31 - 1)),
    ({"total_steps": 2**31, "num_envs": 1}, "total_steps", str(2**31 - 1)),
]


OWNERS = {"ensemble_size": "ensemble_dqn", "ensemble_act": "ensemble_dqn", "num_partitions": "partitioned_dqn"}


def changed(changes):
    """A configuration with these values by name; of an agent's own settings, for that agent."""
    agent = next((OWNERS[name] for name in changes if name in OWNERS), Config.agent)
    return with_fields(Config(agent=agent), changes)


@pytest.mark.parametrize("changes, parts", [(row[0], row[1:]) for row in WRONG], ids=lambda x: str(x)[:50])
def test_what_cannot_run_is_refused_by_name_and_value(changes, parts):
    with pytest.raises(UserError) as error:
        validate(changed(changes))
    assert_one_line_with(error, *parts)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("name", [*POSITIVE, "learning_starts", "agent", "dueling", "network", "sticky_actions"])
def test_an_integer_that_python_does_not_print_is_refused(name):
    with pytest.raises(UserError) as error:
        validate(changed({name: 10**5000}))
    assert_one_line_with(error, name, "too long to print")


def test_lists_and_numpys_numbers_serve_where_tuples_and_pythons_are_meant():
    given = Config(
        num_envs=np.int64(8), sticky_actions=np.float32(0.25), dueling=np.True_, hidden_sizes=[np.int32(64), 32],
        env=np.str_("CartPole-v1"), env_kwargs={"size": np.int8(3), "map": np.eye(2)},
    )  # fmt: skip
    plain = Config(
        num_envs=8, sticky_actions=0.25, dueling=True, hidden_sizes=(64, 32), env="CartPole-v1",
        env_kwargs={"size": 3, "map": [[1.0, 0.0], [0.0, 1.0]]},
    )  # fmt: skip
    assert given == plain and repr(given) == repr(plain)
    validate(given)
    assert Config(hidden_sizes=np.array([64, 32])).hidden_sizes == (64, 32)
    assert plain_hparams(HParams(gamma=np.float32(0.5), target_period=np.int64(3))) == HParams(
        gamma=0.5, target_period=3
    )


@pytest.mark.parametrize("check, words", [(validate, "a Config"), (validate_hparams, "HParams")])
@pytest.mark.parametrize("value", ["CartPole-v1", {"gamma": 0.9}, None, 3, (0.9,)])
def test_what_is_no_configuration_at_all_is_refused(check, words, value):
    with pytest.raises(UserError) as error:
        check(value)
    assert_one_line_with(error, repr(value), words)


@pytest.mark.parametrize(
    "name, edge, beyond",
    [("learning_starts", 0, -1), ("sticky_actions", 0.0, -0.01), ("sticky_actions", 0.99, 1.0), ("n_step", 1, 0)],
)
def test_values_at_the_edge_of_their_range_run_and_those_beyond_do_not(name, edge, beyond):
    assert validate(Config(**{name: edge})) is None
    with pytest.raises(UserError, match=name):
        validate(Config(**{name: beyond}))


@pytest.mark.parametrize("name, value, nearest", [("num_envs", 10, 8), ("batch_size", 126, 128), ("num_envs", 1, 4)])
def test_sizes_that_devices_cannot_share_are_refused_with_the_nearest(name, value, nearest):
    with pytest.raises(UserError) as error:
        validate(Config(**{name: value}), num_shards=4)
    assert_one_line_with(error, f"{name} {value}", "4 devices", f"{name} {nearest}")


HPARAMS_WRONG = {
    "learning_rate": (-1e-3, math.nan),
    "learning_rate_end": (-0.1, math.inf, math.nan),
    "learning_rate_updates": (0.0, -1.0, math.nan),
    "gamma": (-0.1, 1.1, math.nan),
    "target_period": (0, 0.5, 2.5, 2**24 + 1, math.inf, math.nan),
    "target_tau": (0, 1.5),
    "epsilon_begin": (-0.1, 1.1),
    "epsilon_end": (-0.1, 1.1),
    "epsilon_steps": (0, -1),
    "ladder_power": (-1, math.inf),  # inf * 0 would make the first epsilon NaN
    "max_grad_norm": (0, -1, math.nan),
    "huber_delta": (0, -1, math.inf),  # inf * 0 would make the loss NaN
    "reward_scale": (math.inf, math.nan),
    "reward_clip": (0, -1, math.nan),
    "optimizer_epsilon": (-1e-8, math.inf, math.nan),
    "value_weight": (-1, math.inf),
    "entropy_weight": (math.inf, math.nan),
    "weight_decay": (-1e-4, math.inf, math.nan),
    "priority_exponent": (-0.1, 1.1, math.nan),
    "importance_begin": (-0.1, 1.1),
    "importance_end": (-0.1, 1.1, math.nan),
    "importance_updates": (0, -1, math.nan),
    "priority_epsilon": (0, -1, math.inf, math.nan),
    "munchausen_alpha": (-0.1, 1.1, math.nan),
    "munchausen_temperature": (0, math.inf, math.nan),
    "munchausen_clip": (0.1, -math.inf, math.nan),
    "v_min": (math.inf, math.nan),
    "v_max": (math.inf, math.nan),
    "sigma": (0, -1, math.inf, math.nan),
    "kappa": (-1, math.inf, math.nan),
    "priority_eta": (-0.1, 1.1, math.nan),
    "td_lambda": (-0.1, 1.1, math.nan),
}


def hparams_with(name):
    """Hyperparameters of the first agent that has one called `name`."""
    agent = next((agent for agent in agents.AGENTS if name in agents.names_of(agent)), "dqn")
    return agents.complete(Config(agent=agent), HParams())[1]


A2C = hparams_with("value_weight")


def test_every_hyperparameter_has_a_range():
    assert set(HPARAMS_WRONG) == set(agents.ranges())


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in HPARAMS_WRONG.items() for value in (*values, True, "1", None)]
)
def test_hyperparameters_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(UserError) as error:
        validate_hparams(with_values(hparams_with(name), {name: value}))
    assert_one_line_with(error, f"hparams.{name} is {value!r}")


@pytest.mark.parametrize(
    "name, edge, beyond",
    [
        ("max_grad_norm", math.inf, 0.0),
        ("gamma", 1.0, 1.0001),
        ("target_tau", 1.0, 1.01),
        ("learning_rate", 0.0, -1e-9),
    ],
)
def test_hyperparameters_at_the_edge_run_and_those_beyond_do_not(name, edge, beyond):
    assert validate_hparams(with_values(A2C, {name: edge})) is None
    with pytest.raises(UserError, match=name):
        validate_hparams(with_values(A2C, {name: beyond}))


@given(
    st.sampled_from(list(agents.ranges())),
    st.one_of(
        st.floats(), st.integers(), st.floats(-50, 50).map(lambda x: 10**x), st.sampled_from([10**400, 1e-50, 1e40])
    ),
)
def test_a_hyperparameter_that_is_accepted_is_as_good_as_a_float32(name, value):
    """What is traced is what was asked for: within rounding, and 0 or infinite only where asked for."""
    try:
        validate_hparams(with_values(A2C, {name: value}), "exponential")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        traced = float(jnp.float32(value) * 1)  # devices flush what is too small
        assert traced == pytest.approx(value, rel=1e-6, abs=0)
        validate_hparams(with_values(A2C, {name: traced}), "exponential")


@pytest.mark.parametrize("value", [[0.9, 0.8], (0.9,), np.array([0.9, 0.8]), {"a": 1}, "0.9", 1j])
def test_a_value_of_vary_is_one_number(value):
    for vary in ({"gamma": [value]}, [{"gamma": value}]):
        with pytest.raises(UserError) as error:
            members(HParams(), (0,), vary)
        assert_one_line_with(error, "hparams.gamma is", "a number in [0, 1]")


def test_an_exponential_schedule_cannot_end_at_0():
    validate_hparams(HParams(epsilon_end=0.0))
    with pytest.raises(UserError) as error:
        validate_hparams(HParams(epsilon_end=0.0), "exponential")
    assert_one_line_with(error, "hparams.epsilon_end is 0", "exponential")


def test_timeline_in_numbers():
    line = timeline(
        Config(
            num_envs=16,
            rollout_length=2,
            learning_starts=1000,
            total_steps=100_001,
            log_interval=1000,
            eval_interval=5000,
        )
    )
    assert line.steps_per_iteration == 32
    assert line.prefill == 32  # 31.25
    assert line.total == 3126  # 3125.03
    assert line.log_every == 31  # 31.25
    assert line.eval_every == 155  # five rows of metrics


def test_intervals_default_to_a_hundredth_and_a_25th():
    config = Config(total_steps=500_000).resolved()
    assert (config.log_interval, config.eval_interval) == (5_000, 20_000)


def test_prefill_covers_the_n_steps():
    assert timeline(Config(num_envs=16, learning_starts=0, n_step=5, rollout_length=2)).prefill == 3


@pytest.mark.parametrize("env", ("CartPole-v1", "Acrobot-v1", "Catch-bsuite", "Breakout-MinAtar", "FrozenLake-misc"))
@pytest.mark.parametrize("agent", ("dqn", "double_dqn", "ensemble_dqn", "partitioned_dqn", "a2c", "pqn", "random"))
def test_every_agent_has_settings_that_suit_it_on_every_environment(env, agent):
    usual, (_, config, _) = presets.for_environment(env), presets.for_environment(env, agent)
    validate(config)
    assert (config.env, config.agent) == (env, agent)
    if agents.of(agent).on_policy:
        assert config.rollout_length in ((8,) if agent == "a2c" else (32, 64)) and timeline(config).prefill == 0
        assert config.n_step == (8 if agent == "a2c" else 1)
    else:
        assert dataclasses.replace(config, agent=usual.config.agent) == usual.config
    if (env, agent) not in presets.BY_PAIR:
        assert config.total_steps == usual.config.total_steps


def test_a_preset_of_environment_and_agent_goes_first():
    assert presets.for_environment("CartPole-v1", "a2c") == presets.preset("cartpole-a2c")
    assert presets.for_environment("Acrobot-v1", "a2c") == presets.preset("acrobot-a2c")
    assert presets.for_environment("Acrobot-v1") == presets.preset("acrobot")


def test_updates_begin_after_the_prefill():
    line = timeline(Config(num_envs=10, learning_starts=100))
    assert [line.updates(iteration, 3) for iteration in (0, 10, 11, 20)] == [0, 0, 3, 30]


sizes = st.integers(1, 64)


@given(sizes, sizes, st.integers(1, 10**7), st.integers(1, 10**5), st.integers(1, 10**5))
def test_timeline_rounds_up_to_iterations_and_evaluates_at_rows_of_metrics(num_envs, length, total, log, evaluation):
    config = Config(
        num_envs=num_envs, rollout_length=length, total_steps=total, log_interval=log, eval_interval=evaluation
    )
    line, steps = timeline(config), num_envs * length
    assert (line.total - 1) * steps < total <= line.total * steps
    assert line.log_every >= 1 and line.eval_every >= 1
    assert line.eval_every % line.log_every == 0


@given(sizes, sizes, st.integers(1, 10**6))
def test_the_ring_is_the_capacity_rounded_up_to_blocks(num_envs, length, capacity):
    rows = replay_rows(Config(num_envs=num_envs, rollout_length=length, replay_capacity=capacity))
    assert rows % length == 0
    assert (rows - length) * num_envs < capacity <= rows * num_envs


def test_members_are_the_product_of_values_and_seeds():
    pairs = members(HParams(huber_delta=2.0), (0, 7), {"gamma": [0.9, 1], "learning_rate": [1e-3]})
    assert [(seed, h.gamma, h.learning_rate, h.huber_delta) for seed, h in pairs] == [
        (0, 0.9, 1e-3, 2.0),
        (7, 0.9, 1e-3, 2.0),
        (0, 1.0, 1e-3, 2.0),
        (7, 1.0, 1e-3, 2.0),
    ]


def test_members_without_variation_are_the_seeds():
    assert members(HParams(), (3, 4)) == [(3, HParams()), (4, HParams())]


@pytest.mark.parametrize(
    "seeds, vary, parts",
    [
        ((0,), {"gama": [0.9]}, ("'gama'", "'gamma'")),
        ((0,), {"gamma": []}, ("vary.gamma", "empty list")),
        ((0,), {"gamma": 0.9}, ("vary.gamma is 0.9", "list of values")),
        ((0,), {"gamma": "0.9"}, ("vary.gamma is '0.9'", "list of values")),
        ((0,), [0.9], ("vary holds 0.9", "{field: value}")),
        ((0,), "gamma", ("vary is 'gamma'", "list of settings")),
        ((0,), [], ("vary is an empty list",)),
        ((0,), {"gamma": np.array([])}, ("vary.gamma", "empty list")),
        ((0,), {"gamma": np.array([True])}, ("hparams.gamma is True",)),
        ((0,), {"gamma": range(2**40)}, ("vary.gamma", "at most 100,000")),
        ((0,), {"gamma": [0.9] * 1_000, "learning_rate": [1e-3] * 101}, ("101,000 settings", "at most 100,000")),
        (range(1_000), {"gamma": [0.9] * 200}, ("200,000 members (200 settings x 1,000 seeds)", "at most 100,000")),
        ((0,), {"gamma": [0.9, 1.5]}, ("hparams.gamma", "1.5")),
    ],
)
def test_members_that_cannot_be_are_refused(seeds, vary, parts):
    with pytest.raises(UserError) as error:
        members(HParams(), seeds, vary)
    assert_one_line_with(error, *parts)


@pytest.mark.parametrize(
    "seeds, vary, seed",
    [
        ((3, 3), None, 3),
        ((4, 5, 4), {"gamma": [0.9, 0.8]}, 4),
        ((0,), {"gamma": [0.9, 0.9]}, 0),
        ((0,), [{"gamma": 0.9}, {"learning_rate": 1e-3}, {"gamma": 0.9}], 0),
        ((7,), [{}, {"gamma": HParams().gamma}], 7),  # its default, once more
    ],
)
def test_a_seed_or_a_setting_given_twice_is_no_replicate(seeds, vary, seed, tmp_path):
    with pytest.raises(UserError, match=f"two members are the same run: seed {seed} with the same hyperparameters"):
        check_replicates(members(HParams(), seeds, vary))
    with pytest.raises(UserError, match="the same run"):
        jaxdqn.train(seeds=seeds, vary=vary, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numpys_numbers_are_seeds_and_values_of_vary():
    pairs = members(HParams(), np.arange(2), {"gamma": np.array([0.5, 0.75], np.float32)})
    assert pairs == [(seed, HParams(gamma=gamma)) for gamma in (0.5, 0.75) for seed in (0, 1)]
    assert {type(value) for seed, hparams in pairs for value in (seed, hparams.gamma)} == {int, float}
    assert members(HParams(), [np.uint32(2**32 - 1)], [{"gamma": np.float64(0.5)}]) == [(2**32 - 1, HParams(gamma=0.5))]
    assert check_seeds(seed for seed in (7, 7, 0)) == (7, 7, 0)


@pytest.mark.parametrize(
    "seeds, part",
    [
        ([0, 2**32], "4294967296"),
        ([-1], "-1"),
        ([1.5], "1.5"),
        ([1.0], "1.0"),
        ([True], "True"),
        ([np.True_], "True"),
        (["1"], "'1'"),
        ([[1]], "[1]"),
        (np.array([[0, 1]]), "[0, 1]"),
        (np.array([0.5]), "0.5"),
        ([None], "None"),
        ("12", "'12'"),
        (b"12", "b'12'"),
        (3, "seeds is 3"),
        (np.int64(3), "it must be a list"),
        ({"a": 1}, "{'a': 1}"),
        ([], "empty list"),
        (range(2**64), "at most 100,000"),
    ],
)
def test_what_is_no_seed_is_refused(seeds, part):
    with pytest.raises(UserError) as error:
        check_seeds(seeds)
    assert_one_line_with(error, part, "seeds")


def test_configurations_survive_plain_text():
    config = Config(env="Catch-bsuite", env_params={"max_steps_in_episode": 5}, hidden_sizes=(3, 4), log_interval=7)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_unnamed_fields_take_their_defaults():
    assert from_dict({"num_envs": 4}) == dataclasses.replace(Config(), num_envs=4)


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(UserError) as error:
        agents.complete(from_dict({"num_env": 4}), HParams())
    assert_one_line_with(error, "'num_env'", "'num_envs'")


def test_an_unknown_name_like_none_of_the_known_shows_them_all():
    text = str(unknown_name("agent", "xyzzy", ["dqn", "random"], hint="See the list."))
    assert all(part in text for part in ("'xyzzy'", "dqn, random", "See the list."))


@pytest.mark.parametrize("record", [Config, HParams])
def test_every_setting_has_a_line_of_help(record):
    """The docstring below each field is what `--help` shows."""
    lines = inspect.getsource(record).splitlines()
    fields = [i for i, line in enumerate(lines) if line.startswith("    ") and line[4:].split(":")[0].isidentifier()]
    settings = [i for i in fields if ": " in lines[i] and " = " in lines[i]]
    assert len(settings) == len(record.__annotations__)
    assert all(lines[i + 1].strip().startswith('"""') for i in settings)


def test_many_environments_on_a_small_budget_get_advice():
    assert advice(Config(num_envs=10, total_steps=21_000), HParams()) == []
    assert advice(Config(num_envs=1, total_steps=1_100), HParams()) == []  # nothing could be lowered
    (line,) = advice(Config(num_envs=500, rollout_length=2, total_steps=500_000), HParams())
    assert "num_envs 500 x rollout_length 2 leaves 499 gradient updates in 500,000 steps" in line


def test_no_preset_gets_advice():
    for name, (_, config, hparams) in presets.PRESETS.items():
        assert advice(config, hparams) == [], name


def test_a_rate_that_is_0_before_the_end_is_told():
    _, config, hparams = presets.preset("cartpole-pqn")
    (line,) = advice(dataclasses.replace(config, total_steps=2_000_000), hparams)
    assert line.startswith("the learning rate is 0 from update 15,680 on, of 62,528;")


@pytest.mark.parametrize(
    "env", ["Acrobot-v1", "octax/brix", "craftax/Craftax-Symbolic-v1", "Catch-bsuite", "CartPole-v1"]
)
def test_the_rate_of_an_on_policy_preset_falls_until_the_end_of_the_environments_run(env):
    _, config, hparams = presets.for_environment(env, "pqn")
    line = timeline(config)
    updates = line.total * config.updates_per_iteration
    assert hparams.learning_rate_end == 0 and hparams.learning_rate_updates == pytest.approx(updates, rel=0.01)
    longer = dataclasses.replace(config, total_steps=3 * config.total_steps)
    assert presets.falling(hparams, config, longer).learning_rate_updates == pytest.approx(3 * updates, rel=0.03)
    early = hparams._replace(learning_rate_updates=updates / 2)
    assert presets.falling(early, config, longer) == early


def test_on_policy_agents_have_the_rewards_of_the_environment():
    assert presets.for_environment("pgx/2048", "a2c").hparams.reward_scale == 0.01
    assert presets.for_environment("octax/ufo", "pqn").hparams.reward_scale == 0.1
    assert presets.for_environment("ALE/Pong-v5", "pqn").hparams.reward_clip == 1.0
    craftax = presets.for_environment("craftax/Craftax-Symbolic-v1", "pqn").hparams
    assert craftax.reward_scale == 1.0 and craftax.own == presets.preset("craftax-pqn").hparams.own
