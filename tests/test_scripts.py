"""The scripts as a user runs them: files, JSON, Ctrl-C, a kill, and mistakes that end in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import filelock
import jax
import numpy as np
import pandas as pd
import PIL.Image
import probe_environments
import pytest
from cases import slow
from scripts import script

import jaxdqn
from jaxdqn.agents import AGENTS
from jaxdqn.analysis import intervals
from jaxdqn.environments import suites
from jaxdqn.environments.names import CONTINUOUS
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import devices, memory
from jaxdqn.presets import PRESETS
from jaxdqn.runs import cli
from jaxdqn.timeline import timeline

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = """--env CartPole-v1 --agent double_dqn --num-seeds 2 --total-steps 3000 --num-envs 8 --batch-size 16
--replay-capacity 1000 --learning-starts 64 --hparams.learning-rate 1e-3"""
TINY = FLAGS.split()
# The reference is not interrupted; with a checkpoint at every row there is something to interrupt.
OFTEN = ["--checkpoint-seconds", "0"]
LIMIT = 120


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs a script in a process of its own: work(name, *arguments) -> Popen, in a folder of its own."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "scripts"  # one for all workers
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDQN_CACHE": str(folder / "cache")}
    environment.pop("PJRT_NPROC", None)

    def start(name, *arguments):
        command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    start.folder = folder
    return start


def finish(process, code=0):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err + out
    return out, err


@pytest.fixture(scope="module")
def trained(work):
    """A run that was left alone: its directory and what was printed."""
    said = work.folder / "said.json"
    with filelock.FileLock(work.folder / "lock"):
        if not said.exists():
            said.write_text(json.dumps(finish(work("train", *TINY, "--out", "reference"))))
    return work.folder / "reference", *json.loads(said.read_text())


def wait_for_checkpoint(process, path, iteration):
    """Until the run in `path` has a checkpoint of at least `iteration`, and is still going."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = [int(file.name.split("-")[1]) for file in (path / "checkpoints").glob("0*")]
        if max(found, default=-1) >= iteration:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert process.poll() is None, "the run was over before it could be interrupted"


def assert_same_run(path, reference):
    ours, theirs = jaxdqn.load(path), jaxdqn.load(reference)
    pd.testing.assert_frame_equal(
        ours.metrics.drop(columns="seconds"), theirs.metrics.drop(columns="seconds"), check_exact=True
    )
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


# -- train ------------------------------------------------------------------------------------------------------------


def test_train_leaves_its_files_and_says_where(trained):
    path, out, err = trained
    for name in ("config.yaml", "summary.json", "metrics.parquet", "checkpoints", "curves.png", "tensorboard"):
        assert (path / name).exists(), name
    assert PIL.Image.open(path / "curves.png").size[0] > 300
    assert len(list((path / "tensorboard").glob("member-*/events*"))) == 2
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["agent"] == "double_dqn" and summary["seeds"] == [0, 1]
    assert summary["env_steps"] == 6000 and summary["final_return_mean"] > 0
    assert out.splitlines()[0].startswith("finished: 6,000 steps") and "2 member(s)" in out
    assert "curves: reference/curves.png" in out and "continue with" not in out
    assert "Traceback" not in err and "3,000/3,000 steps" in err
    frame = pd.read_parquet(path / "metrics.parquet")
    assert set(frame.member) == {0, 1} and frame.env_steps.max() == 3000
    loaded = jaxdqn.load(path)
    assert loaded.members[0][1].learning_rate == 1e-3 and loaded.config.replay_capacity == 1000
    left = [file for file in path.rglob(".*") if file.name != ".lock"]
    assert left == []


