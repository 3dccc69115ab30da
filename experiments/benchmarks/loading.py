"""Seconds to load many runs into one DataFrame: by default 1,000 runs of 1,000 rows, in a temporary folder.

    python experiments/benchmarks/loading.py [--runs 1000] [--rows 1000] [--parts 1 10] [--rounds 5]

The runs are copies of a few, linked: the files are as many as in earnest, and all of them in the disk cache.
"""

import argparse
import math
import os
import pathlib
import tempfile
import time
from typing import Any

import common

CONFIG = {
    "config": {
        "env": "CartPole-v1",
        "env_params": {},
        "env_kwargs": {},
        "agent": "dqn",
        "num_envs": 16,
        **{f"option_{i}": 0.5 * i for i in range(25)},
    },
    "hparams": {f"hyperparameter_{i}": 1e-3 * i for i in range(15)},
    "seeds": [0, 1, 2, 3],
    "axes": {"scheme": "fused", **{f"axis_{i}": i for i in range(12)}},
    "versions": {f"package_{i}": "1.2.3" for i in range(10)},
    "commit": "0123456789ab",
    "device": "1 x cpu (cpu)",
}
METRICS = ("episodes", "episode_return", "episode_length", "eval_return", "eval_length", "loss", "q_mean", "epsilon")
MEMBERS = 4


def write_run(path: pathlib.Path, rows: int, parts: int) -> None:
    """A run directory of `rows` rows of four members, flushed in `parts` files; an evaluation every fifth row."""
    import numpy as np
    import pandas as pd
    import yaml

    (path / "metrics.parquet").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    (path / "summary.json").write_text('{"status": "finished"}', encoding="utf-8")
    point, rng = np.arange(rows) // MEMBERS, np.random.default_rng(0)
    frame = pd.DataFrame(
        {"member": np.arange(rows) % MEMBERS, "seed": np.arange(rows) % MEMBERS, "learning_rate": 1e-3}
        | {"iteration": point * 50, "env_steps": point * 800, "updates": point * 50, "seconds": point * 0.1}
        | {name: rng.normal(size=rows) for name in METRICS}
    )
    frame.loc[point % 5 > 0, "eval_return"] = math.nan
    for index, chosen in enumerate(np.array_split(np.arange(rows), parts)):
        frame.iloc[chosen].to_parquet(path / "metrics.parquet" / f"part-0000-{index:012d}.parquet", index=False)


def link_run(source: pathlib.Path, path: pathlib.Path) -> None:
    """`path` as a copy of the run `source` that takes no room."""
    (path / "metrics.parquet").mkdir(parents=True)
    for file in source.rglob("*"):
        if file.is_file():
            os.link(file, path / file.relative_to(source))


def measure(root: pathlib.Path, args: Any, parts: int) -> list[float]:
    """Seconds of each load of runs that were flushed in `parts` files."""
    from jaxdqn.analysis import loading

    write_run(root / "run-0000", args.rows, parts)
    for index in range(1, args.runs):
        link_run(root / "run-0000", root / f"run-{index:04d}")
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        frame = loading.load(root)
        seconds.append(time.perf_counter() - start)
        assert len(frame) == args.runs * args.rows
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("runs", 1000), ("rows", 1000), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=common.count, default=value)
    parser.add_argument("--parts", type=common.count, nargs="+", default=[1, 10], help="files of each run's metrics")
    args = parser.parse_args()
    seconds = {}
    for parts in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            seconds[f"{parts} parts"] = measure(pathlib.Path(folder), args, parts)
        median = common.median(seconds[f"{parts} parts"])
        print(f"{args.runs} runs of {args.rows} rows, metrics in {parts} files each: median {median:.2f} s")
    common.write_result("loading", {"runs": args.runs, "rows": args.rows, "seconds": seconds})


if __name__ == "__main__":
    main()
