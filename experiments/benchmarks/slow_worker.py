"""One slow worker of four: what asynchrony buys.

Workers of a parameter server (A3C's agent on CartPole) whose environments sleep 5 ms before every rollout, one of them
20 ms. Each worker's rate is measured alone, then all four together. Asynchronous throughput should be at least 0.9 of
the sum of the workers' own rates; a synchronous scheme, in which all wait for the slowest, is bound by four times the
slow one's rate. Rates are rollouts per second, compilation apart.

    python experiments/benchmarks/slow_worker.py [--rounds 5]
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import common

SLEEP = (0.005, 0.005, 0.005, 0.020)
TARGET = 0.9


def pool(num_workers: int) -> Callable[[tuple[float, ...], float], float]:
    """rate(sleeps, seconds): rollouts per second of that many workers, all together."""
    import jax

    from jaxdqn.components import make_components
    from jaxdqn.config import Config, HParams
    from jaxdqn.parallel.asynchronous import parameter_server

    config = Config(agent="a2c", num_envs=2, rollout_length=4, n_step=4, hidden_sizes=(32,), learning_starts=0)
    sleeping: tuple[float, ...] = (0.0,) * num_workers

    def fault_hook(worker: int, acted: int) -> None:
        time.sleep(sleeping[worker])

    axes = parameter_server.Axes(workers=num_workers)
    components = make_components(config)
    built, at = parameter_server.build(components, jax.devices()[:1], [0], [HParams()], axes, fault_hook=fault_hook)
    at, _ = built.step(at, built.zero_metrics, 0, 8 * num_workers)

    def rate(sleeps: tuple[float, ...], seconds: float) -> float:
        nonlocal at, sleeping
        sleeping = sleeps
        count = int(seconds * sum(1 / sleep for sleep in sleeps))
        began = time.perf_counter()
        at, _ = built.step(at, built.zero_metrics, 0, count)
        return count / (time.perf_counter() - began)

    return rate


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Rates alone and together, round by round."""
    one, all_together = pool(1), pool(len(SLEEP))
    results = []
    for _ in range(rounds):
        alone = [one((sleep,), seconds / 2) for sleep in SLEEP]
        together = all_together(SLEEP, seconds)
        results.append({"alone": alone, "async": together, "sync_bound": len(SLEEP) * min(alone)})
    return {
        "rounds": results,
        "async_of_sum": common.median([r["async"] / sum(r["alone"]) for r in results]),
        "sync_bound_of_sum": common.median([r["sync_bound"] / sum(r["alone"]) for r in results]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=5, help="measurements of each")
    parser.add_argument("--seconds", type=common.seconds, default=3.0, help="of the measurement together")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds, args.seconds)))
        return
    flags = ["--child", "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    result = common.in_subprocess(__file__, flags, {"PJRT_NPROC": "1"})
    rows = [[i, sum(r["alone"]), r["async"], r["sync_bound"]] for i, r in enumerate(result["rounds"])]
    print(common.table(["round", "sum of rates alone", "async together", "bound of sync"], rows))
    print(
        f"async / sum: {result['async_of_sum']:.2f} (target: {TARGET}); sync's bound: {result['sync_bound_of_sum']:.2f}"
    )
    common.write_result("slow_worker", {"target": TARGET, "sleeps": SLEEP, **result})


if __name__ == "__main__":
    main()
