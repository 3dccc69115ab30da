"""What a run records: columns of a logging point, what is kept of them, and where they go."""

import collections
import dataclasses
import itertools
import json
import math
import os
import resource
import struct
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from cases import usual

import jaxdqn
from jaxdqn.acting import EpisodeSums
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.evaluation import Episodes
from jaxdqn.files import documents
from jaxdqn.parallel.compiled import memory
from jaxdqn.runs import directory, metrics, recording, tensorboard, weights_and_biases
from jaxdqn.runs import provenance as files
from jaxdqn.timeline import timeline
from jaxdqn.training import Metrics

EVERYONE = [(seed, HParams(gamma=gamma)) for gamma in (0.9, 0.99) for seed in (3, 8)]
SHORT = Config(
    env="Catch-bsuite",
    hidden_sizes=(8,),
    num_envs=4,
    batch_size=8,
    replay_capacity=200,
    learning_starts=40,
    updates_per_iteration=2,
    total_steps=600,
    log_interval=88,
    eval_interval=176,
    eval_episodes=2,
)
LONG = dataclasses.replace(SHORT, total_steps=1_200)
LABELS = [{"trial": m // 2, "note": None if m else "a"} for m in range(4)]


def sums(rng, members=4, shards=2):
    draw = lambda: rng.normal(size=(members, shards)).astype(np.float32)  # noqa: E731
    episodes = rng.integers(0, 2, (members, shards)).astype(np.float32)
    updates = np.repeat(np.int32([[62], [62], [47], [0]]), shards, axis=1)
    learning = {"loss": draw(), "q_mean": draw()}
    return Metrics(EpisodeSums(episodes, draw(), draw()), learning, updates, draw(), draw(), seen={})


def test_columns_are_what_a_loop_over_members_gives():
    rng = np.random.default_rng(0)
    given = sums(rng)
    returns, lengths = rng.normal(size=(2, 4, 2, 20)).astype(np.float32)
    evaluated = Episodes(returns, lengths, rng.random((4, 2, 20)) < 0.5, rng.integers(0, 9, (4, 2, 20)), {})
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
            "eval_distinct": len(np.unique(evaluated.fingerprints[m])),
            "eval_unfinished": (~evaluated.finished[m]).sum(),
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
    recorder = recording.Rows(tmp_path / "metrics.parquet")
    for iteration in range(1, 101):
        recorder.add(point(iteration, loss=np.arange(4.0)))
        if iteration % 10 == 0:
            assert len(recorder.flush(0)) == 10
            held = [table for kept in vars(recorder).values() if kept is not None for table in _tables(kept)]
            assert sum(table.nbytes for table in held) < 2_000
    frame = recorder.frame()
    assert len(frame) == 400 and list(frame[frame.member == 3].iteration) == list(range(1, 101))
    memory = recording.Rows(None)
    memory.add(point(1, loss=0.5))
    memory.add(point(2, loss=0.5, dead=1.0))
    memory.flush(0)
    assert memory.frame().dead.isna().tolist() == [True, False] * 4


def _tables(kept):
    return [item for item in kept if isinstance(item, pa.Table)] if isinstance(kept, (list, collections.deque)) else []


@pytest.mark.parametrize("end", [44, 50])
def test_what_only_the_end_of_a_shorter_run_has_is_dropped(end, tmp_path):
    """44 is a logging point, which the longer run does not evaluate; 50 is none. Rows are of each 22 iterations."""
    line = timeline(dataclasses.replace(SHORT, eval_interval=3 * 88))
    path = tmp_path / "metrics.parquet"
    evaluated = {"eval_return": np.arange(4.0), "eval_distinct": 2}
    parts = [[22, 44], [50]] if end == 50 else [[22, 44]]
    for part in parts:
        points = [point(i, loss=np.arange(4.0), **(evaluated if i == end else {})) for i in part]
        metrics.append(path, 0, part[-1], recording.joined(points))
    metrics.drop_extra(path, {0: end}, line)
    metrics.drop_extra(path, {0: end}, line)
    frame = metrics.read(path)
    assert list(frame.iteration) == [22, 44] * 4 and frame.eval_return.isna().all()
    assert frame.loss.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(list(path.iterdir())) == 1


def test_people_are_shown_the_latest_evaluations_or_else_the_episodes_of_training():
    recorder = recording.Rows(None)
    recorder.add(point(1, episode_return=np.array([1.0, 2.0, 3.0, 4.0])))
    assert recorder.recent_return() == 2.5
    recorder.add(point(2, eval_return=np.array([8.0, 8.0, 8.0, np.nan]), episode_return=0.0))
    recorder.add(point(3, eval_return=7.0, episode_return=0.0))
    assert recorder.recent_return() == pytest.approx(np.mean([8, 8, 8, 7, 7, 7, 7]))
    for iteration in range(4, 9):
        recorder.add(point(iteration, episode_return=5.0))
    assert recorder.recent_return() == 5.0


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(file):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 8) == (masked_crc32c(data[at : at + 8]),)
        assert struct.unpack_from("<I", data, at + 12 + length) == (masked_crc32c(body),)
        at += 16 + length
        yield Event.FromString(body)


def shown(path):
    """All values in event files: (curve, step, tag) -> value. Each must be there once."""
    found = {}
    for file in sorted(path.glob("*/events.out.tfevents.*")):
        for event in read_events(file):
            for value in event.summary.value:
                key = file.parent.name, event.step, value.tag
                assert key not in found
                found[key] = value.simple_value
    return found


def test_members_and_means_of_settings_have_curves(tmp_path):
    (curves,) = tensorboard.curves([range(4)], EVERYONE, ("gamma",), limit=3)
    assert [curve.name for curve in curves] == [
        "member-0000", "member-0001", "member-0002",
        *(f"{kind}-gamma={gamma}" for gamma in (0.9, 0.99) for kind in ("mean", "low", "high")),
    ]  # fmt: skip
    events = tensorboard.Events(tmp_path, [curves])
    loss, part = np.array([0.1, 0.3, 1e-20, math.inf]), np.array([math.nan, 2.0, math.nan, math.nan])
    events.write(0, 10, {"loss": loss, "episode_return": part})
    found = shown(tmp_path)
    half = 12.706204736 * 0.1  # Student's quantile of one degree of freedom, times the standard error
    expected = {
        ("member-0000", 10, "loss"): 0.1,
        ("member-0001", 10, "loss"): 0.3,
        ("member-0001", 10, "episode_return"): 2.0,
        ("member-0002", 10, "loss"): 1e-20,
        ("mean-gamma=0.9", 10, "loss"): 0.2,
        ("mean-gamma=0.9", 10, "episode_return"): 2.0,
        ("low-gamma=0.9", 10, "loss"): 0.2 - half,
        ("high-gamma=0.9", 10, "loss"): 0.2 + half,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_settings_of_one_seed_have_no_mean_and_batches_their_own():
    everyone = [(seed, HParams()) for seed in range(5)]
    names = [[c.name for c in each] for each in tensorboard.curves([range(3), range(3, 5)], everyone, (), limit=1)]
    of_batch = [[f"{kind}-batch-000{batch}" for kind in ("mean", "low", "high")] for batch in (0, 1)]
    assert names == [["member-0000", *of_batch[0]], of_batch[1]]
    rates = [(0, HParams(learning_rate=rate)) for rate in (0.1, 0.2)]
    assert [c.name for c in tensorboard.curves([range(2)], rates, ("learning_rate",), limit=8)[0]] == [
        "member-0000", "member-0001"
    ]  # fmt: skip


def test_more_members_than_a_process_may_open_files(tmp_path):
    everyone = [(seed, HParams()) for seed in range(300)]
    events = tensorboard.Events(tmp_path, tensorboard.curves([range(300)], everyone, (), limit=300))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        for step in (1, 2):
            events.write(0, step, {"loss": np.arange(300.0)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(shown(tmp_path)) == 2 * 303


def test_what_was_shown_after_a_checkpoint_is_cut_off_and_shown_anew(tmp_path):
    curves = tensorboard.curves([range(1), range(1, 2), range(2, 3)], EVERYONE[:3], ("gamma",), limit=8)
    columns = {"loss": np.array([1.0]), "episodes": np.array([2])}
    first = tensorboard.Events(tmp_path, curves)
    for batch, step in itertools.product(range(3), (10, 20, 30)):
        first.write(batch, step, columns)
    (file,) = (tmp_path / "member-0002").iterdir()
    file.write_bytes(file.read_bytes()[:-3])  # killed in the midst of a record
    second = tensorboard.Events(tmp_path, curves)
    second.cut({0: 20, 2: 40})  # the second batch had no checkpoint yet
    assert {key[:2] for key in shown(tmp_path)} == {
        ("member-0000", 10), ("member-0000", 20), ("member-0002", 10), ("member-0002", 20)
    }  # fmt: skip
    (file,) = (tmp_path / "member-0000").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-16] + b"\xff" * 16)  # damaged, and as long
    second.cut({0: 20, 2: 40})
    assert whole.startswith(file.read_bytes()) and len(file.read_bytes()) < len(whole)
    file.write_bytes(whole)
    for batch, step in ((0, 30), (1, 10), (1, 20), (1, 30), (2, 30)):
        second.write(batch, step, columns)
    assert len(shown(tmp_path)) == 3 * 3 * 2
    starts = [
        (file.parent.name, event.step)
        for file in sorted(tmp_path.glob("*/*"))
        for event in read_events(file)
        if event.HasField("session_log")
    ]
    assert starts == [
        ("member-0000", 0),
        ("member-0000", 21),
        ("member-0001", 0),
        ("member-0002", 0),
        ("member-0002", 41),
    ]


# -- W&B --------------------------------------------------------------------------------------------------------------


class Wandb:
    """Stands for the wandb module and its runs: what each shows, by metric and the value of its x-axis.

    As W&B does, it drops what is logged at a step below the newest.
    """

    def __init__(self):
        self.runs, self.axes, self.id, self.step = {}, {}, None, 0

    def init(self, project, config, id, resume):
        assert resume == "allow" and config["config"]["env"]
        self.id, self.project = id, project
        self.runs.setdefault(id, [])
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        if step is None or step >= self.step:
            self.step = self.step + 1 if step is None else step
            self.runs[self.id].append(values)

    def finish(self):
        self.id = None

    def shown(self, id):
        """(member, env_steps, column) -> value. Each must be there once."""
        assert self.axes == {"env_steps": None, "member-*": "env_steps"}
        found = {}
        for values in self.runs[id]:
            for name, value in values.items():
                if name != "env_steps":
                    member, column = name.removeprefix("member-").split("/")
                    key = int(member), values["env_steps"], column
                    assert key not in found
                    found[key] = value
        return found


def test_a_wandb_run_goes_on_with_its_directory_and_starts_anew_without(tmp_path, monkeypatch):
    recorded = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", recorded)
    config, columns = {"config": {"env": "x"}}, {"loss": np.array([1.0, math.nan])}
    file = tmp_path / "wandb.json"
    for step in (10, 20, 20, 30):  # the session before the last one was killed after 20
        log = weights_and_biases.Log("mine", config, file)
        log.write(1, step, range(2, 4), columns)
        log.flush()
    assert [*recorded.runs.values()] == [[{"env_steps": step, "member-2/loss": 1.0} for step in (10, 20, 30)]]
    for other, project in ((file, "another"), (None, "mine"), (None, "mine")):
        weights_and_biases.Log(project, config, other)
    for damaged in ("{", "[" * 10_000, "[]", '{"project": "mine", "id": 1, "env_steps": {}}'):
        file.write_text(damaged)
        weights_and_biases.Log("mine", config, file)
    assert len(recorded.runs) == 8
    with pytest.raises(UserError, match="it is a directory"):
        weights_and_biases.Log("mine", config, tmp_path)


# -- sessions ---------------------------------------------------------------------------------------------------------

QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
MODES = {
    "alone": ((5,), 1, 1, 1),
    "in batches": ((5, 6), 1, 1, 1),
    "on two shards": ((5,), 1, 2, 2),
}  # seeds, members in a batch, devices, devices an agent


def in_batches(monkeypatch, size):
    real = memory.plan
    monkeypatch.setattr(memory, "plan", lambda *args: real(*args)._replace(members_per_batch=size))


def kill_at(env_steps, batch_of):
    def die(rows):
        if rows[0]["env_steps"] >= env_steps and rows[0]["member"] == batch_of:
            raise ZeroDivisionError

    return die


@pytest.mark.parametrize("mode", usual(MODES, "on two shards"))
def test_an_extended_run_has_the_metrics_of_the_longer_one(mode, tmp_path, monkeypatch):
    """Every column but seconds, bit for bit; the shorter run ends within a window of 22 iterations."""
    seeds, size, devices, per_agent = MODES[mode]
    line = timeline(SHORT)
    assert line.total % line.log_every
    in_batches(monkeypatch, size)
    options = {"seeds": seeds, "num_devices": devices, "devices_per_agent": per_agent, "settings": QUIET}
    longer = jaxdqn.train(LONG, **options)
    out = tmp_path / "run"
    short = jaxdqn.train(SHORT, out=out, **options)
    assert short.metrics.env_steps.max() == 600
    if mode == "in batches":
        with pytest.raises(ZeroDivisionError):
            jaxdqn.resume(out, 1_200, QUIET._replace(on_chunk=kill_at(900, 0)))
        assert not (out / "summary.json").exists() and jaxdqn.load(out).summary == {"status": "unfinished"}
    extended = jaxdqn.resume(out, 1_200, QUIET)
    pd.testing.assert_frame_equal(
        extended.metrics.drop(columns="seconds"), longer.metrics.drop(columns="seconds"), check_exact=True
    )
    seconds = extended.metrics.groupby("member").seconds
    assert (seconds.min() > 0).all() and seconds.is_monotonic_increasing.all()
    assert jaxdqn.load(out).summary == documents.with_infinities(json.loads((out / "summary.json").read_text()))
    assert jaxdqn.load(out).summary == extended.summary and extended.summary["status"] == "finished"
    total = extended.metrics.groupby("member").seconds.max()[::size].sum()  # of a member of each batch
    assert total <= extended.summary["run_seconds"] <= total + 5


def test_kills_leave_every_value_once_in_tensorboard_and_wandb(tmp_path, monkeypatch):
    """In a first batch and in a later one, before their first checkpoints; members train one after the other."""
    recorded = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", recorded)
    monkeypatch.setattr(recording, "FLUSH_SECONDS", 0.0)  # all is shown at once
    in_batches(monkeypatch, 1)
    settings, out = QUIET._replace(tensorboard=True, wandb="mine"), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        jaxdqn.train(SHORT, seeds=(5, 6), out=out, settings=settings._replace(on_chunk=kill_at(300, 0)))
    with pytest.raises(ZeroDivisionError):
        jaxdqn.resume(out, settings=settings._replace(on_chunk=kill_at(400, 1)))
    frame = jaxdqn.resume(out, settings=settings).metrics
    scalars = [name for name in frame.select_dtypes("number") if name not in recording.IDENTITY]
    assert {"episodes", "episode_return", "eval_return", "loss"} <= set(scalars)
    expected = {
        (row["member"], row["env_steps"], name): row[name]
        for row in frame.to_dict("records")
        for name in scalars
        if math.isfinite(row[name])
    }
    assert len(expected) > 100
    (run,) = recorded.runs
    assert recorded.shown(run) == expected
    found = {(int(curve[-4:]), step, tag): value for (curve, step, tag), value in shown(out / "tensorboard").items()}
    assert found == {key: float(np.float32(value)) for key, value in expected.items()}


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_summary_with_infinities_is_json_and_comes_back(tmp_path):
    summary = {"status": "finished", "final": [1.5, math.inf, -math.inf], "by": {"0": np.float64(math.inf)}, "n": 3}
    with directory.create(tmp_path / "run") as run:
        run.write_summary({**summary, "nothing": math.nan})

    def refuse(constant):
        raise AssertionError(constant)

    values = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)
    assert values["final"] == [1.5, "inf", "-inf"] and values["nothing"] is None
    assert directory.summary(tmp_path / "run") == {**summary, "nothing": None}


@pytest.mark.parametrize("where", ["src", "lib/site-packages"])
def test_the_commit_is_of_the_packages_own_repository(where, tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    module = tmp_path / ("" if where == "src" else where) / "jaxdqn" / "runs" / "files.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    git("init")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "x")
    monkeypatch.setattr(files, "__file__", str(module))
    commit = files.commit()
    assert commit is None if where != "src" else len(commit) == 12
    module.write_text("changed")
    assert (files.commit() or "+").endswith("+")
    (tmp_path / "pyproject.toml").unlink()
    assert files.commit() is None
