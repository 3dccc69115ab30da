"""YAML and JSON that others may have written, read in bounded time and memory.

A few kilobytes can stand for gigabytes (aliases of aliases), for minutes (an integer of a million digits) or for a
stack that overflows (brackets). So size, depth, nodes (aliases counted as what they stand for) and digits have bounds,
and a key may come once. Dates, base-60 numbers, sets and the like are no plain values: here they are text, or refused.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from jaxdqn.errors import UserError, shortened

MOST_BYTES = 64 * 2**20
MOST_NODES = 2_000_000
MOST_DEPTH = 100
MOST_DIGITS = 400  # a float64 has 309 before its point

_KEPT = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there


class _Loader(_Base):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in _KEPT]
        for first, pairs in _Base.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: make for tag, make in _Base.yaml_constructors.items() if tag in _KEPT or tag is None
    }


def _bounded(make: Callable[[yaml.SafeLoader, yaml.ScalarNode], object]) -> Callable[..., object]:
    def number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> object:
        text = loader.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise ValueError(f"a number of {len(text):,} digits; {MOST_DIGITS} is the most")
        return text if ":" in text else make(loader, node)

    return number


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _bounded(_Base.yaml_constructors[_tag]))


Fields = dict[str, Any]
"""Values by name, as a file, a table or a label has them: what each is, its reader has to know or to check."""


def read_yaml(path: pathlib.Path) -> Fields:
    """The mapping in a YAML file. Raises `UserError`, one line that names the file, for whatever is wrong with it."""
    return _read(path, parse_yaml)


def read_json(path: pathlib.Path) -> Fields:
    """The object in a JSON file. Raises `UserError` as `read_yaml` does."""
    return _read(path, parse_json)


def parse_yaml(text: str) -> object:
    """Plain values of YAML text. Raises ValueError."""
    try:
        _check_events(text)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, LookupError, TypeError) as error:  # a tag on what is none of its kind
        raise ValueError(" ".join(str(error).split())) from None


def parse_json(text: str) -> object:
    """Plain values of JSON text. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_text(values: object, indent: int | None = None) -> str:
    """`values` as JSON, which has no number for infinity (here the text "inf" or "-inf") nor for NaN (null)."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def with_infinities(values: object) -> Any:
    """What `json_text` was given, NaN aside, from what JSON made of it."""
    if isinstance(values, dict):
        return {name: with_infinities(value) for name, value in values.items()}
    if isinstance(values, list):
        return [with_infinities(value) for value in values]
    return float(values) if isinstance(values, str) and values in ("inf", "-inf") else values


def _finite(values: object) -> object:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None if math.isnan(values) else str(float(values))
    return values


def _read(path: pathlib.Path, parse: Callable[[str], object]) -> Fields:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError("it is no file but a device or a pipe")  # which may never end, or never begin
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES // 2**20} MiB")
        values = parse(data.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError("it does not hold {name: value}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path} cannot be read: {shortened(' '.join(reason.split()).rstrip('.'))}.") from None
    return values


class _Collection:
    """A list or mapping that has begun: its anchor, its nodes so far, and the keys of a mapping (None: a list)."""

    def __init__(self, event: yaml.CollectionStartEvent):
        self.anchor, self.size = event.anchor, 1
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
        self.key_is_next = True

    def add(self, event: yaml.Event, size: int) -> None:
        """Counts an item, whose last event is `event`."""
        self.size += size
        if self.keys is not None and self.key_is_next and isinstance(event, yaml.ScalarEvent):
            if event.value in self.keys and event.value != "<<":
                raise ValueError(f"the key {event.value!r} comes twice")
            self.keys.add(event.value)
        self.key_is_next = not self.key_is_next


def _check_events(text: str) -> None:
    """Raises ValueError where nodes, depth or aliases are out of bounds, or a key comes twice."""
    sizes: dict[str, int] = {}  # of what has an anchor, aliases in it counted as what they stand for
    begun: list[_Collection] = []
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            begun.append(_Collection(event))
            if len(begun) > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            done = begun.pop()
            anchor, size = done.anchor, done.size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands for nothing before it, or for itself")
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value) // 1_000
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if begun:
            begun[-1].add(event, size)
            if begun[-1].size > MOST_NODES:
                raise ValueError(f"it has more than {MOST_NODES:,} values, those that aliases stand for counted")


def _unique(pairs: list[tuple[str, object]]) -> Fields:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; {MOST_DIGITS} is the most")
    return int(digits)
