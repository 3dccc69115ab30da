"""*The* training iteration (act, store, sample, update), and the loop over it that every parallel mode compiles.

    iteration   0 ... prefill-1        prefill ... total-1
                act randomly, store    act, store, U x (sample, update)

The iteration counter belongs to the caller and is shared by all members of a population. Keys are derived from it
with `fold_in`, so that any chunk length and any resume point replays the same randomness.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxdqn import acting, exploration, learning
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import (
    Agent,
    Array,
    Environment,
    Key,
    LearnerState,
    Progress,
    PyTree,
    Replay,
    Spec,
    Transition,
    zeros_of,
)
from jaxdqn.config import Config, HParams
from jaxdqn.learning import Shards

PREPARE = 0x70726570  # far from what acting draws of the same key

Sums = dict[str, Array]
"""The learning metrics of some updates, added up."""


class TrainState(NamedTuple):
    """Everything one shard of one member is made of, but for the shared iteration counter."""

    learner: LearnerState
    actor: ActorState
    replay: PyTree
    key: Key  # []: folded with the iteration where it is consumed, never advanced


class Metrics(NamedTuple):
    """Of one shard, since the last logging point: sums over episodes and gradient updates, and two latest values."""

    episodes: EpisodeSums
    learning: Sums
    updates: Array  # int32 []  gradient updates in `learning`, by which its means are divided
    epsilon: Array  # []  before the ladder
    first_bad_update: Array  # []  see LearnerState
    seen: Sums  # []  what an asynchronous scheme counts, see parallel.telemetry; {} for others


class Trainer(NamedTuple):
    """Training as pure functions of one shard of one member.

    init(params_key, stream_key, hparams) -> TrainState    params_key is equal on all shards, stream_key differs
    zero_metrics() -> Metrics
    prefill(state, metrics, iteration [], hparams) -> (state, metrics)    acts at random and stores
    step(state, metrics, iteration [], hparams) -> (state, metrics)       acts, stores, learns
    refill(state, metrics, iteration [], hparams) -> (state, metrics)     a `step` that learns nothing
    part(state, metrics, iteration [], first [], last [], hparams) -> (state, metrics)    updates first <= u < last of
    a `step`, of which the one with first 0 also acts and stores: for iterations too long to wait for
    """

    init: Callable[[Key, Key, HParams], TrainState]
    zero_metrics: Callable[[], Metrics]
    prefill: Callable[[TrainState, Metrics, Array, HParams], tuple[TrainState, Metrics]]
    step: Callable[[TrainState, Metrics, Array, HParams], tuple[TrainState, Metrics]]
    part: Callable[[TrainState, Metrics, Array, Array, Array, HParams], tuple[TrainState, Metrics]]
    refill: Callable[[TrainState, Metrics, Array, HParams], tuple[TrainState, Metrics]]


def transition_example(spec: Spec, agent: Agent) -> Transition:
    """The transition that `agent` stores of an environment, as shapes [...] and dtypes without T and N. Nothing is
    traced through the environment: it may be one that JAX cannot see."""

    def block(key: Key) -> Transition:
        hparams, observation = agent.defaults, zeros_of(spec, 1)
        params, number = agent.init(key, hparams).params, jnp.zeros(1)
        action, _, extras = agent.act(params, agent.initial_carry(1), observation, key, number)
        row = Transition(observation, action, number, number, observation, jnp.zeros(1, jnp.bool_), extras)
        return as_stored(spec, agent, params, jax.tree.map(lambda x: x[None], row), key, hparams)

    shapes = jax.eval_shape(block, jax.random.key(0))
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), shapes)
    # As declared: what is a stack of frames shows in no array.
    return example._replace(observation=spec.observation, next_observation=spec.observation)


def as_stored(spec: Spec, agent: Agent, params: PyTree, block: Transition, key: Key, hparams: HParams) -> Transition:
    """A block [T, N] with its rewards clipped, after `agent.prepare`, and its actions in a byte each where they fit."""
    clipped = jnp.clip(block.reward, -hparams.reward_clip, hparams.reward_clip)
    block = agent.prepare(params, block._replace(reward=clipped), key, hparams)
    return block._replace(action=block.action.astype(jnp.uint8 if spec.num_actions <= 256 else jnp.int32))


def stream_keys(key: Key, count: Array) -> tuple[Key, Key]:
    """Two independent keys for the `count`-th ([]) turn of a loop; one draw each, and only where it is used."""
    first = 2 * count.astype(jnp.uint32)
    return jax.random.fold_in(key, first), jax.random.fold_in(key, first + 1)


class Act(Protocol):
    """The acting half of an iteration: see `make_act`."""

    def __call__(
        self, params: PyTree, actor: ActorState, key: Key, iteration: Array, first: Array | int, hparams: HParams
    ) -> tuple[ActorState, Transition, EpisodeSums, Array]:
        """(actor, block [T, N], episode sums, epsilon [])."""


class Prefill(Protocol):
    """The random half of an iteration, before anything is learned: see `make_prefill`."""

    def __call__(
        self, params: PyTree, actor: ActorState, key: Key, hparams: HParams
    ) -> tuple[ActorState, Transition, EpisodeSums]:
        """(actor, block [T, N], episode sums)."""


class Learn(Protocol):
    """The learning half of an iteration: see `make_learn`."""

    def __call__(
        self,
        learner: LearnerState,
        ring: PyTree,
        sums: Sums,
        key: Key,
        written: Array,
        iteration: Array,
        hparams: HParams,
        first: Array | int = ...,
        last: Array | int = ...,
    ) -> tuple[LearnerState, PyTree, Sums]:
        """(learner, replay, sums)."""


def make_epsilons(config: Config, total_envs: int) -> Callable[[Array, Array | int, HParams], tuple[Array, Array]]:
    """epsilons(iteration [], first [], hparams) -> (epsilon [], that of each environment [N]), as in `make_act`."""
    schedule = {"linear": exploration.linear_schedule, "exponential": exploration.exponential_schedule}[
        config.epsilon_schedule
    ]

    def epsilons(iteration: Array, first: Array | int, hparams: HParams) -> tuple[Array, Array]:
        env_steps = iteration.astype(jnp.float32) * (config.rollout_length * total_envs)
        epsilon = schedule(hparams.epsilon_begin, hparams.epsilon_end, hparams.epsilon_steps, env_steps)
        ladder = exploration.epsilon_ladder(epsilon, hparams.ladder_power, config.num_envs, first, total_envs)
        return jnp.float32(epsilon), ladder

    return epsilons


def make_act(environment: Environment, agent: Agent, config: Config, total_envs: int) -> Act:
    """The acting half of an iteration, for config.num_envs of `total_envs` environments.

    act(params, actor, key, iteration [], first [], hparams) -> (actor, block [T, N], episode sums, epsilon []); `first`
    is the index of the first of these environments, and iteration counts what all environments did together.
    """
    epsilons = make_epsilons(config, total_envs)

    def act(
        params: PyTree, actor: ActorState, key: Key, iteration: Array, first: Array | int, hparams: HParams
    ) -> tuple[ActorState, Transition, EpisodeSums, Array]:
        epsilon, ladder = epsilons(iteration, first, hparams)
        actor, block, sums = acting.rollout(environment, agent, params, actor, key, ladder, config.rollout_length)
        block = as_stored(environment.spec, agent, params, block, jax.random.fold_in(key, PREPARE), hparams)
        return actor, block, sums, epsilon

    return act


def make_prefill(environment: Environment, agent: Agent, config: Config) -> Prefill:
    """Random actions of config.num_envs environments: prefill(params, actor, key, hparams) -> (actor, block [T, N],
    episode sums)."""
    always = jnp.ones(config.num_envs)

    def prefill(
        params: PyTree, actor: ActorState, key: Key, hparams: HParams
    ) -> tuple[ActorState, Transition, EpisodeSums]:
        actor, block, sums = acting.rollout(environment, agent, params, actor, key, always, config.rollout_length)
        block = as_stored(environment.spec, agent, params, block, jax.random.fold_in(key, PREPARE), hparams)
        return actor, block, sums

    return prefill


def make_learn(agent: Agent, replay: Replay, config: Config, shards: Shards | None = None) -> Learn:
    """The learning half: U gradient updates, or those with first <= u < last.

    learn(learner, ring, sums, key, written, iteration [], hparams, first=0, last=U) -> (learner, ring, sums), `sums`
    being the metrics `update_once` gives, added up.
    """
    memory = learning.over_shards(replay, shards)

    def learn(
        learner: LearnerState,
        ring: PyTree,
        sums: Sums,
        key: Key,
        written: Array,
        iteration: Array,
        hparams: HParams,
        first: Array | int = 0,
        last: Array | int = config.updates_per_iteration,
    ) -> tuple[LearnerState, PyTree, Sums]:
        def one(index: Array, carry: tuple[LearnerState, PyTree, Sums]) -> tuple[LearnerState, PyTree, Sums]:
            learner, ring, sums = carry
            keys, progress = stream_keys(key, index), Progress(written, learner.updates, index)
            learner, ring, values = update_once(agent, memory, shards, learner, ring, progress, keys, hparams)
            return learner, ring, jax.tree.map(jnp.add, sums, values)

        # XLA inlines a loop that it knows to turn once, and then fuses the ring's write into the sample's gather: that
        # reads the ring as it was, so whole fields are copied in every iteration (a compiler sees min(iteration, 0)
        # as unknown; it is 0). optimization_barrier is dropped before fusion and does not help.
        end = last + jnp.minimum(iteration, 0)
        return jax.lax.fori_loop(first, end, one, (learner, ring, sums))

    return learn


def update_once(
    agent: Agent,
    replay: Replay,
    shards: Shards | None,
    learner: LearnerState,
    ring: PyTree,
    progress: Progress,
    keys: tuple[Key, Key],
    hparams: HParams,
) -> tuple[LearnerState, PyTree, Sums]:
    """Sample, gradient, apply: (learner, ring, the update's metrics)."""
    sample_key, loss_key = keys
    batch = replay.sample(ring, sample_key, progress, hparams)
    learner, output, gradient_norm = learning.update(agent, learner, batch, loss_key, hparams, shards)
    ring = replay.update_priorities(ring, batch.indices, output.priorities, hparams)
    return learner, ring, {"loss": output.loss, "gradient_norm": gradient_norm, **output.metrics}


def zero_metrics(agent: Agent, replay: Replay, config: Config) -> Metrics:
    """Metrics before the first iteration."""

    def values(key: Key) -> Sums:
        hparams, progress = agent.defaults, Progress(jnp.int32(config.n_step), jnp.int32(0), jnp.int32(0))
        learner = agent.init(key, hparams)
        return update_once(agent, replay, None, learner, replay.init(), progress, (key, key), hparams)[2]

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(values, jax.random.key(0)))
    episodes = EpisodeSums(jnp.int32(0), jnp.float32(0), jnp.int32(0))
    return Metrics(episodes, zeros, jnp.int32(0), jnp.float32(1), jnp.int32(-1), {})


