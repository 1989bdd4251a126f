"""Pictures: their tables against values typed by hand, and what is drawn against the tables."""

import csv
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sapo_trl.cli.plot import main as plot
from sapo_trl.report import plots, ratios
from sapo_trl.report.runs import Run


def make_run(folder="run", config=None, **series) -> Run:
    """A run from name -> {step: value}."""
    steps = sorted({step for points in series.values() for step in points})
    records = [{"step": step} | {key: x[step] for key, x in series.items() if step in x} for step in steps]
    return Run(folder, records, config or {})


def rows_of(table: pd.DataFrame) -> list[dict]:
    return table.to_dict("records")


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# gates


@pytest.fixture(scope="module")
def gates():
    return {round(row["ratio"], 2): row for row in rows_of(plots.gate_table(1.0))}


@pytest.mark.parametrize(
    ("name", "positive", "negative"),  # w(2) for A > 0 and A < 0 at tau = 1
    [
        ("sigmoid", 0.786447733, 0.786447733),  # sech^2(1/2)
        ("erf", 0.606530660, 0.606530660),  # exp(-1/2)
        ("arctan", 0.5, 0.5),
        ("softsign", 0.353553391, 0.353553391),  # 2^(-3/2)
        ("one-sided", 0.606530660, 1.0),
        ("clip", 0.0, 1.0),
    ],
)
def test_weights_at_twice_the_old_probability(gates, name, positive, negative):
    assert gates[2.0][f"{name}/pos/weight"] == pytest.approx(positive, abs=1e-6)
    assert gates[2.0][f"{name}/neg/weight"] == pytest.approx(negative, abs=1e-6)


def test_clip_range_is_the_papers(gates):
    inside, outside = (1.2, 1.26), (1.28, 3.0)
    assert [gates[r]["clip/pos/weight"] for r in inside] == pytest.approx([1, 1], abs=1e-5)
    assert [gates[r]["clip/pos/weight"] for r in outside] == [0, 0]
    assert [gates[r]["clip/neg/weight"] for r in (0.5, 0.79, 0.81, 3.0)] == pytest.approx([0, 0, 1, 1], abs=1e-5)


def test_objectives(gates):
    assert gates[1.0]["sigmoid/pos/objective"] == pytest.approx(2.0)  # f(1) = 2/tau
    assert gates[2.0]["sigmoid/pos/change"] == pytest.approx(0.924234315)  # 4 (sigma(1) - 1/2)
    assert gates[2.0]["sigmoid/neg/change"] == pytest.approx(-0.924234315)
    assert gates[2.0]["clip/pos/change"] == pytest.approx(0.27, abs=1e-6)
    assert gates[0.5]["clip/neg/objective"] == pytest.approx(-0.8, abs=1e-6)
    assert gates[2.0]["one-sided/neg/objective"] == pytest.approx(-2.0)


def test_temperature_narrows_the_gate():
    row = plots.gate_table(10.0).iloc[149]
    assert row["ratio"] == 1.5
    assert row["sigmoid/pos/weight"] == pytest.approx(0.026592227)  # sech^2(2.5)


