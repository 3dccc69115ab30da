"""YAML and JSON of strangers: plain values come back as they were written, and junk ends in one line, soon."""

import json
import math
import os
import pathlib
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdqn.errors import UserError
from jaxdqn.files import documents

FINITE = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**300), 10**300), st.floats(allow_nan=False), st.text(max_size=20)
)
PLAIN = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        FINITE, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=5), inner)), max_leaves=10
    ),
)


@given(PLAIN)
def test_plain_values_come_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("plain") / "values"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert documents.read_yaml(path) == values
    path.write_text(json.dumps(values), encoding="utf-8")
    assert documents.read_json(path) == values


def test_what_aliases_and_merges_stand_for():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: [*a, *a]"
    one = {"x": 1, "y": 2}
    assert documents.parse_yaml(text) == {"a": one, "b": one, "c": {"x": 1, "y": 3}, "d": [one, one]}


@pytest.mark.parametrize(
    "text", ["2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "190:20:30", "1:30.5", "="]
)
def test_dates_and_base_60_are_text(text):
    assert documents.parse_yaml(f"a: {text}") == {"a": text}


JUNK = {
    "not closed": "a: [1, 2",
    "two documents": "a: 1\n---\na: 2",
    "a control character": "a: \x00",
    "a python object": "a: !!python/object/apply:os.system [ls]",
    "a binary": "a: !!binary aGk=",
    "a set": "a: !!set {x, y}",
    "an integer of text": "a: !!int b",
    "an integer of nothing": "a: !!int ''",
    "an integer of a list": "a: !!int [1]",
    "a truth of text": "a: !!bool maybe",
    "a date that is forced": "a: !!timestamp 2020-13-45",
    "a list as key": "{[1, 2]: 3}",
    "a mapping as key": "{{a: 1}: 3}",
    "a key twice": "{a: 1, 'a': 2}",
    "an unknown alias": "a: *b",
    "itself": "&a {a: *a}",
    "itself, merged": "&a {<<: *a}",
    "deep": "a: " + "[" * 20_000 + "]" * 20_000,
    "deep in blocks": "".join(" " * depth + "a:\n" for depth in range(2_000)),
    "many digits": f"a: {'9' * 5_000}",
    "many bits": f"a: 0b{'1' * 5_000}",
    "many digits after a point": f"a: 0.{'9' * 1_000_000}",
    "base 60": "a: " + ":".join(["59"] * 300_000),
    "many values": "a: [" + "1," * 11_000 + "]",
    "many merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9)),
    "long texts, many times": f"a: &a {'x' * 10**6}\nb: &b [{', '.join(['*a'] * 1000)}]\nc: [{', '.join(['*b'] * 10)}]",
}  # fmt: skip


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_one_line_and_soon(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "MOST_NODES", 10_000)
    path = tmp_path / "a.yaml"
    path.write_text(JUNK[name])
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        documents.read_yaml(path)
    assert time.perf_counter() - began < 5.0
    line = str(caught.value)
    assert line.startswith(f"{path} cannot be read: ") and "\n" not in line and len(line) < 1_000


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text("[]{}&*a:,-!<>'\"|0 \n\t#?%@"), st.binary()))
def test_anything_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for read in (documents.read_yaml, documents.read_json):
        try:
            assert isinstance(read(path), dict)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


@pytest.mark.parametrize(
    "text, part",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5_000 + "}", "5,000 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ("[1]", "does not hold"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_broken_json_is_one_line(tmp_path, text, part):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=part):
        documents.read_json(tmp_path / "a.json")


def test_a_file_that_is_missing_a_folder_or_too_long(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        documents.read_yaml(tmp_path / "nowhere")
    with pytest.raises(UserError, match="Is a directory"):
        documents.read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", pathlib.Path("/dev/zero")):
        with pytest.raises(UserError, match="a device or a pipe"):
            documents.read_yaml(path)
    (tmp_path / "long").write_text("a: 12345")
    monkeypatch.setattr(documents, "MOST_BYTES", 7)
    with pytest.raises(UserError, match="longer than"):
        documents.read_yaml(tmp_path / "long")


def test_json_of_older_runs_may_hold_infinity(tmp_path):
    (tmp_path / "a.json").write_text('{"a": Infinity}')
    assert documents.read_json(tmp_path / "a.json") == {"a": math.inf}
