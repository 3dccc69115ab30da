"""Runs whose members go on from another run: survivors as if never interrupted, and learners that were copied."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest
from cases import slow

import jaxdqn
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import population
from jaxdqn.runs import checkpoints, experiment
from jaxdqn.runs.directory import Continuation
from jaxdqn.runs.session import Session
from jaxdqn.runs.settings import Settings

SMALL = Config(
    env="Catch-bsuite",
    hidden_sizes=(16,),
    num_envs=4,
    batch_size=16,
    replay_capacity=400,
    learning_starts=40,
    total_steps=800,
    log_interval=200,
    eval_interval=400,
    eval_episodes=2,
    final_episodes=4,
)
LONGER = dataclasses.replace(SMALL, total_steps=1_600)
RATES = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
QUIET = Settings(progress=False, tensorboard=False)
TIMES = ["seconds", "member"]


def train(config, **options):
    return jaxdqn.train(config, HParams(target_period=20), settings=QUIET, **options)


def assert_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module", params=[slow(1), 3], ids=["one-by-one", "vmapped"])
def halves(request, tmp_path_factory):
    """A run of three rates and two seeds to the end, and the first half of it; members in programs of some width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "fastest_width", lambda platform, lanes: 1 if request.param == 1 else lanes)
        whole = train(LONGER, vary=RATES, seeds=(5, 6), num_devices=2)
        path = tmp_path_factory.mktemp("halves") / "first"
        train(SMALL, vary=RATES, seeds=(5, 6), num_devices=2, out=path)
        yield whole, path


def test_survivors_go_on_as_if_never_interrupted(halves, tmp_path):
    whole, first = halves
    kept = (2, 3, 4, 5)  # the last two rates, both seeds
    origin = Continuation(str(first), kept, kept)
    out = tmp_path / "second"
    result = train(LONGER, vary=RATES[1:], seeds=(5, 6), num_devices=2, out=out, continues=origin, least_lanes=3)
    assert_trees(result.params, jax.tree.map(lambda x: x[np.array(kept)], whole.params))
    expected = whole.metrics[whole.metrics.member.isin(kept) & (whole.metrics.env_steps > 800)].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        result.metrics.drop(columns=TIMES), expected.drop(columns=TIMES), check_exact=True, check_like=True
    )
    assert result.metrics.seconds.min() > pd.read_parquet(first / "metrics.parquet").seconds.max()
    assert_trees(jaxdqn.load(out).params, result.params)


def test_a_continuation_resumes_before_and_after_its_first_checkpoint(halves, tmp_path):
    whole, first = halves
    origin = Continuation(str(first), tuple(range(6)), tuple(range(6)))
    train(LONGER, vary=RATES, seeds=(5, 6), num_devices=2, continues=origin, out=tmp_path / "run")
    for checkpoint in checkpoints.listing(tmp_path / "run" / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
        checkpoint.rename(checkpoint.with_name(f".writing-{checkpoint.name}"))
    (tmp_path / "run" / "summary.json").unlink()  # a run that was killed so early has none
    resumed = jaxdqn.resume(tmp_path / "run", settings=QUIET)
    assert_trees(resumed.params, whole.params)
    assert list(resumed.metrics.env_steps.unique()) == [1_000, 1_200, 1_400, 1_600]


def test_learners_are_copied_whole_and_the_rest_stays(halves, tmp_path):
    _, first = halves
    parents = (0, 0, 4, 3, 4, 0)
    origin = Continuation(str(first), tuple(range(6)), parents)
    still = [{"learning_rate": 0.0}] * 3
    result = train(LONGER, vary=still, seeds=(5, 6), num_devices=2, out=tmp_path / "run", continues=origin)
    before, after = (checkpoints.newest(path / "checkpoints")[0].arrays for path in (first, tmp_path / "run"))
    assert_trees(result.params, jax.tree.map(lambda x: x[np.array(parents)], jaxdqn.load(first).params))
    updates = before["state/learner/updates"][list(parents)]
    assert (after["state/learner/updates"] == updates + 200).all()
    np.testing.assert_array_equal(after["state/key"], before["state/key"])


def test_a_run_without_its_last_checkpoint_cannot_be_continued(tmp_path):
    train(SMALL, out=tmp_path / "run")
    (newest,) = checkpoints.listing(tmp_path / "run" / "checkpoints")
    (newest / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be continued from"):
        train(LONGER, continues=Continuation(str(tmp_path / "run"), (0,), (0,)))


def test_labels_and_lists_of_settings_are_columns(tmp_path):
    settings = [{"learning_rate": 1e-3}, {"gamma": 0.9}]
    labels = [{"trial": trial, "note": note} for trial, note in ((7, "a"), (7, "a"), (9, "b"), (9, "b"))]
    result = train(SMALL, vary=settings, seeds=(1, 2), labels=labels, out=tmp_path / "run")
    firsts = result.metrics.groupby("member").first()
    assert list(firsts.trial) == [7, 7, 9, 9] and list(firsts.note) == ["a", "a", "b", "b"]
    np.testing.assert_allclose(firsts.learning_rate, [1e-3, 1e-3, HParams().learning_rate, HParams().learning_rate])
    np.testing.assert_allclose(firsts.gamma, [0.99, 0.99, 0.9, 0.9])
    assert_trees(jaxdqn.resume(tmp_path / "run", settings=QUIET).params, result.params)


def test_a_run_in_batches_that_is_extended_and_killed_has_each_row_once(tmp_path, monkeypatch):
    """The first batch has a checkpoint of the extension, the second none: their rows are dropped apart."""
    from jaxdqn.parallel.compiled import memory

    real = memory.plan
    monkeypatch.setattr(memory, "plan", lambda *args: real(*args)._replace(members_per_batch=1, num_batches=2))
    whole = train(LONGER, seeds=(5, 6), num_devices=1)
    out = tmp_path / "run"
    train(SMALL, seeds=(5, 6), num_devices=1, out=out)

    def die_late_in_the_first_batch(rows):
        if rows[0]["env_steps"] == 1_400:
            raise ZeroDivisionError

    stopped = QUIET._replace(checkpoint_seconds=0, on_chunk=die_late_in_the_first_batch)
    with pytest.raises(ZeroDivisionError):
        jaxdqn.resume(out, total_steps=1_600, settings=stopped)
    resumed = jaxdqn.resume(out, total_steps=1_600, settings=QUIET)
    assert_trees(resumed.params, whole.params)
    columns = [name for name in whole.metrics if name not in TIMES]
    pd.testing.assert_frame_equal(resumed.metrics[columns], whole.metrics[columns], check_exact=True)


def test_members_that_go_on_have_the_seeds_that_their_labels_say():
    """Population-based training takes one seed for all: each member must be evaluated with the dice of its own."""
    spec, components, budget = experiment.plan(SMALL, HParams(), (5,), [{"gamma": 0.9}, {"gamma": 0.9}], 1, 1)
    spec = dataclasses.replace(spec, labels=({"trial": 0, "seed": 7}, {"trial": 1}))
    assert [seed for seed, _ in Session(spec, components, budget, QUIET).population.everyone] == [7, 5]
