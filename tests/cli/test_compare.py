"""Many runs beside each other: which are run, which are kept, and the tables and pictures of what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sapo_trl.cli import compare
from sapo_trl.cli.parse import read_yaml
from sapo_trl.cli.plot import main as plot
from sapo_trl.report.comparison import (
    draw,
    ending,
    markdown,
    paired_table,
    read_runs,
    setting_table,
    survival_table,
    t_95,
    tuned,
)

REWARDS = {"sapo": (0.5, 0.75, 0.125, 0.25), "grpo": (0.5, 0.5, 0.625, 0.75)}


def option(words: list[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def fake_run(words, **_):
    """What a training run of two steps a rollout leaves, and its evaluation; `grpo` with seed 1 fails."""
    if "--model" in words:
        share = 0.25 + 0.5 * ("-grpo-" in option(words, "model"))
        result = {"pass_at_1": {"mean": share, "low": 0.125, "high": 0.875}}
        Path(option(words, "output")).write_text(json.dumps(result))
        return 0
    algorithm, seed, folder = (option(words, name) for name in ("algorithm", "seed", "output_dir"))
    folder, steps = Path(folder), int(option(words, "max_steps"))
    folder.mkdir()
    (folder / "model.safetensors").touch()
    rows = [
        {"step": s, "reward": REWARDS[algorithm][(s - 1) // 2], "log_ratio/drift": 0.25 * ((s - 1) % 2), "entropy": s}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "resolved_config.yaml").write_text("num_mini_batches: 2\n")
    return int((algorithm, seed) == ("grpo", "1"))


def test_runs_are_made_once_and_summed_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(compare.os.environ))
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    out.mkdir()
    (start / "test.jsonl").touch()
    (start / "evaluation-tiny-16.json").write_text('{"pass_at_1": {"mean": 0.375, "low": 0.25, "high": 0.5}}')
    called = []
    monkeypatch.setattr(compare.Children, "run", lambda _, words, **x: called.append(words) or fake_run(words))
    options = ["--output_dir", str(out), "--start", str(start), "--methods", "sapo", "grpo", "--seeds", "0", "1"]
    options += ["--mini_batches", "2", "--rollouts", "4", "--jobs", "2", "--beta", "0.5"]
    assert compare.main(options) == 1
    assert "1 of 4 runs failed" in capsys.readouterr().out and len(called) == 4 + 3
    called.sort(key=lambda words: "--model" in words)
    assert option(called[0], "per_device_train_batch_size") == "128"  # the config's rollout has 256 completions
    assert option(called[0], "max_steps") == "8" and option(called[0], "beta") == "0.5"
    runs, rollouts = pd.read_csv(out / "runs.csv"), pd.read_csv(out / "rollouts.csv")
    assert runs["run"].tolist() == [f"tiny-{x}-N2-lr0.0002-seed{s}" for x, s in (("grpo", 0), ("sapo", 0), ("sapo", 1))]
    grpo, sapo = runs.iloc[0], runs.iloc[1]
    assert (sapo["reward_best"], sapo["reward_last"], sapo["collapsed_at"]) == (0.75, 0.1875, 2)
    assert pd.isna(grpo["collapsed_at"]) and (grpo["pass_at_1_before"], grpo["pass_at_1_after"]) == (0.375, 0.75)
    first = rollouts[rollouts["run"] == grpo["run"]]
    assert first["reward"].tolist() == list(REWARDS["grpo"])
    assert first["drift"].tolist() == [0.25] * 4 and first["entropy"].tolist() == [1.5, 3.5, 5.5, 7.5]
    assert not list(out.glob("*seed0/*.safetensors")) and (out / "tiny-figure-4-N2-lr0.0002.png").exists()

    assert compare.main(options) == 1 and len(called) == 8  # only the one that has failed
    assert "4 runs (2 methods × 2 seeds), 3 done\n" in capsys.readouterr().out
    assert compare.main([*options[:-2], "--beta", "0.25"]) == 1 and len(called) == 8 + 4 + 3  # other settings: again
    said = "tiny-sapo-N2-lr0.0002-seed1 is made again: options --beta 0.5 → --beta 0.25\n"
    assert said in capsys.readouterr().out
    assert plot(["comparison", str(out)]) == 0
    assert "| tiny | grpo | 2 | 0.0002 | 0 | 1 | 0.375 | 0.750 | 0.750 | 0.750 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "sapoo"], "sapo"),
        (["--methods", "sapo", "--mini_batches", "3"], "3 mini-batches do not divide the 256 completions"),
        (["--methods", "sapo", "--mini_batches", "0"], "0 mini-batches do not divide the 256 completions"),
        (["--methods", "sapo", "--config", "configs/qwen3-8b/sapo.yaml"], "has no test.jsonl"),
        (["--methods", "sapo", "--bogus", "3"], "unknown argument --bogus"),
        (["--methods", "sapo sapo_temperature_neg=-1"], "sapo_temperature_neg=-1"),
        (["--figures", "staleness", "--quick"], "leave no run"),
        (["--figures", "figure-4", "--methods", "sapo", "--config", "mine/tiny/sapo.yaml"], "would share the folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(compare, "read_yaml", lambda path: {} if path.startswith("mine/") else read_yaml(path))
    assert compare.main(["--output_dir", str(tmp_path), "--seeds", "0", *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_options_that_would_be_lost(tmp_path, capsys):
    for options, message in (
        (["--methods", ""], "nothing to run"),
        (["--methods", "sapo", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--methods", "sapo", "--rollouts", "-1"], "--rollouts -1 must be at least 1"),
        (["--methods", "sapo", "--num_iterations", "2"], "completions are used once"),
    ):
        with pytest.raises(SystemExit):
            compare.main(["--output_dir", str(tmp_path), *options])
        assert message in capsys.readouterr().err


def test_another_start_or_config_is_another_run(tmp_path):
    row = {"method": "sapo", "start": "a"}
    (tmp_path / "row.json").write_text(json.dumps({"run": row}))
    assert compare.changed(tmp_path, row) == [] and compare.changed(tmp_path / "none", row) is None
    assert compare.changed(tmp_path, row | {"start": "", "rollouts": 2}) == ["start a → none", "rollouts none → 2"]
    assert compare.Case("sapo", config="configs/tiny/gspo.yaml").name == "tiny-gspo-sapo-N16-lr0.0002-seed0"
    (few := tmp_path / "few.yaml").write_text("algorithm: sapo\n")
    assert compare.Case("sapo", config=str(few), mini_batches=4).rows == 8  # 4 of 8 by default


def test_rewards_below_zero_have_an_ending():
    assert ending([-1.0, -0.5, -0.8]) == {"reward_best": -0.5, "reward_last": -0.65, "collapsed_at": None}


def test_every_figure_has_whole_seeds_and_each_run_once():
    for quick in (False, True):
        cases = [
            case for name in ("figure-4", "figure-5", "staleness") for case in compare.figure_cases(name, [3, 4], quick)
        ]
        assert {case.seed for case in cases} == {3, 4} and all(case.rows for case in cases)
    assert [case.method for case in compare.figure_cases("figure-4", [3, 4], False)[:7]] == [*compare.MAIN, "sapo"]


def test_the_runs_of_the_figures_are_those_of_the_page():
    figures = ("figure-4", "figure-5", "staleness")
    names = {case.name for figure in figures for case in compare.figure_cases(figure, range(5), False)}
    assert sorted(names) == sorted(pd.read_csv("docs/results/runs.csv")["run"])


def test_a_rate_counts_if_every_seed_survives():
    rows = [("sapo", 1e-4, 3), ("sapo", 2e-4, 3), ("sapo", 4e-4, 2), ("grpo", 2e-4, 2), ("grpo", 4e-4, 0)]
    settings = pd.DataFrame(rows, columns=["method", "learning_rate", "survived"])
    settings = settings.assign(world="w", mini_batches=4, rollouts_ahead=0, seeds=3)
    assert survival_table(settings).reset_index()[4].tolist() == [2e-4, 0.0]


def test_runs_of_different_numbers_of_rollouts_are_not_averaged():
    same = {"world": "w", "method": "sapo", "mini_batches": 4, "learning_rate": 1e-4, "rollouts_ahead": 0}
    same |= {"reward_last": 0.5, "collapsed_at": None, "pass_at_1_before": 0.25}
    runs = pd.DataFrame([same | {"rollouts": n, "pass_at_1_after": x} for n, x in ((1, 0.2), (8, 0.6), (8, 0.8))])
    table = setting_table(runs)
    assert table[["rollouts", "seeds"]].values.tolist() == [["1", 1], ["8", 2]]
    assert table["after"].tolist() == pytest.approx([0.2, 0.7]) and len(survival_table(table.assign(seeds=2))) == 0
    assert "rollouts" not in setting_table(runs[1:])


SLEEPER = """
import subprocess, sys
from sapo_trl.cli.children import Children
with Children() as children:
    try:
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(1) as pool:  # a launcher, and what it has launched
            sleep = "'import time; print(1, flush=True); time.sleep(60)'"
            again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep}])"
            pool.submit(children.run, [sys.executable, "-c", again]).result()
    except KeyboardInterrupt:
        assert children.run(["true"]) == 128 + children.signal
        sys.exit(128 + children.signal)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_children_and_theirs(number, status):
    """The pipe that all of them hold is closed."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == b"1\n"
        started = time.monotonic()
        os.kill(driver.pid, number)
        assert driver.stdout.read() == b"" and driver.wait() == status and time.monotonic() - started < 30


def test_the_laboratory_is_read_as_runs_and_drawn(tmp_path):
    """Of two methods at two rates; the regime with engine noise is left out."""
    regimes = [("N=4 lr=1e-3", 0.5), ("N=4 lr=3e-3", 0.125), ("N=4 lr=3e-3 engine_noise=0.1", 0.75)]
    methods = {"sapo": 0, "grpo": 0, "sapo sapo_temperature_neg=5": 0.0625, "sapo sapo_temperature_neg=1": 0}
    rows = [
        {
            "task": "recall",
            "regime": regime,
            "method": method,
            "curve": "[0.25, 0.5]",
            "rewards": str([end, end, end + more]),
        }
        for regime, end in regimes
        for method, more in methods.items()
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "lab.csv", index=False)
    runs = read_runs(tmp_path)
    assert len(runs) == 24 and runs["collapsed_at"].count() == 0 and set(runs["learning_rate"]) == {1e-3, 3e-3}
    assert {path.name for path in draw(tmp_path, tmp_path / "out")} == {
        "lab-recall-rates.png",
        "lab-recall-figure-5.png",
    }
    tables = markdown(tmp_path)
    assert "| lab-recall | 0 | sapo | 0.001 |" in tables and "| lab-recall | sapo | 0.500 (0.001) |" in tables
    assert "| lab-recall | 5 | 2 | 3 | +0.0208 | 0.0208 | +0.0208 | +0.0208 |" in tables  # 0, 0, 0.0625
    with pytest.raises(FileNotFoundError, match="neither"):
        draw(tmp_path / "out", tmp_path)


def test_a_tuned_rate_is_judged_on_other_seeds():
    """Seeds 0 and 1 choose 2e-4 for `a`, whose others are 7 and 8; of `b` there are no others."""
    points = [("a", 1e-4, 0, 0.5), ("a", 1e-4, 1, 0.5), ("a", 2e-4, 0, 0.75), ("a", 2e-4, 1, 0.5), ("a", 2e-4, 7, 0.25)]
    points += [("a", 1e-4, 7, 0.9), ("b", 1e-4, 0, 0.5), ("b", 2e-4, 0, 0.25)]
    runs = pd.DataFrame(points, columns=["method", "learning_rate", "seed", "pass_at_1_after"])
    assert tuned(runs)["pass_at_1_after"].tolist() == [0.25]


WHOLE = "world,method,mini_batches,learning_rate,rollouts_ahead,seed,reward_last,collapsed_at,pass_at_1_before"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("runs.csv", "run,seed\nx,0\n", "lacks the columns world, method"),
        ("runs.csv", f"run,{WHOLE}\n", "lacks the columns pass_at_1_after; it has run"),
        ("runs.csv", "", "is no CSV: No columns"),
        ("lab.csv", "task,method\nrecall,sapo\n", "lacks the columns regime, curve, rewards"),
        ("lab.csv", "task,regime,method,curve,rewards\nrecall,odd,sapo,[0.5],[0.5]\n", "have no run to compare"),
    ],
)
def test_a_table_that_lacks_something_is_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert plot(["comparison", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_tables_while_another_run_is_made_again(tmp_path, monkeypatch):
    read = Path.read_text
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "row.json").write_text(json.dumps({"run": {"run": name}, "rollouts": [{"reward": 0.5}]}))

    def removed_before_it_is_read(path, *words, **options):
        if path.parent.name == "a":
            path.unlink()
        return read(path, *words, **options)

    monkeypatch.setattr(Path, "read_text", removed_before_it_is_read)
    compare.write_tables(tmp_path)
    assert pd.read_csv(tmp_path / "runs.csv")["run"].tolist() == ["b"]


def test_differences_are_paired_by_seed():
    """By hand: .1 and .3 have mean .2 and standard error .1, and with one degree of freedom ± is 12.706 times that."""
    setting = {"world": "tiny", "rollouts_ahead": 0, "mini_batches": 4, "learning_rate": 1e-4}
    ends = {"sapo": {0: 0.5, 1: 0.9, 2: 0.1}, "grpo": {1: 0.6, 0: 0.4}, "alone": {7: 0.5}}
    runs = [setting | {"method": m, "seed": s, "pass_at_1_after": x} for m, own in ends.items() for s, x in own.items()]
    table = paired_table(pd.DataFrame(runs)).set_index("method")
    assert list(table.index) == ["sapo", "grpo"] and table.loc["sapo", "minus grpo"] == "+0.200 ± 1.271"
    assert table.loc["grpo", "minus sapo"] == "-0.200 ± 1.271" and table.loc["grpo", "minus grpo"] == ""
    assert [t_95(n) for n in (4, 11, 30)] == pytest.approx([2.776, 2.201, 2.042], abs=3e-3)
    assert not len(paired_table(pd.DataFrame(runs[:3])))
