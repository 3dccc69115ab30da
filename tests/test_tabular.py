"""The tabular part against gymnax's own steps, closed forms, a linear solve, and value iteration."""

import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import gymnax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import scipy.stats
import scripts

from jaxdqn.errors import UserError
from jaxdqn.runs import cli, progress
from jaxdqn.tabular import distributed as dist
from jaxdqn.tabular import drawing, dynamics, mdp, method, planning
from jaxdqn.tabular import partitioned as part
from jaxdqn.tabular import q_learning as ql

SCRIPT = pathlib.Path(__file__).parent.parent / "experiments" / "tabular.py"
GAMMA, OMEGA, KEY = 0.95, ql.OMEGA, jax.random.key(0)
GRIDS = ("FrozenLake-4x4", "FrozenLake-8x8", "FourRooms")
CLOSE = 0.05  # max-norm distance to value iteration, where values reach 1
SIGNIFICANCE = 1e-3  # keys are fixed: a test passes always or never


@functools.cache
def made(name):
    return mdp.make(name)


@functools.cache
def optimal(name, gamma):
    return planning.value_iteration(made(name), gamma)


def error_after(name, gamma, way, num_rounds):
    state = method.run(way, way.init(), KEY, 0, num_rounds, made(name))
    return float(planning.max_error(way.table(state).q, optimal(name, gamma), made(name).terminal))


def regions(owner):
    return np.asarray(owner) == np.arange(max(owner) + 1)[:, None]


def everywhere(name, workers):
    return np.ones((workers, len(made(name).terminal)), bool)


def assert_same(left, right):
    """Bitwise, leaf by leaf."""
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- MDPs


