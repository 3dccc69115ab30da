"""Population-based training: who takes over from whom, how values move, and whose history a learner has."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn.sweeps import evolution, space
from jaxdqn.sweeps.sweep import PopulationBased

NAN = math.nan
SPACE = space.parse(
    {
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "gamma": {"low": 0.9, "high": 0.999},
        "target_period": {"low": 10, "high": 1000, "integer": True},
        "target_tau": [0.01, 0.1, 0.5, 1.0],
    }
)
GAMMA = space.parse({"gamma": {"low": 0.9, "high": 0.999}})
SETTINGS = PopulationBased(quantile=0.25)
SCORES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(NAN), st.just(math.inf)), min_size=1, max_size=24)


def population(count, seed=0):
    points = np.random.default_rng(seed).random((count, len(SPACE.parameters)))
    return evolution.first([SPACE.at(point) for point in points.tolist()])


def following(scores, seed=(0, 0), settings=SETTINGS):
    return evolution.following(population(len(scores)), scores, SPACE, settings, seed)


# -- who takes over from whom -----------------------------------------------------------------------------------------


def test_the_worst_take_over_from_the_best_and_nobody_else_changes():
    scores = [5.0, 1.0, 7.0, 2.0, 6.0, 3.0, 8.0, 4.0]
    before = population(8)
    after = following(scores)
    for member in (0, 2, 4, 5, 6, 7):
        assert after.parents[member] == member and after.values[member] == before.values[member]
    for member in (1, 3):
        assert after.parents[member] in (2, 6)
        parent = before.values[after.parents[member]]
        ratio = after.values[member]["learning_rate"] / parent["learning_rate"]
        assert ratio == pytest.approx(0.8) or ratio == pytest.approx(1.25)


def test_each_of_the_best_is_taken_over_from_equally_often():
    scores = [5.0, 1.0, 7.0, 2.0, 6.0, 3.0, 8.0, 4.0]
    parents = [following(scores, (seed, 0)).parents[1] for seed in range(400)]
    assert abs(parents.count(6) - 200) < 60 and parents.count(2) + parents.count(6) == 400  # six standard deviations


@given(SCORES, st.sampled_from([0.01, 0.2, 0.25, 0.5]), st.integers(0, 5))
def test_exactly_the_quantile_is_replaced_by_members_no_worse(scores, quantile, seed):
    after = following(scores, (seed, 1), PopulationBased(quantile=quantile))
    rank = [-math.inf if math.isnan(score) else score for score in scores]
    count = max(1, math.floor(round(quantile * len(scores), 6))) if len(scores) > 1 else 0
    changed = [member for member, parent in enumerate(after.parents) if parent != member]
    assert len(changed) == count
    assert sorted(rank[member] for member in changed) == sorted(rank)[:count]
    assert {rank[after.parents[member]] for member in changed} <= set(sorted(rank)[len(rank) - count :])
    # Takers and givers are apart: no learner is overwritten before it is copied.
    assert not {after.parents[member] for member in changed} & set(changed)


@pytest.mark.parametrize("quantile, members, replaced", [(0.29, 100, 29), (0.25, 8, 2), (0.25, 7, 1), (0.1, 5, 1)])
def test_the_quantile_is_rounded_down_but_replaces_somebody(quantile, members, replaced):
    after = following([float(member) for member in range(members)], settings=PopulationBased(quantile=quantile))
    assert sum(parent != member for member, parent in enumerate(after.parents)) == replaced


def test_a_score_that_is_no_number_is_the_worst():
    after = following([-1e9, NAN, 3.0, NAN, 4.0, 5.0, 6.0, 7.0])
    assert [member for member, parent in enumerate(after.parents) if parent != member] == [1, 3]


@given(SCORES, st.integers(0, 5), st.data())
def test_frozen_members_are_last_and_nobodys_parents(scores, seed, data):
    members = range(len(scores))
    frozen = data.draw(st.sets(st.sampled_from(members)))
    after = evolution.following(population(len(scores)), scores, SPACE, SETTINGS, (seed, 1), frozen)
    changed = [member for member in members if after.parents[member] != member]
    assert not {after.parents[member] for member in changed} & frozen
    count = max(1, int(0.25 * len(scores))) if len(scores) > 1 else 0
    if len(frozen) < len(scores):
        assert len(changed) == count and len(frozen.intersection(changed)) == min(count, len(frozen))


def test_a_population_of_one_stays_as_it_is():
    assert following([1.0]) == population(1) and following([NAN]) == population(1)


def test_two_members_exchange_even_with_a_small_quantile():
    assert following([1.0, 2.0]).parents == (1, 1)


def test_a_generation_follows_from_its_seed():
    scores = [float(member) for member in range(20)]
    assert following(scores, (3, 1)) == following(scores, (3, 1))
    assert following(scores, (3, 1)) != following(scores, (3, 2)) != following(scores, (4, 2))


# -- values -----------------------------------------------------------------------------------------------------------


def explored(values, seed, factors=(0.8, 1.25), searched=SPACE):
    return evolution.explored(values, searched, factors, np.random.default_rng(seed))


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4), st.integers(0, 2**32))
def test_each_value_is_its_parents_times_a_factor_inside_the_range(point, seed):
    before = SPACE.at(point)
    after = explored(before, seed)
    assert list(after) == list(before)
    for name in ("learning_rate", "gamma", "target_period"):
        domain = SPACE.parameters[SPACE.names.index(name)].domain
        moved = [before[name] * factor for factor in (0.8, 1.25)]
        if name == "gamma":
            moved = [1 - (1 - before[name]) * factor for factor in (0.8, 1.25)]
        moved = map(round, moved) if domain.integer else moved
        assert after[name] in [value for value in moved if domain.low <= value <= domain.high]
    choices = (0.01, 0.1, 0.5, 1.0)
    assert abs(choices.index(after["target_tau"]) - choices.index(before["target_tau"])) <= 1


def test_gamma_moves_by_its_distance_from_1():
    """In raw units .99 would be cut off at one end or the other, whatever the factor."""
    found = {round(explored({"gamma": 0.99}, seed, searched=GAMMA)["gamma"], 9) for seed in range(30)}
    assert found == {0.992, 0.9875}


@pytest.mark.parametrize(
    "name, low, high", [("gamma", 0.9, 0.9995), ("epsilon_end", 0.001, 0.1), ("target_tau", 0.1, 1)]
)
def test_values_do_not_gather_at_the_ends_of_their_range(name, low, high):
    searched = space.parse({name: {"low": low, "high": high}})
    values, seen = {name: high}, []
    for seed in range(300):
        values = explored(values, seed, searched=searched)
        seen.append(values[name])
    assert sum(value in (low, high) for value in seen) < 30 and len(set(np.round(seen, 6))) > 5
    assert all(low <= value <= high for value in seen)


def test_a_small_whole_number_moves_by_one():
    searched = space.parse({"target_period": {"low": 1, "high": 10}})
    found = {explored({"target_period": 2}, seed, searched=searched)["target_period"] for seed in range(30)}
    assert found == {1, 3}
    assert {explored({"target_period": 1}, seed, searched=searched)["target_period"] for seed in range(30)} == {2}


def test_a_choice_moves_down_stays_or_moves_up_equally_often():
    found = [explored(SPACE.at([0.5, 0.5, 0.5, 0.3]), seed)["target_tau"] for seed in range(900)]
    assert all(abs(found.count(value) - 300) < 85 for value in (0.01, 0.1, 0.5)) and 1.0 not in found


def test_values_stay_inside_after_many_generations():
    generation = population(8)
    random = np.random.default_rng(0)
    for index in range(60):
        generation = evolution.following(generation, random.random(8).tolist(), SPACE, SETTINGS, (0, index))
    for values in generation.values:
        for parameter in SPACE.parameters[:3]:
            assert parameter.domain.low <= values[parameter.name] <= parameter.domain.high
        assert values["target_tau"] in (0.01, 0.1, 0.5, 1.0)


def test_a_value_under_a_condition_comes_and_goes_with_it():
    searched = space.parse(
        {"target_tau": [0.1, 1.0], "target_period": {"low": 10, "high": 20, "when": {"target_tau": 1.0}}}
    )
    without = [explored({"target_tau": 0.1}, seed, searched=searched) for seed in range(30)]
    with_it = [explored({"target_tau": 1.0, "target_period": 12.0}, seed, searched=searched) for seed in range(30)]
    assert {values["target_tau"] for values in without} == {values["target_tau"] for values in with_it} == {0.1, 1.0}
    for values in without + with_it:
        assert ("target_period" in values) == (values["target_tau"] == 1.0)
    drawn = {values["target_period"] for values in without if "target_period" in values}
    assert len(drawn) > 3 and all(10 <= value <= 20 for value in drawn)
    kept = {values["target_period"] for values in with_it if "target_period" in values}
    assert sorted(kept) == pytest.approx([10.0, 15.0])  # 12 x .8 is below the range


# -- lineage ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 10_000))
def test_the_lineage_is_the_history_that_a_learner_would_carry_with_it(members, length, seed):
    random = np.random.default_rng(seed)
    generations = [population(members, seed)]
    histories = [[values] for values in generations[0].values]
    for index in range(1, length):
        scores = np.where(random.random(members) < 0.2, NAN, random.normal(size=members))
        generations.append(evolution.following(generations[-1], scores.tolist(), SPACE, SETTINGS, (seed, index)))
        parents, values = generations[-1]
        histories = [[*histories[parents[member]], values[member]] for member in range(members)]
    for member in range(members):
        assert evolution.lineage(generations, member) == histories[member]
