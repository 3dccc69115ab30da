"""What the compiled programs hold: the ring once, donated, and nowhere copied; and the planner's arithmetic."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdqn import experiment
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import fleet, memory, population

RING = Config(hidden_sizes=(8,), num_envs=8, batch_size=8, replay_capacity=400_000, learning_starts=64)


def build(num_devices, devices_per_agent, num_members, width, config=RING):
    parts = fleet.make_parts(config, devices_per_agent)
    assignment = population.assign(num_members, num_devices // devices_per_agent)
    seeds, settings = list(range(num_members)), [HParams()] * num_members
    built, _ = fleet.build(parts, jax.devices()[:num_devices], devices_per_agent, assignment, seeds, settings, width)
    return built, memory.tree_bytes(jax.eval_shape(parts.replay.init))


FORMS = {
    "plain": (1, 1, 1, 1),
    "vmap": (1, 1, 3, 3),
    "one after the other": (1, 1, 3, 1),
    "pmap": (2, 1, 2, 1),
    "pmap of vmap": (2, 1, 4, 2),
    "pmap over one agent": (2, 2, 1, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_step_holds_each_ring_once(form):
    num_devices, devices_per_agent, num_members, width = FORMS[form]
    built, ring_bytes = build(num_devices, devices_per_agent, num_members, width)
    analysis = built.program.memory_analysis()
    rings = width * ring_bytes  # of one call, on one device
    assert analysis.alias_size_in_bytes >= rings
    assert analysis.temp_size_in_bytes < 0.05 * rings


@pytest.mark.parametrize("form", ["plain", "vmap", "pmap of vmap"])
def test_no_conditional_and_no_copy_of_the_ring_in_the_compiled_step(form):
    built, _ = build(*FORMS[form])
    text = built.program.as_text()
    assert " conditional(" not in text
    width = FORMS[form][3]
    rows = f"[{width},50000,8" if width > 1 else "[50000,8"
    assert rows in text  # the shape by which a ring is known here
    body = [line for line in text.splitlines() if " copy(" in line and f"{rows}" in line.split(" copy(")[0]]
    # Copies in the entry computation happen once a call; in a loop's body they would happen every iteration.
    inside = text[: text.rindex("ENTRY")]
    assert not [line for line in body if line in inside]


def test_tree_bytes_counts_arrays_and_keys():
    tree = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(5, np.uint8), "key": jax.random.key(0)}
    assert memory.tree_bytes(tree) == 24 + 5 + 8


def test_shard_bytes_are_those_of_the_arrays():
    config = dataclasses.replace(RING, replay_capacity=1_000)
    built, ring_bytes = build(1, 1, 1, 1, config)
    total, ring = fleet.shard_bytes(built.parts)
    assert ring == ring_bytes == 1_000 * (4 * 4 + 4 + 4 + 4 + 4 * 4 + 1)
    state = fleet.build(built.parts, jax.devices()[:1], 1, built.assignment, [0], [HParams()])[1]
    gathered = jax.tree.leaves(fleet.gather(state))
    assert total == sum(leaf.nbytes for leaf in gathered)


def test_too_many_evaluation_episodes_are_refused_before_they_are_allocated():
    config = dataclasses.replace(RING, eval_episodes=2_000_000_000)
    with pytest.raises(UserError, match="fewer eval_episodes"):
        experiment.plan(config, HParams(), [0], None, 1, 1)


@pytest.mark.parametrize(
    "num_members, num_groups, free, batches",
    [(10, 1, 1e9, 1), (10, 1, 500, 3), (10, 2, 500, 2), (1, 4, 125, 1), (7, 1, 250, 4)],
)
def test_plan_splits_into_the_fewest_batches(num_members, num_groups, free, batches):
    plan = memory.plan(100, 90, num_members, num_groups, int(free))
    assert plan.num_batches == batches
    lanes = -(-plan.members_per_batch // num_groups)
    assert lanes * 100 <= memory.HEADROOM * free
    assert plan.members_per_batch * batches >= num_members


def test_plan_refuses_with_numbers():
    with pytest.raises(UserError, match=r"needs 2\.0 GiB.*1\.8 GiB of it replay.*lower replay_capacity to 33 %"):
        memory.plan(2 * 2**30, int(1.8 * 2**30), 1, 1, 2**30)


def test_plan_does_not_blame_a_small_replay():
    with pytest.raises(UserError, match="smaller network"):
        memory.plan(2 * 2**30, 1000, 1, 1, 2**30)
