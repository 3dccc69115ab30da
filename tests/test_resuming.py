"""Resuming looks before it touches: nothing that is there is lost, and no flag is passed over."""

import contextlib
import dataclasses
import json
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
import yaml
from cases import slow
from scripts import script

import jaxdqn
from jaxdqn import agents
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import devices
from jaxdqn.runs import checkpoints, cli, experiment, metrics
from jaxdqn.runs.progress import Progress, tell
from jaxdqn.runs.recording import first_of_shards
from jaxdqn.runs.settings import INTERRUPTED, OK, Settings
from jaxdqn.runs.signals import catch_signals

ROOT = pathlib.Path(jaxdqn.__file__).parents[1]
TINY = Config(
    env="Catch-bsuite", num_envs=4, batch_size=8, hidden_sizes=(4,), replay_capacity=80, learning_starts=16,
    total_steps=160, log_interval=40, eval_interval=160, eval_episodes=1,
)  # fmt: skip
QUIET = Settings(progress=False, tensorboard=False, figure=False)
FLUSHED = QUIET._replace(checkpoint_seconds=0.0)  # a checkpoint and a part at every logging point


train_script, evaluate_script = script("train"), script("evaluate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    return experiment.train(TINY, out=path, seeds=(0, 1), num_devices=1, settings=FLUSHED)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return tmp_path / "run"


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# -- what is missing or damaged ---------------------------------------------------------------------------------------


def no_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def empty_checkpoints(run):
    no_checkpoints(run)
    (run / "checkpoints").mkdir()


def no_checkpoints_of_a_killed_run(run):
    no_checkpoints(run)
    (run / "summary.json").unlink()


def damaged_checkpoints(run):
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")


def parts(run):
    return metrics.parts(run / "metrics.parquet")


def no_metrics(run):
    shutil.rmtree(run / "metrics.parquet")


def no_first_part(run):
    parts(run)[0].unlink()


def no_part_between(run):
    parts(run)[1].unlink()


def no_last_part(run):
    parts(run)[-1].unlink()


def truncated_part(run):
    part = parts(run)[1]
    part.write_bytes(part.read_bytes()[:-20])


def pipe_for_a_part(run):
    part = parts(run)[1]
    part.unlink()
    os.mkfifo(part)


def checkpoint_of_something_else(run):
    """Its checksums are right, and orbax cannot read it."""
    newest = checkpoints.listing(run / "checkpoints")[-1]
    shutil.rmtree(newest / "state")
    (newest / "state").mkdir()
    (newest / "state" / "_METADATA").write_text("[]")
    (newest / "manifest.json").unlink()
    (newest / "manifest.json").write_text(json.dumps(checkpoints._checksums(newest)))


def checkpoints_are_a_file(run):
    no_checkpoints(run)
    (run / "checkpoints").write_text("")


@pytest.mark.parametrize(
    "damage, words",
    [
        (no_checkpoints, "no checkpoint to go on from"),
        (empty_checkpoints, "no checkpoint to go on from"),
        (no_checkpoints_of_a_killed_run, "no checkpoint to go on from"),
        (damaged_checkpoints, "every checkpoint .* is damaged"),
        (checkpoints_are_a_file, "cannot read the checkpoints"),
        (no_metrics, "lacks the rows of iterations 1 to 40"),
        (no_first_part, "lacks the rows of iterations 1 to 19"),
        (no_part_between, "lacks the rows of iterations 11 to 29"),
        (no_last_part, "lacks the rows of iterations 31 to 40"),
        (truncated_part, "is damaged"),
        (pipe_for_a_part, "is damaged"),
        (checkpoint_of_something_else, "the checkpoint .* cannot be read"),
    ],
)
def test_what_is_missing_or_damaged_is_refused_before_anything_changes(run, monkeypatch, damage, words):
    damage(run)
    before = contents(run)
    monkeypatch.setattr("jaxdqn.parallel.schemes.build", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match=words) as caught:
        experiment.resume(run, total_steps=240, settings=QUIET)
    assert contents(run) == before
    assert "\n" not in str(caught.value) and "remove" not in str(caught.value)


def test_nothing_changes_before_a_session_is_certain_to_train(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    shutil.rmtree(max(run.glob("checkpoints/*")))  # rows of the last logging point are after the checkpoint
    before = contents(run)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("jaxdqn.parallel.schemes.build", fail)
        experiment.resume(run, settings=QUIET)
    assert contents(run) == before


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over_for_an_older_one(run, monkeypatch):
    newest = checkpoints.listing(run / "checkpoints")[-1]
    allowed = os.access

    def access(path, mode):
        return newest not in pathlib.Path(path).parents and allowed(path, mode)

    monkeypatch.setattr(os, "access", access)
    before = contents(run)
    with pytest.raises(UserError, match=r"cannot read .*no permission"):
        experiment.resume(run, total_steps=240, settings=QUIET)
    assert contents(run) == before


def edited(run, name, **changes):
    values = yaml.safe_load((run / name).read_text()) | changes
    (run / name).write_text(yaml.safe_dump(values) if name.endswith("yaml") else json.dumps(values))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": [1]}, "init_from is"),
        ({"init_from": "x", "init_member": -1}, "init_member is -1"),
        ({"labels": [{"seed": "abc"}, {}]}, "seed of a label is 'abc'"),
    ],
)
def test_a_configuration_that_no_run_has_is_one_line(run, changes, words):
    edited(run, "config.yaml", **changes)
    with pytest.raises(UserError, match=words):
        experiment.resume(run, total_steps=240, settings=QUIET)


