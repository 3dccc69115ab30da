"""An actor's rollouts in environments on the host, as the programs that an `ActorNode` runs.

At each step the newest frames go to the device, and the actions come back; stacks, local replay and sums stay there.
Environments are no part of a state. Where an actor's stream is not the one in which they are (of a resumed run, or
after a failure), they begin new episodes, and what came before ends as it does at a time limit.
"""

import dataclasses
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, HostStep, Key, PyTree
from jaxdqn.components import Components
from jaxdqn.config import HParams
from jaxdqn.environments import host
from jaxdqn.errors import UserError
from jaxdqn.parallel.asynchronous.actor import Actor, ActorPrograms, compile_actor
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


class HostPrograms(NamedTuple):
    """The parts of a rollout that are compiled.

    begin(actor, observation) -> actor at the start of episodes in all environments
    plan(actor, iteration, index, hparams) -> (keys [T], epsilon of each environment [n], epsilon [])
    choose(params, state, keys [T], turn, epsilons [n]) -> (action [n], carry, extras)
    store(params, actor, sums, chosen, HostStep, keys [T], turn, hparams) -> (actor, sums), with one row more
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

    def begin(actor: Actor, observation: PyTree) -> Actor:
        newest = jnp.arange(merge_every * length) == actor.acted % merge_every * length - 1  # where it is still here
        local = actor.local._replace(episode_end=actor.local.episode_end | newest[:, None])
        zeros = jnp.zeros(each, jnp.float32), jnp.zeros(each, jnp.int32)
        state = ActorState((), host.begun(spec, observation), agent.initial_carry(each), *zeros)
        return actor._replace(state=state, local=local)

    def plan(actor: Actor, iteration: Array, index: Array, hparams: HParams) -> tuple[Key, Array, Array]:
        key, _ = training.stream_keys(actor.key, actor.acted)
        epsilon, ladder = epsilons(iteration, index * each, hparams)
        return jax.random.split(key, (length, 1 + each))[:, 0], ladder, epsilon  # those of a rollout in JAX

    def choose(
        params: PyTree, state: ActorState, keys: Key, turn: Array, epsilon: Array
    ) -> tuple[Array, PyTree, PyTree]:
        return agent.act(params, state.carry, state.observation, keys[turn], epsilon)

    def store(
        params: PyTree,
        actor: Actor,
        sums: EpisodeSums,
        chosen: tuple[Array, PyTree, PyTree],
        step: HostStep,
        keys: Key,
        turn: Array,
        hparams: HParams,
    ) -> tuple[Actor, EpisodeSums]:
        timestep = host.timestep(spec, actor.state.observation, step)
        state, row, seen = acting.followed(actor.state, chosen, (), timestep, agent.initial_carry(each))
        row = jax.tree.map(lambda x: x[None], row)
        row = training.as_stored(spec, agent, params, row, jax.random.fold_in(keys[turn], training.PREPARE), hparams)
        at = actor.acted % merge_every * length + turn
        local = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0), actor.local, row)
        acted = actor.acted + (turn == length - 1)
        return actor._replace(state=state, local=local, acted=acted), jax.tree.map(jnp.add, sums, seen)

    def seed(actor: Actor, attempt: Array) -> Array:
        return host.seed_of(jax.random.fold_in(jax.random.fold_in(actor.key, SEEDS + attempt), actor.acted))

    return HostPrograms(
        begin=jax.jit(begin),
        plan=jax.jit(plan),
        choose=jax.jit(choose),
        store=jax.jit(store, donate_argnums=(1,)),
        seed=jax.jit(seed),
    )


class HostActing:
    """`act` and `prefill` of actors whose environments are on the host, which they have here, by their index."""

    def __init__(self, components: Components, num_actors: int, merge_every: int) -> None:
        self._environment, self._config = components.environment, components.config
        self._each, self._merge_every = components.config.num_envs // num_actors, merge_every
        self._programs = _compile(components, num_actors, merge_every)
        self._environments: dict[int, host.Guarded] = {}
        self._at: dict[int, int] = {}  # actor -> its iterations so far, in whose stream its environments are
        self._broke = set[int]()
        self._notes: list[str] = []
        weakref.finalize(self, _close_all, self._environments)

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
        keys, ladder, _ = self._programs.plan(actor, np.int32(0), index, hparams)
        return self._rollout(params, actor, sums, hparams, int(index), keys, jnp.ones_like(ladder))

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
        _close_all(self._environments)
        self._at.clear()

    def _rollout(
        self,
        params: PyTree,
        actor: Actor,
        sums: EpisodeSums,
        hparams: HParams,
        index: int,
        keys: Key,
        epsilons: Array,
    ) -> tuple[Actor, EpisodeSums]:
        acted, cause = int(actor.acted), ""
        for attempt in range(host.ATTEMPTS):
            try:
                if self._at.get(index) != acted:
                    actor = self._begin(actor, index, acted, attempt)
                environments = self._environments[index]
                for turn in map(np.int32, range(self._config.rollout_length)):
                    chosen = self._programs.choose(params, actor.state, keys, turn, epsilons)
                    step = environments.step(np.asarray(chosen[0], np.int64))
                    actor, sums = self._programs.store(params, actor, sums, chosen, step, keys, turn, hparams)
                self._at[index] = acted + 1
                return actor, sums
            except host.Broken as error:
                cause = str(error)
                self._notes.append(f"the environments of actor {index} failed and are made anew: {cause}")
                self._at.pop(index, None)
                if broken := self._environments.pop(index, None):
                    broken.abandon()
        raise UserError(f"environment {self._config.env!r} failed {host.ATTEMPTS} times in a row: {cause}")

    def _begin(self, actor: Actor, index: int, acted: int, attempt: int) -> Actor:
        """New episodes in all environments. Rows of this rollout are written again, and the one before them, if there
        is one, ends an episode."""
        if index not in self._environments:
            self._environments[index] = host.Guarded(self._environment, self._each, self._config.env_timeout)
        newest = self._environments[index].reset(int(self._programs.seed(actor, np.int32(attempt))))
        if acted and acted % self._merge_every == 0:
            self._broke.add(index)
        self._at[index] = acted
        return self._programs.begin(actor, newest)


def _close_all(environments: dict[int, host.Guarded]) -> None:
    while environments:
        environments.popitem()[1].close()