def test_ctrl_c_saves_exits_with_130_and_says_how_to_go_on(work, trained):
    process = work("train", *TINY, *OFTEN, "--out", "interrupted")
    path = work.folder / "interrupted"
    wait_for_checkpoint(process, path, 40)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 130)
    assert time.monotonic() - began < 15
    assert "Traceback" not in err and out.startswith("interrupted: ")
    (hint,) = [line for line in out.splitlines() if "--resume interrupted" in line]
    assert hint == "continue with: python experiments/train.py --resume interrupted"
    assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    assert 40 * 8 <= jaxdqn.load(path).metrics.env_steps.max() < 3000
    out, err = finish(work("train", "--resume", "interrupted"))
    assert out.startswith("finished: 6,000 steps") and "warning" not in err
    assert json.loads((path / "summary.json").read_text())["status"] == "finished"
    assert_same_run(path, trained[0])


def test_a_killed_run_resumes_to_the_same_bits(work, trained):
    process = work("train", *TINY, *OFTEN, "--out", "killed")
    path = work.folder / "killed"
    wait_for_checkpoint(process, path, 100)
    process.kill()
    process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL and not (path / "summary.json").exists()
    finish(work("train", "--resume", "killed", "--quiet"))
    assert_same_run(path, trained[0])
    assert not list((path / "checkpoints").glob(".writing*"))


# -- asynchronous runs: threads end with them, and their rows stay complete -------------------------------------------