def test_a_summary_that_was_spoilt_is_written_again(run, finished):
    (run / "summary.json").write_text('{"status": "finished"}')
    assert experiment.resume(run, settings=QUIET).summary["final_returns"] == finished.summary["final_returns"]
    with pytest.raises(UserError, match="for asynchronous presets"):
        experiment.resume(run, settings=QUIET._replace(engine="ray"))


def test_a_picture_that_cannot_be_written_costs_no_result(run, capsys):
    (run / "curves.png").unlink(missing_ok=True)
    (run / "curves.png").mkdir()
    result = experiment.resume(run, total_steps=240, settings=QUIET._replace(figure=True))
    assert result.summary["status"] == OK and "warning: no curves: cannot write" in capsys.readouterr().err


def test_the_first_bad_update_is_that_of_any_shard():
    first_bad = np.array([[-1, -1], [-1, 7], [9, 7], [5, -1]])
    assert first_of_shards(range(10, 14), first_bad) == {11: 7, 12: 7, 13: 5}


def test_parameters_need_no_metrics(run, finished):
    no_metrics(run)
    loaded = jaxdqn.load(run)
    np.testing.assert_array_equal(loaded.evaluate(2).returns, finished.evaluate(2).returns)
    assert loaded.metrics.empty
    shutil.copytree(finished.path / "metrics.parquet", run / "metrics.parquet")
    truncated_part(run)
    loaded = jaxdqn.load(run)
    with pytest.raises(UserError, match="is damaged"):
        print(loaded.metrics)


def test_an_environment_whose_state_has_an_array_without_elements_is_saved_and_resumed(tmp_path):
    def with_nothing():
        plain = probe_environments.discount()

        def reset(key):
            state, observation = plain.reset(key)
            return (state, jnp.zeros((0, 3))), observation

        def step(key, state, action):
            after, seen = plain.step(key, state[0], action)
            return (after, state[1]), seen

        return plain._replace(reset=reset, step=step)

    jaxdqn.register("with-nothing", with_nothing)
    config = dataclasses.replace(TINY, env="with-nothing")
    whole = experiment.train(config, num_devices=1, settings=QUIET)
    half = experiment.train(config, out=tmp_path / "run", num_devices=1, settings=QUIET._replace(max_seconds=0.0))
    assert half.summary["status"] == "out of time"
    resumed = experiment.resume(tmp_path / "run", settings=QUIET)
    assert resumed.summary["status"] == "finished"
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


# -- flags ------------------------------------------------------------------------------------------------------------


FLAGS = cli._types(train_script.Args(*agents.complete(Config(), HParams()), schemes.complete(jaxdqn.Axes())))
OTHER = {int: "7", float: "0.625", str: "other", bool: None, pathlib.Path: "other"}


def asked(flag):
    """`flag` with a value that is not the saved one."""
    name, hint = flag[2:].replace("-", "_"), FLAGS[flag]
    kinds = [hint, *typing.get_args(hint)]
    if typing.get_origin(hint) is typing.Literal:
        saved = getattr(train_script.Args, name, None) or getattr(TINY, name, None)
        saved = saved or getattr(jaxdqn.Axes(), name.removeprefix("axes."), None)
        return [flag, next(value for value in typing.get_args(hint) if value != saved)]
    value = next(OTHER[kind] for kind in OTHER if kind in kinds)
    if flag == "--total-steps":
        value = "240"
    if flag == "--axes.scheme":
        value = "averaging"
    if name == "tensorboard":
        return ["--no-tensorboard"]
    return [flag] if value is None else [flag, value]


