"""The sum tree against plain arrays in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxdqn.replay import sum_tree

SIZES = [16, 17, 300]
write, update = jax.jit(sum_tree.write), jax.jit(sum_tree.update)


def filled(masses):
    return sum_tree.write(sum_tree.empty(len(masses)), jnp.int32(0), jnp.asarray(masses, jnp.float32))


def assert_sums(tree, masses):
    """Every level is the sums of groups of `masses` (float64), and padding is 0."""
    for level in tree.levels:
        np.testing.assert_allclose(level[: len(masses)], masses, rtol=1e-6)
        assert not np.any(level[len(masses) :])
        masses = np.pad(masses, (0, -len(masses) % 16)).reshape(-1, 16).sum(axis=1)
    np.testing.assert_allclose(sum_tree.total(tree), masses.sum(), rtol=1e-6)


@given(size=st.sampled_from(SIZES), length=st.sampled_from([1, 2, 40]), seed=st.integers(0, 2**16))
def test_writes_and_updates_are_those_of_an_array(size, length, seed):
    """Of two values for one leaf the larger is kept, also where both are below what was there."""
    random, length = np.random.default_rng(seed), min(size, length)
    tree, masses = sum_tree.empty(size), np.zeros(size)
    for start in [size - length, *random.integers(0, size - length + 1, 3)]:
        values = random.random(length).astype(np.float32)
        tree, masses[start : start + length] = write(tree, jnp.int32(start), values), values
        indices, values = random.integers(0, size, 6), random.random(6).astype(np.float32) * (random.random(6) < 0.8)
        tree = update(tree, indices, values.astype(np.float32))
        for index in indices:
            masses[index] = max(values[indices == index])
        np.testing.assert_array_equal(sum_tree.leaves(tree, jnp.arange(size)), masses.astype(np.float32))
        assert_sums(tree, masses)


def test_sums_do_not_drift_over_a_million_operations():
    size, batch, length = 2**15, 480, 20

    def both(turn, tree):
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(0), turn))
        values = jax.random.uniform(key, (batch + length,)) ** 4 * 10.0
        tree = sum_tree.write(tree, turn * length % (size - length), values[batch:])
        return sum_tree.update(tree, jax.random.randint(other, (batch,), 0, size), values[:batch])

    tree = jax.jit(lambda tree: jax.lax.fori_loop(0, 2_000, both, tree))(sum_tree.empty(size))
    assert_sums(tree, np.asarray(sum_tree.leaves(tree, jnp.arange(size)), np.float64))


@pytest.mark.parametrize("size", [16, 300])
def test_draws_are_proportional(size):
    masses = np.random.default_rng(0).random(size) ** 3
    drawn = np.asarray(sum_tree.draw(filled(masses), jax.random.key(1), 10**6))
    found = np.bincount(drawn, minlength=size)
    assert scipy.stats.chisquare(found, masses / masses.sum() * len(drawn)).pvalue > 1e-3


def test_every_leaf_of_a_million_is_reachable():
    """A number in the middle of each of 16 parts, at each of the five levels."""
    choices = jnp.arange(2**20)
    digits = jnp.stack([choices // 16**level % 16 for level in reversed(range(5))])
    tree = filled(1.0 + np.arange(2**20) % 3 / 16)
    assert len(tree.levels) == 5
    chosen, masses = sum_tree.descend(tree, (digits + 0.5) / 16)
    np.testing.assert_array_equal(chosen, choices)
    np.testing.assert_array_equal(masses, tree.levels[0][: 2**20])


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15], ids=str)
def test_nothing_of_mass_zero_is_drawn(scale):
    """At the ends of the interval, where sums round, and where masses are of very different sizes."""
    random = np.random.default_rng(0)
    masses = (10.0 ** random.uniform(-8, 0, (40, 300)) * (random.random((40, 300)) < 0.1) * scale).astype(np.float32)
    masses[0] = 0.0
    masses[0, 299] = scale
    ends = [0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5]
    uniforms = jnp.array(list(itertools.product(ends, repeat=3)), jnp.float32).T
    trees = jax.vmap(lambda m: sum_tree.write(sum_tree.empty(300), jnp.int32(0), m))(jnp.asarray(masses))
    drawn, found = (np.asarray(x) for x in jax.vmap(sum_tree.descend, in_axes=(0, None))(trees, uniforms))
    np.testing.assert_array_equal(np.take_along_axis(masses, drawn, axis=1), found)
    assert np.all(found > 0)


@pytest.mark.parametrize("width", [None, 3])
def test_a_loop_of_all_operations_copies_no_level(width):
    """`write`, `draw` and `update` in a loop, where what is updated depends on what was there."""

    def turn(index, tree):
        tree = sum_tree.write_all(tree, (index, jnp.zeros(2)), (index - 2, jnp.ones(2)))
        drawn, masses = sum_tree.draw_with_masses(tree, jax.random.fold_in(jax.random.key(0), index), 8)
        return sum_tree.update(tree, drawn, masses * 0.5)

    tree, over = sum_tree.empty(2**16), turn
    if width:
        tree, over = jax.tree.map(lambda x: jnp.stack([x] * width), tree), jax.vmap(turn, in_axes=(None, 0))
    loop = jax.jit(lambda tree, count: jax.lax.fori_loop(0, count, over, tree), donate_argnums=0)
    program = loop.lower(tree, jnp.int32(5)).compile().memory_analysis()
    size = sum(level.nbytes for level in tree.levels)
    assert program.alias_size_in_bytes >= size and program.temp_size_in_bytes < 0.3 * size
