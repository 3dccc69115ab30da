"""What a run records: columns of a logging point, what is kept of them, and where they go."""

import collections
import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from jaxdqn.acting import EpisodeSums
from jaxdqn.config import Config, HParams
from jaxdqn.evaluation import Episodes
from jaxdqn.runs import recording
from jaxdqn.training import Metrics

EVERYONE = [(seed, HParams(gamma=gamma)) for gamma in (0.9, 0.99) for seed in (3, 8)]
LABELS = [{"trial": m // 2, "note": None if m else "a"} for m in range(4)]


def sums(rng, members=4, shards=2):
    draw = lambda: rng.normal(size=(members, shards)).astype(np.float32)  # noqa: E731
    episodes = rng.integers(0, 2, (members, shards)).astype(np.float32)
    updates = np.repeat(np.int32([[62], [62], [47], [0]]), shards, axis=1)
    return Metrics(EpisodeSums(episodes, draw(), draw()), {"loss": draw(), "q_mean": draw()}, updates, draw(), draw())


def test_columns_are_what_a_loop_over_members_gives():
    rng = np.random.default_rng(0)
    given, evaluated = sums(rng), Episodes(*(rng.normal(size=(4, 2, 20)).astype(np.float32) for _ in range(3)))
    columns = recording.measured(given, evaluated)
    for m in range(4):
        count, n = given.episodes.episodes[m].sum(), int(given.updates[m, 0])
        expected = {
            "episodes": int(count),
            "episode_return": given.episodes.returns[m].sum() / count if count else np.nan,
            "episode_length": given.episodes.lengths[m].sum() / count if count else np.nan,
            **{name: x[m].mean() / n if n else np.nan for name, x in given.learning.items()},
            "epsilon": given.epsilon[m, 0],
            "eval_return": evaluated.returns[m].mean(),
            "eval_length": evaluated.lengths[m].mean(),
        }
        assert {name: x[m] for name, x in columns.items()} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert {x.dtype for x in columns.values()} == {np.dtype(int), np.dtype(float)}
    assert all(np.isnan(recording.measured(given, None)[name]).all() for name in ("eval_return", "eval_length"))


def point(iteration, **columns):
    members = recording.identity(EVERYONE, ("gamma",), LABELS)
    nothing = {"eval_return": np.nan, "episode_return": np.nan}
    return recording.point(members, {"iteration": iteration, "env_steps": 4 * iteration, **nothing, **columns})


def test_a_point_has_a_row_for_each_member_as_pandas_would_have_written_it():
    frame = point(5, loss=np.array([0.5, np.nan, 1.5, np.inf])).to_pandas()
    rows = [
        {"member": m, "seed": seed, "gamma": setting.gamma, **label, "iteration": 5, "env_steps": 20}
        for m, ((seed, setting), label) in enumerate(zip(EVERYONE, LABELS, strict=True))
    ]
    pd.testing.assert_frame_equal(frame[list(rows[0])], pd.DataFrame(rows))
    assert frame.loss.tolist()[::2] == [0.5, 1.5] and np.isnan(frame.loss[1]) and np.isinf(frame.loss[3])
    assert [type(x) for x in recording.rows(point(5))[0].values()][:6] == [int, int, float, int, str, int]


def test_no_label_is_lost_to_a_metric_nor_a_metric_to_a_label():
    """A sweep may be over any field, and its trials' values are labels."""
    fields = [*HParams._fields, *(field.name for field in dataclasses.fields(Config))]
    labels = [{name: f"{name} {m}" for name in fields} for m in range(4)]
    rng = np.random.default_rng(0)
    columns = recording.measured(sums(rng), None)
    columns |= {
        "iteration": 5,
        "env_steps": 20,
        "dead_workers": 0.0,
        **{name: rng.normal(size=4) for name in fields[::2]},
    }
    frame = recording.point(recording.identity(EVERYONE, (), labels), columns).to_pandas()
    for name in fields:
        assert frame[f"{name}_setting" if name in columns else name].tolist() == [f"{name} {m}" for m in range(4)]
    for name, values in columns.items():
        np.testing.assert_array_equal(frame[name], np.broadcast_to(values, 4))
    assert {"loss", "loss_setting"} <= set(frame)


def test_points_that_are_on_disk_are_forgotten(tmp_path):
    """However long a run is, it holds no more than what is not yet written and what people are shown."""
    recorder = recording.Recorder(tmp_path / "metrics.parquet")
    for iteration in range(1, 101):
        recorder.add(point(iteration, loss=np.arange(4.0)))
        if iteration % 10 == 0:
            assert len(recorder.flush(0)) == 10
            held = [table for kept in vars(recorder).values() if kept is not None for table in _tables(kept)]
            assert sum(table.nbytes for table in held) < 2_000
    frame = recorder.frame()
    assert len(frame) == 400 and list(frame[frame.member == 3].iteration) == list(range(1, 101))
    memory = recording.Recorder(None)
    memory.add(point(1, loss=0.5))
    memory.add(point(2, loss=0.5, dead=1.0))
    memory.flush(0)
    assert memory.frame().dead.isna().tolist() == [True, False] * 4


def _tables(kept):
    return [item for item in kept if isinstance(item, pa.Table)] if isinstance(kept, (list, collections.deque)) else []


def test_people_are_shown_the_latest_evaluations_or_else_the_episodes_of_training():
    recorder = recording.Recorder(None)
    recorder.add(point(1, episode_return=np.array([1.0, 2.0, 3.0, 4.0])))
    assert recorder.recent_return() == 2.5
    recorder.add(point(2, eval_return=np.array([8.0, 8.0, 8.0, np.nan]), episode_return=0.0))
    recorder.add(point(3, eval_return=7.0, episode_return=0.0))
    assert recorder.recent_return() == pytest.approx(np.mean([8, 8, 8, 7, 7, 7, 7]))
    for iteration in range(4, 9):
        recorder.add(point(iteration, episode_return=5.0))
    assert recorder.recent_return() == 5.0
