r"""A mathematics model small enough for a laptop: tokenizer, Qwen3 and Qwen3-MoE, generated problems, cold start.

Reinforcement learning needs a model that sometimes answers right and sometimes wrong, for reasons that training can
change. The cold start teaches two styles in equal parts, answering at once (mostly wrong) and answering step by step
(mostly right), so that there is a choice to learn. The effect shows in minutes on two CPU cores: accuracy rises and the
answers grow longer. The architecture, the chat format and the byte-level tokenizer are Qwen3's at a small size, the
answers are LaTeX inside `\boxed{}`, and nothing is downloaded.
"""

import json
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from sapo_trl.evaluation.sampling import sample_completions
from sapo_trl.files import write_text
from sapo_trl.tiny_tools import answered, give_calls, with_calculator

# --------------------------------------------------------------------------------------------------- tokenizer, models

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Frequent words as one token each, which only shortens the sequences, because bytes can spell them too
WORD_TOKENS = ("\\boxed", "\\frac", "assistant", "system", "user")

# Qwen3's chat format without tools and thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's tokenizer without its merges: one token per UTF-8 byte, plus `SPECIAL_TOKENS` and `WORD_TOKENS`.

    Every text has tokens and decodes to itself, so there is no unknown token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins, one per byte
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORD_TOKENS])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, moe: bool = False, seed: int = 0
) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """A new Qwen3 of 4 layers, 128 wide (0.8 M parameters); `moe`: each MLP is 8 experts, of which a token uses 2."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        # Qwen's 0.02 suits thousands of dimensions. With 128 of them, copying an operand, which every step needs, is
        # then learnt later: after 150 updates of 64 rows the loss of the steps is 0.82 with 0.02, and 0.69 with 0.06.
        "initializer_range": 0.06,
    }
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
    with torch.random.fork_rng(devices=[]):  # the caller's random stream does not move
        torch.manual_seed(seed)
        if moe:
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, norm_topk_prob=True))
        return Qwen3ForCausalLM(Qwen3Config(**shape))


# ------------------------------------------------------------------------------------------------ generated mathematics


@dataclass(frozen=True)
class Problem:
    """One problem with its two model answers; both end in `\\boxed{answer}`."""

    prompt: str
    answer: str  # exact LaTeX, e.g. `\frac{3}{4}`
    direct: str  # the answer at once
    steps: str  # the answer step by step
    kind: str  # a key of `KINDS`

    @property
    def key(self) -> str:
        """What makes the problem another one."""
        return self.prompt

    @property
    def columns(self) -> dict[str, Any]:
        """What a row needs besides prompt and answer."""
        return {}


def latex(number: Fraction) -> str:
    """Exact LaTeX of a rational number: `7`, `-2`, `\\frac{3}{4}`, `-\\frac{3}{4}`."""
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def _problem(kind: str, prompt: str, steps: Sequence[str], answer: Fraction) -> Problem:
    boxed = f"\\boxed{{{latex(answer)}}}"
    return Problem(prompt, latex(answer), boxed, " ".join([*steps, boxed]), kind)


def _modular(rng: random.Random) -> Problem:
    """Products and sums modulo m in turn: `7 *3 +8 *7 +5 mod 20?`, worked as `7*3=1 1+8=9 9*7=3 3+5=8`."""
    modulus = rng.choice((10, 20))
    value = rng.randrange(modulus)
    prompt, steps = f"{value}", []
    for index in range(5):
        if index % 2 == 0:
            amount = rng.choice((3, 7, 9))  # units modulo 10 and 20: a product never forgets the value before it
            result, operation = value * amount % modulus, f"*{amount}"
        else:
            amount = rng.randrange(1, 10)
            result, operation = (value + amount) % modulus, f"+{amount}"
        prompt += f" {operation}"
        steps.append(f"{value}{operation}={result}")
        value = result
    return _problem("modular", f"{prompt} mod {modulus}?", steps, Fraction(value))


def _fraction(rng: random.Random) -> Problem:
    """Products, quotients and inverses: `3/4 *2 ^-1 *5 :2?`, worked as `3/4*2=3/2 3/2^-1=2/3 2/3*5=10/3 10/3:2=5/3`."""
    value = Fraction(rng.randrange(1, 7), rng.randrange(1, 7))
    prompt, steps = f"{value}", []
    while len(steps) < 4:
        factor = rng.choice((2, 3, 5))
        operation, result = rng.choice(
            ((f"*{factor}", value * factor), (f":{factor}", value / factor), ("^-1", 1 / value))
        )
        if max(result.numerator, result.denominator) > 30 or (operation == "^-1" and prompt.endswith("^-1")):
            continue  # keep the numbers short, and don't invert twice in a row
        prompt += f" {operation}"
        steps.append(f"{value}{operation}={result}")
        value = result
    return _problem("fraction", f"{prompt}?", steps, value)


def _equation(rng: random.Random) -> Problem:
    """A nested linear equation, unwrapped: `4(3(5x+4)-5)=64, x?`, worked as `64:4=16 16+5=21 21:3=7 7-4=3 5x=3`."""
    factors = rng.randrange(2, 6), rng.randrange(2, 4), rng.randrange(2, 8)  # from the outside in
    shifts = [rng.choice((-1, 1)) * rng.randrange(1, 6) for _ in range(2)]
    product = rng.randrange(1, 13)  # the innermost factor times x
    bracket = product + shifts[1]
    inside = bracket * factors[1] + shifts[0]
    if min(bracket, inside) < 1:
        return _equation(rng)
    total = inside * factors[0]
    steps = [
        f"{total}:{factors[0]}={inside}",
        f"{inside}{-shifts[0]:+d}={inside - shifts[0]}",
        f"{inside - shifts[0]}:{factors[1]}={bracket}",
        f"{bracket}{-shifts[1]:+d}={product}",
        f"{factors[2]}x={product}",
    ]
    prompt = f"{factors[0]}({factors[1]}({factors[2]}x{shifts[1]:+d}){shifts[0]:+d})={total}, x?"
    return _problem("equation", prompt, steps, Fraction(product, factors[2]))


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "modular": _modular,
    "fraction": _fraction,
    "equation": _equation,
}
TEST_SHARE = 8  # one prompt in 8 belongs to the test split
MAX_ANSWER_TOKENS = 80  # the longest right answer has 66


def split_of(prompt: str) -> str:
    """`train` or `test`, from the prompt's text alone: the splits are disjoint whatever the seeds."""
    return "test" if zlib.crc32(prompt.encode()) % TEST_SHARE == 0 else "train"


