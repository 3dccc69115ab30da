"""The sweep's script and engines: the same result wherever stages run, whatever is killed; mistakes end in one line."""

import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import filelock
import pandas as pd
import psutil
import pytest
import yaml
from scripts import ROOT, script
from test_sweeps import CATCH, TIMES, assert_same, curves

from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import devices
from jaxdqn.sweeps import engines, reading

LIMIT = 240
TWO_GROUPS = {
    **CATCH,
    "config": {name: value for name, value in CATCH["config"].items() if name != "batch_size"},
    "space": {"batch_size": [8, 16], "learning_rate": [1e-3, 1e-2]},
    "sampler": "grid",
    "seeds": 2,
}
# Long enough to be killed in the middle.
LONGER = {
    **CATCH,
    "config": {**CATCH["config"], "total_steps": 16_000, "eval_interval": 800},
    "halving": {"rungs": [0.5], "keep": 0.5},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Starts sweep.py in a process of its own, in one folder: work(*arguments) -> Popen."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sweeps"  # one for all workers
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDQN_CACHE": str(folder / "cache")}
    environment.pop("PJRT_NPROC", None)

    def start(*arguments):
        command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    start.folder = folder
    return start


def finish(process, code=0):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err + out
    return out, err


def write(folder, name, sweep):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def table_of(folder):
    return pd.read_parquet(folder / "trials.parquet").drop(columns=TIMES)


def assert_equal_sweeps(one, other):
    assert_same(table_of(one), table_of(other))
    for kind in ("tuning", "final"):
        assert_same(curves(one, kind), curves(other, kind))


def left_alone(work, name, sweep):
    """A sweep that ends in one process, trained once for all workers, and what was printed."""
    said = work.folder / f"{name}.json"
    with filelock.FileLock(work.folder / f"{name}.lock"):
        if not said.exists():
            said.write_text(json.dumps(finish(work(write(work.folder, name, sweep), "--out", f"{name}-alone"))))
    return work.folder / f"{name}-alone", *json.loads(said.read_text())


@pytest.fixture(scope="module")
def reference(work):
    """Two groups, one after the other."""
    path, out, err = left_alone(work, "two", TWO_GROUPS)
    assert "2 compiled group(s)" in err and "fresh seeds" in out and "report: " in out
    return path


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_another_engine_gives_the_same_sweep(work, reference, engine):
    pytest.importorskip("ray") if engine == "ray" else None
    finish(work(work.folder / "two.yaml", "--out", engine, "--engine", engine))
    assert_equal_sweeps(work.folder / engine, reference)


def children(process, words):
    """Processes below `process` whose command line has all of `words`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if all(word in " ".join(child.cmdline()) for word in words):
                found.append(child)
        except psutil.Error:
            pass
    return found


def wait_until(what, process):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"it ended early: {process.communicate()}")
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it took too long")


@pytest.mark.parametrize(
    "engine, words",
    [("processes", ["spawn_main"]), ("ray", ["ray::_task"])],
)
@pytest.mark.slow
def test_a_killed_worker_changes_nothing_but_the_time(work, whole, engine, words):
    pytest.importorskip("ray") if engine == "ray" else None
    out = work.folder / f"killed-{engine}"
    process = work(work.folder / "longer.yaml", "--out", out, "--engine", engine, "--checkpoint-seconds", 0)
    wait_until(lambda: list(out.glob("runs/*/checkpoints/0*")), process)
    (victim, *_) = wait_until(lambda: children(process, words), process)
    victim.send_signal(signal.SIGKILL)
    _, err = finish(process)
    assert err.count("was lost") == 1 and "goes on from its last checkpoint" in err
    assert_equal_sweeps(out, whole)


def test_a_child_is_asked_to_end_once_its_parent_has_gone(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "kill", lambda *told: asked.append(told))
    watched, life = multiprocessing.Pipe(duplex=False)
    thread = threading.Thread(target=engines._end_with, args=(watched,))
    thread.start()
    thread.join(0.2)
    assert asked == [] and thread.is_alive()
    life.close()  # as the system does for a process that ends
    thread.join(LIMIT)
    assert asked == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.slow
def test_a_killed_parent_takes_its_children_with_it(work, whole):
    out = work.folder / "orphans"
    process = work(work.folder / "longer.yaml", "--out", out, "--engine", "processes", "--checkpoint-seconds", 0)
    wait_until(lambda: list(out.glob("runs/*/checkpoints/0*")), process)
    born = wait_until(lambda: children(process, ["spawn_main"]), process)
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)
    gone, alive = psutil.wait_procs(born, timeout=60)
    assert gone and not alive
    finish(work("--resume", out, "--engine", "processes"))
    assert_equal_sweeps(out, whole)


@pytest.fixture(scope="module")
def whole(work):
    """A halving sweep."""
    return left_alone(work, "longer", LONGER)[0]


def killed_at_random(work, out, kills, seed):
    """The sweep, killed with SIGKILL `kills` times after random seconds, and resumed to its end."""
    moments = random.Random(seed)
    for _ in range(kills):
        arguments = ["--resume", out] if (out / "space.yaml").exists() else [work.folder / "longer.yaml", "--out", out]
        process = work(*arguments, "--checkpoint-seconds", 0)
        try:
            process.wait(moments.uniform(0.5, 8.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it was done: once more from the beginning
            assert_equal_sweeps(out, work.folder / "longer-alone")
            subprocess.run(["rm", "-rf", str(out)], check=True)
    arguments = ["--resume", out] if (out / "space.yaml").exists() else [work.folder / "longer.yaml", "--out", out]
    finish(work(*arguments))
    return out


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_goes_on_to_the_same_table(work, whole):
    assert_equal_sweeps(killed_at_random(work, work.folder / "killed", kills=2, seed=1), whole)


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_eight_moments_goes_on_to_the_same_table(work, whole):
    assert_equal_sweeps(killed_at_random(work, work.folder / "killed-often", kills=8, seed=2), whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "processes"])
def test_ctrl_c_saves_and_says_how_to_go_on(work, whole, engine):
    out = f"interrupted-{engine}"
    process = work(work.folder / "longer.yaml", "--out", out, "--engine", engine)
    wait_until(lambda: list((work.folder / out).glob("runs/*/config.yaml")), process)
    process.send_signal(signal.SIGINT)
    said, err = finish(process, 130)
    assert f"--resume {out}" in said and "Traceback" not in err
    finish(work("--resume", out))
    assert_equal_sweeps(work.folder / out, whole)


def test_a_task_that_is_lost_again_and_again_ends_the_sweep(tmp_path):
    from test_sweeps import run_at, sweep_of

    from jaxdqn.sweeps import rounds, samplers
    from jaxdqn.sweeps.sweep import Trial

    def lose(task):
        raise engines.Lost("its process ended with code -9")

    sweep = sweep_of()
    trials = [Trial(number, values) for number, values in enumerate(samplers.once(sweep.space, sweep.sampler))]
    stages = [rounds.next_stage(sweep, progress, "a", "tuning", (0,)) for progress in rounds.begin(sweep, trials)]
    started = []
    tasks = engines.Tasks(
        2, lambda *args: started.append(args) or object(), lambda tasks, _: tasks, lose, lambda _: None
    )
    with pytest.raises(UserError, match="was lost 5 times"):
        engines.side_by_side(stages, run_at(tmp_path), tasks)
    assert len(started) == 5


# -- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_script_finds_the_gpus_before_it_keeps_off_them(inside, monkeypatch, tmp_path):
    asked = []

    def probe(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "2\n")

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(engines.subprocess, "run", probe)
    sweep = script("sweep")
    args = sweep.Args(engine="processes")
    sweep.prepare(reading.parse(TWO_GROUPS), args)
    with engines.running(args.engine) as engine:
        assert engine and len(asked) == 1
    for number, words in {3: "this machine has 2", 0: "from 1", -1: "from 1"}.items():
        with pytest.raises(UserError, match=words), engines.running(args.engine, num_devices=number):
            pass


@pytest.mark.parametrize("ours, theirs", [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b,GPU-c", "GPU-c")])
def test_each_task_has_gpus_of_those_that_the_sweep_may_use(monkeypatch, ours, theirs):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if ours:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    assert engines.visible_gpus(2, 2) == theirs


@pytest.mark.parametrize("num_devices, used, cores, shares", [(1, 2, 2, 2), (2, 2, 8, 1), (1, 64, 8, 8), (3, 8, 8, 2)])
def test_a_stage_plans_with_its_share_of_the_memory(monkeypatch, num_devices, used, cores, shares):
    monkeypatch.setenv("JAXDQN_MEMORY_SHARES", "1")
    monkeypatch.setattr(engines.os, "cpu_count", lambda: cores)
    for name in ("prepare_cache", "prepare_cpu"):
        monkeypatch.setattr(devices, name, lambda *_, **__: None)
    engines._prepare(num_devices, used)
    assert os.environ["JAXDQN_MEMORY_SHARES"] == str(shares)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def fails(capsys, *arguments):
    with pytest.raises(UserError) as error:
        script("sweep").run([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def inside(monkeypatch):
    """sweep.py in this process, whose backend has long started."""
    monkeypatch.setattr("jaxdqn.runs.cli.prepare_backend", lambda *args, **options: None)


def test_one_clear_line_for_each_mistake(inside, capsys, tmp_path):
    two = write(tmp_path, "two", TWO_GROUPS)
    assert "either a sweep file or --resume" in fails(capsys)
    assert "none.yaml cannot be read" in fails(capsys, tmp_path / "none.yaml")
    assert "did you mean 'processes'" in fails(capsys, two, "--engine", "proceses")
    assert "num_devices is 0" in fails(capsys, two, "--num-devices", 0)
    assert "holds no sweep" in fails(capsys, "--resume", tmp_path)
    assert "for engine 'ray'" in fails(capsys, two, "--ray-address", "auto")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in fails(capsys, two, "--out", tmp_path / "full", "--quiet")


def test_a_second_sweep_in_one_directory_is_refused(inside, capsys, tmp_path, reference):
    two = write(tmp_path, "two", TWO_GROUPS)
    assert "already holds a sweep" in fails(capsys, two, "--out", reference, "--quiet")


def test_more_memory_than_there_is_is_refused_before_anything_is_compiled(inside, capsys, tmp_path):
    sweep = {**CATCH, "config": {**CATCH["config"], "replay_capacity": 2_000_000_000}}
    message = fails(capsys, write(tmp_path, "big", sweep), "--out", tmp_path / "out", "--quiet")
    assert "one agent needs" in message and not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(inside, capsys, tmp_path):
    assert (
        script("sweep").run([str(write(tmp_path, "two", TWO_GROUPS)), "--dry-run", "--out", str(tmp_path / "o")]) == 0
    )
    out = capsys.readouterr().out
    assert "4 trials x 2 seeds = 8 members, in 2 compiled group(s)" in out and "very roughly" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_that_comes_with_the_project_can_be_planned(inside, capsys, path):
    assert script("sweep").run([str(path), "--dry-run"]) == 0
    assert "compiled group(s)" in capsys.readouterr().out


def test_a_read_only_directory_is_one_line(inside, capsys, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot" in fails(capsys, write(tmp_path, "two", TWO_GROUPS), "--out", pathlib.Path(locked) / "x")
