"""Main effects of hyperparameters, on functions whose variance shares are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxdqn.analysis import importance
from jaxdqn.errors import UserError


def trials(n, seed=0, **columns):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({name: draw(rng, n) for name, draw in columns.items()})


def uniform(rng, n):
    return rng.uniform(-1.0, 1.0, n)


def test_a_weighted_sum_has_the_shares_of_its_squared_weights():
    frame = trials(4000, a=uniform, b=uniform, c=uniform)
    frame["score"] = 3.0 * frame.a + 2.0 * frame.b
    found = importance.main_effects(frame, ["a", "b", "c"], permutations=100)
    # Eight bins see all of a straight line's variance but that within the bins, 1/64.
    np.testing.assert_allclose(found.share, [9 / 13 * 63 / 64, 4 / 13 * 63 / 64, 0.0], atol=0.02)
    assert (found.n == 4000).all() and list(found.index) == ["a", "b", "c"]


def test_a_curved_effect_counts_and_an_interaction_does_not():
    """Var(a^2) = 4/45 and Var(b c) = 1/9 for uniforms on [-1, 1]; b c has no main effect."""
    frame = trials(6000, a=uniform, b=uniform, c=uniform)
    frame["score"] = frame.a**2 + frame.b * frame.c
    found = importance.main_effects(frame, ["a", "b", "c"], permutations=100).share
    assert found["a"] == pytest.approx((4 / 45) / (4 / 45 + 1 / 9), abs=0.04)
    assert abs(found["b"]) < 0.01 and abs(found["c"]) < 0.01


def test_the_ishigami_function_has_its_published_first_order_indices():
    """Sobol' indices at a = 7, b = 0.1: 0.314, 0.442, 0 (Ishigami and Homma, 1990).

    Eight bins of width pi / 4 keep sinc(1/8)^2 = 95 % of a sine's variance, and sinc(1/4)^2 = 81 % of a squared one's.
    """
    frame = np.pi * trials(8000, x=uniform, y=uniform, z=uniform)
    frame["score"] = np.sin(frame.x) + 7 * np.sin(frame.y) ** 2 + 0.1 * frame.z**4 * np.sin(frame.x)
    found = importance.main_effects(frame, ["x", "y", "z"], permutations=20).share
    np.testing.assert_allclose(found, [0.314 * np.sinc(1 / 8) ** 2, 0.442 * np.sinc(1 / 4) ** 2, 0.0], atol=0.025)


def test_categories_have_the_share_of_the_analysis_of_variance():
    frame = trials(90, kind=lambda rng, n: rng.choice(["x", "y", "z"], n), noise=uniform)
    frame["score"] = frame.kind.map({"x": 0.0, "y": 1.0, "z": 0.5}) + frame.noise
    found = importance.main_effects(frame, ["kind"], permutations=500)
    f, p = stats.f_oneway(*(part.score for _, part in frame.groupby("kind")))
    # Epsilon squared from F: (k - 1) (F - 1) / ((k - 1) F + n - k).
    assert found.share["kind"] == pytest.approx(2 * (f - 1) / (2 * f + 87))
    assert (found.share["kind"] > found.noise["kind"]) == (p < 0.05)


def test_nothing_is_explained_by_chance_on_average_and_rarely_beyond_the_noise():
    shares, beyond = [], []
    for seed in range(150):
        frame = trials(40, seed, a=uniform, score=uniform)
        found = importance.main_effects(frame, ["a"], permutations=100, seed=seed)
        shares.append(found.share["a"])
        beyond.append(found.share["a"] > found.noise["a"])
    assert abs(np.mean(shares)) < 4 * np.std(shares) / np.sqrt(150) and np.std(shares) > 0.01
    assert 0.0 < np.mean(beyond) < 0.12


def test_failed_trials_are_left_out_and_counted():
    frame = trials(100, a=uniform).assign(score=lambda table: table.a)
    frame.loc[:9, "score"] = [np.nan, np.inf] * 5
    found = importance.main_effects(frame, ["a"])
    assert found.n["a"] == 90
    pd.testing.assert_frame_equal(found, importance.main_effects(frame[10:], ["a"]))


def test_a_hyperparameter_is_judged_by_the_trials_that_use_it():
    frame = trials(100, a=uniform, b=uniform, score=uniform)
    frame["a"] = frame.a.where(frame.index >= 60)
    found = importance.main_effects(frame, ["a", "b"])
    assert list(found.n) == [40, 100]
    pd.testing.assert_frame_equal(found.loc[["a"]], importance.main_effects(frame[60:], ["a"]))
    pd.testing.assert_frame_equal(found.loc[["b"]], importance.main_effects(frame, ["b"]))


def test_a_constant_score_and_a_constant_hyperparameter_explain_nothing():
    frame = trials(30, a=uniform).assign(score=1.0, b=2.0)
    assert importance.main_effects(frame, ["a", "b"]).share.tolist() == [0.0, 0.0]
    frame["score"] = frame.a
    assert importance.main_effects(frame, ["b"]).share["b"] == pytest.approx(0.0, abs=1e-12)


def test_too_few_trials_and_unknown_columns_are_the_users_error():
    frame = trials(9, a=uniform, score=uniform)
    with pytest.raises(UserError, match="9 trials with a score"):
        importance.main_effects(frame, ["a"])
    with pytest.raises(UserError, match=r"unknown column 'scores': did you mean 'score'"):
        importance.main_effects(frame, ["a"], "scores")
