"""One file and one line make an agent with a head, a replay and settings of its own: it is there for every scheme."""

import json

import jax
import numpy as np
import pandas as pd
import pytest
import quantile_agent
from cases import slow
from scripts import script

import jaxdqn
from jaxdqn import agents
from jaxdqn.config import Config, HParams, values_of
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.sweeps import reading

QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
SMALL = Config(
    agent="quantile",
    env="Catch-bsuite",
    num_envs=8,
    batch_size=32,
    hidden_sizes=(16,),
    replay_capacity=800,
    learning_starts=200,
    total_steps=1_600,
    eval_episodes=2,
    final_episodes=2,
    own={"num_quantiles": 7},
)


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    monkeypatch.setitem(agents.AGENTS, "quantile", quantile_agent.QUANTILE)


def last_layer(result):
    return result.params["Dense_1"]["kernel"].shape[1:]


def test_its_settings_have_flags_with_help_and_are_listed(capsys):
    with pytest.raises(SystemExit):
        script("train").run(["--agent", "quantile", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--num-quantiles INT Quantiles of the return of each action. (default: 5)" in said
    assert "--hparams.kappa FLOAT Where the quantile Huber loss becomes linear. (default: 1.0)" in said
    script("list").run([])
    assert "num_quantiles, kappa, exponent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, hparams, words",
    [
        ({"num_quantiles": 0}, {}, "num_quantiles is 0; it must be a whole number of at least 1"),
        ({"num_quantile": 3}, {}, "unknown configuration field 'num_quantile': did you mean 'num_quantiles'"),
        ({}, {"kappa": -1.0}, "hparams.kappa is -1.0; it must be a number above 0 and finite"),
        ({}, {"exponent": 1.5}, r"hparams.exponent is 1.5; it must be a number in \[0, 1\]"),
        ({}, {"value_weight": 0.5}, "unknown hyperparameter 'value_weight'"),
    ],
)
def test_its_values_are_checked(config, hparams, words):
    with pytest.raises(UserError, match=words):
        jaxdqn.train(Config(agent="quantile", own=config), HParams(own=hparams), settings=QUIET)


@pytest.mark.parametrize(
    "flag, whose",
    [
        ("--num-quantiles", "agents 'qr_dqn', 'quantile'"),
        ("--hparams.kappa", "agents 'qr_dqn', 'iqn', 'quantile'"),
        ("--hparams.exponent", "agent 'quantile'"),
    ],
)
def test_its_flags_with_another_agent_say_whose_they_are(flag, whose):
    with pytest.raises(UserError, match=f"{flag} belongs to {whose}, not to 'dqn'; choose one by --agent"):
        script("train").parse(["--agent", "dqn", flag, "3"])


def test_it_trains_as_a_population_that_varies_its_own_hyperparameters(tmp_path):
    out = tmp_path / "run"
    result = jaxdqn.train(SMALL, seeds=[0, 1], vary={"kappa": [0.5, 1.0], "gamma": [0.9]}, out=out, settings=QUIET)
    assert last_layer(result) == (16, 3 * 7) and sorted(result.metrics.kappa.unique()) == [0.5, 1.0]
    assert [values_of(setting)["kappa"] for _, setting in result.members] == [0.5, 0.5, 1.0, 1.0]
    again = jaxdqn.load(out)
    assert again.config.own == quantile_agent.Settings(7) and again.members == result.members
    longer = jaxdqn.resume(out, total_steps=2_400, settings=QUIET)
    assert longer.metrics.env_steps.max() == 2_400
    saved = (out / "config.yaml").read_text()
    assert "num_quantiles: 7" in saved and "kappa: 1.0" in saved and "value_weight" not in saved


def test_it_is_swept(tmp_path):
    file = {
        "env": "Catch-bsuite",
        "config": {"agent": "quantile", "total_steps": 1_000, "learning_starts": 200, "num_envs": 8},
        "space": {"kappa": {"low": 0.1, "high": 1.0}, "num_quantiles": [3, 5]},
        "sampler": {"name": "sobol", "trials": 2},
    }
    sweep = reading.parse(file)
    assert sweep.space.names == ("kappa", "num_quantiles")
    with pytest.raises(UserError, match=r"hparams.kappa is 0"):
        reading.parse({**file, "space": {"kappa": [0, 1]}})


@pytest.mark.parametrize(
    "axes, options",
    [
        (Axes(), {"num_devices": 2, "devices_per_agent": 2}),
        (Axes("parameter_server", workers=2), {}),
        slow(Axes("averaging", workers=2), {}),
        slow(Axes("sharding", workers=2), {}),
    ],
    ids=lambda x: getattr(x, "scheme", ""),
)
def test_every_scheme_carries_it(axes, options):
    result = jaxdqn.train(SMALL, axes=axes, settings=QUIET, **options)
    assert last_layer(result) == (16, 3 * 7) and result.summary["status"] == "finished"
    assert np.isfinite(result.metrics.loss.dropna()).all() and result.metrics.loss.notna().any()


def test_a_scheme_that_cannot_says_so_in_one_line():
    with pytest.raises(UserError, match="agent 'quantile' with replay 'auto': that replay has no regions for several"):
        jaxdqn.train(SMALL, axes=Axes("actor_learner", workers=2), settings=QUIET)


def test_a_server_gives_priorities_back():
    """The worker's replay holds the priorities of its last gradients, not those with which rows came in."""
    components_axes = schemes.complete(Axes("parameter_server", workers=1))
    from jaxdqn.components import make_components
    from jaxdqn.parallel.asynchronous import parameter_server

    components = make_components(SMALL)
    hparams = agents.complete(SMALL, HParams())[1]
    built, states = parameter_server.build(components, jax.devices()[:1], [0], [hparams], components_axes.own)
    states, metrics = built.prefill(states, built.zero_metrics, 0, 30)
    states, _ = built.step(states, metrics, 30, 60)
    priorities = np.asarray(states[0].workers[0].replay.priorities)
    assert len(np.unique(priorities)) > 50


def test_the_script_trains_it(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdqn.parallel.compiled.devices.prepare_cpu", lambda *args, **options: None)
    monkeypatch.setattr("jaxdqn.parallel.compiled.devices.prepare_cache", lambda: None)
    flags = "--env Catch-bsuite --agent quantile --num-quantiles 3 --hparams.kappa 0.5 --vary.exponent 0 1"
    small = "--num-envs 8 --learning-starts 200 --total-steps 1600 --eval-episodes 2 --final-episodes 2 --quiet"
    assert script("train").run([*flags.split(), *small.split(), "--out", str(tmp_path / "run")]) == 0
    frame = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert sorted(frame.exponent.unique()) == [0.0, 1.0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["agent"] == "quantile"
