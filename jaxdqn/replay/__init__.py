"""Replay: the experience of one shard, as arrays on its device."""

from jaxdqn.base import SequenceBatch, TargetBatch
from jaxdqn.config import item_rows, replay_rows
from jaxdqn.replay import sequence
from jaxdqn.replay.kind import Kind
from jaxdqn.replay.latest import check_epochs, check_returns, latest, minibatches
from jaxdqn.replay.regions import regions
from jaxdqn.replay.ring import copies, cut, uniform
from jaxdqn.replay.sequence import sequence_regions, sequences

__all__ = [
    "REPLAYS",
    "Kind",
    "cut",
    "latest",
    "minibatches",
    "regions",
    "sequence_regions",
    "sequences",
    "uniform",
]

REPLAYS: dict[str, Kind] = {
    "uniform": Kind(
        lambda example, c: uniform(
            example, replay_rows(c), c.num_envs, c.batch_size, c.n_step, copies(example, c.replay_copies)
        ),
        rows_needed=item_rows,
        regions=lambda example, c, actors, block: regions(
            example,
            -(-replay_rows(c) // block) * block,
            actors,
            c.num_envs // actors,
            c.batch_size,
            c.n_step,
            copies(example, c.replay_copies),
        ),
    ),
    "latest": Kind(
        lambda example, c: latest(example, c.rollout_length, c.num_envs, c.n_step),
        rows_needed=lambda c: 0,  # the block just acted is there at once
        newest_only=True,
        check=check_returns,
    ),
    "minibatches": Kind(
        lambda example, c: minibatches(example, c.rollout_length, c.num_envs, c.batch_size),
        rows_needed=lambda c: 0,
        batch=TargetBatch,
        newest_only=True,
        check=check_epochs,
    ),
    "sequences": Kind(
        lambda example, c: sequences(
            example, sequence.whole_rows(c, c.rollout_length), c.num_envs, c.batch_size, *sequence.window(c)
        ),
        rows_needed=sequence.rows_needed,
        regions=lambda example, c, actors, block: sequence_regions(
            example, sequence.whole_rows(c, block), actors, c.num_envs // actors, c.batch_size, *sequence.window(c)
        ),
        batch=SequenceBatch,
        check=sequence.check,
    ),
}
"""Replays by the names that `Config.replay` has for them."""
