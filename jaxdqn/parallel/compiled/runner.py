"""A runner: one batch of members on a set of devices, as compiled programs over the one trainer.

Arrays have leading axes [D, L]: D devices with L lanes each. An agent over several devices has one shard in each
device of its group. On several hosts D counts the devices of this process alone, except in what `gather` returns.
"""

import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxdqn import acting, evaluation, evaluation_on_host, telemetry, training
from jaxdqn.base import Array, PyTree, Scalar
from jaxdqn.components import Components, in_programs
from jaxdqn.config import HParams
from jaxdqn.learning import Shards, shard_index
from jaxdqn.parallel import hosts
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled import population
from jaxdqn.parallel.compiled.memory import once_each, remembered, tree_bytes
from jaxdqn.parallel.compiled.population import Assignment

PARAMS_STREAM, EXPERIENCE_STREAM = 0, 1
Program = Callable[..., PyTree]
"""A compiled function."""
MOST_UNSPLIT = 128  # updates of an iteration that Ctrl-C may have to wait for
PARTS_OF_REFILL = 100  # each as long as Ctrl-C may have to wait for
GoOn = Callable[[int, int], bool]
"""Of how many iterations are done, and how many there are, whether to go on."""


def _bare(leaf: Array) -> Array:
    """An array, or the data of a key."""
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def gather(stacks: list[PyTree]) -> PyTree:
    """Stacks of lanes [D, W, ...] as one tree of NumPy arrays [D, L, ...], D over all hosts, keys as their data."""

    def pull(leaf: Array) -> np.ndarray:
        leaf = _bare(leaf)
        # Shard by shard, where it lies in slices of its first axis: converting a sharded array as a whole is slow.
        order = layouts.get(layout := (leaf.sharding, leaf.shape))
        if order is None:
            order = layouts[layout] = _slices(leaf)
        pieces = [np.asarray(leaf.addressable_data(index)) for index in order]
        return np.concatenate(pieces) if pieces else np.asarray(leaf)

    layouts: dict[Hashable, list[int]] = {}  # a population has thousands of leaves and few of these, slow to read
    pulled = [jax.tree.map(pull, stack) for stack in stacks]
    whole = pulled[0] if len(pulled) == 1 else jax.tree.map(lambda *x: np.concatenate(x, axis=1), *pulled)
    return hosts.gather(whole)


def _slices(leaf: jax.Array) -> list[int]:
    """The shards of an array in the order of their slices of its first axis; none where they are no such slices."""
    shards = leaf.addressable_shards
    if sum(shard.data.size for shard in shards) > leaf.size or shards[0].data.shape[1:] != leaf.shape[1:]:
        return []
    return sorted(range(len(shards)), key=lambda i: shards[i].index[0].start or 0)