def test_every_flag_of_train_acts_on_resume_or_is_refused(run, monkeypatch):
    """Declared in the script: what is not among those that act is refused, whatever its value, or is a part of the
    configuration that can only be said again."""
    monkeypatch.setattr(train_script, "prepare", lambda *_: None)
    plain = train_script.parse(["--resume", str(run)])[0]
    acts, refused = set(), set()
    for flag in FLAGS:
        if flag in ("--resume", "--env-params", "--env-kwargs") or FLAGS[flag] is dict:
            continue
        name = flag[2:].replace("-", "_")
        try:
            args = train_script.parse(["--resume", str(run), *asked(flag)])[0]
            spec = train_script.check_resume(args)
        except UserError as error:
            assert "only --total-steps may change when resuming" in str(error), flag
            refused.add(name)
            continue
        acts.add(name)
        assert args != plain, f"{flag} changes nothing"
        assert (spec.config.total_steps == 240) == (flag == "--total-steps")
    assert acts == train_script.ACT_ON_RESUME - {"resume"}
    assert {"seed", "num_seeds", "parallel", "preset", "devices_per_agent", "num_devices", "out"} <= refused
    assert {"init_from", "init_member", "num_envs", "hparams.gamma", "axes.scheme"} <= refused
    for flag in (
        ["--seed", "0"],
        ["--num-seeds", "2"],
        ["--num-seeds=1"],
        ["--parallel", "fused"],
        ["--num_devices", "1"],
    ):
        with pytest.raises(UserError, match=r"Leave .* out"):  # also where it says what is so, or the default
            train_script.parse(["--resume", str(run), *flag])
    for flag in (["--vary.gamma", "0.5"], ["--env-params.rows", "5"]):
        with pytest.raises(UserError, match="only --total-steps may change"):
            args, _ = train_script.parse(["--resume", str(run), *flag])
            train_script.check_resume(args)
    same = train_script.check_resume(train_script.parse(["--resume", str(run), "--num-envs", "4"])[0]).config
    assert same == agents.complete(TINY, HParams())[0]


def test_a_dry_run_of_resume_trains_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "prepare", lambda *_: None)
    before = contents(run)
    assert train_script.run(["--resume", str(run), "--total-steps", "320", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "160 of 320 steps of a member are done" in said and "total_steps: 320" in said
    assert contents(run) == before


def test_total_steps_below_what_is_done_are_refused_and_equal_ones_change_nothing(run):
    before = contents(run)
    with pytest.raises(UserError, match=r"total_steps is 80, and .* has done 160 steps"):
        experiment.resume(run, total_steps=80, settings=QUIET)
    for steps in (160, 157, None):  # 157 are as many iterations
        result = experiment.resume(run, total_steps=steps, settings=QUIET)
        assert result.summary["status"] == "finished" and result.summary["env_steps"] == 320
    assert contents(run) == before
    assert experiment.resume(run, total_steps=200, settings=QUIET).metrics.env_steps.max() == 200


def test_a_run_that_is_extended_is_told_of_a_rate_that_is_0(tmp_path, capsys):
    hparams, loud = HParams(learning_rate_end=0.0, learning_rate_updates=36.0), QUIET._replace(progress=True)
    experiment.train(TINY, hparams, out=tmp_path / "run", settings=loud)
    assert "the learning rate is 0" not in capsys.readouterr().err  # it is at the end
    experiment.resume(tmp_path / "run", total_steps=320, settings=loud)
    assert "the learning rate is 0 from update 36 on, of 76; raise learning_rate_updates" in capsys.readouterr().err


def test_init_member_is_a_member_of_something(tmp_path, monkeypatch):
    monkeypatch.setattr(train_script, "prepare", lambda *_: None)
    with pytest.raises(UserError, match=r"--init-member 1 is of no run: .*--init-from"):
        train_script.run(["--init-member", "1"])
    with pytest.raises(UserError, match="init_member is 1, but there is no init_from"):
        experiment.train(TINY, out=tmp_path / "run", num_devices=1, settings=QUIET._replace(init_member=1))
    assert list(tmp_path.iterdir()) == []


# -- streams and signals ----------------------------------------------------------------------------------------------


class Broken:
    """A stream whose reader has gone, or whose disk is full."""

    def __init__(self, error):
        self.error, self.tried = error, 0

    def write(self, text):
        self.tried += 1
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return False


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("closed")])
def test_progress_that_cannot_be_shown_is_dropped(monkeypatch, error):
    stream = Broken(error)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, "x") as progress:
        progress.update(1, 0.0, final=True)
        progress.say("y")
    before = stream.tried
    tell("z")
    assert stream.tried > before > 0  # each was tried, and its error dropped


