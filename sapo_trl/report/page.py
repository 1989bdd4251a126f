"""The report's page and its parts as HTML. Everything that a run wrote passes through `text`, which escapes it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sapo_trl.report.runs import VISIBLE

MAX_CHARACTERS = 2000  # of a completion or a prompt

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --muted: #5b636d; --grid: #d5d9de; --band: #f5f6f8;
  --c0: #0072b2; --c1: #c65600; --c2: #00805a; --c3: #a54b84; --c4: #8a6608; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14171b; --ink: #e8eaed; --muted: #9aa4af; --grid: #343a42;
  --band: #1d2126; --c0: #4db1ec; --c1: #ff8a3d; --c2: #2fc795; --c3: #e08fc2; --c4: #d9ab3a; }}
  path[style*="stroke-opacity: 0.35"] {{ stroke-opacity: .6 !important; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.2rem; margin: 1.9rem 0 .3rem; }}
h3 {{ font-size: .95rem; margin: .8rem 0 .3rem; }} p, figcaption, .cut {{ color: var(--muted); margin: .2rem 0; }}
figcaption, table, article p, .note {{ font-size: .85rem; font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; width: max-content; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--grid);
  overflow-wrap: break-word; max-width: min(28rem, 60vw); }} th {{ color: var(--muted); font-weight: 600; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .4rem 1.6rem; }}
figure {{ margin: 0; max-width: 30rem; }} figure svg {{ display: block; width: 100%; height: auto; }}
pre {{ background: var(--band); padding: .7rem .8rem; margin: .3rem 0; white-space: pre-wrap; unicode-bidi: isolate;
  font: .85rem/1.45 ui-monospace, monospace; }}
summary {{ cursor: pointer; color: var(--muted); padding: .3rem 0; }} article {{ min-width: 0; }}
ul {{ margin: .3rem 0; padding-left: 1.1rem; }} li {{ margin: .2rem 0; }}
small {{ display: block; color: var(--muted); font-weight: 400; }}
</style></head><body><h1>{title}</h1><p>Written {written}</p>{body}</body></html>
"""


def escaped(value: Any, limit: int = MAX_CHARACTERS) -> str:
    """Untrusted content as HTML text: cut at `limit` characters with the count of the rest, escaped."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    rest = f'<span class="cut"> … {len(text) - limit:,} more characters</span>' if len(text) > limit else ""
    return html.escape(text[:limit].translate(VISIBLE)) + rest


def html_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls inside its own box; every cell is escaped, an empty string stays empty."""
    cells = lambda tag, row: "".join(f"<{tag}>{escaped(x)}</{tag}>" for x in row)  # noqa: E731
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><tr>{cells("th", header)}</tr>{body}</table></div>' if body else ""


def html_section(name: str, *parts: str) -> str:
    content = "".join(parts)
    return f"<section><h2>{html.escape(name)}</h2>{content}</section>" if content else ""


def grid(parts: Sequence[str]) -> str:
    """Pictures or texts side by side, as many as the window has room for."""
    return f'<div class="panels">{"".join(parts)}</div>' if parts else ""
