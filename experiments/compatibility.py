"""Which agent trains from which replay in which parallel form: the table of docs/compatibility.md, from the checks.

python experiments/compatibility.py           prints it
python experiments/compatibility.py --write   writes the page
"""

import dataclasses
import pathlib
import sys

from jaxdqn import agents, presets
from jaxdqn.errors import UserError
from jaxdqn.parallel import axes
from jaxdqn.parallel.compiled import devices
from jaxdqn.replay import REPLAYS
from jaxdqn.runs import cli, experiment

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
NUM_DEVICES, ENVIRONMENTS = 4, 16
FORMS = {
    "one agent, population": ("fused", 1),
    "over devices": ("fused", 2),
    "actors and learner": ("parallel_dqn", 1),
    "lockstep": ("lockstep_dqn", 1),
    "parameter server": ("gorila", 1),
    "averaging": ("local_sgd", 1),
    "sharding": ("sharded", 1),
}
"""By what the table calls them: the parallel preset, and devices of an agent."""
TOP = """# What works together

An agent (by row, with the replay it learns from) in a parallel form (by column). `x`: it trains; a number: it is
refused in one line, which is below the table. Made from the library's own checks by
`python experiments/compatibility.py --write`. An agent's own replay comes first. The settings are the agent's on
CartPole-v1 with 16 environments; from the latest block it learns on-policy.
"""


def refusal(agent: str, replay: str, form: str) -> str | None:
    """Why `agent` does not train from `replay` in a form, or None where it does."""
    name, devices_per_agent = FORMS[form]
    chosen, preset = axes.PARALLEL[name], presets.for_environment("CartPole-v1", agent)
    config = dataclasses.replace(preset.config, replay=replay, num_envs=ENVIRONMENTS)
    if agents.replay_of(config).newest_only:
        length = max(config.rollout_length, config.n_step)
        config = dataclasses.replace(config, rollout_length=length, learning_starts=0)
    try:
        experiment.plan(config, preset.hparams, [0], None, None, devices_per_agent, chosen.axes)
    except UserError as error:
        return str(error).replace(f"agent {agent!r}", "this agent").replace(f"replay {replay!r}", "this replay")
    return None


def replays_of(agent: str) -> list[str]:
    """The replays that an agent can learn from, its own first."""
    config = presets.for_environment("CartPole-v1", agent).config
    own, fitting = agents.replay_of(dataclasses.replace(config, replay="auto")), []
    for replay, kind in REPLAYS.items():
        try:
            agents.replay_of(dataclasses.replace(config, replay=replay))
        except UserError:
            continue
        fitting.insert(0 if kind is own else len(fitting), replay)
    return fitting


def page() -> str:
    """The page in Markdown."""
    reasons: list[str] = []
    rows = [f"| agent | replay | {' | '.join(FORMS)} |", f"|---|---|{'---|' * len(FORMS)}"]
    for agent in agents.AGENTS:
        for replay in replays_of(agent):
            cells = []
            for form in FORMS:
                reason = refusal(agent, replay, form)
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                cells.append("x" if reason is None else str(reasons.index(reason) + 1))
            rows.append(f"| `{agent}` | {replay} | {' | '.join(cells)} |")
    listed = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([TOP, *rows, "", *listed]) + "\n"


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    if arguments not in ([], ["--write"]):
        raise UserError(f"compatibility.py takes --write or nothing; it got {' '.join(arguments)}.")
    devices.prepare_cpu(NUM_DEVICES, one_thread_each=False)
    if arguments:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
