"""Replay: the experience of one shard, as arrays on its device."""

from jaxdqn.replay.latest import latest
from jaxdqn.replay.regions import regions
from jaxdqn.replay.ring import uniform
from jaxdqn.replay.sequence import sequences

__all__ = ["latest", "regions", "sequences", "uniform"]
