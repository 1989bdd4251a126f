"""Run folders read whatever their state, and a report page that loads nothing and escapes everything."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sapo_trl.cli.plot import main as plot
from sapo_trl.cli.reproduce import routing_summary
from sapo_trl.report.build import _defaults, write_report
from sapo_trl.report.completions import completion_tables, flipped, flips, zero_one_column
from sapo_trl.report.page import escaped
from sapo_trl.report.plots import new_axes
from sapo_trl.report.ratios import draw_fan, fan_table, what_the_gate_did
from sapo_trl.report.runs import Run, distinct, group_seeds, load_run, run_name

HOSTILE = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)></pre>\u202e\x1b[31m & "quoted"'
EVALUATION = {
    "pass_at_1": {"mean": 0.5, "low": 0.25, "high": 0.625, "confidence": 0.95, "num_problems": 8},
    "scores": {"pass_at_1": {"mean": 0.5}, "pass_at_4": {"mean": 0.875}, "maj_at_4": {"mean": 0.625}},
    "num_problems": 8,
    "num_samples": 4,
    "mean_length_tokens": 41.25,
    "truncated_frac": 0.125,
}


def write_run(folder: Path, records=(), config=None, completions=(), **files) -> Path:
    """A run folder; `files` are JSON contents by stem."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        (folder / "resolved_config.yaml").write_text(yaml.safe_dump(config))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    if completions:
        (folder / "completions").mkdir()
        pq.write_table(pa.Table.from_pylist(list(completions)), folder / "completions/completions_00002.parquet")
    return folder


def record(step: int, **numbers) -> dict:
    return {"step": step, "time_s": 60.0 * step} | numbers


class Page(HTMLParser):
    """Tags and attributes of a page, its visible text, and its source without the names that a phone shows in cells."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        source = path.read_text(encoding="utf-8")
        self.source = re.sub(r' data-name="[^"]*"', "", source)
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def sections_of(page: Page) -> dict[str, str]:
    """Heading -> source of the section."""
    return {part[: part.index("<")]: part for part in page.source.split("<h2>")[1:]}


def page_of(tmp_path, *folders) -> Page:
    return Page(write_report([load_run(folder) for folder in folders], tmp_path / "out/report.html"))


# reading


def test_records_are_flattened_to_finite_numbers(tmp_path):
    records = [
        record(1, reward=0.5, kl=None, name="x", done=True),
        record(2, reward=float("nan"), eval_pass_at_1={"mean": 0.5, "low": 0.25, "high": 0.75, "confidence": 0.95}),
        record(2, reward=0.25, time={"rollout": 1.5}),
    ]
    run = load_run(write_run(tmp_path / "run", records))
    assert run.series("reward").to_dict() == {1: 0.5, 2: 0.25}
    assert run.names == [
        "eval_pass_at_1",
        "eval_pass_at_1_high",
        "eval_pass_at_1_low",
        "reward",
        "time/rollout",
        "time_s",
    ]
    assert run.series("eval_pass_at_1_low").to_dict() == {2: 0.25}


def test_a_resumed_step_counts_once(tmp_path):
    run = load_run(write_run(tmp_path / "run", [record(1, loss=1.0), record(2, loss=2.0), record(1, loss=3.0)]))
    assert run.series("loss").to_dict() == {1: 3.0, 2: 2.0}


def test_a_resumed_clock_starts_again(tmp_path):
    records = [{"step": 1, "time_s": 60.0}, {"step": 2, "time_s": 120.0}, {"step": 3, "time_s": 30.0}]
    assert "time 2.5 min" in page_of(tmp_path, write_run(tmp_path / "run", records)).text


def test_torn_lines_are_counted(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, reward=0.5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew{"step": 2, "reward": 0.75}\n{"step": 3, "reward": 1.0}\n{"step": 4, "re')
    run = load_run(folder)
    assert run.series("reward").to_dict() == {1: 0.5, 3: 1.0} and run.num_unreadable == 2
    assert "3 (2 unreadable lines)" in page_of(tmp_path, folder).text


def test_missing_folders_name_the_nearest(tmp_path):
    runs = tmp_path / "runs"  # beside tmp_path lie the folders of other tests
    write_run(runs / "sapo-seed0", [record(1)])
    (runs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="sapo-sed0 is not a folder. Did you mean .*sapo-seed0?"):
        load_run(runs / "sapo-sed0")
    with pytest.raises(FileNotFoundError, match="empty has no metrics.jsonl.*Nearest run: .*sapo-seed0"):
        load_run(runs / "empty")
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl.*Nearest run: .*sapo-seed0"):
        load_run(runs)


def test_seeds_share_a_label_and_other_settings_do_not(tmp_path):
    folders = [
        write_run(tmp_path / name, config={"learning_rate": rate, "seed": seed, "output_dir": name})
        for name, rate, seed in (
            ("a/sapo-seed0", 1, 0),
            ("a/sapo-seed1", 1, 1),
            ("b/grpo/seed0", 1, 0),
            ("a/gspo", 1, 0),
        )
    ]
    groups = group_seeds(map(load_run, folders))
    assert {label: len(runs) for label, runs in groups.items()} == {"sapo": 2, "grpo": 1, "gspo": 1}
    other = write_run(tmp_path / "b/sapo", config={"learning_rate": 2})
    assert list(group_seeds(map(load_run, [folders[0], other]))) == ["a/sapo-seed0", "b/sapo"]
    assert list(group_seeds([load_run(folders[0], "x"), load_run(folders[1], "x")])) == ["x"]


# the page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One run with everything, hostile text in every place that a run can write to."""
    folder = tmp_path_factory.mktemp("runs") / "sapo"
    records = [
        record(
            step, reward=step / 10, effective_update_ratio=1 - step % 2 / 4, step_time=0.5, **{"routing/flips": 0.125}
        )
        | {
            "ratio/p5": 0.9,
            "ratio/p95": 1.1,
            "verdict/correct": 0.5,
            f"verdict/{HOSTILE}\\1": 0.5,
            "time/rollout": 1.25,
        }
        for step in (1, 2, 3, 4)
    ]
    records.append(record(4, eval_pass_at_1=EVALUATION["pass_at_1"]))
    rows = [
        {"step": 4, "prompt": "2+3?", "completion": "five", "accuracy_reward": 1.0, "length": 4, "advantage": 0.5},
        {"step": 4, "prompt": HOSTILE, "completion": HOSTILE, "accuracy_reward": None, "length": 9, "advantage": -1.0},
        {"step": 4, "prompt": "2+2?", "completion": "y" * 2345, "accuracy_reward": 0.5, "length": 0, "advantage": 0.25},
    ]
    config = {"num_mini_batches": 2, "logging_steps": 1, "max_steps": 8, "learning_rate": 3e-5, "run_name": HOSTILE}
    write_run(folder, records, config, rows, plan={"gate": HOSTILE}, versions={"torch": "2.8", "device": "cpu"})
    (folder / "evaluation.json").write_text(json.dumps({"before": EVALUATION, HOSTILE: EVALUATION}))
    warnings = [{"step": 3, "message": HOSTILE}, {"step": 4, "message": HOSTILE}, {"other": 1}]
    (folder / "warnings.jsonl").write_text("\n".join(map(json.dumps, warnings)))
    (folder / "completions/completions_00004.parquet").write_bytes(b"PAR1 half-written")
    return page_of(folder.parent, folder)


