"""Tabular Q-learning, plain or parallel, measured against value iteration.

    python experiments/tabular.py                                                      plain, FrozenLake-4x4
    python experiments/tabular.py --mdp FourRooms --method partitioned --num-workers 4 --refresh 100
    python experiments/tabular.py --method distributed --coverage part --aggregate visits
    python experiments/tabular.py --method distributed --num-workers 2 --local-steps 5000 --engine ray

MDPs: FrozenLake-4x4, FrozenLake-8x8 (both slippery), FourRooms, DeepSea, Random.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from jaxdqn.config import INT32_MAX, MOST, Config
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.files import paths
from jaxdqn.runs import cli

METHODS = ("q_learning", "partitioned", "distributed")
COVERAGES = ("all", "part")
AGGREGATES = ("equal", "visits", "indicator")
FLAGS_OF = {
    "num_workers": ("partitioned", "distributed"),
    "refresh": ("partitioned",),
    **dict.fromkeys(("local_steps", "aggregate", "coverage"), ("distributed",)),
}
"""The methods that a flag is for, where these are not all."""
POINTS = 50  # of the error curve
CALL = 1_000_000  # updates of a compiled call, which Ctrl-C waits for
MAX_WORKERS = 10_000


@dataclasses.dataclass(frozen=True)
class Args:
    """What to learn, how, and where to keep it."""

    mdp: str = "FrozenLake-4x4"
    """Which MDP; the list is above."""
    method: str = "q_learning"
    """q_learning, partitioned (each owner learns its own states) or distributed (tables are aggregated)."""
    num_workers: int = 4
    """partitioned: owners of states; distributed: workers."""
    refresh: int = 100
    """partitioned: updates of the busiest owner between two refreshes of what owners see of each other."""
    local_steps: int = 100
    """distributed: updates of each worker between two aggregations."""
    aggregate: str = "visits"
    """distributed: equal, visits or indicator."""
    coverage: str = "all"
    """distributed: a worker starts in all states, or only in its part of them."""
    gamma: float = 0.95
    """Discount factor, in [0, 1), at most 0.99999."""
    omega: float = 0.6
    """The n-th update of a pair has step size n^-omega."""
    total_steps: int = 1_000_000
    """Updates in all, over all workers; rounded up to whole rounds."""
    num_devices: int = 1
    """Devices (cores of a CPU) that the learners are spread over."""
    engine: str = "local"
    """Where learners live: local, or ray (a process for each; pip install "jaxdqn[ray]")."""
    ray_address: str | None = None
    """Cluster of --engine ray, HOST:PORT or auto; by default Ray is started on this machine."""
    seed: int = 0
    """Seed of the experience."""
    out: pathlib.Path | None = None
    """Directory of the results, new or empty; by default runs/MDP-METHOD-TIME."""
    quiet: bool = False
    """No progress."""


def check(args: Args, given: set[str]) -> None:
    """Raises `UserError` for what can be seen to be wrong before JAX is there."""
    for name in ("num_workers", "refresh", "local_steps", "total_steps", "num_devices"):
        if not 1 <= getattr(args, name) <= MOST:
            raise UserError(f"{name} is {getattr(args, name)}; it must be at least 1, at most {MOST:,}.")
    if args.num_workers > MAX_WORKERS:
        raise UserError(f"num_workers is {args.num_workers}; it must be at most {MAX_WORKERS:,}.")
    if args.engine != "local" and args.num_devices > 1:
        raise UserError(
            f"num_devices {args.num_devices} is for the local engine; on {args.engine} a learner is a node."
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(f"seed is {args.seed}; it must lie in [0, 2^32).")
    for kind, known in (("method", METHODS), ("coverage", COVERAGES), ("aggregate", AGGREGATES)):
        if getattr(args, kind) not in known:
            raise unknown_name(kind, getattr(args, kind), known)
    for name in sorted(given & FLAGS_OF.keys()):
        if args.method not in FLAGS_OF[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is for --method {' and '.join(FLAGS_OF[name])}, not for {args.method}.")


def check_visits(args: Args, mdp: Any, owner: Any) -> None:
    """Raises `UserError` where pairs would be visited more often than their clocks can count."""
    import numpy as np

    from jaxdqn.tabular.q_learning import MOST_VISITS

    free = ~np.asarray(mdp.terminal)
    pairs = int(free.sum()) * mdp.transition.shape[1]
    if owner is not None and args.method == "distributed" and args.coverage == "part":
        sizes = np.bincount(owner[free])  # a small part is visited as often as a large one
        pairs = int(sizes[sizes > 0].min()) * mdp.transition.shape[1] * args.num_workers
    if args.total_steps > MOST_VISITS * pairs:
        raise UserError(
            f"total_steps {args.total_steps:,} on {args.mdp}: the step sizes of its states and actions count up to "
            f"{MOST_VISITS:,} visits of each; take at most {MOST_VISITS * pairs:,}."
        )


def build(args: Args, mdp: Any) -> tuple[Any, Any]:
    """The method, and the owner of each state where states are divided, else None."""
    import numpy as np

    from jaxdqn.tabular import distributed, partitioned, q_learning

    if args.method == "q_learning":
        return q_learning.q_learning(mdp, args.gamma, args.omega), None
    parted = args.method == "partitioned" or args.aggregate == "indicator" or args.coverage == "part"
    states = len(mdp.terminal)
    owner = partitioned.contiguous(states, args.num_workers) if parted else None
    if args.method == "partitioned":
        return partitioned.partitioned(mdp, owner, args.refresh, args.gamma, args.omega), owner
    owned = None if owner is None else owner == np.arange(args.num_workers)[:, None]
    regions = owned if args.coverage == "part" else np.ones((args.num_workers, states), bool)
    made = distributed.distributed(mdp, regions, args.local_steps, args.aggregate, args.gamma, args.omega, owned)
    return made, owner


@contextlib.contextmanager
def rounds(args: Args, mdp: Any, made: Any) -> Iterator[Any]:
    """run(state, first, num_rounds), on the devices or nodes that were asked for."""
    import jax

    from jaxdqn.parallel.asynchronous import ray_engine
    from jaxdqn.parallel.compiled import devices
    from jaxdqn.tabular import method

    key = jax.random.key(args.seed)
    with ray_engine.running(args.engine, args.ray_address) as cluster:
        if cluster is None:
            yield method.over_devices(made, devices.choose(args.num_devices, 1, args.num_devices), key, mdp)
            return
        from jaxdqn.tabular import on_ray

        yield on_ray.over_nodes(made, cluster, len(made.load), key, mdp, print)


def learn(args: Args, run: Any, made: Any, mdp: Any, optimal: Any) -> tuple[Any, list[dict[str, float]], float]:
    """The learned table, the rows of the error curve, and the seconds that compiling took. Ctrl-C ends it early."""
    import jax

    from jaxdqn.runs.progress import Progress
    from jaxdqn.runs.signals import catch_signals
    from jaxdqn.tabular import planning

    state = made.init()
    began = time.perf_counter()
    jax.block_until_ready(run(state, 0, 1))
    compiled = time.perf_counter() - began
    per_round = int(made.load.sum())
    total = math.ceil(args.total_steps / per_round)
    rows: list[dict[str, float]] = []
    done, seconds = 0, 0.0
    label = f"{args.mdp} {args.method}"
    with catch_signals() as stop, Progress(total * per_round, label, not args.quiet, "error", digits=4) as progress:
        while done < total and not (rows and stop()):
            point = min(done + math.ceil(total / POINTS), total)
            began = time.perf_counter()
            while done < point and not (done and stop()):
                length = min(point - done, max(1, CALL // per_round))
                state, done = jax.block_until_ready(run(state, done, length)), done + length
            seconds += time.perf_counter() - began
            error = float(planning.max_error(made.table(state).q, optimal, mdp.terminal))
            counts = {"rounds": done, "updates": done * per_round, "parallel_updates": done * int(made.load.max())}
            rows.append({**counts, "seconds": seconds, "error": error})
            progress.update(done * per_round, error, final=done == total)
    return made.table(state), rows, compiled


def write(args: Args, out: pathlib.Path, arrays: dict[str, Any], rows: list[dict], summary: dict, cells: Any) -> None:
    """summary.json, metrics.parquet, table.npz and values.png in `out`."""
    import numpy as np
    import pandas as pd

    from jaxdqn.files.paths import write_atomically, write_text
    from jaxdqn.tabular import drawing

    frame = pd.DataFrame(rows)
    title = f"{args.mdp}, {args.method}, gamma {args.gamma:g}: error {summary['error']:.4f}"
    values, owner = arrays["q"].max(axis=1), arrays.get("owner")
    figure = drawing.picture(frame.updates, frame.error, title, values, arrays["terminal"], cells, owner)
    write_atomically(out / "metrics.parquet", lambda path: frame.to_parquet(path, index=False))
    write_atomically(out / "table.npz", lambda path: np.savez(path, **arrays))
    write_atomically(out / "values.png", lambda path: figure.savefig(path, dpi=120))
    text = json.dumps(summary, indent=2) + "\n"
    write_text(out / "summary.json", text)


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    check(args, cli.given(arguments))
    # One update at a time is all a table needs: an accelerator would only launch kernels.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cli.prepare_backend(Config(), 1, args.num_devices, 1)
    import jax
    import numpy as np

    from jaxdqn.runs import directory
    from jaxdqn.runs.provenance import provenance
    from jaxdqn.tabular import mdp as mdps
    from jaxdqn.tabular import planning

    mdp, cells = mdps.make(args.mdp), mdps.cells(args.mdp)
    optimal = planning.value_iteration(mdp, args.gamma)
    made, owner = build(args, mdp)
    check_visits(args, mdp, owner)
    if args.total_steps / int(made.load.sum()) > INT32_MAX:
        raise UserError(f"total_steps {args.total_steps:,} are more than {INT32_MAX:,} rounds; take longer ones.")
    stem = pathlib.Path("runs") / f"{args.mdp}-{args.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with paths.fresh(stem) if args.out is None else contextlib.nullcontext(args.out) as out, directory.create(out):
        present = sorted(item.name for item in out.iterdir() if item.name != ".lock")
        if present:
            raise UserError(f"{out} is not empty ({present[0]}, ...); choose another --out.")
        with rounds(args, mdp, made) as advance:
            table, rows, compiled = learn(args, advance, made, mdp, optimal)
        last = rows[-1]
        arrays = {"q": table.q, "counts": table.counts, "optimal": optimal, "terminal": mdp.terminal}
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        summary = {
            "status": "finished" if last["updates"] >= args.total_steps else "interrupted",
            **{name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "quiet")},
            **last,
            "run_seconds": last["seconds"],
            "compile_seconds": compiled,
            "load": made.load.tolist(),
            "start_value": float((arrays["q"].max(axis=1) * np.asarray(mdp.start)).sum()),
            "start_value_optimal": float((arrays["optimal"].max(axis=1) * np.asarray(mdp.start)).sum()),
            **provenance(jax.devices()[: args.num_devices]),
        }
        write(args, out, arrays if owner is None else {**arrays, "owner": owner}, rows, summary, cells)
    return report(summary, out)


def report(summary: dict[str, Any], out: pathlib.Path) -> int:
    """The last lines a user reads; returns the exit code."""
    finished, load = summary["status"] == "finished", summary["load"]
    shares = f", load of its {len(load)} learners {min(load)}-{max(load)} a round" if len(load) > 1 else ""
    cli.say(
        f"{'' if finished else 'interrupted: '}{summary['mdp']}, {summary['method']}: error {summary['error']:.4f} "
        f"(max-norm against value iteration) after {summary['updates']:,} updates in {summary['run_seconds']:.1f} s "
        f"(compiled in {summary['compile_seconds']:.1f} s){shares}"
    )
    cli.say(f"values: {out / 'values.png'}")
    return 0 if finished else 130


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
