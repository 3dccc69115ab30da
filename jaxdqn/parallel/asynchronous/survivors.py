"""What is left when a worker dies: a compiled program that fails has taken the arrays it was given to keep with it."""

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxdqn.base import PyTree

W = TypeVar("W", bound=Any)


def intact(tree: PyTree) -> bool:
    """Whether every array of `tree` can still be read: none was donated to a program that failed, or came from one."""
    try:
        jax.block_until_ready(tree)
    except Exception:  # whatever the program failed with
        return False
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def ended(node: Any, alive: bool) -> Any:
    """node.end(), what it made of a chunk; None where a dead one took that with it."""
    try:
        end = node.end()
    except Exception:
        if alive:
            raise
        return None
    return end if intact(end) else None


def mended(workers: Sequence[W], dead: Collection[int]) -> list[W]:
    """`workers`, where the broken among the dead are copies of a living one with a key of their own.

    So a state with dead workers can be saved, and a resumed run has all of them again. A worker has a `key` [1, 1];
    one that is not dead must be left.
    """
    living = next(worker for index, worker in enumerate(workers) if index not in dead)
    return [
        _twin(living, index) if index in dead and not intact(worker) else worker for index, worker in enumerate(workers)
    ]


def _twin(worker: W, index: int) -> W:
    key = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))(worker.key)
    twin: W = jax.tree.map(jnp.copy, worker)._replace(key=key)
    return twin
