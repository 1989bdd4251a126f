"""The main job, end to end, for every seed: cold start, evaluation, RL, evaluation, curves and a summary.

python scripts/reproduce.py --output_dir runs/demo --seeds 0   # make demo
python scripts/reproduce.py --output_dir runs/seeds --seeds 0 1 2 --algorithms sapo gspo grpo
python scripts/reproduce.py --output_dir runs/mine --start runs/tiny   # from a model and data that are there

Every phase is the command that you would type yourself; it is printed before it runs. `--resume` keeps the phases
whose results are there, whatever options they were made with, and says so. `summary.json` holds `pass_at_1_before`,
`pass_at_1_after`, their intervals, the paired difference and the seconds of each phase; with several runs one
entry for each in `runs`. Of a Mixture-of-Experts it also has `routing`: see `routing_summary`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from sapo_trl.cli.terminal import refuse
from sapo_trl.cli.threads import bound_threads
from sapo_trl.files import masked, write_json
from sapo_trl.monitor.files import command_line, versions
from sapo_trl.report.build import write_report
from sapo_trl.report.head import per_problem
from sapo_trl.report.plots import demo_curves, demo_table, save
from sapo_trl.report.ratios import staleness_table
from sapo_trl.report.runs import load_run
from sapo_trl.stats import paired_difference

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
TIMES = ("before", "after")
START_FILES = ("model", "train.jsonl", "test.jsonl")  # what a cold start leaves


class PhaseFailedError(RuntimeError):
    """A phase ended with a status other than 0; its own message stands above."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every phase, then write the report and print the table; the exit status."""
    arguments = parse_arguments(argv)
    print(bound_threads(), flush=True)
    try:
        entries = run_all(arguments)
    except PhaseFailedError as error:
        return refuse(error)
    write_report([load_run(entry["folder"]) for entry in entries], arguments.output_dir / "report.html")
    print_table(entries)
    print(f"summary.json, curves and report.html are in {arguments.output_dir}/")
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options; whatever it does not know goes to `scripts/train.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithms", nargs="+", default=["sapo"])
    parser.add_argument("--config", default="configs/tiny/sapo.yaml")
    parser.add_argument("--num_samples", type=int, default=16, help="samples per held-out problem")
    parser.add_argument("--reward", help="that grades the held-out problems; default: the only one of --config")
    parser.add_argument("--start", type=Path, help="folder with model/, train.jsonl and test.jsonl: no cold start")
    parser.add_argument("--moe", action="store_true", help="Qwen3-MoE; give its --config too")
    parser.add_argument("--resume", action="store_true", help="keep the phases whose results are there")
    arguments, arguments.train_options = parser.parse_known_args(argv)
    if arguments.start is not None:
        missing = [name for name in START_FILES if not (arguments.start / name).exists()]
        if missing:
            parser.error(f"--start {arguments.start} has no {', '.join(missing)}. scripts/cold_start.py makes them.")
        if arguments.moe:
            parser.error("--moe says what the cold start makes, and --start skips it. Leave one of them out.")
    return arguments


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every seed and algorithm, one after the other; `summary.json` grows with each entry."""
    entries, earlier = [], earlier_seconds(arguments)
    for seed in arguments.seeds:
        start, seconds = arguments.start or arguments.output_dir / f"cold-start-seed{seed}", {}
        made = arguments.start is not None or (arguments.resume and (start / "test.jsonl").exists())
        run_phase(
            "cold start", seconds, made, sys.executable, "scripts/cold_start.py", "--output_dir", start,
            "--seed", seed, *(["--moe"] if arguments.moe else []),
        )  # fmt: skip
        before = evaluate(arguments, "evaluate before", start / "model", start, start / "evaluation.json", seconds)
        for algorithm in arguments.algorithms:
            entry = train_and_compare(arguments, algorithm, seed, start, before)
            entry["seconds"] = earlier.get((algorithm, seed), {}) | seconds | entry["seconds"]
            draw(arguments, entry, before)
            entries.append(entry)
            write_summary(arguments, entries)
    return entries


def run_phase(
    name: str, seconds: dict[str, float], kept: bool, *command: object, run: Callable[..., int] | None = None
) -> None:
    """Print and run one command; its seconds go to `seconds[name]`. `kept`: its result is there, so only say so."""
    if kept:
        print(f"\n--- {name}: kept", flush=True)
        return
    words = [str(word) for word in command]
    print(f"\n--- {name}\n$ {shlex.join(masked(words))}".replace(sys.executable, "python"), flush=True)
    started = time.perf_counter()
    status = (run or subprocess.call)(words)
    if status != 0:
        raise PhaseFailedError(f"{name} ended with status {status}; what it says stands above.")
    seconds[name] = round(time.perf_counter() - started, 1)


def evaluate(
    arguments: argparse.Namespace, name: str, model: Path, start: Path, output: Path, seconds: dict[str, float]
) -> dict[str, Any]:
    """The result of `scripts/evaluate.py` on the held-out problems of a start folder, sampled as `--config` says."""
    run_phase(
        name, seconds, arguments.resume and output.exists(), sys.executable, "scripts/evaluate.py", "--model", model,
        "--dataset_name", start / "test.jsonl", "--num_samples", arguments.num_samples,
        "--config", arguments.config, "--output", output, *(["--reward", arguments.reward] if arguments.reward else []),
    )  # fmt: skip
    return json.loads(output.read_text())


def train_and_compare(
    arguments: argparse.Namespace, algorithm: str, seed: int, start: Path, before: dict[str, Any]
) -> dict[str, Any]:
    """One RL run and its evaluation: the entry of the summary."""
    folder, seconds = arguments.output_dir / f"{algorithm}-seed{seed}", {}
    trained = arguments.resume and (folder / "model.safetensors").exists()
    run_phase(
        f"train {algorithm}, seed {seed}", seconds, trained, *LAUNCH, "scripts/train.py", "--config", arguments.config,
        "--algorithm", algorithm, "--seed", seed, "--output_dir", folder, "--model_name_or_path", start / "model",
        "--dataset_name", start / "train.jsonl", "--eval_dataset_name", start / "test.jsonl", *arguments.train_options,
    )  # fmt: skip
    after = evaluate(arguments, "evaluate after", folder, start, folder / "evaluation.json", seconds)
    entry: dict[str, Any] = {"algorithm": algorithm, "seed": seed, "folder": str(folder)}
    for when, result in zip(TIMES, (before, after)):
        interval = result["pass_at_1"]
        entry[f"pass_at_1_{when}"] = interval["mean"]
        entry[f"pass_at_1_{when}_interval"] = [interval["low"], interval["high"]]
    return entry | {
        "difference": paired_difference(per_problem(before), per_problem(after)).to_dict(),
        "mean_length_tokens": [before["mean_length_tokens"], after["mean_length_tokens"]],
        "seconds": seconds,
        **routing_summary(folder),
    }


def routing_summary(folder: Path) -> dict[str, dict]:
    """`routing` of a Mixture-of-Experts run, {} of another.

    `changed_frac_by_mini_batch`: share of (token, layer) pairs whose set of experts is not the old policy's, in the
    last half of the run, by the number of updates since the rollout: mean and 10% to 90% quantile of the rollouts.
    `router_entropy`: nats per token and layer, mean of the first and of the last rollout.
    """
    run = load_run(folder)
    entropy = run.series("routing/router_entropy")
    if entropy.empty:
        return {}
    steps: Any = entropy.index.max()
    late = replace(run, records=[record for record in run.records if record["step"] > steps / 2])
    changed = {
        row["mini_batch"]: {"mean": row["value"]} | {key: row[key] for key in ("low", "high", "rollouts")}
        for row in staleness_table(late).to_dict("records")
        if row["key"] == "routing/changed_frac"
    }
    n = run.steps_per_rollout
    return {
        "routing": {
            "optimizer_steps": steps,
            "changed_frac_by_mini_batch": changed,
            "router_entropy": {"first_rollout": fmean(entropy.iloc[:n]), "last_rollout": fmean(entropy.iloc[-n:])},
        }
    }


def earlier_seconds(arguments: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """(algorithm, seed) -> seconds of the phases that `--resume` may keep, from the summary that is there."""
    path = arguments.output_dir / "summary.json"
    if not (arguments.resume and path.exists()):
        return {}
    content = json.loads(path.read_text())
    return {(entry["algorithm"], entry["seed"]): entry["seconds"] for entry in content.get("runs", [content])}


def write_summary(arguments: argparse.Namespace, entries: list[dict[str, Any]]) -> None:
    """`summary.json`: the command, the machine and the versions, then the entries."""
    origin = {
        "command": f"python {command_line()}",
        "machine": load_run(entries[0]["folder"]).json("hardware.json"),
        "versions": versions(),
    }
    found = entries[0] if is_single(arguments) else {"runs": entries}
    write_json(arguments.output_dir / "summary.json", origin | found)


def draw(arguments: argparse.Namespace, entry: dict[str, Any], before: dict[str, Any]) -> None:
    """The curves of one run: `curves.png` for a single one, else one picture each."""
    run = load_run(entry["folder"])
    after = json.loads(Path(entry["folder"], "evaluation.json").read_text())
    name = "curves" if is_single(arguments) else f"curves-{entry['algorithm']}-seed{entry['seed']}"
    save(demo_curves(run, before, after), demo_table(run, before, after), arguments.output_dir, name)


def is_single(arguments: argparse.Namespace) -> bool:
    """Whether one run is asked for."""
    return len(arguments.seeds) * len(arguments.algorithms) == 1


def print_table(entries: list[dict[str, Any]]) -> None:
    """One line per run."""
    table = Table("algorithm", "seed", "Pass@1 before", "Pass@1 after", "difference", "length", "seconds")
    for entry in entries:
        shares = []
        for when in TIMES:
            low, high = entry[f"pass_at_1_{when}_interval"]
            shares.append(f"{entry[f'pass_at_1_{when}']:.3f} [{low:.3f}, {high:.3f}]")
        difference, (short, long) = entry["difference"], entry["mean_length_tokens"]
        gain = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        length, seconds = f"{short:.0f} → {long:.0f}", f"{sum(entry['seconds'].values()):.0f}"
        table.add_row(entry["algorithm"], str(entry["seed"]), *shares, gain, length, seconds)
    Console(width=130).print(table)