@pytest.mark.parametrize("name", mdp.NAMES)
def test_rows_are_distributions_and_terminal_states_stay(name):
    m = made(name)
    np.testing.assert_allclose(m.transition.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(m.start.sum(), 1.0)
    for state in np.flatnonzero(m.terminal):
        assert (m.transition[state, :, state] == 1).all() and not m.reward[state].any()
    assert (m.cumulative[..., -1] == 1).all() and (np.diff(m.cumulative) >= 0).all()


def row(m, state, action):
    """The possible next states: {state: (probability, reward)}."""
    possible = np.flatnonzero(m.transition[state, action])
    return {int(t): (float(m.transition[state, action, t]), float(m.reward[state, action, t])) for t in possible}


def assert_row(found, expected):
    assert found.keys() == expected.keys()
    for state, values in expected.items():
        assert found[state] == pytest.approx(values, abs=1e-6)


def test_frozen_lake_by_hand():
    left, down, right, _ = range(4)
    m = made("FrozenLake-4x4")
    assert np.flatnonzero(m.terminal).tolist() == [5, 7, 11, 12, 15] and m.start[0] == 1
    assert_row(row(m, 0, left), {0: (2 / 3, 0.0), 4: (1 / 3, 0.0)})
    assert_row(row(m, 14, right), {14: (1 / 3, 0.0), 15: (1 / 3, 1.0), 10: (1 / 3, 0.0)})
    assert_row(row(m, 6, down), {10: (1 / 3, 0.0), 5: (1 / 3, 0.0), 7: (1 / 3, 0.0)})
    sure = mdp.from_dynamics(dynamics.frozen_lake(slippery=False))
    assert_row(row(sure, 14, right), {15: (1.0, 1.0)})


def test_four_rooms_by_hand():
    up, right, _, _ = range(4)
    m, cells = made("FourRooms"), mdp.cells("FourRooms").tolist()
    at = lambda *cell: cells.index(list(cell))  # noqa: E731
    assert len(cells) == 104 and m.start[at(4, 1)] == 1 and np.flatnonzero(m.terminal).tolist() == [at(8, 9)]
    # A wall to the left; a failed move goes to each of the three others with 1/9.
    others = {at(4, 2): (1 / 9, 0.0), at(5, 1): (1 / 9, 0.0), at(4, 1): (1 / 9, 0.0)}
    assert_row(row(m, at(4, 1), up), {at(3, 1): (2 / 3, 0.0), **others})
    into_goal = row(m, at(8, 8), right)
    assert into_goal[at(8, 9)] == pytest.approx((2 / 3, 1.0))
    with pytest.raises(UserError, match="goal"):
        dynamics.four_rooms((0, 0))


def test_deep_sea_by_hand():
    size, cost = 5, 0.01 / 5
    m = mdp.from_dynamics(dynamics.deep_sea(size))
    right = np.asarray(gymnax.make("DeepSea-bsuite", size=size)[0].action_mapping)
    end = size * size
    assert m.transition.shape == (end + 1, 2, end + 1) and np.flatnonzero(m.terminal).tolist() == [end]
    assert_row(row(m, 0, right[0, 0]), {size + 1: (1.0, -cost)})
    assert_row(row(m, 0, 1 - right[0, 0]), {size: (1.0, 0.0)})
    assert_row(row(m, end - 1, right[-1, -1]), {end: (1.0, 1.0 - cost)})
    # Right all the way: 1 - 0.01 at the end, undiscounted; here the k-th step is discounted by gamma^k.
    value = GAMMA ** (size - 1) - sum(cost * GAMMA**k for k in range(size))
    assert float(planning.value_iteration(m, GAMMA)[0].max()) == pytest.approx(value, abs=1e-5)
    for wrong in (1, 41):
        with pytest.raises(UserError, match="size"):
            dynamics.deep_sea(wrong)


def four_rooms_step(env, params, cells):
    index = np.zeros((14, 14), np.int32)
    index[tuple(cells.T)] = np.arange(len(cells))
    place = lambda first, cell: first.replace(pos=cell)  # noqa: E731
    return env, params, place, lambda observation: jnp.asarray(index)[observation[0], observation[1]]


def stepper(name):
    """(env, its parameters, how to put the agent in a cell, the state's number from an observation)."""
    cells = mdp.cells(name)
    if name == "FourRooms":
        return four_rooms_step(*gymnax.make("FourRooms-misc"), cells)
    if name == "DeepSea":
        env, params = gymnax.make("DeepSea-bsuite", size=8)
        place = lambda first, cell: first.replace(row=cell[0], column=cell[1])  # noqa: E731
        return env, params, place, lambda seen: jnp.where(seen.any(), jnp.argmax(seen), 64)
    env, params = gymnax.make("FrozenLake-misc", map_name=name[-3:])
    width = int(name[-1])
    return env, params, lambda first, cell: first.replace(position=cell[0] * width + cell[1]), lambda seen: seen


@pytest.mark.parametrize("name", [*GRIDS, "DeepSea"])
def test_arrays_are_what_gymnax_steps_do(name):
    draws = 300
    m, (env, params, place, number) = made(name), stepper(name)
    first = env.reset(KEY, params)[1]

    def sample(key, cell, action):
        _, _, reward, terminated, _, info = env.step(key, place(first, cell), action, params)
        return number(info["final_observation"]), jnp.asarray(reward, jnp.float32), terminated

    states = np.flatnonzero(~np.asarray(m.terminal))
    over_actions = jax.vmap(sample, (0, None, 0))
    over_states = jax.vmap(over_actions, (0, 0, None))
    over_draws = jax.jit(jax.vmap(over_states, (0, None, None)))
    actions = jnp.arange(env.num_actions)
    keys = jax.random.split(KEY, (draws, len(states), env.num_actions))
    reached, reward, terminated = map(np.asarray, over_draws(keys, jnp.asarray(mdp.cells(name)[states]), actions))

    source = np.broadcast_to(states[:, None], reached.shape[1:])
    taken = np.broadcast_to(actions, reached.shape[1:])
    assert (np.asarray(m.transition)[source, taken, reached] > 0).all()
    np.testing.assert_allclose(np.asarray(m.reward)[source, taken, reached], reward, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(m.terminal)[reached], terminated)

    expected = draws * np.asarray(m.transition, np.float64)[states]
    found = np.stack([(reached == t).sum(axis=0) for t in range(len(m.terminal))], axis=-1)
    possible = expected > 0
    statistic = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - possible.any(-1).sum()
    assert freedom == 0 or scipy.stats.chi2.sf(statistic, freedom) > SIGNIFICANCE
    assert found.sum() == expected.sum().round()


def test_step_draws_from_its_row():
    m, draws = made("Random"), 5000
    keys = jax.random.split(KEY, draws)
    result = jax.vmap(mdp.step, (0, None, None, None))(keys, m, 3, 2)
    found, expected = np.bincount(result.next_state, minlength=50), draws * np.asarray(m.transition[3, 2], np.float64)
    assert not found[expected == 0].any()
    _, p = scipy.stats.chisquare(found[expected > 0], expected[expected > 0] * draws / expected.sum())
    assert p > SIGNIFICANCE
    np.testing.assert_array_equal(result.discount, 1.0 - np.asarray(m.terminal)[result.next_state])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_extremes_of_a_draw_are_possible(uniform):
    m = made("Random")
    last = jnp.float32(uniform)
    pairs = jnp.indices(m.reward.shape[:2]).reshape(2, -1)
    reached = jax.vmap(lambda s, a: mdp.outcome(last, m, s, a).next_state)(*pairs)
    assert (m.transition[pairs[0], pairs[1], reached] > 0).all()


def chain(length, reward=1.0):
    """0 -> 1 -> ... -> length (terminal), one action; the last step pays."""
    transition = np.eye(length + 1, k=1)[:, None]
    transition[-1, 0, -1] = 1.0
    paid = np.zeros((length + 1, 1))
    paid[-2] = reward
    return mdp.from_arrays(transition, paid, np.arange(length + 1) == length, np.eye(length + 1)[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"transition": np.ones((2, 3))}, "transition has shape"),
        ({"reward": np.ones(3)}, "reward has shape"),
        ({"start": np.ones(3) / 3}, "start"),
        ({"transition": np.ones((2, 1, 2))}, "sum to 1"),
        ({"start": np.array([1.5, -0.5])}, "sum to 1"),
        ({"reward": np.array([[np.nan], [0.0]])}, "finite"),
        ({"reward": np.ones((2, 1))}, "terminal state"),
        ({"terminal": np.array([True, True])}, "every state"),
    ],
)
def test_arrays_that_are_no_mdp(changes, words):
    good = {"transition": np.eye(2, k=1)[:, None] + [[[0, 0]], [[0, 1]]], "reward": np.array([[1.0], [0.0]])}
    good |= {"terminal": np.array([False, True]), "start": np.array([1.0, 0.0])}
    mdp.from_arrays(**good)
    with pytest.raises(UserError, match=words):
        mdp.from_arrays(**{**good, **changes})


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'FourRooms'"):
        mdp.make("FourRoom")
    with pytest.raises(UserError, match="branches"):
        mdp.random_mdp(0, 3, 2, 4)
    with pytest.raises(UserError, match="did you mean 'visits'"):
        dist.weights(jnp.ones((1, 2, 2)), "visit")
    with pytest.raises(UserError, match="owns"):
        dist.weights(jnp.ones((1, 2, 2)), "indicator")


