"""Intervals and aggregate scores, against SciPy, closed forms, loops, and coverage in simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxdqn.analysis import intervals, scores
from jaxdqn.errors import UserError

RNG = np.random.default_rng(7)
SAMPLE = RNG.lognormal(size=25)


# -- bootstrap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_percentile_interval_is_scipys(statistic, level):
    low, high = intervals.bootstrap_ci(SAMPLE, statistic, level=level, resamples=20_000)
    theirs = stats.bootstrap(
        (SAMPLE,), statistic, confidence_level=level, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose([low, high], theirs, atol=0.03 * (theirs.high - theirs.low))


def test_the_interval_is_to_the_last_bit_that_of_summaries_written_before():
    """12, 15, 44 and 51 values are where 50 (1 - 0.95), which is not 2.5, gave another last digit."""
    for count in (2, 12, 15, 44, 51):
        values = np.random.default_rng(count).normal(100.0, 30.0, count)
        picks = np.random.default_rng(0).integers(0, count, (10_000, count))
        expected = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
        assert intervals.bootstrap_ci(values) == expected.tolist()


def test_two_values_have_the_interval_of_their_three_possible_means():
    # The resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: both tails exceed 2.5 %, and not 30 %.
    assert intervals.bootstrap_ci([0.0, 1.0]) == [0.0, 1.0]
    assert intervals.bootstrap_ci([0.0, 1.0], level=0.4) == [0.5, 0.5]


def test_many_values_have_the_normal_interval():
    values = np.random.default_rng(1).normal(10.0, 2.0, 400)
    half = 1.96 * values.std() / math.sqrt(400)
    expected = [values.mean() - half, values.mean() + half]
    np.testing.assert_allclose(intervals.bootstrap_ci(values), expected, atol=0.1 * half)


def test_the_interval_is_the_same_again_and_changes_with_the_seed():
    assert intervals.bootstrap_ci(SAMPLE) == intervals.bootstrap_ci(list(SAMPLE))
    assert intervals.bootstrap_ci(SAMPLE) != intervals.bootstrap_ci(SAMPLE, seed=1)


@pytest.mark.parametrize("values", [[], [4.0], [1.0, math.nan], [1.0, math.inf]])
def test_there_is_no_interval_without_two_finite_values(values):
    assert intervals.bootstrap_ci(values) is None


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(UserError, match=r"level is .*between 0 and 1"):
        intervals.bootstrap_ci([1.0, 2.0], level=level)


def normal_coverage(n):
    """The interval is mean +- 1.96 sd / sqrt(n), with the sd of n, not n - 1: narrower than Student's."""
    return 1 - 2 * stats.t.sf(1.96 * math.sqrt((n - 1) / n), n - 1)


@pytest.mark.parametrize(
    "kind, n, expected",
    [
        ("normal", 10, normal_coverage(10)),  # 0.904
        ("normal", 30, normal_coverage(30)),  # 0.935
        ("exponential", 10, 0.863),  # by 40,000 intervals computed apart
        ("exponential", 30, 0.916),
    ],
)
def test_intervals_of_the_mean_cover_it_as_often_as_theory_says(kind, n, expected):
    rng, count = np.random.default_rng(n), 1_500
    samples = getattr(rng, f"standard_{kind}")((count, n)) - (kind == "exponential")
    ends = np.array([intervals.bootstrap_ci(sample, resamples=800, seed=i) for i, sample in enumerate(samples)])
    coverage = np.mean((ends[:, 0] <= 0.0) & (ends[:, 1] >= 0.0))
    assert abs(coverage - expected) < 3 * math.sqrt(expected * (1 - expected) / count)


