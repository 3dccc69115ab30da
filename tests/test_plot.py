"""plot.py: which figures a run, several runs and a sweep get, and mistakes in one line."""

import math
import pathlib
import re

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pytest
import yaml
from matplotlib.figure import Figure
from scripts import script

from jaxdqn.errors import UserError
from jaxdqn.runs import cli, metrics

SCRIPT = pathlib.Path(__file__).parent.parent / "experiments" / "plot.py"
SPACE = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "batch_size": [32, 64], "gamma": [0.99]}
SWEEP = {"env": "CartPole-v1", "space": SPACE, "sampler": {"name": "random", "trials": 12}, "objective": "auc"}


@pytest.fixture(scope="module")
def plot():
    return script("plot")


def write_run(path, agent="dqn", env="CartPole-v1", seeds=(0, 1, 2), first=0, config=None, hparams=None, **labels):
    path.mkdir(parents=True)
    values = {"config": {"env": env, "agent": agent, "num_envs": 4, **(config or {})}, "hparams": hparams or {}}
    (path / "config.yaml").write_text(yaml.safe_dump({**values, "vary": [labels], "axes": {"scheme": "fused"}}))
    rng = np.random.default_rng(0)
    rows = [
        {"member": member, "seed": seed, "env_steps": 100 * step, "seconds": 0.1 * step, "loss": rng.normal()}
        | {"eval_return": step + rng.normal() if step % 2 else math.nan, **labels}
        for step in range(first + 1, first + 11)
        for member, seed in enumerate(seeds)
    ]
    metrics.append(path / "metrics.parquet", 0, 1, pa.Table.from_pylist(rows))
    return path


def drawn(plot, capsys, *arguments):
    """The names of the figures that the script prints, each of them a picture."""
    assert plot.run([str(argument) for argument in arguments]) == 0
    paths = [pathlib.Path(line) for line in capsys.readouterr().out.splitlines()]
    for path in paths:
        with PIL.Image.open(path) as image:
            assert min(image.size) > 100
    assert sorted(path.name for path in paths) == sorted(path.name for path in paths[0].parent.iterdir())
    return [path.stem for path in paths]