# --- Value iteration


def test_chains_in_closed_form():
    found = planning.value_iteration(chain(6), 0.9)
    np.testing.assert_allclose(found[:, 0], [*0.9 ** np.arange(5, -1, -1), 0.0], rtol=1e-6)
    loop = mdp.from_arrays(np.ones((1, 1, 1)), np.ones((1, 1)), np.array([False]), np.ones(1))
    np.testing.assert_allclose(planning.value_iteration(loop, 0.99), 100.0, rtol=1e-5)
    np.testing.assert_allclose(planning.value_iteration(loop, 0.0), 1.0)


def test_frozen_lake_values_as_published():
    for gamma, value in ((0.9, 0.068891), (0.95, 0.180472), (0.99, 0.542026)):
        assert float(optimal("FrozenLake-4x4", gamma)[0].max()) == pytest.approx(value, abs=2e-5)
    sure = mdp.from_dynamics(dynamics.frozen_lake(slippery=False))
    for gamma, value in ((0.9, 0.590490), (0.95, 0.773781), (0.99, 0.950990)):
        assert float(planning.value_iteration(sure, gamma)[0].max()) == pytest.approx(value, abs=2e-5)


def policy_values(m, policy, gamma):
    """V of a deterministic policy [S], by a linear solve in float64; 0 at terminal states."""
    states = np.arange(len(policy))
    goes = np.asarray(m.transition, np.float64)[states, policy]
    pays = (goes * np.asarray(m.reward)[states, policy]).sum(-1)
    onward = np.where(m.terminal, 0.0, goes)  # nothing is gained from a terminal state on
    return np.where(m.terminal, 0.0, np.linalg.solve(np.eye(len(policy)) - gamma * onward, pays))


def assert_optimal(m, gamma, tolerance):
    q = np.asarray(planning.value_iteration(m, gamma), np.float64)
    values = policy_values(m, q.argmax(axis=1), gamma)
    np.testing.assert_allclose(q.max(axis=1), values, atol=tolerance)
    # No other action is better: its policy's value satisfies the optimality equation.
    p, r = np.asarray(m.transition, np.float64), np.asarray(m.reward, np.float64)
    better = (p * (r + gamma * np.where(m.terminal, 0.0, values))).sum(-1)
    np.testing.assert_allclose(better, q, atol=tolerance)


@pytest.mark.parametrize("name", mdp.NAMES)
@pytest.mark.parametrize("gamma", [0.95, 0.99])
def test_value_iteration_against_a_linear_solve(name, gamma):
    largest = float(jnp.abs(made(name).reward).max()) / (1 - gamma)
    assert_optimal(made(name), gamma, 2e-6 * largest)


@hypothesis.given(seed=st.integers(0, 1000), gamma=st.sampled_from([0.0, 0.5, 0.9]))
def test_random_mdps_against_a_linear_solve(seed, gamma):
    assert_optimal(mdp.random_mdp(seed, 12, 3, 4), gamma, 2e-5)


