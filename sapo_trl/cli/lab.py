"""Objectives in the laboratory: which one is first depends on how far the policy drifts in a rollout.

sapo-trl lab --quick                                           # 2 tasks x 4 regimes x 6 methods, 93 s on a core
sapo-trl lab --quick --objective my_package.my_module.MyLoss   # yours beside them
sapo-trl lab --output_dir docs/results                         # the full sweep, resumable: 47 minutes on a core
sapo-trl lab --judge sapo-adaptive --output_dir docs/results   # paired over seeds, on worlds of its own

A method is an algorithm's name, or the dotted path of an `Objective` or `Algorithm`, with options behind it:
`--methods grpo "sapo sapo_temperature_neg=5"`. `sapo` is always among them, for its drift is the picture's axis. Rows
are written to lab.csv one by one; a second call adds what is missing, and makes the rows of an objective again whose
module was edited. The last line is JSON: {regime: {method: {median,
min, max, collapsed, drift, leak}}} over 8 seeds, the reward of the last 5 rollouts. A seed has collapsed if it ends
under half of its best reward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sapo_trl.cli.terminal import refuse
from sapo_trl.lab.figure import REFERENCE, lab_figure, lab_table
from sapo_trl.lab.judge import judge, line
from sapo_trl.lab.run import find_method
from sapo_trl.lab.sweep import FULL_METHODS, QUICK, QUICK_METHODS, Table, find_methods, full_regimes, sweep
from sapo_trl.report.plots import save


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep, draw the picture, print the summary; the exit status."""
    arguments = parse_arguments(argv)
    try:
        names = [*(arguments.methods or (QUICK_METHODS if arguments.quick else FULL_METHODS)), *arguments.objective]
        methods = find_methods([REFERENCE, *names, *([arguments.judge] if arguments.judge else [])])
    except ValueError as error:
        return refuse(error)
    torch.set_num_threads(1)  # the tensors are small, and rows may run side by side
    table = Table(None if arguments.output_dir is None else arguments.output_dir / "lab.csv")
    try:
        if arguments.judge:
            return print_verdicts(arguments)
        sweep(QUICK if arguments.quick else full_regimes(), methods, table)
    except ValueError as error:  # an objective's numbers; the rows before it are kept
        return refuse(error)
    if arguments.output_dir is not None:
        rows = lab_table(table)
        own = [*arguments.objective, *(arguments.methods or [])]
        shown = tuple(dict.fromkeys([REFERENCE, *own, *([] if arguments.methods else QUICK_METHODS)]))
        for path in save(lab_figure(rows, shown), rows, arguments.output_dir, "lab-figure"):
            print(f"written to {path}")
    print(json.dumps(table.summary()))
    return 0


def print_verdicts(arguments: argparse.Namespace) -> int:
    """Judge one method, print the differences, and keep the rows they are of; the exit status."""
    table = Table(None if arguments.output_dir is None else arguments.output_dir / "judge.csv")
    verdicts = [line(entry) for entry in judge(find_method(arguments.judge), table)]
    print("\n".join(verdicts))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="the small sweep")
    parser.add_argument("--methods", nargs="+", help="in place of the sweep's own")
    parser.add_argument("--objective", nargs="+", default=[], help="dotted paths, beside the methods")
    parser.add_argument("--judge", metavar="METHOD", help="is it better than others, on other worlds? (judge.csv)")
    parser.add_argument("--output_dir", type=Path, help="keep lab.csv and the picture here; needed to resume")
    arguments = parser.parse_args(argv)
    if arguments.judge and (arguments.quick or arguments.methods or arguments.objective):
        parser.error("--judge has worlds and rivals of its own: --quick, --methods and --objective do nothing with it.")
    if arguments.output_dir is not None and arguments.output_dir.is_file():
        parser.error(f"--output_dir {arguments.output_dir} is a file: name a folder.")
    return arguments
