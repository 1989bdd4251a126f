"""The report's completions: best, worst and longest of the last table, and answers that changed between two tables."""

from __future__ import annotations

import math
from typing import Any

from sapo_trl.report.page import escaped, grid
from sapo_trl.report.runs import Flip, Run, flips, last_completions, message_text


def _number(value: Any) -> float:
    """0 for what is no finite number (a reward function may give None)."""
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _facts(row: dict[str, Any], rewards: list[str]) -> str:
    """Step, rewards, advantage and verdict of a row, as far as it has them."""
    known = [key for key in ("step", *rewards, "advantage") if key in row]
    facts = [f"{key} {'none' if row[key] is None else format(row[key], '.4g')}" for key in known]
    facts += [f"{key} {row[key]}" for key in ("verdict", "extracted_answer") if row.get(key) is not None]
    return ", ".join([*facts, f"{len(message_text(row['completion'])):,} characters"])


def _article(name: str, facts: str, prompt: Any, *completions: tuple[str, Any]) -> str:
    parts = (("Prompt", prompt), *completions)
    texts = [
        f"<details open><summary>{summary}</summary><pre>{escaped(message_text(text))}</pre></details>"
        for summary, text in parts
    ]
    return f"<article><h3>{escaped(name)}</h3><p>{escaped(facts)}</p>{''.join(texts)}</article>"


def extremes(run: Run, of: str) -> str:
    """The best, the worst and the longest completion of the last table, by the sum of its reward columns."""
    rows = last_completions(run)
    if not rows:
        return ""
    numeric = [name for name in rows[0] if any(isinstance(row[name], int | float) for row in rows)]
    numeric = [name for name in numeric if name not in ("step", "advantage")]
    rewards = [name for name in numeric if "reward" in name] or numeric
    scores = [(sum(_number(row[name]) for name in rewards), _number(row.get("advantage"))) for row in rows]
    lengths = [len(message_text(row["completion"])) for row in rows]
    chosen = {"Best": scores.index(max(scores)), "Worst": scores.index(min(scores))}
    chosen["Longest"] = lengths.index(max(lengths))
    return grid(
        [
            _article(
                name + of, _facts(rows[i], rewards), rows[i].get("prompt", ""), ("Completion", rows[i]["completion"])
            )
            for name, i in chosen.items()
        ]
    )


def flipped(run: Run, of: str) -> str:
    """A prompt answered wrongly at first and rightly at last, one the other way round, and how many there are."""
    if not run.folder.joinpath("completions").exists():
        return ""
    if (found := flips(run)) is None:
        return f"<p>No table{escaped(of)} has a reward of 0 and 1, so none is right or wrong.</p>"
    counts = (
        f"Prompts answered in more than one table{escaped(of)}: {found.num_repeated}. Of these {found.num_better} are "
        f"answered rightly more often in their last table than in their first, {found.num_worse} less often."
    )
    pairs = (("Wrong, then right", found.better), ("Right, then wrong", found.worse))
    articles = [_flip(name + of, flip) for name, flip in pairs if flip is not None]
    return f"<p>{counts}</p>{grid(articles)}"


def _flip(name: str, flip: Flip) -> str:
    facts = f"largest change: {flip.early_right_frac:.0%} → {flip.late_right_frac:.0%} of its answers right"
    both = [
        (f"Step {escaped(row.get('step', '?'))}: {what}", row["completion"])
        for row, what in ((flip.early, "an early answer"), (flip.late, "a late answer"))
    ]
    return _article(name, facts, flip.early["prompt"], *both)
