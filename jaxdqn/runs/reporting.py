"""curves.png: what a run has learned, as a figure."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from jaxdqn.files.paths import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(metrics: pd.DataFrame, title: str, varying: Sequence[str] = ()) -> "Figure":
    """A figure of greedy and training return against environment steps: mean, 95 % interval and every member.

    Settings of the `varying` hyperparameters are drawn apart.
    """
    from jaxdqn.analysis import figures, style  # late: importing matplotlib takes as long as many a run

    figure, axes = style.panels(2, 4.5, 3.6, share_y=True)
    order = figures.setting_names(metrics, varying)
    for axis, column in zip(axes, ("eval_return", "episode_return"), strict=True):
        count = figures.draw_curves(axis, metrics, "env_steps", column, varying, order)
        style.name_axes(axis, "env_steps", column)
    style.legend(axes[-1], count)
    style.note(figure, figures.CURVES)
    figure.suptitle(title, fontsize="medium")
    return figure


def save_figure(figure: "Figure", path: pathlib.Path) -> None:
    """Writes a PNG atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
