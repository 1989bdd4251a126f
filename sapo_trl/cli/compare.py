"""Runs beside each other: methods x mini-batches x learning rates x seeds, each an ordinary training run.

python scripts/compare.py --output_dir runs/reproduce --figures figure-4 figure-5 staleness   # make reproduce
python scripts/compare.py --output_dir runs/mine --config configs/tiny/sapo.yaml --start runs/tiny --jobs 8 \\
  --methods sapo grpo "sapo sapo_temperature_neg=5" --mini_batches 4 16 --learning_rates 1e-4 2e-4 --seeds 0 1 2

Every run trains on `--rollouts` rollouts of the config's size, however many mini-batches they are cut into, and ends
with an evaluation of `--num_samples` samples per held-out problem. A method is an algorithm's name, then options of the
config. Without `--start` each seed begins with a cold start of its own (`configs/tiny*`). The start is evaluated first,
into its own folder. Other options go to `scripts/train.py`. A run that is done has a `row.json`; a second call adds
what is missing, and makes a run of other settings again, which it says. Weights are removed once their run is
evaluated. `runs.csv` and `rollouts.csv` are written after every run, the pictures at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from sapo_trl.algorithms import find_algorithm
from sapo_trl.cli.children import Children
from sapo_trl.cli.parse import parse_run, read_yaml
from sapo_trl.cli.reproduce import LAUNCH, PhaseFailedError, run_phase
from sapo_trl.cli.tables import all_tables
from sapo_trl.cli.terminal import refuse
from sapo_trl.cli.threads import bound_threads
from sapo_trl.config import SAPOConfig
from sapo_trl.files import write_json, write_text
from sapo_trl.report.comparison import draw, ending, rollout_table
from sapo_trl.report.runs import load_run

MAIN = ("sapo", "gspo", "grpo", "vespo", "topr", "sapo-adaptive")
NEGATIVE = tuple(f"sapo sapo_temperature_neg={tau:g}" for tau in (0.95, 1, 2, 5, 10, 30))
TINY, MOE = "configs/tiny/sapo.yaml", "configs/tiny-moe/sapo.yaml"
AHEAD = ("--rollouts_ahead", 1, "--old_logprobs", "sampler", "--vllm_importance_sampling_correction", "false")


@dataclass(frozen=True)
class Case:
    """One training run. All of a comparison have equal rollouts and equally many of them."""

    method: str
    mini_batches: int = 16
    learning_rate: float = 2e-4
    seed: int = 0
    rollouts_ahead: int = 0
    config: str = TINY

    @property
    def world(self) -> str:
        """The folder of its config, and the file's name where that is not `sapo.yaml`."""
        path = Path(self.config)
        return path.parent.name if path.stem == "sapo" else f"{path.parent.name}-{path.stem}"

    @property
    def name(self) -> str:
        """Of its folder.

        >>> Case("sapo sapo_temperature_neg=5", learning_rate=1e-4, rollouts_ahead=1, seed=2).name
        'tiny-sapo_sapo_temperature_neg=5-N16-lr0.0001-ahead1-seed2'
        """
        ahead = f"-ahead{self.rollouts_ahead}" if self.rollouts_ahead else ""
        method = self.method.replace(" ", "_")
        return f"{self.world}-{method}-N{self.mini_batches}-lr{self.learning_rate:g}{ahead}-seed{self.seed}"

    @property
    def rows(self) -> int:
        """Completions of an optimizer step: a rollout is as large as the config's.

        Raises:
            ValueError: it can't be cut into so many equal parts.
        """
        config = read_yaml(self.config)
        names = ("num_mini_batches", "per_device_train_batch_size", "gradient_accumulation_steps")
        rollout = math.prod(config.get(name, SAPOConfig.__dataclass_fields__[name].default) for name in names)
        if self.mini_batches < 1 or rollout % self.mini_batches:
            raise ValueError(f"{self.mini_batches} mini-batches do not divide the {rollout} completions of a rollout.")
        return rollout // self.mini_batches

    @property
    def options(self) -> list[Any]:
        """The algorithm, and its options, as words of a command line."""
        algorithm, *options = self.method.split()
        pairs = [option.partition("=") for option in options]
        return ["--algorithm", algorithm, *(word for name, _, value in pairs for word in (f"--{name}", value))]


def grid(
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    mini_batches: Sequence[int] = (16,),
    ahead: Sequence[int] = (0,),
    config: str = TINY,
) -> list[Case]:
    """Every combination, whole seeds one after the other: what is there of an unfinished comparison is balanced."""
    columns = product(ahead, mini_batches, rates, seeds, methods)
    return [Case(method, n, rate, seed, age, config) for age, n, rate, seed, method in columns]


