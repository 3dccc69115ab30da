"""report.md and report.html: the winners on fresh seeds, their tuning scores beside them, and figures."""

import base64
import html
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from jaxdqn.analysis import figures as _figures
from jaxdqn.analysis import lineage as _lineage
from jaxdqn.analysis import loading, tuning
from jaxdqn.errors import UserError
from jaxdqn.runs import directory as run_directory
from jaxdqn.runs.files import write_atomically
from jaxdqn.runs.reporting import save_figure
from jaxdqn.sweeps.record import FINISHED
from jaxdqn.sweeps.stage import RUNS
from jaxdqn.sweeps.sweep import Sweep

SHOWN = 10
MAX_PAIRWISE = 8


class Figure(NamedTuple):
    """A file under figures/ and what it shows."""

    name: str
    caption: str


Block = str | list[list[str]] | Figure


def write(folder: pathlib.Path, sweep: Sweep) -> None:
    """Writes the report of the sweep in `folder`."""
    trials = loading.trials(folder)
    frame = loading.load(folder)
    (folder / "figures").mkdir(exist_ok=True)
    shown = list(_draw(folder, sweep, trials, frame))
    blocks = [*_results(sweep, trials), *_setup(folder, sweep, trials), *shown]
    title = f"{folder.resolve().name}: {sweep.config.agent} on {sweep.config.env}"
    markdown, page = _markdown(title, blocks), _html(folder, title, blocks)
    write_atomically(folder / "report.md", lambda path: path.write_text(markdown))
    write_atomically(folder / "report.html", lambda path: path.write_text(page))


# -- what is said -----------------------------------------------------------------------------------------------------


