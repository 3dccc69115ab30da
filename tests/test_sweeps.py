"""Sweeps as a whole: trials equal single runs, survivors were never interrupted, nothing finished is done twice."""

import json
import math
import shutil

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import jaxdqn
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.compiled import devices, memory
from jaxdqn.runs import checkpoints, metrics
from jaxdqn.runs.settings import Settings
from jaxdqn.sweeps import directory, engines, planning, reading, report, running, samplers
from jaxdqn.sweeps import stage as _stage

CATCH = {
    "env": "Catch-bsuite",
    "config": {
        "hidden_sizes": [16], "num_envs": 4, "batch_size": 16, "replay_capacity": 400, "learning_starts": 40,
        "total_steps": 1_600, "eval_interval": 200, "eval_episodes": 2,
    },
    "hparams": {"target_period": 20.0, "target_tau": 1.0},
    "space": {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "gamma": {"low": 0.9, "high": 1.0}},
    "sampler": {"name": "sobol", "trials": 4},
    "seeds": 3,
    "winners": {"trials": 1, "seeds": 2},
}  # fmt: skip
HALVING = {"rungs": [0.25, 0.5], "keep": 0.5}
TIMES = ["seconds"]


def sweep_of(**changes):
    return reading.parse({**CATCH, **changes})


def run_at(folder, **changes):
    return engines.Run(
        folder, **{"checkpoint_seconds": 20, "on_rows": ignore, "say": ignore, "stopping": no, **changes}
    )


def ignore(*_):
    pass


def no():
    return False


def local(stages, run):
    engines.local(stages, run, num_devices=2)


def searched(folder, sweep, engine=local, **changes):
    """The table of trials of a sweep in `folder`, new or resumed."""
    lock = directory.create(folder, sweep) if not folder.exists() else None
    assert lock is not None or directory.load(folder) == sweep
    return running.execute(sweep, engine, run_at(folder, **changes)).write()


def curves(folder, kind="tuning"):
    """All rows of a sweep's metrics, by trial, seed and step, without what depends on time and on the stages."""
    frame = pd.read_parquet(folder / "metrics.parquet")
    frame = frame[frame.kind == kind].sort_values(["trial", "seed", "env_steps"], ignore_index=True)
    return frame.drop(columns=[*TIMES, "stage", "member"])


def assert_same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True, check_like=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A sweep without early stopping: its directory and its table."""
    folder = tmp_path_factory.mktemp("plain") / "sweep"
    return folder, searched(folder, sweep_of())


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The same trials, of which half are dropped after each rung."""
    folder = tmp_path_factory.mktemp("halved") / "sweep"
    return folder, searched(folder, sweep_of(halving=HALVING))


# -- groups -----------------------------------------------------------------------------------------------------------


def test_a_sweep_over_traced_fields_is_one_population(plain):
    folder, table = plain
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["round-00-group-00", "winners-group-00"]
    assert list(table.trial) == [0, 1, 2, 3] and set(table.status) == {"finished"}
    points = samplers.sobol(2, 4, 0)
    np.testing.assert_allclose(table.learning_rate, 1e-4 * 1e3 ** points[:, 0], rtol=1e-12)
    np.testing.assert_allclose(table.gamma, 0.9 + 0.1 * points[:, 1], rtol=1e-12)


def test_a_trial_is_its_configuration_trained_alone(plain):
    folder, table = plain
    sweep = directory.load(folder)
    row = table.iloc[2]
    hparams = sweep.hparams._replace(learning_rate=row.learning_rate, gamma=row.gamma)
    alone = jaxdqn.train(sweep.config, hparams, seeds=(1,), settings=Settings(progress=False))
    inside = curves(folder).query("trial == 2 and seed == 1").reset_index(drop=True)
    columns = [name for name in alone.metrics if name not in ("seconds", "member")]
    assert_same(alone.metrics[columns], inside[columns])
    everyone = jaxdqn.load(folder / "runs" / "round-00-group-00")
    jax.tree.map(lambda one, all_: np.testing.assert_array_equal(one[0], all_[7]), alone.params, everyone.params)


