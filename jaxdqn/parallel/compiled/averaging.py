"""Periodic averaging: replicas that train on their own and combine their parameters every `period` iterations.

Each of D devices holds one replica, with its own environments, replay, optimizer state and batch (the configuration's
totals divided by D, as for data parallelism), and takes no mean of gradients. What averaging saves is communication:
2 (D - 1) / D of the parameters' bytes per combination instead of per update. Averaging every iteration equals the mean
of gradients for plain SGD with one update per iteration; not for Adam, whose moments stay each replica's own.

    replica 0   step step step step .            step ...
    replica 1   step step step step . combine -> step ...      combine where iteration % period == 0
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdqn import training
from jaxdqn.acting import ActorState
from jaxdqn.base import Array, Key, LearnerState, PyTree, Scalar
from jaxdqn.components import Components, in_programs
from jaxdqn.config import INT32_MAX, Config, HParams, traced
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.learning import Shards, all_finite, mean_over_shards
from jaxdqn.parallel.compiled import devices as _devices
from jaxdqn.parallel.compiled import population
from jaxdqn.parallel.compiled import runner as _runner
from jaxdqn.parallel.compiled.memory import tree_bytes
from jaxdqn.parallel.compiled.runner import Lane, Runner
from jaxdqn.parallel.scheme import Built, Devices, Job, Scheme
from jaxdqn.training import Metrics, TrainState
from jaxdqn.validation import validate as validate_config


class Rule(NamedTuple):
    """How replicas are combined, as pure functions of one replica; `mean` is that of all replicas' parameters.

    init(params) -> what the rule keeps, equal on all replicas, () where it keeps nothing
    combine(params, mean, kept, num_replicas) -> (params, kept)
    policy(mean, kept) -> the parameters that are judged
    """

    init: Callable[[PyTree], PyTree]
    combine: Callable[[PyTree, PyTree, PyTree, int], tuple[PyTree, PyTree]]
    policy: Callable[[PyTree, PyTree], PyTree]


def mean() -> Rule:
    """Every replica takes the mean: local SGD (Stich, 2019)."""
    return Rule(lambda params: (), lambda params, mean, kept, _: (mean, kept), lambda mean, kept: mean)


class Outer(NamedTuple):
    """What `outer` keeps: the anchor from which the replicas set out, and the momentum of its optimizer."""

    anchor: PyTree
    momentum: PyTree


def outer(learning_rate: float = 0.7, momentum: float = 0.9) -> Rule:
    """The anchor takes a Nesterov step along anchor - mean, and every replica takes the anchor: DiLoCo (Douillard et
    al., 2023, algorithm 1). learning_rate 1 and momentum 0 is `mean`."""
    optimizer = optax.sgd(learning_rate, momentum, nesterov=True)

    def init(params: PyTree) -> Outer:
        # A copy: donating a state whose leaves alias one another fails.
        return Outer(jax.tree.map(jnp.copy, params), optimizer.init(params))

    def combine(params: PyTree, mean: PyTree, kept: Outer, _: int) -> tuple[PyTree, Outer]:
        delta = jax.tree.map(jnp.subtract, kept.anchor, mean)
        steps, velocity = optimizer.update(delta, kept.momentum, kept.anchor)
        anchor = optax.apply_updates(kept.anchor, steps)
        return anchor, Outer(anchor, velocity)

    return Rule(init, combine, lambda mean, kept: kept.anchor)


def elastic(beta: float = 0.9) -> Rule:
    """Replicas and a center pull at one another: x_i <- x_i - alpha (x_i - c), c <- c + beta mean_i(x_i - c), with
    alpha = beta / D and both right sides from before. Synchronous EASGD (Zhang et al., 2015, equations 5 and 6)."""

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.copy, params)  # as above

    def combine(params: PyTree, mean: PyTree, center: PyTree, num_replicas: int) -> tuple[PyTree, PyTree]:
        alpha = beta / num_replicas
        pulled = jax.tree.map(lambda x, c: x - alpha * (x - c), params, center)
        return pulled, jax.tree.map(lambda m, c: c + beta * (m - c), mean, center)

    return Rule(init, combine, lambda mean, kept: kept)


RULES: dict[str, Callable[..., Rule]] = {"mean": mean, "outer": outer, "elastic": elastic}


class AveragedState(NamedTuple):
    """One replica: a `TrainState`, what the rule keeps, and how far apart the replicas were.

    `drift` [] is the root mean square, over replicas, of the Euclidean distance from their mean just before the last
    combination; 0 before the first.
    """

    learner: LearnerState
    actor: ActorState
    replay: PyTree
    key: Key
    kept: PyTree
    drift: Array

    @property
    def train(self) -> TrainState:
        return TrainState(self.learner, self.actor, self.replay, self.key)


class Schedule(NamedTuple):
    """When to combine: after every iteration until `dense_updates` gradient updates are done (post-local SGD: Lin et
    al., 2020), then after each whose number is a multiple of `period`."""

    period: int
    dense_updates: int

    def next(self, iteration: Array, updates: Array) -> Array:
        """The iteration count at which replicas are combined next, after `iteration` and `updates`."""
        wait = jnp.where(updates < self.dense_updates, 1, self.period - iteration % self.period)
        return iteration + jnp.minimum(wait, INT32_MAX - iteration)  # no run has an iteration of that number


def combine(state: AveragedState, rule: Rule, shards: Shards | None) -> AveragedState:
    """The state of one replica after a combination over all of them.

    The rule is for the parameters. Target parameters become their mean under every rule, so that all replicas
    bootstrap from one target; optimizer states stay. A replica that is frozen (`first_bad_update`) freezes all, and so
    does a combination that is not finite: it is not taken.
    """
    learner = state.learner
    average, target = mean_over_shards((learner.params, learner.target_params), shards)
    gaps = jax.tree.map(lambda x, m: jnp.sum(jnp.square(x - m)), learner.params, average)
    drift = jnp.sqrt(mean_over_shards(jnp.sum(jnp.array(jax.tree.leaves(gaps), jnp.float32)), shards))
    params, kept = rule.combine(learner.params, average, state.kept, shards.size if shards else 1)
    first_bad = jnp.where(
        all_finite((params, target, kept)) | (learner.first_bad_update >= 0), learner.first_bad_update, learner.updates
    )
    if shards is not None:
        earliest = jax.lax.pmin(jnp.where(first_bad < 0, INT32_MAX, first_bad), shards.axis_name)
        first_bad = jnp.where(earliest == INT32_MAX, -1, earliest)
    taken = (params, target, kept), (learner.params, learner.target_params, state.kept)
    params, target, kept = jax.tree.map(lambda new, old: jnp.where(first_bad < 0, new, old), *taken)
    learner = learner._replace(params=params, target_params=target, first_bad_update=first_bad)
    return state._replace(learner=learner, kept=kept, drift=drift)


def averaged(trainer: training.Trainer, rule: Rule, schedule: Schedule, shards: Shards | None) -> Lane:
    """The iterations of `trainer`, whose shards take no mean, in rounds that end with a combination."""
    num_replicas = shards.size if shards else 1
    prefill_some, step_some = training.loop(trainer.prefill), training.loop(trainer.step)
    refill_some = training.loop(trainer.refill)

    def own_steps(hparams: HParams) -> HParams:
        # A replica counts its own environment steps, a D-th of all.
        return traced(hparams, epsilon_steps=hparams.epsilon_steps / num_replicas)

    def init(params_key: Key, stream_key: Key, hparams: HParams) -> AveragedState:
        train = trainer.init(params_key, stream_key, hparams)
        return AveragedState(*train, rule.init(train.learner.params), jnp.float32(0))

    def prefill(
        state: AveragedState, metrics: Metrics, hparams: HParams, start: Array, stop: Array
    ) -> tuple[AveragedState, Metrics]:
        train, metrics = prefill_some(state.train, metrics, hparams, start, stop)
        return state._replace(**train._asdict()), metrics

    def step(
        state: AveragedState, metrics: Metrics, hparams: HParams, start: Array, stop: Array
    ) -> tuple[AveragedState, Metrics]:
        hparams = own_steps(hparams)

        def a_round(carry: tuple[Array, AveragedState, Metrics]) -> tuple[Array, AveragedState, Metrics]:
            iteration, state, metrics = carry
            due = schedule.next(iteration, state.learner.updates)
            end = jnp.minimum(due, stop)
            train, metrics = step_some(state.train, metrics, hparams, iteration, end)
            state = state._replace(**train._asdict())
            # A chunk may end within a round: then the combination is dropped, which costs less than a second program.
            combined = combine(state, rule, shards)
            pairs = [(s.learner, s.kept, s.drift) for s in (combined, state)]
            learner, kept, drift = jax.tree.map(lambda new, old: jnp.where(end == due, new, old), *pairs)
            state = state._replace(learner=learner, kept=kept, drift=drift)
            return end, state, metrics._replace(first_bad_update=state.learner.first_bad_update)

        done = jax.lax.while_loop(lambda carry: carry[0] < stop, a_round, (start, state, metrics))
        return done[1], done[2]

    def refill(
        state: AveragedState, metrics: Metrics, hparams: HParams, start: Array, stop: Array
    ) -> tuple[AveragedState, Metrics]:
        train, metrics = refill_some(state.train, metrics, own_steps(hparams), start, stop)
        return state._replace(**train._asdict()), metrics

    def policy(state: AveragedState) -> PyTree:
        return rule.policy(mean_over_shards(state.learner.params, shards), state.kept)

    return Lane(init, trainer.zero_metrics, prefill, step, policy, refill)


def state_bytes(components: Components, rule: Rule) -> tuple[int, int]:
    """Bytes of one replica's state, and of its replay alone."""
    trainer = training.make_trainer(components.environment, components.agent, components.replay, components.config)
    init = averaged(trainer, rule, Schedule(1, 0), None).init
    state = jax.eval_shape(lambda key: init(key, key, components.agent.defaults), jax.random.key(0))
    return tree_bytes(state), tree_bytes(state.replay)


