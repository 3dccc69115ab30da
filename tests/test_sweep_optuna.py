"""Optuna's samplers, asked a round at a time: they find what is planted, and a resumed sweep asks for the same."""

import logging
import math
import os
import sys

import numpy as np
import pytest

from jaxdqn.errors import UserError
from jaxdqn.sweeps import samplers, space
from jaxdqn.sweeps.sweep import Sampler

optuna = pytest.importorskip("optuna")
RANGES = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "gamma": {"low": 0.9, "high": 0.999}}
PLANTED = space.parse({**RANGES, "target_tau": [0.01, 0.1, 1.0]})
CONTINUOUS = space.parse(RANGES)


def score(values):
    """Best, with 0, at a learning rate of 1e-3, gamma .98 and tau .1."""
    distance = (math.log10(values["learning_rate"]) + 3) ** 2 + ((values["gamma"] - 0.98) / 0.02) ** 2
    return -distance - (values.get("target_tau", 0.1) != 0.1)


def search(searched, sampler, scored=score, rounds=None):
    history = []
    for index in range(10**6 if rounds is None else rounds):
        values = samplers.next_round(searched, sampler, index, history)
        if not values:
            return history
        history += [(value, scored(value)) for value in values]
    return history


def late(history):
    """The mean score of the last quarter: where a sampler that learns has come to."""
    return np.mean([value for _, value in history[-len(history) // 4 :]])


# -- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, searched",
    [("tpe", PLANTED), ("nsga2", PLANTED), ("cmaes", CONTINUOUS)],
)
def test_a_sampler_that_learns_comes_near_the_planted_optimum_and_random_does_not(name, searched):
    if name == "cmaes":
        pytest.importorskip("cmaes")
    learning = [search(searched, Sampler(name, 64, seed)) for seed in range(5)]
    random = [search(searched, Sampler("random", 64, seed)) for seed in range(5)]
    assert [len(history) for history in learning] == [64] * 5
    assert max(map(late, random)) < min(map(late, learning))


def test_tpe_finds_the_planted_optimum_within_64_trials():
    for seed in range(5):
        values, best = max(search(PLANTED, Sampler("tpe", 64, seed)), key=lambda scored: scored[1])
        assert values["target_tau"] == 0.1 and best > -0.1  # a third of a decade, or .006 of gamma
    best = [max(value for _, value in search(PLANTED, Sampler("random", 64, seed))) for seed in range(5)]
    assert np.median(best) < -0.1


def test_tpe_learns_from_an_integer_range_and_static_choices():
    searched = space.parse({"batch_size": {"low": 16, "high": 512, "log": True}, "hidden_sizes": [[64], [64, 64], [8]]})

    def scored(values):
        return -abs(math.log2(values["batch_size"] / 128)) - (values["hidden_sizes"] != (64, 64))

    history = search(searched, Sampler("tpe", 48, 1), scored)
    assert all(isinstance(values["batch_size"], int) and 16 <= values["batch_size"] <= 512 for values, _ in history)
    assert {values["hidden_sizes"] for values, _ in history} == {(64,), (64, 64), (8,)}
    assert max(value for _, value in history) > -0.2


CONDITIONAL = space.parse(
    {"agent": ["dqn", "a2c"], "value_weight": {"low": 0.1, "high": 1, "when": {"agent": "a2c"}}, "gamma": [0.9, 0.99]}
)


def conditional_score(values):
    return 1 - 4 * (values["value_weight"] - 0.3) ** 2 if values["agent"] == "a2c" else 0.0


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_field_under_a_condition_is_searched_where_it_holds(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "handlers", [caplog.handler])
    history = search(CONDITIONAL, Sampler(name, 64, 0), conditional_score)
    assert all(("value_weight" in values) == (values["agent"] == "a2c") for values, _ in history)
    chosen = [values["agent"] for values, _ in history]
    assert chosen[-16:].count("a2c") >= 10 and "dqn" in chosen
    assert not caplog.records  # Optuna warns of what it draws at random


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials, batch, sizes", [(20, 8, [8, 8, 4, 0]), (3, 8, [3, 0]), (8, 8, [8, 0])])
def test_rounds_add_up_to_the_trials(trials, batch, sizes):
    sampler, history, found = Sampler("tpe", trials, 0, batch), [], []
    for index in range(len(sizes)):
        values = samplers.next_round(PLANTED, sampler, index, history)
        history += [(value, score(value)) for value in values]
        found.append(len(values))
    assert found == sizes


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
@pytest.mark.parametrize("round_", [0, 1, 3])
def test_a_round_follows_from_seed_number_and_history(name, round_):
    history = search(PLANTED, Sampler(name, 64, 5), rounds=round_)
    one, again = (samplers.next_round(PLANTED, Sampler(name, 64, 5), round_, list(history)) for _ in range(2))
    assert one == again
    np.random.seed(3)  # what other code does to global generators is no matter
    assert samplers.next_round(PLANTED, Sampler(name, 64, 5), round_, history) == one
    if not history:
        assert samplers.next_round(PLANTED, Sampler(name, 64, 6), 0, []) != one


def test_other_scores_or_another_number_lead_to_other_trials():
    history = search(PLANTED, Sampler("tpe", 64, 5), rounds=3)
    one = samplers.next_round(PLANTED, Sampler("tpe", 64, 5), 3, history)
    assert one != samplers.next_round(PLANTED, Sampler("tpe", 64, 5), 4, history)
    assert one != samplers.next_round(PLANTED, Sampler("tpe", 64, 5), 3, [(values, -x) for values, x in history])


def test_a_sampler_with_a_state_refuses_a_history_that_is_not_its_own():
    history = search(PLANTED, Sampler("nsga2", 64, 5), rounds=2)
    with pytest.raises(UserError, match="does not ask for the sweep's earlier trials: was it begun with another"):
        samplers.next_round(PLANTED, Sampler("nsga2", 64, 6), 2, history)


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_trials_without_a_score_are_no_obstacle(name, broken):
    def scored(values):
        return broken if values["learning_rate"] > 1e-2 else score(values)

    history = search(PLANTED, Sampler(name, 64, 2), scored)
    finite = [value for _, value in history if math.isfinite(value)]
    assert len(history) == 64 and 0 < len(finite) < 64 and max(finite) > -1
    assert len(search(PLANTED, Sampler(name, 24, 2), lambda values: broken)) == 24


# -- packages that are missing ----------------------------------------------------------------------------------------


def test_without_optuna_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for call in (lambda: search(PLANTED, Sampler("tpe", 8)), lambda: record("journal:x", [], ".")):
        with pytest.raises(
            UserError, match=r'^this sampler needs the optuna package: pip install "jaxdqn\[optuna\]"\.$'
        ):
            call()


@pytest.mark.parametrize("name, package", [("cmaes", "cmaes"), ("gp", "torch")])
def test_without_a_samplers_own_package_the_line_names_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^sampler '{name}' needs the {package} package: pip install {package}\.$"):
        search(CONTINUOUS, Sampler(name, 8))  # not only when the startup trials are over


# -- storage ----------------------------------------------------------------------------------------------------------


def record(storage, history, folder, searched=PLANTED):
    samplers.store(searched, Sampler("tpe", 64, 0, 8, storage), "study", history, str(folder))


def stored(storage, folder):
    """What Optuna itself, started anew, finds in the file."""
    kind, _, name = storage.partition(":")
    path = os.path.join(folder, name.removeprefix("///"))
    if kind == "journal":
        backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    else:
        backend = f"sqlite:///{path}"
    return optuna.load_study(study_name="study", storage=backend)


@pytest.mark.parametrize("storage", ["sqlite:///trials.db", "journal:trials.log"])
def test_a_storage_has_every_trial_once_however_often_it_is_recorded(tmp_path, storage):
    history = search(PLANTED, Sampler("tpe", 24, 0))
    history[3] = (history[3][0], math.nan)
    record(storage, [], tmp_path)
    record(storage, history[:8], tmp_path)
    record(storage, history, tmp_path)
    record(storage, history, tmp_path)
    study = stored(storage, tmp_path)
    assert os.listdir(tmp_path)[0].startswith("trials.")
    assert len(study.trials) == 24
    for trial, (values, value) in zip(study.trials, history, strict=True):
        assert trial.params == values
        assert trial.state.name == ("FAIL" if math.isnan(value) else "COMPLETE")
        assert trial.value == (None if math.isnan(value) else value)
    assert study.best_params == max(history, key=lambda scored: np.nan_to_num(scored[1], nan=-math.inf))[0]


@pytest.mark.parametrize("storage", ["sqlite:///trials.db", "journal:trials.log"])
def test_a_storage_takes_conditions_widths_and_infinity(tmp_path, storage):
    searched = space.parse(
        {
            "hidden_sizes": [[64, 64], [8]],
            "max_grad_norm": [10, math.inf],
            "gamma": {"low": 0.9, "high": 1},
            "target_tau": {"choices": [0.1, 1], "when": {"max_grad_norm": math.inf}},
        }
    )
    history = search(searched, Sampler("tpe", 16, 0), lambda values: values["gamma"])
    record(storage, history, tmp_path, searched)
    for trial, (values, _) in zip(stored(storage, tmp_path).trials, history, strict=True):
        assert trial.params == {**values, "hidden_sizes": str(values["hidden_sizes"])}


@pytest.mark.parametrize("storage", ["sqlite:///no/such/folder/trials.db", "journal:no/such/folder/trials.log"])
def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path, storage):
    with pytest.raises(UserError) as caught:
        record(storage, [], tmp_path)
    assert str(caught.value).startswith(f"sampler.storage '{storage}' cannot be used: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_storage_is_one_line(tmp_path):
    (tmp_path / "trials.db").write_text("no database " * 100)
    with pytest.raises(UserError, match=r"sampler.storage 'sqlite:///trials.db' cannot be used: ") as caught:
        record("sqlite:///trials.db", [], tmp_path)
    assert "\n" not in str(caught.value)