def make_trainer(
    environment: Environment, agent: Agent, replay: Replay, config: Config, shards: Shards | None = None
) -> Trainer:
    """The trainer over given records. Environments, batch and replay of `config` are those of one shard."""
    act = make_act(environment, agent, config, config.num_envs * (shards.size if shards else 1))
    explore = make_prefill(environment, agent, config)
    learn = make_learn(agent, replay, config, shards)

    def init(params_key: Key, stream_key: Key, hparams: HParams) -> TrainState:
        stream_key, actor_key = jax.random.split(stream_key)
        actor = acting.start(environment, agent, config.num_envs, actor_key)
        return TrainState(agent.init(params_key, hparams), actor, replay.init(), stream_key)

    def store(
        state: TrainState,
        metrics: Metrics,
        iteration: Array,
        acted: tuple[ActorState, Transition, EpisodeSums],
        hparams: HParams,
    ) -> tuple[TrainState, Metrics]:
        actor, block, sums = acted
        ring = replay.add(state.replay, block, iteration * config.rollout_length, hparams)
        episodes = jax.tree.map(jnp.add, metrics.episodes, sums)
        return state._replace(actor=actor, replay=ring), metrics._replace(episodes=episodes)

    def prefill(state: TrainState, metrics: Metrics, iteration: Array, hparams: HParams) -> tuple[TrainState, Metrics]:
        metrics = metrics._replace(epsilon=jnp.float32(1), first_bad_update=state.learner.first_bad_update)
        key, _ = stream_keys(state.key, iteration)
        return store(state, metrics, iteration, explore(state.learner.params, state.actor, key, hparams), hparams)

    def act_and_store(
        state: TrainState, metrics: Metrics, iteration: Array, hparams: HParams
    ) -> tuple[TrainState, Metrics]:
        act_key, _ = stream_keys(state.key, iteration)
        first = learning.shard_index(shards) * config.num_envs
        actor, block, episodes, epsilon = act(state.learner.params, state.actor, act_key, iteration, first, hparams)
        state, metrics = store(state, metrics, iteration, (actor, block, episodes), hparams)
        return state, metrics._replace(epsilon=epsilon)

    def learn_some(
        state: TrainState, metrics: Metrics, iteration: Array, hparams: HParams, *bounds: Array
    ) -> tuple[TrainState, Metrics]:
        _, sample_key = stream_keys(state.key, iteration)
        written = (iteration + 1) * config.rollout_length
        learner, ring, sums = learn(
            state.learner, state.replay, metrics.learning, sample_key, written, iteration, hparams, *bounds
        )
        first, last = bounds or (0, config.updates_per_iteration)
        counted = metrics._replace(
            learning=sums, updates=metrics.updates + (last - first), first_bad_update=learner.first_bad_update
        )
        return state._replace(learner=learner, replay=ring), counted

    def step(state: TrainState, metrics: Metrics, iteration: Array, hparams: HParams) -> tuple[TrainState, Metrics]:
        # Write, then sample: the other order makes XLA copy the whole ring in every iteration.
        state, metrics = act_and_store(state, metrics, iteration, hparams)
        return learn_some(state, metrics, iteration, hparams)

    def part(
        state: TrainState, metrics: Metrics, iteration: Array, first: Array, last: Array, hparams: HParams
    ) -> tuple[TrainState, Metrics]:
        def act_once(_: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            return act_and_store(*carry, iteration, hparams)

        state, metrics = jax.lax.fori_loop(jnp.minimum(first, 1), 1, act_once, (state, metrics))
        return learn_some(state, metrics, iteration, hparams, first, last)

    return Trainer(init, lambda: zero_metrics(agent, replay, config), prefill, step, part, act_and_store)


def loop(
    iterate: Callable[..., tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Metrics, HParams, Array, Array], tuple[TrainState, Metrics]]:
    """`prefill` or `step`, repeated for iterations start <= i < stop: run(state, metrics, hparams, start, stop).

    Both bounds are traced, so that one compiled program serves every chunk length.
    """

    def run(
        state: TrainState, metrics: Metrics, hparams: HParams, start: Array, stop: Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.fori_loop(start, stop, lambda i, carry: iterate(*carry, i, hparams), (state, metrics))

    return run
