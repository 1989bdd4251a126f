"""The samples of an evaluation: drawn and graded a few problems at a time, and kept in a file that outlives a kill.

A file of samples is JSON Lines, one `Sample` a line, problem by problem in the dataset's order (`read_samples`).
Problems are sampled in units, each from a random stream of its own, so that an evaluation that goes on after a kill
draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from sapo_trl.data.pictures import picture_key, stored_pictures
from sapo_trl.evaluation.sampling import Completion, Prompt
from sapo_trl.files import write_text
from sapo_trl.rewards.contract import refuse_reserved, reward_arguments, reward_name
from sapo_trl.rewards.running import run_rewards

# (prompts, number of samples of each, seed=) -> the samples of each prompt, the same for the same arguments; where
# prompts have pictures also images=, a list for each prompt
Engine = Callable[..., list[list[Completion]]]


@dataclass(frozen=True)
class Sample:
    """One completion of one problem, and what became of it: a line of a file of samples."""

    problem: int  # index in the dataset
    sample: int  # index among the samples of the problem
    prompt: Prompt
    completion: str  # without special tokens
    answer: Any  # the reference answer; None where the dataset has none
    reward: float | None  # 1 is right; None is no verdict
    verdict: str | None  # how the reward decided, where it logs `verdict`
    extracted_answer: str | None  # what the completion answers, where the reward logs it
    num_tokens: int  # with the end token
    truncated: bool  # cut at the longest length
    seed: int  # of the random stream of the unit that the problem was sampled in
    run: str  # hash of the problems and of all that decides the samples: files of different runs are never mixed


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file; a last line without its end, of a run that was killed, is left out.

    Raises:
        ValueError: a line that is no sample, with its number.
    """
    names, samples = {f.name for f in fields(Sample)}, []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or row.keys() != names:
            raise ValueError(
                f"{path}, line {number}, is not a sample of sapo-trl evaluate. Name another file, or remove it."
            )
        samples.append(Sample(**row))
    return samples


def check_problems(dataset: Dataset) -> None:
    """Refuse problems that could not be evaluated.

    Raises:
        ValueError: none at all, or a column under a name that reward functions get for something else.
    """
    if len(dataset) == 0:
        raise ValueError("The evaluation dataset has 0 problems, so there is no mean. Check its file and split.")
    refuse_reserved(dataset.column_names, "the evaluation dataset")


def collect(
    engine: Engine,
    dataset: Dataset,
    reward: Callable,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 256,
    path: str | Path | None = None,
    made_by: str = "",
) -> list[Sample]:
    """`num_samples` graded samples of each problem, in the dataset's order.

    Args:
        dataset: columns `prompt`, maybe `images` (a list of pictures each), and what the reward reads.
        reward: has TRL's signature.
        batch_size: completions sampled and graded together, at least those of one problem; it decides the samples, as
            the seed does.
        path: a file of samples. What is in it is not sampled again, and every unit is added to it; the samples of
            another run are put aside as `<path>.old`.
        made_by: what decides the samples besides the other arguments: the model, how it samples, the reward's options.
    """
    check_problems(dataset)
    unit = max(1, batch_size // num_samples)  # problems
    answers = dataset["answer"][:] if "answer" in dataset.column_names else [None] * len(dataset)
    pictures = [key for stored in stored_pictures(dataset) if (key := picture_key(stored))]
    decisive = [dataset["prompt"][:], answers, num_samples, unit, seed, made_by, *pictures]
    run = hashlib.sha256(json.dumps(decisive, default=str).encode()).hexdigest()[:12]
    samples = [] if path is None else _kept(Path(path), run, num_samples, unit, len(dataset))
    with nullcontext() if path is None else open(path, "a", encoding="utf-8") as file:
        for first in tqdm(range(len(samples) // num_samples, len(dataset), unit), unit="batch", disable=None):
            part = dataset.select(range(first, min(first + unit, len(dataset))))
            rows, unit_seed = part.to_list(), int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
            images = {"images": part["images"][:]} if pictures else {}
            drawn = engine([row["prompt"] for row in rows], num_samples, seed=unit_seed, **images)
            new = _graded(rows, drawn, reward, first, unit_seed, run)
            samples += new
            if file is not None:
                file.writelines(_line(sample) for sample in new)
                file.flush()
                os.fsync(file.fileno())
    return samples


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), default=str) + "\n"


def _kept(path: Path, run: str, num_samples: int, unit: int, num_problems: int) -> list[Sample]:
    """The samples of whole units that a file holds; afterwards it holds only these."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    samples = read_samples(path)
    if any(sample.run != run for sample in samples):
        aside = path.with_name(f"{path.name}.old")
        path.replace(aside)
        print(f"{path} holds samples of another model or other options: put aside as {aside.name}", flush=True)
        return []
    if len(samples) < num_samples * num_problems:
        samples = samples[: len(samples) - len(samples) % (num_samples * unit)]
    write_text(path, "".join(map(_line, samples)))
    print(f"{path}: {len(samples)} of {num_samples * num_problems} samples are there and kept", flush=True)
    return samples


def _graded(
    rows: list[dict], drawn: Sequence[Sequence[Completion]], reward: Callable, first: int, seed: int, run: str
) -> list[Sample]:
    """Samples of the problems `rows`, the first of which has the index `first`."""
    flat = [completion for completions in drawn for completion in completions]
    inputs = [row for row, completions in zip(rows, drawn, strict=True) for _ in completions]
    prompts = [row["prompt"] for row in inputs]
    texts = [x.text if isinstance(p, str) else [_message(x)] for p, x in zip(prompts, flat, strict=True)]
    logged: dict[str, list] = {}
    arguments = reward_arguments(inputs, prompts, texts, [list(x.ids or ()) for x in flat])
    arguments |= {"log_extra": logged.__setitem__, "log_metric": lambda *_: None}
    if any(x.ids is None for x in flat):  # of a server: a reward that needs them says so
        del arguments["completion_ids"]
    (rewards,) = run_rewards([reward], [reward_name(reward)], arguments)
    nothing = [None] * len(flat)
    verdicts, extracted = (logged.get(name, nothing) for name in ("verdict", "extracted_answer"))
    places = [(first + i, j) for i, completions in enumerate(drawn) for j in range(len(completions))]
    return [
        Sample(
            *place, row["prompt"], x.text, row.get("answer"), value, _text(verdict), _text(answer), x.num_tokens,
            x.truncated, seed, run,
        )
        for place, row, x, value, verdict, answer in zip(places, inputs, flat, rewards, verdicts, extracted)
    ]  # fmt: skip


def _message(completion: Completion) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
