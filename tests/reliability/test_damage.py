"""What a run does with a checkpoint that is not what was written, or not its own: one sentence, nothing is changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import length_reward, prompts, sapo_config, sapo_trainer, tiny_model
from processes import World
from reliability_world import quiet
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOTrainer
from sapo_trl.checkpoints.folder import DamagedCheckpoint, newest_valid, rotate, verify
from sapo_trl.checkpoints.resume import checkpoint_of, dataset_digest

FIELDS = {
    "learning_rate": 1e-2, "router_aux_loss_coef": 0.0, "num_mini_batches": 2, "save_strategy": "steps",
    "save_steps": 1, "max_steps": 3, "max_completion_length": 4, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3; copied before anything is done to it."""
    folder = tmp_path_factory.mktemp("trained")
    with quiet():
        sapo_trainer(folder, tokenizer, tiny_model(tokenizer), **FIELDS).train()
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


FILES = (
    "config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.pt",
    "parameter_hash.json", "rng_state.pth", "run_state_0.safetensors", "scheduler.pt", "tokenizer.json",
    "tokenizer_config.json", "trainer_state.json",
)  # fmt: skip


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the middle": lambda path: flip(path, 0.5),
    "a flipped bit at the end": lambda path: flip(path, 1.0),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_noticed(run, damage):
    folder = run / "checkpoint-3"
    assert set(FILES) <= {path.name for path in folder.iterdir()} and verify(folder)["step"] == 3
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        kept = path.read_bytes()
        DAMAGE[damage](path)
        with pytest.raises(
            DamagedCheckpoint, match=rf"{path.name} (is missing|is damaged|has \d+ bytes, and \d+ were)"
        ):
            verify(folder)
        assert newest_valid(run)[0] == run / "checkpoint-2"
        path.write_bytes(kept)
    assert verify(folder)["step"] == 3


def test_no_pickle_is_written_that_nobody_reads(run):
    assert not list(run.rglob("training_args.bin"))


