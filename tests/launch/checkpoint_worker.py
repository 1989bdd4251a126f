"""Runs under `accelerate launch`: a tiny Qwen3-MoE trains 3 steps, saved at 2, and gets the parameters of step 2 back.

Started again on the same folder, it resumes at step 2. Rank 0 writes what the engine was and how the experts moved.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from conftest import length_reward, prompts, sapo_config, tiny_model
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES
from deepspeed.utils import z3_leaf_module
from peft import LoraConfig
from transformers import TrainerCallback

from sapo_trl import SAPOTrainer
from sapo_trl.checkpoints.weights import HASH_FILE
from sapo_trl.tiny import build_tokenizer

EXPERTS = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])


class Experts(TrainerCallback):
    """Trained expert tensors, whole, at the start of training and after each step."""

    def __init__(self):
        self.at = {}

    def keep(self, step, model):
        self.at[step] = {}
        for name, p in model.named_parameters():
            if ".experts." in name and p.requires_grad:
                with GatheredParameters([p]):
                    self.at[step][name] = p.detach().clone()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep("begin", model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(state.global_step, model)


def largest_difference(a: dict, b: dict) -> list[float]:
    return [float((a[name] - b[name]).abs().max()) for name in a]


def main(output: str, kind: str, model) -> None:
    DEFAULT_LEAF_MODULE_CLASSES.clear()  # DeepSpeed's own list has Qwen3-MoE: the flags seen are to be this project's
    tokenizer, seen = build_tokenizer(), Experts()
    config = sapo_config(
        output + ".run",
        per_device_train_batch_size=4,
        num_mini_batches=2,
        max_steps=3,
        learning_rate=1e-2,
        router_aux_loss_coef=0.0,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=False,
        ddp_backend="gloo",
    )
    adapter = EXPERTS if kind == "lora" else None
    trainer = SAPOTrainer(
        model, length_reward, config, prompts(), processing_class=tokenizer, callbacks=[seen], peft_config=adapter
    )
    checkpoint = f"{config.output_dir}/checkpoint-2"
    trainer.train(resume_from_checkpoint=checkpoint if Path(checkpoint).exists() else None)
    trainer.state.best_model_checkpoint = checkpoint
    trainer._load_best_model()  # ZeRO's own loader, which a resume uses as well
    seen.keep("reloaded", trainer.model)
    if trainer.accelerator.is_main_process:
        engine = trainer.model_wrapped
        result = {
            "stage": engine.zero_optimization_stage(),
            "processes": torch.distributed.get_world_size(),
            "leaves": [type(module).__name__ for module in engine.modules() if z3_leaf_module(module)],
            "hash": json.loads(Path(checkpoint, HASH_FILE).read_text()),
            "differences": {
                f"{a} {b}": largest_difference(seen.at[a], seen.at[b])
                for a, b in (("begin", 2), (2, 3), (2, "reloaded"))
                if {a, b} <= seen.at.keys()
            },
        }
        Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    kinds = sys.argv[2].split(",")
    # all before any configuration: unpartitioned
    for kind, model in [(kind, tiny_model(build_tokenizer(), moe=True)) for kind in kinds]:
        main(f"{sys.argv[1]}/{kind}.json", kind, model)
