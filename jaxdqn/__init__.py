"""jaxdqn: parallel deep Q-learning in JAX, every way of running it over one set of pure functions."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Axes", "Config", "HParams", "Result", "Settings", "load", "preset", "register", "resume", "train"]

if TYPE_CHECKING:
    from jaxdqn.config import Config, HParams
    from jaxdqn.environments.registry import register
    from jaxdqn.parallel.axes import Axes
    from jaxdqn.presets import preset
    from jaxdqn.runs.experiment import resume, train
    from jaxdqn.runs.results import Result, load
    from jaxdqn.runs.settings import Settings

_HOME = {
    "Axes": "parallel.axes",
    "Config": "config",
    "HParams": "config",
    "preset": "presets",
    "register": "environments.registry",
    **dict.fromkeys(("Result", "load"), "runs.results"),
    **dict.fromkeys(("resume", "train"), "runs.experiment"),
    "Settings": "runs.settings",
}


def __getattr__(name: str) -> Any:
    # Late, so that `--help` and `import jaxdqn` do not wait for JAX.
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'jaxdqn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxdqn.{_HOME[name]}"), name)