@pytest.mark.parametrize("gamma", [1.0, -0.1, float("nan")])
def test_gamma_is_a_discount(gamma):
    with pytest.raises(UserError, match="gamma"):
        planning.value_iteration(chain(2), gamma)
    with pytest.raises(UserError, match="gamma"):
        ql.q_learning(chain(2), gamma)


# --- Plain Q-learning


def batch_of(m, size, seed=0):
    return ql.explore(jax.random.key(seed), m, ql.everywhere(m), size)


def test_updates_against_a_python_loop():
    m = mdp.random_mdp(1, 6, 2, 3)  # 10 pairs, 200 transitions: duplicates abound
    batch = batch_of(m, 200)
    table = ql.apply_transitions(ql.empty(m), batch, GAMMA, OMEGA)
    q, counts = np.zeros((6, 2)), np.zeros((6, 2))
    for s, a, r, discount, t, _ in zip(*map(np.asarray, batch), strict=True):
        counts[s, a] += 1
        q[s, a] += counts[s, a] ** -OMEGA * (r + GAMMA * discount * q[t].max() - q[s, a])
    np.testing.assert_allclose(table.q, q, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(table.counts, counts)


def test_terminal_targets_are_the_reward_and_a_view_is_used_only_where_foreign():
    full = ql.Table(jnp.full((3, 1), 100.0), jnp.zeros((3, 1)))
    item = lambda s, t, r, d: ql.Transitions(*map(jnp.asarray, ([s], [0], [r], [d], [t], [True])))  # noqa: E731
    last = ql.apply_transitions(full, item(1, 2, 3.0, 0.0), 0.9, OMEGA)  # the first step size is 1
    assert float(last.q[1, 0]) == 3.0
    view = ql.View(jnp.full((3, 1), 10.0), jnp.array([False, True, False]))
    seen = ql.apply_transitions(full, item(0, 1, 0.0, 1.0), 0.9, OMEGA, view)
    own = ql.apply_transitions(full, item(0, 1, 0.0, 1.0), 0.9, OMEGA, view._replace(foreign=jnp.zeros(3, bool)))
    assert float(seen.q[0, 0]) == pytest.approx(9.0) and float(own.q[0, 0]) == pytest.approx(90.0)


def test_exploring_starts_are_uniform_over_pairs_that_can_be_left():
    m = made("FrozenLake-4x4")
    batch = batch_of(m, 11_000)
    found = np.asarray(jnp.zeros((16, 4)).at[batch.state, batch.action].add(1))
    assert not found[np.asarray(m.terminal)].any()
    assert scipy.stats.chisquare(found[~np.asarray(m.terminal)].ravel()).pvalue > SIGNIFICANCE


def test_invalid_transitions_change_nothing():
    m = made("FrozenLake-4x4")
    table = ql.apply_transitions(ql.empty(m), batch_of(m, 50), GAMMA, OMEGA)
    skipped = batch_of(m, 50, 1)._replace(valid=jnp.zeros(50, bool))
    assert_same(ql.apply_transitions(table, skipped, GAMMA, OMEGA), table)


def test_rounds_in_pieces_are_the_whole():
    m, way = made("FrozenLake-4x4"), ql.q_learning(made("FrozenLake-4x4"), GAMMA, block=32)
    whole = method.run(way, way.init(), KEY, 0, 30, m)
    half = method.run(way, way.init(), KEY, 0, 11, m)
    assert_same(method.run(way, half, KEY, 11, 19, m), whole)


# --- Partitioned


@st.composite
def partitions(draw):
    """(owner [S], K) with any sizes, empty parts among them."""
    owners = draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(0, owners - 1), min_size=1, max_size=9))
    return np.asarray(owner), owners


@hypothesis.given(partitions(), st.integers(0, 1000))
def test_merge_is_a_partition_of_unity(partition, seed):
    owner, owners = partition
    owned = owner == np.arange(owners)[:, None]
    merge = lambda tables: np.asarray(part.merge(jnp.asarray(tables), jnp.asarray(owned)))  # noqa: E731
    tables = np.random.default_rng(seed).normal(size=(owners, len(owner), 3)).astype(np.float32)
    np.testing.assert_array_equal(merge(np.ones_like(tables)), 1.0)
    np.testing.assert_array_equal(merge(tables), tables[owner, np.arange(len(owner))])
    same = np.broadcast_to(tables[:1], tables.shape)
    np.testing.assert_array_equal(merge(same), tables[0])
    disjoint = np.where(owned[..., None], tables, 0)
    np.testing.assert_array_equal(merge(disjoint), disjoint.sum(axis=0))
    np.testing.assert_allclose(disjoint.mean(axis=0), merge(disjoint) / owners, rtol=1e-6)  # why not the mean