def test_page_loads_nothing(full):
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "image", "form"} & set(full.tags)
    assert {"svg", "table", "details", "figure"} <= set(full.tags)
    names = {name for name, _ in full.attributes}
    assert not names & {"src", "srcset", "data", "action"} and not [name for name in names if name.startswith("on")]
    assert all(value.startswith("#") for name, value in full.attributes if name.endswith("href"))
    styles = [value for _, value in full.attributes if value and "url(" in value]
    assert all("url(#" in value and value.count("url(") == value.count("url(#") for value in styles)
    assert full.source.count("http-equiv") == 1 and "default-src 'none'" in full.source
    assert "<script" not in full.source and "http://" not in full.source


def test_hostile_text_is_shown_and_not_obeyed(full):
    assert "\u202e" not in full.source and "\x1b" not in full.source
    shown = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)></pre>'
    shown += '\\u202e\\u001b[31m & "quoted"'
    assert full.text.count(shown) >= 6  # prompt, completion, plan, warning, evaluation, setting
    assert "evil.example" not in "".join(value or "" for name, value in full.attributes if name != "aria-label")


def test_every_tag_is_closed(full):
    void = {"meta"}
    for tag in {*full.tags} - void - {"path", "use", "rect", "line"}:
        assert full.source.count(f"<{tag}>") + full.source.count(f"<{tag} ") == full.source.count(f"</{tag}>"), tag


def test_sections_and_numbers(full):
    for heading in ("Warnings", "What ran", "Evaluation", "Reward", "Gate", "Routing", "Verdicts", "Time and tokens"):
        assert f"<h2>{heading}</h2>" in full.source
        target = heading.replace(" ", "-")
        assert f'<a href="#{target}">' in full.source and f'<section id="{target}">' in full.source
    assert "0.500 [0.250, 0.625]" in full.text and "pass@4 0.875" in full.text and "8 × 4" in full.text
    assert "optimizer steps 4 of 8; time 4.0 min" in full.text
    assert "0.1 → 0.4" in full.text  # training reward, as logged
    assert "Quantiles of r" in full.text and "ratio/p95" in full.text
    assert "Effective update ratio (mean of min(1, w)) by staleness" in full.text and "0.75 → 1" in full.text
    assert "<td>time/rollout</td><td>1.25</td><td>5.0</td><td>4</td>" in full.source


def test_warnings_are_counted(full):
    assert "<li>step 3 and 1 more times: &lt;script" in full.source


def test_best_worst_and_longest(full):
    best, worst, longest = full.source.split("<article>")[1:]
    assert "accuracy_reward 1, length 4" not in best and "accuracy_reward 1, advantage 0.5" in best and "five" in best
    assert "accuracy_reward none" in worst and "&lt;img" in worst
    assert "2,345 characters" in longest and "… 345 more characters" in longest
    assert "y" * 2000 in longest and "y" * 2001 not in longest


