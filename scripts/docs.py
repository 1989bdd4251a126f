"""Write the generated pages of the documentation: `python scripts/docs.py`. A test compares them with the code."""

from pathlib import Path

from sapo_trl.config import SAPOConfig
from sapo_trl.files import write_text
from sapo_trl.metrics.table import markdown_table
from sapo_trl.validation import field_table

PAGES = {
    "fields.md": ("Fields", "Every field of `SAPOConfig`, and what happens to it.", lambda: field_table(SAPOConfig)),
    "metrics.md": ("Metrics", "Every metric that a run logs.", markdown_table),
}


def page(name: str) -> str:
    """The content of a generated page."""
    title, sentence, table = PAGES[name]
    return f"# {title}\n\n{sentence} Written by `python scripts/docs.py`.\n\n{table().rstrip()}\n"


if __name__ == "__main__":
    for name in PAGES:
        write_text(Path(__file__).parents[1] / "docs" / name, page(name))