def push(like: Array, value: np.ndarray) -> Array:
    """An array or, of its data, a key with the placement of `like`."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.device_put(value, jax.random.key_data(like).sharding))
    return jax.device_put(value, like.sharding)


def scatter(templates: list[PyTree], values: PyTree) -> list[PyTree]:
    """The inverse of `gather` on one host: values [D, L, ...] of its devices as stacks with the placement and types of
    `templates`."""
    stacks, first = [], 0
    for template in templates:
        width = jax.tree.leaves(template)[0].shape[1]
        part = jax.tree.map(lambda x: x[:, first : first + width], values)
        stacks.append(jax.tree.map(push, template, part))
        first += width
    return stacks


def gather_one(only: list[PyTree]) -> PyTree:
    """`gather` of one member on one device, whose arrays have no leading axes: [1, 1, ...]."""

    return jax.tree.map(lambda leaf: np.asarray(_bare(leaf))[None, None], only[0])


def scatter_one(template: list[PyTree], values: PyTree) -> list[PyTree]:
    """The inverse of `gather_one`."""
    return [jax.tree.map(lambda like, value: push(like, value[0, 0]), template[0], values)]


def whole(state: PyTree) -> PyTree:
    """`Runner.lean` of a state whose replay is the newest block."""
    return state


class Runner(NamedTuple):
    """Compiled programs over stacks of lanes. A stack's arrays are [D, W, ...], or without these axes where Python
    takes one member on; `states` and `metrics` are lists of stacks, and the states that `prefill` and `step` are given
    are donated.

    prefill, step(states, metrics, start, stop) -> (states, metrics)
    evaluate(states, iteration, part=0) -> Episodes [D, W, E] per stack; for `part` see `evaluation.episode_key`
    telemetry(states) -> figures of the parallel scheme at a logging point, scalars by column name
    measure(states, iteration) -> `telemetry.measure` [D, W] per stack, compiled when it is first called; None where the
    scheme has no such thing
    measured: the names of its columns, where it was asked for by `measuring`
    policy(states) -> the parameters that are judged and kept for use, where an agent's shards may differ between two
    logging points; None where they may not, and it is what any shard has learned
    part(states, metrics, iteration, first, last) -> (states, metrics): updates first <= u < last of an iteration, which
    with first 0 also acts; None where an iteration is short enough for a call of its own
    adopted(states) -> the states into whose learners the caller has put other parameters, with these wherever else
    the scheme keeps some
    lean(state) -> a stack of states without the replay, and without the environments that fill it: what a checkpoint
    holds at least; all of it where the replay is but the newest block
    refill(states, iteration, go_on) -> states: of `lean` ones, with all else as it is at a run's beginning, those of a
    run that has done so many iterations: with all the rows that can be drawn, acted now. go_on(done, all) is asked
    before each of its parts, with iterations; False leaves it unfinished
    gather, scatter: between stacks and NumPy arrays [D, L, ...], as the functions of that name

    Every parallel scheme is a runner: a way to take `states` from one iteration to a later one. Logging, evaluation,
    checkpoints, resume and stops are the driver's, and the same for all.
    """

    components: Components
    assignment: Assignment
    shards: int
    prefill: Program
    step: Program
    evaluate: Program
    zero_metrics: list[training.Metrics]
    compile_seconds: float
    program: Any = None  # the compiled step of one stack, for its memory analysis, where there is one
    telemetry: Callable[[list[PyTree]], Mapping[str, Scalar]] = lambda states: {}
    measure: Callable[[list[PyTree], int], list[dict[str, Array]]] | None = None
    measured: tuple[str, ...] = ()
    policy: Callable[[list[PyTree]], list[PyTree]] | None = None
    adopted: Callable[[list[PyTree]], list[PyTree]] = lambda states: states
    part: Program | None = None
    lean: Callable[[PyTree], PyTree] = whole
    refill: Callable[[list[PyTree], int, GoOn], list[PyTree]] = lambda states, iteration, go_on: states
    gather: Callable[[list[PyTree]], PyTree] = gather
    scatter: Callable[[list[PyTree], PyTree], list[PyTree]] = scatter


def without(record: Any, *names: str) -> PyTree:
    """A NamedTuple with nothing in the fields called `names`."""
    return record._replace(**dict.fromkeys(names, ()))


def lean(state: PyTree) -> PyTree:
    """`Runner.lean` of a state with an `actor` and a `replay`."""
    return without(state, "actor", "replay")


def in_parts(
    run: Program, states: list[PyTree], metrics: list[PyTree], start: int, stop: int, go_on: GoOn
) -> list[PyTree]:
    """run(states, metrics, first, last) over iterations start <= i < stop, for `Runner.refill`; the metrics of these
    count nowhere."""
    length = max(1, -(-(stop - start) // PARTS_OF_REFILL))
    for first in range(start, stop, length):
        if not go_on(first - start, stop - start):
            break
        states, _ = jax.block_until_ready(run(states, metrics, first, min(first + length, stop)))
    return states


def measuring(runner: Runner, states: list[PyTree]) -> Runner:
    """`runner`, asked for what it measures of states like these; it is compiled, which counts in `compile_seconds`."""
    assert runner.measure is not None
    began = time.perf_counter()
    columns = jax.block_until_ready(runner.measure(states, 0))
    seconds = runner.compile_seconds + time.perf_counter() - began
    return runner._replace(measured=tuple(columns[0]), compile_seconds=seconds)


class Lane(NamedTuple):
    """What a scheme does in one lane of one device, as pure functions of one shard of one member.

    init, zero_metrics: as in `training.Trainer`, but with any state that has a `learner`
    prefill, step(state, metrics, hparams, start [], stop []) -> (state, metrics): iterations start <= i < stop
    policy(state) -> the parameters that are judged
    refill(state, metrics, hparams, start [], stop []) -> (state, metrics): the same as `step`, but nothing is learned
    part(state, metrics, hparams, iteration [], first [], last []) -> (state, metrics), or None: as in `Runner`
    """

    init: Callable[..., PyTree]
    zero_metrics: Callable[[], training.Metrics]
    prefill: Callable[..., tuple[PyTree, training.Metrics]]
    step: Callable[..., tuple[PyTree, training.Metrics]]
    policy: Callable[[PyTree], PyTree]
    refill: Callable[..., tuple[PyTree, training.Metrics]]
    part: Callable[..., tuple[PyTree, training.Metrics]] | None = None


def fused(trainer: training.Trainer) -> Lane:
    """The trainer's iterations, one after the other."""
    prefill, step, refill = map(training.loop, (trainer.prefill, trainer.step, trainer.refill))

    def part(
        state: PyTree,
        metrics: training.Metrics,
        hparams: HParams,
        iteration: Array,
        first: Array,
        last: Array,
    ) -> tuple[PyTree, training.Metrics]:
        return trainer.part(state, metrics, iteration, first, last, hparams)

    return Lane(trainer.init, trainer.zero_metrics, prefill, step, lambda state: state.learner.params, refill, part)


