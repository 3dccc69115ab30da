"""Greedy returns of a trained run, and a GIF of its policy.

Beside the GIF: the distribution of the return over the same episode, NAME-returns.png, where the agent learns one.

python experiments/evaluate.py runs/NAME --episodes 100 --json
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from jaxdqn.config import MOST_EPISODES, UINT32_MAX, check_probability, check_whole
from jaxdqn.errors import UserError
from jaxdqn.files import documents, paths
from jaxdqn.runs import cli

if TYPE_CHECKING:
    from jaxdqn.runs.results import Result


@dataclasses.dataclass(frozen=True)
class Args:
    """Which policy to judge, and how."""

    run: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("RUN")
    """Run directory."""
    member: int = 0
    """Member of the population."""
    episodes: int = 100
    """Greedy episodes."""
    seed: int = 1
    """Seed of the start states."""
    epsilon: float | None = None
    """Probability of a random action at each step; by default the run's eval_epsilon."""
    json: bool = False
    """Print one JSON object and nothing else."""
    gif: pathlib.Path | None = None
    """Where to write the GIF; by default policy-member-K.gif in the run directory."""
    no_gif: bool = False
    """Write no GIF."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    from jaxdqn.runs import directory

    spec, _ = directory.load(args.run)
    check_whole("episodes", args.episodes, most=MOST_EPISODES)
    check_whole("member", args.member, 0)
    check_whole("seed", args.seed, 0, UINT32_MAX)
    if args.epsilon is not None:
        check_probability("epsilon", args.epsilon)
    if args.gif is not None and args.no_gif:
        raise UserError("either --gif or --no-gif.")
    if args.gif is not None:
        args = dataclasses.replace(args, gif=paths.followed(args.gif))
        paths.check_file(args.gif)
    cli.prepare_backend(spec.config, 1, 1, 1)
    from jaxdqn import fingerprints
    from jaxdqn.analysis import intervals
    from jaxdqn.runs import rendering, results

    result = results.load(args.run)
    picture = None if args.no_gif else args.gif or args.run / f"policy-member-{args.member}.gif"
    try:
        rendering.painter(result.components.environment.spec, spec.config.env_kwargs)
    except UserError as error:
        if args.gif is not None:
            raise
        if picture is not None:
            print(f"no GIF: {error}", file=sys.stderr)
        picture = None
    episodes = result.evaluate(args.episodes, args.member, args.seed, args.epsilon)
    distinct = int(fingerprints.distinct(episodes.fingerprints[None])[0])
    report = {
        "run": str(args.run),
        "env": spec.config.env,
        "agent": spec.config.agent,
        "member": args.member,
        "episodes": args.episodes,
        "epsilon": spec.config.eval_epsilon if args.epsilon is None else args.epsilon,
        "return_mean": float(episodes.returns.mean()),
        # Equal returns say nothing of their spread.
        "return_ci95": intervals.return_interval(episodes.returns[:, None]) if np.ptp(episodes.returns) else None,
        "return_std": float(episodes.returns.std()),
        "return_min": float(episodes.returns.min()),
        "return_max": float(episodes.returns.max()),
        "length_mean": float(episodes.lengths.mean()),
        "finished": int(episodes.finished.sum()),
        "unfinished": int((~episodes.finished).sum()),
        "distinct": distinct,
        "achieved": {name: float(done.mean()) for name, done in episodes.achieved.items()},
        "returns": [float(value) for value in episodes.returns],
    }
    drawn = {}
    if not args.json:  # before anything is drawn, which may fail
        print("\n".join(described(report)), flush=True)
    try:
        drawn = {} if picture is None else draw(result, args.member, args.seed, picture)
    except UserError as error:  # environments that draw themselves say so late
        if args.gif is not None:
            raise
        print(f"no GIF: {error}", file=sys.stderr)
    finally:
        if args.json:
            print(documents.json_text({**report, "gif": str(drawn["gif"]) if drawn else None}), flush=True)
    for name, path in drawn.items() if not args.json else ():
        print(f"{name}: {path}")
    return 0


def draw(result: "Result", member: int, seed: int, path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes an episode as a GIF, and the returns that the agent expected in it: what was written. Raises `UserError`,
    and OSError."""
    from jaxdqn.analysis import figures
    from jaxdqn.runs import rendering, reporting, results

    spec, env_kwargs = result.components.environment.spec, result.config.env_kwargs
    observations, shown = results.filmed(result, member, seed)
    rendering.save_gif(path, rendering.frames(spec, rendering.thin(shown), env_kwargs))
    expected = results.expected_returns(result, member, observations)
    if expected is None:
        return {"gif": path}
    figure = path.with_name(f"{path.stem}-returns.png")
    title = f"{result.config.agent} on {result.config.env}: the return it expects of its actions"
    reporting.save_figure(figures.return_distributions(*expected, title), figure)
    return {"gif": path, "returns": figure}


def described(report: dict) -> list[str]:
    """The report for people."""
    from jaxdqn.runs import summary

    low, high = np.percentile(report["returns"], [5, 95])
    interval = report["return_ci95"]
    spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    lines = [
        f"{report['agent']} on {report['env']}, member {report['member']}: return {report['return_mean']:.2f}{spread} "
        f"(5 % {low:.1f}, 95 % {high:.1f}) over {report['episodes']} greedy episodes of {report['length_mean']:.0f} "
        "steps"
    ]
    if report["achieved"]:
        lines.append(summary.achievements(report["achieved"]))
    if report["epsilon"]:
        lines.append(f"a random action with probability {report['epsilon']:g}")
    if report["distinct"] < report["episodes"]:
        lines.append(
            f"only {report['distinct']} of them are distinct; the interval is no better than that: see --epsilon"
        )
    if report["unfinished"]:
        lines.append(f"{report['unfinished']} of them had not ended at the run's eval_max_steps")
    return lines


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
