"""compare_agents.py: what it keeps, what it skips, and that the committed results are of what it trains."""

import pandas as pd
import pytest
from scripts import script

from jaxdqn.analysis import loading
from jaxdqn.errors import UserError
from jaxdqn.runs import cli, directory, experiment

agents = script("compare_agents")
DEFAULT = agents.Args()


def short(out, agents="dqn a2c", num_seeds=2, steps=2000):
    """The flags of a short comparison."""
    flags = f"--envs Catch-bsuite --agents {agents} --num-seeds {num_seeds} --steps {steps} --out"
    return [*flags.split(), str(out)]


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
    assert agents.run(short(path)) == 0
    return path


def test_a_comparison_keeps_three_files_of_each_run(out):
    assert sorted(path.name for path in out.iterdir()) == ["Catch-bsuite-a2c", "Catch-bsuite-dqn"]
    for path in out.iterdir():
        assert sorted(item.name for item in path.iterdir()) == sorted(agents.KEPT)
        assert len(list(path.glob("metrics.parquet/*"))) == 1
    frame = loading.load(out)
    assert frame.groupby("run", observed=True).member.nunique().to_list() == [2, 2]
    assert (frame.groupby("run", observed=True).env_steps.max() >= 2_000).all()


def test_what_is_there_is_not_trained_again(out, monkeypatch, capsys):
    monkeypatch.setattr(agents, "train", lambda path, *_: print(f"trains {path.name}"))
    agents.run(short(out, "dqn random"))
    assert capsys.readouterr().out.split("\n")[:3] == [
        "Catch-bsuite-dqn: there already",
        "== Catch-bsuite-random",
        "trains Catch-bsuite-random",
    ]


def test_a_run_that_is_stopped_goes_on_with_the_next_call(out, tmp_path, monkeypatch):
    whole = experiment.train

    def stopped(*args, settings, **kwargs):
        return whole(*args, settings=settings._replace(stop_at_return=-1.0), **kwargs)

    monkeypatch.setattr(experiment, "train", stopped)
    with pytest.raises(UserError, match="Catch-bsuite-dqn is solved; run this again to go on"):
        agents.run(short(tmp_path, "dqn"))
    assert [item.name for item in tmp_path.iterdir()] == [".Catch-bsuite-dqn"]
    monkeypatch.setattr(experiment, "train", lambda *_, **__: pytest.fail("it begins anew"))
    assert agents.run(short(tmp_path, "dqn")) == 0
    assert [item.name for item in tmp_path.iterdir()] == ["Catch-bsuite-dqn"]
    again, once = (loading.load(path / "Catch-bsuite-dqn") for path in (tmp_path, out))
    learned = [name for name in once if "seconds" not in name and name != "run"]
    pd.testing.assert_frame_equal(again[learned], once[learned])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--agents", "dqm"], "unknown agent 'dqm': did you mean 'dqn'"),
        (["--envs", "CartPole"], "unknown environment 'CartPole': did you mean 'CartPole-v1'"),
        (["--num-seeds", "0"], "num_seeds is 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        agents.run([*flags, "--out", str(tmp_path)])


@pytest.mark.parametrize("env", DEFAULT.envs)
def test_agents_are_given_equally_many_steps_and_episodes(env):
    configs = [agents.settings(env, agent, None, 100)[0] for agent in DEFAULT.agents]
    assert len({(config.env, config.total_steps, config.eval_episodes) for config in configs}) == 1
    assert len({(config.agent, config.dueling) for config in configs}) == len(configs)


@pytest.mark.parametrize("env", DEFAULT.envs)
@pytest.mark.parametrize("agent", DEFAULT.agents)
def test_the_committed_results_are_of_what_the_script_trains(env, agent):
    path = DEFAULT.out / f"{env}-{agent}"
    spec, _ = directory.load(path)
    config, hparams = agents.settings(env, agent, None, 100)
    assert (spec.config, spec.hparams, spec.seeds) == (config.resolved(), hparams, tuple(range(10)))
    assert sorted(item.name for item in path.iterdir()) == sorted(agents.KEPT)
    frame = pd.read_parquet(path / "metrics.parquet")
    assert frame.seed.nunique() == 10 and frame.env_steps.max() >= config.total_steps


def test_a_run_of_another_setting_is_not_taken_for_the_one_that_is_wanted(out, tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "train", lambda *_: pytest.fail("it trains"))
    for other, words in (({"steps": 4000}, "total_steps 2000, not 4000"), ({"num_seeds": 3}, r"seeds \[0, 1\], not")):
        with pytest.raises(UserError, match=f"holds a run with {words}.*choose another --out"):
            agents.run(short(out, **other))
    (tmp_path / "Catch-bsuite-dqn").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        agents.run(short(tmp_path))
