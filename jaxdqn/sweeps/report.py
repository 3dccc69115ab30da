"""report.md and report.html: the winners on fresh seeds, their tuning scores beside them, and figures."""

import base64
import html
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure as Drawing

from jaxdqn.analysis import figures as _figures
from jaxdqn.analysis import importance, loading, style, tuning
from jaxdqn.analysis import lineage as _lineage
from jaxdqn.errors import UserError
from jaxdqn.files.paths import write_text
from jaxdqn.runs import directory as run_directory
from jaxdqn.runs.reporting import save_figure
from jaxdqn.sweeps.stage import RUNS
from jaxdqn.sweeps.sweep import Sweep, short

SHOWN = 10
MAX_PAIRWISE = 8
UNUSED = "–"


class Figure(NamedTuple):
    """A file under figures/ and what it shows."""

    name: str
    caption: str


Block = str | list[list[str]] | Figure  # a paragraph, or a heading after "## "; a table, its head first; a figure


def write(folder: pathlib.Path, sweep: Sweep) -> None:
    """Writes the report of the sweep in `folder`."""
    trials = loading.trials(folder)
    frame = loading.load(folder)
    (folder / "figures").mkdir(exist_ok=True)
    figures = list(_figure_blocks(folder, sweep, trials, frame))
    blocks = [*_results(sweep, trials), *_setup(folder, sweep, trials), *figures]
    title = f"{folder.resolve().name}: {sweep.config.agent} on {sweep.config.env}"
    markdown, page = _markdown(title, blocks), _page(folder, title, blocks)
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", page)


