"""What people look at: summary.json's figures, curves.png, TensorBoard events, W&B."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxdqn.runs.files import write_atomically

IDENTITY = ("member", "seed", "iteration", "env_steps", "updates", "seconds")


def bootstrap_ci95(values: Sequence[float]) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean (10,000 resamples, fixed seed); None for fewer than two values."""
    data = np.asarray(values, float)
    if len(data) < 2 or not np.isfinite(data).all():
        return None
    picks = np.random.default_rng(0).integers(0, len(data), (10_000, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def final_returns(metrics: pd.DataFrame) -> list[float]:
    """Per member, the mean over the greedy evaluations in the last fifth of the steps it took."""
    finals = []
    for _, rows in metrics.groupby("member"):
        evaluated = rows.dropna(subset=["eval_return"])
        late = evaluated[evaluated.env_steps > 0.8 * rows.env_steps.max()]
        finals.append(float(late.eval_return.mean()) if len(late) else math.nan)
    return finals


def plot(metrics: pd.DataFrame, title: str, varying: Sequence[str] = ()) -> Any:
    """A matplotlib figure: greedy and training return against environment steps, every member and the mean.

    Members are coloured by their setting of the `varying` hyperparameters; the band is the bootstrap interval.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    groups: list[tuple[Any, pd.DataFrame]] = list(metrics.groupby(list(varying))) if varying else [((), metrics)]
    for axis, column, label in (
        (axes[0], "eval_return", "greedy return"),
        (axes[1], "episode_return", "training return"),
    ):
        for index, (setting, rows) in enumerate(groups):
            _plot_group(
                axis, rows.dropna(subset=[column]), column, f"C{index % 10}", dict(zip(varying, setting, strict=True))
            )
        axis.set(xlabel="environment steps", ylabel=label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].get_legend_handles_labels()[0]:  # a run that was stopped early has no evaluation
        axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def _plot_group(axis: Any, rows: pd.DataFrame, column: str, colour: str, setting: dict[str, Any]) -> None:
    if rows.empty:
        return
    table = rows.pivot_table(index="env_steps", columns="member", values=column)
    count = table.shape[1]
    for member in table:
        alone = table[member].dropna()
        axis.plot(
            alone.index, alone, color=colour, alpha=1.0 if count == 1 else 0.25, linewidth=1.5 if count == 1 else 0.7
        )
    name = ", ".join(f"{key}={value:g}" for key, value in setting.items())
    label = f"{name} (n={count})" if name else f"n={count}"
    axis.plot(table.index, table.mean(axis=1), color=colour, linewidth=1.8, label=label)
    if count > 1:
        intervals = [bootstrap_ci95(row.dropna().tolist()) or [math.nan, math.nan] for _, row in table.iterrows()]
        low, high = np.array(intervals).T
        axis.fill_between(table.index, low, high, color=colour, alpha=0.2, linewidth=0)


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
            values = {k: v for k, v in row.items() if k not in IDENTITY and isinstance(v, float) and math.isfinite(v)}
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


def _start_wandb(project: str, config: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(project=project, config=config)
