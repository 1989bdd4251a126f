"""Runs under `accelerate launch`: two rollouts of stored rows through the update, of one model after the other; results
written by rank 0.

The rows are split so that mini-batch k of all processes together is mini-batch k of one process.
"""

import json
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from conftest import length_reward, padded_rollout, prompts, sapo_config, tiny_model
from transformers import TrainerCallback

from sapo_trl import SAPOTrainer
from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.tiny import build_tokenizer
from sapo_trl.update import memory

MINI_BATCHES = 2


class StoredRollouts(SAPOTrainer):
    """Takes rows from `padded_rollout` instead of generating: 16 per rollout, 8 per mini-batch over all processes."""

    rollouts_taken = 0

    def _generated_rows(self, rollout, generation_batch):
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine, tokens = [], 0
        for k in range(MINI_BATCHES):
            batch = padded_rollout(self.base_model, seed=10 * self.rollouts_taken + k, tool_mask=True)
            del batch["old_per_token_logps"]  # the trainer's own old pass makes the run off-policy
            rows = rows_from_padded(batch)
            tokens += sum(row.num_trained for row in rows)
            mine += rows[rank * 8 // world : (rank + 1) * 8 // world]
        self.rollouts_taken += 1
        rollout.rewards = torch.zeros(8 * MINI_BATCHES, 1)  # not looked at: the advantages are stored ones
        return mine, tokens / world

    def _roll_out(self, generation_batch):
        """The stored log-probs of an engine are compared with the scored rows of all processes, and with one more."""
        rollout = super()._roll_out(generation_batch)
        self._check_engine(rollout)
        config = copy(self.args)
        config.old_logprobs = "sampler"
        self._log_all({"sampling/one_row": replace(self._plan.passes, config=config).engine_gap(rollout)})
        return rollout

    def _shuffled(self, num_rows):
        return list(range(num_rows))


def fail_once(trainer) -> None:
    """The first pass with gradient of more than one row runs out of memory on process 1."""
    call, failed = trainer._forward.__class__.__call__, []

    def limited(self, model, inputs, *args, **kwargs):
        if torch.is_grad_enabled() and not failed and int(inputs.rows.max()) > 0:
            failed.append(True)
            raise torch.OutOfMemoryError("made for the test")
        return call(self, model, inputs, *args, **kwargs)

    if trainer.accelerator.process_index == 1:
        trainer._forward.__class__.__call__ = limited


def budgets(trainer) -> list[list[int]]:
    """(tokens a pack, checkpointing) that every process settles on, with other free memory and prompts on each."""
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    memory.free_bytes = lambda device: (1 + rank) * 64 * 2**20
    memory.MOST_TOKENS = 10**6
    trainer.args.max_tokens_per_pack = "auto"
    trainer._plan.memory.auto_checkpointing, trainer._plan.memory.is_settled = True, False
    longest_prompt = 10 if rank == 0 and world == 2 else 10**6
    trainer._plan.memory.settle(trainer.model_wrapped, longest_prompt)
    mine = [trainer._forward.max_tokens, int(trainer.args.activation_checkpointing)]
    return trainer.accelerator.gather(torch.tensor([mine])).tolist()


class Gradients(TrainerCallback):
    """Full gradients just before each optimizer step (DeepSpeed steps inside backward and shows none)."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None})


def main(output: str, moe: str, model, base_model) -> None:
    tokenizer = build_tokenizer()
    world = int(__import__("os").environ.get("WORLD_SIZE", "1"))
    config = sapo_config(
        output + ".run",
        per_device_train_batch_size=8 // world // 2,
        gradient_accumulation_steps=2,
        num_mini_batches=MINI_BATCHES,
        engine_check_every=1,
        max_steps=4,
        max_tokens_per_pack=30,
        # measured under every engine; all fits, so it ends up off
        gradient_checkpointing=False if "--fail" in sys.argv else "auto",
        routing_replay="r2" if moe == "moe" else "none",
        learning_rate=0.05,
        adam_epsilon=0.01,  # smooth: the step follows the gradient, not its sign
        lr_scheduler_type="constant",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu="--engine" not in sys.argv,
        ddp_backend="gloo" if world > 1 else None,
    )
    gradients = Gradients()
    trainer = StoredRollouts(model, length_reward, config, prompts(), processing_class=tokenizer, callbacks=[gradients])
    trainer.base_model = base_model
    if "--fail" in sys.argv:
        fail_once(trainer)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    stage = trainer.model_wrapped.zero_optimization_stage() if wrapped == "DeepSpeedEngine" else 0
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    settled = budgets(trainer)
    if trainer.accelerator.is_main_process:
        result = {
            "wrapped": wrapped,
            "stage": stage,
            "processes": trainer.accelerator.num_processes,
            "log": [r for r in trainer.state.log_history if "loss" in r],
            "gradients": gradients.steps,
            "budgets": settled,
            "parameters": {name: value.float().tolist() for name, value in state.items()},
        }
        Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    kinds = sys.argv[2].split(",")
    # all before any configuration: under ZeRO-3 whatever loads later is partitioned
    models = [[tiny_model(build_tokenizer(), kind == "moe") for _ in range(2)] for kind in kinds]
    for kind, pair in zip(kinds, models, strict=True):
        main(f"{sys.argv[1]}/{kind}.json", kind, *pair)