def test_settings_are_compared_with_the_defaults(full):
    table = full.source[full.source.index("Settings that differ") : full.source.index("Every setting")]
    assert "<td>learning_rate</td><td>3e-05</td><td>1e-06</td>" in table
    assert "<td>max_steps</td><td>8</td><td>-1</td>" in table
    assert "num_generations" not in table
    every = full.source[full.source.index("Every setting") : full.source.index("Batch plan")]
    assert "<td>num_mini_batches</td><td>2</td>" in every


def test_defaults_are_known():
    known = _defaults()
    assert (known["num_mini_batches"], known["algorithm"], known["prompt_format"]) == (4, "sapo", "chat")


def test_pictures_follow_the_theme(full):
    assert "prefers-color-scheme: dark" in full.source
    svg = full.source[full.source.index("<svg") : full.source.index("</svg>")]
    assert "var(--c0)" in svg and "var(--ink)" in full.source and "#0072b2" not in svg and "<metadata" not in svg


def test_text_cuts_before_it_escapes():
    assert escaped("<" * 5, limit=3) == '&lt;&lt;&lt;<span class="cut"> … 2 more characters</span>'
    assert escaped("a\nb\tc") == "a\nb\tc" and escaped(0.1234567) == "0.123457"
    assert escaped([1, "<"]) == "[1, &quot;&lt;&quot;]"


@pytest.mark.parametrize("records", [[], [record(1)], [record(1, reward=None)]])
def test_a_run_that_has_just_begun(tmp_path, records):
    page = page_of(tmp_path, write_run(tmp_path / "run", records, config={"max_steps": 8}))
    assert "no step logged yet" in page.text and "svg" not in page.tags


def test_config_alone_is_enough(tmp_path):
    folder = write_run(tmp_path / "run", config={"algorithm": "gspo"})
    (folder / "metrics.jsonl").unlink()
    assert "gspo" in page_of(tmp_path, folder).text


def test_runs_side_by_side(tmp_path):
    folders = [
        write_run(tmp_path / name, [record(1, reward=0.5, loss=1.0), record(2, reward=reward)], {"algorithm": name[:4]})
        for name, reward in (("sapo-seed0", 0.5), ("sapo-seed1", 0.75), ("gspo-seed0", 0.25))
    ]
    (folders[0] / "evaluation.json").write_text(json.dumps([EVALUATION, EVALUATION | {"step": 40}, "no evaluation"]))
    page = page_of(tmp_path, *folders)
    assert "Runs that differ only in their seed" in page.text
    assert "sapo: 0.5 → 0.625; gspo: 0.5 → 0.25. Band: least to greatest of 2 seeds" in page.text
    assert "<td>≠ algorithm</td>" in page.source
    assert page.text.count("0.500 [0.250, 0.625]") == 4  # two, in the head and in the evaluations


def test_what_does_not_change_is_told_and_not_drawn(tmp_path):
    series = {"reward": 0.5, "rewards/a/mean": 0.5, "learning_rate": 1e-4, "verdict/right": 0.5, "verdict/error": 0.0}
    rows = [record(s, **series | {"reward": s / 4, "rewards/a/mean": s / 4}, eval_pass_at_1=0.5) for s in (1, 2)]
    page = page_of(tmp_path, write_run(tmp_path / "run", rows))
    assert page.tags.count("svg") == 3  # reward, the evaluation, verdict/right
    assert "rewards/a/mean equals reward." in page.text
    assert "0.0001 throughout: learning_rate." in page.text and "0 throughout: verdict/error." in page.text


def test_layers_are_a_table(tmp_path):
    names = [f"routing/layer_{i}/{x}" for i in ("00", "01", "10") for x in ("changed_frac", "load_max")]
    rows = [record(s, **{name: s * i / 4 for i, name in enumerate(names)}, **{"routing/load_max": s}) for s in (1, 2)]
    page = page_of(tmp_path, write_run(tmp_path / "run", rows))
    assert page.tags.count("svg") == 1 and "<th>layer</th><th>changed_frac</th><th>load_max</th>" in page.source
    assert "<td>01</td><td>1</td><td>1.5</td>" in page.source and "<td>10</td><td>2</td><td>2.5</td>" in page.source


@pytest.mark.parametrize(("seed", "shown"), [("0", True), ("1", False)])
def test_the_model_before_training(tmp_path, seed, shown):
    model = str(tmp_path / "world/model")
    folder = write_run(tmp_path / "run", [record(1)], {"model_name_or_path": model})
    after = EVALUATION | {"arguments": {"model": str(folder), "output": "a", "seed": "0"}}
    before = {
        "arguments": {"model": model, "output": "b", "seed": seed},
        "pass_at_1": {"mean": 0.0, "low": 0, "high": 1},
    }
    (tmp_path / "world").mkdir()
    (folder / "evaluation.json").write_text(json.dumps(after))
    (tmp_path / "world/evaluation.json").write_text(json.dumps(before))
    page = page_of(tmp_path, folder)
    assert ("before training0.000 [0.000, 1.000]" in page.text) is shown
    assert ("run: Pass@1 0.000 → 0.500" in page.text) is shown
    assert "0.500 [0.250, 0.625] (95%)" in page.text


