"""How actors explore: schedules over environment steps, the per-environment ladder, and epsilon-greedy.

Every argument may be traced, so that a population can sweep over it.
"""

import chex
import jax
import jax.numpy as jnp

from jaxdqn import masks
from jaxdqn.base import Array, Key, Scalar


def linear_schedule(begin: Scalar, end: Scalar, num_steps: Scalar, step: Array) -> Array:
    """`begin` at step 0, `end` from `num_steps` > 0 on."""
    return begin + (end - begin) * jnp.clip(step / num_steps, 0.0, 1.0)


def exponential_schedule(begin: Scalar, end: Scalar, num_steps: Scalar, step: Array) -> Array:
    """`begin` > 0 at step 0, then a constant factor each step down to `end` > 0 from `num_steps` on."""
    return begin * (end / begin) ** jnp.clip(step / num_steps, 0.0, 1.0)


def epsilon_ladder(epsilon: Array, power: Scalar, num_envs: int, first: Array | int, total: int) -> Array:
    """One epsilon per environment, [num_envs]: epsilon^(1 + power * i / (total - 1)) for the i-th of `total`.

    `first` [] is the index of this shard's first environment among `total`. power = 0 gives all the same epsilon.
    Horgan et al. (2018), section 4.1, with epsilon = .4 and power = 7.
    """
    position = (first + jnp.arange(num_envs)) / max(total - 1, 1)
    return jnp.asarray(epsilon) ** (1.0 + power * position)


def greedy(q: Array) -> Array:
    """The action of the highest of q [N, A], the first of equal ones; int32 [N]."""
    return jnp.argmax(q, axis=-1).astype(jnp.int32)


def epsilon_greedy(key: Key, q: Array, epsilon: Array, legal: Array | None = None) -> Array:
    """A uniformly random action with probability `epsilon` [N], else the greedy one of q [N, A]; int32 [N].

    The coin and the random action come from different random numbers of one draw.
    """
    chex.assert_rank([q, epsilon], [2, 1])
    return epsilon_random(key, greedy(q), q.shape[1], epsilon, legal)


def epsilon_random(key: Key, action: Array, num_actions: int, epsilon: Array, legal: Array | None = None) -> Array:
    """`action` [N], or with probability `epsilon` (a scalar, or [N]) a uniformly random one, of those that are `legal`
    [N, A]; int32 [N]."""
    coin, choice = jax.random.uniform(key, (2, *action.shape))
    count = masks.count(num_actions, legal)
    index = jnp.minimum((choice * count).astype(jnp.int32), count - 1)
    return jnp.where(coin < epsilon, masks.nth(index, legal), action)
