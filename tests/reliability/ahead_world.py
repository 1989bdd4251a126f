"""A run with a rollout ahead and a server, for one or several processes; the server is a class of the first process."""

import json
import os
import threading
from pathlib import Path

import torch
from accelerate.utils import gather_object
from conftest import length_reward, plain_logps, prompts, sample, sapo_config, tiny_model
from transformers import TrainerCallback
from trl.generation import vllm_generation

import sapo_trl.trainer as trainer_module
from sapo_trl import SAPOTrainer
from sapo_trl.tiny import build_tokenizer

STEPS, LENGTH = 2, 10  # of a rollout, of a completion


class Client(TrainerCallback):
    """Samples with the weights that it was sent. A rollout ahead waits until an optimizer step is done meanwhile."""

    def __init__(self):
        self.model, self.dtype = tiny_model(build_tokenizer()).eval(), "float32"
        self.step_done, self.is_busy, self.num_seeded = threading.Event(), False, 0

    def init_communicator(self, device):
        pass

    def reset_prefix_cache(self):
        assert not self.is_busy

    def update_named_params(self, metadata, named_params):
        assert not self.is_busy and threading.current_thread() is threading.main_thread()
        self.model.load_state_dict(dict(named_params), strict=False)  # a tied head comes once

    def generate_seeded(self, ids, seeds, limits, n, temperature, **_):
        assert threading.current_thread() is not threading.main_thread()
        self.is_busy, self.num_seeded = True, self.num_seeded + 1
        is_check = max(limits) < LENGTH  # the main thread waits for it, as for the first rollout
        assert is_check or self.num_seeded == 1 or self.step_done.wait(30)
        each = zip(ids, seeds, limits, strict=True)
        drawn = [
            sample(self.model, prompt, seed + i, temperature, limit) for prompt, seed, limit in each for i in range(n)
        ]
        self.is_busy = False
        return {"completion_ids": [x for x, _ in drawn], "logprobs": [[[p] for p in logps] for _, logps in drawn]}

    def generate(self, prompts, n, temperature, max_tokens, **_):
        """Of an evaluation."""
        assert not self.is_busy
        drawn = [sample(self.model, prompt, None, temperature, max_tokens) for prompt in prompts for _ in range(n)]
        logprobs = [[[p] for p in logps] for _, logps in drawn]
        return {"prompt_ids": prompts, "completion_ids": [x for x, _ in drawn], "logprobs": logprobs}

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_done.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_done.set()


class Recorded(SAPOTrainer):
    """Keeps of every rollout, over all processes: its step, completions, and how far log-probs are off the policy's of
    that step and of one rollout later."""

    def __init__(self, *args, **kwargs):
        self.rollouts, self.weights = [], {}
        super().__init__(*args, **kwargs)

    def _generated_rows(self, rollout, generation_batch):
        rows, num_tokens = super()._generated_rows(rollout, generation_batch)
        if self.model.training:
            state = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
            self.weights[self.state.global_step] = state
            step, gaps = rollout.weights_step, {}
            for at in {step, min(step + STEPS, self.state.global_step)}:
                self.model.load_state_dict(self.weights[at])
                gaps[at - step] = gather_object([self.gap(rows)])
            self.model.load_state_dict(state)
            completions = gather_object([row.input_ids[row.num_prompt :].tolist() for row in rows])
            self.rollouts.append({"step": step, "completions": completions, "gaps": gaps})
        return rows, num_tokens

    def gap(self, rows) -> float:
        found = 0.0
        for row in rows:
            prompt, completion = row.input_ids[: row.num_prompt], row.input_ids[row.num_prompt :]
            batch = {"prompt_ids": prompt[None], "prompt_mask": torch.ones(1, len(prompt))}
            batch |= {"completion_ids": completion[None], "completion_mask": torch.ones(1, len(completion))}
            logps = plain_logps(self.model, batch, self.temperature)[0]
            found = max(found, (logps - row.sampler_logps).abs().max().item())
        return found


def main(output: str) -> int:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    vllm_generation.is_vllm_available = lambda: True
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer)  # before the processes know each other: each saves its own
    client = Client() if rank == 0 else None
    trainer_module.server_client = lambda config: client
    config = sapo_config(
        Path(output).with_suffix(".run"), use_vllm=True, vllm_mode="server", rollouts_ahead=1, old_logprobs="sampler",
        vllm_importance_sampling_correction=False, num_mini_batches=STEPS,
        # 3 prompts, of which two processes share the second
        num_generations=8, per_device_train_batch_size=12 // world, max_completion_length=LENGTH,
        max_steps=5, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, on_collapse="none",
        temperature=0.8, engine_check_every=1, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=1,
        per_device_eval_batch_size=8 // world, ddp_backend="gloo" if world > 1 else None, disable_tqdm=True,
    )  # fmt: skip
    trainer = Recorded(
        model, length_reward, config, prompts(8), prompts(4), processing_class=tokenizer,
        callbacks=[client] if client else [],
    )  # fmt: skip
    trainer.train()
    if rank == 0:
        log = trainer.state.log_history
        checks = [record["sampling/engine_check"] for record in log if "sampling/engine_check" in record]
        ages = [record["sampling/weights_age"] for record in log if "sampling/weights_age" in record]
        result = {"rollouts": trainer.rollouts, "checks": checks, "ages": ages, "seeded": client.num_seeded}
        Path(output).write_text(json.dumps(result))
    return 0