def evaluated(model: str, right: list[int], **arguments) -> dict:
    """evaluation.json of `model`: so many right of 4 samples of each problem."""
    mean = sum(right) / 4 / len(right)
    interval = {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "confidence": 0.95}
    return {"arguments": {"model": model} | arguments, "num_samples": 4, "num_correct": right, "pass_at_1": interval}


def test_the_head_has_the_paired_difference_and_pass_at_1_begins_at_step_0(tmp_path):
    model, data = str(tmp_path / "world/model"), {"dataset_name": "test.jsonl"}
    config = {
        "model_name_or_path": model,
        "eval_dataset_name": "test.jsonl",
        "num_generations_eval": 2,
        "dataset_name": "d",
    }
    rows = [record(s, reward=s / 8, eval_pass_at_1=x) for s, x in ((4, 0.625), (8, 0.75))]
    folder = write_run(
        tmp_path / "run", rows, config | {"algorithm": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}
    )
    head = lambda: page_of(tmp_path, folder).text.split("Evaluation")[0]  # noqa: E731
    assert "run: Held-out Pass@1 0.625 → 0.750 (step 4 → 8)" in head()
    (tmp_path / "world").mkdir()
    (tmp_path / "world/evaluation.json").write_text(json.dumps(evaluated(model, [0, 1, 2, 3], **data)))
    assert "evaluate.py, 4 samples: 0.375; while training" in page_of(tmp_path, folder).text
    (folder / "evaluation.json").write_text(json.dumps(evaluated(str(folder), [2, 3, 4, 4], **data)))
    page = page_of(tmp_path, folder)
    assert re.search(r"run: Pass@1 0\.375 → 0\.812, \+0\.438 \[\+0\.\d{3}, \+0\.\d{3}\]", page.text)
    assert "sapo, τ = 2.0 where A > 0, 3.0 elsewhere; optimizer steps 8;" in page.text
    assert "data d, held out: test.jsonl;" in page.text
    caption = "evaluate.py, 4 samples: 0.375 → 0.812; while training, 2 samples: 0.625 → 0.750. Bars: 95% over problems"
    assert caption in page.text and ">0</text>" in sections_of(page)["Reward"].replace(" ", "")


def test_which_of_several_runs_is_better(tmp_path):
    right = {"a": [4, 4, 3, 4, 4, 4, 3, 4] * 4, "b": [1, 0, 1, 1, 0, 2, 1, 0] * 4, "c": [4, 3, 4, 4, 4, 4, 3, 4] * 4}
    folders = [write_run(tmp_path / name, [record(1, reward=0.5)], {"algorithm": name}) for name in right]
    assert "Not known: a paired difference needs evaluation.json" in page_of(tmp_path, *folders).text
    for folder in folders:
        content = evaluated(str(folder), right[folder.name], dataset_name="d")
        (folder / "evaluation.json").write_text(json.dumps(content))
    text = page_of(tmp_path, *folders).text
    assert "a has the highest Pass@1, but its lead over c may be chance: the interval includes 0" in text
    assert "32 problems, paired; another seed may order them otherwise" in text
    rows = sections_of(page_of(tmp_path, *folders))["Which is better"]
    leads = re.findall(r">(a|b|c)</td><td[^>]*>([\d.]+)</td><td[^>]*>(.*?)</td><td[^>]*>(yes|no|)</td>", rows)
    assert [(name, mean, lead[:6], shown) for name, mean, lead, shown in leads] == [
        ("a", "0.938", "", ""),
        ("b", "0.188", "+0.750", "yes"),
        ("c", "0.938", "+0.000", "no"),
    ]
    (folders[1] / "evaluation.json").write_text(json.dumps(evaluated("b", right["b"], dataset_name="another")))
    assert "Not known: a paired difference" in page_of(tmp_path, *folders).text


def test_named_sets_are_compared_set_by_set(tmp_path):
    """4 problems of each of two sets, though both were made with the same options."""
    folders = [write_run(tmp_path / name, [record(1, reward=0.5)], {"algorithm": name}) for name in ("sapo", "gspo")]
    for folder, (first, second) in zip(folders, (([4, 4, 4, 4], [3, 4, 4, 4]), ([0, 1, 0, 0], [4, 4, 4, 4]))):
        sets = {name: evaluated("m", right, seed="0") for name, right in (("one", first), ("two", second))}
        (folder / "evaluation.json").write_text(json.dumps(sets))
    text = page_of(tmp_path, *folders).text
    assert "interval over 8 problems, paired" in text and "0.969" in text and "0.531" in text


def test_runs_whose_paths_end_alike_are_all_shown_and_one_folder_counts_once(tmp_path):
    folders = [
        write_run(tmp_path / name / "runs/sapo", [record(1, reward=0.5)], {"learning_rate": rate})
        for name, rate in (("a", 1e-4), ("b", 2e-4))
    ]
    again = folders[0].parent / "../runs/sapo"
    groups = group_seeds(load_run(folder) for folder in (*folders, again))
    assert {label: len(runs) for label, runs in groups.items()} == {"a/runs/sapo": 1, "b/runs/sapo": 1}
    assert "Runs: a/runs/sapo, b/runs/sapo" in page_of(tmp_path, *folders).text
    assert "Runs:" not in page_of(tmp_path, folders[0], again).text  # one run


