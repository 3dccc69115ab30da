"""What is read off curves: interpolation, areas, final scores, times to a threshold."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from jaxdqn.analysis import curves, thresholds
from jaxdqn.errors import UserError

NAN = math.nan


def frame(**members):
    """A frame of curves m0=[(step, value), ...]; seconds are a tenth of the steps."""
    rows = [
        {"run": "r", "member": int(name[1:]), "env_steps": step, "seconds": step / 10, "eval_return": value}
        for name, points in members.items()
        for step, value in points
    ]
    return pd.DataFrame(rows)


TWO = frame(m0=[(10, 0.0), (20, NAN), (30, 4.0), (50, 0.0)], m1=[(0, 1.0), (40, 5.0)])


# -- grids ------------------------------------------------------------------------------------------------------------


def test_curves_are_interpolated_and_never_extrapolated():
    table = curves.on_grid(TWO, grid=[0, 10, 20, 40, 50, 60])
    expected = [[NAN, 0.0, 2.0, 2.0, 0.0, NAN], [1.0, 2.0, 3.0, 5.0, NAN, NAN]]
    np.testing.assert_allclose(table.to_numpy(), expected)
    assert table.index.tolist() == [("r", 0), ("r", 1)] and table.index.names == ["run", "member"]
    assert table.columns.tolist() == [0, 10, 20, 40, 50, 60] and table.columns.name == "env_steps"


def test_the_grid_is_by_default_every_logged_point_or_200_between_the_ends():
    assert curves.on_grid(TWO).columns.tolist() == [0, 10, 30, 40, 50]
    many = frame(m0=[(step, float(step)) for step in range(1000)])
    table = curves.on_grid(many)
    assert table.shape == (1, 200) and table.columns[-1] == 999
    np.testing.assert_allclose(table.to_numpy()[0], table.columns)


def test_curves_against_seconds_and_without_runs():
    table = curves.on_grid(TWO.drop(columns="run"), grid=[2.0], x="seconds")
    assert table[2.0].tolist() == [2.0, 3.0] and table.index.names == ["member"]


def test_an_unknown_column_is_named_with_the_nearest():
    for call in (curves.on_grid, curves.area_under_curve, curves.final_score):
        with pytest.raises(UserError, match=r"unknown column 'eval_retrun': did you mean 'eval_return'"):
            call(TWO, "eval_retrun")
    with pytest.raises(UserError, match=r"unknown column 'second'"):
        curves.on_grid(TWO, x="second")


def test_a_frame_without_any_value_has_no_curves():
    empty = TWO.assign(eval_return=NAN)
    assert curves.on_grid(empty).shape == (0, 0) and curves.area_under_curve(empty).empty
    assert curves.final_score(empty).isna().tolist() == [True, True]


# -- areas ------------------------------------------------------------------------------------------------------------


def test_areas_worked_by_hand():
    # 0 to 10 at 0; to 30 and to 40 by triangles: (0 + 40 + 30) / 40. The other climbs from 1 to 5.
    assert curves.area_under_curve(TWO).tolist() == pytest.approx([70 / 40, 3.0])
    # At 20: the horizon falls between two points.
    assert curves.area_under_curve(TWO, horizon=20).tolist() == pytest.approx([10 / 20, 2.0])
    longer = curves.area_under_curve(TWO, horizon=50)
    assert longer.iloc[0] == pytest.approx(80 / 50) and math.isnan(longer.iloc[1])


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(-1e3, 1e3)), min_size=1, max_size=20, unique_by=lambda p: p[0]),
    st.floats(0.05, 1.0),
)
def test_the_area_is_that_of_adaptive_quadrature(points, share):
    points = sorted(points)
    x, y = np.array(points).T
    horizon = share * x[-1]
    kinks = [float(v) for v in x if 0 < v < horizon]
    expected = integrate.quad(lambda t: np.interp(t, x, y), 0, horizon, points=kinks or None, limit=200)[0] / horizon
    assert curves.area_under_curve(frame(m0=points), horizon=horizon).iloc[0] == pytest.approx(expected, abs=1e-6)


def test_a_horizon_must_be_positive():
    with pytest.raises(UserError, match="horizon is 0"):
        curves.area_under_curve(TWO, horizon=0)


# -- final scores -----------------------------------------------------------------------------------------------------


def test_the_final_score_is_the_mean_over_the_last_fifth_of_each_members_steps():
    table = pd.DataFrame(
        {
            "member": [0] * 6 + [1] * 3 + [2],
            "env_steps": [20, 40, 80, 81, 90, 100, 10, 20, 50, 100],
            # Member 0: 80 is not in the last fifth, 90 has none: (6 + 8) / 2. Member 1 stopped at 50, so above 40.
            "eval_return": [1.0, 2.0, 100.0, 6.0, NAN, 8.0, 1.0, 2.0, 5.0, NAN],
        }
    )
    finals = curves.final_score(table)
    assert finals.tolist()[:2] == [7.0, 5.0] and math.isnan(finals[2]) and len(finals) == 3
    assert curves.final_score(table, by=["member"]).index.tolist() == [0, 1, 2]


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_times_to_a_threshold_are_the_first_and_censored_at_the_last_point():
    steps = thresholds.steps_to_threshold(TWO, 4.0)
    assert steps.time.tolist() == [30, 40] and steps.reached.tolist() == [True, True]
    steps = thresholds.steps_to_threshold(TWO, 4.5)
    assert steps.time.tolist() == [50, 40] and steps.reached.tolist() == [False, True]
    assert thresholds.seconds_to_threshold(TWO, 4.5).time.tolist() == [5.0, 4.0]
    assert steps.index.names == ["run", "member"]


def test_a_curve_without_evaluations_is_censored_and_counts():
    table = frame(m0=[(10, NAN), (20, NAN)], m1=[(10, 5.0), (20, 6.0)], m2=[(10, 1.0), (20, NAN)])
    steps = thresholds.steps_to_threshold(table, 5.0)
    assert steps.time.tolist() == [20, 10, 10] and steps.reached.tolist() == [False, True, False]
    assert steps.index.tolist() == [("r", 0), ("r", 1), ("r", 2)]
    found = thresholds.summarise(steps.time, steps.reached)
    assert (found.n, found.reached) == (3, 1)
    assert thresholds.steps_to_threshold(table, 5.0, by=["member"]).time.tolist() == [20, 10, 10]
    nowhere = thresholds.seconds_to_threshold(table.assign(seconds=NAN), 5.0)
    assert nowhere.time.tolist() == [0, 0, 0] and not nowhere.reached.any()
    assert len(thresholds.steps_to_threshold(table.assign(member=[NAN, NAN, 1, 1, 2, 2]), 5.0)) == 3
    assert thresholds.steps_to_threshold(table[:0], 5.0).shape == (0, 2)


TIMES = st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=15)


@given(TIMES)
def test_kaplan_and_meiers_estimate_is_scipys(pairs):
    times, reached = np.array([t for t, _ in pairs], float), np.array([r for _, r in pairs])
    data = stats.CensoredData(uncensored=times[reached], right=times[~reached])
    theirs = stats.ecdf(data).sf
    points, below = thresholds.kaplan_meier(times, reached)
    np.testing.assert_allclose(below, theirs.evaluate(points), atol=1e-12)


@given(TIMES)
def test_without_censoring_the_summaries_are_the_plain_ones(pairs):
    times = np.array([t for t, _ in pairs], float)
    found = thresholds.summarise(times, np.ones(len(times), bool), resamples=20)
    assert found.restricted_mean == pytest.approx(times.mean()) and found.reached == found.n == len(times)
    assert found.median == np.sort(times)[(len(times) - 1) // 2]  # the lower of two middle ones
    capped = thresholds.summarise(times, np.ones(len(times), bool), horizon=times.max() / 2, resamples=20)
    assert capped.restricted_mean == pytest.approx(np.minimum(times, times.max() / 2).mean())


def test_the_restricted_mean_allows_for_censoring():
    """Exponential times of mean 1, censored uniformly before 2: E[min(T, 1)] = 1 - 1/e; a plain mean is too short."""
    rng = np.random.default_rng(0)
    times, stopped = rng.exponential(size=2000), rng.uniform(0.0, 2.0, 2000)
    observed, reached = np.minimum(times, stopped), times <= stopped
    found = thresholds.summarise(observed, reached, horizon=1.0, resamples=100)
    truth = 1 - math.exp(-1)
    assert found.restricted_mean == pytest.approx(truth, abs=0.03)
    assert found.restricted_mean_ci[0] < truth < found.restricted_mean_ci[1]
    assert found.median == pytest.approx(math.log(2), abs=0.05)
    assert np.minimum(observed[reached], 1.0).mean() < truth - 0.1


def test_a_median_that_is_never_reached_is_none_and_its_interval_open():
    found = thresholds.summarise([10, 20, 100, 100, 100], [True, True, False, False, False])
    assert found.median is None and found.reached == 2 and found.horizon == 100
    assert found.median_ci[0] in (10, 20, 100) and found.median_ci[1] == math.inf
    assert found.restricted_mean == pytest.approx((10 + 20 + 300) / 5)


def test_one_curve_has_no_interval_and_none_cannot_be_summarised():
    found = thresholds.summarise([5.0], [True])
    assert found.median == found.restricted_mean == 5.0 and found.median_ci is found.restricted_mean_ci is None
    with pytest.raises(UserError, match="no curve"):
        thresholds.summarise([], [])
    with pytest.raises(UserError, match="horizon is 6"):
        thresholds.summarise([5.0], [True], horizon=6)
