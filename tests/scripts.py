"""The scripts of experiments/ as modules."""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent


def script(name):
    """experiments/NAME.py, loaded anew."""
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
