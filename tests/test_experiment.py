"""`train` and what it returns: metrics, summary, stops, divergence, populations, memory."""

import dataclasses
import json
import math

import jax
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from cases import usual

import jaxdqn
from jaxdqn.analysis.intervals import mean_interval
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import memory, runner
from jaxdqn.runs import experiment, reporting
from jaxdqn.runs.settings import Settings
from jaxdqn.timeline import timeline

SMALL = Config(
    num_envs=4,
    batch_size=16,
    hidden_sizes=(16,),
    replay_capacity=400,
    learning_starts=64,
    total_steps=2000,
    eval_episodes=2,
    final_episodes=4,
    env_params={"max_steps_in_episode": 20},
)
SHORT = dataclasses.replace(SMALL, total_steps=400)
LINE = timeline(SMALL)  # 4 steps an iteration; rows every 5 iterations, evaluations every 20
QUIET = Settings(progress=False, tensorboard=False)
COLUMNS = "member seed iteration env_steps updates seconds episodes episode_return episode_length epsilon eval_return"
COLUMNS += " eval_length eval_distinct eval_unfinished"
SUMMARY = """env agent status num_members seeds env_steps updates env_steps_per_second updates_per_second
compile_seconds run_seconds final_return_mean final_return_ci95 final_return_per_member replay_bytes jax_version device
commit"""


def train(config=SMALL, hparams=None, num_devices=1, settings=QUIET, **options):
    return jaxdqn.train(config, hparams, num_devices=num_devices, settings=settings, **options)


def tidy(frame):
    return frame.drop(columns="seconds").sort_values(["member", "env_steps"], ignore_index=True)


