"""Iterations of many updates, in parts: the same bits, and a stop in the middle of one that loses nothing."""

import json
import signal

import jax
import numpy as np
import pytest
from cases import slow

import jaxdqn
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import population, runner
from jaxdqn.runs import driver

U = 150
CONFIG = Config(
    hidden_sizes=(8,),
    num_envs=4,
    rollout_length=2,
    updates_per_iteration=U,
    batch_size=8,
    replay_capacity=64,
    learning_starts=16,
    n_step=2,
    total_steps=80,
    log_interval=16,
    eval_interval=80,
    eval_episodes=2,
    eval_max_steps=50,
    final_episodes=2,
)
QUIET = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)


def built(devices=1, members=1):
    assignment = population.assign(members, 1)
    settings = [HParams(learning_rate=1e-3 * (1 + m)) for m in range(members)]
    components = make_components(CONFIG, devices)
    return runner.build(components, jax.devices()[:devices], devices, assignment, range(members), settings)


@pytest.mark.parametrize("devices, members", [slow(1, 2), (2, 1)])
def test_an_iteration_does_not_depend_on_its_parts(devices, members, monkeypatch):
    def filled():
        runner, states = built(devices, members)
        return runner, *runner.prefill(states, runner.zero_metrics, 0, 2)

    split, states, metrics = filled()
    for iteration in range(2, 5):
        for first, last in ((0, 1), (1, 2), (2, 70), (70, U)):
            states, metrics = split.part(states, metrics, iteration, first, last)
    in_parts = runner.gather(states), runner.gather(metrics)
    again, states, metrics = filled()
    at_once = tuple(map(runner.gather, again.step(states, metrics, 2, 5)))
    jax.tree.map(np.testing.assert_array_equal, in_parts, at_once)

    monkeypatch.setattr(runner, "MOST_UNSPLIT", U)
    whole, states, metrics = filled()
    assert split.part is not None and whole.part is None
    unsplit = tuple(map(runner.gather, whole.step(states, metrics, 2, 5)))
    # Another program, which XLA fuses otherwise: one bit in a number here and there, after 450 updates.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), in_parts, unsplit)


def test_a_stop_within_an_iteration_loses_nothing(monkeypatch, tmp_path):
    """Rows and parameters of a run that was interrupted there and resumed are those of one that was not."""
    monkeypatch.setattr(driver, "CHUNK_SECONDS", 1e-9)  # an update a call
    longest = []
    part = runner._stack_by_stack

    def watched(*args):
        run = part(*args)
        return lambda states, metrics, *at: longest.append(at[-1] - at[-2]) or run(states, metrics, *at)

    monkeypatch.setattr(runner, "_stack_by_stack", watched)
    interrupt = QUIET._replace(on_chunk=lambda rows: signal.raise_signal(signal.SIGINT))
    first = jaxdqn.train(CONFIG, HParams(), out=tmp_path / "run", settings=interrupt)
    (meta,) = [json.loads(path.read_text()) for path in (tmp_path / "run" / "checkpoints").glob("*/meta.json")]
    assert first.summary["status"] == "interrupted" and 0 < meta["update"] < U and max(longest) <= 16
    monkeypatch.undo()
    resumed = jaxdqn.resume(tmp_path / "run", settings=QUIET)
    whole = jaxdqn.train(CONFIG, HParams(), settings=QUIET)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    columns = ["iteration", "updates", "loss", "td_error", "gradient_norm", "episodes", "eval_return"]
    np.testing.assert_array_equal(resumed.metrics[columns].to_numpy(), whole.metrics[columns].to_numpy())


@pytest.mark.parametrize("scheme", ["actor_learner", "parameter_server", "averaging"])
def test_schemes_that_stop_between_iterations_only_refuse_long_ones(scheme):
    config = Config(updates_per_iteration=1_001)
    with pytest.raises(UserError, match="updates_per_iteration 1001 is too many"):
        schemes.check(Axes(scheme), config, 1)
