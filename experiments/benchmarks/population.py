"""A population of 64 CartPole agents on two cores against the sum of two agents pinned one per core at the same time.

Every measurement is a process of its own that compiles first and then trains for a fixed time; the two kinds take turns
and the ratio is the median over rounds. Settings: those of `flat_dqn.py` (preset cartpole-reference). Target: 0.8.

    python experiments/benchmarks/population.py [--rounds 5] [--members 64] [--seconds 6]
"""

import argparse
import json
import os
import subprocess
import sys
import time

import common

TARGET = 0.8
CHUNK = 200  # iterations of each member per call, about what the driver takes


def train(num_members: int, num_devices: int, seconds: float, begin: float) -> dict:
    """Environment steps a second of all members together, over `seconds` from wall time `begin` on."""
    import jax
    import numpy as np

    from jaxdqn import presets
    from jaxdqn.components import make_components
    from jaxdqn.parallel.compiled import devices, population, runner
    from jaxdqn.timeline import timeline

    devices.prepare_cpu(num_devices, one_thread_each=True)
    preset = presets.preset("cartpole-reference")
    components = make_components(preset.config)
    assignment = population.assign(num_members, num_devices)
    seeds, settings = list(range(num_members)), [preset.hparams] * num_members
    built, states = runner.build(components, jax.devices()[:num_devices], 1, assignment, seeds, settings)
    iteration = timeline(preset.config).prefill
    states, metrics = built.prefill(states, built.zero_metrics, 0, iteration)
    jax.block_until_ready(metrics)
    time.sleep(max(0.0, begin - time.time()))
    start, first = time.perf_counter(), iteration
    while time.perf_counter() - start < seconds:
        states, metrics = built.step(states, metrics, iteration, iteration + CHUNK)
        jax.block_until_ready(metrics)
        iteration += CHUNK
    elapsed = time.perf_counter() - start
    steps = (iteration - first) * preset.config.num_envs * num_members
    final = runner.gather(metrics)
    assert np.isfinite(final.learning["loss"]).all()
    return {"steps_per_second": steps / elapsed, "seconds": elapsed, "compile_seconds": built.compile_seconds}


def child(members: int, devices: int, seconds: float, begin: float, core: int | None) -> subprocess.Popen:
    """Starts `train` in a process, pinned to `core`."""
    spec = json.dumps([members, devices, seconds, begin])
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    command = [sys.executable, __file__, "--child", spec]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, preexec_fn=pin, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> dict:
    """The JSON a child printed last."""
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError("a measuring process failed")
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=5)
    parser.add_argument("--members", type=common.count, default=64)
    parser.add_argument("--seconds", type=common.seconds, default=6.0)
    parser.add_argument(
        "--lead", type=common.seconds, default=25.0, help="seconds given to two processes to start and compile"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(train(*json.loads(args.child))))
        return
    rounds = []
    for _ in range(args.rounds):
        begin = time.time() + args.lead
        pair = [child(1, 1, args.seconds, begin, core) for core in (0, 1)]
        alone = [outcome(process)["steps_per_second"] for process in pair]
        together = outcome(child(args.members, 2, args.seconds, 0.0, None))
        rounds.append({"two_agents": alone, "population": together, "ratio": together["steps_per_second"] / sum(alone)})
    ratio = common.median([entry["ratio"] for entry in rounds])
    rows = [[i, sum(r["two_agents"]), r["population"]["steps_per_second"], r["ratio"]] for i, r in enumerate(rounds)]
    print(common.table(["round", "two agents, steps/s", f"population of {args.members}", "ratio"], rows))
    print(f"median ratio {ratio:.3f}, target {TARGET}")
    numbers = {"target": TARGET, "members": args.members, "median_ratio": ratio, "rounds": rounds}
    common.write_result("population", numbers)


if __name__ == "__main__":
    main()