def test_the_score_is_the_mean_height_of_the_curves(plain):
    folder, table = plain
    for trial, rows in curves(folder).groupby("trial"):
        heights = []
        for _, curve in rows.groupby("seed"):
            steps, returns = curve.env_steps.to_numpy(float), curve.eval_return.to_numpy(float)
            dense = np.linspace(0, 1_600, 160_001)
            heights.append(np.interp(dense, steps, returns).mean())
        assert table.score[trial] == pytest.approx(np.mean(heights), abs=1e-4)
        low, high = table.score_low[trial], table.score_high[trial]
        assert low <= table.score[trial] <= high


def test_only_fresh_seeds_make_the_result(plain):
    folder, table = plain
    best = table.score.idxmax()
    fresh = curves(folder, "final")
    assert set(fresh.seed) == {10_000, 10_001} and set(fresh.trial) == {best}
    assert table.fresh_score.notna().sum() == 1 and table.fresh_seeds[best] == 2
    assert not set(fresh.seed) & set(curves(folder).seed)


def test_static_fields_make_a_group_each_and_each_is_compiled_once(tmp_path, monkeypatch):
    sizes, built, compiled = [16, 32], [], []
    build = schemes.build
    monkeypatch.setattr(
        schemes, "build", lambda *args, **options: built.append(args[1].config) or build(*args, **options)
    )
    real = devices.compiled
    monkeypatch.setattr(devices, "compiled", lambda *args: compiled.append(args) or real(*args))
    space = {"batch_size": sizes, "learning_rate": [1e-3, 1e-2, 1e-1]}
    config = {name: value for name, value in CATCH["config"].items() if name != "batch_size"}
    config["hidden_sizes"] = [13]  # no program of another test
    sweep = sweep_of(config=config, space=space, sampler="grid", seeds=1, winners={"trials": 0})
    table = searched(tmp_path / "sweep", sweep)
    assert [config.batch_size for config in built] == sizes
    assert len(compiled) == 2 * 3  # prefill, step and evaluate of each group, whatever its trials
    assert list(table.group) == [0, 0, 0, 1, 1, 1] and list(table.batch_size) == [16] * 3 + [32] * 3
    assert planning.plan(sweep, 2).num_groups == 2


# -- halving ----------------------------------------------------------------------------------------------------------


def test_survivors_of_halving_were_never_interrupted(plain, halved):
    whole, stopped = curves(plain[0]), curves(halved[0])
    table = halved[1]
    assert list(table.status.value_counts().sort_index()) == [2, 1, 1]  # after rung 0, after rung 1, finished
    for trial, rows in stopped.groupby("trial"):
        expected = whole[(whole.trial == trial) & (whole.env_steps <= rows.env_steps.max())]
        assert_same(rows.reset_index(drop=True), expected.reset_index(drop=True))
    reached = stopped.groupby("trial").env_steps.max()
    assert sorted(reached) == [400, 400, 800, 1_600]
    assert list(reached) == list(table.env_steps)


def test_halving_ranks_by_the_curve_until_the_rung(plain, halved):
    whole = curves(plain[0])
    early = whole[whole.env_steps <= 400]
    areas = {}
    for trial, rows in early.groupby("trial"):
        by_step = rows.groupby("env_steps").eval_return.mean()  # two evaluations: 200 and 400
        areas[trial] = by_step.iloc[0] * 0.5 + (by_step.iloc[0] + by_step.iloc[1]) / 2 * 0.5
    kept = sorted(areas, key=lambda trial: -areas[trial])[:2]
    table = halved[1]
    assert set(table.trial[table["rung"] > 0]) == set(kept)
    np.testing.assert_allclose(table.first_score, [areas[trial] for trial in sorted(areas)])


