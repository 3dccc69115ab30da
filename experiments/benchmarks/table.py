"""The benchmark tables of docs/benchmarks.md, made from results/*.json.

python experiments/benchmarks/table.py           prints them
python experiments/benchmarks/table.py --write   writes them between the markers in docs/benchmarks.md
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def rows() -> list[tuple[str, str, str, str]]:
    """(what, measured, target, commit) of every result there is."""
    paths = sorted((HERE / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    table: list[tuple[str, str, str, str]] = []

    def add(name: str, what: str, measured: str, target: str) -> None:
        table.append((what, measured, target, found[name]["measured"]["commit"]))

    if "single" in found:
        for setting, values in found["single"]["settings"].items():
            steps = values["environment_steps_per_second"]
            what = f"one CartPole agent against a flat hand-written loop, {setting}"
            measured = f"{values['ratio_of_rates']:.2f} x ({steps['ours']:,.0f} against {steps['flat']:,.0f} steps/s)"
            add("single", what, measured, ">= 0.85 x" if setting == "one thread" else "")
    if "population" in found:
        result = found["population"]
        rate = sum(entry["population"]["steps_per_second"] for entry in result["rounds"]) / len(result["rounds"])
        what = f"population of {result['members']} on 2 cores against the sum of two pinned single agents"
        add("population", what, f"{result['median_ratio']:.2f} x ({rate:,.0f} steps/s in all)", ">= 0.8 x")
    if "rejax" in found:
        result = found["rejax"]
        add("rejax", "8 DQN agents against 8 of rejax, its settings", f"{result['ratio_of_rates']:.1f} x", ">= 8 x")
    if "pqn" in found:
        for count, ratio in found["pqn"]["ratio_of_rates"].items():
            what = f"PQN on Breakout, its authors' script's settings, {count} agents on as many cores"
            add("pqn", what, f"{ratio:.1f} x", f">= {found['pqn']['targets'][count]} x")
    if "convolution" in found:
        for case, values in found["convolution"]["cases"].items():
            milliseconds = values["milliseconds_per_update"]
            measured = f"{values['speedup']:.1f} x ({milliseconds['patches']:.1f} against {milliseconds['lax']:.1f} ms)"
            target = ">= 4 x" if "512" in case else ""
            network = case if case.startswith(("Atari", "octax")) else f"MinAtar network, {case}"
            add("convolution", f"patches against lax.conv in a loop, {network}", measured, target)
        measured = f"{found['convolution']['replay_bytes_per_transition']:.0f} B"
        add("convolution", "replay bytes per Breakout transition at 1M", measured, "<= 130 B")
    if "prioritised" in found:
        for case, values in found["prioritised"]["cases"].items():
            time, what = values["microseconds"], f"prioritised replay against flashbax, add + sample + update, {case}"
            measured = f"{values['ratio']:.2f} of the time ({time['ours']:.0f} against {time['flashbax']:.0f} us)"
            add("prioritised", what, measured, "<= 0.7" if case == "2^20 x 128" else "")
        values = found["prioritised"]["add"]
        measured = f"{values['ratio']:.1f} x ({values['microseconds']['1']:.2f} us for one)"
        add("prioritised", "prioritised replay, adding two transitions against adding one", measured, "<= 2.2 x")
    if "agents" in found:
        result = found["agents"]
        for name, each in result["agents"].items():
            what = f"an update of {name} on the MinAtar network, batch {result['batch']}, against dqn's"
            target = f"<= {each['target']} x" if each["target"] else ""
            measured = f"{each['of_dqn']:.2f} x ({each['milliseconds_per_update']:.1f} ms)"
            add("agents", what, measured, target)
    if "reset" in found:
        shares = {k: v["reset_share_of_iteration"] for k, v in found["reset"]["environments"].items()}
        largest = max(shares, key=lambda name: shares[name])
        what = "gymnax's reset in every step: the most a cheaper auto-reset could save of an iteration"
        add("reset", what, f"{100 * shares[largest]:.1f} % ({largest})", "")
    if "slow_worker" in found:
        result = found["slow_worker"]
        what = "four async workers, one four times slower: throughput against the sum of their own rates"
        measured = f"{result['async_of_sum']:.2f} x (sync is bound by {result['sync_bound_of_sum']:.2f} x)"
        add("slow_worker", what, measured, ">= 0.9 x")
    if "host_actors" in found:
        result = found["host_actors"]
        learning = result["learning"]
        for case in result["pong"]:
            rates, threads = case["steps_per_second"], f"{case['actors']} thread{'s' * (case['actors'] > 1)}"
            what = (
                f"Pong at random, {case['environments_of_each']} environments in each of {threads}, "
                f"{case['rollout_length']} steps a rollout, against ALE alone"
            )
            measured = f"{case['ratio']:.2f} x ({rates['actors']:,.0f} against {rates['bare']:,.0f} steps/s)"
            add("host_actors", what, measured, f">= {result['targets']['pong']} x")
        what = "environments that sleep 5 ms a step: four actors against one"
        add("host_actors", what, f"{result['sleeping']['ratio']:.2f} x", f">= {result['targets']['sleeping']} x")
        waits = ", ".join(
            f"{name[:-11]} {100 * learning[name]:.0f} %" for name in learning if name.endswith("wait_share")
        )
        measured = (
            f"{learning['steps_per_second']:,.0f} steps/s, {learning['updates_per_second']:.1f} updates/s; {waits}"
        )
        add("host_actors", "Pong with network and learner, and the share of time that each waits", measured, "")
    if "telemetry" in found:
        for name, each in found["telemetry"]["presets"].items():
            add(
                "telemetry", f"--telemetry with the preset {name}", f"{100 * each['share']:.1f} % of the time", "<= 2 %"
            )
    if "sweep" in found:
        result = found["sweep"]
        apart, together = result["processes_seconds_extrapolated"], result["population"]["seconds"]
        startup = 1 - result["processes"]["training_share"]
        what = f"sweep of {result['members']} runs as one population against two processes at a time"
        measured = f"{result['ratio']:.1f} x ({together:.0f} against {apart:.0f} s, {startup:.0%} of these start-up)"
        add("sweep", what, measured, ">= 3 x")
    if "loading" in found:
        for parts, seconds in found["loading"]["seconds"].items():
            what = f"1,000 runs of 1,000 rows loaded into one DataFrame, files in each: {parts.removesuffix(' parts')}"
            add("loading", what, f"{sorted(seconds)[len(seconds) // 2]:.1f} s", "< 3 s")
    if "startup" in found:
        second = found["startup"]["second"]
        add("startup", "second start: trace and cached compilation", f"{second['compile']:.1f} s", "< 3 s")
        what = f"second start: first metrics (imports {second['imports']:.1f} s of it)"
        add("startup", what, f"{second['first_metrics']:.1f} s", "< 10 s")
    if "gpu_program" in found:
        aims = {("dqn", "CartPole-v1", "one agent"): 60, ("double_dqn", "Breakout-MinAtar", "50 members"): 80}
        for program in found["gpu_program"]["programs"]:
            names = agent, env, form = program["agent"], program["env"], program["program"]
            if program["replay"] == "auto" and names in aims:
                what = f"kernels an iteration, compiled for an H100: {agent} on {env}, {form}"
                add("gpu_program", what, str(sum(program["kernels"].values())), f"<= {aims[names]}")
    return table


def gpu_programs() -> list[str]:
    """The table of what is compiled for a GPU."""
    path = HERE / "results" / "gpu_program.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    names = "agent, replay, environment, program, updates, kernels (learn + rest), copies of them, replay, temporaries"
    header = [*names.split(", "), "aliased", "replay written whole", "all-reduces"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for p in result["programs"]:
        size = [f"{p[name] / 1e6:.1f} MB" for name in ("replay_bytes", "temporary_bytes", "aliased_bytes")]
        reduced = f"{p['all_reduces']} of {', '.join(f'{n:,}' for n in p['all_reduced'])}" if p["all_reduces"] else ""
        kernels = f"{p['kernels']['learn']} + {p['kernels']['rest']}"
        whole = ", ".join(p["replay_written_whole"]) or "no"
        case = [p[name] for name in ("agent", "replay", "env", "program", "updates")]
        cells = [*case, kernels, p["copies"], *size, whole, reduced]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return ["", *lines, "", f"{result['card']}, commit {result['measured']['commit']}."]


def markdown() -> str:
    """The tables, and on what they were measured."""
    lines = ["| what | measured | target | commit |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    result = json.loads(next((HERE / "results").glob("*.json")).read_text(encoding="utf-8"))["measured"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "flax", "gymnax"))
    return "\n".join([*lines, "", f"{result['device']}, {result['cpu_count']} cores; {versions}.", *gpu_programs()])


def main() -> None:
    text = markdown()
    if "--write" not in sys.argv:
        print(text)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
