"""What people look at: summary.json's figures, curves.png, TensorBoard events, W&B."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from jaxdqn.files.paths import write_atomically
from jaxdqn.runs import tensorboard, weights_and_biases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IDENTITY = ("member", "seed", "iteration", "env_steps", "updates", "seconds")


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


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a PNG atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


class Scalars:
    """The numbers of every logging point, for TensorBoard and W&B where they are wanted."""

    def __init__(self, events: tensorboard.Events | None, log: weights_and_biases.Log | None):
        self._events, self._log = events, log

    def write(self, batch: int, members: range, points: Sequence[pa.Table]) -> None:
        """Adds points of a batch of members."""
        for point in points:
            columns, env_steps = scalars(point), point.column("env_steps")[0].as_py()
            if self._events is not None:
                self._events.write(batch, env_steps, columns)
            if self._log is not None:
                self._log.write(batch, env_steps, members, columns)
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Ends the session."""
        if self._log is not None:
            self._log.close()


def scalars(point: pa.Table) -> dict[str, np.ndarray]:
    """The columns [M] that are curves: numbers, but for those of IDENTITY."""
    numbers = [
        field.name for field in point.schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    ]
    return {name: point.column(name).to_numpy() for name in numbers if name not in IDENTITY}