def winners(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that were trained again with fresh seeds, the best tuning score first."""
    if "fresh_score" not in trials:
        return trials.iloc[:0]
    return trials.dropna(subset=["fresh_seeds"]).sort_values(["score", "trial"], ascending=[False, True])


def _results(sweep: Sweep, trials: pd.DataFrame) -> Iterator[Block]:
    best = winners(trials)
    yield "## Result"
    if len(best):
        yield (
            f"The best of {len(trials)} trials, again with {sweep.winners.seeds} seeds that tuning has not seen: "
            "these are the scores to report. The tuning score stands beside them; it is too high, because the luckiest "
            "of many was chosen by it."
        )
        names = [*sweep.space.names]
        rows = [["trial", *names, f"{_unit(sweep)}, fresh seeds", "return at the end, fresh seeds", "tuning score"]]
        for _, row in best.iterrows():
            fresh = [_interval(row, "fresh_score"), _interval(row, "fresh_return"), _interval(row, "score")]
            rows.append([str(row.trial), *(_value(row[name]) for name in names), *fresh])
        yield rows
    else:
        yield "No trial was trained again with fresh seeds: the scores below are of tuning, and the best is too high."
    top = trials.sort_values(["status", "score"], key=lambda c: c != FINISHED if c.name == "status" else -c).head(SHOWN)
    yield f"## The best {len(top)} trials in tuning"
    rows = [["trial", *sweep.space.names, _unit(sweep), "steps", "status"]]
    for _, row in top.iterrows():
        values = [_value(row[name]) for name in sweep.space.names]
        rows.append([str(row.trial), *values, _interval(row, "score"), f"{int(row.env_steps):,}", str(row.status)])
    yield rows


def _setup(folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame) -> Iterator[Block]:
    yield "## How it was made"
    early = ""
    if sweep.halving:
        dropped = int(trials.status.str.startswith("dropped").sum())
        early = f"; successive halving after {list(sweep.halving.rungs)} of the budget dropped {dropped}"
    if sweep.population_based:
        early = f"; population-based training, a generation every {sweep.population_based.interval:g} of the budget"
    yield (
        f"{len(trials)} trials ({sweep.sampler.name}, seed {sweep.sampler.seed}), seeds {sweep.seeds.first} to "
        f"{sweep.seeds.first + sweep.seeds.number - 1} each, {sweep.config.total_steps:,} environment steps{early}. "
        "Brackets are 95 % bootstrap intervals of the mean over seeds; there is none for one seed."
    )
    first = sorted((folder / RUNS).iterdir())[0]
    values = run_directory.load(first)[1]
    versions = ", ".join(f"{name} {values['versions'][name]}" for name in ("jaxdqn", "jax", "flax", "optax", "gymnax"))
    yield f"Commit {values['commit']}, {values['device']}; {versions}. All settings: space.yaml."


def winner_lines(sweep: Sweep, trials: pd.DataFrame) -> list[str]:
    """The result for the terminal: each winner on fresh seeds, its tuning score beside it."""
    best = winners(trials)
    lines = []
    for _, row in best.iterrows():
        values = ", ".join(f"{name}={_value(row[name])}" for name in sweep.space.names)
        fresh = f"{_interval(row, 'fresh_score')} on {int(row.fresh_seeds)} fresh seeds"
        lines.append(f"trial {row.trial} ({values}): {_unit(sweep)} {fresh} (tuning: {row.score:.1f})")
    return lines


def _unit(sweep: Sweep) -> str:
    if sweep.population_based:
        return "return in the last generation"
    return {"auc": "mean return over the budget", "final": "return in the last fifth"}[sweep.objective]


def _interval(row: pd.Series, name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    spread = "" if low is None or pd.isna(low) else f" [{low:.1f}, {high:.1f}]"
    return "-" if pd.isna(row[name]) else f"{row[name]:.1f}{spread}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def _draw(folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame, frame: pd.DataFrame) -> Iterator[Block]:
    yield "## Figures"
    names = [name for name in sweep.space.names if trials[name].nunique() > 1]
    finals = frame[frame.kind == "final"]
    jobs: list[tuple[str, str, Callable[[], Any]]] = []
    if len(finals):
        curves = lambda: _figures.learning_curves(_whole(finals), by=["trial"], title="winners, fresh seeds")  # noqa: E731
        jobs.append(("winners", "The winners on fresh seeds.", curves))
    compared, what = _compared(sweep, trials)
    for name in names:
        response = lambda name=name: tuning.response(compared, name)  # noqa: E731
        jobs.append((f"response-{name}", f"The score against {name}: {what}.", response))
    if 1 < len(names) <= MAX_PAIRWISE:
        jobs.append(("pairwise", f"Every two hyperparameters: {what}.", lambda: tuning.pairwise(compared, names)))
        jobs.append(
            ("parallel", f"Every trial as a line: {what}.", lambda: tuning.parallel_coordinates(compared, names))
        )
    if names:
        caption = f"What each hyperparameter explains of the score's variance, on its own: {what}."
        jobs.append(("importance", caption, lambda: tuning.importance(compared, names)))
    if (folder / "lineage.parquet").is_file():
        table = pd.read_parquet(folder / "lineage.parquet")
        jobs.append(("lineage", "Who took over from whom.", lambda: _lineage.lineage(table, names or None)))
    for name, caption, draw in jobs:
        try:
            save_figure(draw(), folder / "figures" / f"{name}.png")
        except UserError as error:  # such as too few trials for a share of variance
            yield f"No figure of {name}: {error}"
            continue
        yield Figure(name, caption)


def _compared(sweep: Sweep, trials: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The trials with scores that can be compared, and what these are: with halving those after the first rung, since
    later ones are of the survivors alone, and of longer curves."""
    if sweep.halving is None:
        return trials, f"{_unit(sweep)}, mean over {sweep.seeds.number} seed(s)"
    first = f"the first {sweep.halving.rungs[0]:.0%} of the budget"
    return trials.assign(score=trials.first_score), f"after {first}, which all trials had, mean over seeds"


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Curves that several stages drew, as one: a member is a trial with a seed."""
    member = frame.groupby(["trial", "seed"]).ngroup()
    return frame.assign(member=member, run="winners")


# -- as documents -----------------------------------------------------------------------------------------------------


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    def one(block: Block) -> str:
        if isinstance(block, Figure):
            return f"![{block.caption}](figures/{block.name}.png)\n\n{block.caption}"
        if isinstance(block, str):
            return block
        head, *rows = ["| " + " | ".join(row) + " |" for row in block]
        return "\n".join([head, "|" + "---|" * len(block[0]), *rows])

    return "\n\n".join([f"# {title}", *map(one, blocks)]) + "\n"


def _html(folder: pathlib.Path, title: str, blocks: Sequence[Block]) -> str:
    """One file: figures are inside."""

    def one(block: Block) -> str:
        if isinstance(block, Figure):
            data = base64.b64encode((folder / "figures" / f"{block.name}.png").read_bytes()).decode()
            caption = html.escape(block.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        if isinstance(block, str):
            heading = block.removeprefix("## ")
            return f"<h2>{html.escape(heading)}</h2>" if heading != block else f"<p>{html.escape(block)}</p>"
        cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(block)]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}table{border-collapse:collapse}"
    )
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *map(one, blocks)]) + "\n"


def _tagged(rows: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    for index, row in enumerate(rows):
        yield ("td" if index else "th"), row
