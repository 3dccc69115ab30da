"""Run directories: checkpoints that survive damage, metrics, locks, atomic files, TensorBoard events."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import time

import filelock
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

import jaxdqn
from jaxdqn import agents
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs import checkpoints, directory, experiment, metrics
from jaxdqn.runs.directory import Continuation, RunSpec

SMALL = Config(num_envs=4, batch_size=16, hidden_sizes=(16,), replay_capacity=400, learning_starts=64, total_steps=400)


def tree(scale):
    return {
        "params": {"dense": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) * scale}},
        "stack": (np.array([scale, 2], np.uint32), np.array([True, False])),
    }


def meta(iteration, batch=0):
    return {
        "batch": batch,
        "iteration": iteration,
        "seconds": 1.5,
        "compile_seconds": 0.5,
        "device": "1 x cpu (cpu)",
        "versions": {"jax": "0"},
    }


def save(root, iteration, batch=0, keep=9, scale=None):
    return checkpoints.save(root, tree(scale or iteration), meta(iteration, batch), keep)


def biggest(path):
    return max((f for f in (path / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_saved_tree_comes_back_with_values_dtypes_and_meta(tmp_path):
    root = tmp_path / "checkpoints"
    assert checkpoints.newest(root) == (None, [])
    path = save(root, 7)
    assert path.name == "0000-000000000007"
    found, warnings = checkpoints.newest(root)
    assert warnings == [] and found.meta == meta(7)
    template = jax.tree.map(np.zeros_like, tree(7))
    filled = checkpoints.fill(template, found.arrays)
    assert jax.tree.structure(filled) == jax.tree.structure(template)
    for expected, actual in zip(jax.tree.leaves(tree(7)), jax.tree.leaves(filled), strict=True):
        assert expected.dtype == actual.dtype
        np.testing.assert_array_equal(expected, actual)
    again = checkpoints.load(path)
    assert sorted(again.arrays) == ["params/dense/kernel", "stack/0", "stack/1"]


def test_arrays_of_size_0_come_back_from_the_template(tmp_path):
    """Environments may have such states, and orbax cannot save them."""
    saved = {"state": {"empty": np.zeros((2, 0, 3), np.int8), "full": np.arange(2)}, "none": np.zeros(0)}
    checkpoints.save(tmp_path / "checkpoints", saved, meta(1), keep=1)
    found = checkpoints.newest(tmp_path / "checkpoints")[0]
    assert list(found.arrays) == ["state/full"]
    filled = checkpoints.fill(jax.eval_shape(lambda: saved), found.arrays)
    assert filled["state"]["empty"].shape == (2, 0, 3) and filled["state"]["empty"].dtype == np.int8
    assert filled["none"].shape == (0,) and list(filled["state"]["full"]) == [0, 1]


def test_fill_takes_a_prefix_and_names_what_is_missing_or_misshapen():
    arrays = {"state/a": np.ones(3)}
    np.testing.assert_array_equal(checkpoints.fill({"a": np.zeros(3)}, arrays, "state/")["a"], np.ones(3))
    with pytest.raises(UserError, match=r"no state/b.*another configuration.*--init-from"):
        checkpoints.fill({"b": np.zeros(3)}, arrays, "state/")
    with pytest.raises(UserError, match=r"state/a has shape \[3\], expected \[4\]"):
        checkpoints.fill({"a": np.zeros(4)}, arrays, "state/")


def truncate(path):
    file = biggest(path)
    file.write_bytes(file.read_bytes()[:-1])


def flip(path):
    file = biggest(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_meta(path):
    (path / "meta.json").write_text(json.dumps(meta(99)))


def remove_file(path):
    biggest(path).unlink()


def remove_manifest(path):
    (path / "manifest.json").unlink()


def break_manifest(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-5])


@pytest.mark.parametrize("damage", [truncate, flip, flip_meta, remove_file, remove_manifest, break_manifest])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    root = tmp_path / "checkpoints"
    save(root, 1)
    damage(newer := save(root, 2))
    found, warnings = checkpoints.newest(root)
    assert found.meta["iteration"] == 1
    np.testing.assert_array_equal(found.arrays["params/dense/kernel"], tree(1)["params"]["dense"]["kernel"])
    assert len(warnings) == 1 and str(newer) in warnings[0] and "damaged" in warnings[0] and "\n" not in warnings[0]


def test_a_half_written_directory_is_no_checkpoint_and_the_next_save_replaces_it(tmp_path):
    root = tmp_path / "checkpoints"
    first = save(root, 1)
    half = root / ".writing-0000-000000000001"
    (half / "state").mkdir(parents=True)
    (half / "state" / "junk").write_text("x")
    assert checkpoints.listing(root) == [first]
    found, warnings = checkpoints.newest(root)
    assert found.meta["iteration"] == 1 and warnings == []
    second = save(root, 2)
    assert not half.exists() and not (second / "state" / "junk").exists()
    assert checkpoints.newest(root)[0].meta["iteration"] == 2


def test_a_failing_save_leaves_the_older_checkpoints_and_no_half_written_one(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    first = save(root, 1, keep=1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_checksums", full)
    with pytest.raises(OSError, match="No space"):
        save(root, 2, keep=1)
    assert list(root.iterdir()) == [first]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_kill_while_a_checkpoint_of_the_same_iteration_is_replaced_leaves_one(tmp_path, monkeypatch, calls):
    root, rename, done = tmp_path / "checkpoints", pathlib.Path.rename, []
    save(root, 7, scale=1)

    def killed(path, target):
        rename(path, target)
        done.extend([path] if path.parent == root else [])  # others are orbax's
        if len(done) == calls:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(root, 7, scale=2)
    found, warnings = checkpoints.newest(root)
    assert warnings == [] and found.meta["iteration"] == 7
    np.testing.assert_array_equal(found.arrays["params/dense/kernel"], tree(calls)["params"]["dense"]["kernel"])
    assert checkpoints.ends(root)[0]["iteration"] == 7 and experiment.steps_done(tmp_path, Config()) == 7 * 16
    save(root, 7, scale=3)
    assert [path.name for path in root.iterdir()] == ["0000-000000000007"]


def test_keep_counts_the_checkpoints_of_one_batch(tmp_path):
    root = tmp_path / "checkpoints"
    for batch, iteration in [(0, 1), (0, 2), (0, 10), (1, 1), (1, 5)]:
        save(root, iteration, batch, keep=2)
    kept = [path.name for path in checkpoints.listing(root)]
    assert kept == [f"{b:04d}-{i:012d}" for b, i in [(0, 2), (0, 10), (1, 1), (1, 5)]]
    save(root, 9, 1, keep=1)
    assert [path.name for path in checkpoints.listing(root)][2:] == ["0001-000000000009"]
    assert checkpoints.newest(root)[0].meta["batch"] == 1
    assert checkpoints.newest(root, batch=0)[0].meta["iteration"] == 10


def test_resume_refuses_a_run_of_which_every_checkpoint_is_damaged(tmp_path):
    spec = experiment.plan(SMALL, HParams(), (0,), None, 1, 1)[0]
    directory.create(tmp_path / "run").write_config(spec, {})
    for iteration in (1, 2):
        flip(save(tmp_path / "run" / "checkpoints", iteration))
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        jaxdqn.resume(tmp_path / "run")


def test_a_full_disk_is_named_and_the_checkpoint_before_remains(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "run", tree(1.0), {"batch": 0, "iteration": 1}, keep=2)

    class Full:
        def save(self, *_):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing ...")

    monkeypatch.setattr(checkpoints, "_checkpointer", Full)
    with pytest.raises(OSError, match="No space left") as error:
        checkpoints.save(tmp_path / "run", tree(2.0), {"batch": 0, "iteration": 2}, keep=1)
    assert error.value.errno == errno.ENOSPC and "000000000002" in error.value.filename
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["0000-000000000001"]


# -- metrics and files ------------------------------------------------------------------------------------------------


def rows(iteration, batch=0, value=0.5):
    members = (0, 1) if batch == 0 else (2,)
    return [{"member": m, "env_steps": iteration * 10, "loss": value, "eval_return": math.nan} for m in members]


def test_metrics_are_appended_read_in_order_and_dropped_after_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.parquet"
    assert metrics.read(path).empty
    metrics.drop_after(path, {0: 0})
    assert not path.exists()
    metrics.append(path, 0, 2, pa.Table.from_pylist(rows(1) + rows(2)))
    metrics.append(path, 0, 3, pa.Table.from_pylist(rows(3)))
    metrics.append(path, 1, 1, pa.Table.from_pylist(rows(1, batch=1)))
    frame = metrics.read(path)
    assert list(zip(frame.member, frame.env_steps, strict=True)) == [
        (0, 10), (0, 20), (0, 30), (1, 10), (1, 20), (1, 30), (2, 10)
    ]  # fmt: skip
    assert list(frame.index) == list(range(7)) and frame.loss.eq(0.5).all() and frame.eval_return.isna().all()
    pd.testing.assert_frame_equal(
        pd.read_parquet(path).sort_values(["member", "env_steps"], ignore_index=True), frame, check_like=True
    )
    metrics.drop_after(path, {0: 3, 1: 1})
    assert len(metrics.read(path)) == 7
    metrics.drop_after(path, {0: 2, 1: 1})  # the first batch may have been extended, and then killed
    assert list(metrics.read(path).groupby("member").env_steps.max()) == [20, 20, 10]
    metrics.drop_after(path, {0: 2})
    assert set(metrics.read(path).member) == {0, 1}
    metrics.drop_after(path, {})
    assert metrics.read(path).empty


def test_the_parts_of_each_batch_are_joined_and_their_rows_kept(tmp_path):
    path = tmp_path / "metrics.parquet"
    metrics.append(path, 0, 1, pa.Table.from_pylist(rows(1)))
    metrics.append(path, 0, 12, pa.Table.from_pylist(rows(12)))
    metrics.append(path, 1, 1, pa.Table.from_pylist(rows(1, batch=1)))
    before = metrics.read(path)
    metrics.join_parts(path)
    assert sorted(part.name for part in path.iterdir()) == [
        "part-0000-000000000012.parquet", "part-0001-000000000001.parquet"
    ]  # fmt: skip
    pd.testing.assert_frame_equal(metrics.read(path), before)


def test_an_atomic_write_replaces_the_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    paths.write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o400 and target.stat().st_mode & 0o044 == (~_umask() & 0o044)


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_failing_write_leaves_the_old_file_and_no_temporary(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        paths.write_atomically(target, half)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# -- directories ------------------------------------------------------------------------------------------------------


def test_a_second_opener_of_a_run_directory_is_refused(tmp_path):
    path = tmp_path / "run"
    with directory.create(path):
        with pytest.raises(UserError, match=r"in use by another process"), directory.create(path):
            pass
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path / ".lock").acquire(timeout=0)
    with directory.create(path) as again:
        again.check_unused()


def test_a_foreign_directory_is_refused_by_name(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with directory.create(tmp_path) as run, pytest.raises(UserError, match=r"not empty \(thesis.tex"):
        run.check_unused()
    with pytest.raises(UserError, match="not empty"):
        jaxdqn.train(SMALL, out=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["thesis.tex"]


@pytest.mark.parametrize("summary", ['{"status": "finished"}', None, "{"])
def test_a_directory_with_a_run_is_refused_with_a_hint(tmp_path, summary):
    path = tmp_path / "run"
    directory.create(path).write_config(spec(), {})
    if summary:
        (path / "summary.json").write_text(summary)
    with directory.create(path) as run, pytest.raises(UserError) as caught:
        run.check_unused()
    assert f"--resume {path}" in str(caught.value)
    assert ("(finished)" if summary and "status" in summary else "(unfinished)") in str(caught.value)


def test_a_path_below_a_file_cannot_be_a_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the run directory .*Not a directory"):
        directory.create(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot make the run directory"):
        directory.create(tmp_path / "file")


def spec(**changes):
    config, hparams = agents.complete(
        Config(agent="a2c", env="Catch-bsuite", hidden_sizes=(7, 9), env_params={"a": 1}, learning_starts=0),
        HParams(learning_rate=1e-3, max_grad_norm=math.inf, own={"value_weight": 0.25}),
    )
    values = {
        "config": config,
        "hparams": hparams,
        "axes": schemes.complete(Axes("averaging", workers=2)),
        "seeds": (3, 4),
        "vary": ({"gamma": 0.9}, {"gamma": 0.99}),
        "num_devices": 2,
        "devices_per_agent": 1,
        "members_per_batch": 3,
        "labels": ({"trial": 4}, {"trial": 4}, {"trial": 7}, {"trial": 7}),
        "continues": Continuation("runs/before", (3, 2, 1, 0), (2, 2, 0, 0)),
    }
    return RunSpec(**{**values, **changes})


def test_a_spec_survives_yaml_and_the_directory(tmp_path):
    assert RunSpec.from_dict(spec().to_dict()) == spec()
    text = yaml.safe_dump(spec().to_dict())
    assert RunSpec.from_dict(yaml.safe_load(text)) == spec()
    directory.create(tmp_path / "run").write_config(spec(), {"commit": "abc", "python": "3"})
    loaded, values = directory.load(tmp_path / "run")
    assert values["commit"] == "abc" and values["continues"]["run"] == os.path.relpath("runs/before", tmp_path / "run")
    there = dataclasses.replace(spec().continues, run=str(pathlib.Path("runs/before").absolute()))
    assert loaded == dataclasses.replace(spec(), continues=there)


def changed(**changes):
    return yaml.safe_dump({**spec().to_dict(), **changes}).encode()


def bomb():
    """Ten lines that stand for 10^9 values."""
    lines = ["a0: &a0 {learning_rate: 0.1}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return changed() + "\n".join(lines).encode()


BROKEN = {
    "not YAML": (b"config: [1, 2", "cannot be read"),
    "not text": (b"\xff\xfe\x00config", "cannot be read"),
    "empty": (b"", "does not hold {name: value}"),
    "a list": (b"- 1\n- 2\n", "does not hold {name: value}"),
    "a field missing": (b"seeds: [0]\n", "lacks config"),
    "seeds no list": (changed(seeds=3), "seeds is 3"),
    "seeds of text": (changed(seeds=["a"]), "seeds is ['a']"),
    "hparams a number": (changed(hparams=3), "hparams is 3"),
    "a hyperparameter of text": (changed(hparams={"target_tau": "high"}), "hparams.target_tau is 'high'"),
    "config nothing": (changed(config=None), "config is None"),
    "unknown hparam": (changed(hparams={"gama": 1.0}), "'gama'"),
    "unknown field": (changed(config={"envv": "x"}), "'envv'"),
    "unknown axis": (changed(axes={"shceme": "fused"}), "'scheme'"),
    "axes of the wrong kind": (changed(axes={"scheme": "averaging", "workers": "four"}), "axes.workers is 'four'"),
    "a list where a name is expected": (changed(config={"env": ["CartPole-v1"]}), "env is ['CartPole-v1']"),
    "sizes of text": (changed(config={"num_envs": "many"}), "num_envs is 'many'"),
    "labels of others": (changed(labels=[{"trial": 1}]), "labels are of 1 members; there are 4"),
    "no members at a time": (changed(members_per_batch=0), "members_per_batch is 0"),
    "continues nothing": (changed(continues={"run": 3}), "continues is"),
    "a date": (changed() + b"seeds_: 2020-13-45\nseeds: 2020-01-01\n", "comes twice"),
    "an integer of 5,000 digits": (changed() + b"x: " + b"1" * 5000, "a number of 5,000 digits"),
    "an integer of a million parts": (changed() + b"x: " + b":".join([b"1"] * 10**6), "digits"),
    "deep": (changed() + b"x: " + b"[" * 50_000, "nested more than 100 deep"),
    "an alias bomb": (bomb(), "values, those that aliases stand for counted"),
    "an alias of itself": (changed() + b"x: &x [*x]", "for itself"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_the_users_error_at_once_and_in_one_line(tmp_path, name):
    content, part = BROKEN[name]
    (tmp_path / "config.yaml").write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        directory.load(tmp_path)
    assert "move" in str(caught.value) and "train anew" in str(caught.value)
    line = str(caught.value)
    assert part in line and str(tmp_path / "config.yaml") in line and "\n" not in line and len(line) < 1_000
    assert time.perf_counter() - began < 5.0


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"[" * 10**6, b"{}", b'{"status": ' + b"1" * 5000 + b"}", b"\xff"]
)
def test_a_broken_summary_is_no_finished_run(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    assert directory.status(tmp_path) == "unfinished"


def test_a_directory_without_a_run_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        directory.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no run"):
        jaxdqn.resume(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    directory.create(tmp_path / "run").write_config(experiment.plan(SMALL, HParams(), (0,), None, 1, 1)[0], {})
    with pytest.raises(UserError, match="no readable checkpoint"):
        jaxdqn.load(tmp_path / "run")
