"""That it learns: whole runs of the presets through train.py, on reported (not sweep) seeds. Minutes each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


def final_returns(out: Path, *flags: str) -> list[float]:
    """`final_return` per member of a run of train.py."""
    command = [sys.executable, "experiments/train.py", "--out", str(out), "--quiet", *flags]
    as_users_do = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # see conftest.py
    subprocess.run(command, cwd=ROOT, env=as_users_do, check=True, timeout=1500)
    return json.loads((out / "summary.json").read_text())["final_return_per_member"]


@pytest.mark.slow
def test_cartpole_is_solved_by_four_seeds(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "CartPole-v1", "--num-seeds", "4", "--total-steps", "500000")
    # Reported of ten: 498.3, lowest 483. Another CPU rounds differently and so trains other agents; of the 40 seeds of
    # the preset's choice the mean was 490 and the lowest 414.
    assert sum(returns) / 4 >= 475 and min(returns) >= 400


@pytest.mark.slow
def test_acrobot(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "Acrobot-v1", "--num-seeds", "2")
    assert sum(returns) / 2 >= -95


@pytest.mark.slow
def test_catch_is_perfect_within_100k_steps(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "Catch-bsuite", "--num-seeds", "4", "--total-steps", "100000")
    assert returns == [1.0] * 4


@pytest.mark.slow
def test_breakout_within_300k_steps(tmp_path):
    returns = final_returns(
        tmp_path / "run", "--env", "Breakout-MinAtar", "--num-seeds", "1", "--total-steps", "300000"
    )
    assert returns[0] >= 5  # recorded: 7.4 [6.7, 8.1]


@pytest.mark.slow
def test_a2c_solves_cartpole(tmp_path):
    returns = final_returns(tmp_path / "run", "--preset", "cartpole-a2c", "--num-seeds", "2")
    assert sum(returns) / 2 >= 475


@pytest.mark.slow
def test_reinforce_solves_cartpole(tmp_path):
    returns = final_returns(tmp_path / "run", "--preset", "cartpole-reinforce", "--num-seeds", "2")
    assert sum(returns) / 2 >= 475


@pytest.mark.slow
@pytest.mark.parametrize("parallel, steps", [("parallel_dqn", 500_000), ("a3c", 2_000_000)])
def test_asynchronous_presets_learn_cartpole(parallel, steps, tmp_path):
    """Real threads, four of them; one seed, whose evaluations of the second half have a median of at least 400
    (compare_parallel.py reports whole results): in one of them it may be in a dip."""
    final_returns(tmp_path / "run", "--parallel", parallel, "--total-steps", str(steps), "--seed", "1")
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert metrics[metrics.env_steps > steps / 2].eval_return.median() >= 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "agent, steps",
    [
        ("munchausen", 100_000),
        ("c51", 100_000),
        ("hl_gauss", 100_000),
        ("qr_dqn", 100_000),
        ("iqn", 60_000),
        ("rainbow", 60_000),
        ("r2d2", 100_000),
        ("pqn", 300_000),
    ],
)
def test_each_agent_of_the_family_learns_cartpole(agent, steps, tmp_path):
    """One seed, a part of the budget; whole results are in experiments/results/family. At random it is 22."""
    flags = ["--env", "CartPole-v1", "--agent", agent, "--total-steps", str(steps), "--seed", "1"]
    assert final_returns(tmp_path / "run", *flags)[0] >= 200