def test_gate_picture_draws_its_table(tmp_path):
    figure = plots.gate_figure()
    picture, numbers = plots.save(figure, plots.gate_table(), tmp_path / "docs", "gate")
    assert (picture.name, numbers.name) == ("gate.png", "gate.csv")
    assert Image.open(picture).size == (1800, 1260)
    rows = read_csv(numbers)
    sigmoid = figure.axes[2].lines[5]  # drawn last, on top
    assert sigmoid.get_xdata() == pytest.approx([float(row["ratio"]) for row in rows], rel=1e-5)
    assert sigmoid.get_ydata() == pytest.approx([float(row["sigmoid/pos/weight"]) for row in rows], rel=1e-5)
    clip = figure.axes[1].lines[4]
    assert clip.get_ydata() == pytest.approx([float(row["clip/neg/change"]) for row in rows], rel=1e-5, abs=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["SAPO (sigmoid)", "GRPO's hard clip"]


def test_series_differ_without_colour():
    assert len({str(dashes) for _, dashes, _ in plots.SERIES}) == len({x[2] for x in plots.SERIES}) == 6


# the bound of Eq. 21


def test_bound_by_hand():
    dump = ratios.Dump(
        log_ratio=np.array([0.2, -0.2, 0.0, 0.4, 0.3]),
        rows=np.array([0, 0, 1, 1, 3]),
        advantages=np.array([1, -1, 2, 0.5]),
    )
    first, second, single = rows_of(ratios.bound_table(dump, tau_pos=1.0, tau_neg=1.05))  # row 2 has no token
    assert first["variance"] == pytest.approx(0.04) and second["variance"] == pytest.approx(0.04)
    assert first["gap"] == pytest.approx(0.009933709)  # tanh^2(0.1)
    assert first["bound"] == pytest.approx(0.01)
    assert second["gap"] == pytest.approx(0.010473096)  # by sech^2 = 1 - tanh^2
    assert second["bound"] == pytest.approx(0.011025)  # 1.05^2/4 * 0.04
    assert (single["variance"], single["gap"], single["tokens"]) == (0, 0, 1)
    assert [row["within"] for row in (first, second, single)] == [1, 1, 1]


def test_share_within_the_bound():
    table = [{"panel": "ratio", "count": 3}, *({"panel": "row", "within": x} for x in (1, 0, 1, 1))]
    assert ratios.within_bound_frac(pd.DataFrame(table)) == 0.75


def test_ratio_picture(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(20), 10)
    z = rng.normal(size=200) * 0.1
    z[0] = 8.0  # r = 2981: counted in the outer bin
    dump = ratios.Dump(z, rows, np.where(np.arange(20) % 2, 1.0, -1.0))
    figure, table = ratios.ratio_figures(dump), rows_of(ratios.ratio_table(dump))
    assert sum(row["count"] for row in table if row["panel"] == "ratio") == 200
    assert sum(row["count"] for row in table if row["panel"] == "variance") == 20
    assert figure.axes[2].get_title(loc="left") == "100.0% within the bound"
    drawn = sorted(y for line in figure.axes[2].lines if "D_i" in line.get_label() for y in line.get_ydata())
    assert drawn == pytest.approx(sorted(row["gap"] for row in table if row["panel"] == "row"))
    counts = figure.axes[0].patches[0].get_data().values
    assert list(counts) == [row["count"] for row in table if row["panel"] == "ratio"]


def test_dump_files_are_joined(tmp_path):
    (tmp_path / "dump").mkdir()
    arrays = {"rows": np.array([0, 1]), "advantages": np.array([1.0, -1.0]), "step": 4, "mini_batch": 3}
    np.savez(tmp_path / "dump/a.npz", log_ratio=np.array([0.1, 0.2], dtype=np.float32), **arrays)
    np.savez(tmp_path / "dump/b.npz", log_ratio=np.array([0.3, 0.4], dtype=np.float32), **arrays)
    dump = ratios.load_dump(tmp_path)
    assert dump.rows.tolist() == [0, 1, 2, 3]
    assert dump.log_ratio == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-6)
    assert ratios.load_dump(tmp_path / "dump/b.npz").log_ratio == pytest.approx([0.3, 0.4], rel=1e-6)


