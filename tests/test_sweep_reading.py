"""Sweep files: what they say is what is swept, written out and read again it is the same, and mistakes are one line."""

import math
import pathlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdqn import presets
from jaxdqn.config import Config, HParams, values_of
from jaxdqn.errors import UserError
from jaxdqn.sweeps import reading
from jaxdqn.sweeps.space import Choices, Parameter, Range
from jaxdqn.sweeps.sweep import Halving, PopulationBased, Sampler, Seeds, Winners
from jaxdqn.timeline import num_updates

EXAMPLES = pathlib.Path(__file__).parent.parent / "experiments" / "sweeps"
LEARNING_RATE = {"low": 1e-5, "high": 1e-1, "log": True}


def plain(**parts):
    """A sweep file's values: three seeds of eight random learning rates, changed by `parts`; None leaves one out."""
    values = {"space": {"learning_rate": LEARNING_RATE}, "sampler": {"name": "random", "trials": 8}, "seeds": 3}
    return {name: value for name, value in {**values, **parts}.items() if value is not None}


def load(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return reading.load(path)


def error_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip()[-1] in ".?"
    return str(caught.value)


# -- what a file says -------------------------------------------------------------------------------------------------

WHOLE = """
preset: cartpole-a2c
config: {total_steps: 2e5, dueling: true}
hparams: {max_grad_norm: inf, gamma: .98}
space:
  agent: [dqn, a2c]
  hidden_sizes: [[64, 64], [128]]
  learning_rate: {low: 1e-5, high: 1.5e-2, log: true, points: 4}
  batch_size: {low: 32, high: 128}
  target_period: {low: 10, high: 1000, integer: true, log: true}
  value_weight: {choices: [0.25, .5], when: {agent: a2c, hidden_sizes: [[128]]}}
sampler: {name: tpe, trials: 20, seed: 4, batch: 5, storage: "sqlite:///trials.db"}
seeds: {number: 4, first: 100}
objective: final
halving: {rungs: [.25, .5, .75], keep: .4, exact: true}
winners: {trials: 2, seeds: 5, first_seed: 200}
"""


def test_a_file_with_every_part_is_read_as_written(tmp_path):
    sweep = load(tmp_path, WHOLE)
    chosen = presets.preset("cartpole-a2c")
    assert sweep.config.total_steps == 200_000 and sweep.config.dueling and sweep.config.rollout_length == 8
    assert sweep.hparams.max_grad_norm == math.inf and sweep.hparams.gamma == 0.98
    assert sweep.hparams.epsilon_end == chosen.hparams.epsilon_end
    assert sweep.space.parameters == (
        Parameter("agent", Choices(("dqn", "a2c")), {}),
        Parameter("hidden_sizes", Choices(((64, 64), (128,))), {}),
        Parameter("learning_rate", Range(1e-5, 1.5e-2, True, False, 4), {}),
        Parameter("batch_size", Range(32, 128, False, True), {}),
        Parameter("target_period", Range(10, 1000, True, True), {}),
        Parameter("value_weight", Choices((0.25, 0.5)), {"agent": ("a2c",), "hidden_sizes": ((128,),)}),
    )
    assert sweep.sampler == Sampler("tpe", 20, 4, 5, "sqlite:///trials.db")
    assert sweep.seeds == Seeds(4, 100) and sweep.objective == "final"
    assert sweep.halving == Halving((0.25, 0.5, 0.75), 0.4, True) and sweep.population_based is None
    assert sweep.winners == Winners(2, 5, 200)


def test_the_least_a_file_can_say(tmp_path):
    sweep = load(tmp_path, "space: {gamma: [.9, .99]}\nsampler: grid\n")
    assert sweep.sampler == Sampler("grid", None) and sweep.seeds == Seeds(3) and sweep.objective == "auc"
    assert sweep.config.env == "CartPole-v1" and sweep.config.n_step == presets.preset("cartpole").config.n_step
    assert sweep.halving is None and sweep.population_based is None and sweep.winners == Winners()


@pytest.mark.parametrize(
    "text, number",
    [("1e-3", 1e-3), ("1E-3", 1e-3), (".5e-2", 5e-3), ("2.e-3", 2e-3), ("1e0", 1), ("0.001", 1e-3), ("1.0e-3", 1e-3)],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, number):
    assert (
        load(tmp_path, f"space: {{gamma: [.9]}}\nsampler: grid\nhparams: {{learning_rate: {text}}}").hparams[0]
        == number
    )


@pytest.mark.parametrize("text", ["50_000", "5e4", "5.0e4", "50000", "+5e4", "5e+4"])
def test_whole_numbers_too(tmp_path, text):
    steps = load(tmp_path, f"space: {{gamma: [.9]}}\nsampler: grid\nconfig: {{total_steps: {text}}}").config.total_steps
    assert steps == 50_000 and isinstance(steps, int)


def test_a_metrics_row_for_each_evaluation_whatever_the_budget():
    fixed = reading.parse(plain(config={"total_steps": 100_000}))
    assert fixed.config.log_interval == fixed.config.resolved().eval_interval == 4_000
    searched = reading.parse(plain(space={"total_steps": [500_000, 100_000]}))
    short = searched.config_of({"total_steps": 100_000}).resolved()
    assert short.eval_interval == 4_000 and short.log_interval <= 4_000


def test_a_presets_rate_falls_until_the_end_of_the_sweeps_budget():
    values = {"preset": "cartpole-pqn", "sampler": "grid", "space": {"gamma": [0.9, 0.99]}}
    short = reading.parse({**values, "config": {"total_steps": 100_000}})
    assert short.hparams.learning_rate_updates == num_updates(short.config) == 3_136
    given = {**values, "config": {"total_steps": 100_000}, "hparams": {"learning_rate_updates": 7}}
    assert reading.parse(given).hparams.learning_rate_updates == 7


def test_a_presets_value_of_a_searched_field_is_not_in_the_way():
    """The preset's batch of 128 does not fit into this replay; those that are searched do."""
    sweep = reading.parse(plain(config={"replay_capacity": 100}, space={"batch_size": [32, 64]}))
    assert sweep.config_of({"batch_size": 64}).batch_size == 64


# -- out and in again -------------------------------------------------------------------------------------------------


def again(sweep):
    return reading.parse(reading._numbers(yaml.safe_load(yaml.safe_dump(reading.to_plain(sweep), sort_keys=False))))


def test_the_whole_example_and_those_in_the_repository_come_back(tmp_path):
    assert again(load(tmp_path, WHOLE)) == load(tmp_path, WHOLE)
    files = sorted(EXAMPLES.glob("*.yaml"))
    assert files
    for path in files:
        assert again(reading.load(path)) == reading.load(path)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_comes_back(name):
    sweep = reading.parse(plain(preset=name))
    assert again(sweep) == sweep and sweep.config.env == presets.preset(name).config.env


def test_a_field_keeps_its_fixed_value_where_its_condition_does_not_hold():
    """The preset's, not that of the environment's preset, which a file without one begins with."""
    own = lambda sweep: values_of(sweep.hparams)["value_weight"]  # noqa: E731
    parts = {"agent": ["a2c", "dqn"], "value_weight": {"choices": [0.5, 1.0], "when": {"agent": "dqn"}}}
    by_preset = reading.parse(plain(preset="cartpole-reinforce", space=parts))
    fixed = reading.parse(
        plain(config={"rollout_length": 8, "learning_starts": 0}, hparams={"value_weight": 0.3}, space=parts)
    )
    assert own(by_preset) == own(again(by_preset)) == 0.01
    assert own(fixed) == own(again(fixed)) == 0.3


TRACED = st.sampled_from(["learning_rate", "gamma", "epsilon_end", "target_tau", "huber_delta", "epsilon_begin"])
STATIC = st.sampled_from(["batch_size", "updates_per_iteration", "n_step", "eval_episodes"])
FRACTIONS = st.floats(0.0009765625, 1.0)


@st.composite
def sweeps(draw):
    space = {"agent": ["dqn", "double_dqn"]}
    for name in draw(st.lists(st.one_of(TRACED, STATIC), unique=True, max_size=5)):
        number = FRACTIONS if name in HParams._fields else st.integers(1, 16)
        values = draw(st.lists(number, min_size=2, max_size=4, unique=True))
        space[name] = {"choices": values} if draw(st.booleans()) else {"low": min(values), "high": max(values)}
        if "low" in space[name]:
            space[name].update(draw(st.fixed_dictionaries({}, optional={"log": st.booleans()})), points=3)
        if draw(st.booleans()):
            space[name]["when"] = {"agent": draw(st.sampled_from(["dqn", ["dqn"], ["double_dqn", "dqn"]]))}
    if draw(st.booleans()):
        space["hidden_sizes"] = draw(st.lists(st.lists(st.integers(1, 64), min_size=1), min_size=1, unique_by=tuple))
    name = draw(st.sampled_from(["grid", "random", "sobol", "tpe"]))
    sampler = {"name": name} if name == "grid" else {"name": name, "trials": draw(st.integers(1, 99))}
    rungs = st.lists(st.sampled_from([0.2, 0.4, 0.5, 0.9]), min_size=1, unique=True).map(sorted)
    optional = {
        "preset": st.sampled_from(["cartpole", "cartpole-reference", "minatar-breakout"]),
        "seeds": st.fixed_dictionaries({"number": st.integers(3, 9)}, optional={"first": st.integers(0, 99)}),
        "objective": st.sampled_from(["auc", "final"]),
        "halving": st.fixed_dictionaries({}, optional={"rungs": rungs, "keep": st.sampled_from([0.3, 0.5])}),
        "winners": st.fixed_dictionaries({}, optional={"trials": st.integers(0, 3), "seeds": st.integers(1, 30)}),
    }
    return {"space": space, "sampler": sampler, **draw(st.fixed_dictionaries({}, optional=optional))}


@settings(deadline=None)
@given(sweeps())
def test_any_sweep_comes_back(values):
    sweep = reading.parse(values)
    assert again(sweep) == sweep
    assert sweep.space.names[0] == "agent" and set(sweep.space.names) == set(values["space"])


def test_a_population_based_sweep_comes_back():
    sweep = reading.parse(plain(seeds=1, population_based={"interval": 0.2, "factors": [0.5, 2]}))
    assert sweep.population_based == PopulationBased(0.2, 0.25, (0.5, 2)) and again(sweep) == sweep


# -- mistakes ---------------------------------------------------------------------------------------------------------

WRONG = {
    "part": (plain(sampelr=3), "unknown part of a sweep 'sampelr': did you mean 'sampler'"),
    "no sampler": (plain(sampler=None), "sampler is missing"),
    "no space": (plain(space=None), "space is missing"),
    "empty space": (plain(space={}), "space is empty; it needs at least one field"),
    "space a list": (plain(space=["gamma"]), "space is "),
    "field": (plain(space={"learning_rat": [1]}), "'learning_rat': did you mean 'learning_rate'"),
    "field no text": (plain(space={3: [1]}), "unknown field of the space 3"),
    "fixed field": (plain(config={"num_env": 3}), "'num_env': did you mean 'num_envs'"),
    "hyperparameter": (plain(hparams={"gama": 3}), "unknown hyperparameter 'gama': did you mean 'gamma'"),
    "static": (plain(hparams={"batch_size": 3}), "batch_size is static: it belongs under config"),
    "traced": (plain(config={"learning_rate": 1}), "learning_rate is traced: it belongs under hparams"),
    "both": (plain(hparams={"learning_rate": 1e-3}), "learning_rate is both fixed under hparams and searched"),
    "both static": (plain(space={"n_step": [1]}, config={"n_step": 1}), "n_step is both fixed under config and"),
    "both env": (plain(space={"env": ["Acrobot-v1"]}, env="Acrobot-v1"), "env is both fixed under config and"),
    "two envs": (plain(env="Acrobot-v1", config={"env": "CartPole-v1"}), "env is 'Acrobot-v1', but config.env is"),
    "upside down": (plain(space={"gamma": {"low": 1, "high": 0.5}}), "goes from 1 to 0.5; low must be below high"),
    "a point": (plain(space={"gamma": {"low": 0.5, "high": 0.5}}), "low must be below high"),
    "log of zero": (plain(space={"gamma": {"low": 0, "high": 1, "log": True}}), "starts at 0; its low must be above 0"),
    "log below zero": (plain(space={"reward_scale": {"low": -1, "high": 1, "log": True}}), "starts at -1"),
    "one end": (plain(space={"gamma": {"low": 0}}), "gamma needs either choices, or low and high"),
    "no end": (plain(space={"gamma": {}}), "gamma needs either choices, or low and high"),
    "both kinds": (plain(space={"gamma": {"choices": [1], "log": True}}), "both choices and log"),
    "option": (plain(space={"gamma": {"low": 0, "hihg": 1}}), "option of space.gamma 'hihg': did you mean 'high'"),
    "end a text": (plain(space={"gamma": {"low": "a", "high": 1}}), "space.gamma.low is 'a'; it must be a number"),
    "end infinite": (plain(space={"max_grad_norm": {"low": 1, "high": math.inf}}), "max_grad_norm.high is inf"),
    "end NaN": (plain(space={"gamma": {"low": math.nan, "high": 1}}), "space.gamma.low is nan"),
    "end huge": (plain(space={"reward_scale": {"low": 1, "high": 10**400}}), "it must be a number of at most 1e+38"),
    "no switch": (
        plain(space={"gamma": {"low": 0, "high": 1, "log": "yes"}}),
        "log is 'yes'; it must be true or false",
    ),
    "out of range": (plain(space={"gamma": {"low": 0.9, "high": 1.5}}), "gamma is 1.5; it must be a number in [0, 1]"),
    "half an integer": (plain(space={"batch_size": {"low": 1.5, "high": 3}}), "both must be whole numbers"),
    "range of names": (plain(space={"agent": {"low": 0, "high": 3}}), "has a range, but it is no number"),
    "points": (plain(space={"gamma": {"low": 0, "high": 1, "points": 10**9}}), "whole number from 1 to 100,000"),
    "no points": (plain(sampler="grid"), "points: 5"),
    "no choices": (plain(space={"gamma": []}), "it must be a list of at least one value"),
    "one choice": (plain(space={"gamma": 0.9}), "space.gamma is 0.9; it must be a list"),
    "null choice": (plain(space={"gamma": None}), "space.gamma is None; it must be a list"),
    "choice twice": (plain(space={"gamma": [0.9, 0.9]}), "space.gamma has a value twice"),
    "choice a list": (plain(space={"gamma": [[0.9, 0.8]]}), "has the value [0.9, 0.8]; each must be one number"),
    "choice a switch": (plain(space={"gamma": [True]}), "gamma is True; it must be a number"),
    "choice a text": (plain(space={"batch_size": ["big"]}), "has the value 'big'; it must be of type int"),
    "choice of a name": (plain(space={"loss": ["hubber"]}), "unknown loss 'hubber': did you mean 'huber'"),
    "widths": (plain(space={"hidden_sizes": [64, 64]}), "each must be a list of widths, like [64, 64]"),
    "nested widths": (plain(space={"hidden_sizes": [[[64]]]}), "each must be a list of widths"),
    "not searched": (plain(space={"env_params": [{}]}), "env_params cannot be searched; fix it under config"),
    "when": (plain(space={"gamma": {"choices": [1], "when": 3}}), "space.gamma.when is 3; it must be"),
    "when nothing": (plain(space={"gamma": {"choices": [1], "when": {"agent": []}}}), "when.agent is empty"),
    "when unknown": (
        plain(space={"agent": ["dqn"], "gamma": {"choices": [1], "when": {"agnet": "dqn"}}}),
        "'agnet': did you mean 'agent'",
    ),
    "when never": (
        plain(space={"agent": ["dqn"], "gamma": {"choices": [1], "when": {"agent": "a2c"}}}),
        "gamma.when never holds: agent is never 'a2c', but one of ('dqn',)",
    ),
    "when a range": (
        plain(space={"learning_rate": LEARNING_RATE, "gamma": {"choices": [1], "when": {"learning_rate": 1e-3}}}),
        "names learning_rate, which has a range; it must have choices",
    ),
    "circle": (
        plain(
            space={"gamma": {"choices": [1], "when": {"n_step": 1}}, "n_step": {"choices": [1], "when": {"gamma": 1}}}
        ),
        "conditions of gamma, n_step depend on each other in a circle",
    ),
    "sampler": (plain(sampler="sobool"), "unknown sampler 'sobool': did you mean 'sobol'"),
    "sampler a list": (plain(sampler=["random"]), "unknown sampler"),
    "sampler's field": (
        plain(sampler={"name": "tpe", "trails": 3}),
        "field of sampler 'trails': did you mean 'trials'",
    ),
    "sampler's name": (plain(sampler={"trials": 3}), "sampler.name is missing"),
    "no trials": (plain(sampler="random"), "sampler.trials is None; it must be a whole number from 1"),
    "trials of a grid": (plain(sampler={"name": "grid", "trials": 3}), "sampler.trials is not for the grid"),
    "a storage of a form": (
        plain(sampler={"name": "tpe", "trials": 3, "storage": "x.db"}),
        "it must be sqlite:///FILE",
    ),
    "storage no text": (plain(sampler={"name": "tpe", "trials": 3, "storage": 5}), "sampler.storage is 5; it must be"),
    "storage without file": (plain(sampler={"name": "tpe", "trials": 3, "storage": "journal:"}), "'journal:'; it must"),
    "storage of sobol": (
        plain(sampler={"name": "sobol", "trials": 3, "storage": "journal:x"}),
        "for Optuna's samplers",
    ),
    "cmaes and choices": (
        plain(sampler={"name": "cmaes", "trials": 3}, space={"learning_rate": LEARNING_RATE, "gamma": [0.9, 1]}),
        "'cmaes' needs at least two fields, all of them ranges",
    ),
    "cmaes and one": (plain(sampler={"name": "cmaes", "trials": 3}), "'cmaes' needs at least two fields"),
    "objective": (plain(objective="fnal"), "unknown objective 'fnal': did you mean 'final'"),
    "objective a list": (plain(objective=["auc"]), "unknown objective ['auc']"),
    "seeds a list": (plain(seeds=[0, 1, 2]), "seeds.number is [0, 1, 2]; it must be a whole number from 1"),
    "seeds' field": (plain(seeds={"numbr": 3}), "unknown field of seeds 'numbr': did you mean 'number'"),
    "seeds' first": (plain(seeds={"number": 3, "first": -1}), "seeds.first is -1; it must be a whole number from 0"),
    "first seed": (plain(seeds={"number": 3, "first": 2**31}), "it must be a whole number from 0 to 2,000,000,000"),
    "rung": (plain(halving={"rungs": [0.1, 0.5]}), "begins at 0.1; the first must be at least 0.2"),
    "rungs fall": (plain(halving={"rungs": [0.5, 0.25]}), "must be rising fractions of the budget between 0 and 1"),
    "rungs twice": (plain(halving={"rungs": [0.5, 0.5]}), "must be rising fractions"),
    "rung beyond": (plain(halving={"rungs": [0.5, 1.0]}), "must be rising fractions"),
    "no rungs": (plain(halving={"rungs": []}), "halving.rungs is []; it must be rising fractions"),
    "rungs one": (plain(halving={"rungs": 0.25}), "halving.rungs is 0.25; it must be a list"),
    "rungs texts": (plain(halving={"rungs": ["a"]}), "halving.rungs is ['a']"),
    "keep": (plain(halving={"keep": 1}), "halving.keep is 1; it must be a fraction between 0 and 1"),
    "exact": (plain(halving={"exact": "yes"}), "halving.exact is 'yes'; it must be true or false"),
    "few seeds": (plain(halving={}, seeds=2), "seeds.number is 2; halving needs at least 3"),
    "halving a switch": (plain(halving=True), "halving is True; it must be {field: value}, with rungs, keep, exact"),
    "two stoppers": (plain(halving={}, population_based={}), "halving and population_based are two ways"),
    "static evolution": (
        plain(seeds=1, population_based={}, space={"batch_size": [1, 2]}),
        "batch_size is static (a field of Config); search only fields of HParams",
    ),
    "evolution of tpe": (
        plain(seeds=1, population_based={}, sampler={"name": "tpe", "trials": 3}),
        "take grid, random",
    ),
    "interval": (plain(seeds=1, population_based={"interval": 0}), "interval is 0; it must be a fraction above 0"),
    "quantile": (plain(seeds=1, population_based={"quantile": 0.6}), "quantile is 0.6; it must be a fraction above 0"),
    "factors": (plain(seeds=1, population_based={"factors": [0]}), "factors is [0]; it must be numbers above 0"),
    "factor infinite": (
        plain(seeds=1, population_based={"factors": [math.inf]}),
        "factors is [inf]; it must be numbers",
    ),
    "winners' seeds": (plain(winners={"first_seed": 2}), "winners.first_seed is 2, and tuning uses seeds 0 to 2"),
    "winners touch": (plain(winners={"seeds": 5, "first_seed": 96}, seeds={"number": 3, "first": 100}), "has not seen"),
    "preset": (plain(preset="cartpol"), "unknown preset 'cartpol': did you mean 'cartpole'"),
    "preset a list": (plain(preset=["cartpole"]), "preset is ['cartpole']; it must be a name"),
    "env a list": (plain(env=["CartPole-v1"]), "env is ['CartPole-v1']; it must be a name"),
    "config's env": (plain(config={"env": {}}), "env is {}; it must be a name"),
    "config a list": (plain(config=[]), "config is []; it must be {field: value}"),
    "hparams a text": (plain(hparams=""), "hparams is ''; it must be {field: value}"),
    "several fixed": (plain(hparams={"gamma": [0.9, 0.99]}), "gamma is [0.9, 0.99]; it must be one number"),
    "fixed null": (plain(hparams={"gamma": None}), "hparams.gamma is None; it must be a number in [0, 1]"),
    "fixed huge": (plain(hparams={"reward_scale": 10**400}), "as a float32 that is 0 or infinite"),
    "steps a text": (plain(config={"total_steps": "many"}), "total_steps is 'many'; it must be a whole number"),
    "steps huge": (plain(config={"total_steps": 10**400}), "it must be at most 1,000,000,000,000,000"),
    "sticky a text": (plain(config={"sticky_actions": "x"}), "sticky_actions is 'x'; it must be a number"),
    "agent a number": (plain(config={"agent": 3}), "agent is 3; it must be a name"),
    "parameters": (plain(config={"env_params": 3}), "env_params is 3; it must be {name: value}"),
    "does not fit": (plain(config={"replay_capacity": 64}), "batch_size 128 is larger than the replay"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_that_names_it_and_what_to_do(case):
    values, message = WRONG[case]
    assert message in error_of(reading.parse, values)


NO_COUNT = [0, -3, 2.5, True, "many", None, [], {}, math.nan, 10**30]


@pytest.mark.parametrize("value", NO_COUNT, ids=str)
@pytest.mark.parametrize("name", ["sampler.trials", "sampler.batch", "seeds.number", "winners.seeds"])
def test_counts_are_whole_numbers_above_zero(name, value):
    part, field = name.split(".")
    base = {"sampler": {"name": "tpe", "trials": 3}, "seeds": {"number": 3}, "winners": {}}[part]
    line = error_of(reading.parse, plain(**{part: {**base, field: value}}))
    assert line.startswith(f"{name} is ") and "it must be a whole number from 1 to 100,000" in line


FILES = {
    "empty": ("", "does not hold {name: value}"),
    "a list": ("- 1\n- 2\n", "does not hold {name: value}"),
    "a text": ("hello", "does not hold {name: value}"),
    "another mapping": ("a: 1", "unknown part of a sweep"),
    "binary": (bytes(range(256)), "cannot be read"),
    "no YAML": ("space: {gamma: [", "cannot be read"),
    "a tag": ("space: !!python/object:os.system {}", "cannot be read"),
    "an impossible date": ("space: 2020-13-45\nsampler: grid", "space is '2020-13-45'"),
    "two documents": ("space: 1\n---\nspace: 2\n", "cannot be read"),
    "itself": ("&a [*a]", "for itself"),
    "deep": ("[" * 5000 + "]" * 5000, "nested more than 100 deep"),
    "a key twice": ("space: {gamma: [0.9]}\nspace: {gamma: [0.99]}\nsampler: grid", "the key 'space' comes twice"),
    "a mistake": ("space: {gama: [1]}\nsampler: grid", "did you mean 'gamma'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_no_sweep_is_named(tmp_path, case):
    text, message = FILES[case]
    line = error_of(load, tmp_path, text)
    assert message in line and "sweep.yaml" in line


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert "missing.yaml cannot be read: No such file" in error_of(reading.load, tmp_path / "missing.yaml")
    assert "cannot be read: Is a directory" in error_of(reading.load, tmp_path)


# -- anything at all --------------------------------------------------------------------------------------------------

KEYS = (
    "preset env config hparams space sampler seeds objective halving population_based winners low high log integer "
    "points choices when name trials seed batch storage number first rungs keep exact interval quantile factors"
).split()
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4),
    st.sampled_from([*KEYS, "dqn", "grid", "sobol", "tpe", "CartPole-v1", "cartpole", "relu", 10**400, -(10**400)]),
)  # fmt: skip
NAMES = st.sampled_from([*KEYS, *HParams._fields, *Config.__dataclass_fields__])
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, LEAVES), inner, max_size=5)),
    max_leaves=12,
)


def is_read_or_refused_in_one_line(values):
    """Anything but a `UserError` fails the test where it is raised."""
    try:
        reading.parse(reading._numbers(values))
    except UserError as error:
        return "\n" not in str(error)
    return True


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.one_of(NAMES, LEAVES), JUNK, max_size=5))
def test_nothing_but_a_user_error_comes_of_junk(values):
    assert is_read_or_refused_in_one_line(values)


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(KEYS[:11]), JUNK, NAMES, NAMES)
def test_nor_of_a_sweep_with_junk_in_one_place(part, junk, name, option):
    assert is_read_or_refused_in_one_line({**plain(), part: junk})
    assert is_read_or_refused_in_one_line({**plain(), part: {name: junk}})
    assert is_read_or_refused_in_one_line({**plain(), "space": {name: {"low": 1, "high": 4, option: junk}}})
    assert is_read_or_refused_in_one_line({**plain(), "space": {"agent": ["dqn"], name: [junk]}})
    assert is_read_or_refused_in_one_line({**plain(), "config": {name: junk}})
    assert is_read_or_refused_in_one_line({**plain(), "hparams": {name: junk}})
