"""TensorBoard's event files: curves of a few members, and of the mean of every setting with its interval.

tensorboard/<curve>/events.out.tfevents.<time of the session>: a record for each logging point, with all its columns.

Files are opened to append and closed again, as a population may have more members than a process may have files.
"""

import math
import os
import pathlib
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxdqn.config import HParams, values_of


class Curve(NamedTuple):
    """A directory of events: a statistic of the values of some rows of a batch of members."""

    name: str
    rows: Sequence[int]
    statistic: Callable[[np.ndarray], float]


def curves(
    batches: Sequence[range], everyone: Sequence[tuple[int, HParams]], varying: Sequence[str], limit: int
) -> list[list[Curve]]:
    """For each batch: the first `limit` members of the run, and of its first `limit` settings that several members have
    the mean and its 95 % interval. In several batches each has its own mean: they train one after the other."""
    settings: dict[HParams, list[int]] = {}
    for member, (_, setting) in enumerate(everyone):
        settings.setdefault(setting, []).append(member)
    shown = [(setting, own) for setting, own in settings.items() if len(own) > 1][: max(limit, 0)]
    found = []
    for number, batch in enumerate(batches):
        alone = [Curve(f"member-{m:04d}", [m - batch.start], np.mean) for m in batch if m < limit]
        means = []
        for setting, own in shown:
            rows = [member - batch.start for member in own if member in batch]
            varied = "".join(f"-{name}={values_of(setting)[name]:g}" for name in varying)
            name = varied + (f"-batch-{number:04d}" if len(batches) > 1 else "")
            means += [Curve(prefix + name, rows, statistic) for prefix, statistic in _MEANS.items() if len(rows) > 1]
        found.append(alone + means)
    return found


def _interval(side: int) -> Callable[[np.ndarray], float]:
    """An end of Student's 95 % interval of the mean: cheap enough for every column of every point."""

    def end(values: np.ndarray) -> float:
        if len(values) < 2:
            return math.nan
        reach = special.stdtrit(len(values) - 1, 0.975) / math.sqrt(len(values))
        return float(values.mean() + side * reach * values.std(ddof=1))

    return end


_MEANS: Mapping[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "low": _interval(-1), "high": _interval(1)}


class Events:
    """The event files of a session below `path`, a list of curves for every batch."""

    def __init__(self, path: pathlib.Path, by_batch: Sequence[Sequence[Curve]]):
        self._path, self._by_batch = path, by_batch
        self._file = f"events.out.tfevents.{time.time():017.6f}"  # TensorBoard reads a directory's in their order
        self._last = dict.fromkeys(range(len(by_batch)), -1)

    def cut(self, last: Mapping[int, int]) -> None:
        """Removes what an earlier session wrote after `last`, the environment steps of each batch's checkpoint: it will
        be written again. All of a batch that has none."""
        self._last |= last
        for batch, curves in enumerate(self._by_batch):
            for curve in curves:
                for file in self._path.joinpath(curve.name).glob("events.out.tfevents.*"):
                    _cut(file, self._last[batch])

    def write(self, batch: int, env_steps: int, columns: Mapping[str, np.ndarray]) -> None:
        """Adds a logging point, columns [M]; what is not finite is left out, and NaN in no mean."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for curve in self._by_batch[batch]:
            values = {}
            for name, column in columns.items():
                own = column[curve.rows]
                own = own[~np.isnan(own)]
                value = float(curve.statistic(own)) if len(own) and np.isfinite(own).all() else math.nan
                if math.isfinite(value):
                    values[name] = value
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
            event = Event(wall_time=time.time(), step=env_steps, summary=summary)
            self._append(curve.name, batch, event.SerializeToString())

    def _append(self, name: str, batch: int, event: bytes) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        file = self._path / name / self._file
        new = not file.exists()
        if new:
            file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            if new:
                stream.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()))
                # A TensorBoard that is running forgets what was cut off.
                start = SessionLog(status=SessionLog.START)
                first = Event(wall_time=time.time(), step=self._last[batch] + 1, session_log=start)
                stream.write(_record(first.SerializeToString()))
            stream.write(_record(event))


def _record(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _cut(file: pathlib.Path, last: int) -> None:
    """Ends an event file before its first event after step `last`, and before a record that is damaged."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data, at, points = file.read_bytes(), 0, 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            break
        try:
            event = Event.FromString(data[at + 12 : at + 12 + length])
        except DecodeError:
            break
        if event.step > last:
            break
        points += event.HasField("summary")
        at += 16 + length
    if not points:
        file.unlink()
    elif at < len(data):
        os.truncate(file, at)
