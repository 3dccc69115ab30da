"""report.md and report.html: the winners on fresh seeds, their tuning scores beside them, and figures."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pandas as pd

from jaxdqn.analysis import loading
from jaxdqn.files.paths import write_text
from jaxdqn.runs import directory as run_directory
from jaxdqn.sweeps import documents, report_figures
from jaxdqn.sweeps.documents import Block
from jaxdqn.sweeps.report_figures import unit
from jaxdqn.sweeps.stage import RUNS
from jaxdqn.sweeps.sweep import Sweep
from jaxdqn.sweeps.trials import in_use

SHOWN = 10
UNUSED = "–"


def write(folder: pathlib.Path, sweep: Sweep) -> None:
    """Writes the report of the sweep in `folder`."""
    trials = loading.trials(folder)
    frame = loading.load(folder)
    (folder / "figures").mkdir(exist_ok=True)
    shown = list(report_figures.draw(folder, sweep, trials, frame))
    blocks = [*_results(sweep, trials), *_setup(folder, sweep, trials), *shown]
    title = f"{folder.resolve().name}: {sweep.config.agent} on {sweep.config.env}"
    markdown, page = documents.markdown(title, blocks), documents.page(folder, title, blocks)
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", page)


def winners(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that were trained again with fresh seeds, the best tuning score first."""
    if "fresh_score" not in trials:
        return trials.iloc[:0]
    return trials.dropna(subset=["fresh_seeds"]).sort_values(["score", "trial"], ascending=[False, True])


def _results(sweep: Sweep, trials: pd.DataFrame) -> Iterator[Block]:
    best, cells = winners(trials), _cells(sweep, trials)
    yield "## Result"
    if len(best):
        yield (
            f"The best of {len(trials)} {_noun(sweep)}, again with {sweep.winners.seeds} seeds that tuning has not "
            "seen: these are the scores to report. The tuning score stands beside them; it is too high, because the "
            "luckiest of many was chosen by it."
        )
        fresh = {f"{unit(sweep)}, fresh seeds": "fresh_score", "return at the end, fresh seeds": "fresh_return"}
        if sweep.objective == "final" or sweep.population_based:  # the same number
            fresh.popitem()
        rows = [["trial", *sweep.space.names, *fresh, "tuning score"]]
        for _, row in best.iterrows():
            scores = [_interval(row, column) for column in (*fresh.values(), "score")]
            rows.append([str(row.trial), *cells[row.trial], *scores])
        yield rows
    else:
        yield "Nothing was trained again with fresh seeds: the scores below are of tuning, and the best is too high."
    yield from _diverged(trials)
    # Scores of other rungs are of shorter curves.
    ranks = ["rung", "score"] if sweep.halving else ["score"]
    top = trials.sort_values([*ranks, "trial"], ascending=[*(False for _ in ranks), True]).head(SHOWN)
    yield f"## The best {len(top)} in tuning"
    rows = [["trial", *sweep.space.names, unit(sweep), "steps", "status"]]
    for _, row in top.iterrows():
        reached = [_interval(row, "score"), f"{int(row.env_steps):,}", str(row.status)]
        rows.append([str(row.trial), *cells[row.trial], *reached])
    yield rows


def _diverged(trials: pd.DataFrame) -> Iterator[Block]:
    count = int((trials.diverged > 0).sum())
    again = int(trials.fresh_diverged.sum()) if "fresh_diverged" in trials else 0
    if count or again:
        yield (
            f"{count} of {len(trials)} diverged in tuning with a seed or more, and {again} seeds of the winners: loss "
            "or gradient were not finite, and from there on their scores are of their last finite parameters."
        )


def _setup(folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame) -> Iterator[Block]:
    yield "## How it was made"
    sampler = sweep.sampler.name if sweep.sampler.name == "grid" else f"{sweep.sampler.name}, seed {sweep.sampler.seed}"
    seeds = sweep.seeds.all
    each = f"seeds {seeds[0]} to {seeds[-1]} each" if len(seeds) > 1 else f"seed {seeds[0]}"
    count = len(trials) // len(seeds) if sweep.population_based else len(trials)
    yield (
        f"{count} {'settings' if sweep.population_based else 'trials'} ({sampler}), {each}, "
        f"{sweep.config.total_steps:,} environment steps{_early(sweep, trials)}. Brackets are 95 % "
        "intervals of the mean over seeds; there is none for one seed."
    )
    first = sorted((folder / RUNS).iterdir())[0]
    values = run_directory.load(first)[1]
    versions = ", ".join(f"{name} {values['versions'][name]}" for name in ("jaxdqn", "jax", "flax", "optax", "gymnax"))
    yield f"Commit {values['commit']}, {values['device']}; {versions}. All settings: space.yaml."


def _early(sweep: Sweep, trials: pd.DataFrame) -> str:
    """How training was stopped early or changed, as the end of a sentence."""
    if sweep.halving:
        rungs = " and ".join(f"{100 * rung:.3g} %" for rung in sweep.halving.rungs)
        dropped = int(trials.status.str.startswith("dropped").sum())
        return f"; successive halving after {rungs} of the budget (rungs 0, 1, ...) dropped {dropped}"
    if sweep.population_based:
        interval = f"{100 * sweep.population_based.interval:.3g} %"
        return (
            f"; population-based training, a generation every {interval} of the budget. A member is a setting with one "
            "seed, and goes by the number of a trial; its values above are those of the last generation, "
            "lineage.parquet has the earlier ones"
        )
    return ""


def winner_lines(sweep: Sweep, trials: pd.DataFrame) -> list[str]:
    """The result for the terminal: each winner on fresh seeds, its tuning score beside it."""
    lines, cells = [], _cells(sweep, trials)
    for _, row in winners(trials).iterrows():
        pairs = zip(sweep.space.names, cells[row.trial], strict=True)
        values = ", ".join(f"{name}={value}" for name, value in pairs if value != UNUSED)
        fresh = f"{_interval(row, 'fresh_score')} on {int(row.fresh_seeds)} fresh seeds"
        lines.append(f"trial {row.trial} ({values}): {unit(sweep)} {fresh} (tuning: {_number(row.score)})")
    return lines


def _noun(sweep: Sweep) -> str:
    return "members" if sweep.population_based else "trials"


def _interval(row: pd.Series, name: str) -> str:
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    spread = "" if pd.isna(low) else f" [{_number(low)}, {_number(high)}]"
    return "-" if pd.isna(row[name]) else f"{_number(row[name])}{spread}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cells(sweep: Sweep, trials: pd.DataFrame) -> dict[int, list[str]]:
    """The values of each trial as text, in the order of the space."""
    names = sweep.space.names
    shown = {name: trials[name].map(_value).where(in_use(sweep, trials, name), UNUSED) for name in names}
    return dict(zip(trials.trial.tolist(), pd.DataFrame(shown).to_numpy().tolist(), strict=True))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