def shard_bytes(components: Components) -> tuple[int, int]:
    """Bytes of one shard's whole state, and of its replay alone."""
    trainer = training.make_trainer(components.environment, components.agent, components.replay, components.config)
    key = jax.random.key(0)
    return tree_bytes(jax.eval_shape(lambda k: trainer.init(k, k, components.agent.defaults), key)), tree_bytes(
        jax.eval_shape(components.replay.init)
    )


def transition_bytes(components: Components) -> float:
    """Bytes that a replay takes for each transition it holds; 0 where it is the newest block."""
    held = components.replay.rows * components.config.num_envs
    return tree_bytes(jax.eval_shape(components.replay.init)) / held if held else 0.0


def evaluation_bytes(components: Components) -> int:
    """Bytes of the environments of one member's evaluation."""
    start = functools.partial(acting.start, components.environment, components.agent, components.config.eval_episodes)
    return tree_bytes(jax.eval_shape(start, jax.random.key(0)))


def greedy_episodes(
    components: Components,
    params: PyTree,
    seed: Array | int,
    iteration: Array | int,
    part: Array | int,
    shard: Array | int = 0,
) -> evaluation.Episodes:
    """One shard's episodes in an evaluation of a member with this seed; with common evaluation, the same for all."""
    config, key = components.config, _episode_key(components, seed, iteration, part, shard)
    bounds = config.eval_episodes, config.eval_max_steps
    return evaluation.evaluate(components.environment, components.agent, params, key, *bounds, config.eval_epsilon)


def _episode_key(
    components: Components, seed: Array | int, iteration: Array | int, part: Array | int, shard: Array | int = 0
) -> Array:
    return evaluation.episode_key(0 if components.config.common_evaluation else seed, iteration, part, shard)


def traced_hparams(hparams: HParams) -> HParams:
    """The hyperparameters of one member, each a float32 []."""
    return jax.tree.map(np.float32, hparams)


@once_each
def evaluator(components: Components) -> Callable[..., evaluation.Episodes]:
    """evaluate(params, seed, iteration [], part []) -> Episodes of one member on one device, or on the host."""
    if components.environment.on_host is None:
        return jax.jit(functools.partial(greedy_episodes, components))
    config = components.config
    bounds = config.eval_episodes, config.eval_max_steps, config.eval_epsilon, config.env_timeout
    play = evaluation_on_host.player(components.environment, components.agent, *bounds)
    return lambda params, *when: play(params, _episode_key(components, *when))


class HostLoop(Protocol):
    """One member that Python code takes through a chunk of iterations, program by program, maybe in threads."""

    components: Components
    zero_metrics: training.Metrics

    def init(self, seed: int) -> PyTree:
        """The run's first state."""

    def warm_up(self, state: PyTree) -> None:
        """Compiles every program; `state` stays as it is."""

    def run(
        self, states: list[PyTree], metrics: list[training.Metrics], start: int, stop: int, learning: bool
    ) -> tuple[list[PyTree], list[training.Metrics]]:
        """Iterations start <= i < stop."""

    def telemetry(self, states: list[PyTree]) -> Mapping[str, Scalar]:
        """Its figures at a logging point."""

    def lean(self, state: PyTree) -> PyTree:
        """As in `Runner`, but also without a replay of the newest block."""

    def refill(self, states: list[PyTree], iteration: int, go_on: GoOn) -> list[PyTree]:
        """As in `Runner`."""


