"""compare_agents.py: what it keeps, what it skips, and that the committed results are of what it trains."""

import dataclasses
import importlib.util
import pathlib
import sys

import pandas as pd
import pytest

from jaxdqn import cli, experiment
from jaxdqn.analysis import loading
from jaxdqn.errors import UserError
from jaxdqn.runs import directory

ROOT = pathlib.Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("experiments_compare_agents", ROOT / "experiments" / "compare_agents.py")
script = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = script  # dataclasses look their module up
SPEC.loader.exec_module(script)

DEFAULT = script.Args()
SHORT = "--envs Catch-bsuite --agents dqn a2c --num-seeds 2 --steps 2000".split()


@pytest.fixture(scope="module", autouse=True)
def the_backend_of_the_tests():
    """It may run already, and cannot be set up twice in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "prepare_backend", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A short comparison."""
    path = tmp_path_factory.mktemp("compare") / "agents"
    assert script.run([*SHORT, "--out", str(path)]) == 0
    return path


def test_a_comparison_keeps_three_files_of_each_run(out):
    assert sorted(path.name for path in out.iterdir()) == ["Catch-bsuite-a2c", "Catch-bsuite-dqn"]
    for path in out.iterdir():
        assert sorted(item.name for item in path.iterdir()) == sorted(script.KEPT)
        assert len(list(path.glob("metrics.parquet/*"))) == 1
    frame = loading.load(out)
    assert frame.groupby("run", observed=True).member.nunique().to_list() == [2, 2]
    assert (frame.groupby("run", observed=True).env_steps.max() >= 2_000).all()


def test_what_is_there_is_not_trained_again(out, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", lambda path, *_: print(f"trains {path.name}"))
    script.run([*SHORT, "--agents", "dqn", "random", "--out", str(out)])
    assert capsys.readouterr().out.split("\n")[:3] == [
        "Catch-bsuite-dqn: there already",
        "== Catch-bsuite-random",
        "trains Catch-bsuite-random",
    ]


def test_a_run_that_is_stopped_leaves_nothing_and_ends_the_script(tmp_path, monkeypatch):
    whole = experiment.train

    def stopped(*args, **kwargs):
        result = whole(*args, **kwargs)
        return dataclasses.replace(result, summary={**result.summary, "status": "interrupted"})

    monkeypatch.setattr(experiment, "train", stopped)
    with pytest.raises(UserError, match="Catch-bsuite-dqn is interrupted"):
        script.run([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--agents", "dqm"], "unknown agent 'dqm': did you mean 'dqn'"),
        (["--envs", "CartPole"], "unknown environment 'CartPole': did you mean 'CartPole-v1'"),
        (["--num-seeds", "0"], "num_seeds is 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        script.run([*flags, "--out", str(tmp_path)])


@pytest.mark.parametrize("env", DEFAULT.envs)
def test_agents_are_given_equally_many_steps_and_episodes(env):
    configs = [script.settings(env, agent, None)[0] for agent in DEFAULT.agents]
    assert len({(config.env, config.total_steps, config.eval_episodes) for config in configs}) == 1
    assert len({(config.agent, config.dueling) for config in configs}) == len(configs)


@pytest.mark.parametrize("env", DEFAULT.envs)
@pytest.mark.parametrize("agent", DEFAULT.agents)
def test_the_committed_results_are_of_what_the_script_trains(env, agent):
    path = DEFAULT.out / f"{env}-{agent}"
    spec, _ = directory.load(path)
    config, hparams = script.settings(env, agent, None)
    assert (spec.config, spec.hparams, spec.seeds) == (config.resolved(), hparams, tuple(range(10)))
    assert sorted(item.name for item in path.iterdir()) == sorted(script.KEPT)
    frame = pd.read_parquet(path / "metrics.parquet")
    assert frame.seed.nunique() == 10 and frame.env_steps.max() >= config.total_steps


def test_a_run_of_another_setting_is_not_taken_for_the_one_that_is_wanted(out, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("it trains"))
    for flags, words in (("--steps 4000", "total_steps 2000, not 4000"), ("--num-seeds 3", r"seeds \[0, 1\], not")):
        with pytest.raises(UserError, match=f"holds a run with {words}.*choose another --out"):
            script.run([*SHORT, *flags.split(), "--out", str(out)])
    (tmp_path / "Catch-bsuite-dqn").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        script.run([*SHORT, "--out", str(tmp_path)])
