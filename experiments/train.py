"""Trains agents and draws their learning curves.

    python experiments/train.py                                        DQN on CartPole-v1, in about a minute
    python experiments/train.py --env Breakout-MinAtar --num-seeds 3
    python experiments/train.py --vary.learning-rate 1e-4 3e-4 1e-3 --num-seeds 5      one population
    python experiments/train.py --num-devices 2 --devices-per-agent 2                  one agent over two devices
    python experiments/train.py --parallel a3c --axes.workers 4                        another way to run in parallel
    python experiments/train.py --parallel a3c --engine ray                            its workers as processes, on Ray
    python experiments/train.py --resume runs/NAME [--total-steps 1000000]
    python experiments/train.py --coordinator HOST:PORT --num-processes 2 --process-id 0 ...     on several hosts

Also: --env-params.FIELD VALUE, --env-kwargs.ARGUMENT VALUE, --vary.HPARAM VALUES.
"""

import contextlib
import dataclasses
import datetime
import math
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxdqn import agents, presets
from jaxdqn.config import (
    MAX_MEMBERS,
    Config,
    HParams,
    Vary,
    check_replicates,
    check_seeds,
    check_whole,
    members,
    to_dict,
    validate_hparams,
    values_of,
)
from jaxdqn.errors import UserError
from jaxdqn.files import paths
from jaxdqn.parallel import hosts, schemes
from jaxdqn.parallel.axes import Axes, over, preset
from jaxdqn.runs import cli
from jaxdqn.runs.progress import tell
from jaxdqn.validation import validate

if TYPE_CHECKING:
    from jaxdqn.runs.directory import RunSpec

# With --resume these act. Of config, hparams and axes total_steps may change, the others may only be said again. The
# rest describes a new run, and is refused.
ACT_ON_RESUME = frozenset(
    "resume total_steps stop_at_return max_minutes checkpoint_seconds checkpoint_replay dry_run profile tensorboard "
    "wandb quiet telemetry tensorboard_members engine ray_address coordinator num_processes process_id "
    "connect_seconds".split()
)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to train, on what, and where to keep it."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    hparams: HParams
    axes: Axes
    parallel: str | None = None
    """How to train in parallel, by name: parallel_dqn, apex, gorila, async_q, a3c, ...; `python experiments/list.py`
    shows all. The axes' flags change it."""
    engine: str = "local"
    """Where asynchronous workers live: local (threads), or ray (processes; pip install "jaxdqn[ray]")."""
    ray_address: str | None = None
    """Cluster of --engine ray, HOST:PORT or auto; by default Ray is started on this machine."""
    preset: str | None = None
    """Named settings; by default those of environment and agent. Other flags change them."""
    seed: int = 0
    """First seed."""
    num_seeds: int = 1
    """How many seeds to train, as one population: seed, seed + 1, ..."""
    num_devices: int | None = None
    """Devices used in all, on all hosts; by default every GPU, or every core that has work."""
    devices_per_agent: int = 1
    """Devices each agent is spread over (data parallelism)."""
    coordinator: str | None = None
    """Several hosts: HOST:PORT of process 0. Each process runs the same command, apart from --process-id."""
    num_processes: int | None = None
    """Several hosts: how many processes there are."""
    process_id: int | None = None
    """Several hosts: which of them this is, from 0; 0 writes the run directory and prints the results."""
    connect_seconds: float = 60.0
    """Several hosts: how long to wait for the other processes at the start."""
    out: pathlib.Path | None = None
    """Run directory; by default runs/ENV-AGENT-TIME."""
    resume: pathlib.Path | None = None
    """Continue the run in this directory, bit for bit; with --total-steps, extend it."""
    init_from: pathlib.Path | None = None
    """Start from the parameters of the run in this directory."""
    init_member: int = 0
    """Which member of --init-from."""
    stop_at_return: float | None = None
    """Stop when every member's greedy return reaches this."""
    max_minutes: float | None = None
    """Stop after this much training time; the run can be resumed."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints."""
    checkpoint_replay: Literal["on", "off"] = "on"
    """Whether checkpoints hold the replay; off, it is filled anew when the run is resumed, which then is not bit for
    bit. A resumed run has it as before."""
    dry_run: bool = False
    """Print the configuration, its memory and an estimate of its time, and stop."""
    telemetry: bool = False
    """Measure dormant units, effective rank and what the replay draws at each evaluation, as further metrics."""
    profile: bool = False
    """Write a JAX profiler trace to the run directory."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    tensorboard_members: int = 8
    """How many members, and means over the seeds of a setting, have curves in TensorBoard."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (pip install wandb)."""
    quiet: bool = False
    """No progress."""


