"""The benchmark measures what it says: gradients agree, positions are counted, its last line is JSON."""

import json
import time
from dataclasses import replace
from pathlib import Path

import bench.ahead as bench_ahead
import bench.gpu as bench_gpu
import bench.gpu_tests as bench_gpu_tests
import bench.report as bench_report
import bench.step as bench_step
import bench.step_report as bench_step_report
import benchmark
import pytest
import torch
from accelerate.state import AcceleratorState
from bench.cases import CASES, TRL_DEFAULT, Case, Rollouts, Setting, make_model, make_rollouts
from bench.update import palindrome, peak_mb, run_case, useful_flops, worst_error

TINY = Case(
    lengths="short", equal_frac=0.5, prompt=8, shape="test", num_prompts=4, generations=4, repeats=1, tokens_per_pack=64
)


def test_a_tiny_case_through_the_whole_update_benchmark(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_report, "CASES", (TINY,))
    monkeypatch.setattr(bench_report, "HEADLINE", TINY)
    monkeypatch.setattr(bench_report, "run_case", lambda case, schedule: with_peaks(run_case(case)))
    output, plot = tmp_path / "update.json", tmp_path / "bench.png"
    (result,) = bench_report.benchmark_update(quick=False, output=output, plot=plot)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(bench_report.LINE) <= line.keys() and line["ratio_vs_best"] == result["ratio_vs_best"]
    assert 0 < result["gradient_error"] < 5e-6  # 0 would mean that one model was compared with itself
    # TRL pads all 16 rows to the longest; two groups of four have equal rewards
    rollouts = make_rollouts(TINY)
    assert result["trl_forwarded_tokens"] == 16 * (8 + max(map(len, rollouts.completion_ids)))
    assert result["useful_tokens"] <= result["forwarded_tokens"] < result["trl_forwarded_tokens"] / 2
    assert 0 < result["metrics_overhead_frac"] < 1
    written = json.loads(output.read_text())
    assert written["cases"][0]["ours_s"] == result["ours_s"] and written["machine"]["torch_threads"] == 1
    assert written["versions"]["trl"] and plot.stat().st_size > 10_000


def with_peaks(result: dict) -> dict:
    """Peaks take a process per side; the tiny model's are noise."""
    return result | {"activation_peak_ratio": 0.3, "activation_peak_ratio_vs_best": 0.5}


def test_the_memory_of_an_update_is_measured_in_a_process_that_is_started_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert 0 <= peak_mb("ours", TINY, TRL_DEFAULT) < 500


def test_useful_work_counts_active_rows_and_a_groups_prompt_once():
    # group 0: rewards differ; group 1: equal. Rows of 2 + 3 and 2 + 1 tokens are active.
    rollouts = Rollouts([[5, 6]] * 2 + [[7, 8]] * 2, [[1, 2, 3], [4], [5] * 9, [6]], [0.0, 1.0, 1.0, 1.0], 2)
    assert rollouts.active == [True, True, False, False]
    assert rollouts.useful_tokens == 2 + 3 + 1
    # a layer: q 32x32, k and v 32x16, o 32x32, three of 32x64; two layers; head 512x32 at 4 tokens;
    # causal pairs 5*5 + 3*3 - 2*2 = 30, over 4 heads of 8 and two layers
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert useful_flops(TINY, rollouts, make_model(TINY)) == 6 * (body * 6 + 512 * 32 * 4 + 64 * 30)


def test_worst_error_names_the_parameter_and_refuses_other_parameters():
    theirs = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    ours = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.2])}
    assert worst_error(ours, theirs) == (pytest.approx(0.2), "b")
    with pytest.raises(ValueError, match="different parameters"):
        worst_error({"a": theirs["a"]}, theirs)


def test_sides_alternate_and_every_case_starts_with_trls_default():
    assert palindrome("ABC", 3) == list("ABCCBAABC")
    assert palindrome("ABC", 3, {"A": 1}) == list("ABCCBBC")
    assert all(case.settings[0] == TRL_DEFAULT and case.num_rows % 8 == 0 for case in CASES)
    assert {case.name for case in CASES} >= set(bench_report.TARGETS)


