"""Rollouts whose rewards are known beforehand, and which prompts a run has trained on, for one or several processes."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from conftest import prompts, sapo_config, tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.tiny import build_tokenizer

NUM = 24  # prompts `0+1=` to `23+1=`; every third gets one reward for all of its completions

# one mini-batch of the whole rollout: into how many they are cut differs from process to process
WHOLE = {"num_mini_batches": 1, "max_steps": 3, "logging_steps": 1, "loss_aggregation": "prompt-mean"}


def number_of(prompt: str) -> int:
    return int(prompt.split("+")[0])


def scripted(given, trainer) -> dict:
    """Completion k of a prompt, counted over all processes, has 1 + k % 4 tokens."""
    first = trainer.accelerator.process_index * len(given)
    ids = [[10 + number_of(p)] * (1 + (first + i) % 4) for i, p in enumerate(given)]
    return {
        "prompt_ids": trainer.processing_class(given)["input_ids"],
        "completion_ids": ids,
        "logprobs": [[-1.0] * len(row) for row in ids],
    }


def reward(prompts, completion_ids, **kwargs):
    return [
        0.5 if number_of(p) % 3 == 0 else float(len(ids) ** 2) for p, ids in zip(prompts, completion_ids, strict=True)
    ]


class Recorded(SAPOTrainer):
    """Keeps (prompt, completion tokens, advantage) of every row of every rollout, over all processes."""

    def _roll_out(self, generation_batch):
        rollout = super()._roll_out(generation_batch)
        rows = [row for batch in rollout.mini_batches for row in batch.rows]
        order = torch.tensor(rollout.order).argsort().tolist()
        mine = [rows[i] for i in order]  # before they were cut into mini-batches
        text = self.processing_class.decode
        seen = [(number_of(text(row.input_ids[: row.num_prompt])), row.num_trained, row.advantage) for row in mine]
        vars(self).setdefault("seen", []).append(gather_object(seen))
        return rollout


def run(folder: Path, fields: dict | None = None, num_prompts: int = NUM, reward_func=reward) -> Recorded:
    """A run of two rollouts of 8 prompts x 4 completions, more with `max_steps`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    given = {
        "max_steps": 8, "learning_rate": 1e-3, "logging_steps": 4,
        "dynamic_sampling": True, "engine_check_every": 0, "on_collapse": "none", "disable_tqdm": True, "seed": 5,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
    }  # fmt: skip
    given |= fields or {}
    given["per_device_train_batch_size"] = 32 // given.get("num_mini_batches", 4) // world
    tokenizer = build_tokenizer()
    trainer = Recorded(
        tiny_model(tokenizer), reward_func, sapo_config(folder, **given), prompts(num_prompts),
        processing_class=tokenizer, rollout_func=scripted,
    )  # fmt: skip
    trainer.train()
    return trainer


def main(output: str) -> None:
    """In each process; the main one writes what the run has trained on and logged."""
    trainer = run(Path(output + ".run"), WHOLE)
    if trainer.accelerator.is_main_process:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(output).write_text(json.dumps({"seen": trainer.seen, "logs": logs}))


if __name__ == "__main__":
    main(sys.argv[1])