@hypothesis.given(st.integers(1, 300), st.integers(1, 300))
def test_contiguous_parts_are_even(states, owners):
    if owners > states:
        with pytest.raises(UserError, match="cannot share"):
            part.contiguous(states, owners)
        return
    sizes = np.bincount(part.contiguous(states, owners), minlength=owners)
    assert sizes.sum() == states and sizes.max() - sizes.min() <= 1 and sizes.min() >= 1


def test_one_owner_is_plain_q_learning_bitwise():
    m = made("FrozenLake-8x8")
    plain = ql.q_learning(m, GAMMA, block=50)
    owned = part.partitioned(m, np.zeros(64, int), 50, GAMMA)
    tables = [way.table(method.run(way, way.init(), KEY, 0, 100, m)) for way in (plain, owned)]
    assert_same(*tables)
    assert float(jnp.abs(tables[0].q).max()) > 0


def all_learn(state, batch, owners):
    """One stream of transitions for all owners, each of which takes only its own from it; then a refresh."""
    learn = lambda table, owned: part.learn(table, state.view, batch, owned, GAMMA, OMEGA)  # noqa: E731
    tables = jax.vmap(learn)(state.tables, owners.owned)
    return part.Partitioned(tables, part.merge(tables.q, owners.owned))


@pytest.mark.parametrize("name", ["FourRooms", "Random"])
@pytest.mark.parametrize("how", ["contiguous", "scattered", "unequal"])
def test_refresh_every_transition_is_unpartitioned_bitwise(name, how):
    m = made(name)
    states, rng = len(m.terminal), np.random.default_rng(0)
    owner = {
        "contiguous": part.contiguous(states, 16),
        "scattered": rng.integers(0, 4, states),
        "unequal": (np.arange(states) == 7).astype(int),
    }[how]
    owners, stream = part.make_owners(m, owner, 1), batch_of(m, 3000)
    one = lambda state, item: (all_learn(state, jax.tree.map(lambda leaf: leaf[None], item), owners), None)  # noqa: E731
    state = jax.jit(lambda state: jax.lax.scan(one, state, stream)[0])(part.init(m, owners))
    whole = jax.jit(lambda table: ql.apply_transitions(table, stream, GAMMA, OMEGA))(ql.empty(m))
    np.testing.assert_array_equal(state.view, whole.q)
    np.testing.assert_array_equal(part.merge(state.tables.counts, owners.owned), whole.counts)


def test_a_stale_view_is_not_unpartitioned():
    m = made("Random")
    owners, stream = part.make_owners(m, part.contiguous(50, 4), 1), batch_of(m, 3000)
    state = all_learn(part.init(m, owners), stream, owners)
    whole = ql.apply_transitions(ql.empty(m), stream, GAMMA, OMEGA)
    assert float(jnp.abs(state.view - whole.q).max()) > 0.1


