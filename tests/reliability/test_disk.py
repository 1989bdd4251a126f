"""A disk that is full or gone: noticed before the model loads where it can be, and in a sentence where it can't."""

import os
import resource
import shutil

import pytest
from conftest import sapo_trainer, tiny_model
from processes import World, call
from reliability_world import quiet
from transformers import TrainerCallback

from sapo_trl import faults
from sapo_trl.checkpoints import disk
from sapo_trl.checkpoints.disk import DiskError, require_output, require_space

FIELDS = {
    "learning_rate": 1e-2, "router_aux_loss_coef": 0.0, "num_mini_batches": 2, "save_strategy": "steps",
    "save_steps": 1, "max_steps": 3, "max_completion_length": 4, "disable_tqdm": True,
}  # fmt: skip


def contents(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


@pytest.mark.parametrize("place", ["save.weights", "save.optimizer", "save.run_state", "save.trainer_state"])
def test_a_disk_that_fills_up_in_a_save(tmp_path, tokenizer, monkeypatch, place):
    monkeypatch.setenv(faults.VARIABLE, f"disk_full:{place}:step=2")
    faults.wanted.cache_clear()
    with quiet():
        trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **FIELDS)
        with pytest.raises(DiskError) as error:
            trainer.train()
    monkeypatch.delenv(faults.VARIABLE)
    faults.wanted.cache_clear()
    assert str(error.value).startswith(f"{tmp_path} could not be written; its disk is full or limited (")
    rest = " bytes free). .checkpoint-2.partial was not finished and is gone. Free some space. checkpoint-1 is whole: "
    assert rest in str(error.value)
    assert contents(tmp_path) == ["checkpoint-1"]
    with quiet():
        again = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **FIELDS)
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def limited(argv: list[str], limit: int, folder: str) -> int:
    """`scripts/train.py` where no file may grow beyond so many bytes, once the first checkpoint is there."""
    from sapo_trl.checkpoints import saving
    from sapo_trl.cli.train import main

    usual = saving.write_checkpoint

    def write(trainer, *arguments):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return usual(trainer, *arguments)

    import sapo_trl.trainer_checkpoints

    sapo_trl.trainer_checkpoints.write_checkpoint = write
    import sys

    sys.path.insert(0, folder)
    return main(argv)


@pytest.mark.parametrize("limit", [20_000, pytest.param(150_000, marks=pytest.mark.matrix)])
def test_a_file_that_the_system_does_not_let_grow(tmp_path, limit):
    """The weights do not fit, or only the optimizer does not: safetensors and torch.save each have their own error."""
    world = World(tmp_path / "world")
    run = world.start(max_steps=1, output_dir=str(tmp_path / "other"), save_steps=100)  # writes the config
    assert run.ends()[0].status == 0
    text = (world.folder / "config.yaml").read_text()
    text = text.replace("max_steps: 1", "max_steps: 6").replace("save_steps: 100", "save_steps: 2")
    (world.folder / "config.yaml").write_text(text.replace(str(tmp_path / "other"), str(world.run_folder)))
    argv = ["--config", str(world.folder / "config.yaml")]
    (done,) = call("test_disk", "limited", argv, limit, str(world.folder))
    assert done.status == 1 and "Traceback" not in done.err
    assert f"error: {world.run_folder} could not be written; its disk is full or limited (" in done.err
    assert contents(world.run_folder) == ["checkpoint-2"]
    assert world.train(resume_from_checkpoint=True).status == 0


@pytest.mark.matrix
def test_a_small_disk_of_its_own(tmp_path):
    """A real file system of 2 MiB, where the test may mount one."""
    world, small = World(tmp_path / "world"), tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m tmpfs {small} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        done = world.train(output_dir=str(small / "run"))
        assert done.status == 1 and "bytes free" in done.err and str(small / "run") in done.err
        assert "Traceback" not in done.err and not list((small / "run").glob("*checkpoint*"))
    finally:
        os.system(f"umount {small}")


# ---- before the model loads ------------------------------------------------------------------------------------------