def test_folders_that_end_alike_are_told_apart(tmp_path):
    runs = distinct(Run(tmp_path / name) for name in ("a/mine/sapo", "b/mine/sapo", "b/mine/grpo", "b/mine/sapo"))
    assert list(map(run_name, runs)) == ["a/mine/sapo", "b/mine/sapo", "b/mine/grpo"]
    assert list(map(run_name, distinct(runs[1:]))) == ["mine/sapo", "mine/grpo"]


def test_labels_that_share_a_run_of_other_settings_stay_apart(tmp_path):
    a, b, c = (
        write_run(tmp_path / name / "sapo", [record(1, reward=0.5)], {"learning_rate": rate})
        for name, rate in (("a", 1e-4), ("b", 2e-4), ("c", 3e-4))
    )
    groups = group_seeds([load_run(a, "A"), load_run(b, "A"), load_run(a, "B"), load_run(c, "B")])
    assert {label: len(runs) for label, runs in groups.items()} == {
        "A: a/sapo": 1, "A: b/sapo": 1, "B: a/sapo": 1, "B: c/sapo": 1,
    }  # fmt: skip


def test_a_resumed_seed_is_a_seed(tmp_path):
    folders = [
        write_run(tmp_path / f"sapo-seed{seed}", [record(1)], {"seed": seed, "resume_from_checkpoint": resumed})
        for seed, resumed in ((0, None), (1, "checkpoint-4"))
    ]
    assert [len(runs) for runs in group_seeds(map(load_run, folders)).values()] == [2]


EMPTY_INTERVAL = EVALUATION | {"pass_at_1": {"mean": 0.5, "low": None, "high": None}}


@pytest.mark.parametrize(
    "evaluation", [None, 3, "x", [None], {"pass_at_1": None}, EMPTY_INTERVAL, {"a": EMPTY_INTERVAL}]
)
@pytest.mark.parametrize("facts", [None, ["completions"]])
def test_json_files_that_hold_something_else_count_as_missing(tmp_path, evaluation, facts):
    folder = write_run(tmp_path / "run", [record(1, reward=0.5)], {}, plan=facts, versions=facts, evaluation=evaluation)
    text = page_of(tmp_path, folder).text
    assert "training reward 0.5 → 0.5" in text and "Pass@1 0.500" not in text


# Steps 1, 2 and 5 of `make demo`: a rollout, the update after it, the next rollout
LOGGED = """\
{"step": 1, "time_s": 2.194, "loss": -0.3506, "grad_norm": 0.6357, "learning_rate": 0.0001, "num_tokens": 14067.0, \
"completions/mean_length": 26.23, "completions/clipped_ratio": 0.0, "rewards/accuracy_reward/mean": 0.5, \
"rewards/accuracy_reward/std": 0.501, "reward": 0.5, "reward_std": 0.501, "frac_reward_zero_std": 0.0625, \
"verdict/capped_frac": 0.0, "verdict/right_frac": 0.5, "verdict/time_s": 0.0344, "verdict/wrong_frac": 0.5, \
"entropy": 0.081, "ratio/mean": 1.0, "log_ratio/abs_mean": 0.0, "log_ratio/clamped_frac": 0.0, \
"effective_update_ratio": 1.0, "update/skipped_rows_frac": 0.1406, "update/forwarded_tokens": 3207.0, \
"update/trained_tokens": 1617.0, "update/packs": 1.0, "gate/weight_pos_mean": 1.0, "gate/weight_neg_mean": 1.0, \
"ratio/max": 1.0, "step_time": 2.182, "epoch": 0.00195}
{"step": 2, "time_s": 2.557, "loss": 0.1837, "grad_norm": 0.8668, "learning_rate": 0.0001, "entropy": 0.1025, \
"ratio/mean": 1.0005, "log_ratio/abs_mean": 0.0116, "log_ratio/clamped_frac": 0.0, \
"effective_update_ratio": 0.9994, "update/skipped_rows_frac": 0.0156, "update/forwarded_tokens": 3319.0, \
"update/trained_tokens": 1492.0, "update/packs": 1.0, "gate/weight_pos_mean": 0.9996, \
"gate/weight_neg_mean": 0.9983, "ratio/max": 1.3505, "step_time": 0.3478, "epoch": 0.00391}
{"step": 5, "time_s": 5.2, "loss": 0.2842, "grad_norm": 0.8406, "completions/mean_length": 35.41, \
"rewards/accuracy_reward/mean": 0.7148, "reward": 0.7148, "reward_std": 0.4524, "verdict/right_frac": 0.7148, \
"verdict/capped_frac": 0.0, "verdict/wrong_frac": 0.2852, "entropy": 0.0525, "ratio/mean": 1.0, \
"effective_update_ratio": 1.0, "gate/weight_pos_mean": 1.0, "gate/weight_neg_mean": 1.0, "ratio/max": 1.0}
"""


