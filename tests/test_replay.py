"""The replay against a deque, plain loops and rlax. Observations carry (environment, time), so that a batch tells by
itself which transitions it was made of."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdqn import replay
from jaxdqn.base import Progress, Transition
from jaxdqn.config import HParams
from jaxdqn.replay import ring
from jaxdqn.replay.packing import codec

H = jax.tree.map(jnp.float32, HParams(gamma=0.9))
SHAPE = jax.ShapeDtypeStruct
EXAMPLE = Transition(
    observation=SHAPE((2,), jnp.float32),  # (environment, time)
    action=SHAPE((), jnp.int32),
    reward=SHAPE((), jnp.float32),
    discount=SHAPE((), jnp.float32),
    next_observation=SHAPE((2,), jnp.float32),
    episode_end=SHAPE((), jnp.bool_),
    extras={"carry": SHAPE((3,), jnp.float32)},
)
BREAKOUT = EXAMPLE._replace(
    observation=SHAPE((10, 10, 4), jnp.bool_), next_observation=SHAPE((10, 10, 4), jnp.bool_), extras=()
)


def at(written):
    """The progress after so many rows."""
    return Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0))


def history(rows: int, num_envs: int, seed: int = 0) -> Transition:
    """[rows, num_envs] transitions; time starts at 1, so that unwritten zeros show. Ends of both kinds are frequent."""
    random = np.random.default_rng(seed)
    time, env = np.meshgrid(np.arange(1, rows + 1), np.arange(num_envs), indexing="ij")
    observation = np.stack([env, time], axis=-1).astype(np.float32)
    end = random.random((rows, num_envs)) < 0.3
    terminated = end & (random.random((rows, num_envs)) < 0.5)
    return Transition(
        observation=observation,
        action=(7 * time + env).astype(np.int32),
        reward=(100 * time + env).astype(np.float32),
        discount=1.0 - terminated.astype(np.float32),
        next_observation=observation + np.float32([0.0, 0.5]),
        episode_end=end,
        extras={"carry": np.repeat(observation[..., 1:], 3, axis=-1)},
    )


def block(data: Transition, start: int, length: int) -> Transition:
    return jax.tree.map(lambda x: jnp.asarray(x[start : start + length]), data)


@functools.cache
def compiled(rows: int, num_envs: int, length: int, batch_size: int = 8, kind: str = "uniform"):
    record = getattr(replay, kind)(EXAMPLE, rows, num_envs, batch_size, length)
    if kind == "sequences":
        return record, jax.jit(record.add), jax.jit(lambda *args: record.sample(*args).transitions)
    return record, jax.jit(record.add), jax.jit(record.sample)


def fill(data: Transition, add, state, rollout_length: int, written: int):
    for start in range(0, written, rollout_length):
        state = add(state, block(data, start, rollout_length), jnp.int32(start), H)
    return state


def oldest_to_newest(state: ring.Stored, rows: int, written: int) -> Transition:
    order, num_envs = np.arange(max(0, written - rows), written), state.reward.shape[1]
    read = ring.read(ring.layout(EXAMPLE, rows, num_envs), state, order[:, None], np.arange(num_envs))
    return jax.tree.map(np.asarray, read)


@given(
    rollout_length=st.integers(1, 3), blocks=st.integers(1, 3), num_envs=st.sampled_from([1, 3]), adds=st.integers(0, 8)
)
def test_ring_holds_what_a_deque_holds(rollout_length, blocks, num_envs, adds):
    rows, written = blocks * rollout_length, adds * rollout_length
    record, add, _ = compiled(rows, num_envs, 1)
    data = history(written, num_envs)
    state = fill(data, add, record.init(), rollout_length, written)

    deque = collections.deque(maxlen=rows)
    for row in range(written):
        deque.append(jax.tree.map(lambda x, row=row: x[row], data))
    held = oldest_to_newest(state, rows, written)
    assert held.reward.shape[0] == len(deque)
    if deque:
        chex.assert_trees_all_equal(held, jax.tree.map(lambda *x: np.stack(x), *deque))


def test_unwritten_rows_stay_zero():
    record, add, _ = compiled(6, 2, 1)
    state = fill(history(4, 2), add, record.init(), 2, 4)
    assert all(not np.any(leaf[4:]) for leaf in jax.tree.leaves(state._replace(ends=())))
    assert np.all(state.ends[4:] == ring.END)  # and end an episode, for stacks of frames


def test_write_refuses_a_block_that_does_not_divide_the_rows():
    record = replay.uniform(EXAMPLE, 4, 1, 8)
    with pytest.raises(ValueError, match=r"4 rows.*3"):
        record.add(record.init(), block(history(3, 1), 0, 3), jnp.int32(0), H)


@pytest.mark.parametrize("shared", [True, False])
def test_a_population_with_one_counter_writes_one_slice(shared):
    """Write offsets that differ between members are compiled to a scatter: why the counter is shared."""
    record = replay.uniform(EXAMPLE, 6, 2, 8)
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), record.init())
    blocks = jax.tree.map(lambda x: jnp.stack([x] * 3), block(history(2, 2), 0, 2))
    add = jax.jit(jax.vmap(record.add, in_axes=(0, 0, None if shared else 0, None)))
    written = jnp.int32(0) if shared else jnp.zeros(3, jnp.int32)
    as_users_do = {"xla_cpu_use_fusion_emitters": True}  # see conftest.py
    instructions = add.lower(states, blocks, written, H).compile(as_users_do).as_text()
    assert (" dynamic-update-slice(" in instructions) == shared
    assert (" scatter(" in instructions) != shared
    # On a GPU a scatter that XLA makes a slice again reads the old rows, and looks at its bounds.
    assert ("scatter" in str(add.trace(states, blocks, written, H).jaxpr)) != shared


@pytest.mark.parametrize("axes", [(0, 0, None), (0, 0, 0), (None, 0, None), (0, None, None)])
def test_a_populations_write_is_each_members(axes):
    old, new, start = jnp.arange(48.0).reshape(3, 4, 4), -jnp.arange(1.0, 25).reshape(3, 2, 4), jnp.array([0, 2, 0])
    args = [x if axis == 0 else x[1] for x, axis in zip((old, new, start), axes, strict=True)]
    member = [[x[i] if axis == 0 else x for x, axis in zip(args, axes, strict=True)] for i in range(3)]
    expected = [jax.lax.dynamic_update_slice_in_dim(*one, 0) for one in member]
    write = jax.vmap(lambda *parts: ring.overwrite(*parts, jnp.int32(0)), in_axes=axes)
    np.testing.assert_array_equal(write(*args), np.stack(expected))


def test_uniform_has_no_priorities():
    record = replay.uniform(EXAMPLE, 4, 2, 8)
    state, batch = record.init(), record.sample(record.init(), jax.random.key(0), at(2), H)
    assert record.update_priorities(state, batch.indices, jnp.ones(8), H) is state
    np.testing.assert_array_equal(batch.weights, np.ones(8))


# What is sampled. ROWS x ENVS is small and the batch large, so that every allowed start turns up.
ROWS, ENVS, MANY = 8, 3, 4000


def loop_n_step(reward, discount, end, gamma):
    """(return, bootstrap discount, last index) of one sequence, by the definition."""
    total, factor = 0.0, 1.0
    for k in range(len(reward)):
        total += factor * reward[k]
        factor *= gamma
        if end[k] or discount[k] == 0 or k == len(reward) - 1:
            return total, factor * discount[k], k
    raise AssertionError("an empty sequence has no return")


def starts(observation) -> set[tuple[int, int]]:
    """(environment, time) pairs."""
    return {(int(env), int(time)) for env, time in np.asarray(observation)}


def allowed(written: int, length: int) -> set[tuple[int, int]]:
    """Starts whose `length` rows are in the ring; time is row + 1."""
    rows = range(max(0, written - ROWS), written - length + 1)
    return {(env, row + 1) for row in rows for env in range(ENVS)}


@pytest.mark.parametrize("kind", ["uniform", "sequences"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("written", [4, 8, 10, 22], ids=lambda w: f"written{w}")
def test_every_complete_start_is_sampled_and_no_other(kind, length, written):
    record, add, sample = compiled(ROWS, ENVS, length, MANY, kind)
    state = fill(history(written, ENVS), add, record.init(), 2, written)
    batch = sample(state, jax.random.key(written), at(written), H)
    observation = batch.observation if kind == "uniform" else batch.observation[0]
    assert starts(observation) == allowed(written, length)


@pytest.mark.parametrize("kind", ["uniform", "sequences"])
def test_sampling_is_uniform(kind):
    record, add, sample = compiled(ROWS, ENVS, 3, MANY, kind)
    state = fill(history(22, ENVS), add, record.init(), 2, 22)
    batch = sample(state, jax.random.key(0), at(22), H)
    observation = np.asarray(batch.observation if kind == "uniform" else batch.observation[0])
    _, counts = np.unique(observation, axis=0, return_counts=True)
    assert len(counts) == len(allowed(22, 3)) and scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("written", [4, 22])
def test_n_step_batches_are_those_of_the_history(n_step, written):
    """A read across the write head, across environments or past an episode's end gives another return."""
    data = history(written, ENVS)
    record, add, sample = compiled(ROWS, ENVS, n_step, MANY)
    state = fill(data, add, record.init(), 2, written)
    batch = jax.tree.map(np.asarray, sample(state, jax.random.key(0), at(written), H))
    for b in range(200):
        env, row = int(batch.observation[b, 0]), int(batch.observation[b, 1]) - 1
        rows = slice(row, row + n_step)
        total, bootstrap, last = loop_n_step(
            data.reward[rows, env], data.discount[rows, env], data.episode_end[rows, env], 0.9
        )
        assert batch.action[b] == data.action[row, env]
        np.testing.assert_allclose(batch.return_m[b], total, rtol=1e-5)
        np.testing.assert_allclose(batch.bootstrap_discount[b], bootstrap, rtol=1e-6)
        np.testing.assert_array_equal(batch.bootstrap_observation[b], data.next_observation[row + last, env])


