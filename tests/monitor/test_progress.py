"""The live view: a panel on a terminal, plain lines elsewhere, and texts of the model that can't reach the terminal."""

import io
import re
import sys

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from sapo_trl.monitor.progress import EXPLAINED, Progress, duration, print_completions
from sapo_trl.text import visible

LOGS = {"reward": 0.4567, "entropy": 0.25, "update/trained_tokens": 300.0, "step_time": 2.0}


@pytest.fixture
def args(tmp_path):
    """The few fields that the callbacks read."""
    fields = {"output_dir": str(tmp_path), "run_name": "a run", "num_mini_batches": 2, "num_iterations": 1}
    return type("Arguments", (), fields | {"disable_tqdm": False, "world_size": 1, "device": torch.device("cpu")})


def state(step: int = 0) -> TrainerState:
    return TrainerState(global_step=step, max_steps=8)


def test_the_panel_shows_every_number(args):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(1), control, LOGS)
    progress.on_log(args, state(2), control, LOGS | {"update/trained_tokens": 100.0, "reward": None})
    progress.on_log(args, state(2), control, {"eval_reward": 0.5, "eval_pass_at_1": 0.625})
    console = Console(file=io.StringIO(), width=90)
    console.print(progress._panel(state(2)))
    lines = console.file.getvalue().splitlines()
    assert "a run  step 2/8  left " in lines[0] and "━" in lines[1]
    assert re.sub(r"\s+", " ", lines[2]) == "│ reward nan entropy 0.25 tok/s 100 Pass@1 0.625 │"  # 400 tokens in 4 s


def test_plain_lines_where_there_is_no_terminal(args, capsys):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    for step in (1, 2, 8):
        progress.on_log(args, state(step), control, LOGS)
    progress.on_train_end(args, state(8), control)
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 1/8", "step 8/8"]  # at most one each 5 s
    assert "reward 0.457  entropy 0.25  tok/s 150  left " in out and "\x1b" not in out


@pytest.mark.parametrize("last", [8, 5])
def test_the_last_line_stands_once_with_the_evaluation_of_its_step(args, capsys, last):
    """Also of a run that ends early, whose last numbers came within the 5 s."""
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(1), control, LOGS)
    progress.on_log(args, state(last), control, LOGS)
    progress.on_log(args, state(last), control, {"eval_pass_at_1": 0.625})
    progress.on_log(args, state(last), control, {"train_runtime": 9.0})
    progress.on_train_end(args, state(last), control)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/8", f"step {last}/8"]
    assert "Pass@1 0.625" in lines[1]


def test_short_labels_are_explained_once(args, capsys):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    for step in (1, 8):
        progress.on_log(args, state(step), control, LOGS | {"effective_update_ratio": 0.5, "gate/leak_neg": 0.25})
    progress.on_train_end(args, state(8), control)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == EXPLAINED and EXPLAINED not in lines
    assert all("update ratio 0.5  leak 0.25" in line for line in lines) and len(lines) == 2


def test_a_terminal_gets_one_panel_and_its_cursor_back(args, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    assert sys.stdout.__class__.__name__ != "FileProxy"  # stdout is no terminal here: it stays where it is
    progress.on_log(args, state(1), control, LOGS)
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")  # visible while it runs
    progress.on_train_end(args, state(8), control)
    assert sys.stderr is screen and "reward" in screen.getvalue()


def test_durations():
    assert [duration(x) for x in (0.4, 59.6, 3599, 86399)] == ["0 s", "1 min 00 s", "59 min 59 s", "23 h 59 min"]


def test_what_is_not_finite_is_shown(args, capsys):
    progress, control = Progress(), TrainerControl()
    progress.SECONDS_BETWEEN_LINES = -1.0
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(1), control, {"loss": 1e-9, "grad_norm": 0.5, "entropy": 0.25})
    progress.on_log(args, state(2), control, {"loss": float("nan"), "grad_norm": float("inf"), "entropy": None})
    progress.on_log(args, state(3), control, {"loss": -1e-9, "grad_norm": 0.25, "entropy": 0.5})
    lines = [line.split("  ", 1)[1].split("  left")[0] for line in capsys.readouterr().out.splitlines()]
    shown = [("0.25", "0.5"), ("nan", "inf  loss nan"), ("0.5", "0.25")]
    assert lines == [f"entropy {entropy}  grad norm {norm}" for entropy, norm in shown]


def test_an_evaluation_on_its_own_prints_its_numbers(args, capsys):
    progress, control = Progress(), TrainerControl()
    progress.on_log(args, state(), control, {"eval_reward": 0.25, "eval_loss": 0.0})
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(8), control, LOGS)
    progress.on_train_end(args, state(8), control)
    progress.on_log(args, state(8), control, {"eval_reward": 0.75, "eval_pass_at_1": 0.625})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "eval 0.25" and out[1].startswith("step 8/8  reward 0.457") and out[2] == "Pass@1 0.625"


def test_no_panel_where_bars_are_not_wanted(args, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    args.disable_tqdm = True
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(8), control, LOGS)
    progress.on_train_end(args, state(8), control)
    assert screen.getvalue() == ""


def test_a_run_that_failed_leaves_the_terminal_to_the_next_one(args, monkeypatch):
    """A run that raises never comes to its end; rich refuses a second live view beside the first."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    failed, following, control = Progress(), Progress(), TrainerControl()
    failed.on_train_begin(args, state(), control)
    following.on_train_begin(args, state(), control)
    following.on_log(args, state(1), control, LOGS)
    following.on_train_end(args, state(8), control)
    assert sys.stderr is screen and not failed._live.is_started


# texts of the model

HOSTILE = "ok\x1b]0;owned\x07\x1b[2J\r\u202edrawkcab \ud800 end"
SHOWN = r"ok\u001b]0;owned\u0007\u001b[2J\u000d\u202edrawkcab \ud800 end"


def test_control_characters_are_written_out():
    assert visible(HOSTILE) == SHOWN
    assert visible("tab\tline\nä 数 🙂") == "tab\tline\nä 数 🙂"


def test_the_table_of_completions_executes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "600")  # no text is wrapped
    logs = {
        "prompt": [[{"role": "user", "content": HOSTILE}], HOSTILE],
        "completion": [[{"role": "assistant", "content": HOSTILE}], HOSTILE],
        "rewards": {"mine\x1b[1m": [1.0, 0.5]},
        "advantages": [0.25, -0.25],
        "extra": {"extracted_answer": [HOSTILE, None]},
    }
    print_completions(logs, 7, None)
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert "Step 7" in out and "0.25" in out and "ASSISTANT" in out and "mine\\u001b[1m" in out
    assert out.count(SHOWN) == 5  # two prompts, two completions, one answer
    print_completions(logs, 7, 0)
    assert capsys.readouterr().out == ""
