"""The arguments of the commands besides `SAPOConfig`: data and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ScriptArguments:
    """What `scripts/train.py` and `scripts/evaluate.py` read besides `SAPOConfig` and TRL's `ModelConfig`."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preset (sapo_trl.data.presets), Hub dataset id, or local .jsonl/.json/.parquet/.csv."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_train_split: str | None = field(default=None, metadata={"help": "Default: the preset's, else `train`."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Like dataset_name, for evaluation."})
    eval_dataset_split: str | None = field(default=None, metadata={"help": "Default: the preset's, else `test`."})
    eval_size: int = field(
        default=0, metadata={"help": "Without eval_dataset_name: hold out this many prompts of the training set."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Keep at most this many training rows."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Text or chat messages. Default: the preset's, else `prompt`."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Reference answer; of a list any item. Default: the preset's, else `answer`."}
    )
    prompt_format: str = field(
        default="chat", metadata={"help": "`chat`: a user message under the model's template; `plain`: raw text."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before each chat prompt."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text with {prompt}, to add instructions such as: answer in \\boxed{}."}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Drop prompts longer than this under the model's tokenizer and template."}
    )
    drop_duplicates: bool = field(
        default=False,
        metadata={"help": "Drop copies of a prompt, and every row of a prompt that stands with different answers."},
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={"help": "Names from `sapo_trl.rewards.REWARDS` or dotted paths `package.module.function`."},
    )
    tools: list[str] = field(
        default_factory=list,
        metadata={"help": "Dotted paths of functions that the policy may call in a chat; see docs/environments.md."},
    )
    environment_factory: str | None = field(
        default=None,
        metadata={"help": "Dotted path of a class: each rollout gets one of its objects, whose methods are tools."},
    )
    rollout_func: str | None = field(
        default=None, metadata={"help": "Dotted path of a function that generates the completions in place of TRL."}
    )
    max_unusable_gold_frac: float = field(
        default=0.1,
        metadata={
            "help": "Error above this share of training answers that the grader can't use; below, they are dropped."
        },
    )
