"""A sweep of 64 trials x 4 seeds on CartPole, 50,000 steps each: as one population, and as 256 processes.

The processes run two at a time, one pinned to each core, with a warm compilation cache; a subset is measured and
extrapolated. The population is measured in whole, with its start-up. Target: 3 x faster.

    python experiments/benchmarks/sweep.py [--processes 12] [--members 256]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = common.HERE.parents[1]
SWEEP = ROOT / "experiments" / "sweeps" / "cartpole-response.yaml"
CORES = 2


def population(folder: Path, trials: int) -> dict:
    """Seconds of sweep.py in whole, and of its training alone."""
    import yaml

    values = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    values["sampler"]["trials"] = trials
    values["winners"] = {"trials": 0}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), str(folder / "sweep.yaml"), "--quiet"]
    began = time.perf_counter()
    subprocess.run([*command, "--out", str(folder / "sweep")], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    runs = list((folder / "sweep" / "runs").iterdir())
    summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "training": summary["run_seconds"], "groups": len(runs)}


def processes(folder: Path, count: int) -> dict:
    """Seconds of `count` runs of train.py, two at a time, each pinned to a core; and the share that is no training."""
    flags = "--env CartPole-v1 --total-steps 50000 --log-interval 2500 --eval-interval 2500 --eval-episodes 10"
    flags += " --hparams.epsilon-steps 20000 --hparams.learning-rate-end 1.0 --no-tensorboard --quiet"

    def start(index: int, core: int) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "experiments" / "train.py"), *flags.split(), "--seed", str(index)]
        return subprocess.Popen(
            [*command, "--out", str(folder / f"run-{index}")],
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            stdout=subprocess.DEVNULL,
        )

    for index in range(CORES):  # the cache
        assert start(10_000 + index, index).wait() == 0
    began, waiting = time.perf_counter(), list(range(count))[::-1]
    running = {core: start(waiting.pop(), core) for core in range(CORES)}
    busy = 0.0
    while running:
        for core, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0
                del running[core]
                if waiting:
                    running[core] = start(waiting.pop(), core)
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    for index in range(count):
        busy += json.loads((folder / f"run-{index}" / "summary.json").read_text(encoding="utf-8"))["run_seconds"]
    return {"seconds": seconds, "count": count, "training_share": busy / (CORES * seconds)}


def main() -> None:
    """Prints both and their ratio, and writes results/sweep.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=common.count, default=12, help="measured, of 256")
    parser.add_argument("--members", type=common.count, default=256, help="of the population; 256 is the whole sweep")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        apart = processes(Path(folder), args.processes)
        together = population(Path(folder), args.members // 4)
    per_run = apart["seconds"] / args.processes
    result = {
        "members": args.members,
        "population": together,
        "processes": apart,
        "processes_seconds_extrapolated": per_run * args.members,
        "ratio": per_run * args.members / together["seconds"],
    }
    startup = 100 * (1 - apart["training_share"])
    print(
        f"{args.members} runs as one population: {together['seconds']:.0f} s, {together['training']:.0f} s of it "
        f"training\nas processes, two at a time: {per_run * args.members:.0f} s (from {args.processes}: "
        f"{apart['seconds']:.0f} s; {startup:.0f} % of it start-up)\nratio: {result['ratio']:.1f} (target: 3)"
    )
    if args.members == 256:
        common.write_result("sweep", result)


if __name__ == "__main__":
    main()
