"""The suites of environments, listed so that they can be shown and checked without importing one of them, or JAX."""

import importlib.util
from typing import NamedTuple

from jaxdqn.environments import names
from jaxdqn.errors import UserError, unknown_name


class Suite(NamedTuple):
    """What one package brings.

    title: what people call it; extra: what `pip install` is asked for ("" where it comes with jaxdqn); modules: without
    which it is not installed; adapter: where make(name, env_params, env_kwargs) is, which gives an `Environment`;
    names: as `--env` takes them, all but gymnax's with a prefix, as in octax/brix; prefix: with which any other name is
    the suite's, too ("" where there are no others); on_host: whether its environments run outside of JAX.
    """

    title: str
    extra: str
    modules: tuple[str, ...]
    adapter: str
    names: tuple[str, ...]
    prefix: str = ""
    on_host: bool = False

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in self.modules)

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f'pip install -e ".[{self.extra}]"'


def _prefixed(prefix: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for name in suffixes)


HERE = "jaxdqn.environments"
GYMNAX = Suite("gymnax", "", ("gymnax",), f"{HERE}.gymnax_adapter", names.GYMNAX)
# octax imports OpenCV for its pictures, and does not require it.
OCTAX = Suite("octax", "octax", ("octax", "cv2"), f"{HERE}.octax_adapter", _prefixed("octax", names.OCTAX))
XMINIGRID = Suite(
    "XLand-MiniGrid", "xminigrid", ("xminigrid",), f"{HERE}.xminigrid_adapter", _prefixed("xminigrid", names.XMINIGRID)
)
PGX = Suite("pgx", "pgx", ("pgx",), f"{HERE}.pgx_adapter", _prefixed("pgx", names.PGX))
CRAFTAX = Suite("Craftax", "craftax", ("craftax",), f"{HERE}.craftax_adapter", _prefixed("craftax", names.CRAFTAX))
GYMNASIUM = Suite(
    "Gymnasium",
    "",
    ("gymnasium",),
    f"{HERE}.gymnasium_adapter",
    _prefixed("gymnasium", names.GYMNASIUM),
    prefix="gymnasium/",
    on_host=True,
)
ALE = Suite("ALE", "atari", ("ale_py",), f"{HERE}.ale_adapter", _prefixed("ALE", names.ATARI), on_host=True)
SUITES = (GYMNAX, OCTAX, XMINIGRID, PGX, CRAFTAX, GYMNASIUM, ALE)
NAMES = tuple(name for suite in SUITES for name in suite.names)


def of(name: str) -> Suite | None:
    """The suite that has an environment of this name; None where none has."""
    others = (suite for suite in SUITES if suite.prefix and name.startswith(suite.prefix))
    return next((suite for suite in SUITES if name in suite.names), None) or next(others, None)


def find(name: str) -> Suite:
    """The suite that has an environment of this name. Raises `UserError` where none has, or it is not installed."""
    suite = of(name)
    if suite is None:
        raise unknown_name("environment", name, NAMES, "`python experiments/list.py` shows all.")
    if not suite.installed:
        raise UserError(f"environment {name!r} is {suite.title}'s, which is not installed: {suite.install}")
    return suite
