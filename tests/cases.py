"""Which of a test's cases run by default: one or two of each kind. The others run with the slow tests."""

import pytest


def slow(*values, **named):
    """A case of these values that is a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow, **named)


def usual(cases, *chosen):
    """`cases`, a value or a tuple of values each, of which those that are not `chosen` are slow tests."""
    cases = list(cases)
    assert all(case in cases for case in chosen), chosen
    values = lambda case: case if isinstance(case, tuple) else (case,)  # noqa: E731
    return [pytest.param(*values(case)) if case in chosen else slow(*values(case)) for case in cases]