def test_work_is_handed_out_by_need_and_owners_keep_to_their_part():
    m = made("FourRooms")
    owner = np.minimum(np.arange(104) // 4, 2)  # 4, 4 and 96 states, of which 95 are not terminal
    way = part.partitioned(m, owner, 950, GAMMA)
    assert way.load.tolist() == [40, 40, 950]
    state = method.run(way, way.init(), KEY, 0, 200, m)
    counts, owned = np.asarray(state.tables.counts), regions(owner)
    assert counts.sum(axis=(1, 2)).tolist() == [8000, 8000, 190_000]
    assert not counts[~owned].any() and not np.asarray(state.tables.q)[~owned].any()
    visits = np.asarray(way.table(state).counts)[~np.asarray(m.terminal)]
    assert scipy.stats.chisquare(visits.ravel()).pvalue > SIGNIFICANCE  # all pairs alike


def test_an_owner_of_terminal_states_idles():
    m = made("FrozenLake-4x4")
    way = part.partitioned(m, np.asarray(m.terminal, int), 10, GAMMA)
    assert way.load.tolist() == [10, 0]
    table = way.table(method.run(way, way.init(), KEY, 0, 5, m))
    assert float(table.counts.sum()) == 50 and not table.q[np.asarray(m.terminal)].any()


@pytest.mark.parametrize(
    "owner, refresh, words", [([0] * 15, 1, "owner"), ([-1] * 16, 1, "owner"), ([0] * 16, 0, "refresh")]
)
def test_owners_that_are_none(owner, refresh, words):
    with pytest.raises(UserError, match=words):
        part.partitioned(made("FrozenLake-4x4"), np.asarray(owner), refresh, GAMMA)


@pytest.mark.parametrize("num_devices, per_device", [(4, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("kind", ["partitioned", "visits", "equal"])
def test_learners_over_devices_are_those_of_one_device_bitwise(num_devices, per_device, kind):
    m, workers = made("FourRooms"), num_devices * per_device
    way = form(kind, "FourRooms", GAMMA, workers)
    over = method.over_devices(way, jax.devices()[:num_devices], KEY, m)
    assert_same(over(way.init(), 3, 20), method.run(way, way.init(), KEY, 3, 20, m))


def test_learners_that_the_devices_do_not_divide():
    with pytest.raises(UserError, match="3 learners cannot be divided over 2 devices"):
        method.over_devices(form("equal", "FourRooms", GAMMA, 3), jax.devices()[:2], KEY, made("FourRooms"))


# --- Distributed


def random_visits(seed, workers, states=5):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 4, (workers, states, 2)) * rng.integers(0, 2, (workers, states, 2)), jnp.float32)


@hypothesis.given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from(dist.AGGREGATES))
def test_aggregates_are_partitions_of_unity(seed, workers, how):
    visits, rng = random_visits(seed, workers), np.random.default_rng(seed)
    owned = jnp.asarray(rng.integers(0, workers, 5) == np.arange(workers)[:, None])
    share = np.asarray(dist.weights(visits, how, owned))
    assert (share >= 0).all()
    np.testing.assert_allclose(share.sum(axis=0), 1.0, rtol=1e-6)
    if how == "visits":  # in proportion, and all of it for the only one who was there
        total = np.asarray(visits).sum(axis=0)
        np.testing.assert_allclose(share * total, visits * (total > 0), rtol=1e-6)
        alone = (np.asarray(visits) == total) & (total > 0)
        np.testing.assert_array_equal(share[alone], 1.0)


def test_an_aggregate_by_hand():
    q, visits = jnp.array([[[1.0]], [[5.0]]]), jnp.array([[[3.0]], [[1.0]]])
    tables = ql.Table(q, 10 * visits)
    by = lambda how: dist.aggregate(tables, visits, how, jnp.array([[False], [True]]))  # noqa: E731
    assert [float(by(how).q[0, 0]) for how in dist.AGGREGATES] == [3.0, 2.0, 5.0]
    assert [float(by(how).counts[0, 0]) for how in dist.AGGREGATES] == [20.0, 25.0, 10.0]


@pytest.mark.parametrize("how", dist.AGGREGATES)
def test_one_worker_is_plain_q_learning_bitwise(how):
    m = made("FrozenLake-8x8")
    plain = ql.q_learning(m, GAMMA, block=50)
    way = dist.distributed(m, everywhere("FrozenLake-8x8", 1), 50, how, GAMMA, owned=everywhere("FrozenLake-8x8", 1))
    assert_same(*[way.table(method.run(way, way.init(), KEY, 0, 100, m)) for way in (plain, way)])


@pytest.mark.parametrize("how", dist.AGGREGATES)
def test_workers_in_separate_calls_are_workers_in_one_program_bitwise(how):
    """What an engine over processes does: each worker's phase and the aggregation are calls of their own."""
    name, workers, steps, rounds = "FourRooms", 3, 40, 20
    m, owned = made(name), regions(part.contiguous(104, 3))
    way = dist.distributed(m, everywhere(name, workers), steps, how, GAMMA, owned=owned)
    together = way.table(method.run(way, way.init(), KEY, 0, rounds, m))

    local = jax.jit(dist.local_steps, static_argnums=(4, 5, 6))
    merge = jax.jit(dist.aggregate, static_argnums=2)
    where, table = ql.everywhere(m), ql.empty(m)
    for number in range(rounds):
        done = [
            local(dist.fresh(table), ql.round_key(KEY, worker, number), m, where, steps, GAMMA, OMEGA)
            for worker in range(workers)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
        table = merge(stacked.table, stacked.visits, how, jnp.asarray(owned))
    assert_same(table, together)


def test_workers_over_devices_are_workers_on_one_bitwise():
    m, workers = made("FourRooms"), 4
    keys = jax.vmap(ql.round_key, (None, 0, None))(KEY, jnp.arange(workers), 0)
    where, table = ql.starts(m, regions(part.contiguous(104, 4))), ql.empty(m)
    work = lambda key, where: dist.local_steps(dist.fresh(table), key, m, where, 500, GAMMA, OMEGA)  # noqa: E731
    assert_same(jax.pmap(work)(keys, where), jax.jit(jax.vmap(work))(keys, where))


def test_visit_weights_of_disjoint_workers_are_the_indicator_sum():
    m, owner = made("FourRooms"), part.contiguous(104, 4)
    ways = [
        dist.distributed(m, regions(owner), 30, how, GAMMA, owned=regions(owner)) for how in ("visits", "indicator")
    ]
    assert_same(*[way.table(method.run(way, way.init(), KEY, 0, 50, m)) for way in ways])


def test_one_equal_aggregation_of_disjoint_tables_is_a_fraction():
    m, owner = made("FourRooms"), part.contiguous(104, 4)
    tables = []
    for how in ("equal", "indicator"):
        way = dist.distributed(m, regions(owner), 5000, how, GAMMA, owned=regions(owner))
        tables.append(way.table(method.run(way, way.init(), KEY, 0, 1, m)))
    np.testing.assert_allclose(tables[0].q, tables[1].q / 4, rtol=1e-6)


def test_workers_that_cover_the_states_jointly_need_visit_weights():
    name, workers, steps, rounds = "FourRooms", 16, 4000, 40
    split = regions(part.contiguous(104, workers))
    visits, equal = (
        error_after(name, GAMMA, dist.distributed(made(name), split, steps, how, GAMMA), rounds)
        for how in ("visits", "equal")
    )
    # An entry that one worker of 16 updates moves by 1/16 of the way, whatever that worker has learned.
    assert visits < CLOSE and equal > 5 * CLOSE, (visits, equal)


def test_wrong_sizes_of_workers():
    m = made("FrozenLake-4x4")
    with pytest.raises(UserError, match="local_steps"):
        dist.distributed(m, everywhere("FrozenLake-4x4", 2), 0, "equal", GAMMA)
    with pytest.raises(UserError, match="omega"):
        dist.distributed(m, everywhere("FrozenLake-4x4", 2), 1, "equal", GAMMA, omega=0.0)


# --- Convergence to value iteration

BUDGET = {"FrozenLake-4x4": 2e6, "FrozenLake-8x8": 8e6, "FourRooms": 2e6}  # updates in all; plain needs as many


def form(kind, name, gamma, workers):
    """Rounds of 100 updates of each learner."""
    m = made(name)
    parts = part.contiguous(len(m.terminal), workers)
    if kind == "partitioned":
        return part.partitioned(m, parts, 100, gamma)
    where = regions(parts) if kind == "visits, parts" else everywhere(name, workers)
    return dist.distributed(m, where, 100, "equal" if kind == "equal" else "visits", gamma)


def assert_converges(kind, name, gamma, workers, updates):
    way = form(kind, name, gamma, workers)
    assert error_after(name, gamma, way, int(updates / way.load.sum())) < CLOSE


@pytest.mark.parametrize(
    "kind, name, gamma, workers, updates",
    [
        ("partitioned", "FrozenLake-4x4", 0.95, 16, 1e6),
        ("partitioned", "FrozenLake-8x8", 0.95, 2, 4e6),
        ("partitioned", "FourRooms", 0.99, 16, 1e6),
        ("visits", "FourRooms", 0.99, 4, 1e6),
        ("visits, parts", "FrozenLake-4x4", 0.99, 4, 1e6),
    ],
)
def test_parallel_forms_converge(kind, name, gamma, workers, updates):
    assert_converges(kind, name, gamma, workers, updates)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4, 16])
