"""What the compiled programs hold: the ring once, donated, and nowhere copied; and the planner's arithmetic."""

import dataclasses
import functools
import itertools
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import probe_environments
import pytest
from cases import slow, usual

import jaxdqn
from jaxdqn import acting
from jaxdqn.components import make_components
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.parallel import schemes
from jaxdqn.parallel.axes import Axes
from jaxdqn.parallel.compiled import devices, host_memory, memory, model_sharding, population, runner
from jaxdqn.runs import checkpoints, disk, experiment
from jaxdqn.runs.settings import Settings

RING = Config(hidden_sizes=(8,), num_envs=8, batch_size=8, replay_capacity=400_000, learning_starts=64)
ONE_COPY = dataclasses.replace(RING, replay_copies="one", n_step=3)


def build(num_devices, devices_per_agent, num_members, width, config=RING):
    components = make_components(config, devices_per_agent)
    assignment = population.assign(num_members, num_devices // devices_per_agent)
    seeds, settings = list(range(num_members)), [HParams()] * num_members
    built, _ = runner.build(
        components, jax.devices()[:num_devices], devices_per_agent, assignment, seeds, settings, width
    )
    return built, memory.tree_bytes(jax.eval_shape(components.replay.init))


FORMS = {
    "plain": (1, 1, 1, 1),
    "vmap": (1, 1, 3, 3),
    "one after the other": (1, 1, 3, 1),
    "pmap": (2, 1, 2, 1),
    "pmap of vmap": (2, 1, 4, 2),
    "pmap over one agent": (2, 2, 1, 1),
}
ONE = [("plain", ONE_COPY), ("vmap", ONE_COPY)]


# With several updates: a second one reads the tree that the first has written.
PRIORITISED = dataclasses.replace(RING, replay="prioritised", n_step=3, updates_per_iteration=2)
LEAVES = 400_000 + 2 * 16


@functools.cache
def step_of(form, config):
    """The compiled step, and the bytes of one ring: of the four programs only that one is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "compiled", lambda program, *args: program.lower(*args))
        built, ring_bytes = build(*FORMS[form], config)
    return built.program.compile(), ring_bytes


EACH = [(form, config) for form in FORMS for config in (RING, PRIORITISED)] + ONE


@pytest.mark.parametrize("form, config", usual(EACH, ("plain", PRIORITISED), ("pmap of vmap", RING), *ONE))
def test_the_compiled_step_holds_each_ring_once(form, config):
    step, ring_bytes = step_of(form, config)
    analysis = step.memory_analysis()
    rings = FORMS[form][3] * ring_bytes  # of one call, on one device
    assert analysis.alias_size_in_bytes >= rings
    assert analysis.temp_size_in_bytes < 0.05 * rings


@pytest.mark.parametrize("form, config", [each for each in EACH if each[0] in ("plain", "vmap", "pmap of vmap")])
def test_no_conditional_and_no_copy_of_the_ring_in_the_compiled_step(form, config):
    text = step_of(form, config)[0].as_text()
    assert " conditional(" not in text
    width = FORMS[form][3]
    lanes = f"{width}," if width > 1 else ""
    for shape in [f"[{lanes}50000,8", *([f"[{lanes}{LEAVES}]"] if config is PRIORITISED else [])]:
        assert shape in text  # by which a ring, or its tree, is known here
        body = [line for line in text.splitlines() if " copy(" in line and shape in line.split(" copy(")[0]]
        # Copies in the entry computation happen once a call; in a loop's body they would happen every iteration.
        inside = text[: text.rindex("ENTRY")]
        assert not [line for line in body if line in inside]


def test_priorities_over_devices_cost_one_all_reduce_more():
    counts = [step_of("pmap over one agent", config)[0].as_text() for config in (RING, PRIORITISED)]
    uniform, prioritised = (len(re.findall(r" all-reduce\(| all-reduce-start\(", text)) for text in counts)
    assert prioritised == uniform + 1


def test_tree_bytes_counts_arrays_and_keys():
    tree = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(5, np.uint8), "key": jax.random.key(0)}
    assert memory.tree_bytes(tree) == 24 + 5 + 8


def test_shard_bytes_are_those_of_the_arrays():
    config = dataclasses.replace(RING, replay_capacity=1_000)
    built, ring_bytes = build(1, 1, 1, 1, config)
    total, ring = runner.shard_bytes(built.components)
    assert ring == ring_bytes == 1_000 * (4 * 4 + 1 + 4 + 1 + 4 * 4)
    state = runner.build(built.components, jax.devices()[:1], 1, built.assignment, [0], [HParams()])[1]
    gathered = jax.tree.leaves(runner.gather(state))
    assert total == sum(leaf.nbytes for leaf in gathered)


def test_a_stack_of_frames_takes_the_bytes_of_its_newest():
    jaxdqn.register("stacks", lambda: probe_environments.stacks("first"))
    config = Config(env="stacks", num_envs=2, replay_capacity=24, replay_copies="one", hidden_sizes=(4,))
    components = make_components(config)
    assert runner.transition_bytes(components) == 2 + 4 + 1 + 4 + 1  # frame, age, action, reward, ends
    assert runner.transition_bytes(make_components(dataclasses.replace(config, agent="a2c"))) == 0


SCHEMES = {
    "fused": Axes(),
    "lockstep": Axes("actor_learner", workers=4, merge_every=3, lag=1),
    "async": Axes("actor_learner", workers=2, coupling="async"),
    "server": Axes("parameter_server", workers=4),
    "server with statistics of each worker": Axes("parameter_server", workers=2, own_statistics=True),
    "local SGD": Axes("averaging", workers=4),
    "DiLoCo": Axes("averaging", workers=2, combine="outer"),
    "sharded": Axes("sharding", workers=4, data=2),
}


@pytest.mark.parametrize("agent", ["dqn", slow("a2c")])
@pytest.mark.parametrize("name", usual(SCHEMES, "fused", "lockstep", "server"))
def test_the_plan_counts_the_bytes_of_the_built_state(name, agent, monkeypatch):
    """On the device that holds most of it, and its replays alone."""
    nothing = types.SimpleNamespace(as_text=lambda: "")  # is trained here
    monkeypatch.setattr(devices, "compiled", lambda *_: nothing)
    axes = SCHEMES[name]
    if agent == "a2c" and axes.scheme == "actor_learner":
        pytest.skip("on-policy agents have no use for local replays")
    config = dataclasses.replace(RING, agent=agent, hidden_sizes=(8, 8), replay_capacity=1_000, eval_episodes=1)
    config = dataclasses.replace(config, learning_starts=0 if agent == "a2c" else config.learning_starts)
    _, components, budget = experiment.plan(config, HParams(), [0], None, None, 1, axes)
    used = schemes.choose(axes, None, 1, 1)
    _, states = schemes.build(axes, components, used, 1, population.assign(1, 1), [0], [HParams()], print)
    replays = {
        "actor_learner": lambda state: (state.replay, [actor.local for actor in state.actors]),
        "parameter_server": lambda state: [worker.replay for worker in state.workers],
    }.get(axes.scheme, lambda state: state.replay)
    held = [bytes_on_fullest_device(tree) for tree in (states[0], replays(states[0]))]
    assert (budget.shard_bytes - runner.evaluation_bytes(components), budget.replay_bytes) == tuple(held)


def bytes_on_fullest_device(tree):
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return model_sharding.bytes_per_device(plain)


def test_every_workers_replay_counts(monkeypatch):
    """Four rings do not fit where one does."""
    config = dataclasses.replace(RING, replay_capacity=2**20)
    one = experiment.plan(config, HParams(), [0], None, None, 1, Axes("parameter_server", workers=1))[2]
    monkeypatch.setattr(memory, "host_bytes", lambda: 2 * one.shard_bytes)
    experiment.plan(config, HParams(), [0], None, None, 1, Axes("parameter_server", workers=1))
    with pytest.raises(UserError, match="one agent needs"):
        experiment.plan(config, HParams(), [0], None, None, 1, Axes("parameter_server", workers=4))


# -- the disk ---------------------------------------------------------------------------------------------------------

TINY = Config(env="Catch-bsuite", num_envs=4, batch_size=8, hidden_sizes=(4,), replay_capacity=4_000)
TINY = dataclasses.replace(TINY, learning_starts=16, total_steps=64, eval_episodes=1, final_episodes=0)


@pytest.mark.parametrize("with_replay", [True, False])
@pytest.mark.parametrize("options", [{"seeds": (0, 1, 2)}, {"axes": Axes("averaging", workers=2)}], ids=str)
def test_the_plan_counts_the_bytes_of_checkpoints(options, with_replay, tmp_path, monkeypatch):
    """But for what only evaluates, and what only the actors of a checkpoint without a replay leave out."""
    asked, free = [], disk.free
    monkeypatch.setattr(disk, "free", lambda folder: asked.append(folder) or free(folder))
    quiet = Settings(progress=False, tensorboard=False, figure=False, checkpoint_replay=with_replay)
    experiment.train(TINY, HParams(), out=tmp_path, settings=quiet, **options)
    arguments = options.get("seeds", (0,)), None, None, 1, options.get("axes")
    spec, components, budget = experiment.plan(TINY, HParams(), *arguments)
    wanted = disk.need(spec, budget, with_replay)
    (path,) = checkpoints.listing(tmp_path / "checkpoints")
    saved = checkpoints.load(path).arrays
    replay = sum(x.nbytes for name, x in saved.items() if name.startswith("state/replay/"))
    assert replay == wanted.replay and (replay > 0) == with_replay and asked == [tmp_path]
    state = sum(x.nbytes for name, x in saved.items() if name.startswith("state/"))
    spare = runner.evaluation_bytes(components) * 3 + 2_000
    assert state <= wanted.checkpoint <= state + spare and wanted.total == 3 * wanted.checkpoint


def test_checkpoints_that_do_not_fit_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**17))
    with pytest.raises(UserError, match=r"need up to .* KiB each .*128.0 KiB are free .*--checkpoint-replay off"):
        experiment.train(TINY, HParams(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    spec, _, budget = experiment.plan(TINY, HParams(), (0,), None, None, 1)
    disk.check(tmp_path / "not" / "there", spec, budget, with_replay=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "file").write_bytes(bytes(2**20))
    disk.check(tmp_path, spec, budget, with_replay=True)  # those of today make room for those of tomorrow


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


@pytest.mark.slow
def test_programs_that_nobody_uses_are_forgotten(monkeypatch):
    """Without, a process that trains some fifty populations has no region of memory left, and XLA crashes."""
    if not memory.mapped_regions():
        pytest.skip("the system does not tell")
    config = Config(
        env="Catch-bsuite", hidden_sizes=(8,), num_envs=4, batch_size=16, replay_capacity=100, total_steps=800
    )
    config = dataclasses.replace(
        config, learning_starts=40, eval_episodes=2, final_episodes=2, log_interval=400, eval_interval=400
    )

    widths = itertools.count(8)

    def regions_of_another_run():
        before, another = memory.mapped_regions(), dataclasses.replace(config, hidden_sizes=(next(widths),))
        experiment.train(another, num_devices=2, seeds=(0, 1), settings=Settings(progress=False))
        return memory.mapped_regions() - before

    regions_of_another_run()
    kept = regions_of_another_run()
    monkeypatch.setattr(memory.forget_programs, "__defaults__", (0,))
    regions_of_another_run()
    assert regions_of_another_run() < kept / 2


@pytest.mark.parametrize("axes", [Axes(), slow(Axes("averaging", workers=2)), slow(Axes("actor_learner", workers=2))])
def test_equal_programs_are_traced_once_in_a_process(axes, monkeypatch):
    """Whatever the run's length, seeds and hyperparameters; another width is another program."""
    calls, inner = [], acting.rollout
    monkeypatch.setattr(acting, "rollout", lambda *args, **named: calls.append(1) or inner(*args, **named))
    config = Config(env="Catch-bsuite", hidden_sizes=(7,), num_envs=4, batch_size=16, total_steps=800, eval_episodes=2)
    config = dataclasses.replace(config, learning_starts=80, final_episodes=2)

    def traced(config, **options):
        calls.clear()
        experiment.train(config, axes=axes, settings=Settings(progress=False), **options)
        return len(calls)

    assert traced(config) > 0
    longer = dataclasses.replace(config, total_steps=1_200, log_interval=200)
    assert traced(longer, hparams=HParams(gamma=0.9), seeds=(3,)) == 0
    assert traced(dataclasses.replace(config, hidden_sizes=(9,))) > 0


# -- what is free -----------------------------------------------------------------------------------------------------

MIB = 2**20
PROC = {
    "proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 4096000 kB\n",
    "proc/self/status": "Name:\tpython\nVmSize:\t 102400 kB\nVmRSS:\t 51200 kB\nVmData:\t 20480 kB\n",
    "proc/self/limits": "Limit Soft Limit Hard Limit Units\n"
    "Max data size             unlimited            unlimited            bytes\n"
    "Max address space         unlimited            unlimited            bytes\n",
}
V2 = {
    "proc/self/cgroup": "0::/user.slice/run.scope\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/user.slice/run.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/run.scope/memory.current": "1\n",
    "sys/fs/cgroup/user.slice/memory.max": f"{1000 * MIB}\n",
    "sys/fs/cgroup/user.slice/memory.current": f"{600 * MIB}\n",
    "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {200 * MIB}\n",
}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/slurm/job_7\n0::/\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": f"{900 * MIB}\n",
    "sys/fs/cgroup/memory/slurm/memory.usage_in_bytes": f"{100 * MIB}\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{500 * MIB}\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": f"{300 * MIB}\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.stat": f"inactive_file 7\ntotal_inactive_file {100 * MIB}\n",
}
CONTAINER = {
    **V1,
    "proc/self/cgroup": "4:memory:/docker/abc\n",
    "proc/self/mountinfo": "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{700 * MIB}\n",
}
AS = {
    "proc/self/limits": f"Max address space  {2000 * MIB}  unlimited  bytes\nMax data size  unlimited unlimited bytes\n"
}
DATA = {"proc/self/limits": f"Max data size  {50 * MIB}  unlimited  bytes\n"}