def make_problems(
    num: int,
    seed: int,
    kinds: Sequence[str] = (),
    split: str = "train",
    max_prompts_tried: int = 100,
    generators: Mapping[str, Callable[[random.Random], Problem]] = KINDS,
) -> list[Problem]:
    """`num` different problems, the kinds (default: all) in turn; the same for the same arguments."""
    rng, kinds = random.Random(f"{split}-{seed}"), kinds or tuple(generators)
    problems: dict[str, Problem] = {}
    for index in range(num):
        kind = kinds[index % len(kinds)]
        for _ in range(max_prompts_tried):
            problem = generators[kind](rng)
            if split_of(problem.key) == split and problem.key not in problems:
                break
        else:
            raise ValueError(
                f"no new {split!r} prompt of kind {kind!r} in {max_prompts_tried} tries after {index} of num={num} "
                "problems: the generator has too few. Ask for fewer problems or more kinds."
            )
        problems[problem.key] = problem
    return list(problems.values())


# ---------------------------------------------------------------------------------------------------------- cold start


def chat(prompt: str) -> list[dict[str, str]]:
    """The prompt as a chat of one user message."""
    return [{"role": "user", "content": prompt}]


# Problems of one update, each in both styles. After the same 30 seconds the loss of the steps is 0.36 with 16 problems
# and 0.69 with 32.
MICRO_BATCH = 16


def style_mixture(problems: Sequence[Problem], calculator: bool = False) -> Dataset:
    """Each problem once in each style: columns prompt and completion (chat messages), two rows per problem.

    Blocks of `MICRO_BATCH` short answers and the same problems' long ones alternate: read in this order with two
    accumulation steps, every update has the styles in equal parts and short rows are not padded to long ones. With
    `calculator` the long ones are a call, its result and the answer, all of which are learnt.
    """
    rows = []
    for first in range(0, len(problems), MICRO_BATCH):
        block = problems[first : first + MICRO_BATCH]
        direct = [[{"role": "assistant", "content": problem.direct}] for problem in block]
        worked = [[{"role": "assistant", "content": problem.steps}] for problem in block]
        if calculator:
            worked = [with_calculator(problem.prompt, problem.direct) for problem in block]
        rows += [
            {"prompt": chat(problem.prompt), "completion": answer, **problem.columns}
            for answers in (direct, worked)
            for problem, answer in zip(block, answers, strict=True)
        ]
    return Dataset.from_list(rows)