def test_a_band_is_the_interval_at_every_point_with_absent_curves_left_out():
    curves = RNG.normal(size=(6, 4))
    curves[2:, 1] = math.nan
    curves[1:, 2] = math.nan
    curves[:, 3] = math.nan
    band = intervals.bootstrap_band(curves)
    assert band.n.tolist() == [6, 2, 1, 0]
    assert [band.low[0], band.high[0]] == intervals.bootstrap_ci(curves[:, 0])
    assert [band.low[1], band.high[1]] == intervals.bootstrap_ci(curves[:2, 1])
    assert np.isnan([band.low[2:], band.high[2:]]).all()
    np.testing.assert_allclose(band.value[:3], [curves[:, 0].mean(), curves[:2, 1].mean(), curves[0, 2]])
    assert math.isnan(band.value[3])


def test_the_interval_of_a_difference_is_that_of_welch_for_many_values():
    x, y = np.random.default_rng(2).normal(5.0, 1.0, 300), np.random.default_rng(3).normal(3.0, 2.0, 200)
    difference, interval = intervals.bootstrap_difference(x, y)
    welch = stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    assert difference == pytest.approx(x.mean() - y.mean())
    np.testing.assert_allclose(interval, welch, atol=0.05 * (welch.high - welch.low))


def test_a_difference_with_one_value_on_a_side_has_no_interval():
    assert intervals.bootstrap_difference([3.0], [1.0, 1.5]) == (1.75, None)
    value, interval = intervals.bootstrap_difference([], [1.0, 1.5])
    assert math.isnan(value) and interval is None
    value, interval = intervals.bootstrap_difference([1.0, math.nan], [1.0, 1.5])
    assert math.isnan(value) and interval is None


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilsons_interval_is_scipys(counts, level):
    successes, n = counts
    theirs = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    np.testing.assert_allclose(intervals.wilson_interval(successes, n, level), theirs, atol=1e-12)


def test_wilsons_interval_needs_possible_counts():
    assert intervals.wilson_interval(0, 0) is None
    for successes, n in ((3, 2), (-1, 2)):
        with pytest.raises(UserError, match="successes"):
            intervals.wilson_interval(successes, n)


# -- final returns over seeds -----------------------------------------------------------------------------------------


def covered(truth, returns):
    """The share of simulated experiments, returns [R, seeds, episodes], whose interval covers the truth."""
    ends = np.array([intervals.return_interval(each) for each in returns])
    return ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()


@pytest.mark.parametrize(
    "truth, rates",
    [
        (0.7402, lambda rng, shape: np.full(shape, 0.7402)),  # FrozenLake's optimal policy, ten times
        (0.74, lambda rng, shape: rng.beta(7.4, 2.6, shape)),  # seeds differ more than episodes do
        (0.5, lambda rng, shape: rng.beta(0.5, 0.5, shape)),
        (0.375, lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.75, 0.0)),  # every second seed learns nothing
        (0.02, lambda rng, shape: np.full(shape, 0.02)),
    ],
)
def test_intervals_of_success_rates_cover_the_truth(truth, rates):
    rng, seeds = np.random.default_rng(0), (1_000, 10)
    returns = rng.random((*seeds, 20)) < rates(rng, seeds)[..., None]
    assert covered(truth, returns) >= 0.88


@pytest.mark.parametrize(
    "truth, draw",
    [
        (0.0, lambda rng, shape: rng.normal(0.0, 1.0, shape)),
        (5.0, lambda rng, shape: rng.normal(5.0, 3.0, (*shape[:2], 1)) + rng.normal(0.0, 5.0, shape)),
        (1.0, lambda rng, shape: rng.exponential(1.0, (*shape[:2], 1)).repeat(shape[2], axis=2)),
    ],
)
def test_intervals_of_other_returns_cover_the_truth(truth, draw):
    assert covered(truth, draw(np.random.default_rng(0), (1_000, 10, 20))) >= 0.88


def test_equal_episodes_count_once_where_all_succeed():
    """Nine in ten seeds find the way, and walk it in every episode: of ten seeds, often all."""
    found = np.random.default_rng(0).random((1_000, 10, 1)) < 0.9
    ends = np.array([intervals.return_interval(each.repeat(20, axis=1), [1] * 10) for each in found])
    assert ((ends[:, 0] <= 0.9) & (ends[:, 1] >= 0.9)).mean() >= 0.88


