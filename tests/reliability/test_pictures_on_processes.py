"""Pictures on several processes: two of them train as one does, also where one of them holds text alone."""

import os
from pathlib import Path

import pytest
import torch
from conftest import sapo_config
from picture_world import content_reward, small_model, small_processor, with_images, with_pictures
from processes import call, zero
from transformers import TrainerCallback

from sapo_trl import SAPOTrainer
from sapo_trl.rollout.rows import rows_from_padded

# Rows of `with_images` by mini-batch and process: the second process has no picture in the first mini-batch
PLACES = (((0, 2), (1, 7)), ((3, 5), (4, 6)))


class StoredRows(SAPOTrainer):
    """Takes the rows of `with_images` instead of generating."""

    def _generated_rows(self, rollout, generation_batch):
        batch = with_images(self.model, self.processing_class)
        del batch["old_per_token_logps"]
        rows = rows_from_padded(batch)
        process, num = self.accelerator.process_index, self.accelerator.num_processes
        mine = [[i for part in parts for i in part] if num == 1 else parts[process] for parts in PLACES]
        rollout.rewards = torch.zeros(8, 1)  # not looked at: the advantages are stored ones
        return [rows[i] for part in mine for i in part], sum(row.num_trained for row in rows) / num

    def _shuffled(self, num_rows):
        return list(range(num_rows))


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def two_steps(output: str) -> None:
    """In each process: one rollout of two mini-batches; the first process writes what came of it."""
    processor, num = small_processor(), int(os.environ.get("WORLD_SIZE", "1"))
    model, gradients = small_model(processor), Gradients()
    config = sapo_config(
        output + ".run", per_device_train_batch_size=4 // num, num_mini_batches=2, max_steps=2, max_tokens_per_pack=24,
        learning_rate=0.05, adam_epsilon=0.01, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ, ddp_backend="gloo" if num > 1 else None,
    )  # fmt: skip
    trainer = StoredRows(
        model, content_reward, config, with_pictures(16), processing_class=processor, callbacks=[gradients]
    )
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        torch.save({"parameters": state, "gradients": gradients.steps, "losses": logs}, output)


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([tensors[name].detach().float().flatten() for name in sorted(tensors)])


def ran(output: Path, **how) -> dict:
    done = call("test_pictures_on_processes", "two_steps", str(output), **how)
    assert not any(one.status for one in done), done[0].err[-3000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("alone") / "result.pt")


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.matrix)])
def test_two_processes_equal_one(tmp_path, alone, stage):
    together = ran(tmp_path / "result.pt", processes=2, env=zero(stage) if stage else {})
    assert together["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    mine, theirs = flat(alone["parameters"]), flat(together["parameters"])
    assert (mine - theirs).norm() < 1e-5 * mine.norm()
    if stage:
        return  # DeepSpeed steps inside the backward pass and shows no gradients
    for mine, theirs in zip(alone["gradients"], together["gradients"], strict=True):
        assert mine.keys() == theirs.keys() and any(x.any() for name, x in mine.items() if "visual" in name)
        a, b = flat(mine), flat(theirs)
        assert (a - b).norm() < 1e-5 * a.norm()