@pytest.mark.parametrize("gamma", [0.95, 0.99])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["partitioned", "visits", "visits, parts", "equal"])
def test_every_parallel_form_converges(kind, name, gamma, workers):
    """`equal` here is of workers that start everywhere, which is where it is right."""
    # An equal average moves as far as one of its workers does, so each needs the whole budget; weighted by visits, an
    # entry that one worker knows moves as far as that one did, until most workers know it.
    more = {"equal": workers, "visits": max(1, workers // 4)}.get(kind, 1)
    assert_converges(kind, name, gamma, workers, more * BUDGET[name])


# --- The script


def test_grid_and_borders():
    cells = np.array([[0, 0], [0, 1], [1, 1], [-1, -1]])
    grid = drawing.on_grid(np.array([0.0, 1.0, 1.0, 7.0]), cells)
    np.testing.assert_array_equal(grid, [[0.0, 1.0], [np.nan, 1.0]])
    assert drawing.borders(grid) == [((0.5, -0.5), (0.5, 0.5))]
    assert drawing.borders(grid.T) == [((-0.5, 0.5), (0.5, 0.5))]


def run_script(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDQN_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_script_writes_its_run(tmp_path):
    flags = "--mdp FourRooms --method partitioned --num-workers 3 --total-steps 50000 --out run".split()
    done = run_script(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows, table = pd.read_parquet(tmp_path / "run" / "metrics.parquet"), np.load(tmp_path / "run" / "table.npz")
    assert summary["updates"] == rows.updates.iloc[-1] >= 50_000 and len(summary["load"]) == 3
    assert summary["error"] == rows.error.iloc[-1] == np.abs(table["q"] - table["optimal"])[~table["terminal"]].max()
    assert table["counts"].sum() == summary["updates"] and set(table["owner"]) == {0, 1, 2}
    assert {"updates", "seconds", "error"} <= set(rows) and (np.diff(rows.seconds) > 0).all()
    assert PIL.Image.open(tmp_path / "run" / "values.png").size > (600, 300)
    assert "error" in done.stderr and f"{summary['error']:.4f}" in done.stdout
    again = run_script(tmp_path, *flags)
    assert (
        again.returncode == 2 and again.stderr.startswith("error: run is not empty") and again.stderr.count("\n") == 1
    )


@pytest.fixture
def script(monkeypatch):
    """tabular.py in this process, whose backend has long started."""
    monkeypatch.setattr(cli, "prepare_backend", lambda *_: None)
    return scripts.script("tabular")


def test_ctrl_c_keeps_what_was_learned(script, tmp_path, monkeypatch):
    class Pressed(progress.Progress):
        """Somebody presses Ctrl-C when the second point is shown."""

        def update(self, done, *values, **options):
            super().update(done, *values, **options)
            if done >= 400:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress, "Progress", Pressed)
    assert script.run(f"--mdp FrozenLake-4x4 --total-steps 10000 --out {tmp_path / 'run'}".split()) == 130
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert summary["status"] == "interrupted" and summary["updates"] == rows.updates.iloc[-1] == 512
    assert np.load(tmp_path / "run" / "table.npz")["counts"].sum() == 512


SIZES = ("num-workers", "refresh", "local-steps", "total-steps", "num-devices")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mdp FourRoom", "did you mean 'FourRooms'"),
        ("--method part", "did you mean 'partitioned'"),
        ("--num-workers 0", "num_workers is 0"),
        ("--refresh -1", "refresh is -1"),
        ("--total-steps 0", "total_steps is 0"),
        ("--method partitioned --num-workers 17", "1 to 16"),
        ("--method distributed --aggregate mean", "unknown aggregate"),
        ("--num-workers 8", "--num-workers is for --method partitioned and distributed, not for q_learning"),
        ("--method partitioned --aggregate equal", "--aggregate is for --method distributed, not for partitioned"),
        ("--gamma 1", "gamma is 1.0"),
        ("--omega 0", "omega is 0.0"),
        ("--gamma nan", "gamma is nan"),
        ("--gamma 0.9999999", "at most 0.99999"),
        *[(f"--{name} 1e18", f"{name.replace('-', '_')} is 1000000000000000000") for name in SIZES],
        ("--total-steps 1e15", "count up to 8,388,608 visits of each; take at most"),
        ("--method distributed --num-workers 20000", "num_workers is 20000"),
        ("--method distributed --local-steps 1e7", "lower local_steps"),
        ("--method partitioned --refresh 1e8", "lower refresh"),
        ("--seed -1", "seed is -1"),
        ("--seed 4294967296", "seed is 4294967296"),
    ],
)
def test_mistakes_end_in_one_line(flags, words, script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: script.run([*flags.split(), "--out", str(tmp_path / "run")]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: mdp.random_mdp(0, 10**9, 4, 5), "more than 50,000,000 probabilities"),
        (lambda: mdp.random_mdp(0, 50, 10**18, 5), "more than 50,000,000 probabilities"),
        (lambda: mdp.random_mdp(-1), "seed of a random MDP is -1"),
        (lambda: mdp.random_mdp(0, 50.5), "num_states of a random MDP is 50.5"),
        (lambda: mdp.from_arrays([["a"]], 0, 0, 0), "arrays of numbers"),
        (lambda: dynamics.deep_sea(10**18), "size of DeepSea is 1000000000000000000"),
        (lambda: dynamics.deep_sea("8"), "size of DeepSea is '8'"),
        (lambda: dynamics.four_rooms(3), "goal of FourRooms is 3"),
        (lambda: dynamics.four_rooms(("a", "b")), "goal"),
        (lambda: dynamics.frozen_lake("9x9"), "FrozenLake-misc"),
        (lambda: planning.value_iteration(mdp.random_mdp(), 0.9, math.inf), "tolerance is inf"),
        (lambda: ql.q_learning(mdp.random_mdp(), 0.9, block=0), "block is 0"),
        (lambda: ql.q_learning(mdp.random_mdp(), 0.9, block=10**18), "lower block"),
    ],
)
def test_sizes_that_no_array_has_are_refused(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_float32_counts_the_visits_that_are_accepted():
    most = np.float32(2 * ql.MOST_VISITS - 1)
    assert most + 1 == 2**24 and np.float32(2**24) + 1 == 2**24
