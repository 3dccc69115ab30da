"""Several hosts, as processes on one machine: the same training as in one process, and errors that end all of them."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pandas as pd
import pytest
from scripts import script

import jaxdqn
from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.parallel import axes, hosts, schemes
from jaxdqn.parallel.compiled import devices
from jaxdqn.runs import cli

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 90  # seconds, of any process
# Two members, each over both devices: with two processes every gradient mean is between them.
FLAGS = """--env CartPole-v1 --agent double_dqn --num-seeds 2 --num-devices 2 --devices-per-agent 2 --hidden-sizes 32
--total-steps 640 --num-envs 8 --batch-size 16 --replay-capacity 320 --learning-starts 64 --log-interval 64
--eval-episodes 2 --final-episodes 4 --env-params.max-steps-in-episode 50 --no-tensorboard""".split()


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(arguments) -> a process that trains; start(arguments, 2) -> two processes that train together."""
    folder = tmp_path_factory.mktemp("hosts")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDQN_CACHE": str(folder / "cache")}
    environment.pop("PJRT_NPROC", None)
    started = []

    def one(arguments):
        command = [sys.executable, str(ROOT / "experiments" / "train.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    def several(*each):
        port = free_port()
        together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", len(each), "--process-id"]
        return [one([*arguments, *together, i]) for i, arguments in enumerate(each)]

    several.alone = one
    several.folder = folder
    yield several
    for process in started:
        process.kill()
        process.communicate(timeout=LIMIT)


def finish(processes, code):
    """What each printed, [(out, err), ...], once all have ended with `code`."""
    said = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    assert "Traceback" not in str(said), said
    return said


def errors(said):
    """The one error of each process."""
    lines = [[line for line in err.splitlines() if line.startswith("error: ")] for _, err in said]
    assert [len(found) for found in lines] == [1] * len(said), said
    return [line.removeprefix("error: ") for (line,) in lines]


def wait_for_checkpoint(processes, path, iteration):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = [int(file.name.split("-")[1]) for file in (path / "checkpoints").glob("0*")]
        if max(found, default=-1) >= iteration:
            return
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.01)
    raise AssertionError("no checkpoint came")


def assert_same_run(path, reference):
    ours, theirs = jaxdqn.load(path), jaxdqn.load(reference)
    # Bitwise: of two numbers there is one sum, whoever adds them.
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    pd.testing.assert_frame_equal(
        ours.metrics.drop(columns="seconds"), theirs.metrics.drop(columns="seconds"), check_exact=True
    )


@pytest.fixture(scope="module")
def reference(start):
    """The run in one process with two devices."""
    finish([start.alone([*FLAGS, "--out", "reference"])], 0)
    return start.folder / "reference"


@pytest.mark.slow
def test_two_processes_train_as_two_devices_of_one(start, reference):
    (out, _), (other_out, other_err) = finish(start(*[[*FLAGS, "--out", "two"]] * 2), 0)
    assert_same_run(start.folder / "two", reference)
    assert "finished: 1,280 steps" in out and "curves: two/curves.png" in out
    # The transport and, on fewer cores, the devices have something to say of their own.
    lines = [line for line in other_err.splitlines() if "[Gloo]" not in line and "cores" not in line]
    assert "finished:" not in other_out and len(lines) == 2
    assert lines[0].startswith("process 1 of 2: joined 127.0.0.1:") and lines[1] == "process 1 of 2: finished"


@pytest.mark.slow
def test_sigterm_at_one_stops_both_and_they_resume_together(start, reference):
    # Two devices in each process: each process has a member of its own, over both.
    often = ["--num-devices", "4", "--checkpoint-seconds", "0"]
    processes = start(*[[*FLAGS, *often, "--out", "stopped"]] * 2)
    path = start.folder / "stopped"
    wait_for_checkpoint(processes, path, 16)
    processes[1].send_signal(signal.SIGTERM)
    (out, _), (_, other_err) = finish(processes, 130)
    assert "continue with: python experiments/train.py --resume stopped" in out
    assert "process 1 of 2: interrupted" in other_err
    assert jaxdqn.load(path).metrics.env_steps.max() < 640
    finish(start(*[["--resume", "stopped", "--no-tensorboard"]] * 2), 0)
    assert_same_run(path, reference)


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_with_a_line(start):
    processes = start(*[[*FLAGS, "--total-steps", "1000000", "--checkpoint-seconds", "0", "--out", "killed"]] * 2)
    wait_for_checkpoint(processes, start.folder / "killed", 16)
    processes[1].kill()
    (line,) = errors(finish(processes[:1], 2))
    assert line.startswith("process 1 has gone") and "--resume" in line


def test_an_error_of_one_ends_both(start):
    (start.folder / "taken").mkdir()
    (start.folder / "taken" / "file").write_text("")
    first, second = errors(finish(start(*[[*FLAGS, "--out", "taken"]] * 2), 2))
    assert first.startswith("taken is not empty") and second == f"process 0 stopped: {first}"


def test_processes_with_different_commands_are_refused(start):
    arguments = [[*FLAGS, "--out", "different"], [*FLAGS, "--out", "different", "--hparams.gamma", "0.9"]]
    for line in errors(finish(start(*arguments), 2)):
        assert line.startswith("process 1 has hparams.gamma 0.9, process 0 has 0.99: start every process with the same")
    assert not (start.folder / "different").exists()


# -- meeting ----------------------------------------------------------------------------------------------------------


def refused(*calls):
    """The errors of processes that try to meet: calls are the arguments of `join` but the address."""
    address = f"127.0.0.1:{free_port()}"

    def attempt(call):
        with pytest.raises(UserError) as caught:
            hosts.join(address, *call)
        return str(caught.value)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(attempt, calls))


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:port", "host:0", "host:65536", "host:-1"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        hosts.join(address, 2, 0, {}, 1.0)


