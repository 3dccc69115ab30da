"""Compares ways to run in parallel: same environment, seeds and thresholds, one table and two figures.

    python experiments/compare_parallel.py --out runs/compare
    python experiments/compare_parallel.py --presets fused "parallel_dqn --axes.workers 16" a3c --num-seeds 5

A preset may be followed by flags of train.py, in quotes. Each is a run of train.py in a process of its own, in a folder
of OUT that is named after it; finished ones are not run again, interrupted ones go on. Presets that learn without
replay get `on_policy_steps`. Parallelism raises throughput, not sample efficiency: so the curves are drawn against
environment steps and against seconds.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import pathlib
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from jaxdqn.analysis.thresholds import seconds_to_threshold, steps_to_threshold, summarise
from jaxdqn.config import MAX_MEMBERS, UINT32_MAX, check_number, check_whole
from jaxdqn.environments import suites
from jaxdqn.errors import UserError
from jaxdqn.files import documents
from jaxdqn.files.paths import write_atomically, write_text
from jaxdqn.parallel.axes import preset
from jaxdqn.runs import cli
from jaxdqn.validation import validate

if TYPE_CHECKING:
    import pandas as pd

PR_SET_PDEATHSIG = 1
TRAIN = pathlib.Path(__file__).parent / "train.py"
# Every scheme, and how it does with fewer and with more workers.
MATRIX = (
    "fused",
    "fused --devices-per-agent 4 --num-devices 4 --num-envs 8",
    *(f"parallel_dqn --axes.workers {count}" for count in (1, 4, 16)),
    "apex",
    "gorila",
    *(f"local_sgd --axes.average-every {period}" for period in (1, 8, 64)),
    "post_local_sgd",
    "diloco",
    "elastic",
    "sharded",
    "async_q",
    "async_q1",
    *(f"a3c --axes.workers {count}" for count in (1, 4, 8)),
    "hogwild",
)
ENDED = ("finished", "solved", "diverged")
HEADER = (
    "agent",
    "preset",
    "final return",
    "seeds at threshold",
    "steps to it",
    "seconds to it",
    "steps/s",
    "updates/s",
    "bytes/update",
    "mean lag",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compare."""

    presets: tuple[str, ...] = MATRIX
    """Parallel presets, each with flags of train.py if you like; `python experiments/list.py` shows all."""
    env: str = "CartPole-v1"
    """Environment id."""
    num_seeds: int = 5
    """Seeds of each preset: seed, seed + 1, ..."""
    seed: int = 0
    """First seed."""
    steps: int = 500_000
    """Environment steps of a run that learns from replay."""
    on_policy_steps: int = 2_000_000
    """Environment steps of a run that learns without replay."""
    threshold: float = 475.0
    """Greedy return that counts as solved."""
    out: pathlib.Path = pathlib.Path("runs/compare")
    """Where the runs, table.md, table.csv, steps.png and seconds.png go."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    check_whole("num_seeds", args.num_seeds, most=MAX_MEMBERS)
    check_whole("seed", args.seed, 0, UINT32_MAX + 1 - args.num_seeds)
    for name in ("steps", "on_policy_steps"):
        check_whole(name, getattr(args, name))
    check_number("threshold", args.threshold)
    suites.find(args.env)
    if not args.presets:
        raise UserError("nothing to compare: --presets needs at least one name.")
    script = load_train()
    check(args, script)
    for name in args.presets:
        train(args, name, script)
    write(args)
    return 0


def load_train() -> Any:
    """train.py, for what it makes of flags."""
    script = importlib.util.spec_from_file_location("train", TRAIN)
    assert script is not None and script.loader is not None
    module = importlib.util.module_from_spec(script)
    sys.modules["train"] = module  # dataclasses look their module up
    script.loader.exec_module(module)
    return module


def check(args: Args, script: Any) -> None:
    """Raises `UserError` for a preset or flag that train.py would refuse, and for a run in `out` of another setting."""
    from jaxdqn.runs import directory

    names: dict[pathlib.Path, str] = {}
    for name in args.presets:
        preset(name.split()[0] if name.split() else name)
        path = folder(args, name)
        if path in names:
            raise UserError(f"presets {names[path]!r} and {name!r} would both be kept in {path}.")
        names[path] = name
        wanted, _ = script.parse(flags_of(args, name))
        validate(wanted.config, wanted.devices_per_agent)
        if (path / "config.yaml").exists():
            seeds = range(args.seed, args.seed + args.num_seeds)
            directory.check_same(path, wanted.config, wanted.hparams, seeds)


def flags_of(args: Args, name: str) -> list[str]:
    """The flags of train.py that a preset stands for."""
    parallel, *more = name.split()
    steps = args.on_policy_steps if preset(parallel).config.get("learning_starts") == 0 else args.steps
    flags = ["--env", args.env, "--seed", str(args.seed), "--num-seeds", str(args.num_seeds)]
    flags += ["--out", str(folder(args, name)), "--total-steps", str(steps), "--parallel", parallel]
    for flag in sorted(cli.given(flags) & cli.given(more)):
        raise UserError(f"preset {name!r}: --{flag.replace('_', '-')} is the same for all here; leave it out there.")
    return [*flags, *more]


def flags_of_resume(args: Args, name: str, script: Any) -> list[str]:
    """The flags with which a preset's run goes on: those of its own that no run directory keeps."""
    wanted, _ = script.parse(flags_of(args, name))
    flags = ["--resume", str(folder(args, name))]
    for field in dataclasses.fields(wanted):
        value = getattr(wanted, field.name)
        if field.name in script.ACT_ON_RESUME - {"resume"} and value != field.default:
            flag = field.name.replace("_", "-")
            flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def folder(args: Args, name: str) -> pathlib.Path:
    """Where the run of a preset and its flags is kept."""
    return args.out / re.sub(r"[^\w.]+", "-", name.replace("axes.", ""))


