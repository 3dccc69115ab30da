"""Prioritised replay against flashbax's prioritised buffer: add, sample and update, one core.

Full buffers of 2^17 and 2^20 CartPole transitions; in a compiled loop with donated state one transition is added, a
batch of 32, 128 or 512 drawn, and its priorities changed. Both take turns in one process that is pinned to one core and
one thread; medians. Target at 2^20 and 128: at most 0.7 of the time. Also what adding two transitions at once costs
against one: at most 2.2 times.

    pip install -e ".[benchmarks]" -c constraints.txt
    python experiments/benchmarks/prioritised.py [--rounds 9]
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import common

TARGET, ADD_TARGET = 0.7, 2.2
SIZES, BATCHES, TURNS, CHUNK = (2**17, 2**20), (32, 128, 512), 200, 2**13


def transitions(count: int) -> Any:
    """[count, 1] transitions like CartPole's."""
    import jax
    import jax.numpy as jnp

    from jaxdqn.base import Transition

    keys = jax.random.split(jax.random.key(0), 3)
    end = jax.random.bernoulli(keys[0], 0.02, (count, 1))
    seen, then = (jax.random.normal(key, (count, 1, 4)) for key in keys[1:])
    action = jax.random.randint(keys[0], (count, 1), 0, 2)
    return Transition(seen, action, jnp.ones((count, 1)), 1.0 - end, then, end)


def in_turns(one: Callable[..., Any], state: Any) -> Callable[[], Any]:
    """A call that repeats one(turn, state) TURNS times."""
    import jax
    import jax.numpy as jnp

    def run(state: Any, first: Any) -> Any:
        return jax.lax.fori_loop(first, first + TURNS, one, state)

    carry, program = [state, 0], common.compiled(run, state, jnp.int32(0), donate=(0,))[0]

    def call() -> Any:
        carry[0], carry[1] = program(carry[0], jnp.int32(carry[1])), carry[1] + TURNS
        return carry[0]

    return call


def ours(size: int, batch: int, added: int, whole: bool) -> Callable[[], Any]:
    """Adds `added` transitions in each turn, and, as a `whole`, also samples and updates."""
    import jax
    import jax.numpy as jnp

    from jaxdqn import replay
    from jaxdqn.base import Progress
    from jaxdqn.config import HParams

    hparams, block = jax.tree.map(jnp.float32, HParams()), transitions(added)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), block)
    record = replay.prioritised(example, size, 1, batch)

    def one(turn: Any, state: Any) -> Any:
        state = record.add(state, block, size + turn * added, hparams)
        if not whole:
            return state
        key = jax.random.fold_in(jax.random.key(1), turn)
        drawn = record.sample(state, key, Progress(size + turn, turn, jnp.int32(0)), hparams)
        errors = jnp.abs(drawn.observation[:, 0]) * drawn.weights
        return record.update_priorities(state, drawn.indices, errors, hparams)

    full = jax.jit(record.add, donate_argnums=0)
    state = record.init()
    for start in range(0, size, CHUNK):
        state = full(state, transitions(CHUNK), jnp.int32(start), hparams)
    return in_turns(one, state)


def flashbax(size: int, batch: int) -> Callable[[], Any]:
    """The same with `make_prioritised_flat_buffer`, whose transitions are pairs of neighbours."""
    import jax
    import jax.numpy as jnp
    from flashbax import make_prioritised_flat_buffer

    def item(count: int) -> dict[str, Any]:
        t = jax.tree.map(lambda x: x[:, 0], transitions(count))
        return {"observation": t.observation, "action": t.action, "reward": t.reward, "discount": t.discount}

    buffer = make_prioritised_flat_buffer(size, 1, batch)
    filling = make_prioritised_flat_buffer(size, 1, batch, add_sequences=True)
    first = jax.tree.map(lambda x: x[0], item(1))

    def one(turn: Any, state: Any) -> Any:
        state = buffer.add(state, first)
        drawn = buffer.sample(state, jax.random.fold_in(jax.random.key(1), turn))
        weights = drawn.probabilities**-0.4
        weights /= jnp.max(weights)
        errors = jnp.abs(drawn.experience.first["observation"][:, 0]) * weights
        return buffer.set_priorities(state, drawn.indices, errors + 1e-6)

    full, state = jax.jit(filling.add, donate_argnums=0), buffer.init(first)
    for _ in range(0, size, CHUNK):
        state = full(state, item(CHUNK))
    return in_turns(one, state)


def measure(rounds: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cases = {}
    for size in SIZES:
        for batch in BATCHES:
            calls = {"ours": ours(size, batch, 1, True), "flashbax": flashbax(size, batch)}
            seconds = common.interleaved(calls, rounds)
            cases[f"2^{size.bit_length() - 1} x {batch}"] = {
                "microseconds": {name: common.median(values) / TURNS * 1e6 for name, values in seconds.items()},
                "ratio": common.median_ratio(seconds["ours"], seconds["flashbax"]),
            }
    adds = {str(added): ours(SIZES[-1], BATCHES[0], added, False) for added in (1, 2)}
    seconds = common.interleaved(
        {name: lambda call=call: [call() for _ in range(20)][-1] for name, call in adds.items()}, rounds
    )
    added = {name: common.median(values) / TURNS / 20 * 1e6 for name, values in seconds.items()}
    ratio = common.median_ratio(seconds["2"], seconds["1"])
    return {"target": TARGET, "cases": cases, "add": {"target": ADD_TARGET, "microseconds": added, "ratio": ratio}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.count, default=9, help="timed calls of each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds)))
        return
    result = common.in_subprocess(__file__, ["--child", "--rounds", str(args.rounds)], {"PJRT_NPROC": "1"})
    rows = [[name, *case["microseconds"].values(), case["ratio"]] for name, case in result["cases"].items()]
    print(common.table(["add, sample, update", "ours us", "flashbax us", "ours / flashbax"], rows))
    one, two = (result["add"]["microseconds"][count] for count in "12")
    print(f"target at 2^20 x 128: {TARGET}; add one {one:.2f} us, two {two:.2f} us: {result['add']['ratio']:.2f} x")
    common.write_result("prioritised", result)


if __name__ == "__main__":
    main()