@pytest.mark.parametrize("count, process", [(2, 2), (2, -1), (0, 0)])
def test_an_id_out_of_range_is_refused(count, process):
    with pytest.raises(UserError, match="must be"):
        hosts.join("127.0.0.1:1234", count, process, {}, 1.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_time_is_refused(seconds):
    with pytest.raises(UserError, match="connect_seconds"):
        hosts.join("127.0.0.1:1234", 2, 0, {}, seconds)


def test_a_coordinator_that_does_not_answer_is_an_error():
    (line,) = refused((2, 1, {}, 0.3))
    assert "did not answer" in line and "within 0.3 s" in line


def test_an_unknown_host_is_an_error():
    with pytest.raises(UserError, match=r"host 'nowhere.invalid' is unknown"):
        hosts.join("nowhere.invalid:1234", 2, 1, {}, 5.0)


def test_processes_that_do_not_come_are_named():
    first, second = refused((3, 0, {}, 1.0), (3, 1, {}, 1.0))
    assert first == second and first.startswith("process(es) 2 of 3 did not come within 1 s")


def test_two_processes_with_one_id_are_refused():
    lines = refused((3, 0, {}, LIMIT), (3, 1, {}, LIMIT), (3, 1, {}, LIMIT))
    assert lines == ["two processes have --process-id 1; give each its own."] * 3


def test_two_first_processes_are_refused():
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match="another process 0 may be running"):
        hosts.join(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, {}, 1.0)


def test_processes_that_count_differently_are_refused():
    for line in refused((2, 0, {}, LIMIT), (3, 2, {}, LIMIT)):
        assert line.startswith("process 2 has num_processes 3, process 0 has 2: start every process with the same")


def test_a_port_of_somebody_else_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        with pytest.raises(UserError, match="another run may be using the port"):
            hosts.join(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, {}, 5.0)


def test_a_stranger_at_the_port_is_passed_over():
    port = free_port()

    def stranger():
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return connection.recv(100)
            except ConnectionRefusedError:
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stranger)
        with pytest.raises(UserError, match="1 of 2 did not come"):
            hosts.join(f"127.0.0.1:{port}", 2, 0, {}, 1.0)
        assert answer.result(timeout=LIMIT) == b""


