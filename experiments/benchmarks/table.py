"""The benchmark table of docs/benchmarks.md, made from results/*.json.

python experiments/benchmarks/table.py           prints it
python experiments/benchmarks/table.py --write   writes it between the markers in docs/benchmarks.md
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
            add("convolution", f"MinAtar network, patches against lax.conv, {case}", measured, target)
        measured = f"{found['convolution']['replay_bytes_per_transition']:.0f} B"
        add("convolution", "replay bytes per Breakout transition at 1M", measured, "<= 130 B")
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
    return table


def markdown() -> str:
    """The table, and on what it was measured."""
    lines = ["| what | measured | target | commit |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    result = json.loads(next((HERE / "results").glob("*.json")).read_text(encoding="utf-8"))["measured"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "flax", "gymnax"))
    return "\n".join([*lines, "", f"{result['device']}, {result['cpu_count']} cores; {versions}."])


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
