"""The notebooks: each runs from a clean kernel, and what is committed of it is complete, tidy and was run in order."""

import ast
import os
import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"04_compare_agents"}  # reads results and trains nothing
LONGEST = 12  # lines of a function: notebooks call the library
ABSOLUTE = re.compile(r"(?<![\w.~])/(home|root|tmp|work|opt|usr|var|private|mnt|Users)/|\b[A-Z]:\\")
LIMIT_SECONDS = 900
IGNORED = {"__pycache__", "build", "dist", "runs"}

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_of(notebook) for output in cell.outputs]


def images_of(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def texts_of(notebook):
    """All that is not an image: sources, and outputs in each of their forms."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs_of(notebook):
        yield output.get("text", "")
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def files_in_repository():
    """Every file, but for those that git and the tools of the tests keep for themselves."""
    found = set()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in IGNORED and not name.startswith(".")]
        folders[:] = [name for name in folders if not name.endswith(".egg-info")]
        found |= {os.path.join(folder, name) for name in names}
    return found


def python_of(cell):
    """A code cell without the lines that only IPython understands."""
    return "\n".join(line for line in cell.source.split("\n") if not line.startswith(("%", "!")))


def test_there_are_notebooks():
    assert len(FILES) >= 4


@each
def test_a_committed_notebook_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_of(read(path))]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_a_committed_notebook_has_figures_and_no_errors(path):
    notebook = read(path)
    assert images_of(notebook) >= 4
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert not [text for text in texts_of(notebook) if "Traceback" in text]
    assert path.stat().st_size < 1_000_000


@each
def test_what_a_committed_notebook_prints_is_what_its_code_says(path):
    """The words around the numbers of each f-string: outputs of an earlier text do not have them."""
    for cell in code_of(read(path)):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        calls = [node for node in ast.walk(ast.parse(python_of(cell))) if isinstance(node, ast.Call)]
        prints = [call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        for text in (arg for args in prints for arg in args if isinstance(arg, ast.JoinedStr)):
            words = [part.value for part in text.values if isinstance(part, ast.Constant)]
            assert all(word in printed for word in words), (words, printed)


@each
def test_a_committed_notebook_says_nothing_of_the_machine_it_ran_on(path):
    notebook = read(path)
    assert not [text for text in texts_of(notebook) if ABSOLUTE.search(text)]
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize(
    "text, absolute",
    [
        ("saved /tmp/x/run", True),
        ("see /home/someone/runs", True),
        ("../experiments/results", False),
        ("runs/tmp/a", False),
        ("C:\\Users", True),
    ],
)
def test_absolute_paths_are_recognised(text, absolute):
    assert bool(ABSOLUTE.search(text)) == absolute


@each
def test_a_notebook_defines_only_small_glue(path):
    nodes = [node for cell in code_of(read(path)) for node in ast.walk(ast.parse(python_of(cell)))]
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= LONGEST]


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Nothing of this user's: settings and temporary files are in a folder of the test; programs are kept with those
    of other tests."""
    for name in ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JAXDQN_CACHE", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAXDQN_QUICK", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in FILES],
)
def test_a_notebook_runs_from_a_clean_kernel_and_leaves_the_repository_alone(path, clean):
    committed, notebook, before = read(path), read(path), files_in_repository()
    for cell in code_of(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=LIMIT_SECONDS, kernel_name="python3", resources=where).execute()
    assert images_of(notebook) == images_of(committed)
    assert files_in_repository() == before
