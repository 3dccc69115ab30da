"""`Result`: what a run leaves, and what is done with it: evaluate, watch, plot; and `load` from its directory."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxdqn import acting, evaluation, evaluation_on_host
from jaxdqn.base import Agent, Environment, Key, PyTree
from jaxdqn.components import Components, make_components
from jaxdqn.config import MOST_EPISODES, UINT32_MAX, Config, HParams, check_probability, check_whole, members, varying
from jaxdqn.environments.host import Guarded
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.files.documents import Fields
from jaxdqn.runs import checkpoints, directory, metrics, rendering, reporting
from jaxdqn.runs.directory import RunDirectory

MAX_WATCHED = 2_500  # steps of an episode that is drawn


@dataclasses.dataclass
class Result:
    """A run: `metrics` has one row per member and logging point, `params` leaves have a leading axis [M].

    `read_metrics` is called when they are first wanted: what needs only parameters does not depend on them.
    """

    read_metrics: Callable[[], pd.DataFrame]
    params: PyTree
    summary: Fields
    config: Config
    members: list[tuple[int, HParams]]
    components: Components
    varying: tuple[str, ...] = ()
    path: pathlib.Path | None = None

    @functools.cached_property
    def metrics(self) -> pd.DataFrame:
        return self.read_metrics()

    def plot(self) -> Any:
        """Learning curves, as a matplotlib figure."""
        title = f"{self.config.agent} on {self.config.env}"
        return reporting.plot(self.metrics, title, self.varying)

    def evaluate(
        self, episodes: int = 100, member: int = 0, seed: int = 1, epsilon: float | None = None
    ) -> evaluation.Episodes:
        """Greedy episodes of one member on fresh start states: NumPy arrays [episodes]. Actions are random with
        probability `epsilon`, by default the configuration's; each of a run's seeds has its own episodes, unless its
        configuration says that they are common."""
        params = member_params(self, member)
        own = 0 if self.config.common_evaluation else self.members[member][0]
        return evaluate_params(self.components, params, episodes, seed, own, epsilon)


def member_params(result: Result, member: int) -> PyTree:
    """One member's parameters. Raises `UserError` for a member there is not."""
    check_whole("member", member, 0)
    if member >= len(result.members):
        raise UserError(f"member {member} does not exist; the run has members 0 to {len(result.members) - 1}.")
    begun = len(jax.tree.leaves(result.params)[0]) if jax.tree.leaves(result.params) else len(result.members)
    if member >= begun:
        raise UserError(f"member {member} has not begun to train; members 0 to {begun - 1} have: go on with --resume.")
    return jax.tree.map(lambda x: jnp.asarray(x[member]), result.params)


