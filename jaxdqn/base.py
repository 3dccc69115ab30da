"""The data types that flow through one training iteration, and the records of pure functions.

Letters in shapes: T steps of a rollout, N environments of one shard, B batch, L sequence length, A actions,
*O one observation, which may be a pytree of arrays. An interface is a `NamedTuple` of pure functions, documented once
here and typed by a protocol; a variant is a factory that returns one. State is a named pytree: complete (keys
included), and free of functions and configuration.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn.config import HParams

Array = jax.Array
Key = jax.Array
PyTree = Any
Scalar = jax.Array | float
"""A number that may be traced, such as a hyperparameter."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """A leaf of `Spec.observation` that is the newest frames of an episode, oldest first on the last axis.

    Each step brings one frame. In place of those before the episode's first stands that one again, or zeros: `padding`.
    """

    shape: tuple[int, ...]
    dtype: Any
    padding: Literal["first", "zeros"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # as a `ShapeDtypeStruct` does


@dataclasses.dataclass(frozen=True)
class Codes:
    """A leaf of `Spec.observation` that holds codes of categories, not quantities: number k on its last axis is one of
    0 .. sizes[k] - 1, and networks take it one-hot."""

    shape: tuple[int, ...]
    dtype: Any
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # as a `ShapeDtypeStruct` does


class Spec(NamedTuple):
    """What an agent must know of an environment.

    `observation` gives shape and dtype of one observation as stored (bool for 0/1 grids), or a pytree of these, which
    are `Frames` where the environment stacks frames and `Codes` where it names categories; where not every action is
    always legal, it is a `Masked` of these (masks.py). `max_episode_steps` is the time limit in environment steps, or
    None where there is none. `achievements` are names of what may be done in an episode, by which it is judged too.
    """

    name: str
    observation: PyTree
    num_actions: int
    max_episode_steps: int | None = None
    achievements: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.name, str(self.observation)))  # which may be a dict


class TimeStep(NamedTuple):
    """What one environment step returned. All fields are scalars but the observations [*O].

    `discount` is 0 where the MDP terminated, else 1, also at a time limit. `observation` is what the policy sees
    next (the first of a new episode after an end); `final_observation` is what the step produced before any reset.
    `achieved` says of each of `Spec.achievements`, by its name, whether it has been done in the episode of this step.
    """

    observation: PyTree
    reward: Array
    discount: Array
    final_observation: PyTree
    episode_end: Array
    achieved: Mapping[str, Array] | tuple[()] = ()


class HostStep(NamedTuple):
    """What one step of N environments on the host returned: NumPy arrays [N, ...], otherwise as in `TimeStep`.

    Of an observation that is `Frames` there is the newest alone, [N, ..., 1]. A `discount` of 0 without `episode_end`
    is a termination for the learner only: a lost life.
    """

    observation: PyTree
    reward: np.ndarray
    discount: np.ndarray
    final_observation: PyTree
    episode_end: np.ndarray


class HostEnvironments(NamedTuple):
    """N environments with auto-reset that JAX cannot see, stepped together. What they return is not written again.

    reset(seed) -> observation [N, *O], of `Frames` the newest; the seed, below 2^31, fixes all that follows
    step(actions int64 [N]) -> HostStep
    close()
    kill(): ends what keeps a step from returning, as far as that can be done from another thread
    render() -> [H, W, 3] uint8 of the first environment; None where it draws nothing
    """

    reset: Callable[[int], PyTree]
    step: Callable[[np.ndarray], HostStep]
    close: Callable[[], None]
    kill: Callable[[], None] = lambda: None
    render: Callable[[], np.ndarray] | None = None


class Environment(NamedTuple):
    """A single environment with auto-reset; callers `vmap` it.

    reset(key) -> (state, observation [*O])
    step(key, state, action []) -> (state, TimeStep)
    on_host(num_envs) -> HostEnvironments, where JAX cannot see the environment: then `reset` gives an observation of
    zeros, until there is a first one, and `step` raises `UserError`. None for environments in JAX
    """

    reset: Callable[[Key], tuple[PyTree, PyTree]]
    step: Callable[[Key, PyTree, Array], tuple[PyTree, TimeStep]]
    spec: Spec
    on_host: Callable[[int], HostEnvironments] | None = None


class Apply(Protocol):
    """A network's function of a batch of observations [B, *O] and a key, which only stochastic layers use. Each key is
    one draw for the whole batch; without one they draw nothing and are what they are on average (weights without noise,
    evenly spread quantiles): the mean network, by which agents are judged."""

    def __call__(self, params: PyTree, observation: PyTree, key: Key | None = None) -> PyTree:
        """Head outputs; for Q-networks the values [B, A]."""


Features = Callable[[PyTree, PyTree], Array]
"""features(params, observation [B, *O]) -> activations [B, F] of a network's last hidden layer."""


