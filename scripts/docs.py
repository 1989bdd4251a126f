"""Write the generated pages of the documentation: `python scripts/docs.py`. A test compares them with the code."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sapo_trl.algorithms import users_of
from sapo_trl.bounds import CHOICES, NEEDS, RANGES, UNBIASED_SAMPLING, WITHOUT_EFFECT
from sapo_trl.cli.tables import all_tables
from sapo_trl.config import SAPOConfig
from sapo_trl.files import write_text
from sapo_trl.metrics.table import markdown_table

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
SMOLLM2 = RESULTS / "smollm2"


def treatment(name: str) -> str:
    """What happens to a field, in words, from the tables of this module."""
    users = users_of(name)
    parts = []
    if name in WITHOUT_EFFECT:
        return f"refused unless {' or '.join(map(str, WITHOUT_EFFECT[name][0]))}: {WITHOUT_EFFECT[name][1]}"
    if name in ("loss_type", "importance_sampling_level"):
        parts.append("follows from `algorithm`; another value is refused")
    if name in ("steps_per_generation", "generation_batch_size"):
        parts.append("follows from the batch plan; another value is refused")
    if name in NEEDS:
        needs = [
            f"`{need.other}` is {' or '.join(need.fixes)}" + (f", or `{need.instead}` is set," if need.instead else "")
            for need in NEEDS[name]
        ]
        parts.append(f"refused unless {' and '.join(needs)}")
    if users:
        parts.append(f"option of {', '.join(users)}; refused elsewhere")
    if name in UNBIASED_SAMPLING:
        parts.append(f"refused in training unless {UNBIASED_SAMPLING[name]}")
    if name in CHOICES:
        parts.append(", ".join(CHOICES[name]))
    if name in RANGES:
        parts.append(str(RANGES[name]))
    return "; ".join(parts) or "honoured"


def field_table(kind: Any) -> str:
    """A Markdown table of every field of a config class: its default, where it comes from, what happens to it."""
    lines = ["| field | default | from | what happens to it |", "|---|---|---|---|"]
    for f in sorted((f for f in fields(kind) if f.init), key=lambda f: f.name):
        owner = next(base for base in kind.__mro__ if f.name in vars(base).get("__annotations__", {}))
        default = f.default if f.default is not MISSING else f.default_factory()  # ty: ignore[not-callable]
        text = treatment(f.name).replace("|", "\\|")
        lines.append(f"| `{f.name}` | `{default}` | {owner.__module__.split('.')[0]} | {text} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "fields.md": ("Fields", "Every field of `SAPOConfig`, and what happens to it.", lambda: field_table(SAPOConfig)),
    "metrics.md": (
        "Metrics",
        "Every metric that a run logs. Reduction `mean`, `maximum`: over the packs and processes of an optimizer step; "
        "`derived`: from what is reduced; `host`: by the trainer.",
        markdown_table,
    ),
    "reproduction-runs.md": (
        "Runs of the reproduction",
        "What [the reproduction](reproduction.md) is read from: `runs.csv`, `rollouts.csv` and `lab.csv` in "
        "`docs/results/` and `docs/results/smollm2/`.",
        lambda: re.sub("(?m)^#", "##", f"{all_tables(RESULTS)}\n# The pretrained model\n\n{all_tables(SMOLLM2)}"),
    ),
}


def page(name: str) -> str:
    """The content of a generated page."""
    title, sentence, table = PAGES[name]
    return f"# {title}\n\n{sentence} Written by `python scripts/docs.py`.\n\n{table().rstrip()}\n"


if __name__ == "__main__":
    for name in PAGES:
        write_text(DOCS / name, page(name))
