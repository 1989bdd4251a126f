"""Many rows of the laboratory, kept one by one in a CSV file: a sweep that was killed goes on where it ended."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sapo_trl.lab.run import Method, Regime, Result, Trainer, find_method

QUICK_METHODS = ("sapo", "grpo", "gspo", "vespo", "topr", "sapo-adaptive")
QUICK = tuple(
    Regime(mini_batches, rate, task=task)
    for task in ("recall", "avoid")
    for mini_batches, rate in ((4, 3e-3), (32, 3e-3), (32, 5e-3), (16, 1e-2))
)
FULL_METHODS = (
    *QUICK_METHODS, "sapo-sequence", "cispo", "dppo-tv", "dppo-kl", "m2po", "aspo", "wapo",
    "sapo sapo_temperature_neg=0.95", "sapo sapo_temperature_neg=1", "sapo sapo_temperature_neg=5",
    "sapo sapo_temperature_neg=10", "sapo sapo_temperature_pos=10 sapo_temperature_neg=12",
    "sapo-adaptive adaptive_power=16", "sapo-adaptive adaptive_power=64",
)  # fmt: skip
NUMBERS = ("median", "min", "max", "collapsed", "drift", "leak", "cpu_s")
COLUMNS = ("task", "regime", "method", *NUMBERS, "curve", "rewards", "source")  # source: of an objective from outside


def full_regimes() -> Iterator[Regime]:
    """N x learning rate for both tasks; then other worlds, a rollout ahead, engine noise and long answers for three."""
    for task in ("recall", "avoid"):
        for mini_batches in (4, 8, 16, 32):
            for rate in (1e-3, 3e-3, 5e-3, 1e-2):
                yield Regime(mini_batches, rate, task=task)
        for mini_batches, rate in ((4, 3e-3), (32, 3e-3), (32, 5e-3)):
            regime = Regime(mini_batches, rate, task=task)
            yield from (replace(regime, world=world) for world in (1, 2))
            yield replace(regime, rollouts_ahead=1)
            yield replace(regime, engine_noise=0.1)
            yield replace(regime, length=64)


class Table:
    """The rows of a CSV file that this sweep has written or found there."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, {}
        if path is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row.get("rewards")]  # a torn last row has none
            self.rows = {(row["regime"], row["method"]): row for row in rows}

    def add(self, result: Result, source: str = "") -> None:
        """Keep one row, on disk at once. source: `Method.source`."""
        values = result.summary() | {
            "task": result.settings["task"],
            "regime": result.regime,
            "method": result.method,
            "cpu_s": result.cpu_s,
            "curve": json.dumps(result.curve),
            "rewards": json.dumps([round(x, 4) for x in result.rewards]),
            "source": source,
        }
        row = {name: str(values[name]) for name in COLUMNS}
        self.rows[result.regime, result.method] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        temporary.replace(self.path)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Regime -> method -> median, min, max, collapsed, drift, leak."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (regime, method), row in self.rows.items():
            numbers = {name: float(row[name]) for name in ("median", "min", "max", "drift", "leak")}
            found.setdefault(regime, {})[method] = numbers | {"collapsed": int(row["collapsed"])}
        return found


def sweep(regimes: Iterable[Regime], methods: Sequence[Method], table: Table) -> None:
    """Run what the table lacks, or has of an objective whose source was another, one printed line per row."""
    for regime in regimes:
        for method in methods:
            row = table.rows.get((regime.name, method.name))
            if row is not None and (row.get("source") or "") == method.source:
                continue
            if row is not None:
                print(f"{regime.name:28s} {method.name:32s} is made again: its source has changed", flush=True)
            result = Trainer(method, regime).run()
            table.add(result, method.source)
            s = result.summary()
            print(
                f"{regime.name:28s} {method.name:32s} reward {s['median']:.3f} [{s['min']:.3f}, {s['max']:.3f}]  "
                f"collapsed {s['collapsed']}  drift {s['drift']:.2g}  leak {s['leak']:.3f}  {result.cpu_s:.1f} s",
                flush=True,
            )


def find_methods(names: Sequence[str]) -> list[Method]:
    """Each of the names, once.

    Raises:
        ValueError: see `find_method`.
    """
    return [find_method(name) for name in dict.fromkeys(names)]
