"""Who may import whom: a module imports `jaxdqn` modules of lower layers, and those of its own package."""

import ast
import pathlib

import pytest

import jaxdqn

ROOT = pathlib.Path(jaxdqn.__file__).parent

# A module or package directly under jaxdqn/ -> its layer. A new one gets its row here.
LAYERS = {
    "base": 0,
    "errors": 0,
    "files": 0,
    "td": 0,
    "exploration": 0,
    "config": 1,
    "environments": 1,
    "networks": 1,
    "fingerprints": 1,
    "replay": 1,
    "analysis": 1,  # reads the files of runs, not their code
    "acting": 2,
    "learning": 2,
    "presets": 2,
    "agents": 3,
    "evaluation": 4,
    "training": 4,
    "parallel": 5,
    "tabular": 6,
    "runs": 6,
    "sweeps": 7,
}
FOUNDATION = {"base", "errors"}  # the vocabulary: also for their own layer; they themselves import nothing of ours

# A library -> the only places that may import it.
ONLY_IN = {"gymnax": "environments/", "flax.linen": "networks.py", "flax.nnx": "networks.py"}

FILES = sorted(ROOT.rglob("*.py"))


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit(path: pathlib.Path) -> str:
    """The module or package directly under jaxdqn/ that a file belongs to; "" for jaxdqn/__init__.py."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_names(tree: ast.AST, path: pathlib.Path) -> list[str]:
    """Full dotted names, `from x import y` as x.y."""
    names = []
    package = ["jaxdqn", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def our_units(names: list[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("jaxdqn.") and not name.endswith(".__version__")}


def violations(importer: str, imported: set[str]) -> list[str]:
    """One line per import that the table forbids; `importer` "" is the package itself, above all layers."""
    own = max(LAYERS.values()) + 1 if not importer else LAYERS[importer]
    lines = []
    for name in sorted(imported - {importer}):
        if name not in LAYERS:
            lines.append(f"{importer} imports {name}, which has no row in LAYERS of tests/test_layers.py")
        elif importer in FOUNDATION or (LAYERS[name] >= own and name not in FOUNDATION):
            lines.append(f"{importer} (layer {own}) imports {name} (layer {LAYERS[name]})")
    return lines


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_to_lower_layers(path):
    importer = unit(path)
    assert importer in LAYERS or not importer, (
        f"jaxdqn/{relative(path)}: {importer!r} has no layer; add it to LAYERS in tests/test_layers.py, and to the "
        "table of layers in the documentation."
    )
    found = violations(importer, our_units(imported_names(ast.parse(path.read_text()), path)))
    assert not found, f"jaxdqn/{relative(path)}: {'; '.join(found)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_are_imported_where_they_belong(path):
    names = imported_names(ast.parse(path.read_text()), path)
    for library, place in ONLY_IN.items():
        if not relative(path).startswith(place):
            assert not [name for name in names if f"{name}.".startswith(f"{library}.")], f"{library} outside {place}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_pmap_is_in_one_file(path):
    if relative(path) != "parallel/compiled/devices.py":
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not [n.lineno for n in nodes if getattr(n, "attr", getattr(n, "id", getattr(n, "name", ""))) == "pmap"]


@pytest.mark.parametrize(
    "importer, source, forbidden",
    [
        ("td", "from jaxdqn.base import Array", False),
        ("td", "from jaxdqn import exploration", True),
        ("base", "from jaxdqn.errors import UserError", True),
        ("networks", "import jaxdqn.learning", True),
        ("agents", "from jaxdqn.agents.dqn import dqn", False),
        ("agents", "from jaxdqn import learning, td", False),
        ("agents", "def f():\n    from jaxdqn import training", True),
        ("replay", "from . import ring", False),
        ("replay", "from .. import training", True),
        ("training", "from jaxdqn.nowhere import x", True),
    ],
)
def test_the_rule_itself(importer, source, forbidden):
    path = ROOT / importer / "x.py" if (ROOT / importer).is_dir() else ROOT / f"{importer}.py"
    assert bool(violations(importer, our_units(imported_names(ast.parse(source), path)))) == forbidden
