"""What a name that is no field was probably meant to be: other projects' names of it, and the launcher's options."""

from __future__ import annotations

from collections.abc import Iterable

from sapo_trl.bounds import WITHOUT_EFFECT
from sapo_trl.errors import did_you_mean

# Other projects' names of a field, which by their letters are nearer to another field
USUAL_NAMES: dict[str, str] = {
    other: name
    for name, others in {
        "per_device_train_batch_size": "batch_size mini_batch_size micro_batch_size ppo_mini_batch_size",
        "gradient_accumulation_steps": "accumulate_grad_batches",
        "num_generations": "group_size num_return_sequences n_samples_per_prompt rollout_n",
        "num_mini_batches": "staleness",
        "learning_rate": "lr",
        "max_grad_norm": "gradient_clipping grad_clip clip_grad",
        "num_train_epochs": "epochs",
        "model_name_or_path": "model model_name",
        "dtype": "torch_dtype",
        "attn_implementation": "flash_attn use_flash_attention",
        "use_cpu": "device no_cuda cpu",
        "use_peft": "use_lora lora",
        "lora_r": "lora_rank",
        "dataset_name": "dataset train_file train_files data_path",
        "reward_funcs": "reward reward_model reward_function",
        "output_dir": "output save_dir",
        "report_to": "use_wandb wandb logger",
        "eval_steps": "test_freq",
        "save_steps": "save_freq",
        "resume_from_checkpoint": "resume",
        "max_completion_length": "max_new_tokens max_response_length seq_len max_length",
        "max_prompt_tokens": "max_prompt_length",
        "beta": "kl kl_coef kl_coeff kl_loss_coef",
        "epsilon": "clip_ratio cliprange clip_range",
        "sapo_temperature_pos": "tau tau_pos",
        "sapo_temperature_neg": "tau_neg",
    }.items()
    for other in others.split()
}
LAUNCH_NAMES = (
    "config_file", "gpu_ids", "machine_rank", "main_process_ip", "main_process_port", "mixed_precision",
    "nproc_per_node", "num_gpus", "num_machines", "num_processes", "num_procs", "use_deepspeed", "use_fsdp",
)  # fmt: skip


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence with what an unknown name was probably meant to be; empty if nothing is near."""
    if name in LAUNCH_NAMES:
        return (
            " How many processes run, and how, is for the launcher and stands before the script: "
            "accelerate launch --num_processes 8 -m sapo_trl train …"
        )
    if name in USUAL_NAMES:
        return f" Did you mean {USUAL_NAMES[name]!r}?"
    return did_you_mean(name, [field for field in known if field not in WITHOUT_EFFECT])