def test_a_run_whose_progress_cannot_be_shown_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(32, "Broken pipe")))
    result = experiment.train(TINY, num_devices=1)  # says how many members there are, at least
    assert result.summary["status"] == "finished"


def test_a_bar_whose_terminal_has_gone_is_dropped(monkeypatch):
    master, slave = os.openpty()
    terminal = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, "x") as progress:
        progress.update(1, 0.0)
        assert os.read(master, 10_000)  # it was shown until now
        os.close(master)
        progress.update(2, 0.0)
        progress.say("y")
    monkeypatch.undo()
    with pytest.raises(OSError):  # as did those above
        terminal.write("z")
        terminal.flush()
    with contextlib.suppress(OSError):
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_flag_the_second_of_its_kind_acts_as_always(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with catch_signals() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), number)
            assert interrupted() and seen == []
            os.kill(os.getpid(), signal.SIGTERM if number == signal.SIGHUP else signal.SIGHUP)
            assert seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
        signal.signal(number, signal.SIG_IGN)
        with catch_signals() as interrupted:  # as under nohup
            os.kill(os.getpid(), number)
            assert not interrupted()
    finally:
        signal.signal(number, before)


STREAMS = """
import sys
from jaxdqn.runs import cli

def script():
    print("in", file=sys.stderr, flush=True)
    {work}
    return 3

cli.main(script)
"""


def ending(work, redirected):
    """The exit code of a script that does `work`, its streams as a shell redirects them."""
    quoted = STREAMS.format(work=work).replace("'", "'\\''")
    command = f"{sys.executable} -c '{quoted}' {redirected}"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=120)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    "work, redirected, code",
    [
        ("pass", "2>&-", 3),
        ("pass", "2>/dev/full", 3),
        ("pass", ">&- 2>&-", 3),
        ("cli.say('done')", ">/dev/full", 3),
        ("cli.say('done')", ">&-", 3),
        ("cli.say('done')", "2>&1 | true", 3),
        ("print('result')", "| true", 141),
        ("print('result')", ">/dev/full", 1),
        ("open('/dev/null', 'rb').fileno() > 2 or sys.exit(9)", "<&- >&- 2>&-", 3),
    ],
)
def test_the_exit_code_is_that_of_the_work_unless_a_result_is_lost(work, redirected, code):
    """`say` is for what is kept in files; what is only printed must have arrived."""
    found, err = ending("import time; time.sleep(0.3); " + work, redirected)
    assert found == code
    assert "Traceback" not in err and "Exception ignored" not in err


