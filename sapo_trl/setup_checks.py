"""What a trainer checks and settles once its models are there, before anything is generated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer

from sapo_trl.config import SAPOConfig
from sapo_trl.errors import did_you_mean
from sapo_trl.model import has_text_only, max_positions, render, text_config
from sapo_trl.rollout.interruption import phrase_tokens
from sapo_trl.rollout.rows import Row
from sapo_trl.vision import placeholders, text_tokenizer

# Attributes of the trainer that are read when it is made: a later value would have no effect.
READ_ONCE = (
    "beta", "temperature", "epsilon_low", "epsilon_high", "num_iterations", "num_generations", "top_entropy_quantile",
    "entropy_coef", "loss_type", "importance_sampling_level", "max_completion_length", "off_policy_mask_threshold",
    "router_aux_loss_coef", "top_k", "top_p", "min_p", "repetition_penalty",
)  # fmt: skip
# The same of its configuration, besides the options of the objective.
FIELDS_READ_ONCE = (
    "beta", "temperature", "num_iterations", "num_mini_batches", "gradient_accumulation_steps",
    "per_device_train_batch_size", "num_generations", "max_completion_length", "max_tokens_per_pack",
    "max_skipped_steps", "algorithm", "rollouts_ahead", "reward_weights", "scale_rewards",
)  # fmt: skip

SCHEDULES = {f"trainer.args.{name}": f"set trainer.{name}" for name in ("reward_weights", "scale_rewards")}

# Methods of TRL's trainer that the update here does not call -> the seam to use instead.
_OBJECTIVE = "token_objective, or pass objective="
BYPASSED = {
    "_compute_loss": _OBJECTIVE,
    "compute_loss": _OBJECTIVE,
    "_get_per_token_logps_and_entropies": "token_objective: log-probs are tokens.policy_logps and tokens.old_logps",
    "get_high_entropy_mask": _OBJECTIVE,
    "get_off_policy_mask": _OBJECTIVE,
    "compute_loss_context_manager": "the model's forward",
    "autocast_smart_context_manager": "the model's forward",
    "_prepare_context_parallel_inputs": "the model's forward",
}


def refuse_bypassed_seams(cls: type[GRPOTrainer], ours: type[GRPOTrainer]) -> None:
    """Raise if a subclass overrides a method that would never be called in training.

    Raises:
        TypeError: names the method and the seam to use.
    """
    for name, seam in BYPASSED.items():
        if getattr(cls, name) is not getattr(ours, name):
            raise TypeError(
                f"{cls.__name__}.{name} would never be called in training: the update here works on packs of rows. "
                f"Override {seam}."
            )


def refuse_bypassed_attributes(trainer: GRPOTrainer) -> None:
    """The same of a method that was put onto the trainer itself."""
    put = {name for name, value in vars(trainer).items() if name in BYPASSED or (name == "compute_loss_func" and value)}
    for name in put:
        raise TypeError(
            f"trainer.{name} = ... would never be called in training: the update here works on packs of rows. In a "
            f"subclass override {BYPASSED.get(name, _OBJECTIVE)}."
        )


def name_or_model(model: Any) -> Any:
    """What is to be trained: a model, or the name or folder of one as a text.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if not isinstance(model, str) and not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(f"model is {model!r:.80}; give a name, a folder or a model.")
    return model


