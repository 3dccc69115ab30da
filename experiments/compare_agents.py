"""Trains several agents on several environments, for figures that compare them (notebooks/04_compare_agents.ipynb).

    python experiments/compare_agents.py                                               what experiments/results/ holds
    python experiments/compare_agents.py --envs Catch-bsuite --agents dqn random --num-seeds 30 --out runs/agents

Each agent is one population of seeds on each environment, in a folder OUT/ENV-AGENT that holds config.yaml,
metrics.parquet and summary.json, and appears when it is complete; what is there is not trained again, and what was
stopped goes on. On one environment all agents take equally many steps, as its preset says, and are judged by the same
number of greedy episodes each time, which no other seed or step shares.
"""

import dataclasses
import pathlib
import shutil
import sys

from jaxdqn import presets
from jaxdqn.agents import complete
from jaxdqn.config import MAX_MEMBERS, MOST_EPISODES, Config, HParams, check_whole
from jaxdqn.environments import suites
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.files.paths import flat
from jaxdqn.runs import cli

# What is changed of the preset of environment and agent.
AGENTS = {
    "dqn": {"agent": "dqn"},
    "double_dqn": {"agent": "double_dqn"},
    "dueling": {"agent": "double_dqn", "dueling": True},
    "a2c": {"agent": "a2c"},
    "random": {"agent": "random"},
}
FAMILY = ("munchausen", "c51", "hl_gauss", "qr_dqn", "iqn", "rainbow", "pqn", "r2d2", "drqn")
CHANGES = {**AGENTS, **{name: {"agent": name} for name in FAMILY}}
KEPT = ("config.yaml", "metrics.parquet", "summary.json")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compare."""

    envs: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1", "Catch-bsuite")
    """Environment ids; `python experiments/list.py` shows all."""
    agents: tuple[str, ...] = tuple(AGENTS)
    """dqn, double_dqn, dueling (a double DQN), a2c, random; also munchausen, c51, hl_gauss, qr_dqn, iqn, rainbow, pqn,
    r2d2, drqn, whose results are in experiments/results/family."""
    num_seeds: int = 10
    """Seeds of each agent: 0, 1, ..."""
    steps: int | None = None
    """Environment steps of each seed; by default those of the environment's preset."""
    episodes: int = 100
    """Greedy episodes of each evaluation on the curve, from which times to a threshold are read."""
    out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "compare_agents"
    """Where the folders ENV-AGENT go."""


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args = cli.parse(Args, arguments, Args(), str(__doc__))
    check_whole("num_seeds", args.num_seeds, most=MAX_MEMBERS)
    check_whole("episodes", args.episodes, most=MOST_EPISODES)
    if args.steps is not None:
        check_whole("steps", args.steps)
    from jaxdqn.runs import directory

    if not args.envs or not args.agents:
        raise UserError("nothing to compare: --envs and --agents need at least one name each.")
    for env in args.envs:
        suites.find(env)
    cells = [
        (f"{flat(env)}-{agent}", *settings(env, agent, args.steps, args.episodes))
        for env in args.envs
        for agent in args.agents
    ]
    there = [name for name, *_ in cells if (args.out / name).exists()]
    for name, config, hparams in cells:
        if name in there:
            directory.check_same(args.out / name, config, hparams, range(args.num_seeds))
    for name, config, hparams in cells:
        if name in there:
            shutil.rmtree(unfinished(args.out / name), ignore_errors=True)  # of a process that was killed at its end
            cli.say(f"{name}: there already")
        else:
            cli.say(f"== {name}")
            train(args.out / name, config, hparams, args.num_seeds)
    return 0


def settings(env: str, agent: str, steps: int | None, episodes: int) -> tuple[Config, HParams]:
    """What an agent is trained with. Raises `UserError` for an unknown one."""
    if agent not in CHANGES:
        raise unknown_name("agent", agent, CHANGES)
    _, config, hparams = presets.for_environment(env, CHANGES[agent]["agent"])
    budget = presets.for_environment(env).config.total_steps if steps is None else steps
    usual, config = config, dataclasses.replace(config, **CHANGES[agent], total_steps=budget, eval_episodes=episodes)
    return complete(config, presets.falling(hparams, usual, config))


def train(path: pathlib.Path, config: Config, hparams: HParams, num_seeds: int) -> None:
    """One population, kept in `path` once it has finished; until then in `unfinished(path)`, where the next call goes
    on. Raises `UserError` where it is stopped before."""
    cli.prepare_backend(config, num_seeds, None, 1)
    from jaxdqn.runs import directory, experiment, metrics
    from jaxdqn.runs.settings import DIVERGED, OK, Settings

    work, settings = unfinished(path), Settings(tensorboard=False, figure=False)
    if (work / "config.yaml").exists():
        directory.check_same(work, config, hparams, range(num_seeds))
        result = experiment.resume(work, settings=settings)
    else:
        result = experiment.train(config, hparams, seeds=range(num_seeds), out=work, settings=settings)
    if result.summary["status"] not in (OK, DIVERGED):
        raise UserError(f"{path.name} is {result.summary['status']}; run this again to go on.")
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for name in KEPT:
        copy = shutil.copytree if (work / name).is_dir() else shutil.copy2
        copy(work / name, whole / name)
    metrics.join_parts(whole / "metrics.parquet")
    whole.rename(path)
    shutil.rmtree(work)


def unfinished(path: pathlib.Path) -> pathlib.Path:
    """Where the run of `path` is while it trains."""
    return path.with_name(f".{path.name}")


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
