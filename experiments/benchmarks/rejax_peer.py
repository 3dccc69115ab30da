"""Eight DQN agents on CartPole: rejax, as its README runs a population, against this library's population.

Both train eight seeds with the DQN settings that rejax ships for CartPole (configs/gymnax/cartpole.yaml): 10
environments, five double-DQN updates of batch 100 per step of the environments, dueling 64-64, a replay of 50,000,
100,000 environment steps. rejax has its own virtual environment (made on first use) and runs `jit(vmap(train))`; ours
runs four agents one after the other on each of two CPU devices. Each has a process of its own; a tenth of one's run
takes turns with a tenth of the other's. The rate is environment steps of all agents together per second, from the
median tenth, compilation apart; the ratio is the median over the pairs of tenths. Target: at least 8.

Where the two differ: evaluation is switched off in both; rejax clips each element of the gradient at 10 where we clip
its norm.

    python experiments/benchmarks/rejax_peer.py [--venv FOLDER]
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

TARGET = 8.0
AGENTS, DEVICES, TOTAL_STEPS, CHUNKS = 8, 2, 100_000, 10
SETTINGS = {
    "env": "CartPole-v1",
    "agent": "DuelingQNetwork",
    "agent_kwargs": {"activation": "swish"},
    "num_envs": 10,
    "buffer_size": 50_000,
    "fill_buffer": 5_000,
    "batch_size": 100,
    "max_grad_norm": 10,
    "learning_rate": 0.001,
    "num_epochs": 5,
    "total_timesteps": TOTAL_STEPS,
    "polyak": 0.98,
    "eps_start": 1,
    "eps_end": 0.05,
    "exploration_fraction": 0.5,
    "gamma": 0.99,
    "ddqn": True,
    "normalize_observations": False,
}
# The versions of jax and its friends that we run on, too; rejax 0.1.3 was written for gymnax before 1.0.
PINS = (
    "rejax==0.1.3",
    "gymnax==0.0.9",
    "jax==0.10.2",
    "flax==0.12.8",
    "optax==0.2.8",
    "distrax==0.1.9",
    "chex==0.1.92",
    "numpy==2.4.6",
)


def peer_python(folder: Path) -> str:
    """The interpreter of rejax's virtual environment, which is made and filled if it is not there."""
    python = folder / "bin" / "python"
    marker = folder / "installed.json"
    if not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != list(PINS):
        subprocess.run(["python3.11", "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
        marker.write_text(json.dumps(list(PINS)), encoding="utf-8")
    return str(python)


def peer() -> Iterator[Any]:
    """rejax: yields its compile seconds, then runs one chunk per `next`, then yields each agent's greedy return."""
    import jax
    import rejax

    full = rejax.DQN.create(**SETTINGS)
    # `train` continues a state it is given, so a chunk is a short run with the schedule of the whole one.
    chunk = full.replace(
        total_timesteps=TOTAL_STEPS // CHUNKS,
        exploration_fraction=SETTINGS["exploration_fraction"] * CHUNKS,
        eval_callback=lambda algorithm, state, rng: (),
        eval_freq=TOTAL_STEPS // CHUNKS,
        skip_initial_evaluation=True,
    )
    keys = jax.random.split(jax.random.PRNGKey(0), AGENTS)
    # rejax makes a new class of state in every call: the state travels as the list of its leaves.
    paths, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(full.init_state, keys[0]))
    # The counters are one for all agents, as they are in `vmap(train)`: mapped, they would turn each `cond` on them
    # into a select between whole replays.
    counters = (".global_step", ".replay_buffer.index", ".replay_buffer.full")
    axes = [None if jax.tree_util.keystr(path) in counters else 0 for path, _ in paths]
    assert axes.count(None) == len(counters)

    def init(key: Any) -> Any:
        return jax.tree.leaves(full.init_state(key))

    def train(leaves: Any) -> Any:
        return jax.tree.leaves(chunk.train(train_state=structure.unflatten(leaves))[0])

    def evaluate(leaves: Any, key: Any) -> Any:
        return full.eval_callback(full, structure.unflatten(leaves), key)[1]

    state = jax.jit(jax.vmap(init, out_axes=axes))(keys)
    program, compile_seconds = common.compiled(jax.vmap(train, in_axes=(axes,), out_axes=axes), state, donate=(0,))
    yield compile_seconds
    for _ in range(CHUNKS):
        state = jax.block_until_ready(program(state))
        yield None
    returns = jax.jit(jax.vmap(evaluate, in_axes=(axes, 0)))(state, keys)
    yield returns.mean(axis=1).tolist()


def ours() -> Iterator[Any]:
    """This library: the same, for the same settings."""
    from jaxdqn.components import make_components
    from jaxdqn.parallel.compiled import devices, population, runner
    from jaxdqn.timeline import timeline

    devices.prepare_cpu(DEVICES, one_thread_each=True)
    import jax

    config, hparams = our_settings()
    line = timeline(config)
    chosen = devices.choose(DEVICES, 1, AGENTS)
    assignment = population.assign(AGENTS, DEVICES)
    built, states = runner.build(make_components(config), chosen, 1, assignment, range(AGENTS), [hparams] * AGENTS)
    metrics = built.zero_metrics
    yield built.compile_seconds
    bounds = [line.total * i // CHUNKS for i in range(CHUNKS + 1)]
    for start, stop in itertools.pairwise(bounds):
        middle = min(max(start, line.prefill), stop)
        states, metrics = built.prefill(states, metrics, start, middle)
        states, metrics = jax.block_until_ready(built.step(states, metrics, middle, stop))
        yield None
    episodes = assignment.collect(runner.gather([e.returns for e in built.evaluate(states, line.total)]))
    yield episodes.reshape(AGENTS, -1).mean(axis=1).tolist()


def our_settings() -> tuple[Any, Any]:
    """(Config, HParams) that say what SETTINGS says."""
    from jaxdqn.config import Config, HParams

    config = Config(
        env=SETTINGS["env"],
        agent="double_dqn",
        hidden_sizes=(64, 64),
        dueling=True,
        activation="silu",
        num_envs=SETTINGS["num_envs"],
        batch_size=SETTINGS["batch_size"],
        updates_per_iteration=SETTINGS["num_epochs"],
        replay_capacity=SETTINGS["buffer_size"],
        learning_starts=SETTINGS["fill_buffer"],
        total_steps=TOTAL_STEPS,
        eval_episodes=128,
        eval_max_steps=500,
    )
    hparams = HParams(
        learning_rate=SETTINGS["learning_rate"],
        gamma=SETTINGS["gamma"],
        # rejax moves its target once per step of the environments, which is once per num_epochs updates.
        target_period=SETTINGS["num_epochs"],
        target_tau=1 - SETTINGS["polyak"],
        epsilon_begin=SETTINGS["eps_start"],
        epsilon_end=SETTINGS["eps_end"],
        epsilon_steps=SETTINGS["exploration_fraction"] * TOTAL_STEPS,
        max_grad_norm=SETTINGS["max_grad_norm"],
    )
    return config, hparams


def measure(python: str) -> dict[str, Any]:
    """Both sides, chunk by chunk in turn."""
    sides = {
        "rejax": common.Side([python, __file__, "--side", "peer"]),
        "ours": common.Side([sys.executable, __file__, "--side", "ours"]),
    }
    compile_seconds = {name: side.answer()["value"] for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(CHUNKS):
        for name, side in sides.items():
            seconds[name].append(side.answer()["seconds"])
    returns = {name: side.answer()["value"] for name, side in sides.items()}
    for side in sides.values():
        side.close()
    steps = AGENTS * TOTAL_STEPS
    return {
        "target": TARGET,
        "agents": AGENTS,
        "environment_steps": steps,
        "settings": SETTINGS,
        "peer_packages": PINS,
        "environment_steps_per_second": {k: steps / CHUNKS / common.median(v) for k, v in seconds.items()},
        "compile_seconds": compile_seconds,
        "ratio_of_rates": common.median_ratio(seconds["rejax"], seconds["ours"]),
        "chunk_seconds": seconds,
        "returns_after_training": returns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "jaxdqn-rejax"
    parser.add_argument("--venv", type=Path, default=default, help="folder of rejax's virtual environment")
    parser.add_argument("--side", choices=("peer", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.serve(peer() if args.side == "peer" else ours())
        return
    result = measure(peer_python(args.venv))
    rows = [
        [
            name,
            result["environment_steps_per_second"][name],
            result["compile_seconds"][name],
            common.median(result["returns_after_training"][name]),
        ]
        for name in ("rejax", "ours")
    ]
    print(common.table([f"{AGENTS} agents", "steps/s in total", "compile s", "median return"], rows))
    print(f"ours / rejax: {result['ratio_of_rates']:.1f} (target: {TARGET})")
    common.write_result("rejax", result)


if __name__ == "__main__":
    main()
