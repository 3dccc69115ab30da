"""One agent whose dense layers are split over devices: jit and named shardings, on a mesh of `data` x `model` devices.

Layers alternate: an even one holds some of its outputs on each device (kernel [in, out / M]), the odd one after it the
inputs that these are (kernel [in / M, out]), so that two layers cost one all-reduce (Shoeybi et al., 2019, section 3).
Target network and optimizer moments lie as the parameters do. Environments, replay and batch are split over `data`.
XLA partitions the one trainer by these placements; nothing here computes.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from jaxdqn import agents, training
from jaxdqn.base import Array, Key, Progress, PyTree, Replay
from jaxdqn.components import Components, in_programs
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import population
from jaxdqn.parallel.compiled import runner as _runner
from jaxdqn.parallel.compiled.memory import tree_bytes
from jaxdqn.parallel.compiled.runner import Runner
from jaxdqn.parallel.scheme import Devices, Scheme
from jaxdqn.validation import check_divides

DATA, MODEL = "data", "model"
_LAYER = re.compile(r"(Dense|LayerNorm)_(\d+)/(kernel|bias|scale)(_sigma)?$")
_FIELD = re.compile(r"(?:^|/)(learner|actor|replay)/")


def make_mesh(devices: Sequence[jax.Device], model: int) -> Mesh:
    """D devices as a mesh [D / model, model]. Raises `UserError` where they do not divide."""
    if model < 1 or len(devices) % model:
        raise UserError(
            f"{len(devices)} devices cannot be divided into groups of model {model}; use a model that divides them, "
            f"{_nearest_divisor(len(devices), model)}, say."
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(-1, model), (DATA, MODEL), axis_types=axis_types)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def _path(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def dense_kernels(params: PyTree) -> list[tuple[int, ...]]:
    """The shapes [in, out] of a network's dense layers, in the order they were made."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        match = _LAYER.search(_path(path))
        if match and match[1] == "Dense" and match[3] == "kernel" and not match[4]:
            found[int(match[2])] = tuple(leaf.shape[-2:])
    return [found[index] for index in sorted(found)]


def check(components: Components, data: int, model: int) -> int:
    """The number of hidden dense layers. Raises `UserError` where they, or environments and batch, cannot be split."""
    config = components.config
    if agents.of(config.agent).memory is not None:
        raise UserError(
            f"agent {config.agent!r} is recurrent: its network and sequences are not split over devices in this "
            "scheme; use --devices-per-agent without --parallel."
        )
    if model > 1 and agents.of(config.agent).stacked:
        raise UserError(f"agent {config.agent!r} has several networks, whose layers are not split; use model 1.")
    params = jax.eval_shape(lambda: components.agent.init(jax.random.key(0), components.agent.defaults).params)
    hidden = dense_kernels(params)[: -num_heads(config)]
    if not hidden:
        raise UserError(
            f"the network of agent {config.agent!r} has no hidden dense layers to split over model {model} devices; "
            "use model 1."
        )
    for index, (_, width) in enumerate(hidden):
        if index % 2 == 0 and width % model:
            nearest = max(1, round(width / model)) * model
            raise UserError(
                f"hidden layer {index + 1} has width {width}, which cannot be divided over model {model} devices; use "
                f"{nearest}, say."
            )
    check_divides(config, data, "groups of devices")
    return len(hidden)


def num_heads(config: Config) -> int:
    """The dense layers that are heads."""
    return agents.of(config.agent).head(1, agents.with_always(config).dueling, agents.settings_of(config)).num_layers


def parameter_spec(path: str, num_hidden: int) -> P:
    """How one parameter (or a moment of it) lies on the mesh, from its path.

    The heads after an even layer take its split outputs as their inputs; after an odd one they are whole everywhere.
    """
    match = _LAYER.search(path)
    if not match:
        return P()
    layer, index, name = match[1], int(match[2]), match[3]
    if index >= num_hidden:
        index = num_hidden
        if num_hidden % 2 == 0:
            return P()
    if index % 2 == 0:
        return P(None, MODEL) if name == "kernel" else P(MODEL)
    return P(MODEL, None) if layer == "Dense" and name == "kernel" else P()


def state_spec(path: str, shape: tuple[int, ...], num_hidden: int, num_envs: int) -> P:
    """How a leaf of a `TrainState`, or of what else a program returns, lies on the mesh: from its path and shape."""
    match = _FIELD.search(path)
    field = match[1] if match else ""
    if field == "learner":
        return parameter_spec(path, num_hidden)
    if field == "actor" and shape[:1] == (num_envs,):
        return P(DATA)
    if field == "replay" and shape[1:2] == (num_envs,):
        return P(None, DATA)
    return P()


