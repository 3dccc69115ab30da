"""What people look at: summary.json's figures, curves.png, TensorBoard events, W&B."""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from jaxdqn.runs.files import write_atomically

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
    """TensorBoard events of every member, and W&B where asked; both optional."""

    def __init__(self, path: pathlib.Path | None, purge_step: int, wandb: str | None, config: dict[str, Any]):
        self._path, self._purge_step = path, purge_step
        self._writers: dict[int, Any] = {}
        self._wandb = _start_wandb(wandb, config) if wandb else None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows at their environment steps."""
        for row in rows:
            values = {k: v for k, v in row.items() if k not in IDENTITY and _is_scalar(v)}
            if self._path is not None:
                writer = self._writer(row["member"])
                for name, value in values.items():
                    writer.add_scalar(name, value, row["env_steps"], walltime=None)
            if self._wandb is not None:
                self._wandb.log({f"member-{row['member']}/{k}": v for k, v in values.items()}, step=row["env_steps"])

    def flush(self) -> None:
        """Writes what is buffered."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        for writer in self._writers.values():
            writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _writer(self, member: int) -> Any:
        if member not in self._writers:
            from tensorboardX import SummaryWriter

            directory = str(self._path / f"member-{member:04d}") if self._path else None
            self._writers[member] = SummaryWriter(directory, purge_step=self._purge_step or None)
        return self._writers[member]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _start_wandb(project: str, config: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(project=project, config=config)