def test_exchange_gives_all_values_to_all():
    pairs = [socket.socketpair() for _ in range(2)]
    first = hosts._Star(0, 3, [hosts.Link(i + 1, ours) for i, (ours, _) in enumerate(pairs)])
    others = [hosts._Star(i + 1, 3, [hosts.Link(0, theirs)]) for i, (_, theirs) in enumerate(pairs)]
    stars = [first, *others]
    with ThreadPoolExecutor(3) as pool:
        for value in ("text", 1.5, None, [1, "two"]):
            values = list(pool.map(lambda star: star.exchange([star.process, value]), stars))
            assert values == [[[0, value], [1, value], [2, value]]] * 3
    for star in stars:
        star.over = True
    for link in [link for star in stars for link in star.links]:
        link.close()


def test_one_process_is_the_identity():
    tree = {"a": np.arange(3)}
    assert hosts.exchange(7) == [7] and hosts.gather(tree) is tree
    assert hosts.is_first() and hosts.count() == 1 and hosts.lost() is None
    hosts.leave()
    hosts.abandon("nobody hears this.", 1)


# -- flags and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--coordinator localhost:1234", "--num-processes', '--process-id'"),
        ("--num-processes 2", "--coordinator', '--process-id'"),
        ("--process-id 0 --coordinator localhost:1234", "--num-processes"),
        ("--coordinator localhost:1234 --num-processes 2 --process-id 0 --dry-run", "--dry-run is for one process"),
        ("--coordinator localhost:1234 --num-processes 2 --process-id 0 --parallel a3c", "not run on several hosts"),
        ("--coordinator localhost:1234 --num-processes 2 --process-id 0 --num-devices 3", "among 2 processes"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        script("train").run(flags.split())


@pytest.mark.parametrize("parallel", [name for name, chosen in axes.PARALLEL.items() if chosen.axes.scheme != "fused"])
def test_only_the_fused_scheme_runs_on_several_hosts(parallel):
    schemes.validate(axes.preset(parallel).axes)
    with pytest.raises(UserError, match="does not run on several hosts"):
        schemes.validate(axes.preset(parallel).axes, num_processes=2)


@pytest.fixture
def two_by_two(monkeypatch):
    """The four devices of the tests as if two processes had two each; this is the second."""
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda process: four[2 * process : 2 * process + 2])
    return four


@pytest.mark.parametrize(
    "num_devices, per_agent, members, chosen",
    [
        (None, 2, 1, [0, 2]),  # one agent: a device of each process
        (None, 4, 1, [0, 1, 2, 3]),
        (None, 1, 3, [0, 1, 2, 3]),  # one lane is dead
        (None, 1, 1, [0, 2]),
        (2, 2, 8, [0, 2]),
        (4, 2, 8, [0, 1, 2, 3]),
    ],
)
def test_each_process_gives_equally_many_devices(two_by_two, num_devices, per_agent, members, chosen):
    used = devices.choose(num_devices, per_agent, members)
    assert used == [two_by_two[i] for i in chosen]
    assert used[devices.own(used)] == [two_by_two[i] for i in chosen if i >= 2]


def test_devices_that_processes_cannot_share_are_refused(two_by_two):
    with pytest.raises(UserError, match="among 2 processes"):
        devices.choose(3, 1, 8)
    with pytest.raises(UserError, match="but JAX has 4"):
        devices.choose(6, 1, 8)


@pytest.mark.parametrize("asked, per_agent, members, expected", [(4, 2, 1, 2), (None, 2, 1, 1), (None, 3, 1, 3)])
def test_each_process_makes_its_share_of_cpu_devices(monkeypatch, asked, per_agent, members, expected):
    made = []
    monkeypatch.setattr(devices, "prepare_cpu", lambda count, one_thread_each: made.append(count))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    cli.prepare_backend(Config(), members, asked, per_agent, num_processes=2)
    assert made == [expected]
