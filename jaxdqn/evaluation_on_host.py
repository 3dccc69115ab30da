"""Greedy episodes in environments on the host: what `evaluation.evaluate` is for those in JAX."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdqn import acting, evaluation
from jaxdqn.acting import ActorState
from jaxdqn.base import Agent, Array, Environment, HostStep, Key, PyTree
from jaxdqn.environments import host
from jaxdqn.errors import UserError
from jaxdqn.evaluation import Episodes

Watch = Callable[[PyTree, host.Guarded | None, bool], None]


class Play(Protocol):
    """Plays one episode in each of some environments."""

    def __call__(self, params: PyTree, key: Key, watch: Watch = ...) -> Episodes:
        """The episodes with these parameters; `watch` is given the observations [N, *O] of each step, also the last
        ones, the environments, or None where all of them have begun another episode, and whether the episodes begin
        here: they do again where environments failed."""


def player(
    environment: Environment, agent: Agent, num_episodes: int, max_steps: int, epsilon: float, timeout: float
) -> Play:
    """play(params, key) -> Episodes, in environments of their own that are made for it; `timeout` as in `Guarded`.

    Raises `UserError` where they fail again and again.
    """
    spec = environment.spec
    if epsilon > 0:
        agent = evaluation.sometimes_random(agent, spec.num_actions, epsilon)
    initial = agent.initial_carry(num_episodes)

    @jax.jit
    def choose(params: PyTree, state: ActorState, key: Key, step: Array) -> tuple[Array, PyTree, PyTree]:
        key = jax.random.split(jax.random.fold_in(key, step), (1, 1 + num_episodes))[0, 0]  # as a rollout's
        return agent.greedy(params, state.carry, state.observation, key)

    @jax.jit
    def follow(
        state: ActorState, episodes: Episodes, chosen: tuple[Array, PyTree, PyTree], step: HostStep
    ) -> tuple[ActorState, Episodes, PyTree]:
        timestep = host.timestep(spec, state.observation, step)
        state, row, _ = acting.followed(state, chosen, (), timestep, initial)
        return state, evaluation.extended(episodes, row, timestep.achieved), row.next_observation

    def once(params: PyTree, key: Key, watch: Watch) -> Episodes:
        start_key, step_key = jax.random.split(key)
        environments, finished = host.Guarded(environment, num_episodes, timeout), np.zeros(num_episodes, bool)
        try:
            observation = host.begun(spec, environments.reset(int(host.seed_of(start_key))))
            zeros = jnp.zeros(num_episodes, jnp.float32), jnp.zeros(num_episodes, jnp.int32)
            state, episodes = ActorState((), observation, initial, *zeros), evaluation.none_yet(num_episodes, spec)
            watch(observation, environments, True)
            for count in range(max_steps):
                chosen = choose(params, state, step_key, np.int32(count))
                step = environments.step(np.asarray(chosen[0], np.int64))
                state, episodes, produced = follow(state, episodes, chosen, step)
                finished |= step.episode_end
                watch(produced, None if finished.all() else environments, False)
                if finished.all():
                    break
        except BaseException:  # Ctrl-C and a film that cannot be drawn leave nothing behind, either
            environments.abandon()
            raise
        environments.close()
        return episodes

    def play(params: PyTree, key: Key, watch: Watch = lambda observation, of, begins: None) -> Episodes:
        cause = ""
        for _ in range(host.ATTEMPTS):
            try:
                return once(params, key, watch)
            except host.Broken as error:
                cause = str(error)
        raise UserError(f"environment {spec.name!r} failed {host.ATTEMPTS} times in an evaluation: {cause}")

    return play
