"""A stage of a sweep: one population of a group's trials, from one rung to the next. It is a run directory, and nothing
but what is in that directory decides what is left to do."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.files import documents
from jaxdqn.timeline import timeline

RUNS = "runs"


class Origin(NamedTuple):
    """The stage that a stage goes on from, and which of its members; see `runs.directory.Continuation`."""

    stage: str
    states: tuple[int, ...]
    learners: tuple[int, ...]


class Stage(NamedTuple):
    """Every setting with every seed, to `config.total_steps`; labels are columns of each member's metrics.

    exact: the lanes of `continues` are kept where members are vmapped.
    """

    name: str
    config: Config
    hparams: HParams
    settings: tuple[dict[str, float], ...]
    seeds: tuple[int, ...]
    labels: tuple[documents.Fields, ...]
    continues: Origin | None = None
    exact: bool = False


def path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The run directory of the stage `name` of the sweep in `folder`."""
    return folder / RUNS / name


def execute(
    stage: Stage,
    folder: pathlib.Path,
    num_devices: int | None = None,
    checkpoint_seconds: float = 20.0,
    on_chunk: Callable[[list[documents.Fields]], None] | None = None,
) -> str:
    """Trains the stage, or goes on with it where it was stopped; its status. Raises `UserError`."""
    from jaxdqn.runs import experiment
    from jaxdqn.runs.directory import Continuation
    from jaxdqn.runs.settings import Settings

    path = path_of(folder, stage.name)
    settings = Settings(
        stop_diverged=False,  # or the score of a trial would depend on which others are in its population
        checkpoint_seconds=checkpoint_seconds,
        progress=False,
        tensorboard=False,
        figure=False,
        on_chunk=on_chunk,
    )
    if (path / "config.yaml").exists():
        return str(experiment.resume(path, settings=settings).summary["status"])
    origin = stage.continues
    continues = origin and Continuation(str(path_of(folder, origin.stage).resolve()), origin.states, origin.learners)
    result = experiment.train(
        stage.config,
        stage.hparams,
        seeds=stage.seeds,
        vary=stage.settings,
        out=path,
        num_devices=num_devices,
        settings=settings,
        labels=stage.labels,
        continues=continues,
        least_lanes=_lanes(folder, origin.stage) if origin and stage.exact else 1,
    )
    return str(result.summary["status"])


def finished(folder: pathlib.Path, stage: Stage) -> bool:
    """Whether the stage has trained to its end."""
    from jaxdqn.runs import directory
    from jaxdqn.runs.settings import DIVERGED, OK

    return directory.status(path_of(folder, stage.name)) in (OK, DIVERGED)


def diverged(folder: pathlib.Path, stage: Stage) -> dict[int, int]:
    """How many members of each trial in a finished stage diverged: those that no longer learn."""
    file = path_of(folder, stage.name) / "summary.json"
    found = documents.read_json(file).get("first_bad_update_per_member")
    known = {str(member): label["trial"] for member, label in enumerate(stage.labels)}
    if not isinstance(found, dict) or not found.keys() <= known.keys():
        raise UserError(f"{file} is not of this stage; move {file.parent} away to have it trained again.")
    counts = dict.fromkeys(known.values(), 0)
    for member in found:
        counts[known[member]] += 1
    return counts


def metrics_of(folder: pathlib.Path, stages: Sequence[Stage]) -> pd.DataFrame:
    """The metrics of finished stages."""
    from jaxdqn.runs import metrics

    frames = [metrics.read(path_of(folder, stage.name) / "metrics.parquet") for stage in stages]
    return pd.concat(frames, ignore_index=True)


def prune(folder: pathlib.Path, stage: str) -> None:
    """Removes the checkpoints of a stage that others have gone on from; its metrics stay."""
    shutil.rmtree(path_of(folder, stage) / "checkpoints", ignore_errors=True)


def until(config: Config, env_steps: int) -> Config:
    """`config` with its end at `env_steps`, and all else as if it went on: rows and evaluations at the same steps.

    Sweeps score curves, so nothing is evaluated once more where a stage ends.
    """
    return dataclasses.replace(config.resolved(), total_steps=env_steps, final_episodes=0)


def ends(config: Config, fractions: Sequence[float]) -> tuple[int, ...]:
    """Environment steps at the fractions of the budget, at the nearest evaluations, and at its end; equal ones once."""
    line = timeline(config)
    iterations = [max(1, round(fraction * line.total / line.eval_every)) * line.eval_every for fraction in fractions]
    rising = sorted({iteration for iteration in iterations if line.prefill < iteration < line.total} | {line.total})
    return tuple(iteration * line.steps_per_iteration for iteration in rising)


def _lanes(folder: pathlib.Path, name: str) -> int:
    """Lanes of each device in a stage that was trained; 1 where a program has one lane whatever their number."""
    import jax

    from jaxdqn.parallel.compiled import population
    from jaxdqn.runs import directory

    if population.fastest_width(jax.default_backend(), 2) == 1:
        return 1
    spec, _ = directory.load(path_of(folder, name))
    return max(spec.least_lanes, -(-len(spec.batches[0]) // (spec.num_devices // spec.devices_per_agent)))
