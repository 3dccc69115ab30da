"""What a GPU would run: the training program of each agent, compiled for H100s that are not there, and its kernels.

The kernels of an iteration cost a small agent more than its arithmetic. Counting them needs no GPU, and neither does
finding a copy of the replay or a second all-reduce. Compiled, never run, and autotuning apart, as an H100 has it: one
agent, a population, and one agent over eight devices, each of which has the work of one.

    pip install -e ".[cuda12]"        XLA's compiler for GPUs: 5.5 GB, and neither a driver nor a card is needed
    python experiments/benchmarks/gpu_program.py [--agents dqn a2c] [--envs CartPole-v1] [--show]

Without --agents and --envs the result is kept; a program compiles in about ten seconds.
"""

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin compiles without looking for a device

import common
import hlo

CARD = Path(__file__).with_name("h100.textproto")
ENVIRONMENTS = ("CartPole-v1", "Breakout-MinAtar")
MEMBERS, DEVICES = 50, 8
SMALLEST_FIELD = 1_000  # elements from which on a field of the replay is looked for


class Case(NamedTuple):
    """An agent with a replay on an environment: `members` vmapped, or one over `devices`."""

    agent: str
    replay: str
    env: str
    members: int = 1
    devices: int = 1

    @property
    def words(self) -> str:
        form = f"{self.members} members" if self.members > 1 else f"over {self.devices} devices"
        return "one agent" if self.members == self.devices == 1 else form


def cases(agents: Sequence[str], envs: Sequence[str]) -> list[Case]:
    """Every agent with its own replay, DQN with every other that holds items; over devices and as a population on the
    last environment."""
    from jaxdqn.base import Batch
    from jaxdqn.replay import REPLAYS

    found = []
    for agent in agents:
        items = [name for name, kind in REPLAYS.items() if kind.batch is Batch and not kind.newest_only]
        for replay in ("auto", *(name for name in items if agent == "dqn" and name != "uniform")):
            found += [Case(agent, replay, env) for env in envs]
            found += [Case(agent, replay, envs[-1], members=MEMBERS)] if agent == "double_dqn" else []
            found += [Case(agent, replay, envs[-1], devices=DEVICES)] if agent != "random" else []
    return found


def compiled(case: Case, chips: Sequence[Any]) -> tuple[Any, Any]:
    """(components of one device, the compiled training program) of a case, at its preset."""
    import jax
    import numpy as np

    from jaxdqn import agents, presets, training
    from jaxdqn.components import make_components
    from jaxdqn.parallel.compiled import devices, population, runner

    preset, count = presets.for_environment(case.env, case.agent), case.devices
    sizes = {name: getattr(preset.config, name) * count for name in ("num_envs", "batch_size", "replay_capacity")}
    components = make_components(dataclasses.replace(preset.config, replay=case.replay, **sizes), count)
    records = components.environment, components.agent, components.replay, components.config
    alone = training.make_trainer(*records)

    def start(hparams: Any) -> Any:
        key = jax.random.key(0)
        return alone.init(key, key, hparams), alone.zero_metrics(), hparams

    placed = jax.sharding.SingleDeviceSharding(chips[0]) if count == 1 else None
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, case.members, *x.shape), x.dtype, sharding=placed),
        jax.eval_shape(start, runner.traced_hparams(agents.complete(preset.config, preset.hparams)[1])),
    )
    step = runner.fused(training.make_trainer(*records, devices.make_shards(count, count))).step
    lanes = population.over_lanes(step, num_shared=2)
    program = devices.over_devices(lanes, chips[:count], num_mapped=3, num_shared=2, donate=(0,))
    return components, devices.compiled(program, *shapes, np.int32(0), np.int32(1))