@pytest.mark.parametrize(
    "files, environ, free",
    [
        ({}, {}, 4000 * MIB),
        (V2, {}, 600 * MIB),
        ({**V2, "sys/fs/cgroup/user.slice/run.scope/memory.high": f"{100 * MIB}"}, {}, 100 * MIB - 1),
        ({**V2, "sys/fs/cgroup/memory.max": "5"}, {}, 5),
        (V1, {}, 300 * MIB),
        (CONTAINER, {}, 700 * MIB),
        (AS, {}, 1900 * MIB),
        (DATA, {}, 30 * MIB),
        ({}, {"SLURM_MEM_PER_NODE": "1050"}, 1000 * MIB),
        ({}, {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 350 * MIB),
        ({}, {"SLURM_MEM_PER_GPU": "200", "SLURM_GPUS_ON_NODE": "2"}, 350 * MIB),
        ({}, {"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "many", "SLURM_CPUS_ON_NODE": "4"}, 4000 * MIB),
        (V2, {"SLURM_MEM_PER_NODE": "10"}, 0),
        (CONTAINER, {"JAXDQN_MEMORY_SHARES": "2"}, 350 * MIB),
        ({"proc/self/cgroup": "junk\n\n:::", "proc/self/mountinfo": "- -\na - b\n", "proc/meminfo": "?"}, {}, None),
    ],
)
def test_the_least_of_all_limits_is_free(tmp_path, files, environ, free):
    for name, text in {**PROC, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = host_memory.host_bytes(tmp_path, environ)
    assert found == free if free is not None else found > 0


@pytest.mark.parametrize("shares", ["0", "-1", "two", "", "1.5"])
def test_shares_that_are_no_number_are_refused(shares):
    with pytest.raises(UserError, match=f"JAXDQN_MEMORY_SHARES is '{shares}'; it must be a whole number"):
        host_memory.host_bytes(environ={"JAXDQN_MEMORY_SHARES": shares})


def test_here_something_is_free_and_no_more_than_there_is(tmp_path):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.host_bytes() < total
    assert host_memory.host_bytes(tmp_path, {}) == total // 2  # a system that tells nothing else
