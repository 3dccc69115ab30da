"""The figures of a sweep's report."""

import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd

from jaxdqn.analysis import figures as _figures
from jaxdqn.analysis import importance, style, tuning
from jaxdqn.analysis import lineage as _lineage
from jaxdqn.errors import UserError
from jaxdqn.runs.reporting import save_figure
from jaxdqn.sweeps.documents import Block, Figure
from jaxdqn.sweeps.sweep import Sweep
from jaxdqn.sweeps.trials import in_use

MAX_PAIRWISE = 8


def unit(sweep: Sweep) -> str:
    """What a score is, for people."""
    if sweep.population_based:
        return "return in the last generation"
    return {"auc": "mean return over the budget", "final": "return in the last fifth"}[sweep.objective]


def draw(folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame, frame: pd.DataFrame) -> Iterator[Block]:
    """Draws all figures of a sweep, and says what they show; where one cannot be drawn, why."""
    yield "## Figures"
    compared, what = _compared(sweep, trials)
    finals = frame[frame.kind == "final"]
    if len(finals):
        curves = _figures.learning_curves(_whole(finals), by=["trial"], title="winners, fresh seeds")
        yield _saved(folder, curves, Figure("winners", "The winners on fresh seeds."))
    for figure, plot in _tuning_figures(sweep, compared):
        try:
            drawn = plot()
        except UserError as error:  # such as too few trials for a share of variance
            yield f"No figure of {figure.name}: {error}"
            continue
        note = " ".join(drawn.get_supxlabel().split())
        style.note(drawn, f"{note}; score: {what}")
        yield _saved(folder, drawn, figure)
    if (folder / "lineage.parquet").is_file():
        lineage = pd.read_parquet(folder / "lineage.parquet")
        caption = "Who took over from whom; score: a member's mean greedy return in a generation."
        figure = Figure("lineage", caption)
        yield _saved(folder, _lineage.lineage(lineage, _varied(sweep, compared) or None), figure)


def _tuning_figures(sweep: Sweep, compared: pd.DataFrame) -> Iterator[tuple[Figure, Callable[[], Any]]]:
    """Each figure of the search, and what draws it."""
    names = _varied(sweep, compared)
    for name in names:
        yield Figure(f"response-{name}", f"The score against {name}."), partial(tuning.response, compared, name)
    if 1 < len(names) <= MAX_PAIRWISE:
        yield Figure("pairwise", "Every two hyperparameters."), partial(tuning.pairwise, compared, names)
        yield Figure("parallel", "Every trial as a line."), partial(tuning.parallel_coordinates, compared, names)
    if names:
        often = [name for name in names if compared[name].count() >= importance.MIN_TRIALS] or names
        caption = "What each hyperparameter explains of the score's variance, on its own."
        yield Figure("importance", caption), partial(tuning.importance, compared, often)


def _saved(folder: pathlib.Path, drawn: Any, figure: Figure) -> Figure:
    save_figure(drawn, folder / "figures" / f"{figure.name}.png")
    return figure


def _varied(sweep: Sweep, compared: pd.DataFrame) -> list[str]:
    """The fields of which trials have more than one value."""
    return [name for name in sweep.space.names if compared[name].nunique() > 1]


def _compared(sweep: Sweep, trials: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The trials with scores that can be compared, and what these are: with halving those after the first rung, since
    later ones are of the survivors alone, and of longer curves. Values that are not in use are NaN."""
    used = {name: trials[name].where(in_use(sweep, trials, name)) for name in sweep.space.names}
    trials = trials.assign(**used)
    if sweep.population_based:
        return trials, f"{unit(sweep)}, each of one seed"
    count = sweep.seeds.number
    seeds = f"mean over {count} seeds" if count > 1 else "of one seed"
    if sweep.halving is None:
        return trials, f"{unit(sweep)}, {seeds}"
    first = f"after the first {100 * sweep.halving.rungs[0]:.3g} % of the budget, which all trials had"
    until = {"auc": "mean return until then", "final": "return in the last fifth until then"}[sweep.objective]
    return trials.assign(score=trials.first_score), f"{first}: {until}, {seeds}"


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Curves that several stages drew, as one: a member is a trial with a seed."""
    member = frame.groupby(["trial", "seed"]).ngroup()
    return frame.assign(member=member, run="winners")