def _winners(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that were trained again with fresh seeds, the best tuning score first."""
    if "fresh_score" not in trials:
        return trials.iloc[:0]
    return trials.dropna(subset=["fresh_seeds"]).sort_values(["score", "trial"], ascending=[False, True])


def winner_lines(sweep: Sweep, trials: pd.DataFrame) -> list[str]:
    """The result for the terminal: each winner on fresh seeds, its tuning score beside it."""
    lines, cells = [], _cells(sweep, trials)
    for _, row in _winners(trials).iterrows():
        pairs = zip(sweep.space.names, cells[row.trial], strict=True)
        values = ", ".join(f"{name}={value}" for name, value in pairs if value != UNUSED)
        fresh = f"{_interval(row, 'fresh_score')} on {int(row.fresh_seeds)} fresh seeds"
        lines.append(f"trial {row.trial} ({values}): {_unit(sweep)} {fresh} (tuning: {_number(row.score)})")
    return lines


def in_use(sweep: Sweep, table: pd.DataFrame, name: str) -> pd.Series:
    """Which rows of a table of trials have the field `name` in use: its condition holds, and those of fields in it."""
    parameters = {parameter.name: parameter for parameter in sweep.space.parameters}
    holds = pd.Series(True, index=table.index)
    for other, allowed in parameters[name].when.items():
        cells = [parameters[other].cell(value) for value in allowed]
        holds &= table[other].isin(cells) & in_use(sweep, table, other)
    return holds


def _results(sweep: Sweep, trials: pd.DataFrame) -> Iterator[Block]:
    best, cells = _winners(trials), _cells(sweep, trials)
    noun = "members" if sweep.population_based else "trials"
    yield "## Result"
    if len(best):
        yield (
            f"The best of {len(trials)} {noun}, again with {sweep.winners.seeds} seeds that tuning has not "
            "seen: these are the scores to report. The tuning score stands beside them; it is too high, because the "
            "luckiest of many was chosen by it."
        )
        fresh = {f"{_unit(sweep)}, fresh seeds": "fresh_score", "return at the end, fresh seeds": "fresh_return"}
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
    yield from _best_in_tuning(sweep, trials, cells)


def _best_in_tuning(sweep: Sweep, trials: pd.DataFrame, cells: dict[int, list[str]]) -> Iterator[Block]:
    # Scores of other rungs are of shorter curves.
    ranks = ["rung", "score"] if sweep.halving else ["score"]
    top = trials.sort_values([*ranks, "trial"], ascending=[*(False for _ in ranks), True]).head(SHOWN)
    yield f"## The best {len(top)} in tuning"
    rows = [["trial", *sweep.space.names, _unit(sweep), "steps", "status"]]
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


def _interval(row: pd.Series, name: str) -> str:
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    spread = "" if pd.isna(low) else f" [{_number(low)}, {_number(high)}]"
    return "-" if pd.isna(row[name]) else f"{_number(row[name])}{spread}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cells(sweep: Sweep, trials: pd.DataFrame) -> dict[int, list[str]]:
    """The values of each trial as text, in the order of the space."""
    names = sweep.space.names
    table = {name: trials[name].map(short).where(in_use(sweep, trials, name), UNUSED) for name in names}
    return dict(zip(trials.trial.tolist(), pd.DataFrame(table).to_numpy().tolist(), strict=True))


def _unit(sweep: Sweep) -> str:
    """What a score is, for people."""
    if sweep.population_based:
        return "return in the last generation"
    return {"auc": "mean return over the budget", "final": "return in the last fifth"}[sweep.objective]


def _figure_blocks(folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame, frame: pd.DataFrame) -> Iterator[Block]:
    """Draws all figures of a sweep, and says what they show; where one cannot be drawn, why."""
    yield "## Figures"
    finals = frame[frame.kind == "final"]
    if len(finals):
        curves = _figures.learning_curves(_whole(finals), by=["trial"], title="winners, fresh seeds")
        yield _saved(folder, curves, Figure("winners", "The winners on fresh seeds."))
    for figure, draw in of_trials(folder, sweep, trials):
        try:
            yield _saved(folder, draw(), figure)
        except UserError as error:  # such as too few trials for a share of variance
            yield f"No figure of {figure.name}: {error}"


def of_trials(
    folder: pathlib.Path, sweep: Sweep, trials: pd.DataFrame
) -> Iterator[tuple[Figure, Callable[[], Drawing]]]:
    """Each figure of the trials of the sweep in `folder`, and what draws it, which raises `UserError` where it cannot
    be drawn."""
    compared, what = _compared(sweep, trials)

    def noted(plot: Callable[[], Drawing]) -> Drawing:
        drawn = plot()
        style.note(drawn, f"{' '.join(drawn.get_supxlabel().split())}; score: {what}")
        return drawn

    for figure, plot in _tuning_figures(sweep, compared):
        yield figure, partial(noted, plot)
    if (folder / "lineage.parquet").is_file():
        caption = "Who took over from whom; score: a member's mean greedy return in a generation."
        names = _varied(sweep, compared) or None
        draw = lambda: _lineage.lineage(loading.table(folder / "lineage.parquet"), names)  # noqa: E731
        yield Figure("lineage", caption), draw


def _tuning_figures(sweep: Sweep, compared: pd.DataFrame) -> Iterator[tuple[Figure, Callable[[], Drawing]]]:
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


def _saved(folder: pathlib.Path, drawn: Drawing, figure: Figure) -> Figure:
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
        return trials, f"{_unit(sweep)}, each of one seed"
    count = sweep.seeds.number
    seeds = f"mean over {count} seeds" if count > 1 else "of one seed"
    if sweep.halving is None:
        return trials, f"{_unit(sweep)}, {seeds}"
    first = f"after the first {100 * sweep.halving.rungs[0]:.3g} % of the budget, which all trials had"
    until = {"auc": "mean return until then", "final": "return in the last fifth until then"}[sweep.objective]
    return trials.assign(score=trials.first_score), f"{first}: {until}, {seeds}"


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Curves that several stages drew, as one: a member is a trial with a seed."""
    member = frame.groupby(["trial", "seed"]).ngroup()
    return frame.assign(member=member, run="winners")


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""

    def one(block: Block) -> str:
        if isinstance(block, Figure):
            return f"![{block.caption}](figures/{block.name}.png)\n\n{block.caption}"
        if isinstance(block, str):
            return block
        head, *rows = ["| " + " | ".join(row) + " |" for row in block]
        return "\n".join([head, "|" + "---|" * len(block[0]), *rows])

    return "\n\n".join([f"# {title}", *map(one, blocks)]) + "\n"


def _page(folder: pathlib.Path, title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML file: figures, which are in `folder`, are inside."""

    def one(block: Block) -> str:
        if isinstance(block, Figure):
            data = base64.b64encode((folder / "figures" / f"{block.name}.png").read_bytes()).decode()
            caption = html.escape(block.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        if isinstance(block, str):
            heading = block.removeprefix("## ")
            return f"<h2>{html.escape(heading)}</h2>" if heading != block else f"<p>{html.escape(block)}</p>"
        tags = ["th", *["td"] * (len(block) - 1)]
        rows = [[f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row] for tag, row in zip(tags, block, strict=True)]
        return "<table>" + "".join(f"<tr>{''.join(row)}</tr>" for row in rows) + "</table>"

    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}table{border-collapse:collapse}"
    )
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *map(one, blocks)]) + "\n"
