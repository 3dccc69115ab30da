"""Whether today's code computes the same bits as an earlier commit's.

    python tests/golden/compare.py [COMMIT] [NAME ...]       by default the commit in BASE, and all runs of runs.py

Each run is trained with both, on this machine, in processes of their own; what the earlier commit gave is kept in the
temporary directory. Prints a line a run, and what differs; exits with 1 where something does.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

import jaxlib
import numpy as np
from runs import NAMES

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
# Quicker to compile; both sides are compiled so.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"


def checkout(commit, folder):
    """The files of `commit` in `folder`."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def trained(code, name, out):
    """The arrays of run `name` with the library in `code`, from the file `out` or into it; a text where it failed."""
    if out.exists():
        with np.load(out) as file:
            return dict(file)
    environment = {**os.environ, "PYTHONPATH": str(code), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    done = subprocess.run(
        [sys.executable, str(HERE / "runs.py"), name, str(out)], env=environment, capture_output=True, text=True
    )
    return done.stderr.strip()[-2_000:] if done.returncode else trained(code, name, out)


def differences(before, after):
    """What differs, a line each."""
    if isinstance(before, str) or isinstance(after, str):
        return [f"failed: {x}" for x in (before, after) if isinstance(x, str)]
    lines = [f"{name}: only before" for name in before.keys() - after.keys()]
    lines += [f"{name}: only now" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old.dtype != new.dtype or old.shape != new.shape or old.tobytes() != new.tobytes():
            where = f"{old.dtype}{list(old.shape)} and {new.dtype}{list(new.shape)}"
            lines.append(f"{name}: {where}, {np.sum(old != new) if old.shape == new.shape else 'all'} differ")
    return sorted(lines)


def main(arguments):
    """Compares, prints, and returns the exit code."""
    names = [word for word in arguments if word in NAMES] or list(NAMES)
    commits = [word for word in arguments if word not in NAMES] or [(HERE / "BASE").read_text().strip()]
    failed = 0
    recipe = hashlib.sha256(f"{commits[0]} {jaxlib.__version__} {(HERE / 'runs.py').read_text()}".encode()).hexdigest()
    kept = pathlib.Path(tempfile.gettempdir()) / f"jaxdqn-golden-{os.getuid()}-{recipe[:12]}"
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, concurrent.futures.ThreadPoolExecutor(2) as pool:
        folder = pathlib.Path(temporary)
        (base := folder / "base").mkdir()
        checkout(commits[0], base)

        def compared(name):
            before = trained(base, name, kept / f"{name}.npz")
            return name, differences(before, trained(ROOT, name, folder / f"{name}.npz"))

        for name, lines in pool.map(compared, names):
            print(
                f"{name}: {'same bits' if not lines else f'{len(lines)} differ'}", *lines[:8], sep="\n    ", flush=True
            )
            failed += bool(lines)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