def test_evaluate_prints_its_result_before_it_draws(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "x.gif")

    monkeypatch.setattr(cli, "prepare_backend", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr("jaxdqn.runs.rendering.save_gif", full)
        with pytest.raises(SystemExit) as stop:
            cli.main(lambda: evaluate_script.run([str(run), "--episodes", "2"]))
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.out.startswith("dqn on Catch-bsuite, member 0: return ")
    assert said.err.splitlines() == ["error: No space left on device: x.gif"]

    def late(*_):
        raise UserError("it has no pictures")

    with monkeypatch.context() as patch:
        patch.setattr("jaxdqn.runs.rendering.save_gif", late)
        assert evaluate_script.run([str(run), "--episodes", "2", "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["gif"] is None and said.err.splitlines() == ["no GIF: it has no pictures"]
        with pytest.raises(UserError, match="no pictures"):
            evaluate_script.run([str(run), "--episodes", "2", "--json", "--gif", str(run / "a.gif")])
        assert json.loads(capsys.readouterr().out)["gif"] is None
    monkeypatch.setattr("jaxdqn.runs.results.Result.evaluate", lambda *_: pytest.fail("it went on"))
    for path in ("/dev/null", "/dev/stdout", run, run / "no" / "x.gif"):
        with pytest.raises(UserError, match="cannot write"):
            evaluate_script.run([str(run), "--gif", str(path)])
    assert pathlib.Path("/dev/null").is_char_device()


def test_a_run_interrupted_while_it_is_judged_is_judged_when_it_is_resumed(finished, tmp_path, monkeypatch):
    judged, build = [], schemes.build

    def watched(*args):
        runner, states = build(*args)

        def evaluate(states, iteration, part=0):
            judged.append(part)
            if part == 2:
                signal.raise_signal(signal.SIGINT)
            return runner.evaluate(states, iteration, part)

        return runner._replace(evaluate=evaluate), states

    with monkeypatch.context() as patch:
        patch.setattr(schemes, "build", watched)
        broken = experiment.train(TINY, out=tmp_path / "run", seeds=(0, 1), num_devices=1, settings=FLUSHED)
    assert judged[-2:] == [1, 2] and broken.summary["status"] == INTERRUPTED
    resumed = experiment.resume(tmp_path / "run", settings=QUIET)
    assert resumed.summary["status"] == OK
    assert resumed.summary["final_return_per_member"] == finished.summary["final_return_per_member"]


@pytest.mark.parametrize("stop", ["diverged", slow("solved")])
def test_what_stopped_by_itself_stays_as_it_is_when_the_rest_of_a_run_goes_on(tmp_path, stop):
    """Two batches: the first ends early, and the session is broken off in the second."""
    config = dataclasses.replace(TINY, total_steps=800, eval_interval=40)
    vary = [{"learning_rate": 1e30}, {"learning_rate": 1e-3}] if stop == "diverged" else None
    options = {
        "seeds": (0,) if vary else (0, 1),
        "vary": vary,
        "axes": Axes("actor_learner", workers=1, merge_every=2),
        "num_devices": 1,
    }
    settings = QUIET._replace(
        stop_at_return=-1.0 if stop == "solved" else None
    )  # of Catch the least: the first is enough
    whole = experiment.train(config, **options, settings=settings)
    sent = []

    def break_off(rows):
        if rows[0]["member"] == 1 and not sent:
            sent.append(signal.raise_signal(signal.SIGINT))

    broken = experiment.train(config, **options, settings=settings, out=tmp_path / "run", on_chunk=break_off)
    assert broken.summary["status"] == INTERRUPTED
    resumed = experiment.resume(tmp_path / "run", settings=settings)
    reached = [result.metrics.groupby("member").env_steps.max().tolist() for result in (whole, resumed)]
    assert reached[0][0] < 800 and reached[0] == reached[1]
    assert resumed.summary["final_return_per_member"] == whole.summary["final_return_per_member"]
    # What has ended goes on where that is asked for.
    more = experiment.resume(tmp_path / "run", total_steps=1_200, settings=QUIET._replace(stop_diverged=False))
    assert more.metrics.groupby("member").env_steps.max().tolist() == [1_200, 1_200]


# -- without a home ---------------------------------------------------------------------------------------------------

HOMELESS = """
import pwd, sys

def unknown(*_):
    raise KeyError("no entry")

pwd.getpwuid = pwd.getpwnam = unknown
sys.path.insert(0, {experiments!r})
import train
from jaxdqn.runs import cli
cli.main(lambda: train.run({arguments}))
"""


@pytest.mark.slow  # without a cache all is compiled
def test_a_user_without_a_home_trains(tmp_path):
    arguments = [
        "--env", "Catch-bsuite", "--num-envs", "4", "--batch-size", "8", "--hidden-sizes", "4", "--quiet",
        "--replay-capacity", "80", "--learning-starts", "16", "--total-steps", "80", "--out", "run",
    ]  # fmt: skip
    program = HOMELESS.format(arguments=arguments, experiments=str(ROOT / "experiments"))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.startswith("finished: 80 steps")
    assert (tmp_path / "run" / "curves.png").is_file() and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_the_cache_is_where_it_was_asked_for_or_nowhere(tmp_path, monkeypatch, home):
    def homeless(*_):
        raise KeyError("no entry")

    updates = {}
    monkeypatch.setattr(pwd, "getpwuid", homeless)
    monkeypatch.setattr("jax.config.update", updates.__setitem__)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("JAXDQN_CACHE", raising=False)
    devices.prepare_cache()
    assert updates == {}
    monkeypatch.setenv("JAXDQN_CACHE", str(tmp_path / "cache"))
    devices.prepare_cache()
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "cache")


def test_a_path_with_a_tilde_needs_a_home(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match="no home directory is known"):
        paths.expanded("~/runs")
