"""Figures: what they draw, name and leave out; the pixels are for people."""

import math

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from jaxdqn.analysis import comparisons, figures, intervals, lineage, scores, style, tuning
from jaxdqn.errors import UserError


def metrics(agents=("dqn", "ppo"), envs=("CartPole-v1",), members=4, points=10, **columns):
    rng = np.random.default_rng(0)
    rows = [
        {"run": f"{env}-{agent}", "env": env, "agent": agent, "member": m, "env_steps": 100 * p, "seconds": 0.1 * p}
        | {"eval_return": p + rng.normal() if p % 2 else math.nan}
        for env in envs
        for agent in agents
        for m in range(members)
        for p in range(1, points + 1)
    ]
    return pd.DataFrame(rows).assign(**columns).astype(dict.fromkeys(("run", "env", "agent"), "category"))


def texts(figure):
    """All legend entries, tick labels and notes of a figure."""
    figure.canvas.draw()
    found = [" ".join(figure.get_supxlabel().split())]
    for axis in figure.axes:
        legend = axis.get_legend()
        found += [text.get_text() for text in (legend.get_texts() if legend else [])]
        found += [label.get_text() for label in [*axis.get_yticklabels(), *axis.get_xticklabels(), *axis.texts]]
        found += [axis.get_xlabel(), axis.get_ylabel(), axis.get_title()]
    return found


# -- curves -----------------------------------------------------------------------------------------------------------


def test_a_group_is_drawn_with_its_mean_its_seeds_and_its_bootstrap_band():
    frame = metrics(("dqn",))
    (axis,) = figures.learning_curves(frame).axes
    values = frame.dropna().pivot(index="env_steps", columns="member", values="eval_return").to_numpy()
    thin, mean = axis.lines[:4], axis.lines[-1]
    for line, member in zip(thin, values.T, strict=True):
        np.testing.assert_allclose(line.get_ydata(), member)
    np.testing.assert_allclose(mean.get_ydata(), values.mean(axis=1))
    np.testing.assert_allclose(mean.get_xdata(), [100, 300, 500, 700, 900])
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    for step, row in zip([100, 300, 500, 700, 900], values, strict=True):
        expected = intervals.bootstrap_ci(row, resamples=figures.BAND_RESAMPLES)
        drawn = corners[corners[:, 0] == step, 1]
        np.testing.assert_allclose([drawn.min(), drawn.max()], expected)


def test_the_legend_counts_seeds_and_says_why_one_has_no_interval():
    frame = metrics()
    frame = frame[(frame.agent == "dqn") | (frame.member == 0)]
    figure = figures.learning_curves(frame, by=["agent"])
    found = texts(figure)
    assert "dqn (n=4)" in found and "ppo (n=1: no interval)" in found
    assert any("95 % bootstrap interval" in text for text in found)
    assert len(figure.axes[0].collections) == 1  # the band of dqn alone


def test_axes_are_named_with_units_and_seconds_are_seconds():
    assert {"environment steps", "greedy return"} <= set(texts(figures.learning_curves(metrics())))
    figure = figures.learning_curves(metrics(), x="seconds")
    assert "training time in seconds, compilation apart" in texts(figure)
    assert figure.axes[0].lines[-1].get_xdata().max() == pytest.approx(0.9)


def test_the_mean_is_dotted_where_a_seed_has_ended():
    frame = metrics(("dqn",))
    frame = frame[(frame.member > 0) | (frame.env_steps <= 500)]
    dotted, whole = figures.learning_curves(frame).axes[0].lines[-2:]
    assert dotted.get_linestyle() == ":" and np.isfinite(dotted.get_ydata()).all()
    assert np.isfinite(whole.get_ydata()).tolist() == [True, True, True, False, False]


def test_environments_have_a_panel_each_with_the_same_colours():
    frame = metrics(envs=("Acrobot-v1", "CartPole-v1"))
    frame = frame[(frame.env == "CartPole-v1") | (frame.agent == "ppo")]
    one, other = figures.learning_curves(frame, by=["env", "agent"]).axes
    assert (one.get_title(), other.get_title()) == ("Acrobot-v1", "CartPole-v1")
    assert one.lines[-1].get_color() == other.lines[-1].get_color() != other.lines[0].get_color()