def test_checkpoints_of_stages_that_were_gone_on_from_are_removed(halved):
    folder = halved[0]
    left = {path.name: len(checkpoints.listing(path / "checkpoints")) > 0 for path in (folder / "runs").iterdir()}
    assert left == {
        "round-00-group-00-rung-0": False, "round-00-group-00-rung-1": False, "round-00-group-00-rung-2": True,
        "winners-group-00": True,
    }  # fmt: skip


class Synthetic:
    """An engine that trains nothing: a trial's curve rises towards a height that its learning rate decides, noisily."""

    best = math.log(3e-3)

    def __init__(self):
        self.steps = 0

    def __call__(self, stages, run):
        for stage in stages:
            path = _stage.path_of(run.folder, stage.name)
            path.mkdir(parents=True)
            rows = []
            first = 0 if stage.continues is None else self.reached
            for member, label in enumerate(stage.labels):
                seed = stage.seeds[member % len(stage.seeds)]
                noise = np.random.default_rng([label["trial"], seed]).normal(0, 5)
                height = 100 * math.exp(-((math.log(label["learning_rate"]) - self.best) ** 2)) + noise
                for step in range(first + 200, stage.config.total_steps + 1, 200):
                    value = height * (1 - math.exp(-step / 400))
                    rows.append(
                        {
                            "member": member,
                            "seed": seed,
                            "env_steps": step,
                            "seconds": 0.0,
                            "eval_return": value,
                            **label,
                        }
                    )
            self.steps += len(rows) * 200
            metrics.append(path / "metrics.parquet", 0, 1, pa.Table.from_pylist(rows))
            (path / "summary.json").write_text(json.dumps({"status": "finished", "first_bad_update_per_member": {}}))
        self.reached = stages[0].config.total_steps


