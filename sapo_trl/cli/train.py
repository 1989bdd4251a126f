"""`sapo-trl train`: a config becomes a trained model.

Everything that can be checked without a model is checked before one loads. The output folder gets
`resolved_config.yaml`, `versions.json`, `plan.json`, `hardware.json`, `metrics.jsonl`, `warnings.jsonl` if there were
any, `report.html` and the trained model.

Exit status: 0 trained, nothing was left to do, or ended by a signal with a checkpoint to go on from (the last line
says which); 1 refused or failed; 3 stopped by the collapse guard (`on_collapse: stop`), with a checkpoint and no model
in the output folder itself; 5 stopped by the hang watchdog. `accelerate launch` turns every status but 0 into 1.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence

from accelerate.utils import broadcast_object_list
from trl import get_peft_config, get_quantization_config

from sapo_trl.batch_plan import batch_plan
from sapo_trl.cli.launch import check_launch
from sapo_trl.cli.models import load_tokenizer, require_model
from sapo_trl.cli.packages import require_packages
from sapo_trl.cli.parse import RunArguments, parse_run, resolved_fields, turn_arguments
from sapo_trl.cli.shapes import model_config
from sapo_trl.cli.terminal import help_for, refuse
from sapo_trl.data.loading import load_train_and_eval
from sapo_trl.data.mixing import mixed_rewards
from sapo_trl.data.preflight import check_train_dataset, drop_unusable_answers
from sapo_trl.monitor import attach, collapse_alarms, record_settings
from sapo_trl.monitor.guard import Alarm
from sapo_trl.monitor.watchdog import PeerError
from sapo_trl.rewards import load_reward
from sapo_trl.setup_checks import check_vocabulary
from sapo_trl.trainer import SAPOTrainer
from sapo_trl.update.finite import DriftError, NonFiniteError
from sapo_trl.vision import sees, text_tokenizer

COLLAPSED = 3  # exit status
USAGE = """
Train: sapo-trl train --config tiny/sapo [--any_field value]
On several GPUs: accelerate launch --num_processes 8 -m sapo_trl train --config …

Every field may stand in the YAML file or on the command line, which wins. Each option with its default:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit status."""
    # TRL 1.16 asks for a property that transformers has renamed, once per rollout
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    argv = sys.argv[1:] if argv is None else argv
    if (text := help_for(argv, USAGE)) is not None:
        print(text)
        return 0
    try:
        run = parse_run(argv)
        check_launch({"mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION")}, run.config)
        trainer = build_trainer(run)
    except (ValueError, OSError, ImportError) as error:  # the last: a kernel that the GPU at hand does not run
        return refuse(error)
    return train(run, trainer)


def build_trainer(run: RunArguments) -> SAPOTrainer:
    """The trainer of a parsed run: data and rewards first, the model last.

    Raises:
        ValueError, OSError: what a run would otherwise fail on later.
    """
    plan, turns = batch_plan(run.config), turn_arguments(run.script)
    require_packages(run)
    name = require_model(run.model.model_name_or_path)
    mixture = run.config.mixture
    if mixture:
        rewards, run.config.reward_weights = mixed_rewards(mixture, run.script.reward_funcs, run.config.reward_weights)
    else:
        rewards = [load_reward(entry) for entry in run.script.reward_funcs]
    source = name, run.model.model_revision, run.config.trust_remote_code
    tokenizer = load_tokenizer(*source)
    config = model_config(*source)
    check_vocabulary(text_tokenizer(tokenizer), config.get_text_config().vocab_size)
    sets = run.config.evaluation_sets
    dataset, held_out = None, None  # an environment may bring its prompts
    if run.script.dataset_name or mixture or "environment_factory" not in turns:
        dataset, held_out = load_train_and_eval(run.script, tokenizer, run.config.seed, sets, mixture)
        dataset = drop_unusable_answers(dataset, rewards, run.script.max_unusable_gold_frac)
    check_train_dataset(dataset, run.config, plan, "environment_factory" in turns)
    if dataset is not None and "images" in dataset.column_names and not sees(config):
        raise ValueError(f"prompts have pictures, and {name} is a model of text. Choose a vision-language model.")
    given = run.config.model_init_kwargs or {}
    run.config.model_init_kwargs = {
        "revision": run.model.model_revision,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
        **(json.loads(given) if isinstance(given, str) else given),  # the command line gives JSON
    }
    try:
        return SAPOTrainer(
            name,
            rewards or None,
            run.config,
            dataset,
            eval_dataset=held_out if run.config.eval_strategy != "no" else None,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(run.model),
            peft_config=get_peft_config(run.model),
            **turns,
        )
    except TypeError as error:
        if given and "unexpected keyword argument" in str(error):
            raise ValueError(f"model_init_kwargs: {error}") from error
        raise


def train(run: RunArguments, trainer: SAPOTrainer) -> int:
    """Train, save the model and the record of the run; returns the exit status."""
    attach(trainer, report=True)
    record_settings(trainer, resolved_fields(run))
    try:
        trainer.train()
        if alarms := collapse_alarms(trainer):
            trainer.end()
            return stopped(trainer, alarms)
        if trainer.preempted_at is not None:
            trainer.end()
            folder = f"{run.config.output_dir}/checkpoint-{trainer.preempted_at}"
            resume = f"--resume_from_checkpoint {folder} (or: true)"
            trainer.accelerator.print(f"preempted at step {trainer.preempted_at}, resume with {resume}", flush=True)
            return 0
        # a finished run lacks its model where it was killed between the last checkpoint and that; all processes agree
        (has_model,) = broadcast_object_list([any(trainer.args.folder.glob("*.safetensors"))])
        if not trainer.has_trained and (has_model or not trainer.loads_finished):
            return 0
        trainer.save_model(run.config.output_dir)
        trainer.create_model_card()
    except (NonFiniteError, DriftError, PeerError, ValueError, OSError) as error:
        return refuse(error)
    except Exception as error:
        if (tracker := type(error).__module__.split(".")[0]) in (run.config.report_to or ()):  # no key, no network
            return refuse(ValueError(f"report_to {tracker}: {error}"))
        raise
    trainer.accelerator.print(f"model and metrics.jsonl are in {run.config.output_dir}")
    if run.config.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    trainer.end()
    return 0


def stopped(trainer: SAPOTrainer, alarms: Sequence[Alarm]) -> int:
    """Print why the guard ended the run; returns the exit status."""
    folder = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"
    reasons = "\n".join(f"  step {alarm.step}: {alarm.message}" for alarm in alarms)
    trainer.accelerator.print(f"stopped by the collapse guard, the policy is in {folder}:\n{reasons}", flush=True)
    return COLLAPSED
