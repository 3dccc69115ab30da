"""What a person reads while something runs: plain lines, where there is no terminal."""

import pytest

from jaxdqn.runs import progress


@pytest.fixture
def lines(monkeypatch, capsys):
    """show(shown, [(seconds, steps, value)]) -> the lines, all of them printed."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(progress, "PLAIN_EVERY", -1.0)

    def show(shown, points):
        for clock[0], steps, value in points:
            shown.update(steps, value)
        return capsys.readouterr().err.splitlines()

    return show


def test_rate_and_time_left(lines):
    shown = lines(progress.Progress(1_000, "dqn"), [(1.0, 100, 9.0), (3.0, 300, 20.0), (10.0, 1_000, 500.0)])
    assert shown[1] == "dqn  300/1,000 steps  100/s  return 20.0  7 s left"
    assert shown[2] == "dqn  1,000/1,000 steps  100/s  return 500.0"


def test_parts_count_together(lines):
    points = [(0.0, 0, 9.0), (10.0, 1_000, 9.0), (12.0, 200, 9.0), (20.0, 1_000, 9.0), (30.0, 1_000, 9.0)]
    shown = lines(progress.Progress(1_000, "dqn", parts=2), points[:4])
    assert shown[2] == "dqn  2 of 2: 200/1,000 steps  100/s  return 9.0  8 s left"
    assert shown[3] == "dqn  2 of 2: 1,000/1,000 steps  100/s  return 9.0"


def test_none_where_it_is_off(lines):
    assert lines(progress.Progress(10, "dqn", enabled=False), [(1.0, 5, 1.0)]) == []