def test_the_newest_whole_one_is_taken_and_the_others_are_named(run):
    (run / "checkpoint-3" / "rng_state.pth").unlink()
    flip(run / "checkpoint-2" / "optimizer.pt", 0.3)
    (run / ".checkpoint-4.partial").mkdir()  # of a save that was killed
    folder, said = checkpoint_of("latest", run)
    assert folder == run / "checkpoint-1"
    assert said == [
        f"skipped checkpoint-3: {run}/checkpoint-3/rng_state.pth is missing: the checkpoint lost a file.",
        f"skipped checkpoint-2: {run}/checkpoint-2/optimizer.pt is damaged: its sha256 is not the one in "
        "manifest.json.",
        f"resume: {run}/checkpoint-1",
    ]
    assert checkpoint_of(True, run) == checkpoint_of("True", run) == checkpoint_of("latest", run)
    assert checkpoint_of(None, run) == checkpoint_of("false", run) == (None, [])
    (run / "checkpoint-1" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* can be resumed from:\n  skipped checkpoint-3") as error:
        checkpoint_of("true", run)
    assert str(error.value).count("\n  skipped") == 3
    assert checkpoint_of("true", run / "new")[1] == [
        f"resume: {run}/new holds no checkpoint yet, so the run starts at step 0"
    ]


def test_an_explicit_folder_that_is_damaged_says_which_one_is_whole(run):
    (run / "checkpoint-3" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=rf"scheduler.pt is missing.* Resume from {run}/checkpoint-2, or with"):
        checkpoint_of(str(run / "checkpoint-3"), run)
    with pytest.raises(ValueError, match=rf"trainer_state|manifest.json is missing.* Resume from {run}/checkpoint-2"):
        checkpoint_of(str(run), run)
    with pytest.raises(ValueError, match=r"nowhere/checkpoint-9 is not a folder. There is no valid checkpoint beside"):
        checkpoint_of(str(run / "nowhere/checkpoint-9"), run)


def test_a_checkpoint_without_its_manifest(run):
    (run / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json is missing: the checkpoint lost a file"):
        verify(run / "checkpoint-3")


def test_another_trainers_checkpoint(tmp_path, tokenizer):
    plain = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
    }
    config = GRPOConfig(str(tmp_path / "trl"), max_steps=1, save_steps=1, max_completion_length=4, **plain)
    with quiet():
        GRPOTrainer(tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer).train()
        trainer = sapo_trainer(tmp_path / "ours", tokenizer, tiny_model(tokenizer), **FIELDS)
    before = snapshot(tmp_path / "trl")
    with pytest.raises(ValueError, match=r"written by another trainer.*model_name_or_path: .*trl/checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "trl/checkpoint-1"))
    assert snapshot(tmp_path / "trl") == before


def test_weights_alone_are_refused_as_what_they_are(tmp_path, tokenizer):
    with quiet():
        sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **FIELDS, save_only_model=True).train()
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **FIELDS)
    with pytest.raises(ValueError, match=r"saved with save_only_model.*model_name_or_path: .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


# ---- another run -----------------------------------------------------------------------------------------------------

REFUSED = {
    "algorithm": ({"algorithm": "gspo"}, "algorithm: sapo -> gspo; the run would be half of one objective"),
    "temperature of the gate": ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg: 1.05 -> 2.0"),
    "seed": ({"seed": 7}, "seed: 42 -> 7; prompts would be repeated and others left out"),
    "batch": (
        {"per_device_train_batch_size": 16},
        "per_device_train_batch_size: 8 -> 16; the place within the rollout",
    ),
    "batch plan": ({"num_mini_batches": 4}, "num_mini_batches: 2 -> 4"),
    "generations": ({"num_generations": 8}, "num_generations: 4 -> 8"),
    "learning rate": ({"learning_rate": 1e-3}, "learning_rate: 0.01 -> 0.001; it would have no effect"),
    "weight decay": ({"weight_decay": 0.1}, "weight_decay: 0.0 -> 0.1; it would have no effect"),
    "schedule": ({"lr_scheduler_type": "constant"}, "lr_scheduler_type: linear -> constant"),
    "kl": ({"beta": 0.1}, "beta: 0.0 -> 0.1"),
}


@pytest.mark.parametrize("changed", REFUSED)
def test_another_run_is_refused(run, tokenizer, changed):
    fields, sentence = REFUSED[changed]
    with quiet():
        trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **(FIELDS | fields))
    before = snapshot(run)
    with pytest.raises(ValueError, match="can't be resumed with other settings") as error:
        trainer.train(resume_from_checkpoint=True)
    assert sentence in str(error.value) and f"model_name_or_path: {run}/checkpoint-3" in str(error.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("data", [prompts(63), prompts(64).map(lambda row: {"answer": row["answer"] + "0"})])
def test_other_data_is_refused(run, tokenizer, data):
    with quiet():
        trainer = SAPOTrainer(
            tiny_model(tokenizer), length_reward, sapo_config(run, **FIELDS), data, processing_class=tokenizer
        )
    with pytest.raises(ValueError, match=r"dataset: 64 rows, sha256 \w+ -> 6[34] rows, sha256 \w+; prompts would be"):
        trainer.train(resume_from_checkpoint=True)


def test_the_digest_of_data_does_not_depend_on_how_it_is_stored(tmp_path):
    data = prompts(64)
    data.to_json(tmp_path / "x.jsonl")
    stored = type(data).from_json(str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path))
    assert dataset_digest(data) == dataset_digest(stored) == dataset_digest(data.select(range(64)))
    assert dataset_digest(data.shuffle(seed=1)) != dataset_digest(data)
    assert dataset_digest(data.to_iterable_dataset()) == "stream"


def test_another_number_of_processes_is_refused(run, tokenizer):
    path = run / "checkpoint-3" / "manifest.json"
    with quiet():
        trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **FIELDS)
    trainer._identity["num_processes"] = 2
    with pytest.raises(ValueError, match="num_processes: 1 -> 2; the place within the rollout"):
        trainer.train(resume_from_checkpoint=True)
    assert json.loads(path.read_text())["identity"]["num_processes"] == 1


def test_what_may_change_is_told(run, tokenizer, capsys):
    fields = FIELDS | {"max_steps": 4, "temperature": 0.9, "save_total_limit": 2}
    trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **fields)
    trainer.reward_func_names = ["another"]
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("resume", "changed"))]
    assert said == [
        "changed since the checkpoint: max_steps 3 -> 4",
        "changed since the checkpoint: reward_funcs ['length_reward'] -> ['another']",
        "changed since the checkpoint: save_total_limit None -> 2",
        "changed since the checkpoint: temperature 1.0 -> 0.9",
    ]


def test_the_temperature_may_change_between_rollouts_only(run, tokenizer):
    """`checkpoint-3` lies in the middle of one, whose other half would have ratios of two temperatures."""
    trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **(FIELDS | {"max_steps": 4, "temperature": 0.9}))
    with pytest.raises(ValueError, match=r"temperature: 1\.0 -> 0\.9; the completions that wait"):
        trainer.train(resume_from_checkpoint=True)


def test_smaller_packs_are_taken_in_the_middle_of_a_rollout(run, tokenizer):
    """A run that had not enough memory goes on with what was set then, and not with what was saved."""
    with quiet():
        trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **(FIELDS | {"max_tokens_per_pack": 20}))
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    packs = [entry["update/packs"] for entry in trainer.state.log_history if "update/packs" in entry]
    assert trainer._forward.max_tokens == 20 and min(packs[-2:]) > 1