def figure_cases(figure: str, seeds: Sequence[int], quick: bool) -> list[Case]:
    """The runs of a figure, those of docs/reproduction.md, the most telling first."""
    if quick:  # where much drifts, and where little does
        return grid(MAIN[:3], seeds, (4e-4, 1e-4)) if figure == "figure-4" else []
    few = seeds[:3]
    return {
        "figure-4": [
            *grid(MAIN, seeds, (2e-4, 4e-4, 1e-4)),
            *grid(MAIN, seeds, (2e-4, 4e-4), mini_batches=(4,)),
            *grid((*MAIN[:3], "grpo-r2"), seeds, (2e-4,), config=MOE),
            *grid(MAIN, seeds[:1], (1e-3,), mini_batches=(4,)),
        ],
        "figure-5": grid(NEGATIVE, few, (2e-4,)),
        "staleness": grid(("sapo", "grpo"), few, (2e-4,), mini_batches=(1, 4, 16, 64), ahead=(0, 1)),
    }[figure]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the tables, draw; the exit status: 1 if a run has failed."""
    arguments = parse_arguments(argv)
    if arguments.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the jobs share the cores
    print(bound_threads(), flush=True)
    with Children() as children:
        try:
            cases = all_cases(arguments)
            check_training(arguments, cases)
            print(plan(arguments, cases), flush=True)
            make_starts(arguments, cases, children)
            failed = run_missing(arguments, cases, children)
        except KeyboardInterrupt:
            print("ended by a signal; the same command goes on with the runs that are missing", flush=True)
            return 128 + children.signal
        except (PhaseFailedError, ValueError, OSError) as error:
            return refuse(error)
    write_tables(arguments.output_dir)
    if (arguments.output_dir / "runs.csv").exists():
        print(all_tables(arguments.output_dir))
        print("\n".join(f"written to {path}" for path in draw(arguments.output_dir, arguments.output_dir)))
    if failed:
        print(f"{len(failed)} of {len(cases)} runs failed; the log stands beside each: {', '.join(failed)}")
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options; whatever it does not know goes to `scripts/train.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    figures = ("figure-4", "figure-5", "staleness")
    parser.add_argument("--figures", nargs="+", choices=figures, default=[], help="the runs of these; or --methods")
    parser.add_argument("--quick", action="store_true", help="fewer of them: 11 minutes on two cores")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--mini_batches", type=int, nargs="+", default=[16], help="optimizer steps per rollout")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--rollouts_ahead", type=int, nargs="+", choices=(0, 1), default=[0])
    parser.add_argument("--config", default=TINY, help="with --methods")
    parser.add_argument(
        "--start", type=Path, help="folder with model/, train.jsonl, test.jsonl, for all seeds; gets its evaluation"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2 3 4 (0 1 if quick)")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--num_samples", type=int, default=16, help="samples per held-out problem")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments, arguments.train_options = parser.parse_known_args(argv)
    if not arguments.figures and not "".join(arguments.methods).strip():
        parser.error("nothing to run: give --figures or --methods.")
    for name in ("rollouts", "num_samples", "jobs"):
        if vars(arguments)[name] < 1:
            parser.error(f"--{name} {vars(arguments)[name]} must be at least 1.")
    if "--num_iterations" in arguments.train_options:
        parser.error("--num_iterations: runs are compared by rollouts whose completions are used once.")
    if arguments.seeds is None:
        arguments.seeds = [0, 1] if arguments.quick else [0, 1, 2, 3, 4]
    return arguments


def all_cases(arguments: argparse.Namespace) -> list[Case]:
    """The runs that were asked for, each once.

    Raises:
        ValueError: an algorithm or a number of mini-batches that can't be, two runs of one name, or none.
    """
    cases = [case for name in arguments.figures for case in figure_cases(name, arguments.seeds, arguments.quick)]
    x = arguments
    cases += grid(x.methods, x.seeds, x.learning_rates, x.mini_batches, x.rollouts_ahead, x.config)
    for case in cases:
        find_algorithm(case.method.split()[0])
        case.rows  # noqa: B018, it says what can't be
    names = {case.name: case for case in cases}
    if clash := [case for case in cases if names[case.name] != case]:
        raise ValueError(f"{clash[0].config} and {names[clash[0].name].config} would share the folder {clash[0].name}.")
    if not cases:
        raise ValueError("these options leave no run: --quick has runs of figure-4 alone.")
    return list(names.values())


def check_training(arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Read the command line of each method's run, before anything starts.

    Raises:
        ValueError: `--start` is needed, for only the tiny worlds have a cold start; or what `parse_run` refuses.
    """
    for case in {(case.config, case.method, case.rollouts_ahead): case for case in cases}.values():
        start = start_of(arguments, case)
        if not (start / "test.jsonl").exists() and (arguments.start or case.config not in (TINY, MOE)):
            raise ValueError(f"{start} has no test.jsonl. --start names a folder with model/, train.jsonl, test.jsonl.")
        words = train_words(arguments, case, start.absolute(), arguments.output_dir / case.name)
        parse_run(words[words.index("scripts/train.py") + 1 :])


