"""An actor with a local replay: it acts with the parameters it is given, and hands its replay over when that is full.

A `Node` is one actor where it lives: in a thread of the learner's process, or in a process of its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, training
from jaxdqn.acting import ActorState, EpisodeSums
from jaxdqn.base import Array, Key, PyTree, Transition
from jaxdqn.config import HParams
from jaxdqn.parallel.compiled.runner import Components, on_one


class Actor(NamedTuple):
    """One actor. `acted` [] counts its iterations; local [M * T, n, ...] holds the last acted % M of them, of which the
    first was made with the parameters of broadcast `begun` []."""

    state: ActorState
    key: Key
    local: Transition
    acted: Array
    begun: Array


class Full(NamedTuple):
    """A full local replay, and the number of the broadcast with which it was begun."""

    local: Transition
    begun: int


class Programs(NamedTuple):
    """What an actor computes, compiled, each of [1, 1, ...] arrays; and the sums it starts a chunk with."""

    act: Any
    explore: Any
    copy: Any
    zeros: EpisodeSums


def start(components: Components, num_actors: int, merge_every: int, stream: Key) -> Actor:
    """An actor at the start of its `stream`, with an empty local replay."""
    key, actor_key = jax.random.split(stream)
    each = components.config.num_envs // num_actors
    example = training.transition_example(components.environment, components.agent, HParams())
    rows = merge_every * components.config.rollout_length
    local = jax.tree.map(lambda x: jnp.zeros((rows, each, *x.shape), x.dtype), example)
    state = acting.start(components.environment, components.agent, each, actor_key)
    return Actor(state, key, local, acted=jnp.int32(0), begun=jnp.int32(0))


def compile_programs(components: Components, num_actors: int, merge_every: int, device: jax.Device) -> Programs:
    """The actor's programs; jit compiles them where and when they are first called."""
    config = components.config
    each, length = config.num_envs // num_actors, config.rollout_length
    own = dataclasses.replace(config, num_envs=each)
    rollout = training.make_act(components.environment, components.agent, own, config.num_envs)
    always = jnp.ones(each)

    def store(actor: Actor, acted: ActorState, block: Transition) -> Actor:
        row = actor.acted % merge_every * length
        local = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0), actor.local, block)
        return actor._replace(state=acted, local=local, acted=actor.acted + 1)

    def act(
        params: PyTree, actor: Actor, sums: EpisodeSums, hparams: Any, iteration: Array, index: Array
    ) -> tuple[Actor, EpisodeSums, Array]:
        key, _ = training.stream_keys(actor.key, actor.acted)
        acted, block, new, epsilon = rollout(params, actor.state, key, iteration, index * each, hparams)
        return store(actor, acted, block), jax.tree.map(jnp.add, sums, new), epsilon

    def explore(params: PyTree, actor: Actor, sums: EpisodeSums) -> tuple[Actor, EpisodeSums]:
        key, _ = training.stream_keys(actor.key, actor.acted)
        acted, block, new = acting.rollout(
            components.environment, components.agent, params, actor.state, key, always, length
        )
        return store(actor, acted, block), jax.tree.map(jnp.add, sums, new)

    zero = on_one(device, lambda _: training.zero_metrics(components.agent, components.replay, config).episodes, 1)
    return Programs(
        act=on_one(device, act, 4, 2, donate=(1, 2)),
        explore=on_one(device, explore, 3, donate=(1, 2)),
        copy=on_one(device, lambda tree: jax.tree.map(jnp.copy, tree), 1),
        zeros=zero(np.zeros((1, 1), np.float32)),
    )


class Ended(NamedTuple):
    """An actor after a chunk, its sums of the chunk, and its last epsilon [1, 1] (zero where it only explored)."""

    actor: Actor
    episodes: EpisodeSums
    epsilon: Array


class Node:
    """One actor and what it did in a chunk of work."""

    def __init__(self, programs: Programs, hparams: Any, index: int, merge_every: int) -> None:
        self._programs, self._hparams, self._index, self._merge_every = programs, hparams, index, merge_every

    def begin(self, actor: Actor) -> None:
        """Takes over an actor for a chunk of iterations."""
        self._now = Ended(actor, jax.tree.map(jnp.copy, self._programs.zeros), jnp.zeros((1, 1)))
        self._acted, self._begun = (int(np.asarray(count)[0, 0]) for count in (actor.acted, actor.begun))

    def act(self, params: PyTree, version: int, iteration: int, learning: bool) -> Full | None:
        """One rollout with the parameters of broadcast `version`, into the local replay: that, where it is full now."""
        actor, episodes, epsilon = self._now
        if learning:
            new = self._programs.act(params, actor, episodes, self._hparams, np.int32(iteration), np.int32(self._index))
        else:
            new = *self._programs.explore(params, actor, episodes), epsilon
        # Waited for first: what a failing program returns is nobody's state.
        self._now = Ended(*jax.block_until_ready(new))
        if self._acted % self._merge_every == 0:
            self._begun = version
        self._acted += 1
        if self._acted % self._merge_every:
            return None
        return Full(self._programs.copy(self._now.actor.local), self._begun)  # the next rollout is given the original

    def end(self) -> Ended:
        """The actor after the chunk."""
        actor = self._now.actor
        return self._now._replace(actor=actor._replace(begun=jnp.full_like(actor.begun, self._begun)))
