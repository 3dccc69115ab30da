"""Paths: whatever a directory is called, a run in it trains, resumes and is read, or is refused before it trains.

Text is UTF-8 in every file that we write or read, and only regular files are replaced.
"""

import ast
import os
import pathlib
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scripts import script

import jaxdqn
from jaxdqn.analysis import loading
from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.runs import checkpoints, cli, directory, experiment, metrics, rendering, reporting, tensorboard
from jaxdqn.runs.settings import Settings
from jaxdqn.sweeps import samplers
from jaxdqn.sweeps.space import parse as parse_space
from jaxdqn.sweeps.sweep import Sampler

ROOT = pathlib.Path(jaxdqn.__file__).parents[1]
TINY = Config(
    env="Catch-bsuite", num_envs=4, batch_size=8, hidden_sizes=(4,), replay_capacity=80, learning_starts=16,
    total_steps=80, log_interval=40, eval_interval=80, eval_episodes=1,
)  # fmt: skip
QUIET = Settings(progress=False, tensorboard=False, figure=False)

NAMES = [
    "lr[1e-3]",
    "[a-z]",
    "[",
    "]",
    "[!a]",
    "a*b",
    "**",
    "a?b",
    "{a,b}",
    "a b",
    " a ",
    "a\tb",
    "a\nb",
    "it's",
    'say "no"',
    "back\\slash",
    "-x",
    "--out",
    "größe",
    "日本語",
    "e\u0301",
    "\N{PILE OF POO}",
    "a#b",
    "a%20b",
    "50%",
    "a&b",
    "a:b",
    "a=b",
    "a;b",
    "a|b",
    "a$b",
    "${HOME}",
    "$(true)",
    "`true`",
    "~",
    "~root",
    "a~",
    "...",
    "s3:",
    "gs:",
    "sqlite:",
    "1e3",
    "0x10",
    "null",
    "true",
    "None",
    "@file",
    "x" * 255,
    "/".join(["long" * 50] * 12),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "run"
    return experiment.train(TINY, out=path, num_devices=1, settings=QUIET)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_run_in_a_directory_of_any_name_can_be_written_and_read(trained, tmp_path, monkeypatch, name):
    """Relative to the working directory: libraries read patterns, URLs and home directories into it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.path, tmp_path / name)
    path = pathlib.Path(name)
    spec, _ = directory.load(path)
    assert spec.config == trained.config
    assert metrics.read(path / "metrics.parquet").equals(trained.metrics)
    (found, warnings) = checkpoints.newest(path / "checkpoints")
    assert found is not None and warnings == []
    with directory.RunDirectory(path) as run:
        checkpoints.save(path / "checkpoints", {"a": np.arange(3)}, {**found.meta, "iteration": 30}, keep=2)
        again, _ = checkpoints.newest(path / "checkpoints")
        assert again is not None and list(again.arrays["a"]) == [0, 1, 2]
        shutil.rmtree(path / "checkpoints" / "0000-000000000030")
        run.write_summary({"status": "finished"})
    assert directory.status(path) == "finished"
    events = tensorboard.Events(path / "tensorboard", [[tensorboard.Curve("member-0000", [0], np.mean)]])
    events.write(0, 1, {"loss": np.ones(1)})
    events.cut({0: 1})
    assert len(os.listdir(path / "tensorboard" / "member-0000")) == 1
    shutil.rmtree(path / "tensorboard")
    reporting.save_figure(Figure((1, 1)), path / "curves.png")
    rendering.save_gif((tmp_path / name / "policy.gif"), np.zeros((1, 4, 4, 3), np.uint8))
    assert len(loading.load(tmp_path / name)) == len(trained.metrics)
    loaded = jaxdqn.load(tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    assert sorted(os.listdir(tmp_path)) == [name.split("/")[0]]


@pytest.mark.parametrize("name", ["lr[1e-3]", "back\\slash", "a?b#c%d&e=f g"])
def test_a_run_in_an_odd_directory_trains_and_resumes(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    half = experiment.train(TINY, out=name, num_devices=1, settings=QUIET._replace(max_seconds=0.0))
    assert half.summary["status"] == "out of time"
    whole = experiment.resume(name, settings=QUIET)
    assert whole.summary["status"] == "finished"
    jax.tree.map(np.testing.assert_array_equal, whole.params, trained.params)
    assert len(whole.evaluate(episodes=1).returns) == 1


@pytest.mark.parametrize("name", ["?a=b", "a%23#c", "a b&"])
def test_an_sqlite_storage_in_an_odd_directory_is_that_file(tmp_path, name):
    (tmp_path / name).mkdir()
    space = parse_space({"gamma": {"low": 0.5, "high": 0.9}})
    sampler = Sampler("tpe", 1, 0, 8, "sqlite:///trials?.db")
    samplers.store(space, sampler, "study", [({"gamma": 0.6}, 1.0)], str(tmp_path / name))
    assert os.listdir(tmp_path / name) == ["trials?.db"]


def refused_before(root, train, match):
    """`train` is refused with one line that matches, and leaves `root` as it was."""
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        train()
    assert "\n" not in str(caught.value)
    assert sorted(root.rglob("*")) == before


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


REFUSED = {
    "file": "File exists",
    "file/run": "Not a directory",
    "full": "not empty",
    "pipe": "File exists",
    "/dev/null": "File exists",
    "dangling": "File exists",
    "loop": "File exists|Too many levels",
    "new/" + "x" * 256: "File name too long",
    "/".join(["long" * 50] * 25): "at most 3800",
    "a\0b": "null character",
    "a\udcffb": "not UTF-8",
    "~nobody-of-that-name/run": "no home directory is known",
}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name)[:30])
def test_what_cannot_be_a_run_directory_is_refused_and_nothing_is_left(odd, name):
    # `~` means a home directory only where a path begins with it.
    path = name if name.startswith("~") else odd / name
    refused_before(odd, lambda: experiment.train(TINY, out=path, num_devices=1, settings=QUIET), REFUSED[name])
    assert (odd / "file").read_text() == "precious"


def test_a_directory_by_another_way_is_the_same_one(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.path, tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("run/", "./run", "run/.", "run/../run", "link", "link/", "~/run", "~/link/../run"):
        assert len(jaxdqn.load(path).metrics) == len(trained.metrics)
        with pytest.raises(UserError, match="already holds a run"):
            experiment.train(TINY, out=path, num_devices=1, settings=QUIET)
    assert sorted(os.listdir(tmp_path)) == ["link", "run"]


def test_a_start_that_fails_leaves_no_directory(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("jaxdqn.parallel.schemes.build", fail)
    with pytest.raises(RuntimeError):
        experiment.train(TINY, out=tmp_path / "new" / "run", num_devices=1, settings=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_default_directories_of_one_second_are_two(tmp_path):
    with paths.fresh(tmp_path / "runs" / "x") as first, paths.fresh(tmp_path / "runs" / "x") as second:
        (second / "config.yaml").write_text("")
    assert (first.name, second.name) == ("x", "x-2")
    assert os.listdir(tmp_path / "runs") == ["x-2"]
    with paths.fresh(tmp_path / "sweeps" / "y"):
        pass
    assert os.listdir(tmp_path) == ["runs"]  # nothing was kept


# -- what a path is on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, out",
    [
        (["--out", "1e3"], "1e3"),
        (["--out=5e5"], "5e5"),
        (["--out", "None"], "None"),
        (["--out=None"], "None"),
        (["--out", "0x10"], "0x10"),
        (["--out", "true"], "true"),
        (["--out=-x"], "-x"),
        (["--out", "a=b"], "a=b"),
        (["--out", "~/a"], "/home/me/a"),
    ],
)
def test_a_path_is_taken_as_it_stands(monkeypatch, arguments, out):
    monkeypatch.setenv("HOME", "/home/me")
    train = script("train")
    args, _ = train.parse(arguments)
    assert args.out == pathlib.Path(out)
    assert train.parse(["--num-seeds", "1e3"])[0].num_seeds == train.parse(["--num-seeds=1e3"])[0].num_seeds == 1000
    assert train.parse(["--hidden-sizes", "1e1", "2e1", "--env", "1e3"])[0].config.hidden_sizes == (10, 20)
    evaluate = script("evaluate")
    args = cli.parse(evaluate.Args, ["--episodes", "1e1", "1e3"], evaluate.Args(), "")
    assert args.run == pathlib.Path("1e3") and args.episodes == 10


# -- files ------------------------------------------------------------------------------------------------------------


def test_only_a_regular_file_is_replaced_and_a_link_followed_only_where_a_person_gave_it(odd):
    paths.write_text(odd / "file", "new")
    (odd / "link").symlink_to("file")
    paths.write_text(paths.followed(odd / "link"), "newer")
    assert (odd / "link").is_symlink() and (odd / "file").read_text() == "newer"
    paths.write_text(paths.followed(odd / "dangling"), "made")
    assert (odd / "dangling").is_symlink() and (odd / "nowhere").read_text() == "made"
    paths.write_text(odd / "link", "newest")  # a stranger's directory may have links to what is ours
    assert not (odd / "link").is_symlink() and (odd / "file").read_text() == "newer"
    for name in ("pipe", "full", "/dev/null", "/dev/stdout", "/proc/self/fd/1"):
        refused_before(odd, lambda name=name: paths.write_text(odd / name, "x"), "cannot write .*Give the name of a")
        refused_before(odd, lambda name=name: paths.check_file(odd / name), "cannot write .*Give the name of a")
        refused_before(
            odd, lambda name=name: rendering.save_gif(odd / name, np.zeros((1, 2, 2, 3), np.uint8)), "cannot"
        )
    assert pathlib.Path("/dev/null").is_char_device() and (odd / "pipe").is_fifo()
    refused_before(odd, lambda: paths.check_file(odd / "no" / "x"), "is no directory")
    refused_before(odd, lambda: paths.check_file(odd / "file" / "x"), "is no directory")
    long = odd / ("x" * 251 + ".gif")
    paths.write_text(long, "")
    assert long.is_file()


def test_every_text_file_is_utf_8():
    """Whatever the locale is: each call that opens text says so."""
    places = [*(ROOT / "jaxdqn").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    wrong = []
    for path in places:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {k.arg for k in node.keywords}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 100 and wrong == []


def opens_text(node):
    """Whether a call opens, reads or writes a file of text."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    owner = getattr(getattr(node.func, "value", None), "id", "")
    if name in ("read_text", "write_text"):
        return not (name == "write_text" and owner in ("", "paths") and isinstance(node.func, ast.Name))
    if name not in ("open", "NamedTemporaryFile", "fdopen") or owner in ("os", "Image", "tarfile"):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    modes = [arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return not any("b" in mode for mode in modes if set(mode) <= set("rwxab+t"))


@pytest.mark.parametrize(
    "source, found",
    [
        ("open('x')", True),
        ("open('x', 'rb')", False),
        ("p.open()", True),
        ("p.open('wb')", False),
        ("p.read_text()", True),
        ("p.write_text(t)", True),
        ("os.open('x', 1)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_the_rule_of_encodings_itself(source, found):
    assert opens_text(ast.parse(source).body[0].value) == found


def test_what_a_locale_cannot_spell_is_written_all_the_same(tmp_path):
    paths.write_text(tmp_path / "x", "größe \udcff")
    assert (tmp_path / "x").read_bytes() == "größe \\udcff".encode()


# -- what processes that were killed leave ----------------------------------------------------------------------------


def test_half_written_files_go_with_the_next_session(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    for name in (".writing-a.yaml", "metrics.parquet/.writing-b.parquet", "metrics.parquet/.part-0000-1x.parquet"):
        (tmp_path / "run" / name).write_text("half")
    (tmp_path / "run" / ".mine").write_text("precious")
    with directory.RunDirectory(tmp_path / "run"):
        pass
    assert [path.name for path in sorted((tmp_path / "run").rglob(".*")) if path.name != ".lock"] == [".mine"]
    assert metrics.read(tmp_path / "run" / "metrics.parquet").equals(trained.metrics)
    assert isinstance(trained.metrics, pd.DataFrame)


def test_the_folder_of_a_suites_environment_is_one():
    assert paths.flat("octax/brix") == "octax-brix" and paths.flat("CartPole-v1") == "CartPole-v1"
