"""Checkpoints: complete states, written whole or not at all, verified when read.

Their arrays are by member: another number of devices can take them up, and so can a run of other members.

checkpoints/<batch>-<iteration>/  state/ (orbax)   meta.json   manifest.json (size and CRC-32 of every file)
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdqn.base import PyTree
from jaxdqn.errors import UserError, shortened
from jaxdqn.files import documents
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled.runner import Runner, push
from jaxdqn.runs.driver import Progressed

_META: dict[str, type | tuple[type, ...]] = {
    "batch": int,
    "iteration": int,
    "seconds": (int, float),
    "compile_seconds": (int, float),
    "device": str,
    "versions": dict,
}
REPLACED = ".replaced"  # a checkpoint while another takes its place
_NAME = re.compile(rf"(\d{{4}})-(\d{{12}})({re.escape(REPLACED)})?")


KEEP = 2  # of a batch: one may be damaged
HELP = "The run can be analysed and evaluated as it is; to train on from its parameters, start one with --init-from."
SAME_NETWORK = "Start with the environment, the agent and the network of the run that --init-from names."


class Checkpoint(NamedTuple):
    """What a checkpoint holds: arrays by path, and meta (batch, iteration, update, seconds, versions, device)."""

    arrays: dict[str, np.ndarray]
    meta: documents.Fields


def save(root: pathlib.Path, tree: PyTree, meta: dict[str, object], keep: int) -> pathlib.Path:
    """Writes a tree of NumPy arrays and keeps the newest `keep` checkpoints of its batch.

    Raises OSError where the disk is full.
    """
    root.mkdir(exist_ok=True)
    final = root / f"{meta['batch']:04d}-{meta['iteration']:012d}"
    temporary = root / f".writing-{final.name}"
    for abandoned in root.glob(".writing-*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary.mkdir()
    try:
        with _plainly_named(temporary) as folder:
            _checkpointer().save(folder / "state", _nested(tree))
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        (temporary / "manifest.json").write_text(json.dumps(_checksums(temporary)), encoding="utf-8")
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():  # of the same iteration; there must be one at any moment
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    except ValueError as error:  # orbax's name for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in [path for path in listing(root) if path.name[:4] == final.name[:4]][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def listing(root: pathlib.Path) -> list[pathlib.Path]:
    """All complete-looking checkpoints, oldest first. Raises `UserError` where `root` is there and cannot be read."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read the checkpoints in {root}: {error.strerror}.") from None
    found = sorted((name for name in names if _NAME.fullmatch(name)), key=lambda name: (name[:17], len(name) == 17))
    return [root / name for name in found]


