"""The report's completions: best, worst and longest of the last table, and answers that changed between two tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sapo_trl.report.page import Article
from sapo_trl.report.runs import Run
from sapo_trl.text import visible


def completion_tables(run: Run) -> list[Path]:
    """The readable tables of completions in order; the last one may be half-written."""
    return [path for path in sorted((run.folder / "completions").glob("completions_*.parquet")) if _is_readable(path)]


def _is_readable(path: Path) -> bool:
    try:
        return bool(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):
        return False


def _rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return pq.read_table(path, columns=columns).to_pylist()


PICTURE = "[picture]"


def transcript(value: Any) -> str:
    """A prompt or completion as text; chat messages are joined with their roles, and a picture is `PICTURE`."""
    if isinstance(value, list):
        return "\n".join(
            f"[{m.get('role')}] {_said(m.get('content'))}" if isinstance(m, dict) else str(m) for m in value
        )
    return str(value)


def _said(content: Any) -> str:
    """A message's content, which may be parts of text and pictures."""
    if not isinstance(content, list):
        return str(content)
    return " ".join(PICTURE if part["type"] == "image" else str(part["text"]) for part in content)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _article(title: str, facts: str, *answers: tuple[str, dict[str, Any]]) -> Article:
    """The prompt of the first row, and the completion of each (summary, row)."""
    texts = [(summary, transcript(row["completion"])) for summary, row in answers]
    return Article(title, facts, [("Prompt", transcript(answers[0][1].get("prompt", ""))), *texts])


def reward_columns(run: Run, columns: Iterable[str]) -> list[str]:
    """The reward columns of a table: those whose mean the run has logged, else those with `reward` in their names."""
    columns = list(columns)
    logged = [name for name in columns if f"rewards/{visible(name)}/mean" in run.names]
    return logged or [name for name in columns if "reward" in name]


def extremes(run: Run, of: str) -> list[Article]:
    """The best, the worst and the longest completion of the last table, by the sum of its reward columns."""
    rows = [row for path in completion_tables(run)[-1:] for row in _rows(path)]
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "advantage")]
    numeric = [name for name in names if any(isinstance(row[name], int | float) for row in rows)]
    rewards = reward_columns(run, numeric) or numeric
    number = lambda x: x if _is_number(x) else 0.0  # noqa: E731  (a reward function may give None)
    score = lambda row: (sum(number(row[name]) for name in rewards), number(row.get("advantage")))  # noqa: E731
    length = lambda row: len(transcript(row["completion"]))  # noqa: E731
    found = (("Best", max, score), ("Worst", min, score), ("Longest", max, length)) if rows else ()
    chosen = [(name + of, end(rows, key=key)) for name, end, key in found]
    return [_article(title, _facts(row, rewards), ("Completion", row)) for title, row in chosen]


def _facts(row: dict[str, Any], rewards: Sequence[str]) -> str:
    """Step, rewards, advantage and verdict of a row, as far as it has them."""
    known = [key for key in ("step", *rewards, "advantage") if key in row]
    facts = [f"{key} {'none' if row[key] is None else format(row[key], '.4g')}" for key in known]
    facts += [f"{key} {row[key]}" for key in ("verdict", "extracted_answer") if row.get(key) is not None]
    return ", ".join([*facts, f"{len(transcript(row['completion'])):,} characters"])


def zero_one_column(run: Run, path: Path) -> str | None:
    """A reward column of the table that holds 0 and 1 only, accuracy before others."""
    rows = _rows(path)
    values = {name: {row[name] for row in rows if _is_number(row[name])} for name in reward_columns(run, rows[0])}
    found = [name for name, x in values.items() if x and x <= {0, 1}]
    return min(found, key=lambda name: "accuracy" not in name, default=None)


def flips(paths: Sequence[Path], column: str) -> pd.DataFrame:
    """By prompt answered in at least two tables: the `early` and the `late` one, and the shares of right answers there.

    Without those that have a picture, which no table holds: the same words may be about another one.
    Columns: early, late, early_right_frac, late_right_frac. `column` is right where it is 1. Only it and the prompt are
    read.
    """
    paths = [path for path in paths if {"prompt", "completion", column} <= set(pq.read_schema(path).names)]
    every = pd.concat(pd.DataFrame(_rows(path, ["prompt", column])).assign(path=path) for path in paths)
    graded = every[every[column].isin([0.0, 1.0])]  # neither None nor NaN: answers that could be graded
    graded = graded.assign(prompt=graded["prompt"].map(transcript))
    graded = graded[~graded["prompt"].str.contains(PICTURE, regex=False)]
    shares = graded.groupby(["prompt", "path"], sort=False)[column].mean().rename("right").reset_index("path")
    ends = shares.groupby("prompt", sort=False).agg(
        early=("path", "first"),
        late=("path", "last"),
        early_right_frac=("right", "first"),
        late_right_frac=("right", "last"),
    )
    return ends[ends["early"] != ends["late"]]


def flipped(run: Run, of: str) -> tuple[str, list[Article]]:
    """A prompt answered wrongly at first and rightly at last, one the other way round, and how many there are."""
    paths = completion_tables(run)
    if not paths:
        return "", []
    if (column := zero_one_column(run, paths[-1])) is None:
        return f"No table{of} has a reward of 0 and 1, so none is right or wrong.", []
    ends = flips(paths, column)
    change = ends["late_right_frac"] - ends["early_right_frac"]
    counts = (
        f"Prompts answered in more than one table{of}: {len(ends)}. Of these {(change > 0).sum()} are answered rightly "
        f"more often in their last table than in their first, {(change < 0).sum()} less often."
    )
    kinds = (("Wrong, then right", change[change > 0], 1.0), ("Right, then wrong", -change[change < 0], 0.0))
    return counts, [_flip(title + of, ends.loc[x.idxmax()], column, end) for title, x, end in kinds if len(x)]


def _flip(title: str, ends: pd.Series, column: str, late: float) -> Article:
    """An early answer of the prompt and a late one, with the rewards 1 - `late` and `late`."""
    facts = f"largest change: {ends['early_right_frac']:.0%} → {ends['late_right_frac']:.0%} of its answers right"
    answers = []
    for end, wanted in (("early", 1.0 - late), ("late", late)):
        rows = (row for row in _rows(ends[end]) if transcript(row["prompt"]) == ends.name and row[column] == wanted)
        row = next(rows)
        answers.append((f"Step {row.get('step', '?')}: an {end} answer".replace("an late", "a late"), row))
    return _article(title, facts, *answers)
