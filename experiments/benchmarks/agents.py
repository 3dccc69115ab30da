"""One gradient update of every agent that learns from items, against plain DQN's.

The MinAtar network on Breakout's 10 x 10 x 4 bool observations, batch 128, double and dueling off; gradient, optimizer
and target network. All take turns in one process that is pinned to one core and one thread; medians of per-round
ratios. Targets: c51 and hl_gauss at most 1.4 times as long as dqn, qr_dqn 1.7, iqn 2.8, rainbow 2.7 (dueling,
noisy, double).

    python experiments/benchmarks/agents.py [--rounds 9] [--agents c51 iqn]
"""

import argparse
import json
import os
from typing import Any

import common

TARGETS = {"c51": 1.4, "hl_gauss": 1.4, "qr_dqn": 1.7, "iqn": 2.8, "rainbow": 2.7}
BATCH, UPDATES = 128, 10  # of a timed call


def names() -> list[str]:
    """The agents that learn from a `Batch`, but for the one that does not learn."""
    from jaxdqn.agents import AGENTS
    from jaxdqn.base import Batch

    return [name for name, declared in AGENTS.items() if declared.batch is Batch and name != "random"]


def updates(name: str) -> tuple:
    """A call that runs UPDATES updates on one random batch, and the seconds it took to compile."""
    import jax
    import jax.numpy as jnp

    from jaxdqn import learning
    from jaxdqn.base import Batch
    from jaxdqn.components import make_agent
    from jaxdqn.config import Config
    from jaxdqn.environments import registry

    config = Config(env="Breakout-MinAtar", agent=name, batch_size=BATCH)
    agent = make_agent(config, registry.make(config.env).spec)
    hparams = jax.tree.map(jnp.float32, agent.defaults)
    keys = jax.random.split(jax.random.key(0), 5)
    grid = (BATCH, 10, 10, 4)
    batch = Batch(
        observation=jax.random.bernoulli(keys[0], 0.1, grid),
        action=jax.random.randint(keys[1], grid[:1], 0, 3),
        return_m=jax.random.uniform(keys[2], grid[:1]),
        bootstrap_discount=jnp.full(grid[:1], 0.99),
        bootstrap_observation=jax.random.bernoulli(keys[3], 0.1, grid),
        weights=jnp.ones(grid[:1]),
    )

    def run(learner: Any, batch: Batch, hparams: Any, key: jax.Array) -> Any:
        def update(i: jax.Array, learner: Any) -> Any:
            return learning.update(agent, learner, batch, jax.random.fold_in(key, i), hparams)[0]

        return jax.lax.fori_loop(0, UPDATES, update, learner)

    learner = jax.jit(agent.init)(keys[4], hparams)
    program, seconds = common.compiled(run, learner, batch, hparams, keys[4], donate=(0,))
    carry = [learner]

    def call() -> Any:
        carry[0] = program(carry[0], batch, hparams, keys[4])
        return carry[0]

    return call, seconds


def measure(rounds: int, agents: list[str]) -> dict:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    agents = agents or names()
    built = {name: updates(name) for name in dict.fromkeys(["dqn", *agents])}
    seconds = common.interleaved({name: call for name, (call, _) in built.items()}, rounds)
    return {
        "batch": BATCH,
        "agents": {
            name: {
                "milliseconds_per_update": common.median(seconds[name]) / UPDATES * 1e3,
                "of_dqn": common.median_ratio(seconds[name], seconds["dqn"]),
                "target": TARGETS.get(name),
                "compile_seconds": compiling,
            }
            for name, (_, compiling) in built.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=9, help="timed calls of each agent")
    parser.add_argument("--agents", nargs="*", default=[], help="only these, and no file is written")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds, args.agents)))
        return
    child = ["--child", "--rounds", str(args.rounds), "--agents", *args.agents]
    result = common.in_subprocess(__file__, child, {"PJRT_NPROC": "1"})
    rows = [
        [name, each["milliseconds_per_update"], each["of_dqn"], each["target"] or "", each["compile_seconds"]]
        for name, each in result["agents"].items()
    ]
    print(common.table(["one update, one core", "ms", "of dqn's", "target", "compile s"], rows))
    if not args.agents:
        common.write_result("agents", result)


if __name__ == "__main__":
    main()
