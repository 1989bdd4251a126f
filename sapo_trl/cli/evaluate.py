"""Pass@1 with its interval, and pass@k, of a model on a preset, a Hub dataset or a local file.

python scripts/evaluate.py --model runs/tiny/model --dataset_name runs/tiny/test.jsonl --max_new_tokens 96
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sapo_trl.cli.models import load_tokenizer, require_model
from sapo_trl.cli.terminal import refuse
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_split
from sapo_trl.evaluation.evaluate import evaluate
from sapo_trl.files import masked, write_json
from sapo_trl.rewards import accuracy_reward

SAMPLING = ("num_samples", "ks", "temperature", "top_p", "max_new_tokens", "batch_size", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the table, write the result; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        check_arguments(arguments)
        name = require_model(arguments.model)
        tokenizer = load_tokenizer(name)
        dataset = load_problems(arguments, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map="cuda" if torch.cuda.is_available() else "cpu"
        )
    except (ValueError, OSError) as error:
        return refuse(error)
    sampling = {name: vars(arguments)[name] for name in SAMPLING}
    result = evaluate(model, tokenizer, dataset, accuracy_reward, **sampling)
    print(result.table())
    if arguments.output is not None:
        given = {name: str(value) for name, value in vars(arguments).items()}
        write_json(arguments.output, {"arguments": masked(given), **result.to_dict()})
        print(f"written to {arguments.output}")
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the model and its tokenizer")
    parser.add_argument("--dataset_name", required=True, help="preset, Hub id, or a .jsonl/.json/.parquet/.csv file")
    parser.add_argument("--dataset_split", help="default: the preset's evaluation split, else test")
    parser.add_argument("--prompt_format", default="chat", help="chat (default) or plain")
    parser.add_argument("--prompt_template", help="text with {prompt}, to append instructions")
    parser.add_argument("--num_problems", type=int, help="only the first ones of the dataset")
    parser.add_argument("--num_samples", type=int, default=16, help="completions per problem (default 16)")
    parser.add_argument("--ks", type=int, nargs="+", default=[1], help="report pass@k for these k (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=256, help="completions generated at once (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result and the arguments here as JSON")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options that would fail, or mislead, after the model has loaded or sampled for hours.

    Raises:
        ValueError: with the option and the nearest fix.
    """
    samples, ks, temperature = arguments.num_samples, arguments.ks, arguments.temperature
    for name in ("num_problems", "num_samples", "max_new_tokens", "batch_size"):
        value = vars(arguments)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is less than 1.")
    if not 1 <= min(ks) <= max(ks) <= samples:
        wrong = next(k for k in ks if not 1 <= k <= samples)
        raise ValueError(f"--ks {wrong}: pass@k needs k from 1 to --num_samples {samples}. Raise --num_samples, or k.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"--temperature {temperature} must be 0 (greedy) or a finite number above it.")
    if temperature == 0 and samples > 1:
        raise ValueError(
            f"--temperature 0 is greedy, so that all {samples} samples of a problem would be the same. Add "
            "--num_samples 1, or sample with --temperature 1."
        )
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top_p {arguments.top_p} must be above 0 and at most 1.")
    if arguments.output is not None and arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a folder. Name a file in it: {arguments.output}/result.json")


def load_problems(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The evaluation split, or its first `num_problems`."""
    names = ScriptArguments(
        dataset_name=arguments.dataset_name,
        eval_dataset_name=arguments.dataset_name,
        eval_dataset_split=arguments.dataset_split,
        prompt_format=arguments.prompt_format,
        prompt_template=arguments.prompt_template,
    )
    dataset = load_split(names, "eval", tokenizer)
    assert dataset is not None  # it is named
    return dataset if arguments.num_problems is None else dataset.take(min(arguments.num_problems, len(dataset)))
