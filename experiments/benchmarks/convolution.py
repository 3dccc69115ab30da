"""Convolutions as patches times a matrix against XLA's own, one core.

One gradient update (gradient, optimizer, target network) of double DQN in a loop, as training has it: on Breakout's
10 x 10 x 4 bool observations (MinAtar network), batch 512 and 32, for one agent and for a vmapped population of 8; and
on Atari's 84 x 84 x 4 bytes (Nature network) and octax' 32 x 64 x 4 bits (NIPS network), batch 32. Both methods take
turns in one process that is pinned to one core and one thread; medians. Targets at batch 512: patches at least 4 times
as fast as "lax", and the population keeps that gain. Also the bytes a transition of Breakout takes in a replay of a
million.

    python experiments/benchmarks/convolution.py [--rounds 9]
"""

import argparse
import json
import os
from typing import Any

import common

TARGET = 4.0
METHODS = ("patches", "lax")
MINATAR, ATARI, OCTAX = ((10, 10, 4), "bool"), ((84, 84, 4), "uint8"), ((32, 64, 4), "bool")
CASES = {  # name: (observation, batch, members, updates per timed call)
    "batch 512": (MINATAR, 512, 1, 3),
    "batch 32": (MINATAR, 32, 1, 30),
    "batch 512, population of 8": (MINATAR, 512, 8, 1),
    "batch 32, population of 8": (MINATAR, 32, 8, 6),
    "Atari, batch 32": (ATARI, 32, 1, 1),
    "octax, batch 32": (OCTAX, 32, 1, 2),
}
CAPACITY = 1_000_000


def config_of(method: str, batch_size: int) -> Any:
    from jaxdqn.config import Config

    return Config(
        env="Breakout-MinAtar",
        agent="double_dqn",
        convolution=method,
        batch_size=batch_size,
        loss="huber",
        replay_capacity=CAPACITY,
    )


def updates(method: str, seen: tuple, batch_size: int, members: int, repeats: int) -> tuple:
    """A call that runs `repeats` updates on one random batch per member, and the seconds it took to compile."""
    import jax
    import jax.numpy as jnp

    from jaxdqn import learning
    from jaxdqn.base import Batch, Spec
    from jaxdqn.components import make_agent
    from jaxdqn.config import HParams

    shape, dtype = seen
    agent = make_agent(config_of(method, batch_size), Spec("images", jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), 3))
    hparams = jax.tree.map(jnp.float32, HParams())

    def init(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 5)
        grid = (batch_size, *shape)
        batch = Batch(
            observation=jax.random.bernoulli(keys[0], 0.1, grid).astype(dtype),
            action=jax.random.randint(keys[1], grid[:1], 0, 3),
            return_m=jax.random.uniform(keys[2], grid[:1]),
            bootstrap_discount=jnp.full(grid[:1], 0.99),
            bootstrap_observation=jax.random.bernoulli(keys[3], 0.1, grid).astype(dtype),
            weights=jnp.ones(grid[:1]),
        )
        return agent.init(keys[4], hparams), batch

    def run(learner: Any, batch: Batch, key: jax.Array) -> Any:
        return jax.lax.fori_loop(
            0, repeats, lambda i, carry: learning.update(agent, carry, batch, key, hparams)[0], learner
        )

    keys = jax.random.split(jax.random.key(0), members)
    learner, batch = jax.jit(jax.vmap(init))(keys)
    if members == 1:
        keys, learner, batch = jax.tree.map(lambda x: x[0], (keys, learner, batch))
    program, seconds = common.compiled(run if members == 1 else jax.vmap(run), learner, batch, keys, donate=(0,))
    carry = [learner]

    def call() -> Any:
        carry[0] = program(carry[0], batch, keys)
        return carry[0]

    return call, seconds


def bytes_per_transition() -> float:
    """Of a Breakout replay of CAPACITY transitions, from shapes alone."""
    import jax

    from jaxdqn.components import make_components

    state = jax.eval_shape(make_components(config_of("patches", 32)).replay.init)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / state.reward.size


def measure(rounds: int) -> dict:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = {}
    for name, (seen, batch_size, members, repeats) in CASES.items():
        built = {method: updates(method, seen, batch_size, members, repeats) for method in METHODS}
        seconds = common.interleaved({method: call for method, (call, _) in built.items()}, rounds)
        results[name] = {
            "milliseconds_per_update": {m: common.median(v) / repeats * 1e3 for m, v in seconds.items()},
            "compile_seconds": {m: built[m][1] for m in METHODS},
            "speedup": common.median_ratio(seconds["lax"], seconds["patches"]),
        }
    return {"target": TARGET, "cases": results, "replay_bytes_per_transition": bytes_per_transition()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=9, help="timed calls of each method")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds)))
        return
    result = common.in_subprocess(__file__, ["--child", "--rounds", str(args.rounds)], {"PJRT_NPROC": "1"})
    rows = [
        [name, *(case["milliseconds_per_update"][m] for m in METHODS), case["speedup"]]
        for name, case in result["cases"].items()
    ]
    print(common.table(["one update, one core", "patches ms", "lax ms", "lax / patches"], rows))
    print(f"target at batch 512: {TARGET}")
    print(f"replay of {CAPACITY:,} Breakout transitions: {result['replay_bytes_per_transition']:.1f} bytes each")
    common.write_result("convolution", result)


if __name__ == "__main__":
    main()
