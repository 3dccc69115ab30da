"""Greedy evaluation: its dice, its intervals over seeds, and what the summary of a run says of it."""

import contextlib
import dataclasses
import functools
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxdqn
from jaxdqn import agents, evaluation, fingerprints
from jaxdqn.analysis import intervals
from jaxdqn.base import Environment, Network, Spec, TimeStep
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import runner
from jaxdqn.runs import summary
from jaxdqn.runs.settings import Settings
from jaxdqn.tabular import mdp, planning

SUCCESS = 0.7402  # of FrozenLake's optimal policy within 100 steps
QUIET = Settings(progress=False, tensorboard=False, figure=False)


_programs = {}


def judged(components, params, seeds, iteration=0, part=0):
    """Episodes [seeds, E] as the runner plays them."""
    if id(components) not in _programs:
        over_seeds = jax.vmap(lambda *args: runner.greedy_episodes(components, *args), (None, 0, None, None))
        _programs[id(components)] = components, jax.jit(over_seeds)
    play = _programs[id(components)][1]
    return jax.tree.map(np.asarray, play(params, jnp.asarray(seeds, jnp.uint32), iteration, part))


@pytest.fixture(scope="module")
def lake():
    """Components of FrozenLake with an agent whose values are a table [S, A], and the optimal table."""
    components = make_components(Config(env="FrozenLake-misc", eval_episodes=20))
    table = planning.value_iteration(mdp.make("FrozenLake-4x4"), 0.999)
    network = Network(lambda key: table, lambda params, observation, key=None: observation @ params)
    return components._replace(agent=agents.dqn(network, lambda hparams: None)), table


# -- dice -------------------------------------------------------------------------------------------------------------


def test_the_interval_of_ten_optimal_policies_covers_the_truth(lake):
    returns = judged(*lake, range(10)).returns
    low, high = intervals.return_interval(returns)
    assert low <= SUCCESS <= high and high - low < 0.25
    assert len(set(returns.mean(axis=1).tolist())) > 3  # not the same 20 start states and dice for all


def test_many_episodes_have_the_optimal_success_rate(lake):
    components, table = lake
    components = components._replace(config=dataclasses.replace(components.config, eval_episodes=2_000))
    rate = judged(components, table, [0, 1]).returns.mean()
    assert abs(rate - SUCCESS) < 4 * math.sqrt(SUCCESS * (1 - SUCCESS) / 4_000)


def test_ten_seeds_of_the_random_agent_differ():
    components = make_components(Config(env="FrozenLake-misc", agent="random", eval_episodes=20))
    lengths = judged(components, (), range(10)).lengths
    low, high = intervals.mean_interval(lengths.mean(axis=1))
    assert high - low > 0.5