def _over_mesh(mesh: Mesh, num_hidden: int, num_envs: int) -> Callable[..., PyTree]:
    """`devices.over_devices` for one member on the whole mesh: its arrays [1, 1, ...] are spread over all devices."""

    def place(path: KeyPath, leaf: Array) -> Array:
        spec = state_spec(_path(path), leaf.shape[2:], num_hidden, num_envs)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(None, None, *spec)))

    def over(
        function: Callable[..., PyTree],
        devices: Sequence[jax.Device],
        num_mapped: int,
        num_shared: int = 0,
        donate: Sequence[int] = (),
    ) -> jax.stages.Wrapped:
        del devices, num_shared

        def on_mesh(*args: object) -> PyTree:
            mapped = jax.tree.map(lambda x: x[0], args[:num_mapped])
            results = jax.tree.map(lambda x: x[None], function(*mapped, *args[num_mapped:]))
            return jax.tree_util.tree_map_with_path(place, results)

        return jax.jit(on_mesh, donate_argnums=tuple(donate))

    return over


def _split_batches(replay: Replay, mesh: Mesh) -> Replay:
    """The same replay, whose batches are split over `data`."""
    split = NamedSharding(mesh, P(DATA))

    def sample(state: PyTree, key: Key, progress: Progress, hparams: HParams) -> PyTree:
        batch = replay.sample(state, key, progress, hparams)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split), batch)

    return replay._replace(sample=sample)


def bytes_per_device(tree: PyTree) -> int:
    """The bytes of a tree of arrays that lie on the device that holds most of them."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for piece in leaf.addressable_shards:
            held[piece.device] = held.get(piece.device, 0) + piece.data.nbytes
    return max(held.values(), default=0)


def state_bytes(components: Components, data: int, model: int) -> tuple[int, int]:
    """Bytes of the state that lie on one device of a mesh [data, model], and of the replay's part alone."""
    num_hidden, sizes = check(components, data, model), {DATA: data, MODEL: model}
    trainer = training.make_trainer(components.environment, components.agent, components.replay, components.config)
    state = jax.eval_shape(lambda key: trainer.init(key, key, components.agent.defaults), jax.random.key(0))

    def held(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> int:
        spec = state_spec(_path(path), leaf.shape, num_hidden, components.config.num_envs)
        return tree_bytes(leaf) // math.prod(sizes[axis] for axis in spec if axis is not None)

    of_state, of_replay = (
        sum(held(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(tree))
        for tree in (state, {"replay": state.replay})
    )
    return of_state, of_replay


def build(
    components: Components, devices: Sequence[jax.Device], seeds: Sequence[int], settings: Sequence[HParams], model: int
) -> tuple[Runner, list[training.TrainState]]:
    """One member on a mesh [D / model, model]; `components` are those of the whole agent, `make_components(config)`.

    Raises `UserError` where the network, or environments and batch, cannot be split so.
    """
    mesh = make_mesh(devices, model)
    num_hidden = check(components, mesh.shape[DATA], model)
    over = _over_mesh(mesh, num_hidden, components.config.num_envs)
    split = components._replace(replay=_split_batches(components.replay, mesh))
    assignment = population.assign(1, 1)
    kind = (components._replace(config=in_programs(components.config)), tuple(devices), model)
    runner, states = _runner.build(split, devices[:1], 1, assignment, seeds, settings, width=1, over=over, kind=kind)
    figures = {
        "param_bytes_per_device": bytes_per_device(states[0].learner.params),
        "bytes_per_update": collective_bytes(runner.program.as_text()) / components.config.updates_per_iteration,
    }
    return runner._replace(components=components, telemetry=lambda states: figures), states


def collective_bytes(program: str) -> int:
    """Bytes of the results of all collectives in a compiled program's text, each counted once: those of an iteration,
    where loops inside it (a rollout's steps, several updates) are of length one."""
    shapes = re.findall(r"= \(?((?:\w+\[[\d,]*\][^ ]* ?)+)\)? (?:all-reduce|all-gather|collective-permute)", program)
    arrays = [array for shape in shapes for array in re.findall(r"(pred|[a-z]+)(\d*)\[([\d,]*)\]", shape)]
    return sum(int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n) for _, bits, dims in arrays)


class Axes(NamedTuple):
    """The mesh that an agent is split over: data x (workers / data)."""

    workers: int = 4
    """Devices of the mesh."""
    data: int = 1
    """Into how many parts environments, batch and replay are split; the network into workers / data."""


def check_axes(axes: Axes, config: Config) -> None:
    """Raises `UserError` for numbers that are no mesh."""
    del config
    if axes.data < 1 or axes.workers % axes.data:
        raise UserError(f"axes.data {axes.data} does not divide axes.workers {axes.workers}: the mesh is data x model.")


def _check_components(axes: Axes, components: Components) -> None:
    check(components, axes.data, axes.workers // axes.data)


SHARDING = Scheme(
    Axes,
    lambda job: build(job.components, job.devices, job.seeds, job.settings, job.axes.workers // job.axes.data),
    lambda axes, components: state_bytes(components, axes.data, axes.workers // axes.data),
    lambda axes: Devices(axes.workers, axes.workers, exact=True),
    check_axes,
    _check_components,
    replays=lambda axes: axes.data,
    divides_iterations=True,
)
