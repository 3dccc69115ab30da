"""What a run reached: greedy returns at a logging point, at its end, and in words. Nothing here trains."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from jaxdqn import fingerprints
from jaxdqn.analysis import curves, intervals
from jaxdqn.base import PyTree
from jaxdqn.config import Config
from jaxdqn.evaluation import Episodes
from jaxdqn.files.documents import Fields
from jaxdqn.runs.directory import RunSpec

EVALUATED = ("eval_return", "eval_length", "eval_distinct", "eval_unfinished")


class Final(NamedTuple):
    """The episodes of one member's kept parameters after training: returns [F], and how many of them are distinct and
    how many had not ended at eval_max_steps; in what fraction of them each of `Spec.achievements` was done."""

    returns: np.ndarray
    distinct: int
    unfinished: int
    achieved: Mapping[str, float] = MappingProxyType({})


def columns(episodes: Episodes) -> dict[str, np.ndarray]:
    """The metrics of an evaluation, [M] each, from NumPy episodes [M, shards, E]."""
    every = _by_member(episodes)
    distinct, unfinished = fingerprints.distinct(every.fingerprints), (~every.finished).sum(axis=1)
    found = every.returns.mean(axis=1), every.lengths.mean(axis=1), distinct.astype(float), unfinished.astype(float)
    achieved = {f"eval_achieved_{name}": done.mean(axis=1) for name, done in every.achieved.items()}
    return dict(zip(EVALUATED, found, strict=True)) | achieved


def finals(evaluations: Sequence[Episodes], number: int) -> list[Final]:
    """Each member's first `number` episodes of several evaluations, NumPy [M, shards, E]."""
    parts = [_by_member(episodes) for episodes in evaluations]
    every = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, :number], *parts)
    distinct, unfinished = fingerprints.distinct(every.fingerprints), (~every.finished).sum(axis=1)
    achieved = [{name: float(done[m].mean()) for name, done in every.achieved.items()} for m in range(len(distinct))]
    columns = every.returns.astype(float), distinct.tolist(), unfinished.tolist(), achieved
    return [Final(*member) for member in zip(*columns, strict=True)]


def _by_member(episodes: Episodes) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1), episodes)


def returns(
    frame: pd.DataFrame, settings: Sequence[Mapping[str, object]], found: Mapping[int, Final], config: Config
) -> Fields:
    """The summary's final returns. `settings` has each member's setting, its seed apart: members with equal ones are
    replicates, and an interval is over these. A member is judged by what is `found` of it after training or, where
    that is missing for any, each by the evaluations in the last fifth of the steps that it reached in the metrics.

    mean and ci95 are None where there are several settings: `final_returns` has an entry for each.
    """
    reached = sorted(frame.member.unique().tolist()) if len(frame) else []
    judged = bool(reached) and all(member in found for member in reached)
    if judged:
        scores = {member: float(found[member].returns.mean()) for member in reached}
    else:
        scores = curves.final_score(frame, by=["member"]).to_dict() if reached else {}
    groups: dict[str, list[int]] = {}
    for member in reached:
        groups.setdefault(repr(settings[member]), []).append(member)
    entries = []
    for members in groups.values():
        values = [scores[member] for member in members]
        entry: Fields = {"setting": dict(settings[members[0]]), "mean": _number(float(np.mean(values)))}
        entry |= {"ci95": intervals.mean_interval(values), "interval": "student", "n": len(members)}
        entry["per_member"] = [_number(value) for value in values]
        if judged:
            rates = not config.common_evaluation and _within_rates(frame[frame.member.isin(members)])
            entry |= _of_episodes([found[member] for member in members], rates)
        entries.append(entry)
    alone: Fields = entries[0] if len(entries) == 1 else {"mean": None, "ci95": None}
    return {
        "final_return_of": _meaning(frame, reached, judged, config),
        "final_return_mean": alone["mean"],
        "final_return_ci95": alone["ci95"],
        "final_return_per_member": [_number(scores[member]) for member in reached],
        "final_returns": entries,
    }


class Outcome(NamedTuple):
    """What a run has come to: how its session ended, its seconds of training and of compiling in all sessions, final
    episodes of the members that were judged, first bad updates of those that diverged, and where it ran."""

    status: str
    seconds: float
    compile_seconds: float
    finals: Mapping[int, Final]
    diverged: Mapping[int, int]
    replay_bytes: int
    provenance: Mapping[str, object]


