"""Runs and sweeps from their directories into one DataFrame."""

import errno
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from jaxdqn.analysis import loading
from jaxdqn.errors import UserError
from jaxdqn.runs import metrics


def rows(member=0, steps=(10, 20), seconds=(1.0, 2.0), **more):
    return [
        {"member": member, "seed": member, "env_steps": step, "seconds": second, "loss": 0.5 * step, **more}
        for step, second in zip(steps, seconds, strict=True)
    ]


def write_run(path, *batches, env="CartPole-v1", agent="dqn", num_envs=4, scheme="fused"):
    path.mkdir(parents=True)
    config = {"env": env, "agent": agent, "num_envs": num_envs}
    (path / "config.yaml").write_text(yaml.safe_dump({"config": config, "axes": {"scheme": scheme}, "seeds": [0]}))
    for batch, written in enumerate(batches):
        metrics.append(path / "metrics.parquet", batch, 1, pa.Table.from_pylist(written))
    return path


def test_a_run_has_its_rows_in_order_and_its_labels(tmp_path):
    path = write_run(tmp_path / "a", rows(1) + rows(0), scheme="averaging")
    frame = loading.load(path)
    assert list(zip(frame.member, frame.env_steps, strict=True)) == [(0, 10), (0, 20), (1, 10), (1, 20)]
    assert (frame.loss == 0.5 * frame.env_steps).all() and list(frame.index) == [0, 1, 2, 3]
    for name, value in {"run": "a", "env": "CartPole-v1", "agent": "dqn", "scheme": "averaging", "num_envs": 4}.items():
        assert set(frame[name]) == {value}
    assert "sweep" not in frame