class _StepLines(TrainerCallback):
    """A line with the step, the loss and the time left, at the first step and then at most one each five seconds."""

    def __init__(self):
        self._started = self._printed = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._printed = time.perf_counter(), float("-inf")

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs):
        now, step, loss = time.perf_counter(), state.global_step, (logs or {}).get("loss")
        if loss is not None and (now - self._printed > 5 or step == state.max_steps):
            self._printed, left = now, (now - self._started) / step * (state.max_steps - step)
            print(f"cold start: step {step}/{state.max_steps}  loss {loss:.3g}  left {left:.0f} s", flush=True)


def train_styles(
    model: PreTrainedModel, tokenizer: Any, rows: Dataset, output_dir: Path, seed: int, accumulates: bool = True
) -> None:
    """One pass of TRL's `SFTTrainer` over the rows of a `style_mixture`; the loss is on the answers' tokens only.

    Args:
        tokenizer: of a vision-language model its processor.
        accumulates: a style is a micro-batch, which saves padding; else both are one batch, for models whose loss is
            the mean of a micro-batch, under which the tokens of short answers would weigh more.
    """
    args = SFTConfig(
        output_dir=str(output_dir),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH if accumulates else 2 * MICRO_BATCH,
        gradient_accumulation_steps=2 if accumulates else 1,  # a block of each style: see `style_mixture`
        train_sampling_strategy="sequential",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        adam_beta2=0.98,
        max_length=None,
        completion_only_loss=True,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,  # one process and one order of updates, on whatever machine
        seed=seed,
        logging_steps=5,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_StepLines())
    trainer.train()
    if model.config.model_type == "qwen3_moe":
        model.config.output_router_logits = False  # the trainer left it on; saved so, the model could not generate


def style_report(
    model: PreTrainedModel,
    tokenizer: Any,
    problems: Sequence[Problem],
    seed: int = 0,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> dict[str, dict[str, float]]:
    """Print, and return by style, how often the model chooses it (share_frac) and is right in it (accuracy_frac), and
    the mean length."""
    prompts = [chat(problem.prompt) for problem in problems]
    images = [problem.columns.get("images", []) for problem in problems]
    samples = sample_completions(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, images=images)
    outcomes: dict[str, list[tuple[bool, int]]] = {"direct": [], "steps": []}
    for problem, (sample,) in zip(problems, samples, strict=True):
        style = "direct" if sample.text.startswith("\\boxed") else "steps"
        outcomes[style].append((answered(sample.text).endswith(problem.direct), sample.num_tokens))
    report = {
        style: {
            "share_frac": len(rows) / len(problems),
            "accuracy_frac": sum(right for right, _ in rows) / max(1, len(rows)),
            "mean_length_tokens": sum(length for _, length in rows) / max(1, len(rows)),
        }
        for style, rows in outcomes.items()
    }
    for style, row in report.items():
        print(
            f"{style:7s}{row['share_frac']:4.0%} of the answers, {row['accuracy_frac']:4.0%} of them right, "
            f"{row['mean_length_tokens']:.0f} tokens"
        )
    return report


def _write_jsonl(path: Path, problems: Sequence[Problem]) -> None:
    rows = [{"prompt": problem.prompt, "answer": problem.answer, "kind": problem.kind} for problem in problems]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def cold_start(
    output_dir: str | Path,
    moe: bool = False,
    steps: int = 1000,
    seed: int = 0,
    num_train: int = 4096,
    num_test: int = 256,
    num_check: int = 256,
    calculator: bool = False,
) -> dict[str, dict[str, float]]:
    """Write `model/`, `train.jsonl` and `test.jsonl` under `output_dir`; print and return `style_report`.

    `steps` updates of `MICRO_BATCH` problems in both styles, every problem seen once. The same seed on the same machine
    gives the same weights. `num_check` held-out problems are answered for the report. With `calculator` they are of
    the kind `modular`, and a call of the calculator is the second style.
    """
    kinds = ("modular",) if calculator else tuple(KINDS)
    output_dir = Path(output_dir)
    start = time.perf_counter()
    print(f"cold start: making {steps * MICRO_BATCH:,} problems and their tokens", flush=True)
    tokenizer = give_calls(build_tokenizer()) if calculator else build_tokenizer()
    model = build_model(tokenizer, moe=moe, seed=seed)
    rows = style_mixture(make_problems(steps * MICRO_BATCH, seed, kinds), calculator)
    train_styles(model, tokenizer, rows, output_dir, seed)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    _write_jsonl(output_dir / "train.jsonl", make_problems(num_train, seed + 1, kinds))
    _write_jsonl(output_dir / "test.jsonl", make_problems(num_test, seed, kinds, split="test"))
    print(f"cold start: {steps} steps in {time.perf_counter() - start:.0f} s, written to {output_dir}")
    return style_report(model, tokenizer, make_problems(num_check, seed + 1, kinds, split="test"))