def parse(arguments: list[str]) -> tuple[Args, dict[str, list[float]]]:
    """Flags over the defaults of --resume, --preset or --env and --agent, in this order; and the values of --vary."""
    env_params, arguments = cli.take_dotted(arguments, "env-params")
    env_kwargs, arguments = cli.take_dotted(arguments, "env-kwargs")
    vary, arguments = cli.take_dotted(arguments, "vary")
    saved = cli.flag_value(arguments, "--resume")
    if saved is not None:
        from jaxdqn.runs import directory

        spec, values = directory.load(paths.expanded(saved))
        defaults = Args(spec.config, spec.hparams, spec.axes)
        if values.get("checkpoint_replay") is False:
            defaults = dataclasses.replace(defaults, checkpoint_replay="off")
    else:
        defaults = Args(*chosen(arguments))
    args = cli.parse(Args, arguments, defaults, str(__doc__))
    if args.resume is not None:
        check_flags_of_resume(cli.given(arguments), vary)
    changes = {**cli.single(env_params, "env-params")}, {**cli.single(env_kwargs, "env-kwargs")}
    config = dataclasses.replace(
        args.config,
        env_params={**args.config.env_params, **changes[0]},
        env_kwargs={**args.config.env_kwargs, **changes[1]},
    )
    return dataclasses.replace(args, config=config), vary


def chosen(arguments: list[str]) -> tuple[Config, HParams, Axes]:
    """What a new run is before its other flags: by environment and agent or preset, and the way to run in parallel.
    What agent and scheme have of their own is complete, so that it has flags."""
    name, env, agent = (cli.flag_value(arguments, flag) for flag in ("--preset", "--env", "--agent"))
    _, config, hparams = presets.for_environment(env or Config.env, agent) if name is None else presets.preset(name)
    parallel_name = cli.flag_value(arguments, "--parallel")
    parallel = preset("fused" if parallel_name is None else parallel_name)
    config, hparams = over(parallel, config, hparams)
    if agent is not None and agent != config.agent:
        config, hparams = agents.config_for(agent, config), agents.hparams_for(agent, hparams)
    scheme = cli.flag_value(arguments, "--axes.scheme") or parallel.axes.scheme
    axes = parallel.axes if scheme == parallel.axes.scheme else Axes(scheme)
    for flag in cli.given(arguments) - {"axes.scheme"}:
        if flag.startswith("axes."):  # one that the scheme has not says so
            schemes.complete(Axes(scheme, **{flag.removeprefix("axes."): None}))
        owners = [name for name in agents.AGENTS if flag.removeprefix("hparams.") in agents.names_of(name)]
        if owners and flag.removeprefix("hparams.") not in agents.names_of(config.agent):
            shown = flag.replace("_", "-")
            whose = f"agent{'s' * (len(owners) > 1)} {', '.join(map(repr, owners))}"
            raise UserError(f"--{shown} belongs to {whose}, not to {config.agent!r}; choose one by --agent.")
    return *agents.complete(config, hparams), schemes.complete(axes)