def plan(arguments: argparse.Namespace, cases: Sequence[Case]) -> str:
    """How many runs, of what, and which results are lost because their run had other settings."""
    different = {
        "methods": {case.method for case in cases},
        "mini-batches": {case.mini_batches for case in cases},
        "learning rates": {case.learning_rate for case in cases},
        "rollouts ahead": {case.rollouts_ahead for case in cases},
        "configs": {case.config for case in cases},
        "seeds": {case.seed for case in cases},
    }
    counts = {name: len(values) for name, values in different.items() if len(values) > 1}
    whole = counts and math.prod(counts.values()) == len(cases)
    factors = f" ({' × '.join(f'{count} {name}' for name, count in counts.items())})" if whole else ""
    changes = {case.name: changed(arguments.output_dir / case.name, settings(arguments, case)) for case in cases}
    done = sum(change == [] for change in changes.values())
    again = [f"{name} is made again: {', '.join(change)}" for name, change in changes.items() if change]
    runs = "run" if len(cases) == 1 else "runs"
    return "\n".join([f"{len(cases)} {runs}{factors}, {done} done", *again])


def start_of(arguments: argparse.Namespace, case: Case) -> Path:
    """The folder that a run begins with."""
    return arguments.start or arguments.output_dir / f"{case.world}-start-seed{case.seed}"


def make_starts(arguments: argparse.Namespace, cases: Sequence[Case], children: Children) -> None:
    """Cold-start and evaluate the folders that runs begin with, those that have not been.

    Raises:
        PhaseFailedError: see `run_phase`.
    """
    firsts = {start_of(arguments, case): case for case in cases}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(partial(make_start, arguments, children), firsts.values()))


def make_start(arguments: argparse.Namespace, children: Children, case: Case) -> None:
    """Cold-start and evaluate one, if it has not been."""
    start = start_of(arguments, case)
    run_phase(
        f"cold start, seed {case.seed}", {}, (start / "test.jsonl").exists(),
        sys.executable, "scripts/cold_start.py", "--output_dir", start,
        "--seed", case.seed, *(["--moe"] if case.config == MOE else []), run=children.run,
    )  # fmt: skip
    result = evaluation_of_start(arguments, case, start)
    words = evaluation_words(arguments, case, start, start / "model", result)
    run_phase(f"evaluate {start.name}", {}, result.exists(), *words, run=children.run)


def evaluation_of_start(arguments: argparse.Namespace, case: Case, start: Path) -> Path:
    """The file with what a config's reward gives the model that training begins with."""
    return start / f"evaluation-{case.world}-{arguments.num_samples}.json"


def evaluation_words(arguments: argparse.Namespace, case: Case, start: Path, model: Path, result: Path) -> list[str]:
    """The command that evaluates a model on the held-out problems."""
    words = [
        sys.executable, "scripts/evaluate.py", "--model", model, "--config", case.config,
        "--dataset_name", start / "test.jsonl", "--num_samples", arguments.num_samples, "--output", result,
    ]  # fmt: skip
    return [str(word) for word in words]


def run_missing(arguments: argparse.Namespace, cases: Sequence[Case], children: Children) -> list[str]:
    """Run what is not done, `--jobs` at once; the names of the runs that failed."""
    folders = {case: arguments.output_dir / case.name for case in cases}
    missing = [case for case in cases if changed(folders[case], settings(arguments, case)) != []]
    failed, started = [], time.perf_counter()
    pool = ThreadPoolExecutor(arguments.jobs)
    jobs = {pool.submit(run_case, arguments, case, folders[case], children): case for case in missing}
    try:
        for number, job in enumerate(as_completed(jobs), start=1):
            case, row = jobs[job], job.result()
            if row is None:
                failed.append(case.name)
                print(f"{case.name}: failed, see {folders[case]}.log", flush=True)
                continue
            write_tables(arguments.output_dir)
            left = (time.perf_counter() - started) / number * (len(missing) - number)
            ends = f"Pass@1 {row['pass_at_1_before']:.3f} → {row['pass_at_1_after']:.3f}"
            print(f"{case.name}: {ends}, {row['seconds']:.0f} s; {left / 60:.0f} minutes left", flush=True)
    finally:  # a signal has ended the runs that were under way, and no other begins
        pool.shutdown(cancel_futures=True)
    return failed


