"""A fleet: one batch of members on a set of devices, as compiled programs over the one trainer.

Arrays have leading axes [D, L]: D devices with L lanes each. An agent over several devices has one shard in each
device of its group.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdqn import agents, environments, evaluation, replay, training
from jaxdqn.base import Agent, Environment, PyTree, Replay
from jaxdqn.config import Config, HParams, replay_rows
from jaxdqn.learning import Shards, shard_index
from jaxdqn.parallel import devices as _devices
from jaxdqn.parallel import population
from jaxdqn.parallel.memory import tree_bytes
from jaxdqn.parallel.population import Assignment

PARAMS_STREAM, EXPERIENCE_STREAM = 0, 1
EVALUATION_SEED = 20_150_226  # fixed: every run is judged on the same start states


class Parts(NamedTuple):
    """The records of one shard, and the configuration they were made from."""

    config: Config
    environment: Environment
    agent: Agent
    replay: Replay


class Carry(NamedTuple):
    """What passes from chunk to chunk, and is donated."""

    state: training.TrainState
    metrics: training.Metrics


class Fleet(NamedTuple):
    """Compiled programs over [D, L] arrays.

    collect, step(carry, hparams, start, stop) -> (carry, token); the token is ready when the chunk is
    evaluate(params) -> Episodes [D, L, E];  zero_metrics(metrics) -> Metrics
    """

    parts: Parts
    assignment: Assignment
    shards: int
    hparams: Any
    initial: Carry
    collect: Any
    step: Any
    evaluate: Any
    zero_metrics: Any
    compile_seconds: float


def shard_config(config: Config, shards: int) -> Config:
    """The configuration of one of an agent's shards: its part of environments, batch and replay."""
    return dataclasses.replace(
        config,
        num_envs=config.num_envs // shards,
        batch_size=config.batch_size // shards,
        replay_capacity=-(-config.replay_capacity // shards),
    )


def make_parts(config: Config, shards: int = 1) -> Parts:
    """Environment, agent and replay of one shard, from their names in `config`."""
    local = shard_config(config, shards)
    environment = environments.make(config.env, config.env_params, config.env_kwargs, config.sticky_actions)
    agent = agents.make(config, environment.spec)
    example = training.transition_example(environment, agent, HParams())
    ring = replay.uniform(example, replay_rows(local), local.num_envs, local.batch_size, local.n_step)
    return Parts(local, environment, agent, ring)


def shard_bytes(parts: Parts) -> tuple[int, int]:
    """Bytes of one shard's whole state, and of its replay alone."""
    trainer = training.make_trainer(parts.environment, parts.agent, parts.replay, parts.config)
    key = jax.random.key(0)
    return tree_bytes(jax.eval_shape(lambda k: trainer.init(k, k, HParams()), key)), tree_bytes(
        jax.eval_shape(parts.replay.init)
    )


def build(
    parts: Parts,
    devices: Sequence[jax.Device],
    devices_per_agent: int,
    assignment: Assignment,
    seeds: Sequence[int],
    settings: Sequence[HParams],
    how: population.How | None = None,
) -> Fleet:
    """Initialises the members and compiles their programs. `seeds` and `settings` are those of the assignment."""
    shards = _devices.make_shards(len(devices), devices_per_agent)
    how = how or population.fastest(devices[0].platform)
    trainer = training.make_trainer(parts.environment, parts.agent, parts.replay, parts.config, shards)
    start_time = time.perf_counter()
    carry, hparams = _initialise(trainer, devices, shards, assignment, seeds, settings, how)

    def compiled(iterate: Any) -> Any:
        loop = training.loop(iterate)

        def run(carry: Carry, hparams: Any, start: Any, stop: Any) -> Carry:
            return Carry(*loop(carry.state, carry.metrics, hparams, start, stop))

        def chunk(carry: Carry, hparams: Any, start: Any, stop: Any) -> tuple[Carry, Any]:
            return population.carry_over_lanes(run, how)(carry, hparams, start, stop), stop

        program = _devices.over_devices(chunk, devices, num_mapped=2, num_shared=2, donate=(0,))
        return program.lower(carry, hparams, np.int32(0), np.int32(1)).compile()

    def evaluate(params: PyTree) -> evaluation.Episodes:
        key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), shard_index(shards))
        config = parts.config

        def lane(params: PyTree, _: Any) -> evaluation.Episodes:
            return evaluation.evaluate(
                parts.environment, parts.agent, params, key, config.eval_episodes, config.eval_max_steps
            )

        dummy = np.zeros(assignment.num_lanes)
        return population.over_lanes(lane, how)(params, dummy)

    def zeros(metrics: training.Metrics) -> training.Metrics:
        return jax.tree.map(lambda x: x * 0, metrics)

    params = carry.state.learner.params
    return Fleet(
        parts=parts,
        assignment=assignment,
        shards=devices_per_agent,
        hparams=hparams,
        initial=carry,
        collect=compiled(trainer.collect),
        step=compiled(trainer.step),
        evaluate=_devices.over_devices(evaluate, devices, num_mapped=1).lower(params).compile(),
        zero_metrics=_devices.over_devices(zeros, devices, num_mapped=1).lower(carry.metrics).compile(),
        compile_seconds=time.perf_counter() - start_time,
    )


def _initialise(
    trainer: training.Trainer,
    devices: Sequence[jax.Device],
    shards: Shards | None,
    assignment: Assignment,
    seeds: Sequence[int],
    settings: Sequence[HParams],
    how: population.How,
) -> tuple[Carry, Any]:
    size = shards.size if shards else 1
    stacked = population.stack_hparams(list(settings))
    hparams = jax.tree.map(lambda x: assignment.spread(x, size), stacked)
    spread_seeds = assignment.spread(np.asarray(seeds, np.uint32), size)

    # Inside the mapped function: states made elsewhere would be uncommitted, and compile a second time.
    def init(seeds: Any, hparams: Any) -> tuple[Carry, Any]:
        def lane(seed: Any, hparams: Any) -> Carry:
            key = jax.random.key(seed)
            stream = jax.random.fold_in(jax.random.fold_in(key, EXPERIENCE_STREAM), shard_index(shards))
            state = trainer.init(jax.random.fold_in(key, PARAMS_STREAM), stream, hparams)
            return Carry(state, trainer.zero_metrics())

        return population.over_lanes(lane, how)(seeds, hparams), hparams

    return _devices.over_devices(init, devices, num_mapped=2)(spread_seeds, hparams)


def host(tree: PyTree) -> PyTree:
    """The arrays of a tree as NumPy, keys as their data."""

    def pull(leaf: Any) -> np.ndarray:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        # Shard by shard: indexing or converting a sharded array as a whole is slow.
        pieces = sorted(leaf.addressable_shards, key=lambda piece: piece.index[0].start or 0 if piece.index else 0)
        return np.concatenate([np.asarray(piece.data) for piece in pieces])

    return jax.tree.map(pull, tree)


def restore(template: PyTree, values: PyTree) -> PyTree:
    """The inverse of `host`: `values` with the placement and types of `template`."""

    def push(like: Any, value: np.ndarray) -> Any:
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            data = jax.device_put(value, jax.random.key_data(like).sharding)
            return jax.random.wrap_key_data(data)
        return jax.device_put(value, like.sharding)

    return jax.tree.map(push, template, values)
