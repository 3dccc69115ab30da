"""What analysis makes of frames that are empty, hold nothing finite, or lack what it needs: a result, or one line."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from jaxdqn.analysis import comparisons, curves, figures, importance, lineage, thresholds, tuning
from jaxdqn.errors import UserError

NAN, INF = math.nan, math.inf
COLUMNS = (
    "run member seed env agent env_steps seconds eval_return gamma score generation parent".split()
)  # fmt: skip


def frame(*members, steps=None):
    rows = [
        [f"r{m % 2}", m, m, f"E{m % 2}", f"a{m // 2 % 2}", (steps or range(10, 99, 10))[i], i, x, 0.9 + m % 3, x, 0, m]
        for m, values in enumerate(members)
        for i, x in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


SOUND = frame(*[[float(m), 2.0, 3.0] for m in range(12)])
FRAMES = {
    "no columns": pd.DataFrame(),
    "no rows": frame(),
    "one row": frame([1.0]),
    "one NaN": frame([NAN]),
    "all NaN": frame(*[[NAN] * 3] * 4),
    "all infinite": frame(*[[INF] * 3] * 4),
    "some infinite": frame([1.0, INF, 2.0], [-INF, 1.0, 1.0], [NAN] * 3, [5.0] * 3),
    "all equal": frame(*[[2.0] * 3] * 4),
    "the ends of float32": frame(*[[3e38, -3e38, 3e38]] * 4),
    "no steps": frame(*[[1.0] * 3] * 4, steps=[0, 0, 0]),
    "steps of NaN": frame(*[[1.0] * 3] * 4, steps=[NAN] * 3),
    "infinite steps": frame(*[[1.0] * 3] * 4, steps=[1, 2, INF]),
    "text": frame(*[["a"] * 3] * 4),
    "members of NaN": SOUND.assign(member=NAN, run=None),
    "settings of NaN": SOUND.assign(gamma=NAN, agent=None, env=None),
    "one infinite among many": frame(*[[float(m)] * 2 for m in range(11)], [INF, INF]),
}


def of_trials(call):
    return lambda table: call(table.drop(columns="member", errors="ignore"))


CALLS = {
    "on_grid": curves.on_grid,
    "area": curves.area_under_curve,
    "final": curves.final_score,
    "final by nothing": lambda table: curves.final_score(table, by=[]),
    "times": lambda table: thresholds.seconds_to_threshold(table, 1.0),
    "survival": lambda table: thresholds.summarise(*thresholds.steps_to_threshold(table, 1.0).T.to_numpy()),
    "curves": lambda table: figures.learning_curves(table, by=["gamma"]),
    "dots": figures.seed_dots,
    "profiles": comparisons.performance_profiles,
    "intervals": comparisons.interval_plot,
    "response": lambda table: tuning.response(table, "gamma"),
    "pairs": of_trials(lambda table: tuning.pairwise(table, ["gamma", "agent"])),
    "pairs of nothing": of_trials(lambda table: tuning.pairwise(table, [])),
    "lines": of_trials(lambda table: tuning.parallel_coordinates(table, ["gamma", "agent"])),
    "importance": of_trials(lambda table: importance.main_effects(table, ["gamma"], permutations=20)),
    "importance of nothing": of_trials(lambda table: importance.main_effects(table, [])),
    "lineage": lambda table: lineage.lineage(table, ["gamma"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_an_odd_frame_has_a_result_or_one_line(name):
    for case, table in FRAMES.items():
        try:
            CALLS[name](table.copy())
        except UserError as error:
            assert "\n" not in str(error), case


def test_what_a_column_of_text_is_and_what_nothing_tells_apart():
    with pytest.raises(UserError, match="column 'eval_return' holds something else than numbers"):
        curves.final_score(FRAMES["text"])
    with pytest.raises(UserError, match="nothing tells curves apart"):
        curves.on_grid(SOUND.drop(columns=["run", "member"]))
    with pytest.raises(UserError, match="there are no rows"):
        figures.learning_curves(FRAMES["no rows"])


def test_curves_whose_setting_is_missing_are_not_dropped():
    table = SOUND.assign(gamma=[NAN if m == 0 else 0.9 for m in SOUND.member])
    for found in (curves.final_score(table, by=["gamma", "member"]), curves.on_grid(table, by=["gamma", "member"])):
        assert len(found) == 12
    assert np.isfinite(curves.final_score(table, by=["gamma", "member"])).all()


def test_an_infinite_return_is_in_no_mean_and_in_no_interval_of_finite_ones():
    assert curves.final_score(FRAMES["all infinite"]).tolist() == [INF] * 4
    assert list(itertools.chain(*curves.on_grid(FRAMES["all infinite"]).to_numpy())) == [INF] * 12