def check_evaluation_batch(config: SAPOConfig, num_generations: int) -> None:
    """Raise if an evaluation batch does not hold whole groups of completions.

    Raises:
        ValueError: with the nearest batch size.
    """
    batch = config.per_device_eval_batch_size * config.world_size
    if batch % num_generations:
        step = num_generations // torch.gcd(torch.tensor(num_generations), torch.tensor(config.world_size)).item()
        fit = -(-config.per_device_eval_batch_size // step) * step
        raise ValueError(
            f"per_device_eval_batch_size={config.per_device_eval_batch_size} x {config.world_size} process(es) = "
            f"{batch} completions is no multiple of the {num_generations} generations of a problem "
            f"(num_generations_eval). Set per_device_eval_batch_size: {fit}."
        )


def check_eval_sets(config: SAPOConfig, eval_dataset: Any, has_rollout_func: bool) -> None:
    """Raise if a set that `eval_sets` samples in its own way would not be sampled so.

    Raises:
        ValueError: it is no set of `eval_dataset`, or a `rollout_func` samples.
    """
    names = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
    for name in config.evaluation_sets:
        if name not in names:
            raise ValueError(
                f"eval_sets has {name!r}, and eval_dataset {'has ' + ', '.join(names) if names else 'is no mapping'}. "
                f"Pass eval_dataset={{{name!r}: …}}.{did_you_mean(name, names)}"
            )
    for name in ("temperature", "top_p", "max_completion_length"):
        if has_rollout_func and any(vars(one)[name] != vars(config)[name] for one in config.evaluation_sets.values()):
            raise ValueError(f"eval_sets sets {name}, and a rollout_func samples by itself. Remove it.")


def choose_best_metric(config: SAPOConfig, reward_names: Sequence[str], eval_dataset: Any, accuracy: str) -> None:
    """Where the best model is wanted and no metric named: Pass@1, or the reward; larger is better.

    The first of several evaluation sets decides.
    """
    if config.metric_for_best_model != "reward" or not config.wants_best:
        return
    prefix = f"{next(iter(eval_dataset))}_" if isinstance(eval_dataset, Mapping) and eval_dataset else ""
    config.metric_for_best_model = f"eval_{prefix}{'pass_at_1' if accuracy in reward_names else 'reward'}"


def without_dropout(model: nn.Module, reference: nn.Module | None, switch_off: bool | None) -> list[tuple[str, str]]:
    """Switch dropout off unless asked not to; (name, text) for the announcement."""
    modules = [*model.modules(), *(reference.modules() if reference is not None else [])]
    active = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]
    attention = [module for module in modules if isinstance(vars(module).get("attention_dropout"), float)]
    attention = [module for module in attention if vars(module)["attention_dropout"] > 0]
    if not active and not attention:
        return []
    if not switch_off:
        return [("dropout", "WARNING: on, so the ratio r is noise even where the policy has not moved")]
    for module in active:
        module.p = 0.0
    for module in attention:
        vars(module)["attention_dropout"] = 0.0
    number = len(active) + len(attention)
    return [("dropout", f"switched off in {number} modules: it would make the ratio r noise (disable_dropout: false)")]


@torch.no_grad()
def same_reference(model: nn.Module, reference: nn.Module | None) -> list[tuple[str, str]]:
    """Give the reference the policy's weights where they differ: TRL loads it from the disk, and a model may have been
    changed in memory. Shards of an engine are left alone. (name, text) for the announcement."""
    if reference is None:
        return []
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    pairs = [(p, theirs[name]) for name, p in ours.items() if name in theirs and p.numel()]
    same_kind = [(p, q) for p, q in pairs if p.shape == q.shape and p.device == q.device]
    changed = [(p, q) for p, q in same_kind if not torch.equal(p, q.to(p.dtype))]
    for p, q in changed:
        q.copy_(p)
    if not changed:
        return []
    return [("reference", f"{len(changed)} tensors taken from the policy: they differ from those on the disk")]


def prepare_pictures(trainer: Any, has_images: bool) -> list[tuple[str, str]]:
    """Keep the tokens that stand for pictures out of a trainer's completions; (name, text) for the announcement.

    Raises:
        ValueError: prompts have pictures, and the model got a tokenizer only.
    """
    if not isinstance(trainer.processing_class, ProcessorMixin):
        if has_images:
            raise ValueError(f"the training set has images, but {type(trainer.model).__name__} got a tokenizer only.")
        return []
    ids = placeholders(trainer.model.config)
    words = text_tokenizer(trainer.processing_class).convert_ids_to_tokens(ids)
    if trainer.use_vllm:
        given = trainer.vllm_generation.generation_kwargs
        given["bad_words"] = [*given.get("bad_words", ()), *words]
    else:
        kept = trainer.generation_config.suppress_tokens or []
        trainer.generation_config.suppress_tokens = sorted({*kept, *ids})
    return [("pictures", f"{', '.join(words)} are never sampled")]


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Raise if the tokenizer has ids beyond the `rows` of the model's embedding; a larger embedding is usual.

    Raises:
        ValueError: both numbers.
    """
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows, so that some ids would "
            f"point beyond it. Use the model's own tokenizer, or save the model after "
            f"model.resize_token_embeddings({len(tokenizer)})."
        )


def check_policy(model: PreTrainedModel, tokenizer: Any, datasets: Mapping[str, Any], config: SAPOConfig) -> None:
    """Raise if nothing of the model is trained, its vocabulary is smaller than the tokenizer's, or its positions end
    before the longest prompt and its completion.

    Of the prompts the longest few, by characters, are counted; of streams none.

    Args:
        datasets: by name, evaluation sets under their own.

    Raises:
        ValueError: with the numbers.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model has requires_grad, so that nothing could be trained.")
    if config.thinking_budget:
        phrase, longest = len(phrase_tokens(tokenizer)), config.max_completion_length or 0
        if config.thinking_budget[-1] + phrase >= longest:
            raise ValueError(
                f"thinking_budget={config.thinking_budget} and the {phrase} tokens of the interruption leave no "
                f"tokens for an answer within max_completion_length={longest}. Set it to more than "
                f"{config.thinking_budget[-1] + phrase}."
            )
    check_vocabulary(tokenizer, text_config(model).vocab_size)
    most = max_positions(text_config(model))
    template_options: Any = config.chat_template_kwargs  # a mapping, which TRL has read from text
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            continue
        if getattr(tokenizer, "chat_template", None) and not {"image", "images"} & {*dataset.column_names}:
            _check_parts(tokenizer, dataset["prompt"], template_options, name)
        if most is None:
            continue
        longest = sorted(dataset["prompt"], key=lambda prompt: len(str(prompt)))[-8:]
        texts = [render(tokenizer, x, template_options) for x in longest if has_text_only(x)]
        tokens = max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), default=0)
        sets = config.evaluation_sets
        completion = (sets[name].max_completion_length if name in sets else config.max_completion_length) or 1
        if tokens + completion > most:
            fit = f", or set max_completion_length: {most - tokens}" if tokens < most else ""
            raise ValueError(
                f"the longest prompt{f' of {name}' if name else ''} has {tokens} tokens, and with "
                f"max_completion_length={completion} that is more than the {most} positions of the model "
                f"(max_position_embeddings). Drop long prompts (max_prompt_tokens){fit}."
            )


