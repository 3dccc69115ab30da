"""What a trial is worth, and which go on."""

import itertools
import math
import types

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn.sweeps import record

NAN = math.nan


def frame(curves):
    """Rows of curves (trial, seed) -> [(step, return), ...]."""
    return pd.DataFrame(
        [
            {"trial": trial, "seed": seed, "env_steps": step, "seconds": step / 10, "eval_return": value}
            for (trial, seed), points in curves.items()
            for step, value in points
        ]
    )


def random_curves(seed=0, end=1000):
    random = np.random.default_rng(seed)
    steps = range(0, end + 1, 100)
    return {(t, s): [(step, float(random.normal())) for step in steps] for t in (4, 7) for s in (0, 1, 2)}


def test_the_area_is_the_mean_height_of_the_curve():
    curves = random_curves()
    table = record.per_seed(frame(curves), "auc", {4: 1000, 7: 1000}).set_index(["trial", "seed"]).score
    for key, points in curves.items():
        steps, values = zip(*points, strict=True)
        assert table[key] == pytest.approx(np.trapezoid(values, steps) / 1000)


def test_trials_of_different_budgets_are_each_taken_over_their_own():
    flat = {(1, 0): [(0, 3.0), (1000, 3.0)], (2, 0): [(0, 5.0), (500, 5.0)]}
    table = record.per_seed(frame(flat), "auc", {1: 1000, 2: 500})
    assert dict(zip(table.trial, table.score, strict=True)) == pytest.approx({1: 3.0, 2: 5.0})


def test_the_final_score_is_the_mean_over_the_last_fifth():
    curves = random_curves(1)
    table = record.per_seed(frame(curves), "final", {}).set_index(["trial", "seed"]).score
    for key, points in curves.items():
        assert table[key] == pytest.approx(np.mean([value for step, value in points if step > 800]))


def test_a_trial_without_a_score_for_one_seed_has_none():
    found = record.summary("score", pd.Series([1.0, 2.0]))
    assert found["score_low"] < found["score"] == 1.5 < found["score_high"]
    assert all(map(math.isnan, record.summary("score", pd.Series([NAN, 9.0])).values()))


SCORES = st.dictionaries(st.integers(0, 99), st.one_of(st.floats(-1e9, 1e9), st.just(NAN)), min_size=1, max_size=40)


@given(SCORES)
def test_trials_are_ranked_by_score_then_number_and_those_without_last(found):
    order = record.ranked(found)
    scored = [trial for trial in order if not math.isnan(found[trial])]
    rest = [trial for trial in order if math.isnan(found[trial])]
    assert order == scored + rest and rest == sorted(rest) and sorted(order) == sorted(found)
    for better, worse in itertools.pairwise(scored):
        assert found[better] > found[worse] or (found[better] == found[worse] and better < worse)


@given(SCORES, st.integers(1, 99))
def test_the_best_of_them_survive(found, percent):
    kept = record.survivors(found, percent / 100)
    assert len(kept) == -(-percent * len(found) // 100) >= 1  # whole numbers: no float is in the way
    assert kept == sorted(record.ranked(found)[: len(kept)])


def test_winners_are_different_settings():
    rows = {
        number: {"status": record.FINISHED, "score": score, "learning_rate": rate, "units": units}
        for number, (score, rate, units) in enumerate([(3.0, 0.1, 8), (1.0, 0.2, 8), (3.0, 0.1, 8), (2.0, 0.1, NAN)])
    }
    parts = types.SimpleNamespace(
        rows=rows,
        sweep=types.SimpleNamespace(
            population_based=None,
            space=types.SimpleNamespace(names=("learning_rate", "units")),
            winners=types.SimpleNamespace(trials=2),
        ),
    )
    assert record.Record.best(parts) == [0, 3]
    parts.sweep.winners.trials = 9
    assert record.Record.best(parts) == [0, 3, 1]
