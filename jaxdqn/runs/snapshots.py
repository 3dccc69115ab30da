"""Between the states of a runner and the arrays of a checkpoint, which are by member: another number of devices can
take them up, and so can a run of other members."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdqn.base import PyTree
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled import runner as _runner
from jaxdqn.parallel.compiled.population import Assignment
from jaxdqn.parallel.compiled.runner import Runner
from jaxdqn.runs import checkpoints, directory
from jaxdqn.runs.checkpoints import Checkpoint
from jaxdqn.runs.directory import Continuation
from jaxdqn.runs.driver import Progressed


def of(runner: Runner, at: Progressed) -> dict[str, Any]:
    """What a checkpoint holds, [M, shards, ...]."""
    values = _as_saved(runner.assignment, at)
    if runner.policy is not None:
        return {**values, "policy": policy(runner, at.states)}
    _assert_replicas_equal(values["state"].learner)
    return values


def policy(runner: Runner, states: list[Any]) -> PyTree:
    """The parameters by which each member is judged, [M, shards, ...]."""
    params = runner.policy(states) if runner.policy else [state.learner.params for state in states]
    return jax.tree.map(runner.assignment.collect, _runner.gather(params))


def restored(at: Progressed, found: Checkpoint, assignment: Assignment, devices: Sequence[jax.Device]) -> Progressed:
    """`at` with the values of a checkpoint of the same members. Raises `UserError` where it is of another run."""
    by_member = checkpoints.fill(_as_saved(assignment, at), found.arrays)
    own = _devices.own(devices)
    values = jax.tree.map(lambda x: assignment.place(x)[own], by_member)
    states, sums = _runner.scatter(at.states, values["state"]), _runner.scatter(at.metrics, values["metrics"])
    return Progressed(states, sums, found.meta["iteration"], found.meta.get("update", 0))


def last(path: pathlib.Path) -> list[Checkpoint]:
    """The last checkpoint of every batch of the run in `path`. Raises `UserError` where one is missing or damaged."""
    spec, _ = directory.load(path)
    found = [checkpoints.newest(path / "checkpoints", batch)[0] for batch in range(len(spec.batches))]
    complete = [checkpoint for checkpoint in found if checkpoint is not None]
    if len(complete) < len(found) or len({checkpoint.meta["iteration"] for checkpoint in complete}) > 1:
        raise UserError(
            f"{path} cannot be continued from: a checkpoint is missing or damaged. Bring it back from a copy, or move "
            "that run and those that went on from it away to have them trained again."
        )
    return complete


def selected(sources: Sequence[Checkpoint], origin: Continuation, members: Sequence[int]) -> Checkpoint:
    """The states of `members` of the run that continues `origin`, whose batches' last checkpoints are `sources`."""
    whole = {name: np.concatenate([source.arrays[name] for source in sources]) for name in sources[0].arrays}

    def rows(name: str) -> list[int]:
        taken = origin.learners if name.startswith("state/learner/") else origin.states
        return [taken[member] for member in members]

    arrays = {name: values[rows(name)] for name, values in whole.items()}
    sizes = [len(next(iter(source.arrays.values()))) for source in sources]
    batches = np.repeat(np.arange(len(sources)), sizes)[[origin.states[member] for member in members]]
    seconds = max(sources[batch].meta["batch_seconds"] for batch in batches)
    return Checkpoint(arrays, {**sources[-1].meta, "batch_seconds": seconds})


def with_params(states: list[Any], source: dict[str, np.ndarray]) -> list[Any]:
    """`states` with every member's parameters and target replaced by `source`, arrays by their paths."""

    def replaced(state: Any) -> Any:
        learner = state.learner
        leading = learner.updates.shape
        arrays = {name: np.broadcast_to(x, (*leading, *x.shape)) for name, x in source.items()}
        values = checkpoints.fill(learner.params, arrays)
        params, target = (_runner.scatter([tree], values)[0] for tree in (learner.params, learner.target_params))
        return state._replace(learner=learner._replace(params=params, target_params=target))

    return [replaced(state) for state in states]


def _as_saved(assignment: Assignment, at: Progressed) -> dict[str, Any]:
    return jax.tree.map(assignment.collect, {"state": _runner.gather(at.states), "metrics": _runner.gather(at.metrics)})


def _assert_replicas_equal(learner: PyTree) -> None:
    """Every shard of an agent must hold the same learner; anything else is a bug of ours."""
    for key, shards in jax.tree_util.tree_leaves_with_path(learner):
        if not np.array_equal(shards, np.broadcast_to(shards[:, :1], shards.shape), equal_nan=shards.dtype.kind == "f"):
            raise AssertionError(f"replicas differ in {jax.tree_util.keystr(key)}.")