def titled(name: str) -> str:
    """A preset and its flags, for people."""
    return re.sub(r"(?<=\d) ", ", ", name.replace("--axes.", "").replace("--", "").replace("-", " "))


def train(args: Args, name: str, script: Any) -> None:
    """One preset's run, where it is not there yet. Raises `UserError` where it fails."""
    from jaxdqn.runs import directory

    path = folder(args, name)
    if directory.status(path) in ENDED:
        return
    begun = (path / "config.yaml").exists()
    flags = flags_of_resume(args, name, script) if begun else flags_of(args, name)
    cli.say(f"== {titled(name)}")
    done = subprocess.run([sys.executable, str(TRAIN), *flags], preexec_fn=end_with_parent)
    if done.returncode and directory.status(path) not in ENDED:
        raise UserError(f"{name} ended with status {done.returncode}; run this again to go on from {path}.")


def end_with_parent() -> None:
    """In a new process: it is asked to save and end once this one has gone, be it killed. Linux has that."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def row(args: Args, name: str) -> tuple[Any, ...]:
    """A preset's line of the table."""
    import pandas as pd

    path = folder(args, name)
    summary = documents.read_json(path / "summary.json")
    metrics = pd.read_parquet(path / "metrics.parquet")
    steps, seconds = (
        found(metrics, args.threshold, by=["member"]) for found in (steps_to_threshold, seconds_to_threshold)
    )
    solved = steps.reached
    interval = summary["final_return_ci95"]
    spread = f" [{interval[0]:.0f}, {interval[1]:.0f}]" if interval else ""

    def mean(column: str) -> float:
        return float(metrics[column].mean()) if column in metrics else float("nan")

    return (
        summary["agent"],
        titled(name),
        "-" if summary["final_return_mean"] is None else f"{summary['final_return_mean']:.1f}{spread}",
        f"{solved.sum()} of {summary['num_members']}",
        median(steps, ",.0f"),
        median(seconds, ".1f"),
        f"{summary['env_steps_per_second']:,.0f}",
        f"{summary['updates_per_second']:,.0f}",
        f"{mean('bytes_per_update'):,.0f}",
        f"{mean('lag_mean'):.2f}" if "lag_mean" in metrics else "-",
    )


def median(found: "pd.DataFrame", form: str) -> str:
    """The median time to a threshold, of all seeds: those that never got there count as later."""
    time = summarise(found.time, found.reached).median
    return "-" if time is None else format(time, form)


def write(args: Args) -> None:
    """The table, as Markdown and CSV, and the figures."""
    import pandas as pd

    rows = sorted(row(args, name) for name in args.presets)
    table = pd.DataFrame(rows, columns=list(HEADER))
    write_text(args.out / "table.csv", table.to_csv(index=False))
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    summaries = [documents.read_json(folder(args, name) / "summary.json") for name in args.presets]
    devices, commits = ({str(summary[key]) for summary in summaries} for key in ("device", "commit"))
    seeds = f"seeds {args.seed}-{args.seed + args.num_seeds - 1}"
    lines += ["", f"{args.env}, {seeds}; {', '.join(sorted(devices))}; commit {', '.join(sorted(commits))}."]
    text = "\n".join(lines) + "\n"
    write_text(args.out / "table.md", text)
    cli.say(text)
    for column, label in (("env_steps", "environment steps"), ("seconds", "seconds of training, compilation apart")):
        figure = draw(args, column, label)
        path = args.out / {"env_steps": "steps.png", "seconds": "seconds.png"}[column]
        write_atomically(path, functools.partial(figure.savefig, dpi=130))
        cli.say(f"figure: {path}")


def draw(args: Args, column: str, label: str) -> Any:
    """Greedy return of every preset, the mean over its seeds."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    for index, name in enumerate(args.presets):
        metrics = pd.read_parquet(folder(args, name) / "metrics.parquet").dropna(subset=["eval_return"])
        points = metrics.groupby("env_steps")[["seconds", "eval_return"]]
        means = points.mean()[points.size() == metrics.member.nunique()].reset_index()  # where all seeds still train
        style = ("-", "--", ":")[index // 10 % 3]
        axis.plot(means[column], means.eval_return, style, color=f"C{index % 10}", label=titled(name), linewidth=1.4)
    axis.axhline(args.threshold, color="black", linewidth=0.6)
    axis.set(xlabel=label, ylabel="greedy return, mean over seeds", title=args.env)
    if column == "seconds":
        axis.set_xscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