def validate(period: int, dense_updates: int) -> None:
    """Raises `UserError` for a schedule that cannot be."""
    for name, value, least in (("average_every", period, 1), ("average_each_until", dense_updates, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= INT32_MAX // 2:
            raise UserError(f"{name} is {value!r}; it must be a whole number from {least} to {INT32_MAX // 2}.")


@functools.cache
def make_rule(name: str, **numbers: float) -> Rule:
    """The rule called `name`, with its numbers. Raises `UserError` for an unknown name or a number out of range."""
    if name not in RULES:
        raise unknown_name("averaging rule", name, RULES)
    ranges = {"learning_rate": (0.0, float("inf")), "momentum": (0.0, 1.0), "beta": (0.0, 1.0)}
    for key, value in numbers.items():
        low, high = ranges.get(key, (float("-inf"), float("inf")))
        if not low <= value <= high:
            raise UserError(f"{key} is {value}; it must be between {low:g} and {high:g}.")
    return RULES[name](**numbers)


def build(
    components: Components,
    devices: Sequence[jax.Device],
    seeds: Sequence[int],
    settings: Sequence[HParams],
    rule: Rule | None = None,
    period: int = 1,
    dense_updates: int = 0,
) -> tuple[Runner, list[AveragedState]]:
    """One member as a replica on each of `devices`; `components` are one replica's: `make_components(config, D)`.

    Replicas are combined by `rule` (default `mean()`) every `period` iterations, and every iteration until
    `dense_updates` updates. Raises `UserError`.
    """
    began = time.perf_counter()
    validate(period, dense_updates)
    num_replicas = len(devices)
    shards = _devices.make_shards(num_replicas, num_replicas)
    trainer = training.make_trainer(components.environment, components.agent, components.replay, components.config)
    schedule = Schedule(period, dense_updates)
    rule = rule or mean()
    lane = averaged(trainer, rule, schedule, shards)
    assignment = population.assign(1, 1)
    kind = (components._replace(config=in_programs(components.config)), rule, schedule)
    built, states = _runner.build(
        components, devices, num_replicas, assignment, seeds, settings, width=1, lane=lane, kind=kind
    )
    judge = _devices.over_devices(population.over_lanes(lane.policy), devices, num_mapped=1)
    judged = judge.lower(states[0]).compile()

    set_out = _devices.over_devices(population.over_lanes(rule.init), devices, num_mapped=1)

    def adopted(states: list[AveragedState]) -> list[AveragedState]:
        """The rule sets out from the parameters that the caller has put in."""
        return [state._replace(kept=set_out(state.learner.params)) for state in states]

    learner = states[0].learner
    moved = _runner.all_reduce_bytes(tree_bytes((learner.params, learner.target_params)) / num_replicas, num_replicas)
    runner = built._replace(
        policy=lambda states: [judged(state) for state in states],
        adopted=adopted,
        telemetry=_telemetry(schedule, moved / components.config.updates_per_iteration),
        compile_seconds=time.perf_counter() - began,
    )
    return runner, states


def _telemetry(schedule: Schedule, bytes_per_iteration: float) -> Callable[[list[AveragedState]], Mapping[str, Scalar]]:
    """drift, and bytes_per_update: those each device sends per gradient update, `bytes_per_iteration` (per update, if
    combined every iteration) over the length of a round."""

    @jax.jit
    def figures(updates: Array, drift: Array) -> dict[str, Array]:
        length = jnp.where(updates[0, 0] < schedule.dense_updates, 1, schedule.period)
        return {"drift": drift[0, 0], "bytes_per_update": bytes_per_iteration / length}

    def telemetry(states: list[AveragedState]) -> Mapping[str, Scalar]:
        # On the first device and not waited for: new arrays, as the next chunk takes the states away.
        return figures(*(x.addressable_data(0) for x in (states[0].learner.updates, states[0].drift)))

    return telemetry


class Axes(NamedTuple):
    """How replicas are averaged."""

    workers: int = 4
    """Replicas, each on a device of its own."""
    combine: Literal["mean", "outer", "elastic"] = "mean"
    """Parameter mean (local SGD), outer optimizer (DiLoCo), or elastic averaging."""
    average_every: int = 8
    """H, iterations between two averagings."""
    average_each_until: int = 0
    """Average every iteration until this many updates (post-local SGD)."""


def check(axes: Axes, config: Config) -> None:
    """Raises `UserError` for a configuration that cannot be divided, and a schedule that cannot be."""
    validate_config(config, axes.workers)
    validate(axes.average_every, axes.average_each_until)


def _build(job: Job[Axes]) -> Built:
    axes = job.axes
    rule = make_rule(axes.combine)
    return build(
        job.components, job.devices, job.seeds, job.settings, rule, axes.average_every, axes.average_each_until
    )


AVERAGING = Scheme(
    Axes,
    _build,
    lambda axes, components: state_bytes(components, make_rule(axes.combine)),
    lambda axes: Devices(axes.workers, axes.workers, exact=True),
    check,
    shards=lambda axes: axes.workers,
    replays=lambda axes: axes.workers,
    measured=True,
)
