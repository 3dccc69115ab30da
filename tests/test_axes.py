"""Parallel presets and axes: they fit together, they run from the script, and wrong ones say why."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from cases import slow
from scripts import script

import jaxdqn
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.asynchronous.workers import LAG_BINS
from jaxdqn.parallel.axes import PARALLEL, Axes, over, preset
from jaxdqn.parallel.schemes import validate
from jaxdqn.presets import for_environment
from jaxdqn.runs import cli
from jaxdqn.timeline import timeline

SMALL = (
    "--num-envs",
    "8",
    "--learning-starts",
    "600",
    "--replay-capacity",
    "4000",
    "--eval-episodes",
    "2",
    "--final-episodes",
    "4",
)
ON_POLICY = ("--learning-starts", "0")


@pytest.fixture
def train(monkeypatch, capfd):
    """train.py in this process, whose backend has long started: train(*flags, code=0) -> what it printed."""
    monkeypatch.setattr("jaxdqn.parallel.compiled.devices.prepare_cpu", lambda *args, **options: None)
    monkeypatch.setattr("jaxdqn.parallel.compiled.devices.prepare_cache", lambda: None)

    def run(*flags, code=0):
        with pytest.raises(SystemExit) as stop:
            cli.main(lambda: script("train").run(list(flags)))
        said = capfd.readouterr()
        assert stop.value.code == code, said.err
        return said

    return run


@pytest.mark.parametrize("name", PARALLEL)
def test_presets_are_valid_and_say_what_they_are_for(name):
    chosen = preset(name)
    validate(chosen.axes)
    cartpole = for_environment("CartPole-v1")
    config, hparams = over(chosen, cartpole.config, cartpole.hparams)
    assert isinstance(config, Config) and isinstance(hparams, HParams) and chosen.summary


@pytest.mark.parametrize("own, steps", [(1, 3), (3, 3), (8, 8)])
def test_apex_takes_three_steps_or_the_environments_where_those_are_more(own, steps):
    assert over(preset("apex"), Config(n_step=own), HParams())[0].n_step == steps


@pytest.mark.parametrize("name", ["parallel_dqn", "apex", "lockstep_dqn"])
def test_actors_take_the_pieces_of_a_preset_that_has_some(name):
    sizes = lambda config: (config.num_envs, config.rollout_length, config.updates_per_iteration)  # noqa: E731
    of = lambda env, agent=None: over(preset(name), *for_environment(env, agent)[1:])[0]  # noqa: E731
    assert sizes(of("CartPole-v1")) == (16, 4, 4)  # one step of ten environments
    assert sizes(of("ALE/Pong-v5")) == (16, 4, 8) and sizes(of("ALE/Pong-v5", "rainbow")) == (16, 4, 32)


@pytest.mark.parametrize(
    "axes, words",
    [
        (Axes("parameter_server", merge_every=3), "merge_every is no axis of scheme 'parameter_server'"),
        (Axes("fused", workers=2), "choose one with --parallel"),
        (Axes("actor_learner", coupling="asink"), "did you mean 'async'"),
        (Axes("aktor_learner"), "did you mean 'actor_learner'"),
        (Axes("parameter_server", workers=0), "workers is 0"),
        (Axes("parameter_server", workers=-3), "workers is -3"),
        (Axes("parameter_server", workers=2.5), "workers is 2.5"),
        (Axes("parameter_server", workers=True), "workers is True"),
        (Axes("parameter_server", workers=2**70), "at most|more than 256"),
        (Axes("parameter_server", max_lag=-1), "max_lag is -1"),
        (Axes("parameter_server", lock="none", merge_every=2), "merge_every is no axis of scheme 'parameter_server'"),
        (Axes("parameter_server", lock="none", slack=2), "slack is no axis of scheme 'parameter_server'"),
        (Axes("parameter_server", scale_by_lag="yes"), "scale_by_lag is 'yes'; it must be True or False"),
        (Axes("actor_learner", workers=257), "256"),
        (Axes("actor_learner", merge_every=-1), "merge_every is -1"),
        (Axes("actor_learner", lock="none"), "lock is no axis of scheme 'actor_learner'"),
        (Axes("averaging", combine="median"), "combine"),
        (Axes("sharding", workers=0), "workers is 0"),
    ],
)
def test_wrong_axes_say_why(axes, words):
    with pytest.raises(UserError, match=words):
        validate(axes)


HUGE, MOST = 2**62, 2**31 - 1


@pytest.mark.parametrize(
    "axes, changes, words",
    [
        (Axes("actor_learner", workers=3), {}, "num_envs 16 cannot be divided over 3 actors; use 15, say"),
        (Axes("actor_learner", workers=32), {}, "num_envs 16 cannot be divided over 32 actors"),
        (Axes("actor_learner", slack=4), {}, "slack 4 is below merge_every 8: the learner would wait forever"),
        (Axes("actor_learner", slack=0), {}, "slack is 0"),
        (Axes("actor_learner", merge_every=0), {}, "merge_every is 0"),
        (Axes("actor_learner", merge_every=MOST, slack=MOST), {}, "do not fit the replay"),
        (Axes("actor_learner", broadcast_every=0), {}, "broadcast_every is 0"),
        (Axes("actor_learner", broadcast_every=HUGE), {}, f"broadcast_every is {HUGE}"),
        (Axes("actor_learner", broadcast_every=MOST), {}, "broadcast_every .* the actors would never see"),
        (Axes("actor_learner", lag=2), {}, "lag is 2; in lockstep it is 0 or 1"),
        (Axes("actor_learner", coupling="async", lag=1), {}, "lag 1 is for lockstep"),
        (Axes("actor_learner", max_lag=3), {}, "max_lag 3 is for async"),
        (Axes("actor_learner"), {"agent": "a2c"}, "agent 'a2c' .* learns from the latest block"),
        (Axes("actor_learner"), {"replay": "latest"}, "agent 'dqn' with replay 'latest' learns from the latest block"),
        (Axes("averaging", workers=3), {}, "num_envs 16 cannot be divided over 3"),
        (Axes("averaging", average_every=0), {}, "average_every is 0"),
        (Axes("averaging", average_every=HUGE), {}, f"average_every is {HUGE}"),
        (Axes("averaging", average_each_until=HUGE), {}, f"average_each_until is {HUGE}"),
        (Axes("sharding", workers=4, data=3), {}, "data 3 does not divide axes.workers 4"),
        (Axes("sharding", workers=4, data=0), {}, "data 0 does not divide axes.workers 4"),
    ],
)
def test_axes_that_do_not_fit_the_configuration_say_why(axes, changes, words):
    """Before anything is compiled; nothing is asked of a device."""
    config = Config(num_envs=16, batch_size=48, **changes)
    with pytest.raises(UserError, match=words):
        schemes.check(axes, config, 1)


@pytest.mark.parametrize("axes", [Axes("averaging", workers=16), Axes("sharding", workers=16)])
def test_more_devices_than_there_are_say_how_many(axes):
    with pytest.raises(UserError, match="num_devices 16 asked, but JAX has 8"):
        jaxdqn.train(Config(num_envs=16), HParams(), axes=axes)


@pytest.mark.parametrize("name", [slow("parallel_dqn"), "gorila", slow("hogwild")])
def test_a_scheme_trains_and_leaves_a_run(train, name, tmp_path):
    out = tmp_path / "run"
    flags = (*SMALL, *ON_POLICY) if name == "hogwild" else SMALL
    train("--parallel", name, "--total-steps", "3200", "--out", str(out), *flags)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["env_steps"] == 3200 and (out / "curves.png").exists()
    metrics = pd.read_parquet(out / "metrics.parquet")
    assert {"lag_mean", "lag_max", "worker_rate_min"} <= set(metrics.columns)
    loaded = jaxdqn.load(out)
    assert loaded.evaluate(episodes=2).returns.shape == (2,)
    # All windows together: every rollout and every update is in one of them.
    total = metrics.sum(numeric_only=True)
    actors = name == "parallel_dqn"
    rollouts = sum(total[f"rollouts_{worker}"] for worker in range(4)) - (0 if actors else total.extra_rollouts)
    config = loaded.config
    assert rollouts * config.num_envs * config.rollout_length == summary["env_steps"] * (4 if actors else 1)
    line = timeline(config)
    gradients = line.updates(line.total, config.updates_per_iteration)
    lags = sum(total[f"lag_{low}"] for low in LAG_BINS)
    if actors:  # a lag for each local replay, of two iterations
        assert summary["updates"] == gradients and rollouts // 2 - 4 <= lags <= rollouts // 2
    else:
        assert summary["updates"] + total.dropped + total.lost == gradients == lags


@pytest.mark.parametrize("name", ["fused", slow("lockstep_dqn"), "gorila", slow("local_sgd"), slow("sharded")])
def test_every_scheme_reports_the_bytes_it_moves(name):
    config, hparams = over(
        preset(name), Config(num_envs=16, hidden_sizes=(8,), eval_episodes=2, final_episodes=4), HParams()
    )
    options = {"devices_per_agent": 2, "num_devices": 2} if name == "fused" else {}
    axes = preset(name).axes
    config = dataclasses.replace(config, total_steps=2_048, learning_starts=512)
    result = jaxdqn.train(config, hparams, axes=axes, settings=jaxdqn.Settings(progress=False), **options)
    parameters = 4 * (4 * 8 + 8 + 8 * 2 + 2)
    moved = result.metrics.bytes_per_update
    # Data parallelism: each of two devices sends as many bytes as there are parameters, half to sum, half to spread.
    assert (moved == parameters).all() if name == "fused" else (moved > 0).all()


@pytest.mark.slow
def test_lockstep_resumes_bit_for_bit(train, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ("--parallel", "lockstep_dqn", *SMALL)
    train(*flags, "--total-steps", "8000", "--eval-interval", "4000", "--log-interval", "800", "--out", str(whole))
    train(*flags, "--total-steps", "4000", "--eval-interval", "4000", "--log-interval", "800", "--out", str(half))
    train("--resume", str(half), "--total-steps", "8000")
    one, other = (pd.read_parquet(path / "metrics.parquet").drop(columns="seconds") for path in (whole, half))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    first, second = jaxdqn.load(whole).params, jaxdqn.load(half).params
    for a, b in zip(*map(leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.slow
def test_asynchronous_runs_resume(train, tmp_path):
    out = tmp_path / "run"
    train("--parallel", "a3c", *SMALL, *ON_POLICY, "--total-steps", "6400", "--out", str(out))
    done = train("--resume", str(out), "--total-steps", "12800")
    assert "finished: 12,800 steps" in done.out


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--parallel", "a3d"), "did you mean 'a3c'"),
        (("--parallel", "parallel_dqn", "--axes.workers", "3"), "cannot be divided over 3 actors"),
        (("--parallel", "a3c", "--devices-per-agent", "2"), "belongs to the fused scheme"),
        (("--parallel", "a3c", "--replay", "uniform"), "on-policy"),
        (("--axes.workers", "2"), "choose one with --parallel"),
        (("--parallel", "gorila", "--axes.max-lag", "-1"), "max_lag"),
        (("--parallel", "a3c", "--init-from", "nowhere"), "holds no run"),
        (("--parallel", "parallel_dqn", "--axes.workers", "1000"), "each is a thread, and one learner or server"),
        (("--parallel", "a3c", "--axes.workers", "1000"), "each is a thread, and one learner or server"),
        (("--parallel", "local_sgd", "--axes.workers", "1000"), "cannot be divided over 1000"),
        (("--parallel", "sharded", "--axes.workers", "1000"), "num_devices 1000"),
    ],
)
def test_wrong_flags_end_in_one_line(train, flags, words):
    error = train(*flags, "--total-steps", "8000", code=2).err
    lines = [line for line in error.splitlines() if "they will be slow" not in line]  # true as well, and said before
    assert len(lines) == 1 and words in lines[0]
