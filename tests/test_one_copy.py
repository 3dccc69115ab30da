"""The ring with one copy of an observation, against plain loops over a history and the ring with two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
from cases import slow
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn import acting, replay, training
from jaxdqn.base import Progress, Transition
from jaxdqn.components import make_agent, make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel.compiled import memory
from jaxdqn.replay import ring
from jaxdqn.timeline import timeline
from jaxdqn.validation import validate

H = jax.tree.map(jnp.float32, HParams(gamma=0.9))
SHAPE = jax.ShapeDtypeStruct
OBSERVATION = SHAPE((2,), jnp.float32)  # (environment, time)
NUMBER = SHAPE((), jnp.float32)
EXAMPLE = Transition(OBSERVATION, SHAPE((), jnp.uint8), NUMBER, NUMBER, OBSERVATION, SHAPE((), jnp.bool_))
ROWS, ENVS = 8, 4


def history(rows, seed, num_envs=ENVS):
    """[rows, num_envs] transitions, each observation what the step before it produced, but after an end. Rows end
    nothing, or with a termination, a time limit, or a lost life."""
    random = np.random.default_rng(seed)
    time, env = np.meshgrid(np.arange(1, rows + 1), np.arange(num_envs), indexing="ij")
    observation = np.stack([env, time], axis=-1).astype(np.float32)
    kind = random.choice(4, (rows, num_envs), p=[0.6, 0.15, 0.15, 0.1])
    end = (kind == 1) | (kind == 2)
    return Transition(
        observation=observation,
        action=(7 * time + env).astype(np.uint8),
        reward=random.normal(size=(rows, num_envs)).astype(np.float32),
        discount=((kind == 0) | (kind == 2)).astype(np.float32),
        next_observation=observation + np.where(end[..., None], np.float32([0, 0.5]), np.float32([0, 1])),
        episode_end=end,
    )


def one_copy_item(data, row, env, n_step):
    """(return, bootstrap discount, bootstrap observation or None where that has no weight), by the rule; None where
    nothing may start."""
    total, factor = 0.0, 1.0
    for k in range(n_step):
        end, discount = data.episode_end[row + k, env], data.discount[row + k, env]
        if end and discount:
            return (total, factor, data.observation[row + k, env]) if k else None
        total, factor = total + factor * data.reward[row + k, env], 0.9 * factor
        if not discount:
            return total, 0.0, None
    return total, factor, data.next_observation[row + n_step - 1, env]


@functools.cache
def batches(n_step, copies):
    """From blocks of two rows, the batch of all ROWS x ENVS starts."""
    layout = ring.layout(EXAMPLE, ROWS, ENVS, copies)

    def run(data, written):
        def write(index, state):
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, 2 * index, 2), data)
            return ring.write(layout, state, rows, 2 * index)

        state = jax.lax.fori_loop(0, written // 2, write, ring.empty(layout))
        row, env = jnp.divmod(jnp.arange(ROWS * ENVS), ENVS)
        return ring.n_step_batch(layout, state, row, env, n_step, H)

    return jax.jit(run)


@given(st.integers(1, 4), st.integers(3, 10), st.integers(0, 2**16))
def test_items_are_those_of_two_copies_or_stop_before_a_time_limit(n_step, blocks, seed):
    written, data = 2 * blocks, history(20, seed)
    one, two = (jax.tree.map(np.asarray, batches(n_step, copies)(data, written)) for copies in (1, 2))
    for row in range(max(0, written - ROWS), written - n_step):
        for env in range(ENVS):
            at, expected = row % ROWS * ENVS + env, one_copy_item(data, row, env, n_step)
            assert one.weights[at] == (expected is not None) and two.weights[at] == 1
            np.testing.assert_array_equal(one.observation[at], data.observation[row, env])
            assert one.action[at] == two.action[at] == data.action[row, env]
            if expected is None:
                continue
            total, bootstrap, observation = expected
            np.testing.assert_allclose(one.return_m[at], total, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(one.bootstrap_discount[at], bootstrap, rtol=1e-6)
            if observation is not None:
                np.testing.assert_array_equal(one.bootstrap_observation[at], observation)
            limit = data.episode_end & (data.discount == 1)
            if not limit[row : row + n_step, env].any():  # what both rings keep
                assert one.return_m[at] == two.return_m[at]
                assert one.bootstrap_discount[at] == two.bootstrap_discount[at]
                if bootstrap:
                    np.testing.assert_array_equal(one.bootstrap_observation[at], two.bootstrap_observation[at])


@pytest.mark.parametrize("n_step, written", [(1, 2), (3, 4), (3, 14)])
def test_the_newest_n_rows_start_nothing(n_step, written):
    """(1, 2) and (3, 4) are the rows that the prefill writes at least."""
    data, record = history(written, 0), replay.uniform(EXAMPLE, ROWS, ENVS, 2_000, n_step, copies=1)
    state = record.init()
    for start in range(0, written, 2):
        state = record.add(state, jax.tree.map(lambda x, s=start: jnp.asarray(x[s : s + 2]), data), jnp.int32(start), H)
    batch = record.sample(state, jax.random.key(0), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0)), H)
    starts = {tuple(map(int, x)) for x in np.asarray(batch.observation)}
    assert starts == {(env, row + 1) for env in range(ENVS) for row in range(max(0, written - ROWS), written - n_step)}


def test_regions_stop_where_a_stream_is_cut():
    """Two actors write as they come; the second one's stream is cut, once in a row that terminates."""
    data = history(16, 5)
    data.episode_end[5, 2], data.discount[5, 2] = False, 1.0  # cut here: then as a limit
    data.episode_end[5, 3], data.discount[5, 3] = True, 0.0  # and here it stays a termination
    record = replay.regions(EXAMPLE, ROWS, 2, 2, 4_000, 3, copies=1)
    state, written = record.init(), np.array([0, 0])
    for actor in (0, 1, 0, 1, 1, 0, 0, 1, 0, 0):
        start = written[actor]
        rows = jax.tree.map(lambda x, a=actor, s=start: jnp.asarray(x[s : s + 2, 2 * a : 2 * a + 2]), data)
        state = record.add(state, rows, (jnp.int32(actor), jnp.int32(start)), H)
        written[actor] += 2
        if actor == 1 and written[1] == 6:
            state = replay.cut(state, jnp.int32(6), 2, 2)
    data.episode_end[5, 2:] = True
    progress = Progress(jnp.asarray(written, jnp.int32), jnp.int32(0), jnp.int32(0))
    batch = jax.tree.map(np.asarray, record.sample(state, jax.random.key(0), progress, H))
    seen = set()
    for b, (env, time) in enumerate(batch.observation.astype(int)):
        row = time - 1
        seen.add((env, row))
        expected = one_copy_item(data, row, env, 3)
        assert batch.weights[b] == (expected is not None)
        if expected is not None:
            np.testing.assert_allclose(batch.return_m[b], expected[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(batch.bootstrap_discount[b], expected[1], rtol=1e-6)
            if expected[2] is not None:
                np.testing.assert_array_equal(batch.bootstrap_observation[b], expected[2])
    ends = written[np.arange(ENVS) // 2]
    assert seen == {(env, row) for env in range(ENVS) for row in range(max(0, ends[env] - ROWS), ends[env] - 3)}


# -- stacks of frames -------------------------------------------------------------------------------------------------


@functools.cache
def played(padding):
    """A stream [40, ENVS] of the environment of stacks, and the example of its transitions."""
    environment = probe_environments.stacks(padding)
    agent = make_agent(Config(agent="random", hidden_sizes=(8,)), environment.spec)
    example = training.transition_example(environment.spec, agent)
    hparams, key = agent.defaults, jax.random.key(1)
    actor = acting.start(environment, agent, ENVS, key)
    prefill = training.make_prefill(environment, agent, Config(num_envs=ENVS, rollout_length=40))
    params = agent.init(key, hparams).params
    return example, jax.tree.map(np.asarray, jax.jit(prefill)(params, actor, key, hparams)[1])


@pytest.mark.parametrize("padding", ["first", "zeros"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_stacks_are_those_that_the_environment_gave(padding, n_step):
    """From a ring that holds each frame once: as observation and as bootstrap observation, over the ring's end, at
    episodes' starts, up to the oldest rows whose stack is there."""
    example, data = played(padding)
    rows = 12
    record = replay.uniform(example, rows, ENVS, 500, n_step, copies=1)
    assert record.init().observation["frames"].shape == (rows, ENVS, 2, 1)
    add, sample = jax.jit(record.add), jax.jit(record.sample)
    state, padded = record.init(), 0
    for written in range(2, 41, 2):
        state = add(state, jax.tree.map(lambda x, w=written: x[w - 2 : w], data), jnp.int32(written - 2), H)
        if written <= n_step:
            continue
        batch = sample(state, jax.random.key(written), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0)), H)
        batch, first = jax.tree.map(np.asarray, batch), max(0, written - rows)
        (row, env), oldest = batch.indices, first + 2 * (written > rows - 2)
        row = first + (row - first) % rows
        assert row.min() == oldest and row.max() == written - n_step - 1
        for b, at in enumerate(zip(row, env, strict=True)):
            expected = one_copy_item(data._replace(observation=data.reward, next_observation=data.reward), *at, n_step)
            assert batch.weights[b] == (expected is not None)
            given = jax.tree.map(lambda x, at=at: x[at], data.observation)
            np.testing.assert_array_equal(batch.observation["frames"][b], given["frames"])
            assert batch.observation["age"][b] == given["age"]
            padded += given["age"] < 2
            if expected is None or expected[2] is None:
                continue
            steps = round(np.log(expected[1]) / np.log(0.9))
            given = jax.tree.map(lambda x, r=at[0] + steps - 1, e=at[1]: x[r, e], data.next_observation)
            np.testing.assert_array_equal(batch.bootstrap_observation["frames"][b], given["frames"])
    assert padded > 100


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("padding", ["first", "zeros"])
def test_what_is_kept_of_a_block_is_all_that_comes_to_be_stored(padding, copies):
    """Rings after the block, and after what `kept` leaves of it: newest frames alone, and no next observations."""
    example, data = played(padding)
    record = replay.uniform(example, 40, ENVS, 8, copies=copies)
    kept = record.kept(data)
    assert kept.observation["frames"].shape[-1] == (1 if copies == 1 else example.observation["frames"].shape[-1])
    assert (kept.next_observation == ()) == (copies == 1)
    made = [jax.jit(record.add)(record.init(), block, jnp.int32(0), H) for block in (data, kept)]
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_no_stack_reaches_over_a_cut():
    """Rows 6 and 7 are lost: the two rows after the cut start nothing, whatever the lost rows held."""
    example, data = played("first")
    layout = ring.layout(example, 18, ENVS, copies=1)
    state = ring.write(layout, ring.empty(layout), jax.tree.map(lambda x: x[:6], data), jnp.int32(0))
    state = replay.cut(state, jnp.int32(6), 0, ENVS)
    state = ring.write(layout, state, jax.tree.map(lambda x: x[8:14], data), jnp.int32(6))
    row, env = jnp.divmod(jnp.arange(10 * ENVS), ENVS)
    batch = jax.tree.map(np.asarray, ring.n_step_batch(layout, state, row, env, 1, H))
    kept = batch.weights.reshape(10, ENVS)
    assert not kept[6:8].any() and kept[8:].any() and kept[:5].any() and not (kept[5] * data.discount[5]).any()
    for b in np.flatnonzero(batch.weights):
        given = data.observation["frames"][row[b] + 2 * (row[b] >= 6), env[b]]
        np.testing.assert_array_equal(batch.observation["frames"][b], given)


@pytest.mark.parametrize("n_step, written", [(1, 6), (3, 6), (3, 14)])
def test_void_starts_are_never_drawn_by_priority(n_step, written):
    """All others are, once their blocks are complete; with the items that the uniform ring gives."""
    data, record = history(written, 5), replay.prioritised(EXAMPLE, ROWS, ENVS, 2_000, n_step, 2, copies=1)
    state = record.init()
    for start in range(0, written, 2):
        state = record.add(state, jax.tree.map(lambda x, s=start: jnp.asarray(x[s : s + 2]), data), jnp.int32(start), H)
    batch = record.sample(state, jax.random.key(0), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0)), H)
    complete = range(max(0, written - ROWS), written - 2 * -(-n_step // 2))
    expected = {(e, row): one_copy_item(data, row, e, n_step) for row in complete for e in range(ENVS)}
    kept = {key: item for key, item in expected.items() if item is not None}
    assert len(kept) < len(expected) or written < 10
    drawn = [(int(env), int(time) - 1) for env, time in np.asarray(batch.observation)]
    assert set(drawn) == set(kept)
    for b, key in enumerate(drawn[:200]):
        np.testing.assert_allclose(batch.return_m[b], kept[key][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.bootstrap_discount[b], kept[key][1], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 2])
def test_nothing_is_drawn_by_priority_whose_stack_is_overwritten(block):
    example, data = played("first")
    rows = 12
    record = replay.prioritised(example, rows, ENVS, 500, 1, block, copies=1)
    add, sample = jax.jit(record.add), jax.jit(record.sample)
    state = record.init()
    for start in range(0, 30, block):
        state = add(state, jax.tree.map(lambda x, s=start: x[s : s + block], data), jnp.int32(start), H)
    batch = sample(state, jax.random.key(0), Progress(jnp.int32(30), jnp.int32(0), jnp.int32(0)), H)
    place = np.asarray(batch.indices)
    row, env = 18 + (place // ENVS - 18) % rows, place % ENVS  # rows 18 to 29 are there
    assert 20 <= row.min() <= 21 and row.max() == 30 - block - 1
    for b in range(len(place)):
        given = data.observation["frames"][row[b], env[b]]
        np.testing.assert_array_equal(batch.observation["frames"][b], given)


@pytest.mark.parametrize("kind", ["sequences", "prioritised_sequences"])
@pytest.mark.parametrize("block, period", [(1, 1), (2, 1), (1, 3), (3, 3), (6, 2)])
@pytest.mark.parametrize("written", [6, 12, 30])
def test_no_sequence_has_a_stack_that_is_overwritten(kind, block, period, written):
    """And all others are drawn. In a ring that has just been filled the stacks of the first two rows would reach into
    the last two."""
    example, data = played("first")
    rows, length, frames = 12, 4, 2  # before an observation's own
    record = getattr(replay, kind)(example, rows, ENVS, 500, length, period)
    add, sample = jax.jit(record.add), jax.jit(record.sample)
    state = record.init()
    for start in range(0, written, block):
        state = add(state, jax.tree.map(lambda x, s=start: x[s : s + block], data), jnp.int32(start), H)
    batch = sample(state, jax.random.key(0), Progress(jnp.int32(written), jnp.int32(0), jnp.int32(0)), H)
    slot, env = batch.indices if kind == "sequences" else np.divmod(batch.indices, ENVS)
    head = written - rows
    first = max(0, head) + (np.asarray(slot) * period - max(0, head)) % rows
    assert set(first) == {t for t in range(0, written - length + 1, period) if t >= head + frames}
    for row in range(length):
        given, kept = (x.observation["frames"] for x in (data, batch.transitions))
        np.testing.assert_array_equal(kept[row], given[first + row, env])


@pytest.mark.parametrize("kind", ["sequence_regions", "prioritised_sequence_regions"])
def test_no_sequence_counts_whose_stacks_reach_over_a_cut(kind):
    """Rows 6 and 7 are lost. What starts right after them sees what the actor did not."""
    example, data = played("first")
    record = getattr(replay, kind)(example, 18, 1, ENVS, 500, 3, 1)
    at = lambda row: (jnp.int32(0), jnp.int32(row))  # noqa: E731
    state = record.add(record.init(), jax.tree.map(lambda x: x[:6], data), at(0), H)
    state = record.cut(state, at(6))
    state = record.add(state, jax.tree.map(lambda x: x[8:14], data), at(6), H)
    batch = record.sample(state, jax.random.key(0), Progress(jnp.int32([12]), jnp.int32(0), jnp.int32(0)), H)
    slot = np.asarray(batch.indices[0] if kind == "sequence_regions" else batch.indices // ENVS)
    np.testing.assert_array_equal(np.asarray(batch.weights) > 0, (slot < 4) | (slot > 7))


def test_two_copies_hold_stacks_whole():
    example, data = played("zeros")
    layout = ring.layout(example, 40, ENVS, copies=2)
    state = ring.write(layout, ring.empty(layout), jax.tree.map(jnp.asarray, data), jnp.int32(0))
    read = ring.read(layout, state, np.arange(40)[:, None], np.arange(ENVS))
    jax.tree.map(np.testing.assert_array_equal, read, data._replace(action=data.action.astype(np.int32)))


def test_a_ring_too_small_for_its_stacks_is_refused():
    example, _ = played("zeros")
    with pytest.raises(UserError, match=r"n_step 3, .* needs 6 rows of 4 transitions, and the replay holds 5"):
        ring.span(ring.layout(example, 5, ENVS, copies=1), 3)


# -- what is chosen, and what it takes --------------------------------------------------------------------------------


def ring_of(env, copies="auto"):
    """(bytes a transition, copies) of a million transitions, from shapes alone."""
    state = jax.eval_shape(make_components(Config(env=env, replay_copies=copies, replay_capacity=10**6)).replay.init)
    return memory.tree_bytes(state) / state.reward.size, 1 if state.next_observation == () else 2


def test_bytes_of_a_transition():
    """At most 57 of Breakout, 62 with a sum tree of fan-out 16 over them."""
    assert ring_of("Breakout-MinAtar") == (50 + 1 + 4 + 1, 1)
    assert ring_of("Breakout-MinAtar", "two") == (2 * 50 + 1 + 4 + 1, 2)
    assert ring_of("CartPole-v1") == (2 * 16 + 1 + 4 + 1, 2)
    assert ring_of("CartPole-v1", "one") == (16 + 1 + 4 + 1, 1)
    assert ring_of("Acrobot-v1")[1] == 2


@pytest.mark.parametrize("num_actions, dtype", [(256, jnp.uint8), (257, jnp.int32)])
def test_actions_take_a_byte_where_they_fit(num_actions, dtype):
    components = make_components(Config(agent="random"))
    spec = components.environment.spec._replace(num_actions=num_actions)
    example = training.transition_example(spec, components.agent)
    layout = ring.layout(example, 2, 1)
    assert ring.empty(layout).action.dtype == dtype
    block = jax.tree.map(lambda x: jnp.zeros((2, 1, *x.shape), x.dtype), example)
    block = block._replace(action=jnp.full((2, 1), num_actions - 1, dtype))
    data = ring.write(layout, ring.empty(layout), block, jnp.int32(0))
    batch = ring.n_step_batch(layout, data, jnp.array([0]), jnp.array([0]), 1, H)
    assert batch.action.dtype == jnp.int32 and batch.action[0] == num_actions - 1


def test_prefill_and_validation_count_one_row_more():
    sizes = {"learning_starts": 0, "num_envs": 2, "batch_size": 2, "n_step": 3}
    prefills = [timeline(Config(replay_copies=copies, **sizes)).prefill for copies in ("two", "one", "auto")]
    assert prefills == [3, 4, 4]
    validate(Config(replay_capacity=8, **sizes))
    with pytest.raises(UserError, match="n_step 3 needs more than the 3 rows"):
        validate(Config(replay_capacity=6, **sizes))
    with pytest.raises(UserError, match="replay_copies"):
        validate(Config(replay_copies="three", **sizes))


@pytest.mark.parametrize("padding", ["first", slow("zeros")])
def test_one_region_of_stacks_is_the_uniform_ring(padding):
    example, data = played(padding)
    rings = (
        replay.uniform(example, 12, ENVS, 500, 3, copies=1),
        replay.regions(example, 12, 1, ENVS, 500, 3, copies=1),
    )
    states, draw = [ring.init() for ring in rings], [jax.jit(ring.sample) for ring in rings]
    for written in range(2, 41, 2):
        block = jax.tree.map(lambda x, written=written: x[written - 2 : written], data)
        at, before = jnp.int32(written), jnp.int32(written - 2)
        places, counts = (before, (jnp.int32(0), before)), (at, at[None])
        states = [ring.add(state, block, place, H) for ring, state, place in zip(rings, states, places, strict=True)]
        if written > 3:
            steps = [Progress(count, jnp.int32(0), jnp.int32(0)) for count in counts]
            key = jax.random.key(written)
            batches = [sample(state, key, step, H) for sample, state, step in zip(draw, states, steps, strict=True)]
            jax.tree.map(np.testing.assert_array_equal, *batches)