ASYNCHRONOUS = {
    name: f"""--parallel {name} --num-envs 8 --hidden-sizes 16 --learning-starts {starts} --replay-capacity 2000
--batch-size 16 --total-steps {steps} --log-interval {steps // 20} --eval-interval {steps // 4} --eval-episodes 2
--final-episodes 4
--no-tensorboard --env-params.max-steps-in-episode 50""".split()
    for name, steps, starts in (("parallel_dqn", 16_000, 320), ("a3c", 32_000, 0))
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_an_asynchronous_run_is_stopped_in_the_middle_and_goes_on_to_the_end(work, name, number):
    out = f"{name}-{number.name}"
    path = work.folder / out
    process = work("train", *ASYNCHRONOUS[name], *OFTEN, "--out", out)
    wait_for_checkpoint(process, path, 100)
    process.send_signal(number)
    said, err = finish(process, 130 if number != signal.SIGKILL else -signal.SIGKILL)
    assert "Traceback" not in err and "died" not in err
    if number != signal.SIGKILL:
        assert said.startswith("interrupted: ") and f"--resume {out}" in said
        assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    assert list((path / "checkpoints").glob("0*"))
    said, err = finish(work("train", "--resume", out, "--quiet"))
    assert said.startswith("finished: ") and "Traceback" not in err
    frame = jaxdqn.load(path).metrics
    line = timeline(jaxdqn.load(path).config)
    assert list(frame.iteration) == list(range(line.log_every, line.total + 1, line.log_every))
    assert frame.eval_return.notna().sum() == 4


@pytest.mark.parametrize("name", [slow("parallel_dqn"), "a3c"])
def test_a_second_ctrl_c_ends_an_asynchronous_run_at_once_and_in_one_line(work, name):
    out = f"{name}-twice"
    process = work("train", *ASYNCHRONOUS[name], *OFTEN, "--out", out)
    wait_for_checkpoint(process, work.folder / out, 100)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # two signals that wait are one
    said, err = finish(process, 130)
    assert "Traceback" not in err and "ERROR" not in err
    assert err.endswith("error: interrupted.\n") or said.startswith("interrupted: ")  # it was quicker than we
    assert list((work.folder / out / "checkpoints").glob("0*"))


# -- evaluate, export, list, help -------------------------------------------------------------------------------------


def test_evaluate_prints_one_json_object_and_draws_the_policy(work, trained):
    out, err = finish(work("evaluate", trained[0], "--episodes", 10, "--json", "--member", 1))
    report = json.loads(out)
    assert "Traceback" not in err
    assert report["episodes"] == 10 and report["member"] == 1 and report["agent"] == "double_dqn"
    returns = report["returns"]
    assert len(returns) == 10 and report["return_mean"] == pytest.approx(np.mean(returns))
    assert (report["return_min"], report["return_max"]) == (min(returns), max(returns))
    assert report["return_ci95"] == intervals.mean_interval(returns) and report["distinct"] == 10
    assert report["unfinished"] == 0 and report["epsilon"] == 0
    np.testing.assert_array_equal(returns, jaxdqn.load(trained[0]).evaluate(10, 1, seed=1).returns)
    gif = PIL.Image.open(report["gif"])
    assert gif.format == "GIF" and gif.n_frames > 1
    assert pathlib.Path(report["gif"]) == trained[0] / "policy-member-1.gif"


@pytest.fixture
def inside(monkeypatch):
    """inside(name, *arguments): a script's run() in this process, whose backend has long started."""
    monkeypatch.setattr(devices, "prepare_cpu", lambda *args, **options: None)
    monkeypatch.setenv("JAXDQN_CACHE", jax.config.jax_compilation_cache_dir)
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda name, *arguments: script(name).run([str(argument) for argument in arguments])
    for name, value in before.items():
        jax.config.update(name, value)


def test_evaluate_in_words_and_to_a_named_gif(inside, trained, tmp_path, capsys):
    assert inside("evaluate", trained[0], "--episodes", 3, "--gif", tmp_path / "a.gif") == 0
    out = capsys.readouterr().out
    assert "double_dqn on CartPole-v1, member 0: return " in out and "over 3 greedy episodes" in out
    assert PIL.Image.open(tmp_path / "a.gif").format == "GIF"
    assert inside("evaluate", trained[0], "--episodes", 3, "--no-gif", "--json", "--epsilon", 0.5) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gif"] is None and report["epsilon"] == 0.5
    assert report["returns"] == jaxdqn.load(trained[0]).evaluate(3, epsilon=0.5).returns.tolist()


def test_what_is_given_without_a_flag_is_no_suggestion(inside):
    with pytest.raises(UserError, match="unknown flag '--rn': did you mean") as error:
        inside("evaluate", "x", "--rn", "y")
    assert "--run" not in str(error.value)


def test_a_gif_is_either_wanted_or_not(inside, trained, tmp_path):
    with pytest.raises(UserError, match="either --gif or --no-gif"):
        inside("evaluate", trained[0], "--gif", tmp_path / "b.gif", "--no-gif")


def test_export_writes_a_policy_that_chooses_as_the_run_does(inside, trained, tmp_path, capsys):
    path = tmp_path / "policy.jax"
    assert inside("export", trained[0], "--member", 1, "--out", path) == 0
    assert f"policy: {path}" in capsys.readouterr().out
    policy = jax.export.deserialize(bytearray(path.read_bytes()))
    result = jaxdqn.load(trained[0])
    network = result.components.agent
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    params = jax.tree.map(lambda x: x[1], result.params)
    expected = network.greedy(params, network.initial_carry(50), observations, jax.random.key(1))[0]
    actions = np.asarray(policy.call(observations))
    np.testing.assert_array_equal(actions, expected)
    assert set(actions) == {0, 1}
    with pytest.raises(UserError, match="member 2 does not exist"):
        inside("export", trained[0], "--member", 2, "--out", tmp_path / "none.jax")
    assert not (tmp_path / "none.jax").exists()


def test_list_shows_everything(capsys):
    assert script("list").run([]) == 0
    out = capsys.readouterr().out
    for name in (*suites.NAMES, *CONTINUOUS, *PRESETS, *AGENTS):
        assert name in out
    with pytest.raises(UserError, match="takes no arguments"):
        script("list").run(["--wat"])


def test_list_says_how_to_install_a_suite(capsys, monkeypatch):
    monkeypatch.setattr(suites.Suite, "installed", False)
    assert script("list").run([]) == 0
    assert 'octax, which is not installed: pip install -e ".[octax]"' in capsys.readouterr().out


HELP = """
import contextlib, io, runpy, sys
for name in ("evaluate", "export", "train", "list"):
    sys.argv, out = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(f"experiments/{name}.py", run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, (name, stop.code)
    heavy = [m for m in ("jax", "jaxlib", "flax", "gymnax", "orbax", "pandas", "matplotlib") if m in sys.modules]
    print(name, len(out.getvalue()), "--seed" in out.getvalue(), *heavy)
"""


def test_help_is_quick_because_nothing_heavy_is_imported():
    """But for what agents and schemes declare, whose flags are shown: their files import JAX and flax, about 1.5 s."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["evaluate", "export", "train", "list"]
    assert all(int(line[1]) > 300 for line in lines) and lines[2][2] == "True"
    assert lines[0][3:] == lines[1][3:] == [] and set(lines[3][3:]) <= {"jax", "jaxlib", "flax"}


# -- mistakes ---------------------------------------------------------------------------------------------------------


def fails(inside, capsys, name, arguments):
    """The one line that a script's mistake ends in."""
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: inside(name, *arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    assert "Traceback" not in captured.err and captured.out == ""
    lines = captured.err.splitlines()
    assert [line.startswith("error: ") for line in lines if not line.startswith("warning: ")] == [True], lines
    return lines[-1]


MISTAKES = {
    "--env CartPol-v1": "did you mean 'CartPole-v1'",
    "--env Pendulum-v1": "continuous actions",
    "--agent duoble_dqn": "did you mean 'double_dqn'",
    "--preset cartpol": "did you mean 'cartpole'",
    "--num-env 8": "did you mean '--num-envs'",
    "--hparams.learning-rat 1e-3": "did you mean '--hparams.learning-rate'",
    "--hparams.learning-rate fast": "fast",
    "--hparams.gamma 1.5": "hparams.gamma is 1.5",
    "--hparams.gamma nan": "hparams.gamma is nan",
    "--loss hubber": "hubber",
    "--num-envs 0": "num_envs is 0",
    "--num-envs -8": "num_envs is -8",
    "--num-envs 1.5": "1.5",
    "--num-envs many": "many",
    "--batch-size 0": "batch_size is 0",
    "--hidden-sizes 0": "hidden_sizes",
    "--total-steps 0": "total_steps is 0",
    "--total-steps 100 --learning-starts 1000": "learning never starts",
    "--eval-episodes 0": "eval_episodes is 0",
    "--updates-per-iteration 1e12": "updates_per_iteration",
    "--eval-max-steps 1e12": "eval_max_steps",
    "--replay-capacity 99999999999": "replay_capacity",
    "--replay-capacity 1e9": "of 2.0 GiB free",
    "--num-envs 1e8 --replay-capacity 1e9 --total-steps 1e12 --log-interval 1e9": "of 2.0 GiB free",
    "--num-envs 16 --batch-size 2000 --replay-capacity 1000": "larger than the replay of 1008",
    "--num-envs 16 --n-step 63 --replay-capacity 1000": "n_step 63",
    "--num-devices 64": "num_devices 64",
    "--num-devices 0": "num_devices is 0",
    "--devices-per-agent 0": "devices_per_agent is 0",
    "--num-envs 16 --devices-per-agent 3": "num_envs 16 cannot be divided over 3",
    "--num-devices 3 --devices-per-agent 2": "multiple",
    "--num-seeds 0": "num_seeds is 0",
    "--seed -1": "seed is -1",
    "--resume nothing-here": "holds no run",
    "--init-from nothing-here": "holds no run",
    "--env-params.max-steps-in-episod 5": "did you mean 'max_steps_in_episode'",
    "--env-params.max-steps-in-episode": "needs a value",
    "--env-params.max-steps-in-episode 5 6": "takes one value",
    "--env-params.max-steps-in-episode [5": "[5",
    "--env-params.max-steps-in-episode 99999999999": "max_steps_in_episode",
    "--env-params.max-steps-in-episode long": "long",
    "--env-kwargs.nonsense 5": "nonsense",
    "--vary.learning-rat 1e-3 1e-4": "did you mean 'learning_rate'",
    "--vary.learning-rate": "needs a value",
    "--vary.learning-rate fast": "fast",
    "--vary.gamma 0.9 2": "hparams.gamma is 2",
    "--vary.learning-rate [1,2]": "hparams.learning_rate is [1, 2]",
    "--hparams.learning-rate 1e40": "hparams.learning_rate is 1e+40",
    "--hparams.weight-decay inf": "hparams.weight_decay is inf",
    "--env-params.gravity nan": "env_params.gravity of CartPole-v1 is nan",
    "--env-params.gravity &a[*a]": "cannot be read",
    "--env Breakout-MinAtar --env-kwargs.use-minimal-action-set maybe": "it must be True or False",
    "--env DeepSea-bsuite --env-kwargs.size 0": "size of DeepSea-bsuite is 0",
    f"--env {'x' * 100_000}": "it must be a name",
    f"--num-envs {'9' * 5_000}": "Error parsing --num-envs: Exceeds the limit",
    "--parallel a3c --engine rai": "did you mean 'ray'",
    "--preset=": "unknown preset ''",
    "--parallel=": "unknown parallel preset ''",
    "--wandb=": "--wandb is empty",
    "--resume elsewhere --resume=nothing-here": "nothing-here holds no run",
    "--preset cartpole-a2c --preset nothing": "unknown preset 'nothing'",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=lambda flags: flags[:60])
def test_a_mistake_ends_in_one_line(inside, capsys, monkeypatch, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "host_bytes", lambda: 2 * 2**30)
    line = fails(inside, capsys, "train", flags.split())
    assert MISTAKES[flags] in line and len(line) < 2_100
    assert list(tmp_path.iterdir()) == []  # no run directory that would then be in the way


def test_mistakes_with_directories(inside, capsys, tmp_path, trained):
    (tmp_path / "file").write_text("precious")
    assert "Not a directory" in fails(inside, capsys, "train", [*TINY, "--out", tmp_path / "file" / "run"])
    assert "not empty" in fails(inside, capsys, "train", [*TINY, "--out", tmp_path])
    assert f"--resume {trained[0]}" in fails(inside, capsys, "train", [*TINY, "--out", trained[0]])
    line = fails(inside, capsys, "train", ["--resume", trained[0], "--num-envs", 16])
    assert "num_envs 8 (asked: 16)" in line and "only --total-steps may change" in line
    line = fails(inside, capsys, "train", ["--resume", trained[0], "--hparams.gamma", 0.5])
    assert "hparams.gamma 0.99 (asked: 0.5)" in line
    assert "only --total-steps" in fails(inside, capsys, "train", ["--resume", trained[0], "--vary.gamma", 0.5, 0.6])
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_mistakes_about_a_finished_run(inside, capsys, tmp_path, trained, name):
    assert "holds no run" in fails(inside, capsys, name, [tmp_path / "nothing"])
    assert "member 9 does not exist" in fails(inside, capsys, name, [trained[0], "--member", 9])
    assert "did you mean '--member'" in fails(inside, capsys, name, [trained[0], "--membr", 0])
    if name == "evaluate":
        for episodes in (0, -3):
            line = fails(inside, capsys, name, [trained[0], "--episodes", episodes])
            assert f"episodes is {episodes}" in line
        assert "many" in fails(inside, capsys, name, [trained[0], "--episodes", "many"])


def test_a_registered_environment_of_the_wrong_shape(inside, capsys, tmp_path):
    def wrong():
        good = probe_environments.value()
        return good._replace(spec=good.spec._replace(observation=jax.ShapeDtypeStruct((3,), np.float32)))

    jaxdqn.register("wrong-shape", wrong)
    line = fails(inside, capsys, "train", ["--env", "wrong-shape", "--out", tmp_path / "run"])
    assert "observation" in line and "float32[1]" in line and "float32[3]" in line
    assert not (tmp_path / "run").exists()
