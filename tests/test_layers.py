"""Who may import whom: a module imports `jaxdqn` modules of lower layers, and those of its own package."""

import ast
import pathlib

import pytest

import jaxdqn

ROOT = pathlib.Path(jaxdqn.__file__).parent

# A module or package directly under jaxdqn/ -> its layer. A new one gets its row here.
LAYERS = {
    "errors": 0,
    "files": 1,
    "config": 1,
    "masks": 1,
    "base": 2,
    "td": 3,
    "exploration": 3,
    "fingerprints": 3,
    "acting": 3,
    "environments": 3,
    "analysis": 2,  # reads the files of runs, not their code
    "networks": 4,
    "replay": 4,
    "learning": 4,
    "agents": 5,
    "evaluation": 5,
    "training": 5,
    "evaluation_on_host": 6,
    "timeline": 6,
    "components": 6,
    "presets": 7,
    "telemetry": 7,
    "validation": 7,
    "parallel": 8,
    "tabular": 9,
    "runs": 9,
    "sweeps": 10,
}

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
        elif LAYERS[name] >= own:
            lines.append(f"{importer} (layer {own}) imports {name} (layer {LAYERS[name]})")
    return lines


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_to_lower_layers(path):
    importer = unit(path)
    assert importer in LAYERS or not importer, (
        f"jaxdqn/{relative(path)}: {importer!r} has no layer; add it to LAYERS in tests/test_layers.py."
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
        ("base", "from jaxdqn.config import HParams", False),
        ("config", "from jaxdqn.base import Array", True),
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


def modules():
    """Every module, and the modules of ours that it imports when it is itself imported."""
    names = {
        ".".join(("jaxdqn", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    graph = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
        tree.body = [node for node in tree.body if id(node) not in late]
        found = imported_names(
            ast.Module(
                [n for n in ast.walk(tree) if id(n) not in late and isinstance(n, ast.Import | ast.ImportFrom)], []
            ),
            path,
        )
        graph[name] = {x if x in names else x.rpartition(".")[0] for x in found} & set(names) - {name}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    graph, done = modules(), set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
