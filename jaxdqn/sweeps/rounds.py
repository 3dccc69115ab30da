"""A round of trials: groups, each a population, stage by stage; after each rung the best go on (successive halving)."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.sweeps import stage
from jaxdqn.sweeps.record import survivors
from jaxdqn.sweeps.stage import Origin, Stage
from jaxdqn.sweeps.sweep import Group, Sweep, Trial, columns, grouped

TUNING, FINAL = "tuning", "final"


class Progress(NamedTuple):
    """How far the trials of a group are: `alive` ones at the end of stage `last`, all stages so far."""

    group: Group
    alive: tuple[Trial, ...]
    stages: tuple[Stage, ...] = ()


def ends_of(sweep: Sweep, config: Config) -> tuple[int, ...]:
    """The environment steps at which a group's stages end. Raises `UserError` for rungs that fall together."""
    rungs = sweep.halving.rungs if sweep.halving else ()
    ends = stage.ends(config, rungs)
    if len(ends) <= len(rungs):
        raise UserError(
            f"halving.rungs {list(rungs)} of {config.total_steps:,} steps fall together, or before learning starts: "
            f"rungs lie on evaluations, every {config.resolved().eval_interval:,} steps. Lower config.eval_interval or "
            "config.learning_starts, or take other rungs."
        )
    return ends


def begin(sweep: Sweep, trials: Sequence[Trial]) -> list[Progress]:
    """The groups of a round, nothing trained yet. Raises `UserError`."""
    return [Progress(group, group.trials) for group in grouped(sweep, trials)]


def next_stage(sweep: Sweep, progress: Progress, prefix: str, kind: str, seeds: tuple[int, ...]) -> Stage:
    """The stage that takes the alive trials of a group on to its next end."""
    index = len(progress.stages)
    name = f"{prefix}-rung-{index}" if sweep.halving and kind == TUNING else prefix
    ends = ends_of(sweep, progress.group.config) if kind == TUNING else (progress.group.config.total_steps,)
    labels = tuple(
        {"trial": trial.number, "stage": name, "kind": kind, **columns(sweep, trial.values)}
        for trial in progress.alive
        for _ in seeds
    )
    return Stage(
        name,
        stage.until(progress.group.config, ends[index]),
        sweep.hparams,
        tuple(sweep.setting_of(trial.values) for trial in progress.alive),
        seeds,
        labels,
        _origin(progress),
        exact=bool(sweep.halving and sweep.halving.exact),
    )


def without(progress: Progress, survivors: Sequence[int]) -> Progress:
    """The group with only the surviving trials alive."""
    return progress._replace(alive=tuple(trial for trial in progress.alive if trial.number in survivors))


def survivors_of(sweep: Sweep, ranked: dict[int, float]) -> list[int]:
    """The trials that go on after a rung."""
    assert sweep.halving is not None
    return survivors(ranked, sweep.halving.keep)


def _origin(progress: Progress) -> Origin | None:
    if not progress.stages:
        return None
    before = progress.stages[-1]
    alive = {trial.number for trial in progress.alive}
    members = tuple(place for place, label in enumerate(before.labels) if label["trial"] in alive)
    return Origin(before.name, members, members)