def _check_parts(tokenizer: Any, prompts: Sequence[str | list], template_options: Any, name: str) -> None:
    """Refuse messages in parts under a chat template that joins texts."""
    for row, prompt in enumerate(prompts):
        if not has_text_only(prompt):
            try:
                render(tokenizer, prompt, template_options)
            except Exception as error:
                raise ValueError(
                    f"the chat template can't render the prompt of row {row}{f' of {name}' if name else ''}, whose "
                    f"content is not a text: {error}. Give texts."
                ) from error
            return


def check_adapter_names(model: nn.Module) -> None:
    """Raise if an adapter names a module or parameter that is none: PEFT trains on without it, and without a word.

    Raises:
        ValueError: with the nearest name.
    """
    held = {
        "target_modules": [name for name, _ in model.named_modules()],
        "target_parameters": [name.replace(".base_layer", "") for name, _ in model.named_parameters()],
    }
    held["modules_to_save"] = held["target_modules"]
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        for field, known in held.items():
            wanted = getattr(config, field, None) or ()
            for name in () if isinstance(wanted, str) else wanted:  # a text is a pattern
                end = name if field == "modules_to_save" else f".{name}"  # as PEFT compares
                if not any(one.endswith(end) for one in known):
                    near = did_you_mean(name, dict.fromkeys(one.rpartition(".")[2] for one in known))
                    raise ValueError(f"lora_{field}: the model has no {name!r}.{near}")


def check_given_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raise if an optimizer that was passed in can't train the model.

    Raises:
        ValueError: it was made of another model, which would change in place of this one, or it needs a closure.
    """
    if optimizer is None:
        return
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} asks for the loss several times per step (closure), and an update here gives "
            "one gradient. Choose another optimizer."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(id(p) for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "the optimizer that was given holds none of the model's trainable parameters, so they would never change. "
            "Make it of the model that is passed in, with its adapter if there is one, or leave it out."
        )


def check_lengths(rows: Sequence[Row], model: PreTrainedModel) -> None:
    """Raise if a row is longer than the positions that the model knows.

    Raises:
        ValueError: both numbers.
    """
    most = max_positions(text_config(model))
    longest = max(rows, key=len)
    if most is not None and len(longest) > most:
        raise ValueError(
            f"a row of {len(longest)} tokens ({longest.num_prompt} of them the prompt) is longer than the {most} "
            "positions of the model (max_position_embeddings). Set max_prompt_tokens and max_completion_length to "
            f"{most} together."
        )


def values_read_once(trainer: GRPOTrainer, args: SAPOConfig) -> dict[str, Any]:
    """What the trainer has read when it was made: `READ_ONCE`, `FIELDS_READ_ONCE` and the options of the objective."""
    config = vars(args)
    names = dict.fromkeys([*FIELDS_READ_ONCE, *(name for name in args.row.options if name in config)])
    attributes = {f"trainer.{name}": getattr(trainer, name) for name in READ_ONCE}
    return attributes | {f"trainer.args.{name}": config[name] for name in names}


def refuse_late_changes(now: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Raise if a value that was read when the trainer was made has been changed.

    Args:
        now, built: `values_read_once` now and then.

    Raises:
        ValueError: names it; a changed value would have no effect.
    """
    for name, value in now.items():
        if name in built and built[name] != value:
            raise ValueError(
                f"{name} was changed from {built[name]} to {value} after the trainer was made, which has no effect. "
                f"Set it in the SAPOConfig, or {SCHEDULES.get(name, 'override token_objective')} for a schedule."
            )
