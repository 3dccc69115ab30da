"""Every number of a script and of `jaxdqn.train`: what cannot be meant is refused in one line, before work starts."""

import dataclasses
import math
import pathlib
import subprocess
import typing

import numpy as np
import pytest
from scripts import script

import jaxdqn
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.runs import cli, directory, experiment
from jaxdqn.runs.settings import Settings

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
NAMES = ("train", "sweep", "compare_agents", "compare_parallel", "evaluate", "export", "tabular")
ZERO = {"seed", "member", "init_member", "tensorboard_members", "learning_starts", "final_episodes"}
NEGATIVE = {"stop_at_return", "threshold"}
INFINITE = {"stop_at_return", "max_minutes", "checkpoint_seconds", "threshold"}
PROBABILITY = {"epsilon"}
MANY = {"num_devices", "tensorboard_members"}  # there are fewer: the backend says so, and that all members are meant
# Checked where processes meet, by the session, and with the MDP.
ELSEWHERE = {"process_id", "num_processes", "init_member", "gamma", "omega"}


class Started(Exception):
    """The checks let the arguments pass."""


def start(*_, **__):
    raise Started


@pytest.fixture(scope="module")
def scripts():
    return {name: script(name) for name in NAMES}


def numeric_fields(kind):
    """(field, whether it is whole) of the numbers among a dataclass's fields."""
    for field, hint in typing.get_type_hints(kind).items():
        options = set(typing.get_args(hint)) or {hint}
        if options & {int, float} and field not in ELSEWHERE:
            yield field, int in options


def odd_values(field, whole):
    """(value, whether it must be refused); flags themselves make them of their type."""
    yield -1, field not in NEGATIVE
    yield 0, whole and field not in ZERO
    yield 10**18, (whole and field not in MANY) or field in PROBABILITY
    if not whole:
        yield from ((math.nan, True), (math.inf, field not in INFINITE), (-math.inf, field not in NEGATIVE))


def a_run(folder):
    spec, _, _ = experiment.plan(Config(), HParams(), (0,), None, 1, 1)
    (folder / "run").mkdir()
    directory.RunDirectory(folder / "run").write_config(spec, {})
    return "run"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_script_is_checked_before_it_starts(scripts, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    given = []
    if name in ("evaluate", "export"):
        given = [a_run(tmp_path)]
    if name == "sweep":
        (tmp_path / "s.yaml").write_text("space: {gamma: [0.9]}\nsampler: grid\nseeds: 1\n")
        given = ["s.yaml"]
    monkeypatch.setattr(cli, "prepare_backend", start)
    monkeypatch.setattr(subprocess, "run", start)
    before, parse, read = sorted(tmp_path.rglob("*")), cli.parse, []

    def changed(*args):
        """What tyro made of the flags, with the number that it would have made of another."""
        if args[0] is not scripts[name].Args:  # compare_parallel asks train
            return parse(*args)
        if not read:
            read.append(parse(*args))
        return dataclasses.replace(read[0], **change)

    monkeypatch.setattr(cli, "parse", changed)
    for field, whole in numeric_fields(scripts[name].Args):
        for value, wrong in odd_values(field, whole):
            change = {field: value}
            try:
                scripts[name].run(given)
            except UserError as error:
                assert "\n" not in str(error), (field, value)
            except Started:
                assert not wrong, (field, value)
            else:
                raise AssertionError((field, value))
    assert sorted(tmp_path.rglob("*")) == before


ODD = (-1, 0, 1.5, math.nan, math.inf, "2", [1], None, True, 10**30, 10**5000, np.float32("nan"))


@pytest.mark.parametrize("name", ["num_devices", "devices_per_agent"])
def test_devices_of_a_plan_are_whole_numbers_above_0(name):
    for value in ODD:
        if not (name == "num_devices" and value is None):
            with pytest.raises(UserError, match=name):
                experiment.plan(
                    Config(), HParams(), (0,), None, **{"num_devices": 1, "devices_per_agent": 1, name: value}
                )


def test_settings_are_numbers_of_their_range(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "plan", start)
    fine = {"max_seconds": (0, None, math.inf, np.int64(3)), "stop_at_return": (-1.5, None), "checkpoint_seconds": (0,)}
    for name, values in fine.items():
        for value in values:
            with pytest.raises(Started):
                jaxdqn.train(settings=Settings(**{name: value}))
    for name in ("max_seconds", "stop_at_return", "checkpoint_seconds", "tensorboard_members", "init_member"):
        for value in ("2", [1], math.nan, True, *(() if name == "stop_at_return" else (-1,))):
            with pytest.raises(UserError, match=f"{name} is"):
                jaxdqn.train(settings=Settings(**{name: value}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config", "hparams", "axes", "settings"])
def test_a_record_is_asked_for_where_something_else_is_given(name):
    for value in ({}, {"env": "CartPole-v1"}, "CartPole-v1", 3, ()):
        with pytest.raises(UserError, match=f"{name} is .*; it must be"):
            jaxdqn.train(**{name: value})
