"""What a run must say about where it came from."""

import importlib.metadata
import pathlib
import platform
import subprocess

import jax

from jaxdqn.files.documents import Fields

PACKAGES = ("jaxdqn", "jax", "jaxlib", "flax", "optax", "gymnax", "chex", "orbax-checkpoint", "numpy")


def provenance(devices: list[jax.Device]) -> Fields:
    """Package versions, commit and device, for config.yaml and summary.json."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    }


def commit() -> str | None:
    """The commit of the source tree this package runs from, with "+" if it has changes; None where that is no
    repository of its own: an installed package lies in somebody else's."""
    root = pathlib.Path(__file__).resolve().parents[2]
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        if not (root / "pyproject.toml").is_file() or not root.samefile(run("rev-parse", "--show-toplevel")):
            return None
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
