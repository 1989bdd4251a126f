"""Pictures and reports, each picture with the numbers it shows.

sapo-trl plot gate --output docs
sapo-trl plot curves runs/sapo-seed0 runs/sapo-seed1 gspo=runs/other --output runs/pictures
sapo-trl plot comparison docs/results --output runs/pictures   # of scripts/compare.py and lab.py, from CSV files
sapo-trl report runs/sapo-seed0 --output report.html   # the same as sapo-trl plot report

A RUN is a folder with metrics.jsonl, or LABEL=folder; runs of one label are drawn as seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from sapo_trl.cli.tables import all_tables
from sapo_trl.cli.terminal import refuse
from sapo_trl.report import plots
from sapo_trl.report.build import write_report
from sapo_trl.report.comparison import draw
from sapo_trl.report.ratios import (
    gate_against_staleness,
    load_dump,
    ratio_figures,
    ratio_table,
    staleness_table,
    temperatures_of,
    within_bound_frac,
)
from sapo_trl.report.runs import Run, group_seeds, load_run


def read_run(text: str) -> Run:
    """`folder` or `label=folder`."""
    label, _, folder = text.rpartition("=")
    return load_run(text) if Path(text).exists() or not label else load_run(folder, label)


def _temperature(name: str, value: float | None, usual: float) -> float:
    """The value of an option, `usual` where it is not given.

    Raises:
        ValueError: it is no temperature.
    """
    value = usual if value is None else value
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"--{name} {value:g} is no temperature: the gate divides by it. Give a number above 0, as in 1."
        )
    return value


def gate(arguments: argparse.Namespace) -> list[Path]:
    tau = _temperature("tau", arguments.tau, 1.0)
    return plots.save(plots.gate_figure(tau), plots.gate_table(tau), arguments.output, "gate")


def curves(arguments: argparse.Namespace) -> list[Path]:
    groups = group_seeds(map(read_run, arguments.runs))
    figure, table = plots.training_curves(groups, arguments.keys), plots.training_table(groups, arguments.keys)
    return plots.save(figure, table, arguments.output, "curves")


def ratios(arguments: argparse.Namespace) -> list[Path]:
    dump = load_dump(arguments.run)
    known = (Path(arguments.run) / "resolved_config.yaml").exists()
    config = load_run(arguments.run).config if known else {}
    own_taus = dict(zip(("tau_pos", "tau_neg"), temperatures_of(config)))
    taus = tuple(_temperature(name, getattr(arguments, name), own) for name, own in own_taus.items())
    table = ratio_table(dump, *taus)
    print(f"D_i <= tau^2/4 Var_i (Eq. 21) for {within_bound_frac(table):.2%} of the sequences")
    return plots.save(ratio_figures(dump, *taus), table, arguments.output or _folder(arguments.run), "ratios")


def _folder(path: str) -> Path:
    """Where the pictures of a run folder, or of one .npz file, go."""
    return Path(path).parent if path.endswith(".npz") else Path(path)


def staleness(arguments: argparse.Namespace) -> list[Path]:
    run = read_run(arguments.run)
    figure, table = gate_against_staleness(run), staleness_table(run)
    return plots.save(figure, table, arguments.output or run.folder, "staleness")


def comparison(arguments: argparse.Namespace) -> list[Path]:
    folder = Path(arguments.run)
    print(all_tables(folder))
    return draw(folder, arguments.output or folder)


def report(arguments: argparse.Namespace) -> list[Path]:
    return [write_report(list(map(read_run, arguments.runs)), arguments.output)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="gate|curves|ratios|staleness|comparison|report")
    for command, text, run, output in (
        (gate, "the soft gates and the hard clip against r (Figure 1 of the paper)", None, "docs"),
        (curves, "training curves, runs overlaid", "runs", "."),
        (ratios, "where r is near 1, and the bound of Eq. 21 (Figures 2 and 3)", "run", None),
        (staleness, "the gate by the number of updates since the rollout", "run", None),
        (comparison, "many runs beside each other, from runs.csv, rollouts.csv and lab.csv", "run", None),
        (report, "one HTML page of one run, or of several side by side", "runs", "report.html"),
    ):
        options = commands.add_parser(command.__name__, help=text, description=text, allow_abbrev=False)
        options.set_defaults(command=command)
        if run is not None:
            metavar = "FOLDER" if command is comparison else "RUN"
            options.add_argument(run, metavar=metavar, nargs="+" if run == "runs" else None)
        kind = "file" if command is report else "folder for the .png and .csv"
        options.add_argument(
            "--output", type=Path, default=output, help=f"{kind} (default {output or 'the run folder'})"
        )
        if command is gate:
            options.add_argument("--tau", type=float, default=1.0, help="temperature of every gate (default 1)")
        if command is curves:
            options.add_argument("--keys", nargs="+", help="names from metrics.jsonl (default: the usual six)")
        if command is ratios:
            options.add_argument("--tau_pos", type=float, help="where A > 0 (default: the run's, else 1)")
            options.add_argument("--tau_neg", type=float, help="elsewhere (default: the run's, else 1.05)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and say where; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        paths = arguments.command(arguments)
    except (OSError, ValueError) as error:
        return refuse(error)
    print("\n".join(f"written to {path}" for path in paths))
    return 0
