"""A run that is killed after any optimizer step ends as if it had never been: every number equal, bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from conftest import ForkedWorker, tiny_model
from processes import call, zero
from reliability_world import CASES, TOKENIZER, Outcome, differences, kills, make, outcome, quiet

from sapo_trl.rollout import ahead

pytestmark = pytest.mark.usefixtures("forked_worker")
CORE = [name for name, case in CASES.items() if case.core]


@pytest.mark.parametrize("name", CORE)
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path, name):
    found = kills(name, CASES[name].core, tmp_path)
    assert found == {k: [] for k in CASES[name].core}


@pytest.mark.matrix
@pytest.mark.parametrize("name", CASES)
def test_killed_after_any_step(tmp_path, name):
    found = kills(name, CASES[name].every, tmp_path)
    assert len(found) > 1 and not any(found.values()), found


def test_a_rewards_state_that_json_does_not_keep_is_told(tmp_path):
    """A key that is a number would come back as a text: the state stays out, and the resume says so."""
    for resume in (None, True):
        trainer = make(tmp_path, "a reward with a state", max_steps=3 if resume else 2)
        trainer.reward_funcs[0].func.key = 1
        with quiet() as out:
            trainer.train(resume_from_checkpoint=resume)
    assert "NOT exact: the state of Stricter is not in the checkpoint: it is not JSON" in out.getvalue()


# ---- two processes ---------------------------------------------------------------------------------------------------

TWO = {"dense": (3, 4), "moe, r2": (2,), "moe, r3": (3,), "accumulation": (3,), "iterations": (3,), "epochs": (13,)}


def one_of_two(folder: str, name: str, step: int) -> None:
    """In each process: the run that was never stopped (step 0), or the one that goes on from a step, which is compared.

    Under ZeRO-3 a process can hold one engine only, so each is a process of its own.
    """
    ahead.start_process = ForkedWorker
    model, place = tiny_model(TOKENIZER, CASES[name].moe), Path(folder)
    with quiet() as out:
        trainer = make(place / f"from {step}", name, model)
        trainer.train(resume_from_checkpoint=str(place / f"from 0/checkpoint-{step}") if step else None)
    mine, kept = outcome(trainer), place / f"{os.environ['RANK']}.pt"
    if step == 0:
        torch.save(vars(mine), kept)
        return
    found = differences(Outcome(**torch.load(kept, weights_only=False)), mine, step)
    found += [line for line in out.getvalue().splitlines() if "NOT" in line]
    found = [line for lines in gather_object([found]) for line in lines]
    engine = trainer.model_wrapped
    stage = engine.zero_optimization_stage() if type(engine).__name__ == "DeepSpeedEngine" else 0
    facts = {"processes": trainer.accelerator.num_processes, "stage": stage, "found": found}
    if trainer.accelerator.is_main_process:
        (place / f"{step}.json").write_text(json.dumps(facts))


def assert_two_are_exact(folder: Path, name: str, steps: tuple[int, ...], stage: int) -> None:
    for step in (0, *steps):
        done = call("test_resume", "one_of_two", str(folder), name, step, processes=2, env=zero(stage) if stage else {})
        assert [x.status for x in done] == [0, 0], done[0].err[-3000:]
    for step in steps:
        assert json.loads((folder / f"{step}.json").read_text()) == {"processes": 2, "stage": stage, "found": []}


@pytest.mark.parametrize(("name", "step"), [("dense", 3), ("ahead, mixture, dynamic sampling, curriculum", 6)])
def test_two_killed_processes_end_as_uninterrupted_ones(tmp_path, name, step):
    assert_two_are_exact(tmp_path, name, (step,), 0)


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", TWO)
def test_two_processes_killed_after_any_step(tmp_path, name, stage):
    assert_two_are_exact(tmp_path, name, TWO[name], stage)
