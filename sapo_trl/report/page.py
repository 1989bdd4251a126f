"""Rendering of the report: jinja2's environment, in which every text is escaped, and what the templates are given."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup

from sapo_trl.text import visible

MAX_CHARACTERS = 2000  # of a completion or a prompt


def escaped(value: Any, limit: int = MAX_CHARACTERS) -> Markup:
    """Untrusted content as HTML text: cut at `limit` characters with the count of the rest, escaped."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    rest = f'<span class="cut"> … {len(text) - limit:,} more characters</span>' if len(text) > limit else ""
    return Markup(html.escape(visible(text[:limit])) + rest)


class Picture(NamedTuple):
    """A figure as inline SVG; `name` is the logged name that it draws, where it draws one."""

    title: str
    svg: Markup
    caption: str
    name: str = ""


class Article(NamedTuple):
    """Texts that a model has read or written, (summary, text) each."""

    title: str
    facts: str
    texts: list[tuple[str, str]]


@dataclass
class Section:
    """What stands under one heading, in this order; `folded` pictures, and `details`, tables under their summaries, are
    folded away."""

    sentences: list[str] = field(default_factory=list)
    symbols: dict[str, str] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: list[Picture] = field(default_factory=list)
    details: dict[str, pd.DataFrame] = field(default_factory=dict)


def render(**content: Any) -> str:
    """`templates/page.html.j2`. Whatever an expression gives that is not markup passes through `escaped`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else escaped(value),
    )
    return environment.get_template("page.html.j2").render(content)
