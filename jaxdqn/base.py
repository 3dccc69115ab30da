"""The data types that flow through one training iteration, and the four records of pure functions.

Letters in shapes: T steps of a rollout, N environments of one shard, B batch, L sequence length, A actions,
*O one observation. An interface is a `NamedTuple` of pure functions, documented once here; a variant is a factory
that returns one. State is a named pytree: complete (keys included), and free of functions and configuration.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any


class Spec(NamedTuple):
    """What an agent must know of an environment.

    `observation` gives shape and dtype of one observation as stored (bool for 0/1 grids); `max_episode_steps` is the
    time limit in environment steps, or None where there is none.
    """

    name: str
    observation: jax.ShapeDtypeStruct
    num_actions: int
    max_episode_steps: int | None = None


class TimeStep(NamedTuple):
    """What one environment step returned. All fields are scalars but the observations [*O].

    `discount` is 0 where the MDP terminated, else 1, also at a time limit. `observation` is what the policy sees
    next (the first of a new episode after an end); `final_observation` is what the step produced before any reset.
    """

    observation: Array
    reward: Array
    discount: Array
    final_observation: Array
    episode_end: Array


class Environment(NamedTuple):
    """A single environment with auto-reset; callers `vmap` it.

    reset(key) -> (state, observation [*O])
    step(key, state, action []) -> (state, TimeStep)
    """

    reset: Callable[[Key], tuple[PyTree, Array]]
    step: Callable[[Key, PyTree, Array], tuple[PyTree, TimeStep]]
    spec: Spec


class Network(NamedTuple):
    """A function of a batch of observations as stored (bool and uint8 are decoded inside).

    init(key) -> params
    apply(params, observation [B, *O]) -> head outputs, for Q-networks [B, A]
    """

    init: Callable[[Key], PyTree]
    apply: Callable[..., Any]


class Transition(NamedTuple):
    """Experience as stored, each field [T, N, ...]. `discount` never contains gamma.

    `next_observation` is what the step produced before any auto-reset; `extras` is what a loss needs later
    (log-probability, value, recurrent state), () for Q-learning.
    """

    observation: Array
    action: Array
    reward: Array
    discount: Array
    next_observation: Array
    episode_end: Array
    extras: PyTree = ()


class Batch(NamedTuple):
    """m-step transitions, [B, ...], m the realised length. The only place where gamma enters is the replay.

    return_m = sum_{k<m} gamma^k r_k; bootstrap_discount = gamma^m * discount; bootstrap_observation is the one the
    m-th step produced. `weights` are importance weights, `indices` what `update_priorities` needs.
    """

    observation: Array
    action: Array
    return_m: Array
    bootstrap_discount: Array
    bootstrap_observation: Array
    weights: Array
    indices: PyTree = ()


class Replay(NamedTuple):
    """Experience of one shard. `written` [] counts the rows ever written: it belongs to the caller, so that it stays
    one number for all members of a population and every write stays one slice.

    init() -> state
    add(state, block [T, N], written) -> state     writes T rows, from row written % rows on
    sample(state, key, written, hparams) -> Batch  (or sequences [L, B] of transitions, as the agent wants)
    update_priorities(state, indices, priorities [B]) -> state
    """

    init: Callable[[], PyTree]
    add: Callable[..., PyTree]
    sample: Callable[..., Any]
    update_priorities: Callable[[PyTree, PyTree, Array], PyTree]


class LossOutput(NamedTuple):
    """loss [], priorities [B] (non-negative), metrics: a dict of scalars."""

    loss: Array
    priorities: Array
    metrics: dict[str, Array]


class LearnerState(NamedTuple):
    """Everything the learner owns. `updates` [] counts gradient updates; `first_bad_update` [] is the first one whose
    loss, gradient or step was not finite, or -1. From that update on the learner keeps its last finite values."""

    params: PyTree
    target_params: PyTree
    opt_state: PyTree
    updates: Array
    first_bad_update: Array


class Policy(NamedTuple):
    """How an agent chooses actions: `act` explores, `greedy` does not. See `Agent`."""

    act: Callable[..., tuple[Array, PyTree, PyTree]]
    greedy: Callable[..., tuple[Array, PyTree, PyTree]]


class Agent(NamedTuple):
    """What is learned, as pure functions.

    init(key, hparams) -> LearnerState
    initial_carry(num_envs) -> recurrent state of the actor, () unless recurrent
    act(params, carry, observation [N, *O], key, exploration [N]) -> (action [N], carry, extras)
    greedy(params, carry, observation [N, *O], key) -> (action [N], carry, extras)
    gradient(learner, batch, key, hparams) -> (gradients, LossOutput)
    apply(learner, gradients, loss [], hparams) -> (learner, gradient_norm [])
    """

    init: Callable[..., LearnerState]
    initial_carry: Callable[[int], PyTree]
    act: Callable[..., tuple[Array, PyTree, PyTree]]
    greedy: Callable[..., tuple[Array, PyTree, PyTree]]
    gradient: Callable[..., tuple[PyTree, LossOutput]]
    apply: Callable[..., tuple[LearnerState, Array]]