def test_bad_dumps(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dump/"):
        ratios.load_dump(tmp_path)
    np.savez(tmp_path / "a.npz", log_ratio=np.zeros(2))
    with pytest.raises(ValueError, match="lacks advantages, rows"):
        ratios.load_dump(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", log_ratio=np.zeros(2), rows=np.array([0, 1]), advantages=np.ones(1))
    with pytest.raises(ValueError, match="don't fit"):
        ratios.load_dump(tmp_path / "b.npz")


# curves


def test_smooth_by_hand():
    points = pd.Series({step: 3.0 * (step % 2 == 0) for step in range(1, 11)})
    curve = plots.smooth(points, 1)
    assert curve.iloc[[0, 1, 2, -1]].tolist() == pytest.approx([1.5, 1.0, 2.0, 1.5])
    few = points.iloc[:9]
    assert plots.smooth(few, 1).equals(few)


def test_smooth_takes_whole_rollouts():
    saw = {1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0, 5: 1.0}  # step 5 begins a third rollout
    assert plots.smooth(pd.Series(saw), 2).to_dict() == pytest.approx(dict.fromkeys(saw, 0.5))


def test_a_maximum_is_not_averaged():
    """Two rollouts of two steps; the mean of two seeds' maxima would hide one."""
    config = {"num_mini_batches": 2}
    first = make_run(config=config, **{"ratio/max": {1: 1.0, 2: 4.0, 3: 1.5, 4: 2.0}})
    other = make_run(config=config, **{"ratio/max": {1: 1.0, 2: 1.25, 3: 8.0, 4: 2.0}})
    rows = rows_of(plots.curve_table({"a": [first]}, ["ratio/max"]))
    assert [row["smoothed"] for row in rows] == pytest.approx([4, 3.5, 2.5, 2])  # from 4 at step 1.5 to 2 at step 3.5
    rows = rows_of(plots.curve_table({"a": [first, other]}, ["ratio/max"]))
    assert [row["value"] for row in rows] == [1, 4, 8, 2]
    first.config["logging_steps"] = 1
    tables = ratios.staleness_curves({"a": [first]})
    assert tables["value"].tolist() == [1.5, 4.0] and tables["low"].isna().all()


def test_on_policy_steps_are_left_out_of_the_gates_curves():
    """A step is on-policy where the mean |log r| is 0; a run that never leaves the policy keeps all its steps."""
    moved = {
        "log_ratio/abs_mean": {1: 0.0, 2: 0.5, 3: 0.0, 4: 0.25},
        "effective_update_ratio": {1: 1, 2: 0.5, 3: 1, 4: 0.75},
    }
    run = make_run(reward={1: 0.0, 2: 1.0, 3: 0.0, 4: 1.0}, **moved)
    assert plots.measured(run, "effective_update_ratio").to_dict() == {2: 0.5, 4: 0.75}
    assert list(plots.measured(run, "reward").index) == [1, 2, 3, 4]
    still = make_run(**{"log_ratio/abs_mean": {1: 0.0, 2: 0.0}, "effective_update_ratio": {1: 1.0, 2: 1.0}})
    assert plots.measured(still, "effective_update_ratio").to_dict() == {1: 1.0, 2: 1.0}


def test_ticks_of_an_evaluation_are_where_it_was_measured():
    for steps, ticks in (((0, 20, 40, 60, 80), [0, 20, 40, 60, 80]), (range(0, 71, 7), [0, 14, 28, 42, 56, 70])):
        table = plots.curve_table(
            {"a": [make_run(eval_pass_at_1={step: step / 100 for step in steps})]}, ["eval_pass_at_1"]
        )
        _, (ax,) = plots.new_axes(1, 1, (3, 2))
        plots.draw_curves(ax, table, ["a"])
        assert sorted(ax.get_xticks()) == ticks and ax.get_ylabel() == "Pass@1"


def test_single_run_has_the_logged_interval():
    run = make_run(
        eval_pass_at_1={4: 0.5, 8: 0.75}, eval_pass_at_1_low={4: 0.25, 8: 0.5}, eval_pass_at_1_high={4: 0.625, 8: 0.875}
    )
    table = rows_of(plots.curve_table({"a": [run]}, ["eval_pass_at_1"]))
    assert [(row["step"], row["smoothed"], row["low"], row["high"]) for row in table] == [
        (4, 0.5, 0.25, 0.625),
        (8, 0.75, 0.5, 0.875),
    ]


def test_seeds_are_a_mean_with_extremes_at_common_steps():
    seeds = [
        make_run(eval_reward={1: 1.0, 2: 2.0, 3: 3.0}),
        make_run(eval_reward={1: 3.0, 2: 6.0}),
        make_run(loss={1: 9.0}),
    ]
    table = rows_of(plots.curve_table({"a": seeds}, ["eval_reward"]))
    assert [(row["step"], row["value"], row["low"], row["high"], row["seeds"]) for row in table] == [
        (1, 2.0, 1.0, 3.0, 2),
        (2, 4.0, 2.0, 6.0, 2),
    ]


def test_training_curves_draw_what_was_measured():
    rewards = {step: 3.0 * (step % 2 == 0) for step in range(1, 11)}
    a = make_run(reward=rewards, grad_norm={2: 1.0}, eval_aime25_pass_at_1={4: 0.5})
    b = make_run(reward={1: 1.0, 5: 2.0})
    groups = {"first": [a], "$second$": [b]}
    figure = plots.training_curves(groups)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["Training reward", "Held-out Pass@1: aime25", "Gradient norm"]
    light, strong, *_ = figure.axes[0].lines
    averaged = [1.5, *[1.0, 2.0] * 4, 1.5]
    assert list(light.get_ydata()) == list(rewards.values()) and list(strong.get_ydata()) == pytest.approx(averaged)
    table = rows_of(plots.training_table(groups))
    smoothed = [row["smoothed"] for row in table if row["label"] == "first" and row["key"] == "reward"]
    assert smoothed == pytest.approx(averaged)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "$second$"]


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="any of entropy; logged: reward"):
        plots.training_curves({"a": [make_run(reward={1: 0.5})]}, ["entropy"])
    with pytest.raises(ValueError, match="no step is logged yet"):
        plots.training_curves({"a": [make_run()]})


