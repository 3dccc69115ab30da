"""PQN on Breakout-MinAtar, beside the script of its authors (purejaxql's pqn_minatar.py) on the same settings.

128 environments x 32 steps, 2 epochs of 32 minibatches, the network of both with LayerNorm. One agent on one core, and
two on two cores: ours as a population of two, the peer as two processes, each pinned to one. All take turns chunk by
chunk. The rate is environment steps of all agents together per second, without compilation and evaluation; ratios are
medians over the rounds. Targets: 2.7 for one agent, 2.5 for two.

    python experiments/benchmarks/pqn.py [--agents 1 2] [--rounds 5] [--peer CHECKOUT --peer-python PYTHON]

The peer needs gymnax before 1.0, so an environment of its own; without --peer only our rates are measured.
"""

import argparse
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

TARGETS = {1: 2.7, 2: 2.5}
NUM_ENVS, LENGTH, EPOCHS, MINIBATCHES, TOTAL_STEPS = 128, 32, 2, 32, 10_000_000


def ours(num_agents: int, iterations: int) -> Iterator[Any]:
    """This library: yields its compile seconds, then runs a chunk per `next`."""
    from jaxdqn import agents, presets
    from jaxdqn.components import make_components
    from jaxdqn.parallel.compiled import devices, population, runner

    devices.prepare_cpu(num_agents, one_thread_each=True)
    import jax

    _, config, hparams = presets.preset("minatar-breakout-pqn-paper")
    assert (config.num_envs, config.rollout_length, config.updates_per_iteration, config.batch_size) == (
        (NUM_ENVS, LENGTH, EPOCHS * MINIBATCHES, NUM_ENVS * LENGTH // MINIBATCHES)
    )
    settings = [agents.complete(config, hparams)[1]] * num_agents
    assignment, used = population.assign(num_agents, num_agents), jax.devices()[:num_agents]
    built, states = runner.build(make_components(config), used, 1, assignment, range(num_agents), settings)
    metrics, iteration = built.zero_metrics, 0
    yield built.compile_seconds
    while True:
        states, metrics = jax.block_until_ready(built.step(states, metrics, iteration, iteration + iterations))
        iteration += iterations
        yield None


def peer(checkout: Path, iterations: int) -> Iterator[Any]:
    """The authors' script, one agent: the same. A chunk is a short run of its own."""
    sys.path.insert(0, str(checkout))
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported there at once, and not used
    import jax
    from purejaxql.pqn_minatar import make_train

    config = {
        "ENV_NAME": "Breakout-MinAtar",
        "ENV_KWARGS": {},
        "NUM_ENVS": NUM_ENVS,
        "NUM_STEPS": LENGTH,
        "NUM_EPOCHS": EPOCHS,
        "NUM_MINIBATCHES": MINIBATCHES,
        "TOTAL_TIMESTEPS": NUM_ENVS * LENGTH * iterations,
        "TOTAL_TIMESTEPS_DECAY": TOTAL_STEPS,
        "EPS_START": 1.0,
        "EPS_FINISH": 0.05,
        "EPS_DECAY": 0.1,
        "NORM_TYPE": "layer_norm",
        "LR": 5e-4,
        "LR_LINEAR_DECAY": True,
        "MAX_GRAD_NORM": 10,
        "GAMMA": 0.99,
        "LAMBDA": 0.65,
        "TEST_DURING_TRAINING": False,
        "WANDB_MODE": "disabled",
    }
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 1_000))
    program, compile_seconds = common.compiled(make_train(config), next(keys))
    yield compile_seconds
    for key in keys:
        jax.block_until_ready(program(key))
        yield None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rates of each side by the number of agents, round by round."""
    chunk = ["--iterations", str(args.iterations)]
    mine = [sys.executable, __file__, *chunk, "--side"]
    theirs = [args.peer_python, __file__, *chunk, "--peer", str(args.peer), "--side", "peer"]
    sides = {f"ours {n}": [common.Side([*mine, str(n)], range(n))] for n in args.agents}
    if args.peer:
        sides |= {f"peer {n}": [common.Side(theirs, [core]) for core in range(n)] for n in args.agents}
    compile_seconds = {name: [side.answer()["value"] for side in group] for name, group in sides.items()}
    steps = NUM_ENVS * LENGTH * args.iterations
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + args.rounds):
        for name, group in sides.items():
            for side in group:
                side.ask()
            each = steps * int(name.split()[1]) / len(group)
            rate = sum(each / side.answer()["seconds"] for side in group)
            if turn:  # the first warms up
                rates[name].append(rate)
    for group in sides.values():
        for side in group:
            side.process.kill()
            side.close()
    ratios = {n: common.median_ratio(rates[f"ours {n}"], rates[f"peer {n}"]) for n in args.agents if args.peer}
    return {"targets": TARGETS, "rates": rates, "compile_seconds": compile_seconds, "ratio_of_rates": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, choices=TARGETS, nargs="+", default=[*TARGETS])
    parser.add_argument("--rounds", type=common.count, default=5)
    parser.add_argument("--iterations", type=common.count, default=4, help="of 4,096 steps, in a chunk")
    parser.add_argument("--peer", type=Path, help="checkout of purejaxql")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has its packages")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.serve(peer(args.peer, args.iterations) if args.side == "peer" else ours(int(args.side), args.iterations))
        return
    result = measure(args)
    rows = [[name, common.median(rates)] for name, rates in result["rates"].items()]
    print(common.table(["agents", "steps/s in total"], rows))
    for n, ratio in result["ratio_of_rates"].items():
        print(f"{n} agents, ours / peer: {ratio:.2f} (target: {TARGETS[n]})")
    common.write_result("pqn", result)


if __name__ == "__main__":
    main()