def newest(root: pathlib.Path, batch: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint (of `batch`), or None; and a line for each damaged one that was passed over."""
    warnings: list[str] = []
    for path in reversed(listing(root)):
        if batch is not None and int(path.name[:4]) != batch:
            continue
        damage = _damage(path)
        if damage is None:
            return load(path), warnings
        warnings.append(f"checkpoint {path} is damaged ({damage}); falling back to the one before it.")
    return None, warnings


def ends(root: pathlib.Path) -> dict[int, dict[str, object]]:
    """The meta of the newest undamaged checkpoint of every batch that has one."""
    good = {int(path.name[:4]): path for path in listing(root) if _damage(path) is None}
    return {batch: documents.read_json(path / "meta.json") for batch, path in good.items()}


def load(path: pathlib.Path) -> Checkpoint:
    """Reads one checkpoint. Raises `UserError` where its files are not what orbax writes, whatever their checksums."""
    try:
        with _plainly_named(path) as folder:
            nested = _checkpointer().restore(folder / "state")
    except Exception as error:
        raise UserError(f"the checkpoint {path} cannot be read: {shortened(str(error))}.") from error
    return Checkpoint(named(nested), documents.read_json(path / "meta.json"))


def fill(template: PyTree, arrays: dict[str, np.ndarray], prefix: str = "", what_to_do: str = HELP) -> PyTree:
    """`template` with its leaves replaced by the arrays of the same paths under `prefix`.

    Raises `UserError`, with `what_to_do`, where one is missing or has another shape: the checkpoint is of another
    version or configuration.
    """

    def pick(path: jax.tree_util.KeyPath, leaf: np.ndarray) -> np.ndarray:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in arrays and leaf.size == 0:
            return np.zeros(leaf.shape, leaf.dtype)
        if name not in arrays:
            raise UserError(
                f"the checkpoint has no {name}: it was written by another version or with another configuration. "
                f"{what_to_do}"
            )
        array = np.asarray(arrays[name])
        if array.shape != leaf.shape:
            raise UserError(
                f"the checkpoint's {name} has shape {list(array.shape)}, expected {list(leaf.shape)}: it was written "
                f"by another version or with another configuration. {what_to_do}"
            )
        return array

    return jax.tree_util.tree_map_with_path(pick, template)


def named(tree: PyTree) -> dict[str, PyTree]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def values_of(runner: Runner, at: Progressed, replay: bool = True) -> dict[str, PyTree]:
    """What a checkpoint holds, [M, shards, ...]; without the `replay` as little as `Runner.lean` says."""
    values = _as_saved(runner, at if replay and not at.hollow else _lean(runner, at))
    if runner.policy is not None:
        return {**values, "policy": policy(runner, at.states)}
    _assert_replicas_equal(values["state"].learner)
    return values


def policy(runner: Runner, states: list[PyTree]) -> PyTree:
    """The parameters by which each member is judged, [M, shards, ...]."""
    params = runner.policy(states) if runner.policy else [state.learner.params for state in states]
    return jax.tree.map(runner.assignment.collect, runner.gather(params))


def restored(runner: Runner, at: Progressed, found: Checkpoint, devices: Sequence[jax.Device]) -> Progressed:
    """`at`, the beginning, with the values of a checkpoint of the same members; `hollow` where that has no replay.
    Raises `UserError` where it is of another run."""
    lean = _lean(runner, at)
    left_out = named({"state": at.states[0]}).keys() - named({"state": lean.states[0]}).keys()
    hollow = bool(left_out) and not left_out & found.arrays.keys()
    taken = lean if hollow else at
    by_member = fill(_as_saved(runner, taken), found.arrays)
    own = _devices.own(devices)
    values = jax.tree.map(lambda x: runner.assignment.place(x)[own], by_member)
    states, sums = runner.scatter(taken.states, values["state"]), runner.scatter(at.metrics, values["metrics"])
    states = [_over(*pair) for pair in zip(at.states, states, strict=True)]
    return Progressed(states, sums, found.meta["iteration"], found.meta.get("update", 0), hollow)


def with_params(states: list[PyTree], source: dict[str, np.ndarray]) -> list[PyTree]:
    """`states` with every member's parameters and target replaced by `source`, arrays by their paths."""

    def replaced(state: PyTree) -> PyTree:
        learner = state.learner
        leading = learner.updates.shape
        arrays = {name: np.broadcast_to(x, (*leading, *x.shape)) for name, x in source.items()}
        values = fill(learner.params, arrays, what_to_do=SAME_NETWORK)
        params, target = (jax.tree.map(push, tree, values) for tree in (learner.params, learner.target_params))
        return state._replace(learner=learner._replace(params=params, target_params=target))

    return [replaced(state) for state in states]


def _lean(runner: Runner, at: Progressed) -> Progressed:
    return at._replace(states=[runner.lean(state) for state in at.states])


def _over(whole: PyTree, part: PyTree) -> PyTree:
    """`whole` with the leaves of `part` in place of those of the same paths."""
    new = named(part)

    def pick(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        return new.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(pick, whole)


def _as_saved(runner: Runner, at: Progressed) -> dict[str, PyTree]:
    stacks = {"state": runner.gather(at.states), "metrics": runner.gather(at.metrics)}
    return jax.tree.map(runner.assignment.collect, stacks)


def _assert_replicas_equal(learner: PyTree) -> None:
    """Every shard of an agent must hold the same learner; anything else is a bug of ours."""
    for key, shards in jax.tree_util.tree_leaves_with_path(learner):
        if not np.array_equal(shards, np.broadcast_to(shards[:, :1], shards.shape), equal_nan=shards.dtype.kind == "f"):
            raise AssertionError(f"replicas differ in {jax.tree_util.keystr(key)}.")


def _nested(tree: PyTree) -> PyTree:
    root: dict[str, PyTree] = {}
    for name, leaf in named(tree).items():
        if leaf.size == 0:  # orbax cannot save it; `fill` knows it from the template
            continue
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.asarray(leaf)
    return root


@contextlib.contextmanager
def _plainly_named(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`folder` by a path that orbax and what it builds on take as it stands: they read [a] as a pattern, \\ as / and
    gs: as the beginning of a URL."""
    folder = folder.absolute()
    if re.fullmatch(r"[\w ./+=,@-]*", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jaxdqn-") as place:
        link = pathlib.Path(place) / "checkpoint"
        link.symlink_to(folder)
        yield link


def _checkpointer() -> Any:
    # Late: orbax takes a second to import. Its INFO lines are of no use to a reader.
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    # On several hosts orbax would have all processes save together.
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(process, {process}, f"process-{process}")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _checksums(path: pathlib.Path) -> dict[str, list[int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(path)): [file.stat().st_size, _crc32(file)] for file in files}


def _crc32(file: pathlib.Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _damage(path: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, or None. Raises `UserError` where it may not be read: nothing is wrong with it
    then, and an older one must not take its place."""
    for file in [path, *path.rglob("*")]:
        if file.exists() and not os.access(file, os.R_OK):
            raise UserError(f"cannot read {file}: no permission.")
    try:
        expected = documents.read_json(path / "manifest.json")
        meta = documents.read_json(path / "meta.json")
    except UserError as error:
        return str(error).rstrip(".")
    try:
        for name, known in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if [file.stat().st_size, _crc32(file)] != known:
                return f"{name} has changed"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return next((f"meta.json has no {name}" for name, kind in _META.items() if not _is(meta.get(name), kind)), None)


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
