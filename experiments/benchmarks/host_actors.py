"""Actors on the host: whether they keep up with their environments.

1. Pong through actor threads that act at random, without a forward pass and with a learner that only inserts, against
   ALE's own vector environments stepped in a loop in as many threads. Target: 0.9 of their steps a second. What an
   actor does besides, in each step and after each rollout, takes about as long for eight environments as for more.
2. A Gymnasium environment that sleeps 5 ms in every step: four actors against one. Target: 3.6 times as many steps.
3. Pong with network and learner: steps and updates a second, and who waits for whom, in seconds of a second and thread.

Candidates take turns; medians of their ratios. Needs ale-py: pip install -e ".[atari]".

    python experiments/benchmarks/host_actors.py [--rounds 5]
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import common

ACTORS, EACH, LENGTH = 2, 8, 4
# Actor threads, environments of each, T. With one thread the learner has a core of its own on a machine of two.
PONG = ((ACTORS, EACH, LENGTH), (ACTORS, 32, LENGTH), (1, 32, LENGTH), (1, 32, 16))
SLEEP = 0.005
TARGETS = {"pong": 0.9, "sleeping": 3.6}


def through_actors(
    env: str, env_kwargs: dict, workers: int, each: int, length: int, agent: str
) -> Callable[[int, bool], Any]:
    """run(iterations, learning): the scheme, as far as so many iterations of all actors; its metrics."""
    import jax

    from jaxdqn.components import make_components
    from jaxdqn.config import Config, HParams
    from jaxdqn.parallel.asynchronous import actor_learner

    config = Config(
        env=env,
        env_kwargs=env_kwargs,
        agent=agent,
        num_envs=workers * each,
        rollout_length=length,
        batch_size=32,
        replay_capacity=20_000,
        learning_starts=8 * length * workers * each,
        total_steps=10_000_000,
    )
    axes = actor_learner.Axes(workers=workers, merge_every=2, slack=8, coupling="async")
    built, at = actor_learner.build(make_components(config), jax.devices()[:1], [0], [HParams()], axes)
    at, done = built.prefill(at, built.zero_metrics, 0, 8)[0], 8

    def run(iterations: int, learning: bool) -> Any:
        nonlocal at, done
        at, metrics = (built.step if learning else built.prefill)(at, built.zero_metrics, done, done + iterations)
        done += iterations
        return jax.device_get(metrics[0])

    return run


def bare(workers: int, each: int) -> Callable[[int], None]:
    """run(steps): ALE's vector environments alone, each in a thread of its own."""
    import numpy as np
    from ale_py.vector_env import AtariVectorEnv

    options = {"autoreset_mode": "SameStep", "noop_max": 0, "use_fire_reset": False, "reward_clipping": False}
    environments = [AtariVectorEnv("pong", each, stack_num=1, num_threads=1, **options) for _ in range(workers)]
    for environment in environments:
        environment.reset(seed=0)

    def walk(environment: Any, steps: int) -> None:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            environment.step(rng.integers(0, 6, each))

    def run(steps: int) -> None:
        threads = [threading.Thread(target=walk, args=(environment, steps)) for environment in environments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def sleeping() -> None:
    """Registers Sleeping-v0."""
    import gymnasium
    import numpy as np

    class Sleeping(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: Any = None, options: Any = None) -> tuple:
            return np.zeros(4, np.float32), {}

        def step(self, action: int) -> tuple:
            time.sleep(SLEEP)
            return np.zeros(4, np.float32), 0.0, False, False, {}

    gymnasium.register("Sleeping-v0", Sleeping)


def at_random(workers: int, each: int, length: int, rounds: int, seconds: float) -> dict[str, Any]:
    rollouts = int(150 * seconds) * EACH // each // length
    steps = rollouts * length
    actors = through_actors("ALE/Pong-v5", {"protocol": "bare"}, workers, each, length, "random")
    alone = bare(workers, each)
    took = common.interleaved({"actors": lambda: actors(rollouts, False), "bare": lambda: alone(steps)}, rounds)
    return {
        "actors": workers,
        "environments_of_each": each,
        "rollout_length": length,
        "steps_per_second": {name: workers * each * steps / common.median(took[name]) for name in took},
        "ratio": common.median_ratio(took["bare"], took["actors"]),
    }


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    pong = [at_random(*case, rounds, seconds) for case in PONG]
    sleeping()
    count = int(seconds / SLEEP) // LENGTH
    four, one = (through_actors("gymnasium/Sleeping-v0", {}, workers, 1, LENGTH, "dqn") for workers in (4, 1))
    slept = common.interleaved({"four": lambda: four(count, False), "one": lambda: one(count, False)}, rounds)
    learn = through_actors("ALE/Pong-v5", {"protocol": "bare"}, ACTORS, EACH, LENGTH, "dqn")
    learn(8, True)
    iterations, began = int(8 * seconds), time.perf_counter()
    metrics = learn(iterations, True)
    elapsed = time.perf_counter() - began
    return {
        "pong": pong,
        "sleeping": {"ratio": 4 * common.median_ratio(slept["one"], slept["four"])},
        "learning": {
            "steps_per_second": iterations * LENGTH * ACTORS * EACH / elapsed,
            "updates_per_second": float(metrics.updates) / elapsed,
            **{
                f"{name}_share": float(metrics.seen[f"{name}_seconds"]) / elapsed / threads
                for name, threads in (("actor_wait", ACTORS), ("queue_wait", ACTORS), ("learner_wait", 1))
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=5, help="timed calls of each")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long one of them takes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds, args.seconds)))
        return
    flags = ["--child", "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    result = common.in_subprocess(__file__, flags, {"PJRT_NPROC": "1"})
    learning = result["learning"]
    rows = [
        [
            f"{case['actors']} x {case['environments_of_each']}, {case['rollout_length']}",
            *case["steps_per_second"].values(),
            case["ratio"],
        ]
        for case in result["pong"]
    ]
    print(
        common.table(
            ["Pong at random, actors x environments, steps of a rollout", "steps/s", "ALE alone", "ratio"], rows
        )
    )
    print(f"target of the ratio: {TARGETS['pong']}")
    print(f"four sleeping actors / one: {result['sleeping']['ratio']:.2f} (target {TARGETS['sleeping']})")
    waits = ", ".join(f"{name} {100 * share:.0f} %" for name, share in learning.items() if name.endswith("_share"))
    print(
        f"with network and learner: {learning['steps_per_second']:,.0f} steps/s, {learning['updates_per_second']:.1f} "
        f"updates/s; of the time: {waits}"
    )
    common.write_result("host_actors", {"targets": TARGETS, **result})


if __name__ == "__main__":
    main()