def test_what_the_trainer_logs_fills_the_page(tmp_path):
    folder = write_run(tmp_path / "run", config={"num_mini_batches": 4, "logging_steps": 1})
    (folder / "metrics.jsonl").write_text(LOGGED)
    page = page_of(tmp_path, folder)
    sections = sections_of(page)
    panels = {name: part.count("<svg") for name, part in sections.items()}
    assert panels["Gate"] == 11  # the update's share, two weights, three of the ratio, and five by staleness
    assert (panels["Reward"], panels["Verdicts"], panels["Time and tokens"]) == (2, 1, 2)
    assert sections["Gate"].split("<details>")[0].count("<svg") == 2 and "9 more pictures" in sections["Gate"]
    for name in ("effective_update_ratio", "gate/weight_pos_mean", "gate/weight_neg_mean", "ratio/max"):
        assert f"<small>{name}</small>" in sections["Gate"]
    curve = sections["Gate"][sections["Gate"].index("<svg") : sections["Gate"].index("</svg>")]
    assert curve.count("var(--c0)") >= 2  # as logged and smoothed
    assert "verdict/time_s" not in sections["Verdicts"] and "<td>verdict/time_s</td>" in sections["Time and tokens"]


def test_a_verdict_has_one_style_in_every_run(tmp_path):
    shares = {"sapo": (0.75, 0.25), "gspo": (0.125, 0.875)}
    folders = [
        write_run(tmp_path / name, [record(s, **{"verdict/right": right, "verdict/wrong": wrong}) for s in (1, 2)])
        for name, (right, wrong) in shares.items()
    ]
    page = page_of(tmp_path, *folders)
    first, second = page.source.split("<h3>Verdicts: ")[1:]
    for panel in (first, second):
        assert panel.index(">verdict/right</text>") < panel.index(">verdict/wrong</text>")


def test_chat_prompts(tmp_path):
    rows = [{"step": 1, "prompt": [{"role": "user", "content": "<b>?"}], "completion": "c", "r": 0.0, "advantage": 0.0}]
    page = page_of(tmp_path, write_run(tmp_path / "run", [record(1)], completions=rows))
    assert "[user] <b>?" in page.text and "b" not in page.tags


# sapo-trl plot


