"""Small runs of every way to train, each as what it measured and what it learned: python runs.py NAME OUT.

Runs with the `jaxdqn` on PYTHONPATH, whichever commit that is of, through its public functions and scripts alone.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

TIMES = ("seconds", "running_seconds", "lock_wait_seconds", "worker_rate", "env_steps_per_second")
"""How the names of columns begin that no two runs have in common."""
CHANGED = ("bytes_per_update",)
"""Columns that are others now: experience on its way to the learner is smaller since actions take one byte."""

SMALL = {
    "num_envs": 8,
    "batch_size": 32,
    "hidden_sizes": (16, 16),
    "replay_capacity": 1_000,
    "learning_starts": 400,
    "total_steps": 4_000,
    "eval_interval": 1_000,
    "eval_episodes": 2,
    "final_episodes": 4,
    "replay_copies": "two",
}
ON_POLICY = {**SMALL, "replay_copies": "auto", "rollout_length": 8, "n_step": 8, "learning_starts": 0, "agent": "a2c"}
PIXELS = {**SMALL, "env": "Breakout-MinAtar", "total_steps": 1_600, "eval_interval": 800}

TRAINED = {
    "single": {"config": {"n_step": 3, "updates_per_iteration": 2}},
    "double": {
        "config": {"agent": "double_dqn", "dueling": True, "layer_norm": True, "loss": "huber", "env": "Catch-bsuite"}
    },
    "pixels": {"config": {**PIXELS, "agent": "double_dqn", "loss": "huber", "sticky_actions": 0.1}},
    "population": {"vary": {"learning_rate": [1e-4, 1e-3]}, "seeds": [0, 1], "num_devices": 2},
    "two_devices": {"num_devices": 2, "devices_per_agent": 2},
    "parts": {"config": {"updates_per_iteration": 130, "total_steps": 800}},
    "rmsprop": {"config": {"optimizer": "rmsprop", "epsilon_schedule": "exponential", "activation": "tanh"}},
    "lockstep": {"axes": {"scheme": "actor_learner", "workers": 2, "merge_every": 2, "broadcast_every": 4, "lag": 1}},
    "averaging": {"axes": {"scheme": "averaging", "workers": 2, "combine": "outer", "average_every": 4}},
    "elastic": {"axes": {"scheme": "averaging", "workers": 2, "combine": "elastic", "average_every": 8}},
    "sharding": {"axes": {"scheme": "sharding", "workers": 2, "data": 1}},
    "server": {"axes": {"scheme": "parameter_server", "workers": 1}, "config": {"n_step": 2}},
    "server_leaf": {"axes": {"scheme": "parameter_server", "workers": 1, "lock": "leaf"}, "config": ON_POLICY},
    "a2c": {"config": ON_POLICY},
    "latest": {"config": {**ON_POLICY, "agent": "dqn", "replay": "latest"}},
    "ensemble": {"config": {"agent": "ensemble_dqn", "ensemble_size": 3, "ensemble_act": "vote"}},
    "partitioned": {"config": {"agent": "partitioned_dqn", "num_partitions": 3}},
    "random": {"config": {"agent": "random"}},
}
SCRIPTS = {
    "tabular": ["tabular.py", "--total-steps", "20000"],
    "tabular_partitioned": ["tabular.py", "--method", "partitioned", "--total-steps", "20000"],
    "tabular_distributed": ["tabular.py", "--method", "distributed", "--total-steps", "20000"],
    "sweep": ["sweep.py", "FILE", "--num-devices", "1"],
}
SWEEP = """
env: Catch-bsuite
config: {total_steps: 3_000, eval_interval: 200, learning_starts: 200, hidden_sizes: [16], num_envs: 8}
space: {learning_rate: {low: 1e-4, high: 1e-2, log: true}, batch_size: [16, 32]}
sampler: {name: sobol, trials: 4}
seeds: 3
halving: {rungs: [0.3], keep: 0.5}
winners: {trials: 1, seeds: 3}
"""
NAMES = (*TRAINED, *SCRIPTS)


def moved(config):
    """The fields of a configuration as the library at hand calls them."""
    import dataclasses

    import jaxdqn

    known = {field.name for field in dataclasses.fields(jaxdqn.Config)}
    if "replay_copies" not in known:
        config.pop("replay_copies")  # of a time when there always were two
    own = {name: value for name, value in config.items() if name not in known}
    return {**{name: value for name, value in config.items() if name in known}, **({"own": own} if own else {})}


def train(given):
    """{name: array} of everything that `jaxdqn.train` measured and learned."""
    import jax
    import numpy as np

    import jaxdqn

    options = dict(given)
    config = jaxdqn.Config(**moved({**SMALL, **options.pop("config", {})}))
    chosen = options.pop("axes", {"scheme": "fused"})
    axes, replicas = jaxdqn.Axes(**chosen), chosen["scheme"] in ("averaging", "sharding")
    settings = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
    options = {"num_devices": chosen["workers"] if replicas else 1, **options}
    hparams = jaxdqn.HParams(target_period=10.0, epsilon_steps=2_000.0)
    result = jaxdqn.train(config, hparams, axes=axes, settings=settings, **options)
    kept = [name for name in result.metrics if not name.startswith((*TIMES, *CHANGED))]
    arrays = {f"metrics/{name}": result.metrics[name].to_numpy() for name in kept}
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.params):
        arrays[f"params/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)
    arrays["final_return"] = np.asarray(result.summary["final_return_mean"])
    return arrays


def script(words, folder):
    """{name: array} of the numbers in the tables that a script of the checkout at hand wrote to `folder`."""
    import numpy as np
    import pandas as pd

    import jaxdqn

    file = folder / "sweep.yaml"
    file.write_text(SWEEP)
    program = pathlib.Path(jaxdqn.__file__).parent.parent / "experiments" / words[0]
    words = [str(file) if word == "FILE" else word for word in words[1:]]
    subprocess.run(
        [sys.executable, str(program), *words, "--out", str(folder / "out")], check=True, capture_output=True
    )
    arrays = {}
    for path in sorted([*folder.glob("out/*.parquet"), *folder.glob("out/*.csv")]):
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        for name in frame:
            if not name.startswith(TIMES):
                arrays[f"{path.name}/{name}"] = frame[name].to_numpy()
    for path in folder.glob("out/*.npy"):
        arrays[path.name] = np.load(path)
    assert arrays, list(folder.glob("out/*"))
    return arrays


def main(name, out):
    """Trains NAME and writes its arrays to the file OUT."""
    import numpy as np

    if name in TRAINED:
        import jax

        jax.config.update("jax_num_cpu_devices", 2)
        arrays = train(TRAINED[name])
    else:
        with tempfile.TemporaryDirectory() as folder:
            arrays = script(SCRIPTS[name], pathlib.Path(folder))
    # Texts (names, statuses) as numbers and strings, so that no file needs pickle.
    plain = {
        key: x if x.dtype.kind in "fiub" else np.asarray([json.dumps(v, default=str) for v in x.ravel()])
        for key, x in arrays.items()
    }
    np.savez(out, **plain)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