def test_metrics_agree_with_those_that_the_run_itself_reads(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    write_run(path)
    for index in range(5):
        part = [{"member": m, "env_steps": 10 * index, "loss": rng.normal(), "kind": "x"} for m in (2, 0, 1)]
        metrics.append(path / "metrics.parquet", 0, index, pa.Table.from_pylist(part))
    own = metrics.read(path / "metrics.parquet")
    frame = loading.load(path)[list(own)]
    pd.testing.assert_frame_equal(frame.astype({"kind": str}), own.astype({"kind": str}))


def test_columns_that_a_run_lacks_are_nan_and_integers_meet_floats(tmp_path):
    write_run(tmp_path / "a", rows(gamma=1))
    write_run(tmp_path / "b", rows(gamma=0.5, epsilon=0.1))
    frame = loading.load(tmp_path)
    assert frame.gamma.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert frame.epsilon.isna().tolist() == [True, True, False, False]


def test_a_column_that_is_empty_in_one_part_keeps_its_type(tmp_path):
    path = write_run(tmp_path / "a", rows(stage=None))
    metrics.append(
        path / "metrics.parquet", 0, 2, pa.Table.from_pylist(rows(steps=(30,), seconds=(3.0,), stage="rung-1"))
    )
    frame = loading.load(path)
    assert frame.stage.isna().tolist() == [True, True, False] and frame.stage.iloc[2] == "rung-1"


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for folder in ("x/one", "y/one", "y/two"):
        write_run(tmp_path / folder, rows())
    frame = loading.load([tmp_path / "x", str(tmp_path / "y")])
    assert sorted(frame.run.unique()) == ["two", "x/one", "y/one"]


def test_a_run_that_is_found_twice_is_loaded_once(tmp_path):
    path = write_run(tmp_path / "a", rows())
    assert len(loading.load([path, tmp_path, path / ".." / "a"])) == 2


def test_a_sweep_and_a_run_of_it_carry_its_name_and_trials(tmp_path):
    sweep = tmp_path / "my-sweep"
    for index in range(2):
        labels = {"trial": index, "stage": "rung-0", "kind": "tuning", "learning_rate": 0.1 * index, "num_envs": 4}
        write_run(sweep / "runs" / f"group-{index}", rows(**labels))
    (sweep / "space.yaml").write_text("{}")
    pd.DataFrame({"trial": [0, 1], "score": [1.0, 2.0]}).to_parquet(sweep / "trials.parquet")
    write_run(tmp_path / "alone", rows())
    assert loading.is_sweep(sweep) and not loading.is_sweep(tmp_path / "alone")
    frame = loading.load(tmp_path)
    assert frame.columns.is_unique
    assert frame.groupby("run", observed=True).sweep.agg(lambda names: str(names.iloc[0])).to_dict() == {
        "alone": "nan", "group-0": "my-sweep", "group-1": "my-sweep"
    }  # fmt: skip
    assert frame[frame.run == "group-1"].trial.tolist() == [1.0, 1.0]
    assert set(loading.load(sweep / "runs" / "group-0").sweep) == {"my-sweep"}
    assert loading.trials(sweep).score.tolist() == [1.0, 2.0]


def test_trials_of_no_sweep_or_a_damaged_one_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no trials.parquet"):
        loading.trials(tmp_path)
    (tmp_path / "trials.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(UserError, match=r"trials.parquet cannot be read"):
        loading.trials(tmp_path)


CONFIGS = {
    "not closed": b"config: [1, 2",
    "not text": b"\xff\xfe\x00config",
    "empty": b"",
    "a list": b"[1]",
    "config a list": b"config: [1]",
    "axes a list": b"config: {env: a, agent: dqn, num_envs: 3}\naxes: [1]",
    "no env": b"config: {agent: dqn, num_envs: 3}",
    "env a list": b"config: {env: [a], agent: dqn, num_envs: 3}",
    "agent a number": b"config: {env: a, agent: 3, num_envs: 3}",
    "num_envs a list": b"config: {env: a, agent: dqn, num_envs: [3]}",
    "num_envs beyond 64 bits": b"config: {env: a, agent: dqn, num_envs: 99999999999999999999}",
    "an odd date": b"config: {env: a, agent: dqn, num_envs: 2020-13-45}",
    "5,000 digits": b"config: {env: a, agent: dqn, num_envs: " + b"1" * 5_000 + b"}",
    "deep": b"config: " + b"[" * 50_000,
    "itself": b"config: &a {env: *a}",
}


def remove_yaml(path):
    (path / "config.yaml").unlink()


def break_part(path):
    (file,) = (path / "metrics.parquet").iterdir()
    file.write_bytes(file.read_bytes()[:-20])


def drop_member(path):
    (file,) = (path / "metrics.parquet").iterdir()
    pd.read_parquet(file).drop(columns="member").to_parquet(file)


def change_column(name, value):
    def change(path):
        (file,) = (path / "metrics.parquet").iterdir()
        pd.read_parquet(file).assign(**{name: value}).to_parquet(file)

    return change


DAMAGE = {
    **{name: lambda path, text=text: (path / "config.yaml").write_bytes(text) for name, text in CONFIGS.items()},
    "no config": remove_yaml,
    "a part cut short": break_part,
    "no member": drop_member,
    "members of text": change_column("member", "a"),
    "steps of dates": change_column("env_steps", pd.Timestamp("2020-01-01")),
    "seconds of text": change_column("seconds", "a"),
    "seconds missing": change_column("seconds", [1.0, math.nan]),
    "a column of lists": change_column("loss", [[1], [2]]),
    "a column of dates": change_column("loss", pd.Timestamp.max),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_among_others_is_named_in_one_warning_and_alone_is_an_error(tmp_path, name):
    write_run(tmp_path / "good", rows())
    DAMAGE[name](write_run(tmp_path / "bad", rows()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = loading.load(tmp_path)
    (warning,) = caught
    message = str(warning.message)
    assert "1 of 2" in message and str(tmp_path / "bad") in message and "\n" not in message
    assert warning.filename == __file__ and set(frame.run) == {"good"}
    with pytest.raises(UserError, match=r"no run can be read: .*bad"):
        loading.load(tmp_path / "bad")


@pytest.mark.parametrize("odd", [None, 5, "a", [1], [{"gamma": 0.9}, 2], {"gamma": [1, {}], 3: 4, "member": 1}])
def test_settings_of_a_strangers_file_are_passed_over_or_text(tmp_path, odd):
    for name in "ab":
        path = write_run(tmp_path / name, rows())
        values = yaml.safe_load((path / "config.yaml").read_text())
        changed = {**values, "vary": odd, "hparams": odd if name == "a" else {"gamma": 0.5, "member": 2}}
        (path / "config.yaml").write_text(yaml.safe_dump(changed))
    frame = loading.load(tmp_path)
    assert set(frame.run) == {"a", "b"} and frame.member.tolist() == [0] * 4 and frame.columns.is_unique


def test_a_run_whose_column_is_of_another_kind_than_in_most_is_left_out(tmp_path):
    write_run(tmp_path / "a", rows(gamma="high"))
    for name in "bc":
        write_run(tmp_path / name, rows(gamma=0.9))
    write_run(tmp_path / "d", rows(gamma=None))
    with pytest.warns(UserWarning, match="1 of 4 runs left out: .*a .its column gamma is no number"):
        frame = loading.load(tmp_path)
    assert list(frame.run.unique()) == ["b", "c", "d"]


def test_links_are_followed_and_a_run_that_several_lead_to_is_loaded_once(tmp_path):
    write_run(tmp_path / "archive" / "one", rows())
    write_run(tmp_path / "archive" / "two", rows())
    (tmp_path / "work").mkdir()
    for name, target in {"one": "archive/one", "again": "archive/one", "all": "archive", "loop": "work"}.items():
        (tmp_path / "work" / name).symlink_to(tmp_path / target)
    (tmp_path / "work" / "broken").symlink_to(tmp_path / "nowhere")
    frame = loading.load(tmp_path / "work")
    assert len(frame) == 4 and sorted(frame.run.unique()) == ["one", "two"]
    assert len(loading.load([tmp_path / "work", tmp_path / "archive", tmp_path / "work" / "again"])) == 4


def test_hidden_folders_are_loaded_only_where_they_are_named(tmp_path):
    write_run(tmp_path / "a", rows())
    write_run(tmp_path / ".a-copy", rows())
    write_run(tmp_path / ".trash" / "b", rows())
    assert set(loading.load(tmp_path).run) == {"a"}
    assert set(loading.load([tmp_path, tmp_path / ".a-copy"]).run) == {"a", ".a-copy"}
    assert set(loading.load(tmp_path / ".trash").run) == {"b"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "a", rows())
    (tmp_path / "locked").mkdir()
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed(path) if "locked" not in str(path) else refuse(path))
    with pytest.warns(UserWarning, match="1 of 2 runs left out: .*locked .Permission denied"):
        assert set(loading.load(tmp_path).run) == {"a"}


def refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_the_sweeps_of_runs(tmp_path):
    for name in ("s", ".hidden"):
        write_run(tmp_path / name / "runs" / "group-0", rows())
        (tmp_path / name / "space.yaml").write_text("{}")
    write_run(tmp_path / "alone", rows())
    assert loading.sweeps(tmp_path) == [tmp_path / "s"]
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "there").symlink_to(tmp_path / "s")
    assert loading.sweeps([tmp_path / "link"]) == [tmp_path / "s"]
    (tmp_path / "s" / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "runs").symlink_to(tmp_path / "elsewhere")
    assert loading.sweeps(tmp_path / "s") == [tmp_path / "s"]
    assert set(loading.load(tmp_path / "s").sweep) == {"s"}


def test_a_path_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run"):
        loading.load([write_run(tmp_path / "a" / "b", rows()), tmp_path / "a" / "b" / "metrics.parquet"])
    with pytest.raises(UserError, match="no path"):
        loading.load([])


def test_a_run_before_its_first_logging_point_has_no_rows(tmp_path):
    write_run(tmp_path / "early")
    with pytest.raises(UserError, match=r"no metrics yet in .*early"):
        loading.load(tmp_path)
    write_run(tmp_path / "late", rows())
    assert set(loading.load(tmp_path).run) == {"late"}


def test_many_runs_load_with_cheap_labels(tmp_path):
    for index in range(40):
        write_run(tmp_path / f"run-{index}", rows(steps=range(50), seconds=np.arange(50.0)), env=f"env-{index % 2}")
    frame = loading.load(tmp_path)
    assert len(frame) == 2000 and math.isclose(frame.loss.sum(), 40 * 0.5 * sum(range(50)))
    assert frame.groupby("env", observed=True).size().tolist() == [1000, 1000]
    assert frame[["run", "env", "agent", "scheme"]].memory_usage(index=False, deep=True).sum() < 5 * 4 * 2000


SCRIPT = """
import importlib, pathlib, pkgutil, sys
from jaxdqn import analysis
for module in pkgutil.iter_modules(analysis.__path__):
    importlib.import_module(f"jaxdqn.analysis.{module.name}")
from jaxdqn.analysis import figures, loading
frame = loading.load(sys.argv[1])
assert len(frame) == 2
figures.learning_curves(frame).savefig(sys.argv[2])
assert "jax" not in sys.modules, "JAX"
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
"""


def test_analysis_needs_no_jax(tmp_path):
    path = write_run(tmp_path / "a", rows(eval_return=1.0))
    subprocess.run([sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "curves.png")], check=True)
    assert (tmp_path / "curves.png").stat().st_size > 1_000