def of_host_loop(make: Callable[[], HostLoop], seed: int) -> tuple[Runner, list[PyTree]]:
    """The runner of a loop's one member, and its first states."""
    began = time.perf_counter()
    loop = make()
    judge, state = evaluator(loop.components), loop.init(seed)

    def evaluate(states: list[PyTree], iteration: int, part: int = 0) -> list[evaluation.Episodes]:
        return [judge(states[0].learner.params, np.uint32(seed), np.int32(iteration), np.int32(part))]

    loop.warm_up(state)
    if loop.components.environment.on_host is None:  # there, an evaluation is long, and its programs are small
        jax.block_until_ready(evaluate([state], 0))
    runner = Runner(
        components=loop.components,
        assignment=population.assign(1, 1),
        shards=1,
        prefill=functools.partial(loop.run, learning=False),
        step=functools.partial(loop.run, learning=True),
        evaluate=evaluate,
        zero_metrics=[loop.zero_metrics],
        compile_seconds=time.perf_counter() - began,
        telemetry=loop.telemetry,
        lean=loop.lean if loop.components.replay.rows else whole,
        refill=loop.refill,
        gather=gather_one,
        scatter=scatter_one,
    )
    return runner, [state]


class Programs(NamedTuple):
    """What is compiled of one stack: see `Runner`, and for `init` `_init_lane`."""

    init: Program
    prefill: Program
    step: Program
    evaluate: Program
    measure: Program
    refill: Program


def build(
    components: Components,
    devices: Sequence[jax.Device],
    devices_per_agent: int,
    assignment: Assignment,
    seeds: Sequence[int],
    settings: Sequence[HParams],
    width: int | None = None,
    lane: Lane | None = None,
    over: Callable[..., PyTree] = _devices.over_devices,
    kind: Hashable = None,
) -> tuple[Runner, list[PyTree]]:
    """Compiles the programs and initialises the members. `seeds` and `settings` are those of the assignment.

    `width` lanes are vmapped together; it must divide their number, and is by default the fastest for the backend.
    `lane` is the scheme, by default `fused`; `over` spreads its functions over the devices; `kind` stands for both and
    the components where what they are made of says more than they do. Equal programs are compiled once in a process.
    """
    began = time.perf_counter()
    shards = _devices.make_shards(len(devices), devices_per_agent)
    width = width or population.fastest_width(devices[0].platform, assignment.num_lanes)
    seen = kind or (components._replace(config=in_programs(components.config)), lane, over)
    split = _is_split(components, lane)
    key = (seen, tuple(devices), devices_per_agent, width, split)
    made: list[PyTree] = []  # states, metrics, hparams and seeds, a stack each

    def initialise(init: Program) -> None:
        spread = jax.tree.map(
            lambda x: assignment.spread(x, devices_per_agent)[_devices.own(devices)],
            (
                np.asarray(seeds, np.uint32),
                population.stack_hparams([components.agent.complete(setting) for setting in settings]),
            ),
        )
        stacks = range(0, assignment.num_lanes, width)
        made.extend(init(*jax.tree.map(lambda x: x[:, i : i + width], spread)) for i in stacks)

    def compile_them() -> Programs:
        runs = lane or fused(
            training.make_trainer(
                components.environment, components.agent, components.replay, components.config, shards
            )
        )
        init = over(population.over_lanes(functools.partial(_init_lane, runs, shards)), devices, num_mapped=2)
        initialise(init)
        return _compile(components, runs, shards, devices, over, init, made[0])

    programs = remembered(key, compile_them)
    if not made:
        initialise(programs.init)
    states, metrics, hparams, own_seeds = (list(column) for column in zip(*made, strict=True))
    made.clear()  # the states are donated: nobody else may hold them

    def evaluate(states: list[PyTree], iteration: int, part: int = 0) -> list[evaluation.Episodes]:
        when = np.int32(iteration), np.int32(part)
        return [programs.evaluate(state, seed, *when) for state, seed in zip(states, own_seeds, strict=True)]

    def measure(states: list[PyTree], iteration: int) -> list[dict[str, Array]]:
        return [programs.measure(s, h, np.int32(iteration)) for s, h in zip(states, hparams, strict=True)]

    def refill(states: list[PyTree], iteration: int, go_on: GoOn) -> list[PyTree]:
        held = components.replay.rows // components.config.rollout_length
        start = max(0, iteration - held)
        return in_parts(_stack_by_stack(programs.refill, hparams), states, metrics, start, iteration, go_on)

    run = _stack_by_stack(programs.step, hparams)
    one_lane = tree_bytes(states[0].learner.params) / states[0].learner.updates.size
    moved = all_reduce_bytes(one_lane, devices_per_agent)
    runner = Runner(
        components=components,
        assignment=assignment,
        shards=devices_per_agent,
        prefill=_stack_by_stack(programs.prefill, hparams),
        step=functools.partial(_whole, run, components.config.updates_per_iteration) if split else run,
        evaluate=evaluate,
        zero_metrics=metrics,
        compile_seconds=time.perf_counter() - began,
        program=programs.step,
        telemetry=lambda states: {"bytes_per_update": moved},
        measure=measure,
        part=run if split else None,
        lean=lean if components.replay.rows else whole,
        refill=refill,
    )
    return runner, states