def whole(spec: RunSpec, settings: Sequence[Mapping[str, object]], frame: pd.DataFrame, outcome: Outcome) -> Fields:
    """summary.json, of each member's setting, its seed apart, and the metrics of a run."""
    ends = frame.groupby("member")[["env_steps", "updates"]].max().sum() if len(frame) else (0, 0)
    steps, updates = map(int, ends)
    seconds = max(outcome.seconds, 1e-9)
    return {
        "env": spec.config.env,
        "agent": spec.config.agent,
        "status": outcome.status,
        "num_members": len(settings),
        "seeds": list(spec.seeds),
        "env_steps": steps,
        "updates": updates,
        "env_steps_per_second": steps / seconds,
        "updates_per_second": updates / seconds,
        "compile_seconds": outcome.compile_seconds,
        "run_seconds": outcome.seconds,
        **returns(frame, settings, outcome.finals, spec.config),
        "first_bad_update_per_member": {str(member): update for member, update in outcome.diverged.items()},
        "replay_bytes": outcome.replay_bytes,
        "dead_workers": int(frame["dead_workers"].max()) if "dead_workers" in frame else 0,
        "jax_version": jax.__version__,
        **{name: outcome.provenance[name] for name in ("device", "commit", "versions")},
    }


def is_complete(summary: Fields) -> bool:
    """Whether a summary, which somebody may have edited, has what is said of a run at its end."""
    numbers = "env_steps run_seconds env_steps_per_second compile_seconds num_members dead_workers".split()
    return all(isinstance(summary.get(name), int | float) for name in numbers) and "final_returns" in summary


def _within_rates(rows: pd.DataFrame) -> bool:
    """Whether all returns of a run could be rates: 1 alone may also be the best of -1 and 1, as in Catch."""
    seen = rows[[name for name in ("eval_return", "episode_return") if name in rows]].to_numpy(float)
    return bool(((seen >= 0) & (seen <= 1) | np.isnan(seen)).all())


def _of_episodes(finals: Sequence[Final], rates: bool) -> Fields:
    """What the episodes of replicates add; `rates` is False where returns are none, and for common episodes: these are
    no independent trials, and only their means count."""
    returns, distinct = np.stack([final.returns for final in finals]), [final.distinct for final in finals]
    found: Fields = {"episodes_per_member": returns.shape[1], "distinct_per_member": distinct}
    found["unfinished_per_member"] = [final.unfinished for final in finals]
    if finals[0].achieved:
        found["achieved"] = {name: float(np.mean([f.achieved[name] for f in finals])) for name in finals[0].achieved}
    if rates and intervals.is_rate(returns):
        found |= {"ci95": intervals.return_interval(returns, distinct), "interval": "wilson"}
    return found


def _meaning(frame: pd.DataFrame, reached: Sequence[int], judged: bool, config: Config) -> str:
    random = f", actions random with probability {config.eval_epsilon:g}" if config.eval_epsilon else ""
    common = ", given these episodes, which are the same for all seeds" if config.common_evaluation else ""
    if judged:
        return f"{config.final_episodes} greedy episodes of each member's kept parameters{random}{common}"
    steps = sorted(set(frame.groupby("member").env_steps.max().tolist())) if reached else [0]
    span = " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1])))
    return f"greedy evaluations in the last fifth of the {span} steps that each member reached{random}{common}"


def lines(summary: Fields) -> list[str]:
    """The final returns for people: a line for each setting, and what they are."""
    found = []
    for entry in summary["final_returns"]:
        found += [_line(entry), *([achievements(entry["achieved"])] if entry.get("achieved") else [])]
    notes = [f"final return: {summary['final_return_of']}; interval: 95 %, over seeds"]
    distinct = [n for entry in summary["final_returns"] for n in entry.get("distinct_per_member", [])]
    unfinished = sum(sum(entry.get("unfinished_per_member", [])) for entry in summary["final_returns"])
    most = max((entry.get("episodes_per_member", 0) for entry in summary["final_returns"]), default=0)
    if distinct and min(distinct) < most:
        counts = " to ".join(str(n) for n in dict.fromkeys((min(distinct), max(distinct))))
        notes.append(f"only {counts} of {most} episodes are distinct: see --eval-epsilon and --sticky-actions")
    if unfinished:
        notes.append(f"{unfinished} episodes had not ended at eval_max_steps and count as far as they came")
    return found + notes


def achievements(rates: Mapping[str, float]) -> str:
    """For people, in what fraction of episodes each was done, the most frequent first, and which in none."""
    done = sorted((name for name in rates if rates[name] > 0), key=lambda name: -rates[name])
    never = [name for name in rates if name not in done]
    words = ", ".join(f"{name} {rates[name]:.2f}" for name in done) or "nothing"
    rest = ", ".join(never) if len(never) <= 3 else f"{len(never)} others"
    return f"achieved in an episode: {words}" + (f"; in none: {rest}" if never else "")


def _line(entry: Fields) -> str:
    setting = ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in entry["setting"].items()
    )
    mean, interval = entry["mean"], entry["ci95"]
    spread = f" [{_short(interval[0])}, {_short(interval[1])}]" if interval else ""
    return (
        f"{setting}{': ' if setting else ''}final return {'-' if mean is None else _short(mean)}{spread}, "
        f"{entry['n']} seed{'s' if entry['n'] > 1 else ''}"
    )


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _number(value: float) -> float | None:
    """`value` for JSON, which has no NaN."""
    return None if math.isnan(value) else value
