"""One replay for several actors: each has its own columns of the ring and its own write row.

Rows are time within a region, so that n-step folding never reads across actors, in whatever order they arrive. Where an
actor's block is left out, its stream is cut (`ring.cut`), and folding does not read across the gap either.
"""

import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Batch, Key, Progress, Replay, Transition
from jaxdqn.config import HParams
from jaxdqn.replay.ring import Layout, Stored, cut, empty, layout, n_step_batch, span, write


def regions(
    example: Transition,
    rows: int,
    num_actors: int,
    envs_each: int,
    batch_size: int,
    n_step: int = 1,
    copies: int = 2,
) -> Replay:
    """A ring of rows x (num_actors * envs_each) transitions, sampled uniformly over all that is complete.

    add(state, block [T, envs_each], (actor [], written [])) writes actor's next rows; sample takes `written`
    [num_actors], the rows each actor ever wrote. Some actor must have written the rows of one transition
    (`ring.span`). With one actor it is `uniform`. State: a `Stored` of arrays [rows, num_actors * envs_each, ...].
    """
    ring = layout(example, rows, num_actors * envs_each, copies)

    def add(
        state: Stored,
        block: Transition,
        written: tuple[Array, Array],
        hparams: HParams,
        priorities: Array | None = None,
    ) -> Stored:
        del hparams, priorities
        actor, rows_of_actor = written
        return write(ring, state, block, rows_of_actor, actor * envs_each)

    def sample(state: Stored, key: Key, progress: Progress, hparams: HParams) -> Batch:
        row, env = region_starts(ring, num_actors, key, batch_size, progress.written, span(ring, n_step))
        return n_step_batch(ring, state, row, env, n_step, hparams)

    def cut_one(state: Stored, written: tuple[Array, Array]) -> Stored:
        actor, rows_of_actor = written
        return cut(state, rows_of_actor, actor * envs_each, envs_each)

    return Replay(lambda: empty(ring), add, sample, cut=cut_one, rows=rows)


def region_starts(
    ring: Layout, num_actors: int, key: Key, count: int, written: Array, length: int
) -> tuple[Array, Array]:
    """`count` (row, env), uniform over all regions, from which `length` rows follow before the region's write head."""
    each = ring.num_envs // num_actors
    filled = jnp.minimum(written, ring.rows - ring.history)
    ends = jnp.cumsum(jnp.maximum(filled - length + 1, 0) * each)
    flat = (jax.random.bits(key, (count,)) % ends[-1].astype(jnp.uint32)).astype(jnp.int32)
    actor = jnp.searchsorted(ends, flat, side="right")
    flat -= jnp.where(actor > 0, ends[actor - 1], 0)
    return (written[actor] - filled[actor] + flat // each) % ring.rows, actor * each + flat % each