def test_a_run_gets_its_curves_and_seeds(plot, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert drawn(plot, capsys, run) == ["curves-steps", "curves-seconds", "seeds"]
    assert (run / "figures" / "seeds.png").exists()
    out = tmp_path / "elsewhere" / "figures"
    assert drawn(plot, capsys, run, "--x", "seconds", "--out", out) == ["curves-seconds", "seeds"]
    assert (out / "curves-seconds.png").exists()


def test_a_folder_that_was_drawn_is_drawn_again(plot, tmp_path, capsys):
    write_run(tmp_path / "a")
    assert drawn(plot, capsys, tmp_path) == drawn(plot, capsys, tmp_path)


def test_agents_on_several_environments_are_compared(plot, tmp_path, capsys):
    for agent in ("dqn", "ppo"):
        for env in ("CartPole-v1", "Acrobot-v1"):
            write_run(tmp_path / f"{agent}-{env}", agent, env)
    names = drawn(plot, capsys, tmp_path, "--out", tmp_path / "figures")
    assert names == ["curves-steps", "curves-seconds", "seeds", "profiles", "intervals"]


def test_environments_that_all_runs_solved_are_drawn_but_not_compared(plot, tmp_path, capsys):
    for agent in ("dqn", "ppo"):
        for env in ("CartPole-v1", "Acrobot-v1"):
            write_run(tmp_path / f"{agent}-{env}", agent, env, eval_return=500.0)
    assert plot.run([str(tmp_path), "--x", "seconds"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("no comparison: ") and captured.err.count("\n") == 1
    assert len(captured.out.splitlines()) == 2


def test_a_sweep_without_evaluations_says_so(plot, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", 2, eval_return=math.nan)
    pd.read_parquet(sweep / "trials.parquet").assign(score=math.nan).to_parquet(sweep / "trials.parquet")
    assert plot.run([str(sweep)]) == 0
    assert "no figure of response-learning_rate: nothing to draw: none of 2 trials" in capsys.readouterr().err


def loaded(*paths):
    from jaxdqn.analysis import loading

    return loading.load(paths)


def test_what_differs_is_told_apart(plot, tmp_path):
    a = write_run(tmp_path / "a", learning_rate=0.1)
    assert plot.differing(loaded(a)) == []
    assert plot.differing(loaded(a, write_run(tmp_path / "b", "ppo", learning_rate=0.1))) == ["agent"]
    assert plot.differing(loaded(a, write_run(tmp_path / "c", learning_rate=0.2))) == ["learning_rate"]
    # Other seeds of the same settings are one group; the same seeds again must differ in something unseen.
    assert plot.differing(loaded(a, write_run(tmp_path / "d", seeds=(3, 4), learning_rate=0.1))) == []
    assert plot.differing(loaded(a, write_run(tmp_path / "e", learning_rate=0.1))) == ["run"]


def test_runs_with_other_settings_are_told_apart_whatever_their_seeds(plot, tmp_path):
    own = {
        "agent": "dqn",
        "hparams": {"learning_rate": 1e-3, "gamma": 0.9},
        "config": {"loss": "huber", "log_interval": 5},
    }
    a = write_run(tmp_path / "a", **own)
    frame = loaded(a, write_run(tmp_path / "b", seeds=(200, 201), hparams={"learning_rate": 1e-4, "gamma": 0.9}))
    assert plot.differing(frame) == ["learning_rate"] and set(frame.learning_rate) == {1e-3, 1e-4}
    assert "gamma" not in frame  # is the same
    # Another loss, beside the metric of that name; how often is logged changes nothing.
    c = write_run(tmp_path / "c", **{**own, "config": {"loss": "squared", "log_interval": 9}}, seeds=(7,))
    assert plot.differing(loaded(a, c)) == ["loss_setting"]
    # An agent's preset comes with the agent.
    frame = loaded(a, write_run(tmp_path / "d", agent="c51", hparams={"learning_rate": 1e-5, "v_min": -5.0}))
    assert plot.differing(frame) == ["agent"]
    # What some vary, others have.
    frame = loaded(a, write_run(tmp_path / "e", seeds=(8,), learning_rate=0.5))
    assert plot.differing(frame) == ["learning_rate"] and set(frame.learning_rate) == {1e-3, 0.5}


def test_settings_are_compared_apart_and_only_on_the_same_environments(plot, tmp_path, capsys):
    for rate in (1e-3, 1e-4):
        for env in ("CartPole-v1", "Acrobot-v1"):
            write_run(tmp_path / "runs" / f"{rate}-{env}", env=env, hparams={"learning_rate": rate})
    frame = loaded(tmp_path / "runs")
    figures = dict(plot.curves(frame, plot.Args(x="seconds")))
    labels = [text.get_text() for text in figures["intervals"].axes[0].get_yticklabels()]
    assert labels == ["learning_rate=0.0001 (n=3)", "learning_rate=0.001 (n=3)"]
    part = frame[(frame.learning_rate == 1e-3) | (frame.env == "Acrobot-v1")]
    assert "intervals" not in dict(plot.curves(part, plot.Args(x="seconds")))
    assert "no comparison: learning_rate=0.0001 has no score on CartPole-v1" in capsys.readouterr().err


def test_trials_of_a_sweep_with_halving_are_drawn_by_the_score_that_all_have(plot, tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    (sweep / "space.yaml").write_text(yaml.safe_dump({**SWEEP, "halving": {"rungs": [0.25, 0.5], "keep": 0.5}}))
    trials = pd.read_parquet(sweep / "trials.parquet")
    later = trials.assign(first_score=trials.score, score=trials.score + 100.0 * (trials.trial % 2))
    later.to_parquet(sweep / "trials.parquet")
    response = dict(plot.of_sweep(sweep))["response-learning_rate"]
    heights = np.concatenate([line.get_ydata() for line in response.axes[0].lines])
    assert heights.max() < 10.0 and "after the first 25 %" in response.get_supxlabel().replace("\n", " ")


def write_sweep(path, count=12, final=None, **more):
    """Two rungs of every trial in two runs, and `final` again with seeds of its own."""
    rng = np.random.default_rng(1)
    rows = []
    for trial in range(count):
        values = {"learning_rate": 10 ** rng.uniform(-5, -1), "batch_size": int(rng.choice([32, 64])), "gamma": 0.99}
        for rung in range(2):
            labels = {"trial": trial, "stage": f"rung-{rung}", "kind": "tuning", "first": 10 * rung, **more}
            write_run(path / "runs" / f"trial-{trial}-rung-{rung}", **labels, **values)
        if trial == final:
            labels = {"trial": trial, "stage": "winners", "kind": "final", "seeds": (7, 8)}
            write_run(path / "runs" / "winners", **labels, **values)
        rows.append({"trial": trial, **values, "score": rng.normal()})
    pd.DataFrame(rows).to_parquet(path / "trials.parquet")
    (path / "space.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return path


SWEEPS_FIGURES = ["response-learning_rate", "response-batch_size", "pairwise", "parallel", "importance"]


def test_a_sweep_gets_figures_of_what_was_searched(plot, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep")
    generations = [
        {
            "generation": g,
            "member": m,
            "parent": m,
            "score": g + m,
            "learning_rate": 0.1 * m,
            "batch_size": 32,
            "seed": 5,
        }
        for g in (0, 1)
        for m in (0, 1)
    ]
    pd.DataFrame(generations).to_parquet(sweep / "lineage.parquet")
    names = drawn(plot, capsys, sweep)
    # gamma has one value.
    assert names == ["curves-steps", "curves-seconds", "seeds", *SWEEPS_FIGURES, "lineage"]


def test_runs_and_sweeps_in_one_folder_are_drawn_apart(plot, tmp_path, capsys):
    write_run(tmp_path / "alone")
    for name in ("one", "two"):
        write_sweep(tmp_path / name, 3)
    names = drawn(plot, capsys, tmp_path, "--x", "env_steps", "--out", tmp_path / "figures")
    own = ["curves-steps", "seeds", *(name for name in SWEEPS_FIGURES if name != "importance")]
    assert names == ["curves-steps", "seeds", *(f"{sweep}-{name}" for sweep in ("one", "two") for name in own)]


def test_the_curves_of_a_sweep_are_of_its_winners_or_its_best_trials_with_their_stages_joined(plot, tmp_path):
    frame = loaded(write_sweep(tmp_path / "a"))
    best = plot.whole(frame)
    late = frame[frame.env_steps == 1900].groupby("trial").eval_return.mean()
    assert set(best.trial) == set(late.nlargest(plot.BEST_TRIALS).index) and plot.differing(best) == ["trial"]
    curves = best.groupby("member").env_steps.agg(["min", "max", "size"])
    assert len(curves) == 3 * plot.BEST_TRIALS and (curves == [100, 2000, 20]).all(axis=None)
    winners = plot.whole(loaded(write_sweep(tmp_path / "b", 3, final=1)))
    assert set(winners.trial) == {1} and set(winners.seed) == {7, 8} and winners.member.nunique() == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no path; give run directories"),
        (["nowhere"], "nowhere does not exist"),
        (["run", "--by", "agnet"], "unknown column 'agnet': did you mean 'agent'"),
        (["run", "--by", "loss"], "30 settings of loss; at most 28"),
        (["run", "--x", "updates"], "Expected one of ('both', 'env_steps', 'seconds')"),
    ],
)
def test_mistakes_end_in_one_line(plot, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        cli.main(lambda: plot.run(arguments))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list((tmp_path / "run").glob("figures/*"))


def test_a_broken_space_is_the_users_error(plot, tmp_path):
    sweep = write_sweep(tmp_path / "sweep", 2)
    (sweep / "space.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"space.yaml cannot be read"):
        list(plot.of_sweep(sweep))


def test_a_damaged_lineage_is_named(plot, tmp_path, capsys):
    sweep, columns = write_sweep(tmp_path / "sweep", 2), ("generation", "member", "parent", "score", "learning_rate")
    for write, words in (
        (lambda path: path.write_text("junk"), "lineage.parquet cannot be read"),
        (
            pd.DataFrame({name: ["x"] for name in columns}).to_parquet,
            "column 'generation' holds something else than numbers",
        ),
    ):
        write(sweep / "lineage.parquet")
        list(plot.of_sweep(sweep))
        assert f"no figure of lineage: {words}" in re.sub(r"[^ ]*/", "", capsys.readouterr().err)


def test_figures_do_not_go_where_a_strangers_link_leads(plot, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "seeds.png").write_text("precious")
    (run / "figures").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link, which may lead anywhere; give --out"):
        plot.run([str(run)])
    (run / "figures").unlink()
    (run / "figures").mkdir()
    (run / "figures" / "seeds.png").symlink_to(tmp_path / "mine" / "seeds.png")
    drawn(plot, capsys, run)
    assert (tmp_path / "mine" / "seeds.png").read_text() == "precious"


def test_names_from_a_strangers_files_do_not_lead_out_of_the_directory(plot, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    names = ["response-../../evil", "/evil", "..", ".hidden", "a\nb", "x" * 300, "größe-1", "a b"]
    monkeypatch.setattr(plot, "everything", lambda *_: ((name, Figure()) for name in names))
    before = sorted(tmp_path.rglob("*"))
    found = drawn(plot, capsys, run, "--out", tmp_path / "figures")
    assert found == ["response--evil", "-evil", "-", "-hidden", "a-b", "x" * 60, "größe-1", "a-b-2"]
    assert sorted(path for path in tmp_path.rglob("*") if "figures" not in path.parts) == before
