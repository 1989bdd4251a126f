"""SIGKILL at every stage of a save: the newest whole checkpoint is found, and nothing of the run is lost."""

import json
import shutil

import pytest
import torch
from processes import World
from safetensors.torch import load_file

# Stage of the save of step 4, with the file that is half written -> the step that the run goes on from
STAGES = {
    "save.begin": 2,
    "save.weights": 2,
    "save.weights:file=model.safetensors": 2,
    "save.optimizer": 2,
    "save.optimizer:file=optimizer.pt": 2,
    "save.optimizer:file=rng_state": 2,
    "save.run_state": 2,
    "save.run_state:file=run_state": 2,
    "save.trainer_state": 2,
    "save.trainer_state:file=trainer_state": 2,
    "save.hashed": 2,
    "save.manifest": 2,
    "save.renamed": 4,
    "save.published": 4,
    "save.rotated": 4,
}
CORE = ["save.weights:file=model.safetensors", "save.manifest"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose run was trained once without a fault."""
    world = World(tmp_path_factory.mktemp("kill") / "world")
    done = world.train()
    assert done.status == 0, done.err
    shutil.move(world.run_folder, world.folder / "whole")
    return world


def assert_ends_as_the_whole_run(world: World, last: str = "checkpoint-6") -> None:
    whole = world.folder / "whole"
    for name in ("model.safetensors", f"{last}/model.safetensors"):
        ours, theirs = load_file(world.run_folder / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (
        torch.load(x / last / "optimizer.pt", weights_only=True)["state"] for x in (world.run_folder, whole)
    )
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
    assert numbers(world.run_folder) == numbers(whole)


def numbers(folder) -> dict[int, dict]:
    """step -> what was logged, without seconds; of a step that was logged twice the last."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "_s", "runtime", "per_second", "train_loss")
    return {x["step"]: {k: v for k, v in x.items() if not any(t in k for t in timed)} for x in records if "loss" in x}


def killed_and_resumed(world: World, stage: str, expected: int, **fields) -> None:
    shutil.rmtree(world.run_folder, ignore_errors=True)
    killed = world.train(f"kill:{stage}:step=4", **fields)
    assert killed.status == -9
    assert world.checkpoints() == ["checkpoint-2", "checkpoint-4"][: expected // 2]
    resumed = world.train(resume_from_checkpoint=True, **fields)
    assert resumed.status == 0, resumed.err
    assert f"resume: {world.run_folder}/checkpoint-{expected}\n" in resumed.out
    assert world.leftovers() == []
    assert_ends_as_the_whole_run(world)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage in CORE else pytest.mark.matrix) for stage in STAGES]
)
def test_a_kill_at_any_stage_of_a_save_loses_nothing(world, stage):
    killed_and_resumed(world, stage, STAGES[stage])


@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["save.replacing", "save.renamed"])
def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced(world, stage):
    """Step 4 is saved again by a run that went on from step 2."""
    shutil.rmtree(world.run_folder, ignore_errors=True)
    assert world.train(max_steps=4).status == 0
    first = str(world.run_folder / "checkpoint-2")
    assert world.train(f"kill:{stage}:step=4", resume_from_checkpoint=first).status == -9
    assert (world.run_folder / ".checkpoint-4.replaced").exists()
    resumed = world.train(resume_from_checkpoint="latest")
    assert resumed.status == 0 and f"resume: {world.run_folder}/checkpoint-4\n" in resumed.out
    assert world.leftovers() == []
    assert_ends_as_the_whole_run(world)


@pytest.mark.matrix
def test_a_kill_in_a_rotation(world):
    shutil.rmtree(world.run_folder, ignore_errors=True)
    assert world.train("kill:save.rotating:step=4", save_total_limit=1).status == -9
    assert world.checkpoints() == ["checkpoint-4"] and world.leftovers() == [".checkpoint-2.deleted"]
    resumed = world.train(resume_from_checkpoint=True, save_total_limit=1)
    assert resumed.status == 0 and world.checkpoints() == ["checkpoint-6"] and world.leftovers() == []
    assert_ends_as_the_whole_run(world)


@pytest.mark.matrix
def test_a_kill_in_the_middle_of_a_step(world):
    shutil.rmtree(world.run_folder, ignore_errors=True)
    assert world.train("kill:update:step=6").status == -9
    assert world.train(resume_from_checkpoint=True).status == 0
    assert_ends_as_the_whole_run(world)


def test_a_kill_in_a_mixture_with_dynamic_sampling_a_curriculum_and_a_rollout_ahead(tmp_path):
    """Three datasets, each with rewards of its own, and a kill in the middle of the second rollout."""
    ahead = {"rollouts_ahead": 1, "old_logprobs": "sampler", "vllm_importance_sampling_correction": False}
    chosen = {"dynamic_sampling": True, "drop_solved_above": 1.0}
    world = World(tmp_path / "world", max_steps=10, save_steps=5, **chosen, **ahead)
    world.config["dataset_name"] = None
    lines = (world.folder / "train.jsonl").read_text().splitlines(keepends=True)
    rewards = {"a": ["tiny_rewards.some"], "b": ["tiny_rewards.length", "tiny_rewards.some"], "c": None}
    world.config["datasets"] = {
        name: {"dataset_name": str(world.folder / f"{name}.jsonl"), "share": share, "reward_funcs": rewards[name]}
        for name, share in {"a": 0.5, "b": 0.25, "c": 0.25}.items()
    }
    for i, name in enumerate(rewards):
        (world.folder / f"{name}.jsonl").write_text("".join(lines[i::3]))
    done = world.train()
    assert done.status == 0 and "8: a 4, b 2, c 2" in done.out, done.said
    shutil.move(world.run_folder, world.folder / "whole")
    assert world.train("kill:update:step=8").status == -9 and world.checkpoints() == ["checkpoint-5"]
    resumed = world.train(resume_from_checkpoint=True)
    assert resumed.status == 0 and "checkpoint-5\n" in resumed.out, resumed.said
    assert_ends_as_the_whole_run(world, "checkpoint-10")
    last = numbers(world.run_folder)[9]
    assert last["sampling/weights_age"] == 4
    assert last["data/rounds"] > 1 and last["data/prompts_left"] < 64 and last["data/useful_frac"] < 1
    assert {name for name in last if name.startswith("data/b/")} == {
        "data/b/reward", "data/b/accuracy", "data/b/length", "data/b/passes",
    }  # fmt: skip


@pytest.mark.matrix
def test_a_process_that_dies_ends_the_others(world):
    """Its peer ends with a sentence; what was saved is whole."""
    shutil.rmtree(world.run_folder, ignore_errors=True)
    fields = {"per_device_train_batch_size": 4}
    survivor, dead = world.start("exit:update:step=4:process=1", processes=2, **fields).ends()
    assert dead.status == 9 and survivor.status == 1
    last = survivor.err.strip().splitlines()[-1]
    assert last.startswith("error: process 0 lost its connection to another of the 2 processes of this run"), last
    resumed = world.start(processes=2, resume_from_checkpoint=True, **fields).ends()
    assert [done.status for done in resumed] == [0, 0] and "checkpoint-2\n" in resumed[0].out
