"""The console command: `sapo-trl COMMAND ...`, the same as `python -m sapo_trl COMMAND ...`.

Several processes: `accelerate launch --num_processes 8 -m sapo_trl train --config qwen3-8b/sapo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from sapo_trl import __version__
from sapo_trl.errors import did_you_mean

# command -> its module in `sapo_trl.cli`, the words that stand before its own, and what it does
COMMANDS = {
    "recipes": ("recipes", [], "list the configs that come with the package, or copy one"),
    "check": ("check", [], "the plan and the memory of a config, before any model loads"),
    "train": ("train", [], "train a model"),
    "evaluate": ("evaluate", [], "Pass@1, pass@k and maj@k of a model, with intervals"),
    "filter": ("filter_by_pass_rate", [], "the problems that a model solves sometimes"),
    "report": ("plot", ["report"], "one HTML page of a run, or of several side by side"),
    "plot": ("plot", [], "pictures of a run and of the gate, each with its numbers"),
    "cold-start": ("cold_start", [], "make the tiny model and the data that the tiny recipes train on"),
    "lab": ("lab", [], "objectives beside each other on policies that train in seconds"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {name:12}{text}" for name, (_, _, text) in COMMANDS.items())
        print("sapo-trl COMMAND --help says more.", *lines, sep="\n")
        return 0
    if name == "--version":
        print(f"sapo_trl {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {name!r} is no command of sapo-trl.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 1
    module, first, _ = COMMANDS[name]
    # for the usage that the command prints, and for the record of a run
    sys.argv[:] = ["sapo-trl" if first else f"sapo-trl {name}", *words]
    return import_module(f"sapo_trl.cli.{module}").main([*first, *words])


if __name__ == "__main__":
    sys.exit(main())