def test_a_run_without_evaluations_has_an_empty_panel():
    (axis,) = figures.learning_curves(metrics(eval_return=math.nan)).axes
    assert not axis.lines and axis.get_legend() is None
    (axis,) = figures.seed_dots(metrics(eval_return=math.nan)).axes
    assert not axis.lines


def test_unknown_columns_are_the_users_error():
    for draw in (figures.learning_curves, figures.seed_dots, comparisons.interval_plot):
        with pytest.raises(UserError, match=r"unknown column 'agnet': did you mean 'agent'"):
            draw(metrics(), by=["agnet"])
    with pytest.raises(UserError, match="unknown column 'los'"):
        figures.learning_curves(metrics(loss=1.0), y="los")


def test_seed_dots_are_the_final_scores():
    frame = metrics()
    figure = figures.seed_dots(frame, ["agent"])
    dots, diamond, bar = figure.axes[0].lines[:3]
    late = frame[(frame.agent == "dqn") & (frame.env_steps > 800)].dropna()
    assert sorted(dots.get_xdata()) == pytest.approx(sorted(late.eval_return))
    assert diamond.get_xdata()[0] == pytest.approx(late.eval_return.mean())
    assert list(bar.get_xdata()) == intervals.mean_interval(late.eval_return.to_numpy())
    assert {"dqn (n=4)", "ppo (n=4)"} <= set(texts(figure))


