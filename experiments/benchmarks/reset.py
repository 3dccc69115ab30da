"""What gymnax's auto-reset costs: it resets every environment in every step and selects the result where one ended.

For several environments, one step of N = 16 as the library takes it, against the same step without any reset (which
no correct loop could do): the difference is the most that a cheaper auto-reset could save. Beside it one whole
training iteration (act, store, sample, update) of the environment's preset network and batch, for the share. One
thread, interleaved, medians.

    python experiments/benchmarks/reset.py [--rounds 9]
"""

import argparse
import dataclasses
import json
from typing import Any

import common

ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1", "Catch-bsuite", "FourRooms-misc", "Breakout-MinAtar", "Seaquest-MinAtar")
NUM_ENVS, STEPS = 16, 2_000


def stepping(name: str, reset: bool) -> tuple[Any, Any]:
    """A program that takes STEPS steps of NUM_ENVS environments with random actions, and its first state."""
    import gymnax
    import jax

    env, params = gymnax.make(name)
    num_actions = env.action_space(params).n
    step = env.step if reset else env.step_env

    def body(index: Any, state: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), NUM_ENVS + 1)
        action = jax.random.randint(keys[0], (NUM_ENVS,), 0, num_actions)
        after = jax.vmap(step, in_axes=(0, 0, 0, None))(keys[1:], state, action, params)[1]
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    _, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(jax.random.split(jax.random.key(1), NUM_ENVS), params)
    return common.compiled(lambda state: jax.lax.fori_loop(0, STEPS, body, state), state)[0], state


def training_iterations(name: str) -> tuple[Any, int]:
    """A call that runs some training iterations of the environment's preset, and how many."""
    import jax
    import numpy as np

    from jaxdqn import presets
    from jaxdqn.components import make_components
    from jaxdqn.parallel.compiled import population, runner

    chosen = presets.for_environment(name)
    config = dataclasses.replace(chosen.config, num_envs=NUM_ENVS, replay_capacity=16_000)
    components = make_components(config)
    built, states = runner.build(components, jax.devices()[:1], 1, population.assign(1, 1), [0], [chosen.hparams])
    count, carry = 200, built.prefill(states, built.zero_metrics, 0, 1_000)

    def call() -> Any:
        nonlocal carry
        carry = built.step(*carry, np.int32(1_000), np.int32(1_000 + count))
        return carry[1]

    return call, count


def measure(rounds: int) -> dict[str, Any]:
    """Microseconds per step of NUM_ENVS environments and per training iteration, for each environment."""
    results = {}
    for name in ENVIRONMENTS:
        with_reset, state = stepping(name, reset=True)
        without, _ = stepping(name, reset=False)
        iterate, count = training_iterations(name)
        calls = {
            "with reset": lambda: with_reset(state),
            "without": lambda: without(state),
            "iteration": iterate,
        }
        seconds = common.interleaved(calls, rounds)
        each = {"with reset": STEPS, "without": STEPS, "iteration": count}
        micro = {key: common.median(values) / each[key] * 1e6 for key, values in seconds.items()}
        share = (micro["with reset"] - micro["without"]) / micro["iteration"]
        results[name] = {"microseconds": micro, "reset_share_of_iteration": share}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=9, help="timed calls of each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds)))
        return
    results = common.in_subprocess(__file__, ["--child", "--rounds", str(args.rounds)], {"PJRT_NPROC": "1"})
    rows = [
        [name, *result["microseconds"].values(), f"{100 * result['reset_share_of_iteration']:.1f} %"]
        for name, result in results.items()
    ]
    print(common.table([f"N = {NUM_ENVS}", "us/step", "no reset", "us/iteration", "reset's share"], rows))
    common.write_result("reset", {"num_envs": NUM_ENVS, "environments": results})


if __name__ == "__main__":
    main()
