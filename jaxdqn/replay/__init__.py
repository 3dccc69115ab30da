"""Replay: the experience of one shard, as arrays on its device."""

from jaxdqn.config import Config, replay_rows
from jaxdqn.replay.kind import Kind
from jaxdqn.replay.latest import latest
from jaxdqn.replay.prioritised import late, prioritised, prioritised_regions
from jaxdqn.replay.regions import regions
from jaxdqn.replay.ring import cut, uniform
from jaxdqn.replay.sequence import sequences

__all__ = [
    "REPLAYS",
    "Kind",
    "cut",
    "latest",
    "prioritised",
    "prioritised_regions",
    "regions",
    "sequences",
    "uniform",
]


def whole_blocks(config: Config, block: int) -> int:
    """Rows of a region of whole blocks that holds what `config` asks for."""
    return -(-replay_rows(config) // block) * block


REPLAYS: dict[str, Kind] = {
    "uniform": Kind(
        lambda example, c: uniform(example, replay_rows(c), c.num_envs, c.batch_size, c.n_step),
        rows_needed=lambda c: c.n_step,
        regions=lambda example, c, actors, block: regions(
            example, whole_blocks(c, block), actors, c.num_envs // actors, c.batch_size, c.n_step
        ),
    ),
    "prioritised": Kind(
        lambda example, c: prioritised(example, replay_rows(c), c.num_envs, c.batch_size, c.n_step, c.rollout_length),
        rows_needed=lambda c: (late(c.n_step, c.rollout_length) + 1) * c.rollout_length,
        regions=lambda example, c, actors, block: prioritised_regions(
            example, whole_blocks(c, block), actors, c.num_envs // actors, c.batch_size, c.n_step, block
        ),
    ),
    "latest": Kind(
        lambda example, c: latest(example, c.rollout_length, c.num_envs, c.n_step),
        rows_needed=lambda c: 0,  # the block just acted is there at once
        newest_only=True,
    ),
}
"""Replays by the names that `Config.replay` has for them."""