def test_intervals_of_three_seeds_cover_the_truth():
    """Of which the percentile bootstrap covers three quarters."""
    assert covered(0.0, np.random.default_rng(0).normal(size=(1_000, 3, 20))) >= 0.92
    rates = np.random.default_rng(1).beta(7.4, 2.6, (1_000, 3, 1))
    assert covered(0.74, np.random.default_rng(2).random((1_000, 3, 100)) < rates) >= 0.92


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_mean_interval_is_scipys(level):
    theirs = stats.ttest_1samp(SAMPLE, 0.0).confidence_interval(level)
    np.testing.assert_allclose(intervals.mean_interval(SAMPLE, level), theirs, rtol=1e-12)


def test_a_rate_interval_is_wilsons_where_seeds_are_equal_and_wider_where_they_differ():
    assert intervals.rate_interval([0.75] * 4, 80) == intervals.wilson_interval(60, 80)
    assert intervals.rate_interval([1.0] * 10, 200) == intervals.wilson_interval(200, 200)
    assert intervals.rate_interval([0.0] * 10, 200) == intervals.wilson_interval(0, 200)
    # p (1 - p) / variance of the mean = .25 / (.25 / 9) = 9 trials, times (1.96 / 2.262)^2.
    size = 9 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 9)) ** 2
    np.testing.assert_allclose(
        intervals.rate_interval([0.0, 1.0] * 5, 200), intervals.wilson_interval(size / 2, size), rtol=1e-12
    )


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_over_seeds_where_the_data_allow_none(values):
    assert intervals.mean_interval(values) is None and intervals.rate_interval(values, 5) is None


# -- aggregates -------------------------------------------------------------------------------------------------------

