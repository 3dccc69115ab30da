"""An actor's rollouts in environments on the host, as the programs that an `ActorNode` runs.

At each step the newest frames go to the device, once, and the actions come back; stacks are put together there, and
after a rollout its block is. Environments are no part of a state, nor is what they showed last. Where an actor's stream
is not the one in which they are (of a resumed run, or after a failure), they begin new episodes, and what came before
ends as it does at a time limit.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, HostStep, Key, PyTree, TimeStep
from jaxdqn.components import Components
from jaxdqn.config import HParams
from jaxdqn.environments import host
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous.actor import Actor, ActorPrograms, compile_actor, extended, local_form
from jaxdqn.parallel.compiled.memory import once_each
from jaxdqn.parallel.compiled.runner import Program

SEEDS = 0x73656564  # far from what else is drawn of an actor's key


def actor_programs(components: Components, num_actors: int, merge_every: int) -> ActorPrograms:
    """What an actor computes, wherever its environments are."""
    compiled = compile_actor(components, num_actors, merge_every)
    if components.environment.on_host is None:
        return compiled
    hosted = HostActing(components, num_actors, merge_every)
    return compiled._replace(
        act=hosted.act, prefill=hosted.prefill, broke=hosted.broke, notes=hosted.notes, close=hosted.close
    )


class Taken(NamedTuple):
    """A rollout as it was taken, T steps of n environments.

    newest: H + T observations [n, ...], of stacks the newest frames, from H steps before the first on
    since: T times [n], steps since the episode began, no more than `host.horizon`
    chosen: T times (action [n], extras); carry [n, ...]: after the last of them
    steps: T times what the environments returned, without the observations that follow
    """

    newest: tuple[PyTree, ...]
    since: tuple[np.ndarray, ...]
    chosen: tuple[tuple[Array, PyTree], ...]
    carry: PyTree
    steps: tuple[HostStep, ...]


class HostPrograms(NamedTuple):
    """The parts of a rollout that are compiled.

    begin(actor) -> actor at the start of episodes in all environments
    plan(actor, iteration, index, hparams) -> (keys [T], epsilon of each environment [n], epsilon [])
    choose(params, carry, before, newest, since, keys [T], turn, epsilons [n]) -> (action [n], carry, extras, newest);
    `before` are the H newest observations before this one
    store(params, actor, sums, taken, hparams) -> (actor, sums), with the rollout's block
    seed(actor, attempt) -> int32 []
    """

    begin: Program
    plan: Program
    choose: Program
    store: Program
    seed: Program


@once_each
def _compile(components: Components, num_actors: int, merge_every: int) -> HostPrograms:
    config, agent, spec = components.config, components.agent, components.environment.spec
    each, length = config.num_envs // num_actors, config.rollout_length
    epsilons = training.make_epsilons(dataclasses.replace(config, num_envs=each), config.num_envs)
    initial, form = agent.initial_carry(each), local_form(components)

    def begin(actor: Actor) -> Actor:
        newest = jnp.arange(merge_every * length) == actor.acted % merge_every * length - 1  # where it is still here
        local = actor.local._replace(episode_end=actor.local.episode_end | newest[:, None])
        zeros = jnp.zeros(each, jnp.float32), jnp.zeros(each, jnp.int32)
        state = ActorState((), actor.state.observation, initial, *zeros)
        return actor._replace(state=state, local=local)

    def plan(actor: Actor, iteration: Array, index: Array, hparams: HParams) -> tuple[Key, Array, Array]:
        key, _ = training.stream_keys(actor.key, actor.acted)
        epsilon, ladder = epsilons(iteration, index * each, hparams)
        return jax.random.split(key, (length, 1 + each))[:, 0], ladder, epsilon  # those of a rollout in JAX

    def choose(
        params: PyTree,
        carry: PyTree,
        before: tuple[PyTree, ...],
        newest: PyTree,
        since: Array,
        keys: Key,
        turn: Array,
        epsilon: Array,
    ) -> tuple[Array, PyTree, PyTree, PyTree]:
        observation = jax.tree.map(lambda x: x[0], host.stacked(spec, _together((*before, newest)), since[None]))
        carry = acting.reset_where(since == 0, initial, carry)
        return *agent.act(params, carry, observation, keys[turn], epsilon), newest  # which is on the device now

    def store(
        params: PyTree, actor: Actor, sums: EpisodeSums, taken: Taken, hparams: HParams
    ) -> tuple[Actor, EpisodeSums]:
        before = host.stacked(spec, _together(taken.newest), _together(taken.since))
        steps = _together(taken.steps)
        produced = host.followed(spec, before, steps.final_observation)
        actions, extras = _together(taken.chosen)
        timesteps = TimeStep((), steps.reward, steps.discount, (), steps.episode_end)

        def follow(state: ActorState, turn: tuple[Array, TimeStep]) -> tuple[ActorState, tuple[PyTree, EpisodeSums]]:
            state, row, seen = acting.followed(state, (turn[0], (), ()), (), turn[1], ())
            return state, (row, seen)

        small = actor.state._replace(observation=(), carry=())
        state, (block, seen) = jax.lax.scan(follow, small, (actions, timesteps))
        carry = acting.reset_where(steps.episode_end[-1], initial, taken.carry)
        state = state._replace(observation=actor.state.observation, carry=carry)
        block = block._replace(observation=before, next_observation=produced, extras=extras)
        key, _ = training.stream_keys(actor.key, actor.acted)
        block = training.as_stored(spec, agent, params, block, jax.random.fold_in(key, training.PREPARE), hparams)
        sums = jax.tree.map(lambda old, new: old + jnp.sum(new, axis=0), sums, seen)
        return extended(actor, state, form(block), merge_every), sums

    def seed(actor: Actor, attempt: Array) -> Array:
        return host.seed_of(jax.random.fold_in(jax.random.fold_in(actor.key, SEEDS + attempt), actor.acted))

    return HostPrograms(
        begin=jax.jit(begin),
        plan=jax.jit(plan),
        choose=jax.jit(choose),
        store=jax.jit(store, donate_argnums=(1, 2)),
        seed=jax.jit(seed),
    )


def _together(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@dataclasses.dataclass
class Stream:
    """An actor's environments. After its first `at` iterations their `newest` observations are these, `since` steps [n]
    after their episodes began, and the H `before` them."""

    environments: host.Guarded
    at: int
    before: tuple[PyTree, ...]
    newest: PyTree
    since: np.ndarray


class HostActing:
    """`act` and `prefill` of actors whose environments are on the host, which they have here, by their index."""

    def __init__(self, components: Components, num_actors: int, merge_every: int) -> None:
        self._environment, self._config = components.environment, components.config
        self._each, self._merge_every = components.config.num_envs // num_actors, merge_every
        self._horizon = host.horizon(components.environment.spec)
        self._always = np.ones(self._each, np.float32)
        self._programs = _compile(components, num_actors, merge_every)
        self._streams: dict[int, Stream] = {}
        self._begun, self._broke = set[int](), set[int]()
        self._notes: list[str] = []
        weakref.finalize(self, _close_all, self._streams)

    def act(
        self, params: PyTree, actor: Actor, sums: EpisodeSums, hparams: HParams, iteration: Array, index: Array
    ) -> tuple[Actor, EpisodeSums, Array]:
        """One rollout with exploration, as `ActorPrograms.act`. Raises `UserError` where environments fail again and
        again."""
        keys, ladder, epsilon = self._programs.plan(actor, iteration, index, hparams)
        return *self._rollout(params, actor, sums, hparams, int(index), keys, ladder), epsilon

    def prefill(
        self, params: PyTree, actor: Actor, sums: EpisodeSums, hparams: HParams, index: Array
    ) -> tuple[Actor, EpisodeSums]:
        """One rollout of random actions, as `ActorPrograms.prefill`."""
        keys, _, _ = self._programs.plan(actor, np.int32(0), index, hparams)
        return self._rollout(params, actor, sums, hparams, int(index), keys, self._always)

    def broke(self, index: int) -> bool:
        """Whether an actor's stream broke off right after its last full local replay, where no row says so; asked
        once."""
        broke = index in self._broke
        self._broke.discard(index)
        return broke

    def notes(self) -> list[str]:
        """What there is to say of failures since this was asked last."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Closes all environments; new ones are made when they are needed."""
        _close_all(self._streams)
        self._begun.clear()

    def _rollout(
        self,
        params: PyTree,
        actor: Actor,
        sums: EpisodeSums,
        hparams: HParams,
        index: int,
        keys: Key,
        epsilons: Array | np.ndarray,
    ) -> tuple[Actor, EpisodeSums]:
        acted, cause = int(actor.acted), ""
        for attempt in range(host.ATTEMPTS):
            try:
                if index not in self._streams or self._streams[index].at != acted:
                    actor = self._begin(actor, index, acted, attempt)
                taken = self._take(params, actor, self._streams[index], keys, epsilons)
                return self._programs.store(params, actor, sums, taken, hparams)
            except host.Broken as error:
                cause = str(error)
                self._notes.append(f"the environments of actor {index} failed and are made anew: {cause}")
                self._streams.pop(index).environments.abandon()
        raise UserError(f"environment {self._config.env!r} failed {host.ATTEMPTS} times in a row: {cause}")

    def _begin(self, actor: Actor, index: int, acted: int, attempt: int) -> Actor:
        """New episodes in all environments. Nothing of this rollout has been stored; the row before it, if there is
        one, ends an episode."""
        if index not in self._streams:
            environments = host.Guarded(self._environment, self._each, self._config.env_timeout)
            self._streams[index] = Stream(environments, -1, (), (), np.zeros(self._each, np.int32))
        stream = self._streams[index]
        newest = stream.environments.reset(int(self._programs.seed(actor, np.int32(attempt))))
        # An earlier session may have been stopped before it told of its own break.
        if acted and (acted % self._merge_every == 0 or index not in self._begun):
            self._broke.add(index)
        self._begun.add(index)
        # Of what is before an episode nothing is seen.
        stream.before = (jax.device_put(newest, actor.acted.sharding),) * self._horizon
        stream.at, stream.newest, stream.since = acted, newest, np.zeros(self._each, np.int32)
        return self._programs.begin(actor)

    def _take(self, params: PyTree, actor: Actor, stream: Stream, keys: Key, epsilons: Array | np.ndarray) -> Taken:
        """T steps from where the `stream` is. Raises `Broken`."""
        newest, since, following = [*stream.before], [stream.since], stream.newest
        carry, chosen, steps = actor.state.carry, [], []
        for turn in map(np.int32, range(self._config.rollout_length)):
            before = tuple(newest[turn:])
            action, carry, extras, seen = self._programs.choose(
                params, carry, before, following, since[-1], keys, turn, epsilons
            )
            step = stream.environments.step(np.asarray(action, np.int64))
            newest.append(seen)
            chosen.append((action, extras))
            steps.append(step._replace(observation=()))
            following = step.observation
            since.append(np.where(step.episode_end, 0, np.minimum(since[-1] + 1, self._horizon)).astype(np.int32))
        stream.at, stream.newest, stream.since = stream.at + 1, following, since[-1]
        stream.before = tuple(newest[-self._horizon :])
        return Taken(tuple(newest), tuple(since[:-1]), tuple(chosen), carry, tuple(steps))


def _close_all(streams: dict[int, Stream]) -> None:
    while streams:
        streams.popitem()[1].environments.close()
