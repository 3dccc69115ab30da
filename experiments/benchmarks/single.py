"""One agent on CartPole: the library's trainer against `flat_dqn.py`, the same work written flat by hand.

Both run chunks of iterations in one process, in turn, and the median rate of nine rounds is reported, compilation
apart. Two settings, each a process of its own: XLA's default threads, and one thread (PJRT_NPROC=1), which is how the
library runs small networks. Target: at least 0.85 of the flat loop's rate.

    python experiments/benchmarks/single.py [--rounds 9] [--iterations 4000]
"""

import argparse
import json

import common

SETTINGS = {"default threads": None, "one thread": "1"}
TARGET = 0.85


def ours() -> tuple:
    """(loop, state, metrics, hparams) of the trainer in the flat loop's settings."""
    import flat_dqn
    import jax
    import jax.numpy as jnp

    from jaxdqn import replay, training
    from jaxdqn.components import make_agent
    from jaxdqn.config import Config, HParams, replay_rows
    from jaxdqn.environments import registry

    config = Config(
        env="CartPole-v1",
        agent="dqn",
        hidden_sizes=flat_dqn.HIDDEN,
        num_envs=flat_dqn.NUM_ENVS,
        batch_size=flat_dqn.BATCH,
        replay_capacity=flat_dqn.CAPACITY,
    )
    hparams = HParams(
        learning_rate=flat_dqn.LEARNING_RATE,
        gamma=flat_dqn.GAMMA,
        target_period=flat_dqn.TARGET_PERIOD,
        epsilon_begin=flat_dqn.EPSILON_BEGIN,
        epsilon_end=flat_dqn.EPSILON_END,
        epsilon_steps=flat_dqn.EPSILON_STEPS,
    )
    hparams = jax.tree.map(jnp.float32, hparams)
    environment = registry.make(config.env)
    agent = make_agent(config, environment.spec)
    example = training.transition_example(environment.spec, agent)
    ring = replay.uniform(example, replay_rows(config), config.num_envs, config.batch_size, config.n_step)
    trainer = training.make_trainer(environment, agent, ring, config)
    state = jax.jit(trainer.init)(jax.random.key(0), jax.random.key(1), hparams)
    return training.loop(trainer.step), state, trainer.zero_metrics(), hparams


def measure(rounds: int, iterations: int) -> dict:
    """Rates of both loops in this process. Chunks continue each other, so that rings fill and agents learn."""
    import flat_dqn
    import jax
    import numpy as np

    loop, state, metrics, hparams = ours()
    bounds = (np.int32(0), np.int32(1))
    mine, my_compile = common.compiled(loop, state, metrics, hparams, *bounds, donate=(0, 1))
    flat_state = jax.jit(flat_dqn.init)(jax.random.key(0))
    flat, flat_compile = common.compiled(flat_dqn.run, flat_state, *bounds, donate=(0,))
    carry = {"ours": (state, metrics), "flat": flat_state}
    position = {"ours": 0, "flat": 0}

    def chunk(name: str) -> tuple:
        start = position[name]
        position[name] = stop = start + iterations
        return np.int32(start), np.int32(stop)

    def run_ours() -> tuple:
        carry["ours"] = mine(*carry["ours"], hparams, *chunk("ours"))
        return carry["ours"]

    def run_flat() -> tuple:
        carry["flat"] = flat(carry["flat"], *chunk("flat"))
        return carry["flat"]

    seconds = common.interleaved({"ours": run_ours, "flat": run_flat}, rounds)
    steps = iterations * flat_dqn.NUM_ENVS
    return {
        "microseconds_per_iteration": {k: common.median(v) / iterations * 1e6 for k, v in seconds.items()},
        "environment_steps_per_second": {k: steps / common.median(v) for k, v in seconds.items()},
        "compile_seconds": {"ours": my_compile, "flat": flat_compile},
        "ratio_of_rates": common.median_ratio(seconds["flat"], seconds["ours"]),
        "ratios_per_round": [f / o for f, o in zip(seconds["flat"], seconds["ours"], strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=9, help="timed chunks of each loop")
    parser.add_argument("--iterations", type=common.count, default=4_000, help="iterations per chunk")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds, args.iterations)))
        return
    child = ["--child", "--rounds", str(args.rounds), "--iterations", str(args.iterations)]
    results = {
        name: common.in_subprocess(__file__, child, {"PJRT_NPROC": threads}) for name, threads in SETTINGS.items()
    }
    rows = [
        [
            name,
            *(r["microseconds_per_iteration"][k] for k in ("ours", "flat")),
            *(r["environment_steps_per_second"][k] for k in ("ours", "flat")),
            *(r["compile_seconds"][k] for k in ("ours", "flat")),
            r["ratio_of_rates"],
        ]
        for name, r in results.items()
    ]
    header = ["", "us/it ours", "flat", "steps/s ours", "flat", "compile s ours", "flat", "ours / flat"]
    print(common.table(header, rows))
    print(f"target: {TARGET}")
    common.write_result("single", {"target": TARGET, "settings": results})


if __name__ == "__main__":
    main()
