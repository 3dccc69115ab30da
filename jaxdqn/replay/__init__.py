"""Replay: the experience of one shard, as arrays on its device."""

from jaxdqn.replay.latest import latest
from jaxdqn.replay.regions import regions
from jaxdqn.replay.ring import cut, uniform
from jaxdqn.replay.sequence import sequences

__all__ = ["cut", "latest", "regions", "sequences", "uniform"]
