"""The ablation of `sapo-adaptive` in the laboratory: what weighs a bad token, and what a good one that has fallen.

python scripts/ablation.py --output_dir docs/results   # 91 rows, 3 minutes on a core: the table of sapo-adaptive.md

Rows are written to ablation.csv one by one; a second call adds what is missing, and makes all again once this file was
edited. World 0, on which the weight was chosen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from sapo_trl.baselines import Weighted
from sapo_trl.lab.run import Method, Regime, find_method
from sapo_trl.lab.sweep import Table, sweep
from sapo_trl.objective import MAX_LOG_RATIO, LossInputs, gate_weight, require

REGIMES = (
    Regime(32, 5e-3), Regime(16, 1e-2), Regime(4, 3e-3, task="avoid"), Regime(16, 2e-2, task="avoid"),
    Regime(32, 2e-2, task="avoid"),
)  # fmt: skip


@dataclass(frozen=True)
class Variant(Weighted):
    """SAPO's gate for good tokens that rose; the rest as the fields say.

    Attributes:
        row: by what a bad answer is weighted: the probability that its tokens have `lost`, min(1, r) of the answer as
            the `product` of its tokens, the same with the log-ratio over the root of the length (`scaled`), the product
            up to the token (`prefix`), or `nothing`; to the `power`.
        token: by what a bad token is, beside it: min(1, r) (`capped`), SAPO's `gate`, or `nothing`.
        lift: the largest weight of a good token that fell, which has 1/r below it.
    """

    row: str = "lost"
    power: float = 1.0
    token: str = "nothing"
    lift: float = 1.0

    def __post_init__(self):
        known = ("lost", "product", "scaled", "prefix", "nothing")
        require(self.row in known, "row", self.row, ", ".join(known))
        require(self.token in ("capped", "gate", "nothing"), "token", self.token, "capped, gate, nothing")

    def row_weight(self, tokens: LossInputs) -> Tensor:
        """Per token, (T,), before the power."""
        z, rows = tokens.token_log_ratio.detach(), tokens.rows
        if self.row == "lost":
            kept = 1 + tokens.old_logps.exp() * torch.expm1(z.clamp(max=0))
            return tokens.row_mean(kept.clamp(min=1e-6).log()).exp()[rows]
        if self.row == "prefix":  # the laboratory's rows are of equal length, one after the other
            total = z.view(tokens.num_rows, -1).cumsum(1).flatten()
        else:
            total = tokens.row_sum(z)[rows]
        if self.row == "scaled":
            total = total / tokens.row_sum(torch.ones_like(z)).sqrt()[rows]
        return total.clamp(-MAX_LOG_RATIO, 0).exp() if self.row != "nothing" else torch.ones_like(z)

    def weight(self, tokens: LossInputs) -> Tensor:
        z, good = tokens.log_ratio.detach(), tokens.advantages > 0
        tau = torch.where(good, 1.0, 1.05)
        gate = gate_weight(z, tau, "sigmoid", tokens.advantages) * z.exp()
        beside = {"capped": z.clamp(max=0).exp(), "gate": gate, "nothing": torch.ones_like(z)}[self.token]
        lifted = (-z).exp().clamp(max=self.lift)
        return torch.where(good, torch.where(z < 0, lifted, gate), self.row_weight(tokens) ** self.power * beside)


METHODS = {
    "p = 32, by the formula here": Variant("lost", 32, "capped"),
    "p = 24": Variant("lost", 24, "capped"),
    "p = 16": Variant("lost", 16, "capped"),
    "p = 64": Variant("lost", 64, "capped"),
    "p = 64, without min(1, r)": Variant("lost", 64),
    "p = 32, SAPO's gate in place of min(1, r)": Variant("lost", 32, "gate"),
    "p = 8, without min(1, r)": Variant("lost", 8),
    "min(1, Π r)², SAPO's gate (the first candidate)": Variant("product", 2, "gate"),
    "min(1, Π r)": Variant("product"),
    "the same, z over √length in place of the sum": Variant("scaled"),
    "the same, product up to the token only": Variant("prefix"),
    "SAPO's gate alone": Variant("nothing", token="gate"),
    "min(1, Π r), good tokens that fell at 1/r, at most 3": Variant("product", lift=3.0),
}
RIVALS = ("topr", "vespo", "grpo", "sapo")
LONG = Regime(32, 5e-3, length=64)  # lab.csv has the others there


def main() -> int:
    """Run what is missing and print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    table = Table(parser.parse_args().output_dir / "ablation.csv")
    torch.set_num_threads(1)
    variants = (Method(name, objective) for name, objective in METHODS.items())
    methods = [find_method("sapo-adaptive"), *variants, *map(find_method, RIVALS)]
    sweep(REGIMES, methods, table)
    sweep([LONG], [find_method("sapo-adaptive adaptive_power=128")], table)
    print("| weight of a bad token |", " | ".join(regime.name for regime in REGIMES), "|")
    for method in methods:
        rows = [table.rows[regime.name, method.name] for regime in REGIMES]
        cells = [f"{fmean(json.loads(row['rewards'])):.3f}" + f" ({row['collapsed']})" * (row["collapsed"] != "0")
                 for row in rows]  # fmt: skip
        print(f"| {method.name} |", " | ".join(cells), "|")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
