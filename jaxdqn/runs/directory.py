"""One run's directory: who may write it, and its configuration."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import filelock
import yaml

from jaxdqn import agents
from jaxdqn.config import UINT32_MAX, Config, HParams, check_whole, from_dict, members, to_dict, values_of, with_values
from jaxdqn.errors import UserError, shown
from jaxdqn.files import documents, paths
from jaxdqn.files.paths import write_text
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.runs.settings import UNFINISHED
from jaxdqn.validation import validate

LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Where a run's members come from, that do not begin at the beginning: the run in `run`, which has finished.

    config.yaml has it relative to its own directory, so that both can be moved together.

    Member m goes on with all that states[m] was there (environments, replay, keys), but for its learner, which is that
    of learners[m].
    """

    run: str
    states: tuple[int, ...]
    learners: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """All that determines a run's result: what config.yaml holds.

    vary: settings of hparams; labels: columns of the metrics for each member; least_lanes: a device has dead lanes
    where it would have fewer, so that members vmapped together go on in a program of the same width.
    """

    config: Config
    hparams: HParams
    seeds: tuple[int, ...]
    vary: tuple[dict[str, float], ...]
    num_devices: int
    devices_per_agent: int
    members_per_batch: int
    axes: Axes = dataclasses.field(default_factory=Axes)
    labels: tuple[documents.Fields, ...] = ()
    continues: Continuation | None = None
    least_lanes: int = 1

    @property
    def batches(self) -> list[range]:
        """The members that train together, batch after batch."""
        count, size = len(self.vary) * len(self.seeds), self.members_per_batch
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def to_dict(self) -> documents.Fields:
        """Plain types, for YAML."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "config": to_dict(self.config),
            "axes": self.axes.to_dict(),
            "vary": list(self.vary),
            "labels": list(self.labels),
            "continues": self.continues
            and {"run": self.continues.run, **{k: list(getattr(self.continues, k)) for k in ("states", "learners")}},
            "hparams": {name: float(value) for name, value in values_of(self.hparams).items()},
            "seeds": list(self.seeds),
        }

    @classmethod
    def from_dict(cls, values: documents.Fields) -> "RunSpec":
        """The inverse of `to_dict`. Raises `UserError` for unknown or missing fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise UserError(f"it lacks {', '.join(missing)}.")
        for name in names:
            if not _fits(values[name], _PLAIN[name]):
                raise UserError(f"{name} is {shown(values[name])}; that is none.")
        config = from_dict(agents.known_here(values["config"].get("agent", Config.agent), values["config"]))
        given = agents.known_here(config.agent, values["hparams"])
        config = agents.config_for(config.agent, config)  # once, what had no effect could be set
        config, hparams = agents.complete(config, with_values(HParams(), given))
        origin = values["continues"]
        if origin is not None:
            if not _fits(origin, {"run": str, "states": [int], "learners": [int]}):
                raise UserError(f"continues is {shown(origin)}; that is none.")
            origin = Continuation(origin["run"], tuple(origin["states"]), tuple(origin["learners"]))
        spec = cls(
            **{
                **{name: values[name] for name in names},
                "config": config,
                "hparams": hparams,
                "seeds": tuple(values["seeds"]),
                "axes": schemes.of_saved(values["axes"]),
                "vary": tuple(values["vary"]),
                "labels": tuple(values["labels"]),
                "continues": origin,
            }
        )
        spec.check()
        return spec

    def check(self) -> None:
        """Raises `UserError` for what `to_dict` of a run never holds."""
        for name in ("num_devices", "devices_per_agent", "members_per_batch", "least_lanes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        validate(self.config, self.devices_per_agent)
        schemes.validate(self.axes)
        count = len(members(self.hparams, self.seeds, self.vary, self.config.epsilon_schedule))
        if self.labels and len(self.labels) != count:
            raise UserError(f"labels are of {len(self.labels)} members; there are {count}.")
        for label in self.labels:
            check_whole("the seed of a label", label.get("seed", 0), 0, UINT32_MAX)
        origin = self.continues
        if origin is not None and not len(origin.states) == len(origin.learners) == count:
            raise UserError(f"continues names {len(origin.states)} members; there are {count}.")


# What the fields of a spec are in YAML: a type, [the type of the items], or {name: type}.
_PLAIN: dict[str, object] = {
    "config": dict,
    "hparams": dict,
    "seeds": [int],
    "vary": [dict],
    "num_devices": int,
    "devices_per_agent": int,
    "members_per_batch": int,
    "axes": dict,
    "labels": [dict],
    "continues": object,
    "least_lanes": int,
}


def _fits(value: object, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], kind[name]) for name in kind)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