# ---- nothing left to do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 2])
def test_a_run_at_its_end_says_so_writes_nothing_and_has_its_weights(run, tokenizer, capsys, steps):
    trainer = sapo_trainer(run, tokenizer, tiny_model(tokenizer), **(FIELDS | {"max_steps": steps}))
    before, weights = snapshot(run), {name: p.clone() for name, p in trainer.model.named_parameters()}
    output = trainer.train(resume_from_checkpoint=True)
    assert f"{run}/checkpoint-3 is at step 3 of {steps}: nothing is left to do" in capsys.readouterr().out
    assert output.global_step == 3 and not trainer.has_trained and snapshot(run) == before
    saved = load_file(run / "checkpoint-3/model.safetensors")
    assert all(p.equal(saved[name]) for name, p in trainer.model.named_parameters() if name in saved)
    assert not all(p.equal(weights[name]) for name, p in trainer.model.named_parameters())


def test_more_epochs_are_more_to_do(tmp_path, tokenizer):
    fields = FIELDS | {"max_steps": -1, "num_train_epochs": 1.0}
    data = prompts(8)

    def trainer(epochs: float) -> SAPOTrainer:
        config = sapo_config(tmp_path, **(fields | {"num_train_epochs": epochs}))
        return SAPOTrainer(tiny_model(tokenizer), length_reward, config, data, processing_class=tokenizer)

    with quiet():
        first = trainer(1.0)
        first.train()
        same, longer = trainer(1.0), trainer(2.0)
        same.train(resume_from_checkpoint=True)
        longer.train(resume_from_checkpoint=True)
    assert first.state.global_step == 4 and not same.has_trained and longer.state.global_step == 8


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_the_best_and_the_newest_are_never_rotated_away(tmp_path):
    for step in (2, 4, 10, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert rotate(tmp_path, None, []) == []
    gone = rotate(tmp_path, 2, [tmp_path / "checkpoint-4"])
    assert [path.name for path in gone] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert rotate(tmp_path, 1, [tmp_path / "checkpoint-4"]) == []
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-4", "checkpoint-x"]
    assert [path.name for path in rotate(tmp_path, 1, [])] == ["checkpoint-4"]


def test_the_best_checkpoint_and_the_last_one_outlive_the_run(tmp_path, tokenizer):
    """transformers deletes all but the best one when such a run ends."""
    fields = FIELDS | {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score", "max_steps": 3}
    fields |= {"greater_is_better": True, "eval_dataset": prompts(4), "save_total_limit": 1}
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
        trainer._evaluate = lambda *_: {"eval_score": 1 / trainer.state.global_step}
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_the_script_says_it_in_a_sentence(tmp_path):
    """Status 1 and no traceback where it refuses, status 0 where nothing is left to do."""
    world = World(tmp_path / "world", max_steps=4)
    assert world.train().status == 0
    before = snapshot(world.run_folder)
    finished = world.train(resume_from_checkpoint=True)
    assert finished.status == 0 and "checkpoint-4 is at step 4 of 4: nothing is left to do" in finished.out
    model = world.run_folder / "model.safetensors"
    written = model.read_bytes()
    model.unlink()  # a kill between the last checkpoint and the model
    assert world.train(resume_from_checkpoint=True).status == 0 and model.read_bytes() == written
    refused = world.train(resume_from_checkpoint=True, algorithm="gspo", max_steps=6)
    assert refused.status == 1 and "algorithm: sapo -> gspo" in refused.err and "Traceback" not in refused.err
    assert snapshot(world.run_folder).keys() == before.keys()
    flip(world.run_folder / "checkpoint-4/rng_state.pth", 0.5)
    resumed = world.train(resume_from_checkpoint=True, max_steps=6)
    assert resumed.status == 0 and "skipped checkpoint-4" in resumed.out and "rng_state.pth is damaged" in resumed.out


@pytest.mark.matrix
@pytest.mark.parametrize("action, file", [("flip", "optimizer"), ("tear", "run_state"), ("delete", "rng_state")])
def test_a_finished_checkpoint_that_is_damaged_later(tmp_path, action, file):
    world = World(tmp_path / "world", max_steps=4, write_report=False)
    assert world.train(f"{action}:save.published:file={file}:step=4").status == 0
    resumed = world.train(resume_from_checkpoint=True, max_steps=6)
    assert resumed.status == 0, resumed.err
    assert "skipped checkpoint-4" in resumed.out and f"resume: {world.run_folder}/checkpoint-2\n" in resumed.out