class Network(NamedTuple):
    """A function of a batch of observations as stored (bool and uint8 are decoded inside).

    init(key) -> params
    apply(params, observation [B, *O], key) -> head outputs, for Q-networks [B, A]; most networks ignore the key, and
    those with noise are their mean where it is None
    features(params, observation [B, *O]) -> [B, F]     what the head reads, the last hidden layer, of the mean network;
    None where there is no such layer
    """

    init: Callable[[Key], PyTree]
    apply: Apply
    features: Features | None = None


class Step(Protocol):
    """One step of a recurrent network over B streams."""

    def __call__(
        self, params: PyTree, carry: PyTree, observation: PyTree, key: Key | None = None
    ) -> tuple[PyTree, PyTree]:
        """(next carry [B, ...], head outputs [B, ...])."""


class RecurrentNetwork(NamedTuple):
    """A network with memory.

    init(key) -> params
    initial_carry(num) -> the state [num, ...] at an episode's start
    step(params, carry [B, ...], observation [B, *O], key) -> (carry, head outputs [B, ...])
    features: as in `Network`, of the layer before the memory, which does not depend on the carry
    `unroll` of networks.py takes `step` over a sequence.
    """

    init: Callable[[Key], PyTree]
    initial_carry: Callable[[int], PyTree]
    step: Step
    features: Features | None = None


class Transition(NamedTuple):
    """Experience as stored, each field [T, N, ...]. `discount` never contains gamma.

    `next_observation` is what the step produced before any auto-reset; `extras` is what a loss needs later
    (log-probability, value, recurrent state), () for Q-learning.
    """

    observation: PyTree
    action: Array
    reward: Array
    discount: Array
    next_observation: PyTree
    episode_end: Array
    extras: PyTree = ()


class Batch(NamedTuple):
    """m-step transitions, [B, ...], m the realised length. Gamma enters in the replay, or in an agent's `prepare`.

    return_m = sum_{k<m} gamma^k r_k; bootstrap_discount = gamma^m * discount; bootstrap_observation is the one the
    m-th step produced. `weights` are importance weights, `indices` what `update_priorities` needs.
    """

    observation: PyTree
    action: Array
    return_m: Array
    bootstrap_discount: Array
    bootstrap_observation: PyTree
    weights: Array
    indices: PyTree = ()


class SequenceBatch(NamedTuple):
    """Runs of L consecutive transitions [L, B, ...], oldest first; an `episode_end` inside cuts a run in two.

    `carry` [B, ...] is the recurrent state at the first row, as the actor stored it in `extras` (() for others);
    `weights` [B] are importance weights, `indices` what `update_priorities` needs.
    """

    transitions: Transition
    carry: PyTree
    weights: Array
    indices: PyTree = ()


class TargetBatch(NamedTuple):
    """Transitions [B, ...] whose targets [B] were computed before the updates (`Agent.prepare`), as constants.

    `weights` are importance weights, `indices` what `update_priorities` needs.
    """

    observation: PyTree
    action: Array
    target: Array
    weights: Array
    indices: PyTree = ()


class Progress(NamedTuple):
    """Where training stands when a batch is sampled, each int32: `written` rows of experience ([], or [actors] where
    each has a region of its own), gradient `updates` [] done, and the `turn` [] of this update in its iteration."""

    written: Array
    updates: Array
    turn: Array


class Add(Protocol):
    """How a block enters a replay."""

    def __call__(
        self, state: PyTree, block: Transition, written: PyTree, hparams: HParams, priorities: Array | None = None
    ) -> PyTree:
        """The replay's state with the rows of `block` [T, N], whose `priorities` [T, N] an actor may bring."""


class Sample(Protocol):
    """How a batch leaves a replay."""

    def __call__(self, state: PyTree, key: Key, progress: Progress, hparams: HParams) -> PyTree:
        """A `Batch`, or the kind of batch that the agent takes."""


class UpdatePriorities(Protocol):
    """How a replay learns what its batch was worth."""

    def __call__(self, state: PyTree, indices: PyTree, priorities: Array, hparams: HParams) -> PyTree:
        """The replay's state, with new `priorities` [B] of what a batch had `indices` of."""


class Describe(Protocol):
    """What a replay says of what it would draw now."""

    def __call__(self, state: PyTree, progress: Progress, hparams: HParams) -> dict[str, Array]:
        """Scalars by column. `replay_age` is the expected number of rows written since the one that is drawn."""


def no_priorities(state: PyTree, indices: PyTree, priorities: Array, hparams: HParams) -> PyTree:
    """The `update_priorities` of replays that draw without."""
    del indices, priorities, hparams
    return state


