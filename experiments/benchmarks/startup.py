"""How long until the first metrics: train.py in fresh processes, with an empty compilation cache and with a full one.

Targets for the second start: tracing and cached compilation under 3 s, first metrics under 10 s in all. Imports apart.

    python experiments/benchmarks/startup.py [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

IMPORTS = """
import json, time
began = time.perf_counter()
import jax, gymnax, optax, flax, pandas, tensorboardX, tyro
print(json.dumps(time.perf_counter() - began))
"""
# gymnax touches the backend when imported, which must be set up before: imports are timed in a process of their own.
CHILD = """
import json, sys, time
began = time.perf_counter()
sys.path.insert(0, "experiments")
import train
from jaxdqn.runs import session
first = []
original = session.Session._on_point
def on_point(self, *args):
    first.append(time.perf_counter())
    return original(self, *args)
session.Session._on_point = on_point
train.run(["--quiet", "--total-steps", "50000", "--out", sys.argv[1]])
summary = json.load(open(sys.argv[1] + "/summary.json", encoding="utf-8"))
print(json.dumps({"compile": summary["compile_seconds"], "first_metrics": first[0] - began}))
"""


def start(cache: str, out: str) -> dict:
    """One start of the script in a fresh process."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDQN_CACHE": cache}

    def child(*arguments: str) -> Any:
        command = [sys.executable, "-c", *arguments]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    imports = child(IMPORTS)
    began = time.perf_counter()
    return {"imports": imports, **child(CHILD, out), "whole_process": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = f"{folder}/cache"
        first = start(cache, f"{folder}/first")
        later = [start(cache, f"{folder}/{i}") for i in range(args.rounds)]
    second = {name: common.median([entry[name] for entry in later]) for name in first}
    names = list(first)
    rows = [["empty cache", *first.values()], ["full cache, median", *second.values()]]
    print(common.table(["seconds", *names], rows))
    print("targets for a full cache: compile < 3, first_metrics < 10")
    common.write_result("startup", {"targets": {"compile": 3, "first_metrics": 10}, "first": first, "second": second})


if __name__ == "__main__":
    main()
