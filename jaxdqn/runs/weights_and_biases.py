"""Weights & Biases: every member's scalars, each once, over the environment steps."""

import json
import math
import pathlib
import uuid
from collections.abc import Mapping

import numpy as np

from jaxdqn.errors import UserError
from jaxdqn.files import documents
from jaxdqn.files.paths import check_file, write_text


class Log:
    """A W&B run, kept over the sessions of a run directory by `file`, which says what was sent (none: not kept).

    W&B's own steps must rise, and members train one after the other: so `env_steps` is a metric, the x-axis of all
    others. What a session that was killed has sent is not sent again. Raises `UserError` where `file` cannot be
    written.
    """

    def __init__(self, project: str, config: Mapping[str, object], file: pathlib.Path | None):
        import wandb

        if file is not None:
            check_file(file)
        self._file, self._sent = file, _read(file, project)
        self._run = wandb.init(project=project, config=dict(config), id=self._sent["id"], resume="allow")
        self._run.define_metric("env_steps")
        self._run.define_metric("member-*", step_metric="env_steps")

    def write(self, batch: int, env_steps: int, members: range, columns: Mapping[str, np.ndarray]) -> None:
        """Sends a logging point, columns [M]; what is not finite is left out."""
        if env_steps <= self._sent["env_steps"].get(str(batch), -1):
            return
        values = {
            f"member-{member}/{name}": column[index].item()
            for index, member in enumerate(members)
            for name, column in columns.items()
            if math.isfinite(column[index])
        }
        self._run.log({"env_steps": env_steps, **values})
        self._sent["env_steps"][str(batch)] = env_steps

    def flush(self) -> None:
        """Notes what was sent."""
        if self._file is not None:
            write_text(self._file, json.dumps(self._sent))

    def close(self) -> None:
        """Ends the session."""
        self._run.finish()


def _read(file: pathlib.Path | None, project: str) -> documents.Fields:
    new = {"project": project, "id": uuid.uuid4().hex, "env_steps": {}}
    if file is None or not file.exists():
        return new
    try:
        sent = documents.read_json(file)
        known = isinstance(sent["id"], str) and all(isinstance(x, int) for x in sent["env_steps"].values())
        return sent if known and sent["project"] == project else new
    except (UserError, KeyError, TypeError, AttributeError):
        return new