def test_styles_differ_among_the_first_28_also_without_colour_for_neighbours():
    looks = [style.look(index) for index in range(28)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 28
    for one, two, three in zip(looks, looks[1:], looks[2:], strict=False):
        assert len({look["linestyle"] for look in (one, two, three)}) == 3
    assert all(matplotlib.colors.is_color_like(colour) for colour in style.COLOURS)


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_scores_are_normalised_by_the_reference_or_by_the_runs_seen():
    frame = metrics(envs=("A", "B"), members=3)
    raw = comparisons.normalised_scores(frame, reference={"A": (0.0, 1.0), "B": (0.0, 1.0)})
    half = comparisons.normalised_scores(frame, reference={"A": (1.0, 3.0), "B": (0.0, 2.0)})
    np.testing.assert_allclose(half["dqn"]["A"], (raw["dqn"]["A"] - 1.0) / 2.0)
    np.testing.assert_allclose(half["ppo"]["B"], raw["ppo"]["B"] / 2.0)
    seen = comparisons.normalised_scores(frame)
    for env in "AB":
        together = np.concatenate([seen["dqn"][env], seen["ppo"][env]])
        assert len(together) == 6 and (together.min(), together.max()) == (0.0, 1.0)
    with pytest.raises(UserError, match="no reference scores for B"):
        comparisons.normalised_scores(frame, reference={"A": (0.0, 1.0)})
    with pytest.raises(UserError, match="scores of A are both 2"):
        comparisons.normalised_scores(frame, reference={"A": (2.0, 2.0)})


def test_comparisons_draw_the_aggregates():
    frame = metrics(envs=("A", "B"))
    table = comparisons.normalised_scores(frame)
    figure = comparisons.interval_plot(frame)
    for axis, aggregate in zip(figure.axes, comparisons.AGGREGATES.values(), strict=True):
        assert axis.lines[0].get_xdata()[0] == pytest.approx(aggregate(table["dqn"]))
    assert "dqn (n=4)" in texts(figure) and any("2 environments" in text for text in texts(figure))
    profile = comparisons.performance_profiles(frame)
    line = profile.axes[0].lines[1]
    expected = scores.performance_profile(table["ppo"], line.get_xdata()).value
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert "ppo (n=8, 2 envs)" in texts(profile)


def test_settings_on_different_environments_are_not_compared():
    frame = metrics(envs=("A", "B"))
    part = frame[(frame.agent == "dqn") | (frame.env == "A")]
    for draw in (comparisons.interval_plot, comparisons.performance_profiles):
        with pytest.raises(UserError, match="ppo has no score on B"):
            draw(part)


def test_runs_are_compared_as_settings_of_their_own():
    frame = metrics(envs=("A", "B"))
    for by in (["run"], ["member"], ["agent", "env"]):
        assert sum(len(tasks) for tasks in comparisons.normalised_scores(frame, by).values()) > 1
    assert len(tuning.scored(frame, ["run"])) == len(tuning.scored(frame, ["agent"]))


def test_a_single_run_is_compared_without_interval():
    figure = comparisons.interval_plot(metrics(members=1), reference={"CartPole-v1": (0.0, 10.0)})
    assert "dqn (n=1: no interval)" in texts(figure)
    assert [len(axis.lines) for axis in figure.axes] == [2] * 4  # a diamond each


# -- hyperparameters --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
TRIALS = pd.DataFrame(
    {
        "learning_rate": 10 ** RNG.uniform(-5, -1, 40),
        "gamma": RNG.uniform(0.9, 0.99, 40),
        "batch_size": RNG.choice([32, 64, 256], 40),
        "network": RNG.choice(["mlp", "conv"], 40),
        "score": RNG.normal(100.0, 10.0, 40),
    }
)
NAMES = ["learning_rate", "gamma", "batch_size", "network"]


def test_values_over_decades_have_a_logarithmic_axis():
    scales = [tuning.response(TRIALS, name).axes[0].get_xscale() for name in NAMES]
    assert scales == ["log", "linear", "log", "linear"]


def test_the_response_is_the_mean_of_each_value_with_its_interval():
    (axis,) = tuning.response(TRIALS, "batch_size").axes
    dots, means, *bars = axis.lines
    assert len(dots.get_xdata()) == 40 and len(bars) == 3
    for value, mean, bar in zip([32, 64, 256], means.get_ydata(), bars, strict=True):
        chosen = TRIALS[TRIALS.batch_size == value].score.to_numpy()
        assert mean == pytest.approx(chosen.mean())
        assert list(bar.get_ydata()) == intervals.bootstrap_ci(chosen)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32", "64", "256"]


def test_another_column_is_told_apart_by_colour_numbers_by_thirds():
    found = texts(tuning.response(TRIALS, "gamma", colour="network"))
    assert {f"network={name} (n={(TRIALS.network == name).sum()})" for name in ("mlp", "conv")} <= set(found)
    labels = [text for text in texts(tuning.response(TRIALS, "gamma", colour="learning_rate")) if "learning" in text]
    assert len(labels) == 3 and f"{TRIALS.learning_rate.min():.3g} to" in labels[0]


def test_metrics_are_scored_by_their_final_return():
    frame = metrics(("dqn",), learning_rate=0.1)
    table = tuning.scored(frame, ["learning_rate"])
    late = frame[frame.env_steps == 900]
    assert table.score.tolist() == pytest.approx(late.eval_return.tolist())
    assert "final greedy return" in texts(tuning.response(frame, "learning_rate"))


def test_failed_trials_are_in_no_figure():
    failed = TRIALS.assign(score=TRIALS.score.where(TRIALS.index > 4))
    for draw in (tuning.pairwise, tuning.parallel_coordinates, tuning.importance):
        assert any("n=35" in text for text in texts(draw(failed, NAMES)))


def test_values_that_are_not_in_use_are_nowhere():
    used = TRIALS.index % 4 > 0
    partly = TRIALS.assign(gamma=TRIALS.gamma.where(used), network=TRIALS.network.where(used))
    for name in ("gamma", "network"):
        dots = tuning.response(partly, name).axes[0].lines[0]
        assert len(dots.get_xdata()) == used.sum() and np.isfinite(dots.get_xdata()).all()
    figure = tuning.parallel_coordinates(partly, NAMES)
    order = TRIALS.score.argsort()
    heights = np.ma.filled(
        np.ma.masked_invalid([path.vertices[:, 1] for path in figure.axes[0].collections[0].get_paths()]), np.nan
    )
    assert (np.isnan(heights[:, [1, 3]]) == ~used[order][:, None]).all() and np.isfinite(heights[:, [0, 2, 4]]).all()
    (scatter,) = tuning.pairwise(partly, NAMES).axes[1].collections
    assert np.isfinite(np.ma.filled(scatter.get_offsets(), np.nan)[:, 1]).sum() == used.sum()
    assert any("not in use" in text for text in texts(figure))
    assert f"(n={used.sum()})" in " ".join(texts(tuning.importance(partly, NAMES)))


def test_without_any_score_there_is_nothing_to_draw():
    failed = TRIALS.assign(score=math.nan)
    with pytest.raises(UserError, match="none of 40 trials"):
        tuning.response(failed, "gamma")
    with pytest.raises(UserError, match="no run has a final score"):
        comparisons.interval_plot(metrics(eval_return=math.nan))


def test_every_pair_of_hyperparameters_has_its_scatter():
    figure = tuning.pairwise(TRIALS, NAMES)
    panels = [axis for axis in figure.axes if axis.collections and axis.get_label() != "<colorbar>"]
    assert len(panels) == 4 + 6
    (scatter,) = panels[1].collections
    order = TRIALS.score.argsort()
    np.testing.assert_allclose(scatter.get_offsets()[:, 0], TRIALS.learning_rate[order])
    np.testing.assert_allclose(scatter.get_offsets()[:, 1], TRIALS.gamma[order])


def test_parallel_coordinates_run_from_the_least_to_the_greatest():
    figure = tuning.parallel_coordinates(TRIALS, NAMES)
    (lines,) = figure.axes[0].collections
    heights = np.array([path.vertices[:, 1] for path in lines.get_paths()])
    assert heights.shape == (40, 5)
    np.testing.assert_allclose(heights[:, [0, 1, 2, 4]].min(axis=0), 0.0)
    np.testing.assert_allclose(heights[:, [0, 1, 2, 4]].max(axis=0), 1.0)
    assert (np.diff(heights[:, 4]) >= 0).all()  # the best is drawn last
    assert {"32", "64", "256", "mlp", "conv"} <= set(texts(figure))


# -- lineages ---------------------------------------------------------------------------------------------------------


def population():
    """Three members: at generation 1 member 0 copies 2; at generation 2 member 1 copies 0, and is best in the end."""
    rows = [
        (0, 0, 0, 1.0, 0.1), (0, 1, 1, 2.0, 0.2), (0, 2, 2, 3.0, 0.01),
        (1, 0, 2, 4.0, 0.02), (1, 1, 1, 2.0, 0.2), (1, 2, 2, 3.5, 0.01),
        (2, 0, 0, 5.0, 0.02), (2, 1, 0, 6.0, 0.04), (2, 2, 2, 4.0, 0.01),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["generation", "member", "parent", "score", "learning_rate"])


def test_the_ancestry_of_the_best_is_followed_through_its_copies():
    line = lineage.ancestry(population())
    assert line[["generation", "member"]].to_numpy().tolist() == [[0, 2], [1, 0], [2, 1]]
    assert line.score.tolist() == [3.0, 4.0, 6.0]


def test_the_lineage_joins_every_member_to_its_parent():
    figure = lineage.lineage(population())
    score, rate = figure.axes
    joined = {tuple(line.get_ydata()) for line in score.lines[:9] if np.isfinite(line.get_ydata()).all()}
    assert joined == {(3.0, 4.0), (2.0, 2.0), (3.0, 3.5), (4.0, 5.0), (4.0, 6.0), (3.5, 4.0)}
    assert rate.get_yscale() == "log" and rate.get_ylabel() == "learning rate"
    assert "2 copies" in figure.get_supxlabel()
    with pytest.raises(UserError, match="unknown column 'parent'"):
        lineage.lineage(population().drop(columns="parent"))