def settings(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """What a run is, as columns of runs.csv."""
    known = asdict(case) | {"world": case.world, "rollouts": arguments.rollouts, "num_samples": arguments.num_samples}
    return known | {"options": " ".join(arguments.train_options), "start": str(arguments.start or "")}


def changed(folder: Path, wanted: dict[str, Any]) -> list[str] | None:
    """What differs between the run whose result the folder holds and the one that is wanted, as "name old → new"; None
    where there is no result."""
    path = folder / "row.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text())["run"]
    pairs = {name: (row.get(name, ""), value) for name, value in wanted.items()}
    return [f"{name} {_shown(old)} → {_shown(new)}" for name, (old, new) in pairs.items() if old != new]


def _shown(value: Any) -> str:
    return "none" if value == "" else str(value)


def train_words(arguments: argparse.Namespace, case: Case, start: Path, folder: Path) -> list[str]:
    """The command of one run."""
    steps = case.mini_batches * arguments.rollouts
    words = [
        *LAUNCH, "scripts/train.py", "--config", case.config, *case.options, "--seed", case.seed,
        "--num_mini_batches", case.mini_batches, "--per_device_train_batch_size", case.rows,
        "--gradient_accumulation_steps", 1, "--learning_rate", case.learning_rate, "--max_steps", steps,
        "--require_off_policy", "false", "--output_dir", folder, "--model_name_or_path", start / "model",
        "--dataset_name", start / "train.jsonl", "--eval_dataset_name", start / "test.jsonl",
        "--eval_strategy", "no", "--dump_ratios_every", case.mini_batches, "--log_completions", "false",
        "--logging_steps", 1,
        *(AHEAD if case.rollouts_ahead else ()), *arguments.train_options,
    ]  # fmt: skip
    return [str(word) for word in words]


def run_case(arguments: argparse.Namespace, case: Case, folder: Path, children: Children) -> dict[str, Any] | None:
    """Train and evaluate; the row of runs.csv, which is kept in `row.json` with those of its rollouts. None: it failed,
    and `<folder>.log` says why."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed, or had other settings
    start = start_of(arguments, case)
    started, log = time.perf_counter(), folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    result = folder / "evaluation.json"
    training = train_words(arguments, case, start, folder)
    with log.open("w") as file:
        for words in (training, evaluation_words(arguments, case, start, folder, result)):
            if children.run(words, stdout=file, stderr=subprocess.STDOUT) != 0:
                return None
    run, ends = load_run(folder), []
    for when, path in (("before", evaluation_of_start(arguments, case, start)), ("after", result)):
        score = json.loads(path.read_text())["pass_at_1"]
        ends.append((when, score["mean"], score["low"], score["high"]))
    rollouts = rollout_table(run)
    if len(rollouts) < arguments.rollouts:
        with log.open("a") as file:
            print(f"only {len(rollouts)} of {arguments.rollouts} rollouts are logged: a signal has ended it", file=file)
        return None
    row = {"run": case.name} | settings(arguments, case) | ending(rollouts["reward"].tolist())
    for when, mean, low, high in ends:
        row |= {f"pass_at_1_{when}": mean, f"pass_at_1_{when}_low": low, f"pass_at_1_{when}_high": high}
    made_with, hardware = run.facts("versions.json"), run.facts("hardware.json")
    row |= {"seconds": round(time.perf_counter() - started, 1), "device": hardware.get("device", "")}
    row |= {name: made_with.get(name, "") for name in ("sapo_trl", "torch", "transformers", "trl", "python")}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    write_json(folder / "row.json", {"run": row, "rollouts": rollouts.round(6).to_dict("records")})
    log.unlink()
    return row


def write_tables(folder: Path) -> None:
    """`runs.csv` and `rollouts.csv` of every run in the folder that is done; nothing where none is."""
    rows = []
    for path in sorted(folder.glob("*/row.json")):
        with contextlib.suppress(FileNotFoundError):  # another thread makes that run again, and has just removed it
            rows.append(json.loads(path.read_text()))
    if not rows:
        return
    rollouts = [{"run": row["run"]["run"]} | rollout for row in rows for rollout in row["rollouts"]]
    for name, found in (("runs", [row["run"] for row in rows]), ("rollouts", rollouts)):
        write_text(folder / f"{name}.csv", pd.DataFrame(found).to_csv(index=False, float_format="%.6g"))
