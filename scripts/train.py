"""Train: `accelerate launch scripts/train.py --config configs/tiny/sapo.yaml [--any_field value]`.

Everything that can be checked without a model is checked before one loads. The output folder gets
`resolved_config.yaml`, `versions.json`, `plan.json`, `hardware.json`, `metrics.jsonl`, `warnings.jsonl` if there were
any, `report.html` and the trained model.

Exit status: 0 trained; 1 refused or failed; 3 stopped by the collapse guard (`on_collapse: stop`), with a checkpoint of
the collapsed policy and no model in the output folder itself. `accelerate launch` turns every status but 0 into 1.
"""

import sys
import warnings

from sapo_trl.cli.parse import RunArguments, parse_run, resolved_fields

COLLAPSED = 3  # exit status


def build_trainer(run: RunArguments):
    """The trainer of a parsed run: data and rewards first, the model last."""
    from trl import get_peft_config, get_quantization_config

    from sapo_trl.config import batch_plan
    from sapo_trl.data.loading import load_train_and_eval
    from sapo_trl.data.preflight import check_model_path, check_train_dataset, drop_unusable_golds
    from sapo_trl.rewards import load_reward
    from sapo_trl.trainer import SAPOTrainer

    plan = batch_plan(run.config)
    if run.model.model_name_or_path is None:
        raise ValueError("no model: set model_name_or_path to a Hub id or a folder.")
    check_model_path(run.model.model_name_or_path)
    rewards = [load_reward(entry) for entry in run.script.reward_funcs]
    tokenizer = load_tokenizer(run)
    train, held_out = load_train_and_eval(run.script, tokenizer, run.config.seed)
    train = drop_unusable_golds(train, rewards, run.script.max_unusable_gold_frac)
    check_train_dataset(train, plan, run.config.world_size)
    run.config.model_init_kwargs = {
        "revision": run.model.model_revision,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
        **(run.config.model_init_kwargs or {}),
    }
    return SAPOTrainer(
        run.model.model_name_or_path,
        rewards,
        run.config,
        train,
        eval_dataset=held_out if run.config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(run.model),
        peft_config=get_peft_config(run.model),
    )


def load_tokenizer(run: RunArguments):
    """The tokenizer of the model; also the first thing that shows whether a Hub id can be reached."""
    from transformers import AutoTokenizer

    name = run.model.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=run.model.model_revision,
            padding_side="left",
            trust_remote_code=run.config.trust_remote_code,
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model {name} does not exist here and can't be had from the Hub: {reason}") from error


def main() -> None:
    # TRL 1.16 asks for a property that transformers has renamed, once per rollout
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        run = parse_run()
        trainer = build_trainer(run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    from sapo_trl.monitor import attach, collapse_alarms, record_settings

    attach(trainer, report=True)
    record_settings(trainer, resolved_fields(run))
    trainer.train(resume_from_checkpoint=run.config.resume_from_checkpoint)
    if alarms := collapse_alarms(trainer):
        trainer.end()
        sys.exit(_stopped(trainer, alarms))
    trainer.save_model(run.config.output_dir)
    trainer.accelerator.print(f"model and metrics.jsonl are in {run.config.output_dir}")
    if run.config.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    trainer.end()


def _stopped(trainer, alarms) -> int:
    """Print why the guard ended the run; the exit status."""
    folder = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"
    reasons = "\n".join(f"  step {alarm.step}: {alarm.message}" for alarm in alarms)
    trainer.accelerator.print(f"stopped by the collapse guard, the policy is in {folder}:\n{reasons}", flush=True)
    return COLLAPSED


if __name__ == "__main__":
    main()
