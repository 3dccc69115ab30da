"""What a replay is called for: made from a configuration, for one stream of experience or a region for each actor."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdqn.base import Batch, Replay, Transition
from jaxdqn.config import Config


class Kind(NamedTuple):
    """A replay by name.

    make(example, config) -> Replay of one shard's `config`, for transitions like `example`
    rows_needed(config) -> rows that must be written before the first `sample`
    regions(example, config, num_actors, block) -> Replay with a region for each actor, each of whole blocks of `block`
    rows; its `add` takes (actor [], written []) and its `sample` `written` [actors]. None where there is no such form
    batch: what it samples, `Batch`, `SequenceBatch` or `TargetBatch`
    newest_only: whether it keeps nothing but the newest block, and learns from all of it
    unused: fields of `Config` without effect on it, which are refused where they are not at their defaults
    check(config): raises `UserError` for settings that it cannot serve
    Each is given a configuration with all of the agent's own settings.
    """

    make: Callable[[Transition, Config], Replay]
    rows_needed: Callable[[Config], int]
    regions: Callable[[Transition, Config, int, int], Replay] | None = None
    batch: type = Batch
    newest_only: bool = False
    unused: tuple[str, ...] = ()
    check: Callable[[Config], None] = lambda config: None
