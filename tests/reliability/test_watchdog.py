"""A process that hangs is named, with its phase and step, and the stacks of all processes are kept."""

import re
import time

import pytest
from processes import World

from sapo_trl.monitor import watchdog
from sapo_trl.monitor.watchdog import HUNG, Watchdog


def test_a_reward_that_hangs_on_one_of_two_processes_is_named_within_its_limit(tmp_path):
    world = World(tmp_path / "world", per_device_train_batch_size=4, max_steps=8, phase_limits={"reward": 2.0})
    run = world.start("hang:reward:process=1:step=5", processes=2)
    done = run.ends(after_first=20)
    assert [x.status for x in done] == [HUNG, HUNG]
    hangs = "process 1 hangs: phase 'reward' of step 5 has passed its limit of 2 s. Stacks of its threads:"
    waits = r"process 0 is in phase '\w+' of step 5 while another process hangs. Stacks of its threads:"
    assert hangs in done[1].err and re.search(waits, done[0].err)
    own, other = (world.run_folder / name for name in ("hang_process_1.txt", "hang_other_0.txt"))
    assert own.read_text().startswith(hangs) and "faults.py" in own.read_text()  # where it sleeps
    assert re.match(waits, other.read_text()) and "trainer.py" in other.read_text()
    assert world.checkpoints() == ["checkpoint-2", "checkpoint-4"]
    resumed = world.start(processes=2, resume_from_checkpoint=True).ends()
    assert [x.status for x in resumed] == [0, 0]


@pytest.mark.matrix
@pytest.mark.parametrize("phase", ["rollout", "reward", "update"])
def test_every_phase_has_a_limit(tmp_path, phase):
    world = World(tmp_path / "world", phase_limits={phase: 1.0})
    done = world.train(f"hang:{phase}:step=1")
    assert done.status == HUNG and f"process 0 hangs: phase '{phase}' of step 1 has passed its limit of 1 s" in done.err


@pytest.mark.matrix
def test_a_save_that_hangs(tmp_path):
    world = World(tmp_path / "world", phase_limits={"save": 1.0})
    done = world.train("hang:save.optimizer:step=2")
    assert done.status == HUNG and "phase 'save' of step 2 has passed its limit of 1 s" in done.err
    assert world.checkpoints() == [] and world.train(resume_from_checkpoint=True).status == 0


class Hang:
    """Waits, on the clock of the test."""

    def __init__(self, monkeypatch):
        self.ended: list[int] = []
        monkeypatch.setattr(watchdog, "POLL_S", 0.02)
        monkeypatch.setattr(watchdog, "OTHERS_S", 0.02)
        monkeypatch.setattr(watchdog.os, "_exit", self.ended.append)


@pytest.fixture
def hang(monkeypatch):
    return Hang(monkeypatch)


def until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_innermost_phase_that_is_late_is_named(tmp_path, hang, capfd):
    dog = Watchdog({"rollout": 0.1, "reward": 60.0, "save": 0.0}, stops=False, folder=tmp_path, process=3)
    path = tmp_path / "hang_process_3.txt"
    with dog.phase("rollout", 7), dog.phase("reward", 7), dog.phase("save", 7):
        until(lambda: path.exists() and "test_watchdog.py" in path.read_text())
        time.sleep(0.2)
    assert path.read_text().startswith("process 3 hangs: phase 'rollout' of step 7 has passed its limit of 0.1 s.")
    said = capfd.readouterr().err
    assert said.count("hangs:") == 1 and hang.ended == []  # said once, and the run goes on


def test_a_phase_in_time_says_nothing_and_zero_turns_a_limit_off(tmp_path, hang):
    dog = Watchdog({"update": 0.3, "save": 0.0}, stops=True, folder=tmp_path, process=0)
    for _ in range(5):
        with dog.phase("update", 1):
            time.sleep(0.1)
    with dog.phase("save", 1), dog.phase("unknown", 1):
        time.sleep(0.1)
    assert hang.ended == [] and not list(tmp_path.iterdir())


def test_a_second_hang_in_the_same_folder_is_seen_by_the_others(tmp_path, hang, capfd):
    """Reports of an earlier run are no news; a new one under the same name is."""
    report = tmp_path / "hang_process_1.txt"
    report.write_text("process 1 hangs: of an earlier run")
    dog = Watchdog({"rollout": 60.0}, stops=True, folder=tmp_path, process=0)
    with dog.phase("rollout", 3):
        time.sleep(0.1)
        assert hang.ended == []
        report.write_text("process 1 hangs: now")
        until(lambda: hang.ended)
    assert hang.ended[0] == HUNG
    assert "process 0 is in phase 'rollout' of step 3 while another process hangs" in capfd.readouterr().err
    assert (tmp_path / "hang_other_0.txt").exists() and report.read_text() == "process 1 hangs: now"


def test_closed_it_leaves_no_thread_and_the_next_phase_starts_it_again(tmp_path, hang):
    dog = Watchdog({"rollout": 0.05}, stops=True, folder=tmp_path, process=0)
    with dog.phase("rollout", 1):
        thread = dog._thread
    dog.close()
    assert thread is not None and not thread.is_alive()
    dog.close()
    with dog.phase("rollout", 2):
        until(lambda: hang.ended)
    dog.close()
