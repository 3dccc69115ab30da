"""compare_parallel.py: all presets are looked at before one is trained, and what is there is what is asked for."""

import pandas as pd
import pytest
from scripts import script

from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.runs import experiment
from jaxdqn.runs.settings import Settings

compare = script("compare_parallel")


def refused(monkeypatch, out, *arguments):
    """What is said before anything is trained."""
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError) as error:
        compare.run([*arguments, "--out", str(out)])
    return str(error.value)


def test_a_flag_that_train_would_refuse_ends_it_before_the_first_preset_is_trained(monkeypatch, tmp_path):
    assert "bogus" in refused(monkeypatch, tmp_path, "--presets", "fused", "a3c --bogus 3")
    assert "batch_size" in refused(monkeypatch, tmp_path, "--presets", "fused", "fused --batch-size 0")
    assert list(tmp_path.iterdir()) == []


def test_two_presets_are_not_kept_in_one_folder(monkeypatch, tmp_path):
    presets = ("fused --stop-at-return 100", "fused --stop-at-return -100")
    assert "would both be kept in" in refused(monkeypatch, tmp_path, "--presets", *presets)


def test_a_run_of_another_setting_is_not_taken_for_the_one_that_is_wanted(monkeypatch, tmp_path):
    config = Config(env="Catch-bsuite", num_envs=4, hidden_sizes=(4,), learning_starts=16, total_steps=40, batch_size=8)
    experiment.train(config, seeds=(0,), out=tmp_path / "fused", settings=Settings(progress=False, figure=False))
    assert "holds a run with" in refused(monkeypatch, tmp_path, "--presets", "fused", "--env", "CartPole-v1")


def test_what_is_the_same_for_all_is_no_flag_of_a_preset(monkeypatch, tmp_path):
    assert "--total-steps is the same for all" in refused(monkeypatch, tmp_path, "--presets", "fused --total-steps 100")


def test_seeds_that_never_get_there_count_as_later_and_curves_end_where_seeds_stop(tmp_path):
    frame = pd.DataFrame({"time": [10.0, 20, 30, 40, 100], "reached": [True, True, True, True, False]})
    assert compare.median(frame, ".0f") == "30"
    assert compare.median(frame.assign(reached=[True, False, False, False, False]), ".0f") == "-"
    rows = [(member, 100 * at, float(member)) for member in range(3) for at in range(1, 5) if member != 2 or at < 3]
    metrics = pd.DataFrame(rows, columns=["member", "env_steps", "eval_return"]).assign(seconds=1.0)
    (tmp_path / "fused").mkdir()
    metrics.to_parquet(tmp_path / "fused" / "metrics.parquet")
    line = compare.draw(compare.Args(presets=("fused",), out=tmp_path), "env_steps", "").axes[0].lines[0]
    assert line.get_xydata().tolist() == [[100.0, 1.0], [200.0, 1.0]]


def test_a_run_goes_on_with_the_flags_that_no_run_directory_keeps(tmp_path):
    args = compare.Args(out=tmp_path)
    flags = "--axes.workers 2 --engine ray --stop-at-return 480 --no-tensorboard --quiet"
    resumed = compare.flags_of_resume(args, f"a3c {flags}", compare.load_train())
    assert resumed[:2] == ["--resume", str(compare.folder(args, f"a3c {flags}"))]
    assert sorted(resumed[2:]) == sorted("--engine ray --stop-at-return 480.0 --no-tensorboard --quiet".split())
    assert compare.flags_of_resume(args, "fused", compare.load_train()) == ["--resume", str(tmp_path / "fused")]
