"""Population based training: who copied whom, and what became of the hyperparameters."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxdqn.analysis import style
from jaxdqn.analysis.curves import check_columns
from jaxdqn.errors import UserError

OWN = ("generation", "member", "parent", "score")


def lineage(frame: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Scores and hyperparameters of all members over the generations; the ancestry of the best is thick.

    `frame`: a row for each `generation` and `member`, with the `parent` in the generation before that it continues
    (itself, or the member it copied), `score`, and hyperparameters, `names` or all other numeric columns. Raises
    `UserError` for a column that is missing.
    """
    check_columns(frame, [], [*OWN, *(names or ())])
    if frame.empty or frame[list(OWN[:3])].isna().any(axis=None):
        raise UserError("a lineage needs rows, each with its generation, member and parent.")
    if names is None:
        names = [name for name in frame.select_dtypes("number").columns if name not in OWN]
    figure, axes = style.panels(1 + len(names), 4.6, 3.4)
    line = ancestry(frame)
    for axis, name in zip(axes, ["score", *names], strict=True):
        _draw(axis, frame, line, name)
    copies = int((frame.parent != frame.member).sum())
    members = frame.member.nunique()
    style.note(figure, f"thin: {members} members; grey dots: {copies} copies of another; thick: ancestors of the best")
    return figure


def ancestry(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the best member of the last generation and of its ancestors, by generation."""
    generation = int(frame.generation.max())
    last = frame[frame.generation == generation].sort_values("score", ascending=False)  # NaN come last
    parents = dict(zip(zip(frame.generation, frame.member, strict=True), frame.parent, strict=True))
    key, keys = (generation, int(last.member.iloc[0])), []
    while key in parents:
        keys.append(key)
        key = (key[0] - 1, int(parents[key]))
    return frame.set_index(["generation", "member"]).loc[keys[::-1]].reset_index()


def _draw(axis: Axes, frame: pd.DataFrame, line: pd.DataFrame, name: str) -> None:
    before = frame[["generation", "member", name]].assign(generation=frame.generation + 1)
    joined = frame.merge(before, "left", left_on=["generation", "parent"], right_on=["generation", "member"])
    start, end = joined[f"{name}_y"].to_numpy(float), joined[f"{name}_x"].to_numpy(float)
    x = joined.generation.to_numpy(float)
    axis.plot(np.stack([x - 1, x]), np.stack([start, end]), color=style.COLOURS[0], linewidth=0.6, alpha=0.4)
    # Members whose learner nobody took on have no line.
    axis.plot(frame.generation, frame[name], ".", color=style.COLOURS[0], markersize=3, alpha=0.4, markeredgewidth=0)
    copied = frame[frame.parent != frame.member]
    axis.plot(copied.generation, copied[name], ".", color=style.GREY, markersize=4)
    axis.plot(line.generation, line[name], color=style.COLOURS[1], linewidth=2.2, marker="o", markersize=3)
    if name != "score" and style.is_logarithmic(frame[name]):
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="generation", ylabel=style.named(name))