def evaluate_params(
    components: Components, params: PyTree, episodes: int, seed: int, stream: int = 0, epsilon: float | None = None
) -> evaluation.Episodes:
    """Greedy episodes with given parameters, as NumPy arrays [episodes]; each `stream` of a seed has its own."""
    epsilon = components.config.eval_epsilon if epsilon is None else epsilon
    check_whole("episodes", episodes, most=MOST_EPISODES)
    check_whole("seed", seed, 0, UINT32_MAX)
    check_probability("epsilon", epsilon)
    bounds = components.config.eval_max_steps, float(epsilon), components.config.env_timeout
    # On the host as many at once as a run judges: each may be a process.
    each = episodes if components.environment.on_host is None else min(episodes, components.config.eval_episodes)
    run = _evaluator(components.environment, components.agent, each, *bounds)
    key = jax.random.fold_in(jax.random.key(seed), stream)
    keys = [key, *(jax.random.fold_in(key, part) for part in range(1, -(-episodes // each)))]
    parts = [jax.tree.map(np.asarray, run(params, key)) for key in keys]
    return jax.tree.map(lambda *x: np.concatenate(x)[:episodes], *parts)


@functools.lru_cache(maxsize=8)  # or every call would compile anew
def _evaluator(
    environment: Environment, agent: Agent, episodes: int, max_steps: int, epsilon: float, timeout: float
) -> Any:
    """`evaluation.evaluate` of (params, key), compiled when it is first called."""
    if environment.on_host is not None:
        return evaluation_on_host.player(environment, agent, episodes, max_steps, epsilon, timeout)
    return jax.jit(
        lambda params, key: evaluation.evaluate(environment, agent, params, key, episodes, max_steps, epsilon)
    )


def watch(result: Result, member: int, seed: int) -> PyTree:
    """The observations of one greedy episode, arrays [L, *O], as stored. Raises `UserError`."""
    return filmed(result, member, seed)[0]


def filmed(result: Result, member: int, seed: int) -> tuple[PyTree, PyTree]:
    """(what `watch` gives, what is to be drawn of it): the same, or pictures uint8 [L, h, w, 3] by environments that
    draw themselves. Raises `UserError`."""
    check_whole("seed", seed, 0, UINT32_MAX)
    components, environment = result.components, result.components.environment
    params = member_params(result, member)
    bound = min(environment.spec.max_episode_steps or MAX_WATCHED, MAX_WATCHED)

    if environment.on_host is not None:
        return _filmed_on_host(components, params, bound, seed)

    @jax.jit
    def run(key: Key) -> PyTree:
        start_key, step_key = jax.random.split(key)
        actor, agent = acting.start(environment, components.agent, 1, start_key), acting.greedily(components.agent)
        block = acting.rollout(environment, agent, params, actor, step_key, jnp.zeros(1), bound)[1]
        return jax.tree.map(lambda x: x[:, 0], (block.observation, block.next_observation, block.episode_end))

    before, after, end = jax.tree.map(np.asarray, run(jax.random.key(seed)))
    length = int(end.argmax()) + 1 if end.any() else bound
    observations = jax.tree.map(lambda x, y: np.concatenate([x[:length], y[length - 1 : length]]), before, after)
    return observations, observations


def _filmed_on_host(components: Components, params: PyTree, bound: int, seed: int) -> tuple[PyTree, PyTree]:
    observations: list[PyTree] = []
    pictures: list[np.ndarray] = []

    def film(observation: PyTree, environments: Guarded | None, begins: bool) -> None:
        if begins:  # also after an attempt that failed
            observations.clear()
            pictures.clear()
        observations.append(jax.tree.map(np.asarray, observation))
        picture = environments.render() if environments else None
        if picture is not None:
            pictures.append(rendering.reduced(picture))
        elif pictures and environments is None:  # of the episode's end there is none
            pictures.append(pictures[-1])

    timeout = components.config.env_timeout
    play = evaluation_on_host.player(components.environment, components.agent, 1, bound, 0.0, timeout)
    play(params, jax.random.key(seed), film)
    together = jax.tree.map(lambda *x: np.concatenate(x), *observations)
    return together, np.stack(pictures) if pictures else together


def expected_returns(result: Result, member: int, observations: PyTree) -> tuple[np.ndarray, np.ndarray] | None:
    """The distribution of the return that a member expects of its greedy action: (returns [L, K], of unscaled rewards,
    probabilities [L, K]), of observations [L, *O]; None where the agent learns none. Raises `UserError`."""
    agent, params = result.components.agent, member_params(result, member)
    if agent.distribution is None:
        return None
    returns, probabilities = jax.jit(agent.distribution)(params, observations, result.members[member][1])
    start = agent.initial_carry(len(returns)), observations, jax.random.key(0)
    best = jax.jit(agent.greedy)(params, *start)[0][:, None, None]
    taken = [jnp.take_along_axis(x, best, axis=1)[:, 0] for x in (returns, probabilities)]
    scale = float(result.members[member][1].reward_scale)
    return np.asarray(taken[0]) / (scale or 1.0), np.asarray(taken[1])


def write(result: Result, run_directory: RunDirectory, figure: bool, say: Callable[[str], None]) -> None:
    """Writes summary.json and, where wanted, curves.png."""
    run_directory.write_summary(result.summary)
    if figure and len(result.metrics):
        try:
            reporting.save_figure(result.plot(), run_directory.path / "curves.png")
        except (UserError, OSError) as error:  # what was trained is worth more than its picture
            say(f"warning: no curves: {error}")


def load(path: str | pathlib.Path) -> Result:
    """The run in a directory, from its newest good checkpoints and summary; its metrics are read once they are asked
    for. Raises `UserError`."""
    path = paths.expanded(path)
    spec, _ = directory.load(path)
    components = make_components(spec.config, spec.devices_per_agent)
    everyone = members(spec.hparams, spec.seeds, spec.vary)
    template = jax.eval_shape(lambda: components.agent.init(jax.random.key(0), components.agent.defaults).params)
    pieces = []
    for batch in range(-(-len(everyone) // spec.members_per_batch)):
        found, warnings = checkpoints.newest(path / "checkpoints", batch)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if found is None:
            break
        size = min(spec.members_per_batch, len(everyone) - batch * spec.members_per_batch)
        prefix = "policy/" if any(name.startswith("policy/") for name in found.arrays) else "state/learner/params/"
        arrays = {name: x[:, 0] for name, x in found.arrays.items() if name.startswith(prefix)}
        lanes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), template)
        pieces.append(checkpoints.fill(lanes, arrays, prefix))
    if not pieces:
        raise UserError(f"{path} has no readable checkpoint yet.")
    params = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
    read_metrics = functools.partial(metrics.read, path / "metrics.parquet")
    summary = directory.summary(path)
    return Result(read_metrics, params, summary, spec.config, everyone, components, varying(spec.vary), path)


def read_params(path: pathlib.Path, member: int) -> dict[str, np.ndarray]:
    """The parameters of one member of the run in `path`, by their paths in the tree. Raises `UserError`."""
    params = member_params(load(path), member)
    return {name: np.asarray(leaf) for name, leaf in checkpoints.named(params).items()}