def test_commands_write_their_files(tmp_path, capsys):
    config = {"num_mini_batches": 2, "logging_steps": 1}
    folder = str(
        write_run(tmp_path / "run", [record(s, reward=0.5, effective_update_ratio=0.9) for s in (1, 2)], config)
    )
    plot(["curves", folder, f"again={folder}", "--output", str(tmp_path / "out")])
    plot(["staleness", folder])
    plot(["report", folder, "--output", str(tmp_path / "out/report.html")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "curves.csv", "report.html"}
    assert (tmp_path / "run/staleness.png").exists() and "again" in (tmp_path / "out/curves.csv").read_text()
    assert capsys.readouterr().out.count("written to") == 5


def test_ratios_take_the_runs_temperatures(tmp_path, capsys):
    folder = write_run(tmp_path / "run", config={"sapo_temperature_pos": 10.0})
    (folder / "dump").mkdir()
    np.savez(folder / "dump/a.npz", log_ratio=np.array([0.25, -0.25]), rows=np.zeros(2, int), advantages=np.ones(1))
    plot(["ratios", str(folder)])
    assert (folder / "ratios.csv").read_text().splitlines()[-1].split(",")[-2:] == ["1.5625", "1"]  # 10^2/4 * 0.0625
    assert "100.00% of the sequences" in capsys.readouterr().out
    plot(["ratios", str(folder / "dump/a.npz"), "--tau_pos", "2"])
    assert (folder / "dump/ratios.csv").read_text().splitlines()[-1].split(",")[-2:] == ["0.0625", "1"]


@pytest.mark.parametrize("command", ["curves", "staleness", "report", "ratios"])
def test_errors_are_one_line(tmp_path, command, capsys):
    assert plot([command, str(tmp_path / "none")]) == 1
    _rule, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")


# sums over a run


def test_phases_and_verdicts(tmp_path):
    """Two rollouts of two steps: seconds once per rollout or once per step, tokens of all of them."""
    rollout = {"time/rollout_s": 5.0, "time/reward_s": 1.0, "completions/mean_length": 10.0}
    update = {"time/update_s": 2.0, "update/forwarded_tokens": 300.0, "update/trained_tokens": 200.0}
    rows = [record(s, **(rollout if s % 2 else {}), **update, step_time=8.0 if s % 2 else 2.5) for s in (1, 2, 3, 4)]
    for row, timeouts in zip(rows[::2], (0.0, 0.25)):
        row |= {"verdict/right_frac": 0.5, "verdict/timeout_frac": timeouts, "verdict/error_frac": 0.0}
    folder = write_run(
        tmp_path / "run", rows, {"num_mini_batches": 2}, plan={"completions per rollout": "16"}, hardware={"cpu": "X1"}
    )
    source = page_of(tmp_path, folder).source
    for line in (
        ("generation", "8.0", "38%", "320 generated", "40"),  # 2 x (5 - 1) of 21 s; 2 x 16 x 10 tokens
        ("rewards", "2.0", "10%", "", ""),
        ("update", "8.0", "38%", "1,200 forwarded, 800 trained", "150"),
        ("rest of the steps", "3.0", "14%", "", ""),
    ):
        assert "".join(f"<td>{x}</td>" for x in line) in source
    assert "<td>right</td><td>16: 50.0% → 50.0%, at most 50.0%</td>" in source
    assert "<td>timeout</td><td>4: 0.0% → 25.0%, at most 25.0%</td>" in source
    assert "<td>error</td><td>0: 0.0% → 0.0%, at most 0.0%</td>" in source
    assert "<h3>Hardware</h3>" in source and "<td>X1</td>" in source


def test_quantiles_are_a_fan(tmp_path):
    values = {0.1: 0.5, 10.0: 0.8, 50.0: 1.0, 90.0: 1.25, 99.9: 2.0}
    rows = [record(s, **{f"ratio/p{p:g}": x for p, x in values.items()}) for s in (1, 2)]
    run = load_run(write_run(tmp_path / "run", rows))
    table = fan_table([run], "run")
    assert table["percent"].tolist() == [p for p in values for _ in (1, 2)]
    _, (ax,) = new_axes(1, 1, (3, 2))
    draw_fan(ax, table)
    lines = [(line.get_label(), line.get_ydata()[0]) for line in ax.lines]
    assert lines == [("0.1–99.9%", 0.5), ("0.1–99.9%", 2.0), ("10–90%", 0.8), ("10–90%", 1.25), ("median", 1.0)]
    assert len(ax.collections) == 2  # bands
    assert "ratio/p0.1: 0.5 → 0.5" in page_of(tmp_path, run.folder).text


def test_dumped_ratios_are_drawn_with_the_seeds_pooled(tmp_path):
    for seed, z in enumerate(([0.25, -0.25], [0.5, 0.502, 0.125])):
        config = {"sapo_temperature_pos": 2.0, "seed": seed}
        folder = write_run(tmp_path / f"sapo-seed{seed}", [record(1, reward=0.5)], config) / "dump"
        folder.mkdir()
        np.savez(folder / "a.npz", log_ratio=np.array(z), rows=np.arange(len(z)) // 2, advantages=np.ones(2))
        (folder / "b.part").write_bytes(b"being written")
    page = page_of(tmp_path, tmp_path / "sapo-seed0", tmp_path / "sapo-seed1")
    text = page.text
    assert "r of a token" in text and "D_i against Var_i" in text
    assert "mathdefault" not in page.source and ">1e-06<" in page.source.replace(" ", "")  # powers of ten are plain
    assert text.count("5 tokens of 3 sequences in 2 dumped steps") == 2  # r and Var_i
    assert "100.0% of 3 within the bound" in text and "A > 0" in text and "τ = 2" in text


# in which section a number is drawn


def test_gate_by_sign_and_direction_and_routing(tmp_path):
    groups = ("pos", "neg", "corrective", "expansive")
    means = [f"gate/{kind}_{x}_mean" for kind in ("weight", "pull") for x in groups]
    alone = [*means, "sampling/kl", "sequence/within_bound_frac"]
    names = [*alone, *(f"gate/weight_{x}_p1" for x in groups), "routing/router_entropy"]
    rows = []
    for s in (1, 2):
        values = {name: s / (31 + i) for i, name in enumerate(names)}  # no two alike: a twin is not drawn
        rows.append(record(s, **values, **{f"mini_batch_{s - 1}/routing/changed_frac": s / 99}))
    sections = sections_of(page_of(tmp_path, write_run(tmp_path / "run", rows, {"num_mini_batches": 2})))
    drawn = re.findall(r"<small>(.+?)</small>", sections["Gate"])
    assert "<figure>" not in sections["Gate"].split("<details>")[0]  # none of them is one that is open at once
    assert sorted(drawn) == sorted(alone)
    assert "Gate weight that 1% of tokens are below" in sections["Gate"]
    assert (
        "selections changed (fraction) by staleness" in sections["Routing"] and "Router entropy" in sections["Routing"]
    )


def test_what_the_gate_did_is_of_the_last_mini_batches(tmp_path):
    """Three rollouts of two steps; the first of each is on-policy, whatever it logs."""
    drifts, weights = (9.0, 0.004, 9.0, 0.25, 9.0, 0.02), (0.1, 0.999, 0.1, 0.9, 0.1, 0.95)
    rows = [
        record(s, **{"log_ratio/drift": drift, "effective_update_ratio": w, "gate/weight_neg_p1": w / 2})
        for s, (drift, w) in enumerate(zip(drifts, weights), start=1)
    ]
    config = {"num_mini_batches": 2, "logging_steps": 1}
    folder = write_run(tmp_path / "run", rows, config)
    said = (
        "Drift at a rollout's last mini-batch: 0.004 to 0.25; the gate acts from about 0.01 on, as in 2 of 3 rollouts. "
        "The mean w of all tokens went down to 0.900. 1% of the tokens kept less of their gradient than 0.45 where "
        "A < 0."
    )
    assert what_the_gate_did(load_run(folder)) == said
    assert said in page_of(tmp_path, folder).text
    assert what_the_gate_did(load_run(write_run(tmp_path / "sparse", rows, config | {"logging_steps": 2}))) == ""


def test_routing_of_the_summary_is_the_last_half_by_mini_batch(tmp_path):
    """Four rollouts of two steps; the changed selections of the first two do not count."""
    rows = []
    for s, (changed, entropy) in enumerate(zip((0, 0.5, 0, 0.75, 0, 0.25, 0, 0.125), (1, 3, 9, 9, 9, 9, 5, 7)), 1):
        rows.append(record(s, **{"routing/changed_frac": changed, "routing/router_entropy": entropy}))
        rows[-1][f"mini_batch_{(s - 1) % 2}/routing/changed_frac"] = changed
    folder = write_run(tmp_path / "run", rows, {"num_mini_batches": 2})
    found = routing_summary(folder)["routing"]
    assert {k: row["mean"] for k, row in found["changed_frac_by_mini_batch"].items()} == {0: 0.0, 1: 0.1875}
    assert found["router_entropy"] == {"first_rollout": 2, "last_rollout": 6} and found["optimizer_steps"] == 8
    assert routing_summary(write_run(tmp_path / "dense", [record(1, reward=0.5)])) == {}


# flipped answers


def table(folder: Path, step: int, answers: dict[str, list[float | None]], column: str = "accuracy_reward") -> None:
    """A completions table: prompt -> rewards of its answers, called `<prompt> at <step>, number <i>`."""
    (folder / "completions").mkdir(exist_ok=True)
    rows = [
        {"step": step, "prompt": prompt, "completion": f"{prompt} at {step}, number {i}", column: x, "advantage": 0.0}
        for prompt, rewards in answers.items()
        for i, x in enumerate(rewards)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"completions/completions_{step:05d}.parquet")


def test_flipped_answers(tmp_path):
    folder = write_run(tmp_path / "run", [record(9)])
    table(folder, 1, {"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0], "c": [1.0, 0.0], "once": [0.0]})
    table(folder, 5, {"a": [0.0, 0.0]})
    table(folder, 9, {"a": [0.0, 1.0, 1.0, 1.0], "b": [1.0, 0.0, None], "c": [0.0, 1.0], "new": [1.0]})
    (folder / "completions/completions_00010.parquet").write_bytes(b"PAR1 half-written")
    run = load_run(folder)
    found = flips(completion_tables(run), "accuracy_reward")
    shares = found[["early_right_frac", "late_right_frac"]]
    better = shares["early_right_frac"] < shares["late_right_frac"]
    worse = shares["early_right_frac"] > shares["late_right_frac"]
    assert (len(found), better.sum(), worse.sum()) == (3, 1, 1)
    assert shares[better].to_numpy().tolist() == [[0.25, 0.75]]
    _, articles = flipped(run, "")
    shown = [tuple(text for _, text in article.texts[1:]) for article in articles]
    assert shown == [("a at 1, number 0", "a at 9, number 1"), ("b at 1, number 0", "b at 9, number 1")]
    text = page_of(tmp_path, folder).text
    assert "more than one table: 3. Of these 1 are answered rightly more often" in text
    assert "25% → 75%" in text and "a at 9, number 1" in text and "Right, then wrong" in text


def test_the_same_words_about_other_pictures_do_not_flip(tmp_path):
    folder = write_run(tmp_path / "run", [record(9)])
    (folder / "completions").mkdir()
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "how many?"}]
    for step, reward in ((1, 0.0), (9, 1.0)):
        rows = [{"step": step, "prompt": [{"role": "user", "content": parts}], "completion": "3", "accuracy_reward": x}
                for x in (reward, reward)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"completions/completions_{step:05d}.parquet")
    assert flips(completion_tables(load_run(folder)), "accuracy_reward").empty
    text = page_of(tmp_path, folder).text
    assert "[user] [picture] how many?" in text and "more than one table: 0." in text


def test_nothing_flips_without_right_and_wrong(tmp_path):
    folder = write_run(tmp_path / "run", [record(2)])
    table(folder, 1, {"a": [0.5, 2.0]}, "length_reward")
    table(folder, 2, {"a": [1.5, 0.0]}, "length_reward")
    run = load_run(folder)
    assert zero_one_column(run, completion_tables(run)[-1]) is None
    assert "has a reward of 0 and 1, so none is right or wrong" in page_of(tmp_path, folder).text


def test_rewards_are_what_the_run_logged_whatever_their_names(tmp_path):
    folder = write_run(tmp_path / "run", [record(2, **{"rewards/short_and_right/mean": 0.5})])
    table(folder, 1, {"a": [0.0, 0.0], "b": [1.0, 1.0]}, "short_and_right")
    table(folder, 2, {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "short_and_right")
    run = load_run(folder)
    assert zero_one_column(run, completion_tables(run)[-1]) == "short_and_right"
    text = page_of(tmp_path, folder).text
    assert "more than one table: 2. Of these 1 are answered rightly more often" in text
    assert "short_and_right 1, advantage 0" in text


def test_no_warnings_is_said(tmp_path):
    folder = write_run(tmp_path / "run", [record(1)])
    assert "Warnings: none." in page_of(tmp_path, folder).text
    (folder / "warnings.jsonl").write_text('{"step": 1, "source": "guard", "signal": "kl", "message": "m"}\n{"step": 2')
    text = page_of(tmp_path, folder).text
    assert "step 1, guard kl: m" in text and "1 unreadable lines" in text