@pytest.mark.parametrize("halving, budget", [(None, 32 * 3 * 1_600), (HALVING, 32 * 3 * 1_600 * 0.5)])
def test_a_planted_optimum_is_found_and_halving_takes_half_the_steps(tmp_path, halving, budget):
    engine = Synthetic()
    sweep = sweep_of(
        space={"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}},
        sampler={"name": "sobol", "trials": 32},
        halving=halving,
        winners={"trials": 0},
    )
    table = searched(tmp_path / "sweep", sweep, engine)
    finished = table[table.status == "finished"]
    best = finished.learning_rate[finished.score.idxmax()]
    assert abs(math.log(best) - engine.best) < 0.5
    assert engine.steps <= budget


def test_a_planted_optimum_is_found_by_tpe_round_by_round(tmp_path):
    pytest.importorskip("optuna")
    space = {"learning_rate": {"low": 1e-6, "high": 1.0, "log": True}}
    sampler = {"name": "tpe", "trials": 48, "batch": 8}
    table = searched(tmp_path / "sweep", sweep_of(space=space, sampler=sampler, winners={"trials": 0}), Synthetic())
    assert list(table["round"]) == [number // 8 for number in range(48)]
    assert abs(math.log(table.learning_rate[table.score.idxmax()]) - Synthetic.best) < 0.5


# -- a population that evolves ----------------------------------------------------------------------------------------

EVOLVING = {
    "space": {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}},
    "sampler": {"name": "random", "trials": 2},
    "seeds": 2,
    "population_based": {"interval": 0.25, "quantile": 0.25},
}


@pytest.fixture(scope="module")
def evolved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evolved") / "sweep"
    return folder, searched(folder, sweep_of(**EVOLVING))


def test_a_lineage_is_reproducible(evolved, tmp_path):
    searched(tmp_path / "again", sweep_of(**EVOLVING))
    first, second = (pd.read_parquet(folder / "lineage.parquet") for folder in (evolved[0], tmp_path / "again"))
    assert_same(first, second)
    assert list(first.generation) == [generation for generation in range(4) for _ in range(4)]
    assert_same(curves(evolved[0]), curves(tmp_path / "again"))


def test_the_worst_member_takes_over_from_the_best(evolved):
    lineage = pd.read_parquet(evolved[0] / "lineage.parquet")
    for generation in range(1, 4):
        before, now = (lineage[lineage.generation == g].set_index("member") for g in (generation - 1, generation))
        copied = now[now.parent != now.index]
        assert len(copied) == 1
        order = before.score.sort_values(kind="stable")
        assert before.score[copied.index[0]] == order.iloc[0]
        assert before.score[copied.parent.iloc[0]] == order.iloc[-1]
        ratio = copied.learning_rate.iloc[0] / before.learning_rate[copied.parent.iloc[0]]
        assert any(ratio == pytest.approx(factor) for factor in (0.8, 1.25))
        kept = now[now.parent == now.index]
        np.testing.assert_array_equal(kept.learning_rate, before.learning_rate[kept.index])


def test_the_best_schedule_is_replayed_with_fresh_seeds(evolved):
    folder, table = evolved
    best = int(table.score.idxmax())
    fresh = curves(folder, "final")
    lineage = pd.read_parquet(folder / "lineage.parquet").set_index(["generation", "member"])
    member, schedule = best, []
    for generation in (3, 2, 1, 0):
        schedule.append(lineage.learning_rate[generation, member])
        member = lineage.parent[generation, member]
    used = fresh.groupby("env_steps").learning_rate.unique()
    assert set(fresh.seed) == {10_000, 10_001} and set(fresh.trial) == {best}
    assert [float(used[step][0]) for step in (1_600, 1_200, 800, 400)] == schedule
    assert table.fresh_score[best] == pytest.approx(fresh[fresh.env_steps > 1_200].eval_return.mean())


# -- stopping and going on --------------------------------------------------------------------------------------------


def test_a_sweep_that_dies_goes_on_and_does_nothing_twice(halved, tmp_path):
    """It dies at several rows of metrics, one after the other."""
    folder, expected = tmp_path / "sweep", halved[1]
    for after in (1, 4, 6):
        left = iter(range(after))

        def die(rows, left=left):
            if next(left, None) is None:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            searched(folder, sweep_of(halving=HALVING), on_rows=die, checkpoint_seconds=0)
    finished = {
        path.name: (path / "summary.json").stat().st_mtime_ns
        for path in (folder / "runs").iterdir()
        if (path / "summary.json").exists()
    }
    assert finished
    table = searched(folder, sweep_of(halving=HALVING))
    assert_same(table.drop(columns=TIMES), expected.drop(columns=TIMES))
    assert_same(curves(folder), curves(halved[0]))
    for name, when in finished.items():
        assert (folder / "runs" / name / "summary.json").stat().st_mtime_ns == when


def test_optuna_asks_the_same_after_a_stop(tmp_path):
    pytest.importorskip("optuna")
    sweep = sweep_of(sampler={"name": "tpe", "trials": 6, "batch": 2}, seeds=1, winners={"trials": 0})
    whole = searched(tmp_path / "whole", sweep)
    left = iter(range(12))

    def die(rows):
        if next(left, None) is None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        searched(tmp_path / "stopped", sweep, on_rows=die)
    assert_same(searched(tmp_path / "stopped", sweep).drop(columns=TIMES), whole.drop(columns=TIMES))


def test_asked_to_stop_it_stops_between_stages(tmp_path):
    with pytest.raises(engines.Stopped):
        searched(tmp_path / "sweep", sweep_of(), stopping=lambda: True)
    assert not list((tmp_path / "sweep" / "runs").iterdir())


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "halved", "evolved"])
def test_the_report_shows_the_fresh_score_and_every_figure(name, request):
    folder, table = request.getfixturevalue(name)
    report.write(folder, directory.load(folder))
    lines = report.winner_lines(directory.load(folder), table)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    fresh = table.fresh_score.dropna().iloc[0]
    assert f"{fresh:.2f}" in lines[0] and f"{fresh:.2f}" in text and "fresh seeds" in text
    drawn = sorted(path.stem for path in (folder / "figures").iterdir())
    assert "winners" in drawn and "response-learning_rate" in drawn
    assert ("lineage" in drawn) == (name == "evolved")
    assert all(f"figures/{figure}.png" in text for figure in drawn) and page.count("data:image/png") == len(drawn)