def measure(case: Case, chips: Sequence[Any], show: bool) -> dict[str, Any]:
    """What the compiled program of a case says."""
    import jax

    from jaxdqn import agents
    from jaxdqn.parallel.compiled.memory import tree_bytes

    start = time.perf_counter()
    components, program = compiled(case, chips)
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    found, config = hlo.parse(program.as_text()), components.config
    inside = [kernel for kernel in hlo.kernels(found) if kernel.depth]
    if show:
        print(*map(line, inside), sep="\n")
    counts = per_iteration(inside, config.updates_per_iteration)
    stored = jax.eval_shape(components.replay.init)
    # The newest block is written anew in every iteration.
    large = [
        x for x in jax.tree.leaves(stored) if x.size >= SMALLEST_FIELD and not agents.replay_of(config).newest_only
    ]
    fields = {(hlo.element_type(x.dtype), case.members * x.size) for x in large}
    return {
        **case._asdict(),
        "program": case.words,
        "updates": config.updates_per_iteration,
        "kernels": {"learn": counts.get(2, 0), "rest": counts.get(1, 0)},
        "copies": sum(per_iteration(of(inside, "copy"), config.updates_per_iteration).values()),
        "replay_written_whole": hlo.written_whole(found, inside, fields),
        "all_reduces": sum(per_iteration(of(inside, "all-reduce"), config.updates_per_iteration).values()),
        "all_reduced": [sum(size for _, size in k.instruction.arrays) for k in of(inside, "all-reduce")],
        "replay_bytes": case.members * tree_bytes(stored),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def per_iteration(launched: Sequence[hlo.Kernel], updates: int) -> dict[int, int]:
    """How many kernels an iteration has in the loop of iterations, 1, and in that of its updates, 2."""
    deepest = max(launched, key=lambda kernel: kernel.depth, default=None)
    if deepest and deepest.depth > 2:
        raise ValueError(f"{deepest.instruction.name} is in a loop whose number of turns nobody knows")
    turns = {1: 1, 2: updates}
    return {depth: sum(turns[depth] * k.times for k in launched if k.depth == depth) for depth in turns}


def of(launched: Sequence[hlo.Kernel], opcode: str) -> list[hlo.Kernel]:
    """Those with an opcode, or its asynchronous form."""
    return [k for k in launched if k.instruction.opcode in (opcode, f"{opcode}-start")]


def line(kernel: hlo.Kernel) -> str:
    """A kernel in words: where it is, what it makes, and the operation that it comes from."""
    instruction, origin = kernel.instruction, re.search(r'op_name="([^"]*)"', kernel.instruction.rest)
    where = {1: "iteration", 2: "update"}.get(kernel.depth, "?")
    return (
        f"{where:9} {kernel.times:3} x {instruction.name:40} {instruction.type[:60]:60} {origin[1] if origin else ''}"
    )


def topology() -> Any:
    """Eight H100s of one host, to compile for. Ends with a line where there is no compiler for them."""
    from jax.experimental import topologies

    try:
        text = CARD.read_text(encoding="utf-8")
        return topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{DEVICES}")
    except Exception as error:
        raise SystemExit(f'JAX has no compiler for CUDA here: pip install -e ".[cuda12]" ({error})') from error


def main() -> None:
    from jaxdqn.agents import AGENTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=list(AGENTS), default=list(AGENTS), metavar="NAME")
    parser.add_argument("--envs", nargs="+", default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print every kernel of an iteration")
    args = parser.parse_args()
    chips = topology().devices
    programs, not_counted = [], {}
    for case in cases(args.agents, args.envs):
        name = f"{case.agent} ({case.replay}) on {case.env}, {case.words}"
        print(name, flush=True)
        try:
            programs.append(measure(case, chips, args.show))
        except ValueError as error:  # how often a loop turns may depend on the data
            not_counted[name] = str(error)
            print(f"    not counted: {error}", flush=True)
    header = [
        "agent",
        "replay",
        "environment",
        "program",
        "learn",
        "rest",
        "copies",
        "all-reduces",
        "whole writes",
        "MB",
    ]
    print(common.table(header, [row(program) for program in programs]))
    if list(AGENTS) == args.agents and list(ENVIRONMENTS) == args.envs:
        counted = {"programs": programs, "not_counted": not_counted}
        common.write_result("gpu_program", {"card": chips[0].device_kind, **counted})


def row(program: dict[str, Any]) -> list[Any]:
    """A line of the printed table."""
    case, kernels = Case(*(program[name] for name in Case._fields)), program["kernels"]
    counts = kernels["learn"], kernels["rest"], program["copies"], program["all_reduces"]
    whole = ", ".join(program["replay_written_whole"]) or "none"
    return [case.agent, case.replay, case.env, case.words, *counts, whole, program["temporary_bytes"] / 1e6]


if __name__ == "__main__":
    main()
