"""That it learns: whole runs of the presets through train.py, on reported (not sweep) seeds. Minutes each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def final_returns(out: Path, *flags: str) -> list[float]:
    """`final_return` per member of a run of train.py."""
    command = [sys.executable, "experiments/train.py", "--out", str(out), "--quiet", *flags]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
    return json.loads((out / "summary.json").read_text())["final_return_per_member"]


@pytest.mark.slow
def test_cartpole_is_solved_by_ten_seeds(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "CartPole-v1", "--num-seeds", "10", "--total-steps", "500000")
    # Reported: 480.5, 95 % interval [442.9, 500]. Another CPU rounds differently and so trains other agents: the bound
    # is within the interval, or chance would fail it. The bounds are 475 and, for the lowest seed, 400: the
    # lowest of the reported ten is 312 (it forgets late), which is not good enough yet and is said in the README.
    assert sum(returns) / 10 >= 450


@pytest.mark.slow
def test_acrobot(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "Acrobot-v1", "--num-seeds", "4")
    assert sum(returns) / 4 >= -95


@pytest.mark.slow
def test_catch_is_perfect_within_100k_steps(tmp_path):
    returns = final_returns(tmp_path / "run", "--env", "Catch-bsuite", "--num-seeds", "4", "--total-steps", "100000")
    assert returns == [1.0] * 4


@pytest.mark.slow
def test_breakout_within_300k_steps(tmp_path):
    returns = final_returns(
        tmp_path / "run", "--env", "Breakout-MinAtar", "--num-seeds", "2", "--total-steps", "300000"
    )
    assert sum(returns) / 2 >= 5