@pytest.mark.parametrize("written", [4, 22])
def test_sequences_are_those_of_the_history(written):
    data = history(written, ENVS)
    record, add, sample = compiled(ROWS, ENVS, 3, MANY, "sequences")
    state = fill(data, add, record.init(), 2, written)
    drawn = sample(state, jax.random.key(0), at(written), H)
    env, row = (np.asarray(drawn.observation[0, :, i], int) for i in (0, 1))
    rows = row - 1 + np.arange(3)[:, None]
    kept = data._replace(next_observation=(), extras=())
    chex.assert_trees_all_equal(drawn, jax.tree.map(lambda x: x[rows, env], kept))


def test_a_batch_of_sequences_says_where_each_begins():
    record = replay.sequences(EXAMPLE, ROWS, ENVS, 8, 3)
    state = fill(history(22, ENVS), jax.jit(record.add), record.init(), 2, 22)
    batch = record.sample(state, jax.random.key(0), at(22), H)
    np.testing.assert_array_equal(state.observation[batch.indices], batch.transitions.observation[0])
    np.testing.assert_array_equal(batch.weights, np.ones(8))
    np.testing.assert_array_equal(state.extras["carry"][batch.indices], batch.carry["carry"])


def test_indices_point_at_the_sampled_rows():
    record, add, sample = compiled(ROWS, ENVS, 3, MANY)
    state = fill(history(22, ENVS), add, record.init(), 2, 22)
    batch = sample(state, jax.random.key(0), at(22), H)
    np.testing.assert_array_equal(state.observation[batch.indices], batch.observation)


