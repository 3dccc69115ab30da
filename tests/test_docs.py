"""The README and docs/: short enough, and every link, path and figure in them is true."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from cases import slow
from scripts import script

import jaxdqn
from jaxdqn import agents
from jaxdqn.environments import registry

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 200  # lines

# Where a page may mean a file that it names by the end of its path.
PLACES = ("jaxdqn", "tests", "experiments", "notebooks")
TO_BE_WRITTEN = {"jaxdqn/agents/mine.py"}  # by the reader

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
PATH = re.compile(r"(?<![\w/.<>~-])(?:jaxdqn|tests|experiments|docs|notebooks)/[\w./-]*")
FILE = re.compile(r"(?<![\w/.<>~-])(?:[\w.-]+/)*[\w-]+\.(?:py|ipynb)\b")
FIGURE = re.compile(r"\d+\.\d+ x|-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")

each = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors_of(page):
    """What a link may have after #: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(page, text):
    """The links to files and headings that are not there. Those to other sites are not looked at."""
    found = []
    for target, anchor in LINK.findall(text):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            found.append(f"{target}#{anchor}" if anchor else target)
    return found


def missing_paths(text):
    """The paths that are not there: whole ones from the root; Python files and notebooks by any end of their path."""
    whole = {path.rstrip(".") for path in PATH.findall(text)}
    parts = {name for name in FILE.findall(text) if name not in whole}
    found = [path for path in whole - TO_BE_WRITTEN if not (ROOT / path).exists()]
    ends = [f"/{path.relative_to(ROOT).as_posix()}" for place in PLACES for path in (ROOT / place).rglob("*.*")]
    return sorted(found + [name for name in parts if not any(path.endswith(f"/{name}") for path in ends)])


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= LONGEST_README


@each
def test_links_lead_somewhere(page):
    assert not missing_links(page, text_of(page))


@each
def test_paths_exist(page):
    assert not missing_paths(text_of(page))


@pytest.mark.parametrize(
    "text, missing",
    [
        ("`jaxdqn/training.py`, `jaxdqn/replay/` and tests/test_docs.py.", []),
        ("`training.py`, `replay/ring.py`, `train.py`, `test_docs.py`, `agents/<name>.py`", []),
        ("`jaxdqn/fleet.py` and `jaxdqn/nowhere/`", ["jaxdqn/fleet.py", "jaxdqn/nowhere/"]),
        ("`fleet.py`, `test_nothing.py`", ["fleet.py", "test_nothing.py"]),
        ("`ring.py`, `compiled/ring.py`", ["compiled/ring.py"]),
    ],
)
def test_what_counts_as_missing_paths(text, missing):
    assert missing_paths(text) == missing


def test_what_counts_as_missing_links():
    text = "[a](docs/runs.md#resume) [b](https://example.org/x) [c](docs/no.md) [d](docs/runs.md#no) ![e](no.png)"
    assert missing_links(README, text) == ["docs/no.md", "docs/runs.md#no", "no.png"]


def test_figures_in_the_readme_are_those_of_the_tables():
    tables = "".join(text_of(page) for page in PAGES if page != README)
    figures = FIGURE.findall(text_of(README))
    assert figures
    assert [figure for figure in figures if figure not in tables] == []


def test_the_table_of_benchmarks_is_that_of_the_results():
    spec = importlib.util.spec_from_file_location("table", ROOT / "experiments" / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = text_of(table.PAGE)
    assert table.markdown() == page.split(table.BEGIN)[1].split(table.END)[0].strip()


@pytest.mark.slow
def test_the_table_of_what_works_together_is_what_the_checks_say():
    compatibility = script("compatibility")
    assert compatibility.page() == text_of(compatibility.PAGE)


def code_of(page, words):
    """The only example of a page in which `words` are."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL) if words in code]
    return found


@pytest.mark.parametrize("noisy", [slow(False), True])
def test_the_agent_of_the_readme_is_one(noisy, monkeypatch):
    names = {}
    exec(code_of(README, "def expected_sarsa"), names)
    monkeypatch.setitem(agents.AGENTS, "expected_sarsa", names["EXPECTED_SARSA"])
    config = jaxdqn.Config(
        env="Catch-bsuite", agent="expected_sarsa", noisy=noisy, num_envs=4, batch_size=8, hidden_sizes=(4,),
        replay_capacity=80, learning_starts=16, total_steps=160, eval_episodes=1, final_episodes=1,
    )  # fmt: skip
    quiet = jaxdqn.Settings(progress=False, tensorboard=False, figure=False)
    result = jaxdqn.train(config, settings=quiet)
    assert result.metrics.updates.iloc[-1] > 0 and np.isfinite(result.metrics.loss.iloc[-1])
    sigmas = [leaf for path, leaf in jax.tree.leaves_with_path(result.params) if "sigma" in jax.tree_util.keystr(path)]
    assert bool(sigmas) == noisy and all(leaf.std() > 0 for leaf in sigmas)  # at first all are equal


def test_the_environment_of_the_docs_is_one(monkeypatch):
    trained = []
    monkeypatch.setattr(jaxdqn, "train", trained.append)
    exec(code_of(ROOT / "docs" / "environments.md", "def corridor"), {})
    environment, step = registry.make(trained[0].env), jax.jit(registry.make(trained[0].env).step)
    state, observation = environment.reset(jax.random.key(0))
    assert observation.tolist() == [True, *[False] * 7]
    for at in range(7):
        state, seen = step(jax.random.key(at), state, 1)
    assert (seen.reward, seen.discount, seen.episode_end) == (1, 0, True) and seen.observation[0]
    assert seen.final_observation[7]


def test_the_example_of_a_replay_alone_runs():
    names = {}
    exec(code_of(ROOT / "docs" / "replay.md", "buffer.sample"), names)
    assert names["errors"].shape == (32,) and names["batch"].return_m[0] == pytest.approx(1 + 0.99 + 0.99**2)