def test_the_whole_step_is_split_by_phase_on_both_sides(monkeypatch, tmp_path, capsys):
    case = replace(TINY, generations=8, settings=(Setting(8, True), Setting(4, False)))
    world = bench_step.World("tiny", case, lambda: make_model(case), 0, 1)
    monkeypatch.setattr(bench_step_report, "worlds", lambda model: (world,))
    (result,) = bench_step_report.benchmark_step(("tiny",), None, tmp_path / "step.json")
    *_, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["tiny"]["ratio_vs_best"] == result["ratio_vs_best"]
    assert "command" in json.loads((tmp_path / "step.json").read_text())
    for seconds in result["seconds"].values():
        assert sum(seconds[phase] for phase in bench_step.PHASES) == pytest.approx(seconds["wall"], rel=1e-6)
        assert seconds["logps"] > 0 and seconds["update"] > 0


def test_the_whole_step_with_a_rollout_ahead(forked_worker, capsys):
    case = replace(TINY, generations=8, settings=(TRL_DEFAULT, Setting(4, False)))
    world = bench_step.World("tiny", case, lambda: make_model(case), 4, 1)
    result = bench_ahead.run_ahead(world, rollouts=1, threads=(1,))
    seconds = result["seconds_per_rollout"]
    assert seconds.keys() == {"default", "best", "ours", "ahead"} and min(x["wall"] for x in seconds.values()) > 0
    assert result["wall_ratio_vs_ours"] == pytest.approx(seconds["ours"]["wall"] / seconds["ahead"]["wall"])
    waits = [seconds["ahead"][f"{who}_waits_frac"] for who in ("update", "worker")]
    assert all(0 <= x < 1 for x in waits) and "update_waits_frac" not in seconds["ours"]
    bench_step_report.print_ahead([result])
    assert "tiny-ahead" in capsys.readouterr().out


@pytest.fixture
def own_precision():
    """accelerate fixes the precision per process: give it back after bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gpu_benchmark_shrinks_what_does_not_fit_and_drops_what_has_no_time(monkeypatch, own_precision):
    case = replace(TINY, bf16=True, settings=(Setting(8, True), Setting(4, False)))
    update, calls = bench_gpu.one_update, []

    def full_at_first(side, *args):
        calls.append(side.trainer)
        if len(calls) == 2:  # the first is the fp32 reference
            raise torch.OutOfMemoryError("as if")
        return update(side, *args)

    monkeypatch.setattr(bench_gpu, "one_update", full_at_first)
    large = replace(case, shape="qwen3-8b", lengths="8k")
    saved = []
    save = lambda results, dropped: saved.append(len(results))  # noqa: E731
    (result,), dropped = bench_gpu.run_cases((case, large), 1.0, time.monotonic(), save)
    assert result["out_of_memory"] == ["ours, 64 tokens a pack, checkpointing off"]
    assert result["ours_setting"] == "ours, 32 tokens a pack, checkpointing off"
    assert 1e-4 < result["bf16_error"] < 0.1 and 0.5 < result["bf16_error_ratio"] < 2
    assert result["useful_mfu_frac"] > 0 and result["ratio_vs_best"] > 0
    assert saved == [1] and len(dropped) == 1 and "qwen3-8b" in dropped[0]


SOME_TESTS = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "numbers differ"

def test_left_out(): pytest.skip("no device")
"""


def test_one_file_holds_the_gpu_benchmark_and_its_tests(tmp_path, monkeypatch):
    folder, output = tmp_path / "tests" / "gpu", tmp_path / "gpu.json"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(SOME_TESTS)
    monkeypatch.setattr(bench_gpu, "check_device", lambda: None)
    monkeypatch.setattr(bench_gpu, "benchmark_gpu", lambda minutes, path: path.write_text('{"cases": [1]}'))
    monkeypatch.setattr(bench_gpu_tests.run_tests, "__defaults__", (folder, 60.0))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "gpu", "--tests", "--output", str(output)])
    benchmark.main()
    written = json.loads(output.read_text())
    tests = written["tests"]
    assert written["cases"] == [1] and tests["tests"] == 3 and tests["seconds"] > 0 and tests["error"] == {}
    assert list(tests["failure"]) == ["test_wrong"] and "numbers differ" in tests["failure"]["test_wrong"]
    assert list(tests["skipped"]) == ["test_left_out"] and "no device" in tests["skipped"]["test_left_out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_benchmark_refuses_a_machine_without_one():
    with pytest.raises(RuntimeError, match="no CUDA device"):
        bench_gpu.check_device()


def test_the_picture_names_cases_in_words():
    committed = json.loads((Path(bench_report.__file__).parents[2] / "docs/results/update.json").read_text())["cases"]
    labels = [bench_report.in_words(case["case"]) for case in committed]
    assert labels[0] == "sapo, up to 1k tokens,\n3 of 8 groups without advantage, prompts of 100"
    assert all("zero-advantage" not in label for label in labels) and any("experts" in label for label in labels)