class Replay(NamedTuple):
    """Experience of one shard. `written` [] counts the rows ever written: it belongs to the caller, so that it stays
    one number for all members of a population and every write stays one slice.

    init() -> state
    add(state, block [T, N], written, hparams, priorities=None) -> state     writes T rows, from row written % rows on
    sample(state, key, progress, hparams) -> Batch, SequenceBatch or TargetBatch
    update_priorities(state, indices, priorities [B], hparams) -> state
    cut(state, written) -> state     for a stream that breaks off: what is added next does not follow on its newest row;
    None where there is but one stream, which does not
    weighted(largest) -> sample     the same `sample`, whose importance weights are relative to the largest of all
    shards: largest(x []) is the maximum of their numbers x. None where all weights are 1
    describe(state, progress, hparams) -> {column: []}     of what `sample` would draw; None where nothing is known
    rows: how many rows of each stream it holds, whose loss more of them would make good; 0 where it is the newest block
    kept(block) -> what `add` needs of a block: of stacks stored once their newest frames alone, and the next
    observations only where they have a copy of their own
    """

    init: Callable[[], PyTree]
    add: Add
    sample: Sample
    update_priorities: UpdatePriorities = no_priorities
    cut: Callable[[PyTree, Any], PyTree] | None = None
    weighted: Callable[[Callable[[Array], Array]], Sample] | None = None
    describe: Describe | None = None
    rows: int = 0
    kept: Callable[[Transition], Transition] = lambda block: block


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


class Act(Protocol):
    """An action for each of N environments, with exploration."""

    def __call__(
        self, params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        """(action [N], carry, extras), of observation [N, *O] and exploration [N], an epsilon for each."""


class Greedy(Protocol):
    """An action for each of N environments, without exploration."""

    def __call__(self, params: PyTree, carry: PyTree, observation: PyTree, key: Key) -> tuple[Array, PyTree, PyTree]:
        """(action [N], carry, extras), of observation [N, *O]."""


class Values(Protocol):
    """The values of actions; `key` is for networks that draw."""

    def __call__(self, params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        """[N, A], of observation [N, *O]."""


class Policy(NamedTuple):
    """How an agent chooses actions: `act` explores, `greedy` does not; `values` are what both follow. See `Agent`."""

    act: Act
    greedy: Greedy
    values: Values | None = None


class Loss(Protocol):
    """What an agent descends."""

    def __call__(self, params: PyTree, target_params: PyTree, batch: PyTree, key: Key, hparams: HParams) -> LossOutput:
        """The loss of the kind of batch that the agent takes, its priorities and metrics."""


class Gradient(Protocol):
    """The gradient of an agent's loss."""

    def __call__(self, learner: LearnerState, batch: PyTree, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        """(gradients like the parameters, LossOutput)."""


class ApplyGradients(Protocol):
    """The step that an agent takes along a gradient."""

    def __call__(
        self, learner: LearnerState, gradients: PyTree, loss: Array, hparams: HParams
    ) -> tuple[LearnerState, Array]:
        """(learner, gradient norm [])."""


class Prepare(Protocol):
    """What an agent computes once for each block, before it is stored."""

    def __call__(self, params: PyTree, block: Transition, key: Key, hparams: HParams) -> Transition:
        """The block [T, N] with, say, targets in its `extras`."""


def as_it_is(params: PyTree, block: Transition, key: Key, hparams: HParams) -> Transition:
    """The `prepare` of agents that have nothing to prepare."""
    del params, key, hparams
    return block


class Distribution(Protocol):
    """The distribution of the return that an agent expects."""

    def __call__(self, params: PyTree, observation: PyTree, hparams: HParams) -> tuple[Array, Array]:
        """(returns [N, A, K], their probabilities [N, A, K]), of observation [N, *O]."""


class Agent(NamedTuple):
    """What is learned, as pure functions.

    init(key, hparams) -> LearnerState
    initial_carry(num_envs) -> recurrent state of the actor, () unless recurrent
    act(params, carry, observation [N, *O], key, exploration [N]) -> (action [N], carry, extras)
    greedy(params, carry, observation [N, *O], key) -> (action [N], carry, extras)
    gradient(learner, batch, key, hparams) -> (gradients, LossOutput)
    apply(learner, gradients, loss [], hparams) -> (learner, gradient_norm [])
    prepare(params, block [T, N], key, hparams) -> block     once an iteration, before the block is stored
    distribution(params, observation [N, *O], hparams) -> (returns, probabilities) [N, A, K]; None where none is learned
    values(params, observation [N, *O], key=None) -> [N, A], by which it acts; None where it acts by something else
    features(params, observation [B, *O]) -> [B, F]     its network's; None where that has none
    own: the agent's own hyperparameters at their defaults, what `HParams.own` is for it
    """

    init: Callable[[Key, HParams], LearnerState]
    initial_carry: Callable[[int], PyTree]
    act: Act
    greedy: Greedy
    gradient: Gradient
    apply: ApplyGradients
    prepare: Prepare = as_it_is
    own: PyTree = ()
    distribution: Distribution | None = None
    values: Values | None = None
    features: Features | None = None

    def complete(self, hparams: HParams) -> HParams:
        """`hparams` with the agent's own at their defaults, where there are none."""
        return hparams._replace(own=self.own) if hparams.own == () else hparams

    @property
    def defaults(self) -> HParams:
        """Hyperparameters with which this agent's functions can be called."""
        return HParams(own=self.own)


def zeros_of(spec: Spec, *leading: int) -> PyTree:
    """An observation of zeros, [*leading, *O]."""
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), spec.observation)