def test_seeds_iterations_parts_and_shards_have_their_own_episodes(lake):
    keys = [evaluation.episode_key(*each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    one, other = (judged(*lake, range(10), iteration).fingerprints for iteration in (40, 80))
    assert not np.isin(one, other).all()


def test_common_evaluation_is_the_same_for_all_seeds_and_not_for_all_iterations(lake):
    components, table = lake
    components = components._replace(config=dataclasses.replace(components.config, common_evaluation=True))
    one = judged(components, table, range(10), iteration=40)
    for leaf in jax.tree.leaves(one):
        np.testing.assert_array_equal(leaf, leaf[:1].repeat(10, axis=0))
    assert not np.array_equal(one.fingerprints, judged(components, table, range(10), iteration=80).fingerprints)


def test_deterministic_breakout_has_two_episodes_and_with_epsilon_many():
    def towards_the_ball(params, observation, key=None):
        paddle, ball = jnp.einsum("nyxc,x->cn", observation.astype(float), jnp.arange(10.0))[:2]
        return jnp.stack([jnp.zeros(len(observation)), paddle - ball, ball - paddle], axis=1)

    agent = agents.dqn(Network(lambda key: (), towards_the_ball), lambda hparams: None)
    counts = []
    for epsilon in (0.0, 0.05):
        config = Config(env="Breakout-MinAtar", eval_episodes=20, eval_max_steps=100, eval_epsilon=epsilon)
        components = make_components(config)._replace(agent=agent)
        counts.append(int(fingerprints.distinct(judged(components, (), [0]).fingerprints)[0]))
    assert counts[0] == 2 and counts[1] >= 15


@pytest.mark.parametrize("agent", ["dqn", "ensemble_dqn", "a2c", "random"])
@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_evaluation_epsilon_is_the_share_of_random_actions(agent, epsilon):
    components = make_components(Config(agent=agent, hidden_sizes=(8,)))
    params = components.agent.init(jax.random.key(0), HParams()).params
    noisy = evaluation.sometimes_random(components.agent, 2, epsilon)
    size = 4_000
    observation = jnp.ones((size, 4))
    greedy = lambda agent, seed: agent.greedy(params, (), observation, jax.random.key(seed))[0]  # noqa: E731
    changed = float(jnp.mean(greedy(noisy, 0) != greedy(components.agent, 1)))
    # Of the random actions, half are the other of two; the random agent's are all random.
    assert changed == pytest.approx(0.5 if agent == "random" else epsilon / 2, abs=0.03)


# -- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.uint8, np.int32, np.float16])
def test_fingerprints_tell_single_changes_apart(dtype):
    """2,000 observations that differ in one place or two: no two alike, in any type."""
    size, random = 60, np.random.default_rng(0)
    observations = np.zeros((size + 1_000, size), dtype)
    observations[np.arange(size), np.arange(size)] = 1
    pairs = np.array(
        sorted({tuple(sorted(pair)) for pair in random.integers(0, size, (5_000, 2)) if pair[0] != pair[1]})
    )
    for row, pair in enumerate(pairs[:1_000]):
        observations[size + row, pair] = 1
    count = len(observations)
    zeros = jnp.zeros(count, jnp.uint32), jnp.zeros(count)
    found = fingerprints.extend(zeros[0], jnp.asarray(observations), zeros[1])
    assert fingerprints.distinct(np.asarray(found)[None])[0] == count


def test_fingerprints_see_order_rewards_and_length():
    one, other, zero = jnp.ones((1, 3)), 2 * jnp.ones((1, 3)), jnp.zeros(1)

    def of(*steps):
        found = jnp.zeros(1, jnp.uint32)
        for observation, reward in steps:
            found = fingerprints.extend(found, observation, reward)
        return int(found[0])

    episodes = [
        [(one, zero), (other, zero)],
        [(other, zero), (one, zero)],
        [(one, zero), (other, zero + 1)],
        [(one, zero + 1), (other, zero)],
        [(one, zero)],
        [(one, zero), (one, zero)],
        [(one, zero), (one, zero), (one, zero)],
    ]
    assert len({of(*episode) for episode in episodes}) == len(episodes)
    assert of(*episodes[0]) == of(*episodes[0])


def test_nothing_seen_is_still_an_episode_of_some_length_and_zero_has_no_sign():
    blank, zero = jnp.zeros((1, 3)), jnp.zeros(1)
    found = [jnp.zeros(1, jnp.uint32)]
    for _ in range(9):
        found.append(fingerprints.extend(found[-1], blank, zero))
    assert len(set(np.concatenate(found).tolist())) == 10
    np.testing.assert_array_equal(fingerprints.extend(found[0], -blank, -zero), found[1])


def test_distinct_counts_each_row():
    rows = np.array([[3, 1, 3, 2], [5, 5, 5, 5]], np.uint32)
    assert fingerprints.distinct(rows).tolist() == [3, 1]
    assert fingerprints.distinct(np.zeros((2, 0), np.uint32)).tolist() == [0, 0]


def stages():
    """Episodes of three steps, of which the first and, with action 1, the second achieve something."""

    def step(key, state, action):
        done = {"outset": state[0] >= 0, "choice": state[1] | (state[0] == 1) & (action == 1)}
        end = state[0] == 2
        after = jnp.where(end, 0, state[0] + 1), jnp.where(end, False, done["choice"])
        seen = jnp.float32(state[0])[None]
        return after, TimeStep(jnp.float32(after[0])[None], jnp.float32(1), 1.0 - end, seen, end, done)

    spec = Spec("stages", jax.ShapeDtypeStruct((1,), np.float32), 2, None, ("outset", "choice"))
    return Environment(lambda key: ((jnp.int32(0), jnp.bool_(False)), jnp.zeros(1)), step, spec)


def test_what_an_episode_achieved_is_kept_while_others_go_on():
    """Here the choice ends an episode: those that did not make it take a step more."""
    plain = stages()

    def step(key, state, action):
        after, taken = plain.step(key, state, action)
        end = taken.episode_end | (taken.achieved["choice"] & (state[0] == 1))
        after = jax.tree.map(lambda x: jnp.where(end, jnp.zeros_like(x), x), after)
        seen = jnp.float32(after[0])[None]
        return after, taken._replace(episode_end=end, discount=1.0 - end, observation=seen)

    agent = make_agent(Config(agent="random"), plain.spec)
    played = evaluation.evaluate(plain._replace(step=step), agent, (), jax.random.key(0), 400, 9)
    assert set(np.asarray(played.lengths)) == {2, 3}
    np.testing.assert_array_equal(played.achieved["choice"], played.lengths == 2)


def test_what_was_achieved_counts_until_an_episodes_end():
    """Of a random agent; and an episode that the bound cuts short counts with what it had done."""
    agent = make_agent(Config(agent="random"), stages().spec)
    play = jax.jit(functools.partial(evaluation.evaluate, stages(), agent, ()), static_argnums=(1, 2))
    whole, cut = (jax.tree.map(np.asarray, play(jax.random.key(0), 4_000, steps)) for steps in (9, 1))
    assert whole.lengths.tolist() == [3] * 4_000 and whole.achieved["outset"].all()
    assert abs(whole.achieved["choice"].mean() - 0.5) < 0.04
    assert cut.achieved["outset"].all() and not cut.achieved["choice"].any()
    members = jax.tree.map(lambda x: x.reshape(2, 1, -1), whole)
    columns, finals = summary.columns(members), summary.finals([members, members], 4_000)
    assert columns["eval_achieved_outset"].tolist() == [1, 1]
    assert columns["eval_achieved_choice"].tolist() == [m.achieved["choice"] for m in finals]
    rates = {"goal": 0.25, "never": 0.0, "often": 1.0}
    assert summary.achievements(rates) == "achieved in an episode: often 1.00, goal 0.25; in none: never"
    assert summary.achievements({"goal": 0.0}) == "achieved in an episode: nothing; in none: goal"
    assert summary.achievements(dict.fromkeys("abcd", 0.0)) == "achieved in an episode: nothing; in none: 4 others"


# -- the summary ------------------------------------------------------------------------------------------------------


def episodes(returns, unfinished=0):
    """[M, shards, E] of returns [M][E]; episodes are distinct where these are."""
    returns = np.asarray(returns, np.float32)[:, None]
    finished = np.ones(returns.shape, bool)
    finished.reshape(-1)[:unfinished] = False
    return evaluation.Episodes(returns, returns.astype(int), finished, returns.view(np.uint32), {})


def rows(*members, steps=(100, 200, 300, 400, 500)):
    """Metrics of members with these evaluations."""
    return pd.DataFrame(
        {"member": member, "env_steps": step, "eval_return": value}
        for member, values in enumerate(members)
        for step, value in zip(steps, values, strict=False)
    )


def test_final_episodes_are_those_of_several_evaluations():
    found = summary.finals([episodes([[1, 2], [3, 4]]), episodes([[5, 6], [7, 8]], unfinished=1)], 3)
    assert [each.returns.tolist() for each in found] == [[1, 2, 5], [3, 4, 7]]
    assert [each.unfinished for each in found] == [1, 0]
    assert [each.distinct for each in found] == [3, 3] and found[0].returns.dtype == np.float64


def test_settings_are_never_mixed():
    frame = rows([-0.7], [-0.8], [1.0], [1.0])
    settings = [{"gamma": 0.5}, {"gamma": 0.5}, {"gamma": 0.9}, {"gamma": 0.9}]
    found = dict(enumerate(summary.finals([episodes([[-1, -0.5], [-1, -1], [1, 1], [1, 1]])], 2)))
    told = summary.returns(frame, settings, found, Config(final_episodes=2))
    assert told["final_return_mean"] is None and told["final_return_ci95"] is None
    assert told["final_return_per_member"] == [-0.75, -1.0, 1.0, 1.0]
    assert [(entry["setting"]["gamma"], entry["mean"], entry["n"]) for entry in told["final_returns"]] == [
        (0.5, -0.875, 2),
        (0.9, 1.0, 2),
    ]
    assert told["final_returns"][0]["ci95"] == intervals.mean_interval([-0.75, -1.0])
    text = summary.lines(told)
    assert text[0].startswith("gamma=0.5: final return -0.875 [") and text[0].endswith("2 seeds")
    assert text[1].startswith("gamma=0.9: final return 1.000 [0.342, 1.000]")  # two of two seeds
    json.dumps(told, allow_nan=False)


def test_one_setting_keeps_its_keys():
    found = dict(enumerate(summary.finals([episodes([[10, 20], [30, 40]])], 2)))
    told = summary.returns(rows([1], [2]), [{}, {}], found, Config(final_episodes=2))
    assert told["final_return_mean"] == 25 and told["final_return_ci95"] == intervals.mean_interval([15, 35])
    assert told["final_return_per_member"] == [15, 35]
    assert told["final_return_of"] == "2 greedy episodes of each member's kept parameters"


def test_members_without_final_episodes_are_judged_by_the_last_fifth_reached():
    frame = rows([0, 0, 0, 0, 7], [1, 2, 3])
    found = dict(enumerate(summary.finals([episodes([[50, 50]])], 2)))  # of the first alone
    told = summary.returns(frame, [{}, {}], found, Config())
    assert told["final_return_per_member"] == [7, 3]
    assert "last fifth of the 300 to 500 steps that each member reached" in told["final_return_of"]
    nothing = summary.returns(rows([math.nan]), [{}], {}, Config())
    assert nothing["final_return_mean"] is None and nothing["final_return_per_member"] == [None]
    assert summary.returns(pd.DataFrame(), [{}], {}, Config())["final_returns"] == []
    assert summary.lines(summary.returns(pd.DataFrame(), [{}], {}, Config()))


def test_common_episodes_are_no_independent_trials():
    same = [[1, 0, 1, 1]] * 3
    found = dict(enumerate(summary.finals([episodes(same)], 4)))
    frame = rows([1], [1], [1])
    apart = summary.returns(frame, [{}] * 3, found, Config(final_episodes=4))
    common = summary.returns(frame, [{}] * 3, found, Config(final_episodes=4, common_evaluation=True))
    assert apart["final_return_ci95"] == intervals.wilson_interval(9, 12)
    assert common["final_return_ci95"] == [0.75, 0.75] and "given these episodes" in common["final_return_of"]


def test_ones_that_could_have_been_minus_ones_are_no_rates():
    found = dict(enumerate(summary.finals([episodes([[1, 1], [1, 1]])], 2)))
    catch = summary.returns(rows([-0.5], [1]), [{}] * 2, found, Config(final_episodes=2))
    lake = summary.returns(rows([0.5], [1]), [{}] * 2, found, Config(final_episodes=2))
    assert catch["final_return_ci95"] == [1, 1] and catch["final_returns"][0]["interval"] == "student"
    assert lake["final_return_ci95"] == intervals.wilson_interval(2, 2)


def test_few_distinct_and_unfinished_episodes_are_said():
    equal = episodes([[4, 4, 4]], unfinished=2)
    told = summary.returns(rows([4]), [{}], dict(enumerate(summary.finals([equal], 3))), Config(final_episodes=3))
    assert told["final_returns"][0]["distinct_per_member"] == [1]
    assert told["final_returns"][0]["unfinished_per_member"] == [2]
    text = "\n".join(summary.lines(told))
    assert "only 1 of 3 episodes are distinct" in text and "2 episodes had not ended" in text


# -- runs -------------------------------------------------------------------------------------------------------------

SMALL = Config(
    num_envs=4,
    batch_size=16,
    hidden_sizes=(16,),
    replay_capacity=400,
    learning_starts=64,
    total_steps=400,
    eval_interval=100,
    eval_episodes=3,
    final_episodes=8,
    eval_max_steps=9,
    env_params={"max_steps_in_episode": 20},
)


def train(**options):
    return jaxdqn.train(SMALL, num_devices=1, **options)


@pytest.fixture(scope="module")
def population():
    """Two settings with two seeds each, and how often it was said that episodes had not ended."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        result = train(seeds=(5, 6), vary={"gamma": [0.9, 0.99]}, settings=QUIET)
    return result, said.getvalue().count("had not ended after eval_max_steps 9")


@pytest.fixture(scope="module")
def solved():
    """The last of these members alone, stopped at its first evaluation."""
    return train(seeds=(6,), hparams=HParams(gamma=0.99), settings=QUIET._replace(stop_at_return=1.0))


def played(result, member, seed):
    """The final episodes of a member, by its kept parameters: [8]."""
    params, when = jax.tree.map(lambda x: x[member], result.params), int(result.metrics.iteration.max())
    parts = [judged(result.components, params, [seed], when, part) for part in (1, 2, 3)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[0, :8], *parts)


def test_a_member_of_a_population_is_judged_as_its_own_run_is(population, solved):
    frame, alone = population[0].metrics, solved.metrics
    own = frame[(frame.member == 3) & (frame.env_steps <= alone.env_steps.max())]
    columns = [*summary.EVALUATED, "loss"]
    pd.testing.assert_frame_equal(own[columns].reset_index(drop=True), alone[columns])
    assert frame.eval_distinct.max() == 3
    assert [entry["setting"] for entry in population[0].summary["final_returns"]] == [{"gamma": 0.9}, {"gamma": 0.99}]


def test_the_final_return_is_that_of_the_parameters_that_are_kept(population, solved):
    assert solved.summary["status"] == "solved" and solved.metrics.env_steps.max() < 400
    assert solved.summary["final_return_mean"] == played(solved, 0, seed=6).returns.mean()
    finals = population[0].summary["final_return_per_member"]
    assert finals == [played(population[0], member, seed).returns.mean() for member, seed in enumerate((5, 6, 5, 6))]


def test_unfinished_episodes_are_counted_and_said_once(population):
    result, said = population
    (entry, _), one = result.summary["final_returns"], played(result, 0, seed=5)
    assert entry["unfinished_per_member"][0] == (~one.finished).sum() > 0
    assert entry["distinct_per_member"][0] == fingerprints.distinct(one.fingerprints[None])[0]
    assert result.metrics.eval_unfinished.max() > 0 and said == 1


def test_runs_of_one_seed_each_are_judged_on_episodes_of_their_own(population, monkeypatch):
    monkeypatch.setattr("jaxdqn.runs.results.evaluate_params", lambda *args: args[4])
    assert [population[0].evaluate(member=member) for member in range(4)] == [5, 6, 5, 6]


def test_evaluate_compiles_once_and_members_have_their_own_episodes(population):
    result, names = population[0], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    first = result.evaluate(episodes=5, member=0)
    count = sum("trace" in name for name in names)
    again = result.evaluate(episodes=5, member=0)
    assert sum("trace" in name for name in names) == count > 0
    np.testing.assert_array_equal(first.fingerprints, again.fingerprints)
    assert not np.array_equal(first.fingerprints, result.evaluate(episodes=5, member=1).fingerprints)
    with pytest.raises(UserError, match="epsilon is 2"):
        result.evaluate(episodes=5, epsilon=2)
