"""The evaluation room: sample several completions per problem, grade them, report Pass@1 with its interval and pass@k.

Pass@1 is the share of right samples averaged over problems (avg@k in other reports), at the sampling temperature given,
as the paper measures it (16 samples per problem). Its interval counts problems, not samples: see `sapo_trl.stats`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.rewards import accuracy_reward
from sapo_trl.rollout.generation import plain_model_reason, unfinished_only
from sapo_trl.stats import Interval, mean_with_interval, pass_at_k

Prompt = str | list[dict[str, str]]  # raw text, or chat messages


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its text without special tokens, its length with the end token, and whether it was cut."""

    text: str
    num_tokens: int
    truncated: bool


@contextmanager
def _evaluating(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode and a random stream of its own: a training run around it continues as if nothing had happened."""
    was_training = model.training
    # A trainer that wants the experts' balance loss leaves this on, and the loss can't be computed while generating.
    router_logits = model.config.to_dict().get("output_router_logits", False)
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    if router_logits:
        model.config.output_router_logits = False
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
        if router_logits:
            model.config.output_router_logits = True


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text the model continues: chat messages under the chat template, plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _read_rows(ids: torch.Tensor, eos_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
    """ids: generated tokens, shape (B, T), right-padded after the first end token."""
    completions = []
    for row in ids.tolist():
        end = next((index for index, token in enumerate(row) if token in eos_ids), None)
        kept = row if end is None else row[: end + 1]
        completions.append(Completion(tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is None))
    return completions


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
) -> list[list[Completion]]:
    """`num_samples` completions of each prompt, from plain softmax sampling; temperature 0 is greedy.

    The same for the same arguments; `batch_size` counts completions and is one of them (it changes the order of the
    draws). Returns one list of `num_samples` per prompt, in the prompts' order.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        # The model's own generation_config (Qwen's has top_k=20, top_p=0.95) would otherwise fill what is left out.
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    rows = [render(tokenizer, prompt) for prompt in prompts for _ in range(num_samples)]
    completions: list[Completion] = []
    with _evaluating(model, seed), nullcontext() if plain_model_reason(model) else unfinished_only(model):
        for first in range(0, len(rows), batch_size):
            # The chat template already holds the special tokens.
            batch = tokenizer(
                rows[first : first + batch_size],
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            ).to(model.device)
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
            )
            completions += _read_rows(ids[:, batch["input_ids"].shape[1] :], set(ends), tokenizer)
    return [completions[first : first + num_samples] for first in range(0, len(completions), num_samples)]


# ----------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """What a model can do on a set of problems. Counts and fractions are over completions unless they say otherwise."""

    pass_at_1: Interval  # mean over problems of the share of right samples
    pass_at_k: dict[int, float]  # k -> mean over problems of the unbiased estimate
    num_problems: int
    num_samples: int  # per problem
    num_correct: tuple[int, ...]  # per problem, in the dataset's order: what a paired comparison needs
    ungraded_frac: float  # the reward gave None (no verdict); counted as wrong
    mean_length_tokens: float
    truncated_frac: float  # cut at max_new_tokens
    seconds: float
    verdicts: dict[str, int] | None = None  # how the grader decided, where it says so

    def per_problem(self) -> np.ndarray:
        """Share of right samples, shape (problems,)."""
        return np.array(self.num_correct) / self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; the keys of `pass_at_k` become text there."""
        return asdict(self)

    def table(self) -> str:
        """The numbers for a terminal, one per line."""
        interval = self.pass_at_1
        rows = [
            ("Pass@1", f"{interval.mean:.3f}"),
            (f"{interval.confidence:.0%} interval", f"[{interval.low:.3f}, {interval.high:.3f}]"),
            *((f"pass@{k}", f"{value:.3f}") for k, value in self.pass_at_k.items() if k != 1),
            ("problems × samples", f"{self.num_problems} × {self.num_samples}"),
            ("mean length (tokens)", f"{self.mean_length_tokens:.1f}"),
            ("truncated", f"{self.truncated_frac:.1%}"),
            ("ungraded", f"{self.ungraded_frac:.1%}"),
            *((f"verdict {name}", str(count)) for name, count in (self.verdicts or {}).items()),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return "\n".join(f"{name:22s}{value}" for name, value in rows)


def _grade(
    reward: Callable[..., list[float | None]], dataset: Dataset, samples: list[list[Completion]]
) -> tuple[list[float | None], dict[str, int]]:
    """One reward per completion, problem by problem, and the counts of what the reward logged as `verdict`.

    Calls TRL's reward signature: completions (texts, or chats for chat prompts) and every column repeated to match.
    """
    per_problem = len(samples[0])
    logged: dict[str, list] = {}
    columns = {
        name: [value for value in dataset[name] for _ in range(per_problem)]
        for name in dataset.column_names
        if name != "completion"
    }
    completions = [
        completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]
        for prompt, row in zip(dataset["prompt"], samples, strict=True)
        for completion in row
    ]
    prompts = columns.pop("prompt")
    rewards = reward(prompts=prompts, completions=completions, log_extra=logged.__setitem__, **columns)
    return rewards, dict(Counter(map(str, logged.get("verdict", []))))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: Callable[..., list[float | None]] = accuracy_reward,
    num_samples: int = 16,
    ks: Sequence[int] = (1,),
    confidence: float = 0.95,
    **sampling: Any,
) -> Evaluation:
    """Sample, grade and summarise. `dataset` has columns prompt and answer; `sampling` goes to `sample_completions`.

    A completion is right when its reward is 1. `reward` has TRL's signature.
    """
    if len(dataset) == 0:
        raise ValueError("The evaluation dataset has 0 problems, so there is no mean. Check its file and split.")
    if max(ks) > num_samples:  # before the sampling, which may take hours
        raise ValueError(
            f"pass@{max(ks)} needs at least {max(ks)} samples per problem, and num_samples={num_samples}. "
            f"Set num_samples={max(ks)}, or leave {max(ks)} out of ks."
        )
    start = time.perf_counter()
    samples = sample_completions(model, tokenizer, dataset["prompt"], num_samples, **sampling)
    rewards, verdicts = _grade(reward, dataset, samples)
    right = np.array([value == 1.0 for value in rewards]).reshape(len(dataset), num_samples)
    num_correct = right.sum(axis=1)
    flat = [completion for row in samples for completion in row]
    return Evaluation(
        pass_at_1=mean_with_interval(num_correct / num_samples, confidence),
        pass_at_k={k: float(pass_at_k(np.full(len(dataset), num_samples), num_correct, k).mean()) for k in ks},
        num_problems=len(dataset),
        num_samples=num_samples,
        num_correct=tuple(num_correct.tolist()),
        ungraded_frac=sum(value is None for value in rewards) / len(rewards),
        mean_length_tokens=sum(completion.num_tokens for completion in flat) / len(flat),
        truncated_frac=sum(completion.truncated for completion in flat) / len(flat),
        seconds=time.perf_counter() - start,
        verdicts=verdicts or None,
    )
