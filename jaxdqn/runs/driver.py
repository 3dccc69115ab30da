"""The plain Python between compiled chunks: when to log, evaluate, checkpoint and stop.

The next chunk is dispatched before the last one's metrics are read. Its state is donated, so whatever needs a state
(evaluation, checkpoint) happens before that dispatch, and a stop that depends on metrics acts one logging point late.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from jaxdqn.base import PyTree, Scalar
from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.parallel import hosts
from jaxdqn.parallel.compiled.runner import Runner
from jaxdqn.timeline import Timeline

CHUNK_SECONDS = 1.0  # long enough to hide the dispatch, short enough for Ctrl-C


class Point(NamedTuple):
    """A logging point: stacks of device arrays still to be read."""

    iteration: int
    metrics: list[PyTree]
    episodes: list[PyTree] | None  # of the greedy evaluation, where one was due
    telemetry: Mapping[str, Scalar]  # of the parallel scheme, scalars by column
    measured: list[PyTree] | None = None  # `telemetry.measure`, where it was asked for and an evaluation was due


class Progressed(NamedTuple):
    """Where a batch stands between two chunks: lists of stacks, the iterations done, and the updates of the next one
    that are done (0 but for a runner with a `part`). `hollow`: the replay was left out where the states come from, and
    is empty, whatever the iterations done."""

    states: list[PyTree]
    metrics: list[PyTree]
    iteration: int
    update: int = 0
    hollow: bool = False


class Hooks(NamedTuple):
    """What the caller does at the events of a run.

    on_point(point) -> True to stop at the next logging point; interrupted() -> True to stop now;
    checkpoint_due() -> True for a checkpoint at this logging point; save(progressed, stopped) writes one, of a batch
    that `on_point` has stopped or of one that can go on; refilling(iterations) is told before so many are acted to fill
    a replay. On several hosts each must answer the same in every process.
    """

    on_point: Callable[[Point], bool]
    interrupted: Callable[[], bool]
    checkpoint_due: Callable[[], bool]
    save: Callable[[Progressed, bool], None]
    refilling: Callable[[int], None]


def drive(runner: Runner, at: Progressed, line: Timeline, hooks: Hooks) -> Progressed:
    """Runs chunks from where `at` stands to the end of the timeline or a stop."""
    config = runner.components.config
    if at.hollow and at.iteration < line.total:
        at = _refilled(runner, at, hooks)
        if hooks.interrupted():
            return at  # what was saved is all that there is to save
    start, pace, stopping = at.iteration, _Pace(config, runner.part is not None), False
    pending: list[Point] = []

    def read() -> bool:
        points = pending[:]
        pending.clear()
        stops = [hooks.on_point(point) for point in points]  # every point, also after one that asks to stop
        return any(stops)

    while True:
        states, metrics, iteration, update, _ = at
        at_point = iteration > start and update == 0 and line.is_point(iteration)
        stopped = at_point and stopping
        leaving = hooks.interrupted() or iteration >= line.total or stopped
        if at_point:
            evaluated = line.is_evaluated(iteration)
            try:
                episodes = runner.evaluate(states, iteration) if evaluated else None
            except UserError:  # environments on the host that always fail; what was learned is kept
                pace.settle()
                read()
                hooks.save(at, False)
                raise
            # Before the prefill is done there may be nothing that can be drawn.
            asked = runner.measure if runner.measured and evaluated and iteration >= line.prefill else None
            found = asked and asked(states, iteration)
            pending.append(Point(iteration, metrics, episodes, runner.telemetry(states), found))
            if iteration % line.log_every == 0:  # else the run ends within a window, which an extension goes on with
                at = at._replace(metrics=runner.zero_metrics)
            leaving = leaving or hooks.interrupted()  # an evaluation on the host may take minutes
        if leaving or (at_point and hooks.checkpoint_due()):
            pace.settle()
            stopping = read() or stopping
            hooks.save(at, stopped)
        if leaving:
            return at
        learning = iteration >= line.prefill
        length = hosts.exchange(pace.length[learning])[0]
        try:
            if learning and runner.part is not None:
                last = min(update + length, config.updates_per_iteration)
                length, stop = last - update, iteration + last // config.updates_per_iteration
                states, metrics = runner.part(at.states, at.metrics, iteration, update, last)
                update = last % config.updates_per_iteration
            else:
                stop = _next_event(iteration, line, length)
                length = stop - iteration
                states, metrics = (runner.step if learning else runner.prefill)(at.states, at.metrics, iteration, stop)
        except Exception:
            read()  # a point that was reached before it failed
            raise
        at = Progressed(states, metrics, stop, update)
        stopping = read() or stopping
        pace.dispatched(metrics, length, learning)


def _refilled(runner: Runner, at: Progressed, hooks: Hooks) -> Progressed:
    def go_on(done: int, count: int) -> bool:
        if done == 0:
            hooks.refilling(count)
        return not hooks.interrupted()

    acted = at.iteration + (at.update > 0)
    return at._replace(states=runner.refill(at.states, acted, go_on), hollow=False)


def _next_event(iteration: int, line: Timeline, length: int) -> int:
    next_log = (iteration // line.log_every + 1) * line.log_every
    ends = [iteration + length, next_log, line.total]
    if iteration < line.prefill:
        ends.append(line.prefill)
    return min(ends)


class _Pace:
    """Chooses chunk lengths that take about a second, and keeps one chunk in flight besides the current one."""

    def __init__(self, config: Config, by_updates: bool) -> None:
        # Iterations, while filling the replay and while learning; there `by_updates` of one iteration. At first few
        # steps and few updates: a slow environment or network is not known yet.
        updates = 1 if by_updates else config.updates_per_iteration
        self.length = {False: max(1, 64 // config.rollout_length), True: max(1, 16 // updates)}
        self._flying: list[tuple[PyTree, int, bool]] = []
        self._last = 0.0

    def dispatched(self, results: PyTree, length: int, learning: bool) -> None:
        """Notes a chunk whose `results` are ready when it is, and waits for the one before it."""
        if not self._flying:
            self._last = time.perf_counter()
        self._flying.append((results, length, learning))
        while len(self._flying) > 1:
            self._wait()

    def settle(self) -> None:
        """Waits for all chunks."""
        while self._flying:
            self._wait()

    def _wait(self) -> None:
        results, length, learning = self._flying.pop(0)
        jax.block_until_ready(results)
        now = time.perf_counter()
        elapsed, self._last = max(now - self._last, 1e-6), now
        wanted = length * CHUNK_SECONDS / elapsed
        # A chunk cut short by an event says little about long ones: grow by at most a factor of eight.
        self.length[learning] = int(min(max(wanted, 1), 8 * max(length, self.length[learning]), 10_000_000))