# Inside a mapped function: states made elsewhere would be uncommitted, and compile a second time.
def _init_lane(lane: Lane, shards: Shards | None, seed: Array | int, hparams: HParams) -> tuple[PyTree, ...]:
    """(state, metrics, hparams, seed) of one lane."""
    key = jax.random.key(seed)
    stream = jax.random.fold_in(jax.random.fold_in(key, EXPERIENCE_STREAM), shard_index(shards))
    state = lane.init(jax.random.fold_in(key, PARAMS_STREAM), stream, hparams)
    return state, lane.zero_metrics(), hparams, seed


def _is_split(components: Components, lane: Lane | None) -> bool:
    """Whether an iteration is too long for one call."""
    return (lane is None or lane.part is not None) and components.config.updates_per_iteration > MOST_UNSPLIT


def _compile(
    components: Components,
    lane: Lane,
    shards: Shards | None,
    devices: Sequence[jax.Device],
    over: Callable[..., PyTree],
    init: Program,
    stack: tuple[PyTree, ...],
) -> Programs:
    """The programs for stacks like `stack`, (states, metrics, hparams, seeds)."""
    states, metrics, hparams, own_seeds = stack

    def chunk(run: Program, count: int) -> jax.stages.Wrapped:
        return over(population.over_lanes(run, num_shared=count), devices, 3, num_shared=count, donate=(0,))

    def compiled(run: Program, *bounds: int) -> Program:
        return _devices.compiled(chunk(run, len(bounds)), states, metrics, hparams, *map(np.int32, bounds))

    def evaluate_lane(
        state: PyTree, seed: Array | int, iteration: Array | int, part: Array | int
    ) -> evaluation.Episodes:
        return greedy_episodes(components, lane.policy(state), seed, iteration, part, shard_index(shards))

    def measure_lane(state: PyTree, hparams: HParams, iteration: Array) -> dict[str, Array]:
        return telemetry.measure(components, state, iteration, hparams, shards.size if shards else 1)

    over_stack = over(population.over_lanes(evaluate_lane, num_shared=2), devices, num_mapped=2, num_shared=2)
    judge = _devices.compiled(over_stack, states, own_seeds, np.int32(0), np.int32(0))
    split = lane.part if _is_split(components, lane) else None
    step = compiled(lane.step, 0, 1) if split is None else compiled(split, 0, 0, 1)
    measure = over(population.over_lanes(measure_lane, num_shared=1), devices, num_mapped=2, num_shared=1)
    return Programs(init, compiled(lane.prefill, 0, 1), step, judge, measure, chunk(lane.refill, 2))


def all_reduce_bytes(size: float, num_devices: int) -> float:
    """Bytes each of D devices sends for the mean of `size` bytes: a ring all-reduce passes each part of them on D - 1
    times to sum it, and D - 1 times to spread the sum."""
    return size * 2 * (num_devices - 1) / num_devices


def _stack_by_stack(program: Program, hparams: list[HParams]) -> Program:
    """One call per stack: they queue on the devices while Python goes on."""

    def run(states: list[PyTree], metrics: list[PyTree], *bounds: int) -> tuple[list[PyTree], list[PyTree]]:
        done = [program(s, m, h, *map(np.int32, bounds)) for s, m, h in zip(states, metrics, hparams, strict=True)]
        return [state for state, _ in done], [sums for _, sums in done]

    return run


def _whole(
    part: Program, num_updates: int, states: list[PyTree], metrics: list[PyTree], start: int, stop: int
) -> tuple[list[PyTree], list[PyTree]]:
    """Iterations start <= i < stop, each as one part."""
    for iteration in range(start, stop):
        states, metrics = part(states, metrics, iteration, 0, num_updates)
    return states, metrics
