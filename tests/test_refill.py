"""Checkpoints without the replay, and what fills it again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
from cases import usual

import jaxdqn
from jaxdqn.base import Progress, SequenceBatch
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.parallel import schemes
from jaxdqn.parallel.asynchronous import learner
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs import checkpoints
from jaxdqn.runs.directory import Continuation
from jaxdqn.runs.settings import OK, TIMEOUT, Settings

jaxdqn.register("clock", probe_environments.clock)
jaxdqn.register("stacks", lambda: probe_environments.stacks("first"))

LEAN = Settings(progress=False, tensorboard=False, figure=False, checkpoint_replay=False)
H = HParams(target_period=3)
SMALL = Config(
    env="clock", num_envs=4, batch_size=8, hidden_sizes=(4,), replay_capacity=80, learning_starts=32,
    total_steps=208, log_interval=52, eval_interval=208, eval_episodes=1, eval_max_steps=4, final_episodes=0,
)  # fmt: skip
LOCKSTEP = Axes("actor_learner", workers=2, merge_every=3, broadcast_every=2)
ASYNC = Axes("actor_learner", workers=2, merge_every=3, broadcast_every=2, coupling="async")
SERVER = Axes("parameter_server", workers=2)
AVERAGING, SHARDING = Axes("averaging", workers=2), Axes("sharding", workers=2, data=2)
RECURRENT = {"agent": "r2d2", "own": {"burn_in": 2, "sequence_length": 4, "period": 2}, "n_step": 1}


def extended(config, path, monkeypatch, steps=320, hparams=H, **options):
    """A run to its end, and on from there: the states that it went on with, and the result."""
    first = jaxdqn.train(config, hparams, out=path, settings=LEAN, **options)
    seen, build = [], schemes.build

    def watched(*args):
        runner, states = build(*args)

        def refill(states, iteration, go_on):
            states = runner.refill(states, iteration, go_on)
            seen.append((runner, jax.tree.map(jnp.copy, states), iteration))
            return states

        return runner._replace(refill=refill), states

    assert first.summary["status"] == OK
    with monkeypatch.context() as patch:
        patch.setattr(schemes, "build", watched)
        result = jaxdqn.resume(path, total_steps=steps, settings=LEAN._replace(checkpoint_replay=None))
    assert result.summary["status"] == OK and result.metrics.env_steps.max() == steps
    return seen[-1], result


def rings(runner, states, iteration, axes):
    """(replay, its state, rows written) of each member, shard or worker."""
    config, gathered = runner.components.config, runner.gather(states)
    one = jax.tree.map(lambda x: x[0, 0], gathered)
    written = jnp.int32(iteration * config.rollout_length)
    if axes.scheme == "actor_learner":
        return [(learner.global_replay(runner.components, schemes.complete(axes).own), one.replay, one.merged)]
    if axes.scheme == "parameter_server":
        return [(runner.components.replay, w.replay, w.acted * config.rollout_length) for w in one.workers]
    lanes = jax.tree.leaves(gathered)[0].shape[:2]
    each = [jax.tree.map(lambda x: x[device, lane], gathered) for device, lane in np.ndindex(lanes)]
    return [(runner.components.replay, state.replay, written) for state in each]


CASES = {
    "long rollouts": (Axes(), {"rollout_length": 2, "n_step": 3, "replay_copies": "one"}, {}),
    "prioritised": (Axes(), {"replay": "prioritised", "n_step": 3}, {}),
    "prioritised sequences": (Axes(), {**RECURRENT, "replay": "prioritised_sequences"}, {}),
    "prioritised frames": (Axes(), {"env": "stacks", "replay_copies": "one", "replay": "prioritised"}, {}),
    "lockstep frames": (LOCKSTEP, {"env": "stacks", "replay_copies": "one"}, {}),
    "async": (ASYNC, {"replay": "prioritised"}, {}),
    "server prioritised": (SERVER, {"replay": "prioritised", "n_step": 3}, {}),
}


@pytest.mark.parametrize("name", usual(CASES, "prioritised", "prioritised sequences"))
def test_all_that_can_be_drawn_was_acted_and_nothing_was_learned(name, tmp_path, monkeypatch):
    axes, changes, options = CASES[name]
    config = dataclasses.replace(SMALL, **changes)
    (runner, states, iteration), _ = extended(config, tmp_path / "run", monkeypatch, axes=axes, **options)
    saved = checkpoints.load(checkpoints.listing(tmp_path / "run" / "checkpoints")[0]).arrays
    assert not [x for x in saved if {"replay", "local", "actor", "env_state"} & set(x.split("/"))]
    by_member = jax.tree.map(runner.assignment.collect, runner.gather(states)).learner
    for path, leaf in checkpoints.named(by_member).items():
        if leaf.size:
            np.testing.assert_array_equal(leaf, saved[f"state/learner/{path}"], err_msg=path)
    hparams = runner.components.agent.complete(H)
    for replay, state, written in rings(runner, states, iteration, axes):
        progress = Progress(written, jnp.int32(9), jnp.int32(0))
        draw = jax.jit(jax.vmap(replay.sample, in_axes=(None, 0, None, None)))
        batches = draw(state, jax.random.split(jax.random.key(0), 20), progress, hparams)
        for index in range(20):
            check(jax.tree.map(lambda x: np.asarray(x[index]), batches), config)


def check(batch, config):
    """Every row has the name of its environment, which is never 0, and the age that the one before it leads to."""
    if isinstance(batch, SequenceBatch):
        seen = np.asarray(batch.transitions.observation)
        assert (seen[..., 0] > 0).all() and (np.diff(seen, axis=0) == [0, 1]).all()
        np.testing.assert_array_equal(batch.transitions.reward, seen[..., 1] + 1)
        return
    real = np.asarray(batch.weights) > 0
    first, last = (jax.tree.map(lambda x: np.asarray(x)[real], x) for x in (batch[0], batch.bootstrap_observation))
    if config.env == "clock":
        assert real.all() and (first[:, 0] > 0).all()
        np.testing.assert_array_equal(last - first, np.tile([0, config.n_step], (len(first), 1)))
        return
    goes_on = np.asarray(batch.bootstrap_discount)[real] > 0
    for rows in (first, jax.tree.map(lambda x: x[goes_on], last)):
        frames, age = rows["frames"], rows["age"]
        ages = np.maximum(age[:, None] + np.arange(-2, 1), 0)
        np.testing.assert_array_equal(frames[:, 1, 0], ages)  # no stack is shorter than its episode
        assert (frames[:, 0] > 0).all() and (frames[:, 0] == frames[:, 0, :, -1:]).all()


ALIKE = {
    "fused": (Axes(), {}),
    "averaging": (AVERAGING, {}),
    "lockstep": (LOCKSTEP, {}),
    "server": (Axes("parameter_server", workers=1), {}),
    "population": (Axes(), {"seeds": (0, 1, 2), "num_devices": 2}),
    "data parallel": (Axes(), {"num_devices": 2, "devices_per_agent": 2}),
    "sharding": (SHARDING, {}),
}


@pytest.mark.parametrize("name", usual(ALIKE, "fused"))
def test_where_all_actions_are_random_a_run_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    """What acts has the keys of the iterations that it stands for. So what the policy would not change is again as it
    was, as long as the replay has been written but once."""
    axes, options = ALIKE[name]
    config = dataclasses.replace(SMALL, replay_capacity=400, env="Catch-bsuite")
    random = H._replace(epsilon_begin=1.0, epsilon_end=1.0)
    _, result = extended(config, tmp_path / "run", monkeypatch, 320, random, axes=axes, **options)
    longer = dataclasses.replace(config, total_steps=320)
    whole = jaxdqn.train(longer, random, axes=axes, settings=LEAN, **options)
    jax.tree.map(np.testing.assert_array_equal, result.params, whole.params)


def test_the_run_says_what_it_does_and_remembers_it(tmp_path, capsys):
    jaxdqn.train(SMALL, H, out=tmp_path / "run", settings=LEAN)
    held = sum(x.nbytes for x in checkpoints.newest(tmp_path / "run" / "checkpoints")[0].arrays.values())
    replay = make_components(SMALL).replay.init()
    jaxdqn.train(SMALL, H, out=tmp_path / "whole", settings=LEAN._replace(checkpoint_replay=None))
    whole = checkpoints.newest(tmp_path / "whole" / "checkpoints")[0].arrays
    actor = sum(x.nbytes for name, x in whole.items() if name.startswith("state/actor/"))
    assert held + actor + sum(x.nbytes for x in jax.tree.leaves(replay)) == sum(x.nbytes for x in whole.values())
    capsys.readouterr()
    talks = Settings(tensorboard=False, figure=False)
    for steps, said in ((240, "no replay: 80 steps"), (320, "no replay: 80 steps")):  # it is off in each session
        jaxdqn.resume(tmp_path / "run", total_steps=steps, settings=talks)
        assert said in capsys.readouterr().err
    jaxdqn.resume(tmp_path / "run", total_steps=400, settings=talks._replace(checkpoint_replay=True))
    assert "no replay" in capsys.readouterr().err
    jaxdqn.resume(tmp_path / "run", total_steps=480, settings=talks)
    assert "no replay" not in capsys.readouterr().err


def test_a_stop_while_it_is_filled_loses_nothing(tmp_path):
    run = tmp_path / "run"
    jaxdqn.train(SMALL, H, out=run, settings=LEAN)
    before = [path.name for path in checkpoints.listing(run / "checkpoints")]
    stopped = jaxdqn.resume(run, total_steps=320, settings=LEAN._replace(max_seconds=0.0))
    assert stopped.summary["status"] == TIMEOUT
    assert [path.name for path in checkpoints.listing(run / "checkpoints")] == before
    assert jaxdqn.resume(run, total_steps=320, settings=LEAN).summary["status"] == OK


def test_what_learns_from_its_newest_block_leaves_nothing_out(tmp_path):
    config = dataclasses.replace(SMALL, agent="a2c", learning_starts=0)
    whole = jaxdqn.train(dataclasses.replace(config, total_steps=320), H, settings=LEAN)
    jaxdqn.train(config, H, out=tmp_path / "run", settings=LEAN)
    resumed = jaxdqn.resume(tmp_path / "run", total_steps=320, settings=LEAN)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_a_run_that_goes_on_from_one_without_a_replay_fills_its_own(tmp_path):
    jaxdqn.train(SMALL, H, seeds=(0, 1), out=tmp_path / "first", settings=LEAN)
    longer, origin = dataclasses.replace(SMALL, total_steps=320), Continuation(str(tmp_path / "first"), (1, 0), (1, 1))
    result = jaxdqn.train(longer, H, seeds=(0, 1), settings=LEAN, continues=origin)
    assert result.summary["status"] == OK