class RunDirectory:
    """A locked run directory. Use as a context manager; the lock goes with the process at the latest.

    Where nothing came to be in it, the lock goes, and so do the directories that were `made` for it.
    """

    def __init__(self, path: pathlib.Path, made: Sequence[pathlib.Path] = ()):
        self.path, self._made = path, made
        self._before: set[str] = set()
        self._lock = filelock.FileLock(path / LOCK)

    def __enter__(self) -> "RunDirectory":
        try:
            self._before = set(os.listdir(self.path))
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"{self.path} is in use by another process; wait for it or choose another --out.") from None
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror or error}.") from error
        for folder in (self.path, self.path / "metrics.parquet"):
            paths.remove_half_written(folder)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # not empty
            if set(os.listdir(self.path)) - {LOCK} == self._before:
                (self.path / LOCK).unlink()
        paths.remove_empty(self._made)
        self._lock.release()

    def check_unused(self) -> None:
        """Raises `UserError` where the directory already holds a run, or anything else."""
        if (self.path / "config.yaml").exists():
            raise UserError(
                f"{self.path} already holds a run ({status(self.path)}); continue it with --resume "
                f"{shlex.quote(str(self.path))}, or choose another --out."
            )
        foreign = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        if foreign:
            raise UserError(f"{self.path} is not empty ({foreign[0]}, ...) and holds no run; choose another --out.")

    def write_config(self, spec: RunSpec, provenance: documents.Fields) -> None:
        """Writes config.yaml: the spec, and where it ran."""
        values = {**spec.to_dict(), **provenance}
        if spec.continues is not None:
            values["continues"]["run"] = os.path.relpath(
                pathlib.Path(spec.continues.run).resolve(), self.path.resolve()
            )
        write_text(self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def write_summary(self, summary: documents.Fields) -> None:
        """Writes summary.json."""
        write_text(self.path / "summary.json", documents.json_text(summary, indent=2) + "\n")

    def remove_summary(self) -> None:
        """Removes summary.json: the run is no longer as it says."""
        (self.path / "summary.json").unlink(missing_ok=True)


def create(path: pathlib.Path) -> RunDirectory:
    """The directory `path`, made where it does not exist. Raises `UserError` where it cannot be."""
    length = len(os.fsencode(path.absolute()))
    if length > paths.LONGEST:
        raise UserError(f"the path of the run directory has {length} bytes; at most {paths.LONGEST} work.")
    try:
        return RunDirectory(path, paths.make(path))
    except OSError as error:
        raise UserError(f"cannot make the run directory {path}: {error.strerror or error}.") from error


def load(path: pathlib.Path) -> tuple[RunSpec, documents.Fields]:
    """The spec of the run in `path`, and all of config.yaml. Raises `UserError` where there is none."""
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path} holds no run: there is no config.yaml in it.")
    advice = f"Bring it back from a copy, or move {path} away and train anew."
    try:
        values = documents.read_yaml(file)
    except UserError as error:
        raise UserError(f"{error} {advice}") from None
    try:
        spec = RunSpec.from_dict(values)
    except UserError as error:
        raise UserError(f"{file} cannot be used: {error} {advice}") from None
    if spec.continues is not None:
        run = (path / spec.continues.run).resolve()
        spec = dataclasses.replace(spec, continues=dataclasses.replace(spec.continues, run=str(run)))
    return spec, values


def check_same(path: pathlib.Path, config: Config, hparams: HParams, seeds: Sequence[int]) -> None:
    """Raises `UserError` where the run in `path` is not of these settings and seeds, or is none."""
    spec, _ = load(path)
    saved = {**to_dict(spec.config), **values_of(spec.hparams), "seeds": list(spec.seeds)}
    wanted = {**to_dict(config), **values_of(hparams), "seeds": list(seeds)}
    for name, value in wanted.items():
        if value is not None and saved[name] != value:  # None is chosen when it is trained
            raise UserError(
                f"{path} holds a run with {name} {shown(saved[name])}, not {shown(value)}: choose another --out."
            )


def summary(path: pathlib.Path) -> documents.Fields:
    """What summary.json says of the run. Without one it is being trained, or was killed: its status is "unfinished"."""
    try:
        found = documents.with_infinities(documents.read_json(path / "summary.json"))
    except UserError:
        found = {}
    return {"status": UNFINISHED, **found}


def status(path: pathlib.Path) -> str:
    """ "finished", "interrupted", ...; see `summary`."""
    return str(summary(path)["status"])
