"""What --telemetry costs: runs of presets with and without it, on one core.

Both write a run directory, and take turns; the share is the median over rounds of what a run with it takes longer than
the one beside it, without compilation. A run has --evaluations of the preset's own intervals, at each of which network
and replay are looked at once. Target: 2 % of the time.

    python experiments/benchmarks/telemetry.py [--presets cartpole-pqn] [--rounds 15]
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import common

TARGET = 0.02
PRESETS = ("cartpole", "cartpole-rainbow", "cartpole-pqn")


def seconds(name: str, evaluations: int, telemetry: bool) -> float:
    """Of a run of the preset `name`."""
    import jaxdqn
    from jaxdqn import presets
    from jaxdqn.runs.settings import Settings

    _, config, hparams = presets.preset(name)
    config = config.resolved()  # so that intervals stay those of the whole run
    config = dataclasses.replace(config, total_steps=evaluations * config.eval_interval, final_episodes=0)
    settings = Settings(progress=False, figure=False, telemetry=telemetry)
    with tempfile.TemporaryDirectory() as folder:
        return float(jaxdqn.train(config, hparams, out=folder, settings=settings).summary["run_seconds"])


def measure(names: Sequence[str], evaluations: int, rounds: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for name in names:
        turns = [[seconds(name, evaluations, telemetry) for telemetry in (True, False)] for _ in range(1 + rounds)]
        with_it, without = zip(*turns[1:], strict=True)  # the first warms up
        share = common.median_ratio(with_it, without) - 1
        found[name] = {"share": share, "seconds": {"with": with_it, "without": without}}
    return {"target": TARGET, "evaluations": evaluations, "presets": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--evaluations", type=common.count, default=8, help="in a run")
    parser.add_argument("--rounds", type=common.count, default=9, help="runs of each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.presets, args.evaluations, args.rounds)))
        return
    given = ["--presets", *args.presets, "--evaluations", str(args.evaluations), "--rounds", str(args.rounds)]
    result = common.in_subprocess(__file__, ["--child", *given], {"PJRT_NPROC": "1"})
    rows = [[name, 100 * each["share"]] for name, each in result["presets"].items()]
    print(common.table(["preset", "% of the time"], rows))
    common.write_result("telemetry", result)


if __name__ == "__main__":
    main()
