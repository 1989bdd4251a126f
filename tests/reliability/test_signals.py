"""A run that is asked to end finishes its step, saves, and says how to go on; asked twice, it ends at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import sapo_trainer, tiny_model
from processes import ENVIRONMENT, ROOT, World
from reliability_world import quiet
from transformers import TrainerCallback

# Between two updates, at the start of step 4
SLOW = """
import os, signal, time
calls = []
def length(completions, **kwargs):
    calls.append(1)
    name = os.environ.get("SIGNAL")
    if name and len(calls) == 2 and os.environ.get("RANK", "0") == os.environ.get("OF", "0"):
        os.kill(os.getpid(), getattr(signal, name))
        if os.environ.get("TWICE"):
            time.sleep(0.2)
            os.kill(os.getpid(), getattr(signal, name))
    return [float(len(x) % 5) for x in completions]
"""


def world(folder: Path) -> World:
    """A rollout every second step, so that a signal in the second one comes before step 3 is made."""
    made = World(folder, num_mini_batches=2, save_steps=100, max_steps=6)
    (made.folder / "tiny_rewards.py").write_text(SLOW)
    return made


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(x, marks=pytest.mark.matrix) for x in ("SIGUSR1", "SIGINT"))]
)
def test_a_signal_saves_and_the_run_goes_on(tmp_path, name):
    run = world(tmp_path / "world")
    done = run.start(env={"SIGNAL": name}).ends()[0]
    assert done.status == 0, done.err
    assert run.checkpoints() == ["checkpoint-3"] and (run.run_folder / "report.html").exists()
    assert not (run.run_folder / "model.safetensors").exists()
    assert f"{name}: the optimizer step is finished and saved first; once more ends at once" in done.err
    command = f"--resume_from_checkpoint {run.run_folder}/checkpoint-3 (or: true)"
    assert done.out.splitlines()[-1] == f"preempted at step 3, resume with {command}"
    resumed = run.train(resume_from_checkpoint=True)
    assert resumed.status == 0 and run.checkpoints() == ["checkpoint-3", "checkpoint-6"]
    steps = [json.loads(line)["step"] for line in (run.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]  # the end of each of the two runs is a line of its own


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.matrix)])
def test_a_second_signal_ends_at_once(tmp_path, name):
    run = world(tmp_path / "world")
    done = run.start(env={"SIGNAL": name, "TWICE": "1"}).ends()[0]
    assert done.status == 128 + getattr(signal, name) and run.checkpoints() == []


@pytest.mark.matrix
def test_a_signal_to_one_of_two_processes_is_for_both(tmp_path):
    run = world(tmp_path / "world")
    fields = {"per_device_train_batch_size": 4}
    done = run.start(processes=2, env={"SIGNAL": "SIGUSR1", "OF": "1"}, **fields).ends()
    assert [x.status for x in done] == [0, 0], done[0].err
    assert "preempted at step 3" in done[0].out and run.checkpoints() == ["checkpoint-3"]
    resumed = run.start(processes=2, resume_from_checkpoint=True, **fields).ends()
    assert [x.status for x in resumed] == [0, 0] and run.checkpoints() == ["checkpoint-3", "checkpoint-6"]


class Asks(TrainerCallback):
    """Sends this process a signal at the start of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


FIELDS = {"max_steps": 4, "num_mini_batches": 2, "max_completion_length": 4, "router_aux_loss_coef": 0.0}


def test_a_run_from_a_library_ends_normally_and_gives_the_handlers_back(tmp_path, tokenizer):
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
    fields = FIELDS | {"save_only_model": True}  # the checkpoint of a preempted run is whole all the same
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[Asks(2)], **fields)
        trainer.train()
    assert trainer.preempted_at == 2 and trainer.state.global_step == 2
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)) == before
    with quiet():
        again = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
        again.train(resume_from_checkpoint=True)
    assert again.preempted_at is None and again.state.global_step == 4


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, tokenizer):
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), callbacks=[Asks(4)], **FIELDS)
        trainer.train()
    assert trainer.preempted_at is None and trainer.state.global_step == 4


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_under_accelerate_launch(tmp_path, name):
    """The launcher hands SIGTERM and Ctrl-C on to its processes; SIGUSR1 has to be asked for."""
    run = world(tmp_path / "world")
    config = tmp_path / "config.yaml"
    run.start(max_steps=1, output_dir=str(tmp_path / "other")).ends()  # writes the files
    text = (run.folder / "config.yaml").read_text().replace("max_steps: 1", "max_steps: 400")
    text = text.replace("per_device_train_batch_size: 8", "per_device_train_batch_size: 4")
    config.write_text(text.replace(str(tmp_path / "other"), str(run.run_folder)))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{run.folder}", "PYTHONUNBUFFERED": "1"}
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    words = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "tests/launch/ddp.yaml")]
    words += ["--main_process_port", "0", str(ROOT / "scripts/train.py"), "--config", str(config)]
    output = tmp_path / "said"
    with output.open("w") as file:
        launcher = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=environment, cwd=ROOT)
    metrics, until = run.run_folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < until and launcher.poll() is None, output.read_text()[-3000:]
        time.sleep(0.05)
    launcher.send_signal(getattr(signal, name))
    launcher.wait(timeout=60)
    said = output.read_text()
    (saved,) = run.checkpoints()
    step = saved.split("-")[1]
    assert f"preempted at step {step}, resume with --resume_from_checkpoint {run.run_folder}/{saved} (or: true)" in said
    assert (run.run_folder / "report.html").exists()
    fields = {"per_device_train_batch_size": 4, "max_steps": int(step) + 1, "resume_from_checkpoint": True}
    resumed = run.start(processes=2, **fields)
    assert [x.status for x in resumed.ends()] == [0, 0]