def test_bool_observations_come_back_decoded():
    """Through packing, with other grids before and after the end of an episode."""
    random = np.random.default_rng(0)
    grids = random.random((2, 4, 2, 10, 10, 4)) < 0.5
    data = history(4, 2)._replace(observation=grids[0], next_observation=grids[1], extras=())
    record = replay.uniform(BREAKOUT, 4, 2, 32)
    state = record.add(record.init(), jax.tree.map(jnp.asarray, data), jnp.int32(0), H)
    batch = record.sample(state, jax.random.key(0), at(4), H)
    assert batch.observation.dtype == bool
    np.testing.assert_array_equal(batch.observation, grids[0][batch.indices])
    np.testing.assert_array_equal(batch.bootstrap_observation, grids[1][batch.indices])


# Folding m steps, on arrays [n, B].


@st.composite
def outcomes(draw):
    """(reward, discount, episode_end) of n x 4 steps."""
    shape = (draw(st.integers(1, 5)), 4)
    reward = draw(hnp.arrays(np.float32, shape, elements=st.floats(-10, 10, width=32)))
    kind = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 4)))
    # 2 terminates, 3 is a time limit, 4 a termination that is no episode's end, such as a lost life.
    return reward, np.isin(kind, (2, 4), invert=True).astype(np.float32), np.isin(kind, (2, 3))


fold = jax.jit(ring.fold_n_step)


