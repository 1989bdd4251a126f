r"""Public datasets by a short name: where they are on the Hub, and how their rows become `prompt` and `answer`."""

from collections.abc import Callable
from dataclasses import dataclass


def after_hashes(text: str) -> str | None:
    """GSM8K's answer: what follows the last `####`, without thousands separators.

    >>> after_hashes("2 + 1198 = 1200\\n#### 1,200")
    '1200'
    """
    _, found, answer = text.rpartition("####")
    return answer.replace(",", "").strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced; None when there is none or it never closes.

    >>> last_boxed(r"so \boxed{1}, that is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : i].strip()
    return None


@dataclass(frozen=True)
class Preset:
    """Where a dataset is and how its rows become `prompt` and `answer`."""

    path: str
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    split: str | None = "train"
    eval_split: str | None = None  # None: no held-out split of its own
    config: str | None = None
    extract: Callable[[str], str | None] = str.strip  # text of answer_column -> answer
    strip_prompt: tuple[str, str] = ("", "")  # instructions around the problem, taken off
    keep: tuple[str, ...] | None = ()  # other columns that are kept; None: all
    note: str = ""  # licence, and what to know


# DAPO's own instruction asks for "Answer: ..." on the last line, against the \boxed{} that our rewards read.
DAPO_INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)

PRESETS: dict[str, Preset] = {
    "deepmath-103k": Preset(
        "zwhe99/DeepMath-103K", "question", "final_answer", keep=("difficulty", "topic"), note="MIT; 103k rows"
    ),
    "dapo-math-17k": Preset(
        "open-r1/DAPO-Math-17k-Processed",
        answer_column="reward_model.ground_truth",
        config="all",
        strip_prompt=DAPO_INSTRUCTION,
        note="Apache-2.0; BytedTsinghua-SIA/DAPO-Math-17k without its 100 copies of each row; config en, cn, all",
    ),
    "gsm8k": Preset(
        "openai/gsm8k", "question", config="main", eval_split="test", extract=after_hashes, note="MIT; 7473 + 1319 rows"
    ),
    "math": Preset(
        "DigitalLearningGmbH/MATH-lighteval",
        "problem",
        "solution",
        eval_split="test",
        extract=last_boxed,
        keep=("level", "type"),
        note="MIT; 7500 + 5000 rows; its test split contains MATH-500",
    ),
    "aime24": Preset("HuggingFaceH4/aime_2024", "problem", eval_split="train", keep=("id",), note="30 rows"),
    "aime25": Preset("math-ai/aime25", "problem", split="test", eval_split="test", keep=("id",), note="Apache-2.0; 30"),
    "hmmt25": Preset(
        "MathArena/hmmt_feb_2025",
        "problem",
        eval_split="train",
        keep=("problem_type",),
        note="CC-BY-NC-SA-4.0; 30 rows",
    ),
    "beyondaime": Preset(
        "ByteDance-Seed/BeyondAIME", "problem", split="test", eval_split="test", note="CC0-1.0; 100 rows"
    ),
    "math-500": Preset(
        "HuggingFaceH4/MATH-500", "problem", split="test", eval_split="test", keep=("subject", "level"), note="500 rows"
    ),
    "geometry3k": Preset(
        "hiyouga/geometry3k",
        "problem",
        eval_split="test",
        strip_prompt=("<image>", ""),  # its place; pictures come first anyway
        keep=("images",),
        note="MIT; 2101 + 601 rows, each with a picture",
    ),
    "amc": Preset(
        "AI-MO/aimo-validation-amc",
        "problem",
        eval_split="train",
        keep=("id",),
        note="Apache-2.0; 83 rows, float answers",
    ),
}