def test_the_report_says_members_settings_and_seeds_of_a_population(evolved):
    report.write(evolved[0], directory.load(evolved[0]))
    text = (evolved[0] / "report.md").read_text()
    assert "best of 4 members" in text and "2 settings (random, seed 0), seeds 0 to 1 each" in text
    assert text.count("return in the last generation, fresh seeds") == 1 and "return at the end" not in text


def test_the_report_shows_only_values_in_use(tmp_path):
    space = {
        "optimizer": ["adam", "adamw"],
        "weight_decay": {"choices": [1e-3, 1e-1], "when": {"optimizer": "adamw"}},
        "learning_rate": [1e-3, 1e-2],
    }
    sweep = sweep_of(space=space, sampler="grid", seeds=1, winners={"trials": 6, "seeds": 1})
    table = searched(tmp_path / "sweep", sweep)
    used = report.in_use(sweep, table, "weight_decay")
    assert list(used) == list(table.optimizer == "adamw") and used.sum() == 4
    assert report.in_use(sweep, table, "optimizer").all()
    report.write(tmp_path / "sweep", sweep)
    rows = [line for line in (tmp_path / "sweep" / "report.md").read_text().splitlines() if "| adam |" in line]
    assert rows and all("| adam | – |" in row for row in rows)
    lines = report.winner_lines(sweep, table)
    assert [("weight_decay" in line) == ("optimizer=adamw" in line) for line in lines] == [True] * 6


def test_trials_that_got_further_stand_above_those_with_better_short_curves(halved):
    report.write(halved[0], directory.load(halved[0]))
    tuning = (halved[0] / "report.md").read_text().split("in tuning")[1].split("## How")[0]
    rows = [line for line in tuning.splitlines() if line.startswith("| ") and "trial" not in line]
    steps = [int(row.split("|")[-3].replace(",", "")) for row in rows]
    assert steps == [1_600, 800, 400, 400]


def test_one_seed_has_no_interval(tmp_path):
    sweep = sweep_of(space={"learning_rate": [1e-3, 1e-2]}, sampler="grid", seeds=1, winners={"trials": 1, "seeds": 1})
    table = searched(tmp_path / "sweep", sweep, Synthetic())
    assert table.score_low.isna().all() and table.score.notna().all()


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_sweep_that_was_moved_goes_on_where_it_is(halved, tmp_path):
    """The stage in the midst of which it was stopped goes on from another."""

    def die(rows):
        if rows[0]["stage"].endswith("rung-1"):
            raise ZeroDivisionError

    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    with pytest.raises(ZeroDivisionError):
        searched(old, sweep_of(halving=HALVING), on_rows=die)
    new.parent.mkdir()
    old.rename(new)
    assert (new / "runs" / "round-00-group-00-rung-1" / "config.yaml").exists()
    assert_same(searched(new, sweep_of(halving=HALVING)).drop(columns=TIMES), halved[1].drop(columns=TIMES))


@pytest.fixture
def copied(halved, tmp_path):
    """The finished sweep with halving, to be damaged."""
    return shutil.copytree(halved[0], tmp_path / "copied")


def test_damaged_copies_are_made_again(copied, halved):
    part = copied / "metrics.parquet" / "round-00-group-00-rung-1.parquet"
    part.write_bytes(part.read_bytes()[:100])
    (copied / "trials.parquet").write_text("junk")
    searched(copied, sweep_of(halving=HALVING))
    assert_same(curves(copied), curves(halved[0]))
    assert_same(pd.read_parquet(copied / "trials.parquet"), halved[1])