def test_space_is_counted_before_the_model_loads(tmp_path, tokenizer, monkeypatch):
    model = tiny_model(tokenizer)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    weights = (folder / "model.safetensors").stat().st_size
    free = shutil.disk_usage(tmp_path)._replace(free=disk.SPARE_BYTES + 4 * weights)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: free)
    with quiet():
        config = sapo_trainer(tmp_path, tokenizer, model, **FIELDS).args
    require_output(config, str(folder), saves_adapter=False)  # a checkpoint is three times the weights, the model once
    config.save_total_limit = 2
    needed = rf"3 checkpoint\(s\) and the model need\(s\) {10 * weights:,} bytes in {tmp_path}"
    with pytest.raises(DiskError, match=needed):
        require_output(config, str(folder), saves_adapter=False)
    require_output(config, str(folder), saves_adapter=True)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    require_output(config, str(folder), saves_adapter=False)  # they lie there already
    config.save_total_limit, config.save_only_model = 4, True
    require_output(config, str(folder), saves_adapter=False)
    config.save_strategy = "no"
    require_output(config, model, saves_adapter=False)


def test_the_sentence_has_the_folder_and_the_bytes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    needed = rf"checkpoint-9 need\(s\) [\d,]+ bytes in {tmp_path}/a/b, and its disk has [\d,]+"
    with pytest.raises(DiskError, match=needed):
        require_space(tmp_path / "a/b", free, "checkpoint-9")
    require_space(tmp_path / "a/b", 1, "checkpoint-9")


@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path, tokenizer, monkeypatch, place):
    (tmp_path / "a file").write_text("")
    folder = tmp_path / "a file" / "run" if place == "a file" else place
    loaded = []
    monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: loaded.append(1))
    with pytest.raises(DiskError, match=rf"output_dir {folder} can't be written.*Set another output_dir"):
        sapo_trainer(folder, tokenizer, tiny_model(tokenizer), **FIELDS)
    assert not loaded


# ---- in a run --------------------------------------------------------------------------------------------------------


class Removes(TrainerCallback):
    """Deletes the run's folder at the start of a step, or puts another one in its place."""

    def __init__(self, step: int, replaces: bool):
        self.step, self.replaces = step, replaces

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            shutil.rmtree(args.output_dir)
            if self.replaces:
                os.makedirs(args.output_dir)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_folder_that_is_gone_is_noticed_and_a_checkpoint_is_saved(tmp_path, tokenizer, replaces, caplog):
    folder = tmp_path / "run"
    fields = FIELDS | {"save_steps": 100, "max_steps": 5, "save_strategy": "steps"}
    with quiet():
        trainer = sapo_trainer(folder, tokenizer, tiny_model(tokenizer), callbacks=[Removes(2, replaces)], **fields)
        trainer.train()
    assert f"step 2: the output folder {folder} is gone, with all checkpoints and files that it held" in caplog.text
    assert contents(folder) == ["checkpoint-3", "checkpoint-5"]
    assert "is gone" in (folder / "warnings.jsonl").read_text()


class Blocks(TrainerCallback):
    """Puts a folder in the place of metrics.jsonl before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            path = args.folder / "metrics.jsonl"
            path.unlink(missing_ok=True)
            path.mkdir()


def test_a_folder_in_the_place_of_the_metrics(tmp_path, tokenizer):
    """The sentence names a checkpoint only where there is one."""
    fields, model = FIELDS | {"logging_steps": 1, "max_steps": 2}, tiny_model(tokenizer)
    for step, rest in (
        (1, f"{tmp_path}/1 holds no checkpoint to go on from."),
        (2, "checkpoint-1 is whole: go on with"),
    ):
        with quiet():
            trainer = sapo_trainer(tmp_path / str(step), tokenizer, model, callbacks=[Blocks(step)], **fields)
            with pytest.raises(DiskError, match=rf"/{step}/metrics.jsonl can't be written: .*Move it away. {rest}"):
                trainer.train()
    with pytest.raises(DiskError, match=r"metrics.jsonl is a folder, and metrics are written there. Move it away"):
        sapo_trainer(tmp_path / "2", tokenizer, model, **fields)