MATRIX = RNG.gamma(2.0, 0.5, (10, 6))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_the_iqm_is_the_mean_of_the_middle_half(values):
    """Whole values are cut: floor(n / 4) at each end."""
    kept = sorted(values)[len(values) // 4 : len(values) - len(values) // 4]
    assert scores.iqm(values) == pytest.approx(np.mean(kept), abs=1e-9)


def test_aggregates_take_arrays_mappings_and_lists_alike():
    mapping = {task: MATRIX[:, task] for task in range(6)}
    for aggregate in (scores.iqm, scores.mean, scores.median, scores.optimality_gap):
        assert aggregate(MATRIX) == aggregate(mapping) == aggregate(list(mapping.values()))
    assert scores.iqm(MATRIX) == pytest.approx(stats.trim_mean(MATRIX.ravel(), 0.25))
    assert scores.mean(MATRIX) == pytest.approx(MATRIX.mean())
    assert scores.median(MATRIX) == pytest.approx(np.median(MATRIX.mean(axis=0)))
    assert scores.median(MATRIX[:, 0]) == pytest.approx(np.median(MATRIX[:, 0]))
    assert scores.optimality_gap(MATRIX, 1.5) == pytest.approx(1.5 - np.minimum(MATRIX, 1.5).mean())
    assert scores.mean({"a": [0.0, 1.0], "b": [4.0]}) == 2.25


@pytest.mark.parametrize("bad", [[], {}, {"a": []}, [[1.0], [math.nan]]])
def test_scores_that_say_nothing_are_refused(bad):
    with pytest.raises(UserError, match=r"scores (of no task|with NaN)"):
        scores.iqm(bad)


def test_one_task_stratified_is_the_plain_bootstrap():
    ours = scores.stratified_bootstrap_ci(SAMPLE, scores.iqm, resamples=20_000)
    plain = stats.bootstrap(
        (SAMPLE,), lambda x, axis: stats.trim_mean(x, 0.25, axis), n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    np.testing.assert_allclose(ours, plain, atol=0.04 * (plain.high - plain.low))


def test_tasks_are_not_mixed_by_the_stratified_bootstrap():
    """Two tasks, each constant: whatever runs are drawn, the aggregate is the same."""
    assert scores.stratified_bootstrap_ci({"easy": [1.0] * 5, "hard": [0.0] * 3}, scores.mean) == [0.5, 0.5]


def test_the_variance_of_the_stratified_mean_is_the_sum_of_the_tasks_own():
    tasks = {"a": RNG.normal(0.0, 3.0, 80), "b": RNG.normal(5.0, 1.0, 40)}
    low, high = scores.stratified_bootstrap_ci(tasks, scores.mean)
    error = 0.5 * math.sqrt(sum(values.var() / len(values) for values in tasks.values()))
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.04)


def test_one_run_of_a_task_has_no_interval():
    assert scores.stratified_bootstrap_ci({"a": [1.0, 2.0], "b": [1.0]}) is None
    assert np.isnan(scores.performance_profile([[1.0], [2.0, 3.0]], [0.5]).low).all()
    assert scores.probability_of_improvement([1.0], [0.0, 2.0]) == (0.5, None)


def test_a_performance_profile_is_the_share_of_runs_above():
    thresholds = np.linspace(0.0, 3.0, 7)
    band = scores.performance_profile(MATRIX, thresholds)
    for threshold, value in zip(thresholds, band.value, strict=True):
        assert value == pytest.approx(np.mean([score > threshold for score in MATRIX.ravel()]))
    assert (np.diff(band.value) <= 0).all() and (band.low <= band.value).all() and (band.value <= band.high).all()
    assert set(band.n) == {60}


def test_the_band_of_a_profile_of_one_task_is_the_binomial_one():
    """A resampled share is binomial(n, share) / n."""
    values = np.arange(40.0)
    band = scores.performance_profile(values, [9.5, 29.5], resamples=20_000)
    for index, share in enumerate([0.75, 0.25]):
        expected = stats.binom(40, share).ppf([0.025, 0.975]) / 40
        np.testing.assert_allclose([band.low[index], band.high[index]], expected, atol=1.01 / 40)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_probability_of_improvement_is_mann_and_whitneys(x, y):
    value, _ = scores.probability_of_improvement(x, y, resamples=10)
    assert value == pytest.approx(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
    loop = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(x, y)])
    assert value == pytest.approx(loop)


def test_the_interval_of_the_probability_of_improvement_is_a_slow_loops():
    x, y = RNG.normal(0.5, 1.0, 12), RNG.normal(0.0, 1.0, 9)
    value, interval = scores.probability_of_improvement(x, y, resamples=20_000)
    rng = np.random.default_rng(5)
    slow = []
    for _ in range(2_000):
        a, b = rng.choice(x, 12), rng.choice(y, 9)
        slow.append(stats.mannwhitneyu(a, b, method="asymptotic").statistic / 108)
    low, high = np.percentile(slow, [2.5, 97.5])
    np.testing.assert_allclose(interval, [low, high], atol=0.07 * (high - low))
    assert interval[0] < value < interval[1]


def test_improvement_is_averaged_over_tasks_and_needs_the_same_ones():
    value, interval = scores.probability_of_improvement([[2.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]])
    assert value == 0.75 and interval == [0.75, 0.75]
    with pytest.raises(UserError, match="1 tasks against scores of 2"):
        scores.probability_of_improvement([1.0, 2.0], [[1.0], [2.0]])
    one, other = {"a": [0.0, 0.1], "b": [1.0, 0.9]}, {"b": [1.0, 0.9], "a": [0.0, 0.1]}  # by name, not by place
    assert scores.probability_of_improvement(one, other)[1][1] > 0.5
    with pytest.raises(UserError, match="only one side has scores of b, c"):
        scores.probability_of_improvement(one, {"a": [0.0, 0.1], "c": [1.0, 0.9]})
