"""The problems that a model solves sometimes: those that teach it something. Written as .jsonl that training reads.

sapo-trl filter --model runs/tiny/model --dataset_name runs/tiny/train.jsonl --output kept.jsonl

A row has the columns of the dataset and its `pass_rate`, the share of right samples. Its prompt is without template and
system prompt, which training adds as before. The samples are those of sapo-trl evaluate, kept in kept.samples.jsonl:
a call that was killed goes on from there, and other bounds cost no sampling.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from sapo_trl.cli.evaluate import (
    check_arguments,
    data_arguments,
    load_engine,
    made_by,
    parse_arguments,
    samples_path,
    tokenizer_of,
)
from sapo_trl.cli.terminal import refuse
from sapo_trl.data.loading import load_split
from sapo_trl.data.pictures import check_pictures, stored_pictures
from sapo_trl.data.preflight import check_tasks
from sapo_trl.data.presets import PRESETS
from sapo_trl.eval_sets import EvalSet
from sapo_trl.evaluation.evaluate import right_of, summarise
from sapo_trl.evaluation.samples import Sample, check_problems, collect
from sapo_trl.files import write_text
from sapo_trl.rewards import load_reward

OPTIONS = {
    "--min_pass_rate": {"type": float, "default": 0.1, "help": "keep problems from this share on (default 0.1)"},
    "--max_pass_rate": {"type": float, "default": 0.9, "help": "and up to this one (default 0.9)"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Sample, grade, select, write; returns the exit status."""
    try:
        run(parse_arguments(argv, str(__doc__), OPTIONS))
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then sample every problem of the training split and write those within the bounds."""
    one = check_options(arguments)
    reward, tokenizer = load_reward(arguments.reward), tokenizer_of(arguments.model, arguments.engine)
    data = replace(data_arguments(arguments), dataset_train_split=arguments.dataset_split, eval_dataset_split=None)
    problems = rows = load_split(data, "train", tokenizer)
    if data.prompt_template is not None or data.system_prompt is not None:
        rows = load_split(replace(data, prompt_template=None, system_prompt=None), "train", tokenizer)
    assert problems is not None and rows is not None  # None is for evaluation
    num = min(arguments.num_problems or len(problems), len(problems))
    problems, rows = problems.take(num), rows.take(num)
    check_problems(problems)
    check_tasks(problems, [reward], "train")
    if check_pictures(problems, "dataset") and any(one["bytes"] for own in stored_pictures(rows) for one in own):
        raise ValueError("the pictures are stored inside the dataset, and a .jsonl file names them by their paths.")
    started = time.perf_counter()
    samples = collect(
        load_engine(arguments, arguments.model, tokenizer)(one), problems, reward, one.num_samples or 1, arguments.seed,
        arguments.batch_size, samples_path(arguments.output), made_by(arguments, arguments.model, one),
    )  # fmt: skip
    print(summarise(samples, one.ks or (1,), seconds=time.perf_counter() - started).table())
    kept = select(rows, samples, arguments.min_pass_rate, arguments.max_pass_rate)
    named = [{"images": [one["path"] for one in own]} if own else {} for own in stored_pictures(kept)]
    both = [row | paths for row, paths in zip(kept.to_list(), named, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in both]
    write_text(arguments.output, "".join(lines))
    print(f"written to {arguments.output}, every sample to {samples_path(arguments.output)}")


def check_options(arguments: argparse.Namespace) -> EvalSet:
    """What is sampled. Refuses what would fail, or be without effect, after the sampling.

    Raises:
        ValueError: with the option and the nearest fix.
    """
    for name in ("eval_sets", "baseline"):
        if vars(arguments)[name] is not None:
            raise ValueError(f"--{name} is for sapo-trl evaluate. Leave it out.")
    one = check_arguments(arguments)[""]
    low, high, num, output = (vars(arguments)[x] for x in ("min_pass_rate", "max_pass_rate", "num_samples", "output"))
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--min_pass_rate {low} and --max_pass_rate {high} must be in order, between 0 and 1.")
    if not any(low <= k / num <= high for k in range(num + 1)):
        raise ValueError(f"no share of --num_samples {num} is from {low} to {high}. Take more, or other bounds.")
    if output is None or output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: name a .jsonl file for the rows that are kept.")
    check_output(output, arguments.dataset_name)
    return one


def check_output(output: Path, dataset_name: str) -> None:
    """Refuse an output that would replace the dataset, or become a part of it.

    Raises:
        ValueError: with the nearest fix.
    """
    source = Path(dataset_name).expanduser().resolve()
    if dataset_name.lower() in PRESETS or not source.exists():
        return
    for path in (output, samples_path(output)):
        if path is not None and path.resolve() == source:
            raise ValueError(f"--output {output} would write {path}, which is the dataset. Name another .jsonl file.")
    if source.is_dir() and output.resolve().is_relative_to(source):
        raise ValueError(f"--output {output} lies in the folder of the dataset, {dataset_name}. Name another folder.")


def select(rows: Dataset, samples: Sequence[Sample], low: float, high: float) -> Dataset:
    """The rows whose share of right samples is from `low` to `high`, with that share as `pass_rate`; prints counts.

    Rows with a sample without a verdict, as for a reference answer that can't be used, are left out.

    Raises:
        ValueError: no row is left.
    """
    rates = right_of(samples).mean(axis=1).tolist()
    ungraded = {sample.problem for sample in samples if sample.reward is None}
    graded = [i for i in range(len(rates)) if i not in ungraded]
    kept = [i for i in graded if low <= rates[i] <= high]
    below, above = sum(rates[i] < low for i in graded), sum(rates[i] > high for i in graded)
    counts = (
        f"{len(kept)} of {len(rates)} problems have a pass rate from {low} to {high}; {below} are below, {above} "
        f"above, {len(ungraded)} without a verdict"
    )
    if not kept:
        raise ValueError(f"{counts}. Choose other bounds: what was sampled is kept.")
    print(counts)
    rows = rows.remove_columns([name for name in rows.column_names if name == "pass_rate"])  # of an earlier filter
    return rows.select(kept).add_column("pass_rate", [rates[i] for i in kept])
