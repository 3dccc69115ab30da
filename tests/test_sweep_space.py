"""Search spaces: values at a point, grids, conditions; and the samplers that do not learn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import qmc

from jaxdqn.errors import UserError
from jaxdqn.sweeps import samplers, space
from jaxdqn.sweeps.space import Choices, Parameter, Range, Space
from jaxdqn.sweeps.sweep import Sampler

FRACTION = st.floats(0.0, 1.0, exclude_max=True)
AGENTS = {"agent": ["dqn", "a2c"], "value_weight": {"choices": [0.1, 0.5], "when": {"agent": "a2c"}}}


@st.composite
def ranges(draw):
    log, integer = draw(st.booleans()), draw(st.booleans())
    if integer:
        low = draw(st.integers(1 if log else -1000, 10_000))
        low, high = float(low), float(draw(st.integers(low + 1, low + 100_000)))
    else:
        ends = st.floats(1e-30 if log else -1e30, 1e30)
        low, high = sorted((draw(ends), draw(ends)))
        assume(low < high)
    return Range(low, high, log, integer, draw(st.integers(1, 40)))


# -- a point ----------------------------------------------------------------------------------------------------------


@given(ranges(), FRACTION)
def test_a_value_is_inside_its_range_and_whole_where_asked(domain, u):
    value = domain.at(u)
    assert domain.low <= value <= domain.high
    assert isinstance(value, int if domain.integer else float)


@given(ranges(), FRACTION, FRACTION)
def test_values_rise_with_the_point(domain, u, v):
    assert domain.at(min(u, v)) <= domain.at(max(u, v))


@given(st.lists(st.integers(), min_size=1, max_size=300, unique=True), FRACTION)
def test_a_choice_is_one_of_the_choices_at_every_point(values, u):
    assert Choices(tuple(values)).at(u) == values[math.floor(u * len(values))]


def test_linear_and_logarithmic_ranges_are_even_on_their_scales():
    points = np.random.default_rng(0).random(20_000)
    linear = [Range(-2.0, 6.0).at(u) for u in points]
    log = [Range(1e-5, 1e-1, log=True).at(u) for u in points]
    assert stats.kstest(linear, stats.uniform(-2.0, 8.0).cdf).pvalue > 0.01
    assert stats.kstest(log, stats.loguniform(1e-5, 1e-1).cdf).pvalue > 0.01
    assert stats.kstest(linear, stats.uniform(-2.0, 8.2).cdf).pvalue < 1e-6  # the test sees a wrong range


def test_integers_are_uniform_with_both_ends_as_likely_as_the_rest():
    points = np.random.default_rng(1).random(50_000)
    values = [Range(3.0, 9.0, integer=True).at(u) for u in points]
    counts = np.bincount(values)[3:]
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 0.01


def test_integers_on_the_logarithmic_scale_have_the_shares_of_their_intervals():
    points = np.random.default_rng(2).random(50_000)
    counts = np.bincount([Range(1.0, 8.0, log=True, integer=True).at(u) for u in points])[1:]
    expected = np.diff(np.log(np.arange(0.5, 9.0))) / math.log(8.5 / 0.5) * 50_000
    assert stats.chisquare(counts, expected).pvalue > 0.01


# -- grids ------------------------------------------------------------------------------------------------------------


@given(ranges())
def test_a_range_on_a_grid_is_what_numpy_says(domain):
    line = (np.geomspace if domain.log else np.linspace)(domain.low, domain.high, domain.points)
    if domain.integer:
        assert list(domain.grid()) == sorted({round(value) for value in line.tolist()})
    else:
        assert list(domain.grid()) == list(dict.fromkeys(line.tolist()))
        assert domain.grid()[0] == domain.low and (domain.points == 1 or domain.grid()[-1] == domain.high)


def test_a_grid_is_every_combination_once():
    found = space.parse({"gamma": {"low": 0.9, "high": 1, "points": 3}, "target_tau": [0.1, 1], "batch_size": [32, 64]})
    points = [tuple(values.values()) for values in found.grid()]
    assert points == list(itertools.product([0.9, 0.95, 1.0], [0.1, 1], [32, 64]))


def test_a_grid_has_an_inactive_field_in_no_trial():
    assert space.parse(AGENTS).grid() == [
        {"agent": "dqn"},
        {"agent": "a2c", "value_weight": 0.1},
        {"agent": "a2c", "value_weight": 0.5},
    ]


def test_a_grid_of_a_range_without_points_says_how_to_give_them():
    with pytest.raises(UserError, match="points: 5"):
        space.parse({"gamma": {"low": 0.9, "high": 1.0}}).grid()


def test_a_grid_too_large_is_counted_and_not_built():
    axis = {"low": 0.1, "high": 1.0, "points": 1000}
    with pytest.raises(UserError, match=r"1,000,000,000 points; at most 100,000"):
        space.parse({"gamma": axis, "target_tau": axis, "epsilon_end": axis}).grid()


# -- conditions -------------------------------------------------------------------------------------------------------


def chain(length, order):
    """target_tau when agent is a2c, and further fields each under the one before; given in `order`."""
    names = ["agent", "target_tau", "gamma", "epsilon_end", "reward_scale"][:length]
    given = {"agent": {"choices": ["dqn", "a2c"]}}
    for before, name in itertools.pairwise(names):
        given[name] = {"choices": [0.25, 0.5], "when": {before: "a2c" if before == "agent" else 0.5}}
    return {names[place]: given[names[place]] for place in order}


@given(st.permutations(range(5)))
def test_a_parameter_comes_after_those_of_its_condition_in_whatever_order_they_are_written(order):
    names = space.parse(chain(5, order)).names
    assert names == ("agent", "target_tau", "gamma", "epsilon_end", "reward_scale")


@given(st.permutations(range(5)), st.lists(FRACTION, min_size=5, max_size=5))
def test_what_hangs_on_an_inactive_field_is_inactive_too(order, point):
    found = space.parse(chain(5, order))
    whole = {parameter.name: parameter.domain.at(u) for parameter, u in zip(found.parameters, point, strict=True)}
    expected, holds = {}, True
    for name in found.names:
        if holds:
            expected[name] = whole[name]
        holds = holds and whole[name] in ("a2c", 0.5)
    assert found.at(point) == expected == found.active(whole)


def test_a_condition_may_name_several_values_and_several_fields():
    found = space.parse(
        {
            "agent": ["dqn", "double_dqn", "a2c"],
            "loss": ["squared", "huber"],
            "huber_delta": {"low": 1, "high": 2, "when": {"agent": ["dqn", "double_dqn"], "loss": "huber"}},
        }
    )
    active = {(v["agent"], v["loss"]) for v in map(found.at, itertools.product([0.1, 0.5, 0.9], [0.1, 0.9], [0.5]))
              if "huber_delta" in v}  # fmt: skip
    assert active == {("dqn", "huber"), ("double_dqn", "huber")}


@pytest.mark.parametrize("allowed", [[[64, 64]], [[64, 64], [32]]])
def test_a_condition_on_lists_of_widths(allowed):
    found = space.parse(
        {"hidden_sizes": [[32], [64, 64], [8]], "gamma": {"choices": [0.9], "when": {"hidden_sizes": allowed}}}
    )
    assert found.parameters[1].when == {"hidden_sizes": tuple(map(tuple, allowed))}
    assert found.at([0.5, 0.0]) == {"hidden_sizes": (64, 64), "gamma": 0.9}
    assert found.at([0.9, 0.0]) == {"hidden_sizes": (8,)}


# -- samplers that do not learn ---------------------------------------------------------------------------------------

THREE = space.parse(
    {"learning_rate": {"low": 1e-5, "high": 0.1, "log": True}, "gamma": {"low": 0, "high": 1}, "batch_size": [32, 64]}
)


@pytest.mark.parametrize("count", [16, 13])
def test_sobol_is_scipys(count):
    points = qmc.Sobol(3, scramble=True, rng=7).random(16)[:count]
    values = samplers.once(THREE, Sampler("sobol", count, 7))
    expected = 10 ** (-5 + 4 * points[:, 0])
    np.testing.assert_allclose([value["learning_rate"] for value in values], expected, rtol=1e-12)
    np.testing.assert_allclose([value["gamma"] for value in values], points[:, 1])
    assert [value["batch_size"] for value in values] == np.where(points[:, 2] < 0.5, 32, 64).tolist()


def test_sobol_fills_every_cell_of_a_dyadic_grid():
    values = samplers.once(Space((Parameter("gamma", Range(0.0, 1.0), {}),)), Sampler("sobol", 64, 3))
    assert sorted(math.floor(value["gamma"] * 64) for value in values) == list(range(64))


@pytest.mark.parametrize("name", ["random", "sobol"])
def test_trials_follow_from_the_seed(name):
    one, again, other = (samplers.once(THREE, Sampler(name, 16, seed)) for seed in (5, 5, 6))
    assert one == again and all(a != b for a, b in zip(one, other, strict=True))
    assert len({value["gamma"] for value in one}) == 16


def test_more_random_trials_begin_with_the_fewer():
    assert samplers.once(THREE, Sampler("random", 20, 5))[:8] == samplers.once(THREE, Sampler("random", 8, 5))


@pytest.mark.parametrize("sampler", [Sampler("random", 5), Sampler("sobol", 4), Sampler("grid", None)])
def test_what_does_not_learn_has_one_round(sampler):
    found = space.parse({"gamma": {"low": 0, "high": 1, "points": 2}, "batch_size": [32, 64]})
    first = samplers.next_round(found, sampler, 0, [])
    assert len(first) == (sampler.trials or 4)
    assert samplers.next_round(found, sampler, 1, [(values, 0.0) for values in first]) == []


@pytest.mark.parametrize("name", ["random", "sobol"])
def test_points_that_repeat_are_one_trial_and_a_population_keeps_them(name):
    few = space.parse({"batch_size": [64, 128]})
    sampler = Sampler(name, trials=8, seed=0)
    assert sorted(each["batch_size"] for each in samplers.once(few, sampler)) == [64, 128]
    assert len(samplers.points(few, sampler)) == 8