def assert_same_params(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def run():
    """Four members: two learning rates, two seeds; the chunks it was told of."""
    chunks = []
    result = train(seeds=(3, 8), vary={"learning_rate": [1e-3, 4e-3]}, on_chunk=lambda rows: chunks.append(rows))
    return result, chunks


# -- metrics and summary ----------------------------------------------------------------------------------------------


def test_metrics_have_one_row_per_member_and_logging_point(run):
    frame = run[0].metrics
    assert set(COLUMNS.split()) | {"learning_rate", "loss"} <= set(frame.columns)
    assert not set(HParams._fields) - {"learning_rate"} & set(frame.columns)
    assert LINE.total == 500 and LINE.log_every == 5 and LINE.eval_every == 20
    iterations = list(range(5, 501, 5))
    for member, (seed, rate) in enumerate([(3, 1e-3), (8, 1e-3), (3, 4e-3), (8, 4e-3)]):
        rows = frame[frame.member == member]
        assert list(rows.iteration) == iterations
        assert set(rows.seed) == {seed} and set(rows.learning_rate) == {rate}
        assert list(rows.env_steps) == [4 * i for i in iterations]
        assert list(rows.updates) == [max(0, i - 16) for i in iterations]
        assert list(rows.iteration[rows.eval_return.notna()]) == list(range(20, 501, 20))
        assert rows.loss[rows.iteration <= 15].isna().all() and rows.loss[rows.iteration >= 20].notna().all()
        assert rows.seconds.is_monotonic_increasing
        finished = rows[rows.episodes > 0]
        assert finished.episode_return.between(1, 20).all() and rows[rows.episodes == 0].episode_return.isna().all()
        np.testing.assert_array_equal(finished.episode_return, finished.episode_length)  # CartPole pays 1 a step
        assert (finished.episodes * finished.episode_length).sum() <= 2000
        assert rows.eval_return.dropna().between(1, 20).all()
    assert len(frame) == 400
    assert frame[frame.member == 0].loss.iloc[-1] != frame[frame.member == 1].loss.iloc[-1]


def test_rows_are_by_member_whether_or_not_there_is_a_directory(run):
    pairs = list(zip(run[0].metrics.member, run[0].metrics.env_steps, strict=True))
    assert pairs == sorted(pairs)


def test_on_chunk_gets_every_row_once_in_order(run):
    result, chunks = run
    assert [rows[0]["iteration"] for rows in chunks] == list(range(5, 501, 5))
    assert all([row["member"] for row in rows] == [0, 1, 2, 3] for rows in chunks)
    told = pd.DataFrame([row for rows in chunks for row in rows])
    pd.testing.assert_frame_equal(tidy(told), tidy(result.metrics))


def test_summary(run):
    result = run[0]
    summary = result.summary
    assert set(SUMMARY.split()) <= set(summary)
    assert summary["env"] == "CartPole-v1" and summary["agent"] == "dqn" and summary["status"] == "finished"
    assert summary["num_members"] == 4 and summary["seeds"] == [3, 8]
    assert summary["env_steps"] == 4 * 2000 and summary["updates"] == 4 * 484
    assert summary["run_seconds"] > 0 and summary["compile_seconds"] > 0
    assert summary["env_steps_per_second"] == pytest.approx(8000 / summary["run_seconds"])
    assert summary["updates_per_second"] == pytest.approx(4 * 484 / summary["run_seconds"])
    finals = summary["final_return_per_member"]
    assert len(finals) == 4
    assert summary["final_return_of"] == "4 greedy episodes of each member's kept parameters"
    assert summary["final_return_mean"] is None and summary["final_return_ci95"] is None  # there are two settings
    for index, (entry, rate) in enumerate(zip(summary["final_returns"], (1e-3, 4e-3), strict=True)):
        assert entry["setting"] == {"learning_rate": rate} and entry["n"] == 2
        assert entry["per_member"] == finals[2 * index : 2 * index + 2]
        assert entry["mean"] == pytest.approx(np.mean(entry["per_member"]))
        assert entry["ci95"] == mean_interval(entry["per_member"])
    # 100 rows of 4 transitions; a transition is at least its observation, action and reward.
    assert summary["replay_bytes"] >= 4 * 400 * (4 * 4 + 1 + 4)
    assert summary["jax_version"] == jax.__version__ and summary["first_bad_update_per_member"] == {}


def test_plot_draws_every_member_and_a_mean_per_setting(run):
    figure = run[0].plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    greedy, training = figure.axes[:2]
    assert len(greedy.lines) == 4 + 2
    assert len(training.lines) == 4 + 2 * 2  # an episode of each member's ends first: the mean is dotted until then
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["learning_rate=0.001 (n=2)", "learning_rate=0.004 (n=2)"]


def test_evaluate_gives_episodes_of_one_member(run):
    result = run[0]
    episodes = result.evaluate(episodes=7, member=3)
    assert episodes.returns.shape == (7,) and episodes.finished.all()
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)
    assert episodes.returns.min() >= 1 and episodes.returns.max() <= 20
    np.testing.assert_array_equal(episodes.returns, result.evaluate(episodes=7, member=3, seed=1).returns)
    for member, said in ((4, "member 4 does not exist; the run has members 0 to 3"), (-1, "member is -1")):
        with pytest.raises(UserError, match=said):
            result.evaluate(episodes=2, member=member)
    with pytest.raises(UserError, match="episodes is 0"):
        result.evaluate(episodes=0)
    begun = dataclasses.replace(result, params=jax.tree.map(lambda x: x[:1], result.params))  # ended in its first batch
    with pytest.raises(UserError, match=r"member 3 has not begun to train; members 0 to 0 have: go on with --resume"):
        begun.evaluate(episodes=2, member=3)


# -- stops ------------------------------------------------------------------------------------------------------------


def test_stop_at_return_stops_one_logging_point_after_the_evaluation_that_reached_it():
    result = train(settings=QUIET._replace(stop_at_return=1.0))  # the first evaluation, at 20, reaches it
    assert list(result.metrics.iteration) == [5, 10, 15, 20, 25]
    assert result.summary["status"] == "solved" and result.summary["env_steps"] == 100


def test_a_return_out_of_reach_stops_nothing():
    result = train(SHORT, settings=QUIET._replace(stop_at_return=21.0))
    assert result.metrics.iteration.max() == 100 and result.summary["status"] == "finished"


def test_max_seconds_stops_a_long_run():
    long = dataclasses.replace(SMALL, total_steps=40_000_000, log_interval=2000, eval_interval=20_000_000)
    result = train(long, settings=QUIET._replace(max_seconds=0.5))
    assert result.summary["status"] == "out of time"
    assert 0.5 < result.summary["run_seconds"] < 20
    assert result.metrics.env_steps.max() < 40_000_000


# -- divergence -------------------------------------------------------------------------------------------------------