def test_damaged_metrics_of_a_stage_are_one_line_that_says_what_to_do(copied, halved):
    run = copied / "runs" / "winners-group-00"
    part = next(run.glob("metrics.parquet/part-*"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is damaged.* move .*winners-group-00 away to have that run tr") as error:
        searched(copied, sweep_of(halving=HALVING))
    assert "\n" not in str(error.value)
    shutil.rmtree(run)
    assert_same(searched(copied, sweep_of(halving=HALVING)).drop(columns=TIMES), halved[1].drop(columns=TIMES))


def test_a_removed_stage_whose_origin_is_pruned_says_what_to_remove_with_it(copied, halved):
    for name in ("rung-2", "rung-1", "rung-0"):
        if name != "rung-2":
            with pytest.raises(UserError, match=rf"round-00-group-00-{name} cannot be continued from.* move "):
                searched(copied, sweep_of(halving=HALVING))
        for later in ("rung-2", "rung-1", "rung-0")[: ("rung-2", "rung-1", "rung-0").index(name) + 1]:
            shutil.rmtree(copied / "runs" / f"round-00-group-00-{later}", ignore_errors=True)
    assert_same(searched(copied, sweep_of(halving=HALVING)).drop(columns=TIMES), halved[1].drop(columns=TIMES))


def diverging(rates, **changes):
    return sweep_of(space={"learning_rate": rates}, sampler="grid", **{"winners": {"trials": 0}, **changes})


@pytest.mark.parametrize("halving", [None, HALVING])
def test_a_diverging_trial_has_the_same_score_whoever_else_diverges(tmp_path, halving):
    one = searched(tmp_path / "one", diverging([1e30, 1e-3], halving=halving))
    all_ = searched(tmp_path / "all", diverging([1e30, 1e31], halving=halving))
    assert list(one.diverged) == [3, 0] and list(all_.diverged) == [3, 3]
    assert all_.score.notna().all() and set(all_.status) == set(one.status)
    assert all_.first_score[0] == one.first_score[0]
    assert all_.env_steps.max() == one.env_steps.max() == 1_600


def test_a_population_of_which_all_diverge_evolves_to_its_end(tmp_path):
    space = {"learning_rate": {"low": 1e29, "high": 1e30, "log": True}}
    table = searched(tmp_path / "sweep", sweep_of(**{**EVOLVING, "space": space}))
    assert list(table.diverged) == [1] * 4 and table.score.notna().all() and table.fresh_diverged.dropna().iloc[0] == 2
    assert set(curves(tmp_path / "sweep").env_steps) == set(range(200, 1_601, 200))


def test_batches_of_which_one_diverges_go_on_together(tmp_path, monkeypatch):
    """Each batch of a stage must end at the same iteration, or the next stage has nothing to go on from."""
    real = memory.plan
    monkeypatch.setattr(memory, "plan", lambda *args: real(*args)._replace(members_per_batch=3, num_batches=2))
    table = searched(tmp_path / "sweep", diverging([1e-3, 1e30], halving={"rungs": [0.25], "keep": 0.6}))
    assert list(table.env_steps) == [1_600, 1_600] and list(table.diverged) == [0, 3]


def test_every_diverging_member_is_warned_of_once(tmp_path, capfd):
    searched(tmp_path / "sweep", diverging([1e30, 1e31], halving=HALVING))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "not finite" in line]
    assert "member 0 (seed 0, learning_rate 1e+30) and 5 more" in line


def test_a_sweep_that_is_done_says_so_and_trains_nothing(halved, tmp_path, capsys):
    folder = shutil.copytree(halved[0], tmp_path / "done")
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    table = running.resume(folder, num_devices=2)
    assert "every stage had been trained before" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same(table, halved[1])