def test_curves_csv(tmp_path):
    groups = {"a": [make_run(reward={1: 1 / 3, 2: 2.0})]}
    _, numbers = plots.save(plots.training_curves(groups), plots.training_table(groups), tmp_path, "curves")
    first, second = read_csv(numbers)
    assert (first["step"], first["value"], first["low"], second["value"]) == ("1", "0.333333", "", "2")


# staleness and demo


def test_staleness_from_steps():
    config = {"num_mini_batches": 2, "logging_steps": 1}
    run = make_run(config=config, effective_update_ratio={1: 1.0, 2: 0.5, 3: 1.0, 4: 0.75})
    rows = rows_of(ratios.staleness_table(run))
    assert [(row["mini_batch"], row["value"], row["rollouts"]) for row in rows] == [(0, 1.0, 2), (1, 0.625, 2)]
    assert (rows[1]["low"], rows[1]["high"]) == pytest.approx((0.525, 0.725))
    line = ratios.gate_against_staleness(run).axes[0].lines[0]
    assert list(line.get_ydata()) == [1.0, 0.625]


def test_staleness_from_logged_indices():
    series = {"mini_batch_0/log_ratio/abs_mean": {10: 0.0}, "mini_batch_10/log_ratio/abs_mean": {10: 0.25, 20: 0.75}}
    rows = rows_of(ratios.staleness_table(make_run(config={"logging_steps": 10}, **series)))
    assert [(row["key"], row["mini_batch"], row["value"]) for row in rows] == [
        ("log_ratio/abs_mean", 0, 0.0),
        ("log_ratio/abs_mean", 10, 0.5),
    ]


def test_staleness_needs_single_steps():
    with pytest.raises(ValueError, match="logging_steps: 1"):
        ratios.gate_against_staleness(make_run(config={"logging_steps": 10}, effective_update_ratio={10: 0.9}))


def test_demo_bars_are_the_evaluations():
    run = make_run(reward={1: 0.1, 2: 0.2}, effective_update_ratio={1: 1.0, 2: 0.9})  # no length: an empty panel
    before, after = (
        {"pass_at_1": {"mean": mean, "low": mean - 0.125, "high": mean + 0.0625, "confidence": 0.9}}
        for mean in (0.25, 0.75)
    )
    figure = plots.demo_curves(run, before, after)
    bars = figure.axes[3]
    assert [bar.get_height() for bar in bars.patches] == [0.25, 0.75]
    assert bars.patches[0].get_hatch() and not bars.patches[1].get_hatch()
    ends = [collection.get_segments()[0][:, 1].tolist() for collection in bars.collections]
    assert ends == [[0.125, 0.3125], [0.625, 0.8125]]
    assert bars.get_title(loc="left") == "Held-out Pass@1, 90% interval"
    assert plots.demo_table(run, before, after).iloc[-1].dropna().to_dict() == {
        "key": "pass_at_1",
        "label": "after",
        "value": 0.75,
        "low": 0.625,
        "high": 0.8125,
    }


def test_six_colours_make_more_styles():
    groups = {f"run {i}": [make_run(eval_reward={1: i / 10, 2: math.sqrt(i)})] for i in range(9)}
    lines = plots.training_curves(groups, ["eval_reward"]).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9


@pytest.mark.parametrize("tau", ["0", "nan", "-1", "inf"])
def test_what_is_no_temperature_is_refused(tmp_path, capsys, tau):
    assert plot(["gate", "--tau", tau, "--output", str(tmp_path)]) == 1
    assert f"--tau {tau} is no temperature" in capsys.readouterr().err and not list(tmp_path.iterdir())
    np.savez(tmp_path / "a.npz", log_ratio=np.zeros(2), rows=np.zeros(2, int), advantages=np.ones(1))
    assert plot(["ratios", str(tmp_path / "a.npz"), "--tau_neg", tau]) == 1
    assert f"--tau_neg {tau} is no temperature" in capsys.readouterr().err