@given(outcomes(), st.floats(0.0, 1.0, width=32))
def test_fold_equals_a_plain_loop(outcome, gamma):
    total, bootstrap, last = fold(*outcome, np.float32(gamma))
    expected = [loop_n_step(*(x[:, b] for x in outcome), gamma) for b in range(4)]
    # The rewards may cancel: up to 5 of magnitude 10 leave rounding of some 1e-5.
    np.testing.assert_allclose(total, [e[0] for e in expected], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(bootstrap, [e[1] for e in expected], rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(last, [e[2] for e in expected])


@given(outcomes(), st.integers(0, 2**16))
def test_fold_equals_rlax_with_lambda_0_at_ends(outcome, seed):
    reward, discount, end = outcome
    values = np.random.default_rng(seed).normal(size=reward.shape).astype(np.float32)
    total, bootstrap, last = fold(*outcome, np.float32(0.9))
    target = total + bootstrap * values[last, np.arange(4)]
    for b in range(4):
        expected = rlax.n_step_bootstrapped_returns(
            jnp.asarray(reward[:, b]),
            jnp.asarray(0.9 * discount[:, b]),
            jnp.asarray(values[:, b]),
            n=len(reward),
            lambda_t=jnp.where(end[:, b], 0.0, 1.0),
        )[0]
        np.testing.assert_allclose(target[b], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "end_at, terminated, expected",
    [
        (None, False, (1 + 0.5 * 2 + 0.25 * 4, 0.125, 2)),
        (1, False, (1 + 0.5 * 2, 0.25, 1)),
        (1, True, (1 + 0.5 * 2, 0.0, 1)),
        (0, False, (1.0, 0.5, 0)),
        (0, True, (1.0, 0.0, 0)),
    ],
    ids=["whole", "truncated second", "terminated second", "truncated first", "terminated first"],
)
def test_bootstrap_discount_is_gamma_to_the_realised_length(end_at, terminated, expected):
    reward, discount, end = np.float32([[1], [2], [4]]), np.ones((3, 1), np.float32), np.zeros((3, 1), bool)
    if end_at is not None:
        end[end_at] = True
        discount[end_at] = 0.0 if terminated else 1.0
    assert tuple(float(x[0]) for x in fold(reward, discount, end, np.float32(0.5))) == expected


def test_a_lost_life_ends_a_return_though_no_episode():
    """Rewards 1, 1, 1, the second discount 0, gamma .9: 1.9 and 0, not 2.71 and .729."""
    ones = np.ones((3, 1), np.float32)
    total, bootstrap, last = fold(ones, np.float32([[1], [0], [1]]), np.zeros((3, 1), bool), np.float32(0.9))
    assert (total, bootstrap, last) == (np.float32(1.9), 0, 1)


def test_reward_scale_is_applied_once():
    record, add, sample = compiled(ROWS, ENVS, 3, MANY)
    state = fill(history(8, ENVS), add, record.init(), 2, 8)
    plain, scaled = (
        sample(state, jax.random.key(0), at(8), H._replace(reward_scale=jnp.float32(scale))) for scale in (1.0, 4.0)
    )
    np.testing.assert_array_equal(scaled.return_m, 4.0 * plain.return_m)  # a power of two: exact
    np.testing.assert_array_equal(scaled.bootstrap_discount, plain.bootstrap_discount)


# Storage.


@given(st.lists(st.integers(1, 6), max_size=3), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**16))
def test_packing_bool_grids_loses_nothing(shape, leading, seed):
    grid = np.random.default_rng(seed).random((*leading, *shape)) < 0.5
    packing = codec(SHAPE(tuple(shape), jnp.bool_))
    stored = packing.encode(jnp.asarray(grid))
    assert (stored.shape, stored.dtype) == ((*leading, *packing.stored.shape), packing.stored.dtype)
    assert stored.nbytes <= grid.nbytes
    decoded = packing.decode(stored)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, grid)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_other_dtypes_are_stored_as_they_are(dtype):
    values = jnp.arange(60).astype(dtype).reshape(2, 3, 10)
    packing = codec(SHAPE((3, 10), dtype))
    stored = packing.encode(values)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(packing.decode(stored), values)


def test_a_discount_of_neither_0_nor_1_is_not_learned_from_in_silence():
    """It has no bit in the ring."""
    for discount, stored in ((0.0, 0.0), (1.0, 1.0), (0.5, np.nan)):
        data = jax.tree.map(jnp.asarray, history(2, 1)._replace(discount=np.full((2, 1), discount, np.float32)))
        layout = ring.layout(EXAMPLE, 2, 1)
        read = ring.read(layout, ring.write(layout, ring.empty(layout), data, jnp.int32(0)), jnp.arange(2), 0)
        np.testing.assert_array_equal(read.discount, [stored, stored])
        np.testing.assert_array_equal(read.episode_end, data.episode_end[:, 0])
