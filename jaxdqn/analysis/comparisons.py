"""Agents compared over several environments: performance profiles, and aggregates with stratified intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jaxdqn.analysis import scores, style
from jaxdqn.analysis.curves import check_columns, final_score
from jaxdqn.analysis.figures import draw_interval
from jaxdqn.errors import UserError

AGGREGATES: dict[str, scores.Aggregate] = {
    "median": scores.median,
    "interquartile mean": scores.iqm,
    "mean": scores.mean,
    "optimality gap (lower is better)": scores.optimality_gap,
}
Reference = Mapping[str, tuple[float, float]]


def normalised_scores(
    frame: pd.DataFrame, by: Sequence[str] = ("agent",), column: str = "eval_return", reference: Reference | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Final scores on a common scale: setting of `by` -> environment -> [runs].

    `reference` gives each environment's returns that count as 0 and as 1, such as a random and a solved policy's; by
    default they are those of the worst and the best run in the frame. Curves without a final score are left out.
    Raises `UserError` for an unknown column, no score at all, an environment without reference, and equal references.
    """
    check_columns(frame, ["env", *by])
    key = list(dict.fromkeys(["env", *by, *_extra(frame)]))
    finals = final_score(frame, column, key).dropna().rename("score").reset_index()
    if finals.empty:
        raise UserError("no run has a final score to compare; wait for an evaluation in the last fifth of its steps.")
    if reference is None:
        spread = finals.groupby("env", observed=True, dropna=False).score.agg(["min", "max"])
        reference = {str(env): (low, high) for env, low, high in spread.itertuples()}
    result: dict[str, dict[str, np.ndarray]] = {}
    for name, rows in style.groups(finals, list(by)):
        for env, part in rows.groupby("env", observed=True, dropna=False):
            low, high = _ends(str(env), reference)
            result.setdefault(name, {})[str(env)] = (part.score.to_numpy() - low) / (high - low)
    return result


def _on_the_same(table: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """`table`, whose settings have runs on the same environments. Raises `UserError` where one lacks some."""
    every = {env for tasks in table.values() for env in tasks}
    for name, tasks in table.items():
        if missing := sorted(every - set(tasks)):
            raise UserError(
                f"{name or 'all runs'} has no score on {', '.join(missing)}; settings are compared on the same "
                "environments: leave runs out, or train more."
            )
    return table


def _extra(frame: pd.DataFrame) -> list[str]:
    return [name for name in ("run", "member") if name in frame]


def _ends(env: str, reference: Reference) -> tuple[float, float]:
    if env not in reference:
        raise UserError(f"no reference scores for {env}; give the returns that count as 0 and 1.")
    low, high = reference[env]
    if low == high:
        raise UserError(f"the reference scores of {env} are both {low:g}; scores cannot be put on a scale between.")
    return low, high


def performance_profiles(
    frame: pd.DataFrame, by: Sequence[str] = ("agent",), column: str = "eval_return", reference: Reference | None = None
) -> Figure:
    """The share of runs above each normalised score, averaged over environments, with 95 % pointwise bands.

    Raises `UserError` as `normalised_scores` does, and where a setting has no score on an environment of another.
    """
    table = _on_the_same(normalised_scores(frame, by, column, reference))
    highest = max(values.max() for tasks in table.values() for values in tasks.values())
    thresholds = np.linspace(0.0, max(1.0, highest), 101)
    figure, (axis,) = style.panels(1, 6.4, 4.2)
    for index, (name, tasks) in enumerate(table.items()):
        band, look = scores.performance_profile(tasks, thresholds), style.look(index)
        label = f"{name} (n={band.n[0]}, {len(tasks)} env{'s' if len(tasks) > 1 else ''})"
        axis.plot(thresholds, band.value, look["linestyle"], color=look["color"], linewidth=1.8, label=label)
        axis.fill_between(thresholds, band.low, band.high, color=look["color"], alpha=0.2, linewidth=0)
    axis.set(xlabel=f"score τ: {_scale(reference)}", ylabel="share of runs with a score above τ", ylim=(-0.02, 1.02))
    style.legend(axis, len(table))
    style.note(figure, "band: 95 % pointwise stratified bootstrap interval; none where an environment has one run")
    return figure


def interval_plot(
    frame: pd.DataFrame, by: Sequence[str] = ("agent",), column: str = "eval_return", reference: Reference | None = None
) -> Figure:
    """Median, interquartile mean, mean and optimality gap over runs and environments, with 95 % intervals.

    Raises `UserError` as `performance_profiles` does.
    """
    table = _on_the_same(normalised_scores(frame, by, column, reference))
    figure = Figure(figsize=(3.0 * len(AGGREGATES) + 1.0, 1.6 + 0.35 * len(table)), layout="constrained")
    axes = figure.subplots(1, len(AGGREGATES), sharey=True)
    for axis, (title, aggregate) in zip(axes, AGGREGATES.items(), strict=True):
        style.tidy(axis)
        for index, tasks in enumerate(table.values()):
            interval = scores.stratified_bootstrap_ci(tasks, aggregate, resamples=5_000)
            draw_interval(axis, float(aggregate(tasks)), interval, index, style.look(index)["color"])
        axis.set_title(title, fontsize="medium")
    counts = [sorted({len(values) for values in tasks.values()}) for tasks in table.values()]
    sizes = [style.size(n[0]) if len(n) == 1 else f"n={n[0]}-{n[-1]}" for n in counts]
    axes[0].set_yticks(range(len(table)), [f"{name} ({size})" for name, size in zip(table, sizes, strict=True)])
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    environments = len({env for tasks in table.values() for env in tasks})
    style.note(
        figure,
        f"score: {_scale(reference)}; bar: 95 % stratified bootstrap interval over the n runs of each of "
        f"{environments} environments",
    )
    return figure


def _scale(reference: Reference | None) -> str:
    return "0 and 1 are the worst and best run seen" if reference is None else "0 and 1 are the reference returns"
