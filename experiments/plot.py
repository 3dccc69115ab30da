"""Figures of runs and sweeps: whatever suits what is there.

    python experiments/plot.py runs/NAME
    python experiments/plot.py runs/a runs/b --by agent num_envs --x seconds
    python experiments/plot.py sweeps/NAME --out figures

Learning curves and the final score of every seed, for each setting of the columns --by; of a sweep also the score
against each hyperparameter, pairs of them, and how much each explains. Prints the path of every figure.
"""

import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxdqn.errors import UserError, unknown_name
from jaxdqn.runs import cli

if TYPE_CHECKING:
    import pandas as pd

Figures = Iterator[tuple[str, Any]]

MAX_GROUPS = 28  # as many look different
BEST_TRIALS = 6  # of a sweep, whose curves are drawn
LONGEST_NAME = 60  # letters, of up to four bytes


@dataclasses.dataclass(frozen=True)
class Args:
    """What to draw."""

    paths: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Run directories, sweep directories, or folders of them."""
    out: pathlib.Path | None = None
    """Where the figures go; by default "figures" in the directory of the first path."""
    x: Literal["both", "env_steps", "seconds"] = "both"
    """Learning curves against environment steps, seconds, or a figure of each."""
    by: tuple[str, ...] = ()
    """Columns whose settings are drawn apart; by default those that differ between the runs."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    if not args.paths:
        raise UserError("no path; give run directories, sweep directories, or folders of them.")
    from jaxdqn.analysis import loading
    from jaxdqn.files.paths import write_atomically

    frame = loading.load(args.paths)
    for name in args.by:
        if name not in frame:
            raise unknown_name("column", name, frame.columns)
    sweeps = loading.sweeps(args.paths)
    out = args.out or args.paths[0] / "figures"
    if args.out is None and out.is_symlink():
        raise UserError(f"{out} is a link, which may lead anywhere; give --out.")
    taken: set[str] = set()
    for name, figure in everything(frame, sweeps, args):
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{unlike(file_name(name), taken)}.png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
        cli.say(str(path))
    return 0


def file_name(name: str) -> str:
    """`name`, parts of which come from files that may be a stranger's, as the name of a file: no path, and not long."""
    return re.sub(r"[^\w,+-]+", "-", name)[:LONGEST_NAME]


def unlike(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken already; it is then."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    free = next(each for each in names if each not in taken)
    taken.add(free)
    return free


def everything(frame: "pd.DataFrame", sweeps: Sequence[pathlib.Path], args: Args) -> Figures:
    """The figures of all runs outside sweeps, then of each sweep; with names that tell them apart."""
    from jaxdqn.analysis import loading

    alone = frame[frame.sweep.isna()] if "sweep" in frame else frame
    if len(alone):
        yield from curves(alone, args)
    several = len(sweeps) > 1 or len(alone) > 0
    for sweep in sweeps:
        joined = whole(loading.load(sweep))
        for name, figure in (*(curves(joined, args) if len(joined) else ()), *of_sweep(sweep)):
            yield f"{sweep.name}-{name}" if several else name, figure


def curves(frame: "pd.DataFrame", args: Args) -> Figures:
    """Learning curves and the final score of every seed; comparisons of several agents on several environments."""
    from jaxdqn.analysis import comparisons, figures

    by = list(args.by or differing(frame))
    settings = [name for name in by if name != "env"] or ["agent"]
    groups = frame.groupby(by, observed=True, dropna=False).ngroups if by else 1
    if groups > MAX_GROUPS:
        raise UserError(f"{groups} settings of {', '.join(by)}; at most {MAX_GROUPS} can be told apart: choose --by.")
    for x, name in (("env_steps", "steps"), ("seconds", "seconds")):
        if args.x in ("both", x):
            yield f"curves-{name}", figures.learning_curves(frame, x, by=by)
    yield "seeds", figures.seed_dots(frame, by)
    if frame.env.nunique() > 1 and frame.groupby(settings, observed=True, dropna=False).ngroups > 1:
        try:
            yield "profiles", comparisons.performance_profiles(frame, settings)
            yield "intervals", comparisons.interval_plot(frame, settings)
        except UserError as error:  # such as an environment that every run has solved
            print(f"no comparison: {error}", file=sys.stderr)


def whole(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The curves of a sweep's winners on fresh seeds, or without any of its best trials.

    The stages of a trial are joined: a member is a trial with a seed.
    """
    import pandas as pd

    from jaxdqn.analysis.curves import final_score

    if (frame.kind == "final").any():
        frame = frame[frame.kind == "final"]
    else:
        reached = frame.groupby("trial", observed=True).env_steps.max()
        scores = pd.DataFrame({"steps": reached, "score": final_score(frame, by=["trial"])}).dropna()
        best = scores.sort_values(["steps", "score"], ascending=False).head(BEST_TRIALS)  # of the longest curves
        frame = frame[frame.trial.isin(best.index)]
    return frame.assign(member=frame.groupby(["trial", "seed"]).ngroup(), run=frame.sweep)


def differing(frame: "pd.DataFrame") -> list[str]:
    """Labels and settings that differ between curves: what to draw apart where nobody says."""
    import numpy as np

    from jaxdqn import agents
    from jaxdqn.parallel import schemes

    if "trial" in frame:
        return ["trial"]
    axes = [name for scheme in schemes.SCHEMES.values() for name in scheme.axes._fields]
    settings = [*agents.static_types(), *agents.ranges(), *axes]
    settings += [f"{name}_setting" for name in settings]  # beside a metric of its name, such as `loss`
    names = [name for name in dict.fromkeys(["env", "agent", "scheme", *settings]) if name in frame]
    curves = frame.groupby(["run", "member"], observed=True)
    # The column `loss` is a metric: a setting is constant along a curve.
    names = [name for name in names if curves[name].nunique().max() == 1]
    table = curves[[*names, "seed"]].first().reset_index()
    told: list[str] = []
    for name in names:  # what the ones before do not tell apart: a preset's settings come with its agent
        groups = table.groupby(told, observed=True, dropna=False)[name] if told else table[name]
        told += [name] if np.max(groups.nunique()) > 1 else []
    if not table.duplicated([*told, "seed"]).any():
        return told
    # The same seed twice: the runs differ in what is in none of these columns.
    return ["run", *(name for name in told if table.groupby("run", observed=True)[name].nunique().max() > 1)]


def of_sweep(path: pathlib.Path) -> Figures:
    """The figures of a sweep's trials that its report has, and why one of them cannot be drawn."""
    from jaxdqn.analysis import loading
    from jaxdqn.sweeps import reading, report

    sweep = reading.load(path / "space.yaml")
    for figure, draw in report.of_trials(path, sweep, loading.trials(path)):
        try:
            yield figure.name, draw()
        except UserError as error:  # such as too few trials for a share of variance
            print(f"no figure of {figure.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
