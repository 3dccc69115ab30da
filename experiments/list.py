"""Lists environments, agents and presets.

python experiments/list.py
"""

import sys

from jaxdqn.agents import AGENTS, names_of
from jaxdqn.environments.names import CONTINUOUS
from jaxdqn.environments.suites import SUITES
from jaxdqn.errors import UserError
from jaxdqn.parallel.axes import PARALLEL
from jaxdqn.presets import PRESETS, of_environment
from jaxdqn.runs import cli


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    if arguments not in ([], ["--help"], ["-h"]):
        raise UserError(f"list.py takes no arguments; it got {' '.join(arguments)}.")
    print("environments (--env; the preset beside them is used by default)")
    for suite in SUITES:
        where = ", on the host: with --parallel parallel_dqn, apex or lockstep_dqn" if suite.on_host else ""
        missing = "" if suite.installed else f", which is not installed: {suite.install}"
        print(f"  of {suite.title}{where}{missing}")
        for name in suite.names:
            print(f"    {name:42}{of_environment(name) or ''}".rstrip())
        if suite.prefix:
            print(f"    {suite.prefix}ID for any other with discrete actions")
    print(f"  not possible, actions are continuous: {', '.join(CONTINUOUS)}")
    print("\nagents (--agent; their own settings after it)")
    for name in AGENTS:
        print(f"  {name:26}{', '.join(names_of(name))}")
    print("  ensemble_NAME             of any that acts by the values of one network, such as ensemble_c51")
    print("\npresets (--preset)")
    for name, preset in PRESETS.items():
        print(f"  {name:32}{preset.summary}")
    print("\nways to run in parallel (--parallel)")
    for name, parallel in PARALLEL.items():
        print(f"  {name:26}{parallel.summary}")
    return 0


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