def until_its_end(args: Args, arguments: list[str], vary: Vary) -> Args:
    """With a learning rate that falls until this run's end where the preset's falls until its own, and no flag says
    more."""
    if "hparams.learning_rate_updates" in cli.given(arguments) or "learning_rate_updates" in vary:
        return args
    return dataclasses.replace(args, hparams=presets.falling(args.hparams, chosen(arguments)[0], args.config))


def run(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    args, vary = parse(arguments)
    if args.num_seeds < 1:
        raise UserError(f"num_seeds is {args.num_seeds}; it must be at least 1.")
    if args.num_seeds > MAX_MEMBERS:
        raise UserError(f"num_seeds is {args.num_seeds}; at most {MAX_MEMBERS:,} members fit one run.")
    seeds = check_seeds(range(args.seed, args.seed + args.num_seeds))
    for name in ("stop_at_return", "max_minutes", "checkpoint_seconds", "tensorboard_members"):
        value = getattr(args, name)
        if value is not None and (math.isnan(value) or (name != "stop_at_return" and value < 0)):
            raise UserError(
                f"{name} is {value}; it must be a number{'' if name == 'stop_at_return' else ' of at least 0'}."
            )
    for name in ("num_devices", "devices_per_agent"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if args.init_member and args.init_from is None:
        raise UserError(f"--init-member {args.init_member} is of no run: say which with --init-from.")
    check_hosts(args)
    if args.resume is not None:
        return resume(args)
    validate(args.config, args.devices_per_agent)
    args = until_its_end(args, arguments, vary)
    validate_hparams(args.hparams, args.config.epsilon_schedule)
    everyone = members(args.hparams, seeds, vary, args.config.epsilon_schedule)
    check_replicates(everyone)
    schemes.validate(args.axes, args.num_processes or 1)
    prepare(args, len(everyone), args.num_devices, args.devices_per_agent, vary)
    from jaxdqn.runs import experiment

    if args.dry_run:
        dry_run(args, seeds, vary)
        return 0
    stem = (
        pathlib.Path("runs")
        / f"{paths.flat(args.config.env)}-{args.config.agent}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    )
    with contextlib.ExitStack() as stack:
        if args.out is not None or not hosts.is_first():
            out = args.out or stem
        else:
            out = stack.enter_context(paths.fresh(stem))
        result = experiment.train(
            args.config,
            args.hparams,
            seeds=seeds,
            vary=vary,
            out=out,
            num_devices=args.num_devices,
            devices_per_agent=args.devices_per_agent,
            axes=args.axes,
            settings=settings(args),
        )
    return report(result.summary, out)


def check_hosts(args: Args) -> None:
    """Raises `UserError` for flags of several hosts that do not go together."""
    flags = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
        raise UserError(f"several hosts need --coordinator, --num-processes and --process-id; {missing} not given.")
    if args.num_processes is not None:
        check_whole("num_processes", args.num_processes)
    if not 0 < args.connect_seconds < math.inf:
        raise UserError(f"connect_seconds is {args.connect_seconds}; it must be a number above 0.")
    if args.coordinator and args.dry_run:
        raise UserError("--dry-run is for one process; leave out --coordinator, --num-processes and --process-id.")
    if args.coordinator is None and args.connect_seconds != Args.connect_seconds:
        raise UserError("--connect-seconds is for several hosts; it needs --coordinator.")


def prepare(args: Args, num_members: int, num_devices: int | None, per_agent: int, vary: Vary) -> None:
    """Sets up JAX, and meets the other processes where there are any."""
    cli.prepare_backend(args.config, num_members, num_devices, per_agent, args.axes, args.num_processes or 1)
    if args.coordinator is None:
        return
    import jax

    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    told = {
        "jax": jax.__version__,
        **{f"config.{name}": value for name, value in to_dict(flags.pop("config")).items()},
        **{f"hparams.{name}": value for name, value in values_of(flags.pop("hparams")).items()},
        **{f"axes.{name}": value for name, value in flags.pop("axes").to_dict().items()},
        **{name: value for name, value in flags.items() if name != "process_id"},
        "vary": vary,
    }
    hosts.join(args.coordinator, args.num_processes, args.process_id, told, args.connect_seconds)
    if not hosts.is_first():
        print(f"{hosts.name()}: joined {args.coordinator}", file=sys.stderr, flush=True)


def settings(args: Args):  # type: ignore[no-untyped-def]
    """The flags that do not change a run's result."""
    from jaxdqn.runs.settings import Settings

    if args.wandb is not None and not args.wandb.strip():
        raise UserError("--wandb is empty; it must be the name of a project.")
    if args.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError('--wandb needs the wandb package: pip install "jaxdqn[wandb]".') from None
    return Settings(
        stop_at_return=args.stop_at_return,
        max_seconds=None if args.max_minutes is None else 60 * args.max_minutes,
        checkpoint_seconds=args.checkpoint_seconds,
        checkpoint_replay=args.checkpoint_replay == "on",
        progress=not args.quiet,
        tensorboard=args.tensorboard,
        tensorboard_members=args.tensorboard_members,
        wandb=args.wandb,
        telemetry=args.telemetry,
        profile=args.profile,
        init_from=args.init_from,
        init_member=args.init_member,
        engine=args.engine,
        ray_address=args.ray_address,
    )


def check_flags_of_resume(given: set[str], vary: dict[str, list[float]]) -> None:
    """Raises `UserError` for a flag that --resume would have to pass over."""
    for field in dataclasses.fields(Args):
        if field.name in given - ACT_ON_RESUME:
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} is for new runs: only --total-steps may change when resuming. Leave {flag} out.")
    if vary:
        raise UserError("--vary is for new runs: only --total-steps may change when resuming. Leave --vary out.")


def check_resume(args: Args) -> "RunSpec":
    """What the run of --resume is, with the --total-steps asked for. Raises `UserError` where more is to change."""
    from jaxdqn.runs import directory

    assert args.resume is not None
    spec, _ = directory.load(args.resume)
    wanted = dataclasses.replace(args.config, total_steps=spec.config.total_steps)
    pairs = (
        ("", to_dict(spec.config), to_dict(wanted)),
        ("axes.", spec.axes.to_dict(), args.axes.to_dict()),
        ("hparams.", values_of(spec.hparams), values_of(args.hparams)),
    )
    differences = [
        f"{prefix}{name} {old!r} (asked: {asked.get(name)!r})"
        for prefix, saved, asked in pairs
        for name, old in saved.items()
        if old != asked.get(name)
    ]
    if differences:
        what = "; ".join(differences)
        raise UserError(f"{args.resume} was trained with {what}: only --total-steps may change when resuming.")
    validate(args.config, spec.devices_per_agent)
    schemes.validate(spec.axes, args.num_processes or 1)
    return dataclasses.replace(spec, config=args.config)


def resume(args: Args) -> int:
    """--resume: goes on with the saved run."""
    assert args.resume is not None
    spec = check_resume(args)
    prepare(args, spec.num_devices, spec.num_devices, spec.devices_per_agent, {})
    from jaxdqn.runs import experiment

    if args.dry_run:
        done = experiment.steps_done(args.resume, spec.config)
        print(f"# goes on with {args.resume}, where {done:,} of {spec.config.total_steps:,} steps of a member are done")
        saved = {"num_devices": spec.num_devices, "devices_per_agent": spec.devices_per_agent}
        dry_run(dataclasses.replace(args, **saved), spec.seeds, spec.vary)
        return 0
    result = experiment.resume(args.resume, args.config.total_steps, settings(args))
    return report(result.summary, args.resume)


def report(summary: dict, out: pathlib.Path) -> int:
    """The last lines a user reads; returns the exit code."""
    from jaxdqn.runs.settings import DIVERGED, INTERRUPTED, TIMEOUT

    code = {INTERRUPTED: 130, DIVERGED: 1}.get(summary["status"], 0)
    if not hosts.is_first():
        tell(f"{hosts.name()}: {summary['status']}")
        return code
    from jaxdqn.runs.summary import lines

    cli.say(
        f"{summary['status']}: {summary['env_steps']:,} steps in {summary['run_seconds']:.1f} s "
        f"({summary['env_steps_per_second']:,.0f}/s; compiled in {summary['compile_seconds']:.1f} s), "
        f"{summary['num_members']} member(s)"
    )
    cli.say("\n".join(lines(summary)))
    dead = summary["dead_workers"]
    if dead:
        cli.say(f"{dead} worker(s) died on the way; see the warnings, and dead_workers in the metrics")
    if (out / "curves.png").exists():  # of a run that was stopped early there may be none
        cli.say(f"curves: {out / 'curves.png'}")
    if summary["status"] in (INTERRUPTED, TIMEOUT):
        cli.say(f"continue with: python experiments/train.py --resume {shlex.quote(str(out))}")
    return code


def dry_run(args: Args, seeds: tuple[int, ...], vary: Vary) -> None:
    """Prints what would run, its bytes, and its time, estimated from a second of training."""
    import time

    import jax
    import yaml

    from jaxdqn.parallel.compiled import memory, population, runner
    from jaxdqn.runs import disk, experiment
    from jaxdqn.timeline import advice, timeline

    spec, components, budget = experiment.plan(
        args.config, args.hparams, seeds, vary, args.num_devices, args.devices_per_agent, args.axes
    )
    folder = args.resume or args.out or pathlib.Path("runs")
    on_disk = disk.check(folder, spec, budget, args.checkpoint_replay == "on")
    print(yaml.safe_dump(spec.to_dict(), sort_keys=False).strip())
    everyone = members(args.hparams, seeds, vary)
    used = schemes.choose(spec.axes, spec.num_devices, spec.devices_per_agent, len(everyone))
    assignment = population.assign(spec.members_per_batch, len(used) // spec.devices_per_agent)
    chosen = everyone[: spec.members_per_batch]
    chosen_seeds, chosen_settings = [seed for seed, _ in chosen], [setting for _, setting in chosen]
    made, states = schemes.build(
        spec.axes, components, used, spec.devices_per_agent, assignment, chosen_seeds, chosen_settings, print
    )
    line = timeline(spec.config)
    states, sums = made.prefill(states, made.zero_metrics, 0, line.prefill)
    length, elapsed = 8, 0.0
    while elapsed < 0.5:
        length *= 2
        began = time.perf_counter()
        states, sums = made.step(states, sums, line.prefill, line.prefill + length)
        jax.block_until_ready(sums)
        elapsed = time.perf_counter() - began
    per_update = line.steps_per_iteration / spec.config.updates_per_iteration
    seconds = elapsed / length * line.total * budget.num_batches
    each = runner.transition_bytes(components)
    print(
        f"# {memory.gib(budget.shard_bytes)} per agent and device, {memory.gib(budget.replay_bytes)} of it replay"
        f"{f' ({each:,.0f} bytes a transition)' if each else ''}; "
        f"{len(everyone)} member(s) in {budget.num_batches} batch(es) on {len(used)} device(s)"
    )
    print(
        f"# checkpoints of up to {memory.gib(on_disk.checkpoint)}, together {memory.gib(on_disk.total)} of "
        f"{memory.gib(disk.free(folder))} free in {folder}"
    )
    if not agents.of(spec.config.agent).on_policy:  # those have no use for one
        print(
            f"# target network every {spec.hparams.target_period:,g} updates = "
            f"{spec.hparams.target_period * per_update:,g} environment steps"
        )
    for line_of_advice in advice(spec.config, spec.hparams):
        print(f"# warning: {line_of_advice}")
    print(f"# compiled in {made.compile_seconds:.1f} s; training would take about {seconds:,.0f} s, evaluation aside")


if __name__ == "__main__":
    cli.main(lambda: run(sys.argv[1:]))