def test_a_diverging_member_is_named_keeps_finite_parameters_and_leaves_the_other_alone(capfd):
    both = train(SHORT, vary={"learning_rate": [1e-3, 1e30]})
    bad = both.summary["first_bad_update_per_member"]
    assert list(bad) == ["1"] and 1 <= bad["1"] <= 84
    assert both.summary["status"] == "finished"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "not finite" in line]
    assert "member 1 (seed 0, learning_rate 1e+30)" in line and f"update {bad['1']}" in line
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both.params))
    alone = train(SHORT, HParams(learning_rate=1e-3))
    mine = tidy(both.metrics[both.metrics.member == 0]).drop(columns="learning_rate")
    pd.testing.assert_frame_equal(mine, tidy(alone.metrics), check_exact=True)
    assert_same_params(jax.tree.map(lambda x: x[:1], both.params), alone.params)


def test_a_run_of_which_every_member_diverged_stops():
    result = train(SMALL, HParams(learning_rate=1e30))
    assert result.summary["status"] == "diverged"
    assert result.metrics.iteration.max() < 500


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "source"
    return train(SHORT, seeds=(0, 1), out=path)


def test_init_from_starts_every_member_from_one_member_of_another_run(source):
    wanted = QUIET._replace(init_from=str(source.path), init_member=1)
    result = train(SHORT, HParams(learning_rate=0.0), seeds=(5, 6), settings=wanted)  # nothing moves
    for leaf, origin in zip(jax.tree.leaves(result.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_array_equal(leaf, np.stack([origin[1], origin[1]]))
    with pytest.raises(UserError, match="member 2 does not exist"):
        train(SHORT, settings=wanted._replace(init_member=2))
    with pytest.raises(
        UserError, match=r"another configuration\. Start with the environment, the agent and the network"
    ):
        train(dataclasses.replace(SHORT, hidden_sizes=(8,)), settings=wanted)


SCHEMES = {
    "actor_learner in lockstep": Axes("actor_learner", workers=2, merge_every=2, lag=1),
    "actor_learner": Axes("actor_learner", workers=2, merge_every=2, coupling="async"),
    "parameter_server": Axes("parameter_server", workers=2),
    "local SGD": Axes("averaging", workers=2),
    "DiLoCo": Axes("averaging", workers=2, combine="outer"),
    "elastic averaging": Axes("averaging", workers=2, combine="elastic"),
    "sharding": Axes("sharding", workers=2),
    "sharding over data too": Axes("sharding", workers=4, data=2),
}


@pytest.mark.parametrize("name", usual(SCHEMES, "parameter_server"))
def test_init_from_is_for_every_scheme(name, source):
    """Nothing moves, so the run ends with what it started from, and has acted on nothing else."""
    wanted = QUIET._replace(init_from=str(source.path), init_member=1)
    options = {"axes": SCHEMES[name], "num_devices": None, "settings": wanted}
    result = train(SHORT, HParams(learning_rate=0.0), seeds=(5,), **options)
    for leaf, origin in zip(jax.tree.leaves(result.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_allclose(leaf, origin[1:], rtol=1e-6, atol=1e-7)  # means of equal numbers round


def test_actors_start_with_the_parameters_of_init_from(source):
    """With a learner that stands still and sends them nothing before the end, they act as the fused loop does: every
    loss is of the same experience."""
    greedy = HParams(learning_rate=0.0, epsilon_begin=0.0, epsilon_end=0.0)
    wanted = QUIET._replace(init_from=str(source.path), init_member=1)
    axes = Axes("actor_learner", workers=1, merge_every=1, broadcast_every=84)
    fused, apart = (train(SHORT, greedy, axes=each, settings=wanted).metrics.loss for each in (None, axes))
    np.testing.assert_array_equal(apart, fused)
    assert fused.nunique() > 50


def test_a_run_that_died_before_its_first_checkpoint_resumes_from_init_from(source, tmp_path):
    path = tmp_path / "run"
    wanted = QUIET._replace(init_from=str(source.path), init_member=1)
    first = train(SHORT, settings=wanted, out=path)
    for file in [*path.glob("checkpoints/*/manifest.json")]:
        directory = file.parent
        directory.rename(tmp_path / directory.name)  # as if it had not been written yet
    (path / "summary.json").unlink()
    again = experiment.resume(path, settings=QUIET)
    assert_same_params(first.params, again.params)


def test_a_run_is_loaded_as_it_ended(source):
    loaded = jaxdqn.load(source.path)
    assert_same_params(loaded.params, source.params)
    pd.testing.assert_frame_equal(loaded.metrics, source.metrics)
    assert loaded.config == source.config and loaded.members == source.members


def test_a_used_directory_is_refused(source):
    before = sorted(source.path.rglob("*"))
    with pytest.raises(UserError, match=r"already holds a run \(finished\).*--resume"):
        train(SHORT, out=source.path)
    assert sorted(source.path.rglob("*")) == before


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(SHORT, settings=Settings(progress=False))
    assert result.path is None and len(result.metrics) == 100 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seeds", [[0, 2**32], [-1], [1.5], "12", [True]])
def test_seeds_that_are_none_are_refused_before_the_directory_is_taken(seeds, tmp_path):
    with pytest.raises(UserError, match="seeds"):
        train(SHORT, seeds=seeds, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# -- populations ------------------------------------------------------------------------------------------------------


def test_every_setting_meets_every_seed():
    result = train(SHORT, seeds=(7, 2), vary={"learning_rate": [1e-3, 2e-3], "gamma": [0.9, 0.99]})
    last = result.metrics[result.metrics.iteration == 100].sort_values("member")
    found = list(zip(last.learning_rate, last.gamma, last.seed, strict=True))
    assert found == [(rate, gamma, seed) for rate in (1e-3, 2e-3) for gamma in (0.9, 0.99) for seed in (7, 2)]
    assert [(h.learning_rate, h.gamma, seed) for seed, h in result.members] == found
    assert jax.tree.leaves(result.params)[0].shape[0] == 8
    assert len(set(last.loss)) == 8


def test_dead_lanes_appear_in_no_result():
    result = train(SHORT, seeds=(0, 1, 2), num_devices=2)
    assert result.metrics.groupby("member").size().to_dict() == {0: 100, 1: 100, 2: 100}
    assert result.metrics.groupby("member").seed.unique().map(list).to_dict() == {0: [0], 1: [1], 2: [2]}
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(result.params))
    assert result.summary["env_steps"] == 3 * 400 and len(result.summary["final_return_per_member"]) == 3
    assert "2 x" in result.summary["device"]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_replay_too_large_is_refused_with_numbers_before_anything_is_allocated(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "host_bytes", lambda: 2 * 2**30)
    monkeypatch.setattr(runner, "build", lambda *args: pytest.fail("something was allocated"))
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"one agent needs [0-9.]+ GiB .* of 2\.0 GiB free .*lower replay_capacity to"):
        train(dataclasses.replace(SMALL, replay_capacity=2**30), out=out)
    assert not out.exists()


def test_a_population_that_does_not_fit_runs_in_batches_to_the_same_end(monkeypatch, tmp_path):
    whole = train(SHORT, seeds=(0, 1, 2))
    shard_bytes = runner.shard_bytes(make_components(SHORT))[0]
    monkeypatch.setattr(memory, "available_bytes", lambda devices: math.ceil(2.5 * shard_bytes / memory.HEADROOM))
    split = train(SHORT, seeds=(0, 1, 2), out=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["0000-000000000100", "0001-000000000100"]  # members 0 and 1, then 2
    pd.testing.assert_frame_equal(tidy(whole.metrics), tidy(split.metrics), check_exact=True)
    assert_same_params(whole.params, split.params)
    assert split.summary["env_steps"] == 1200 and split.summary["status"] == "finished"
    assert_same_params(jaxdqn.load(tmp_path / "run").params, whole.params)


def test_the_status_is_that_of_the_population_not_of_its_first_batch(monkeypatch):
    options = {"vary": {"learning_rate": [1e30, 1e-3]}}
    assert train(SHORT, **options).summary["status"] == "finished"
    shard_bytes = runner.shard_bytes(make_components(SHORT))[0]
    monkeypatch.setattr(memory, "available_bytes", lambda devices: math.ceil(1.5 * shard_bytes / memory.HEADROOM))
    split = train(SHORT, **options).summary
    assert split["first_bad_update_per_member"].keys() == {"0"} and split["status"] == "finished"


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_run_stopped_before_any_evaluation_has_a_picture_and_a_summary_that_is_json(tmp_path):
    result = train(SHORT, out=tmp_path / "run", settings=QUIET._replace(max_seconds=0.0))
    text = (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in text and json.loads(text)["final_return_mean"] is None
    assert result.summary["status"] == "out of time"
    row = {"member": 0, "env_steps": 10, "eval_return": math.nan, "episode_return": 9.0}
    assert reporting.plot(pd.DataFrame([row]), "stopped").axes
