"""Replay: the experience of one shard, as arrays on its device."""

from collections.abc import Callable

from jaxdqn.base import Replay, SequenceBatch, TargetBatch
from jaxdqn.config import Config, item_rows, replay_rows
from jaxdqn.replay import sequence
from jaxdqn.replay.kind import Kind
from jaxdqn.replay.latest import check_epochs, check_returns, latest, minibatches
from jaxdqn.replay.prioritised import late, prioritised, prioritised_regions
from jaxdqn.replay.prioritised_sequences import prioritised_sequence_regions, prioritised_sequences
from jaxdqn.replay.regions import regions
from jaxdqn.replay.ring import copies, cut, uniform
from jaxdqn.replay.sequence import sequence_regions, sequences

__all__ = [
    "REPLAYS",
    "Kind",
    "cut",
    "latest",
    "minibatches",
    "prioritised",
    "prioritised_regions",
    "prioritised_sequence_regions",
    "prioritised_sequences",
    "regions",
    "sequence_regions",
    "sequences",
    "uniform",
]


def whole_blocks(config: Config, block: int) -> int:
    """Rows of a region of whole blocks that holds what `config` asks for."""
    return -(-replay_rows(config) // block) * block


def _sequences(make: Callable[..., Replay], make_regions: Callable[..., Replay]) -> Kind:
    return Kind(
        lambda example, c: make(
            example, sequence.whole_rows(c, c.rollout_length), c.num_envs, c.batch_size, *sequence.window(c)
        ),
        rows_needed=sequence.rows_needed,
        regions=lambda example, c, actors, block: make_regions(
            example, sequence.whole_rows(c, block), actors, c.num_envs // actors, c.batch_size, *sequence.window(c)
        ),
        batch=SequenceBatch,
        unused=("replay_copies",),
        check=sequence.check,
    )


REPLAYS: dict[str, Kind] = {
    "uniform": Kind(
        lambda example, c: uniform(
            example, replay_rows(c), c.num_envs, c.batch_size, c.n_step, copies(example, c.replay_copies)
        ),
        rows_needed=item_rows,
        regions=lambda example, c, actors, block: regions(
            example,
            whole_blocks(c, block),
            actors,
            c.num_envs // actors,
            c.batch_size,
            c.n_step,
            copies(example, c.replay_copies),
        ),
    ),
    "prioritised": Kind(
        lambda example, c: prioritised(
            example,
            replay_rows(c),
            c.num_envs,
            c.batch_size,
            c.n_step,
            c.rollout_length,
            copies(example, c.replay_copies),
        ),
        rows_needed=lambda c: (late(item_rows(c), c.rollout_length) + 1) * c.rollout_length,
        regions=lambda example, c, actors, block: prioritised_regions(
            example,
            whole_blocks(c, block),
            actors,
            c.num_envs // actors,
            c.batch_size,
            c.n_step,
            block,
            copies(example, c.replay_copies),
        ),
    ),
    "latest": Kind(
        lambda example, c: latest(example, c.rollout_length, c.num_envs, c.n_step),
        rows_needed=lambda c: 0,  # the block just acted is there at once
        newest_only=True,
        unused=("replay_copies",),
        check=check_returns,
    ),
    "minibatches": Kind(
        lambda example, c: minibatches(
            example,
            c.rollout_length,
            c.num_envs,
            c.batch_size,
            c.updates_per_iteration * c.batch_size // (c.rollout_length * c.num_envs),
        ),
        rows_needed=lambda c: 0,
        batch=TargetBatch,
        newest_only=True,
        unused=("replay_copies", "n_step"),  # targets take the place of returns
        check=check_epochs,
    ),
    "sequences": _sequences(sequences, sequence_regions),
    "prioritised_sequences": _sequences(prioritised_sequences, prioritised_sequence_regions),
}
"""Replays by the names that `Config.replay` has for them."""
