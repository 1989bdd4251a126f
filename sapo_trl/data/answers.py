"""A reference answer as text, whatever type its column has."""

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from sapo_trl.rewards.grading.texts import listed_texts


def answer_text(value: Any, column: str = "answer") -> str | None:
    """The text of a reference answer; None when there is none.

    Text is stripped; a number is written out, a float as the shortest decimal that stands for it. A list, or the text
    of a list of texts, says "any one of these": its only item, or the list as JSON, which rewards read in the same way.
    An empty text, null, NaN and an infinite number, such as what is too large for a float, are no answer.

    >>> answer_text(142.0), answer_text(1e23), answer_text([7, None]), answer_text(" x+1 "), answer_text("")
    ('142', '100000000000000000000000', '7', 'x+1', None)
    >>> answer_text(["0.5", "1/2"]), answer_text("[3, 4]")  # the second is an interval
    ('["0.5", "1/2"]', '[3, 4]')
    """
    if value is None or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return np.format_float_positional(value + 0.0, trim="-")  # + 0.0: no minus before a zero
    if (items := answer_items(value)) is not None:
        texts = list(dict.fromkeys(text for item in items for text in _alternatives(item, column)))
        return json.dumps(texts, ensure_ascii=False) if len(texts) > 1 else texts[0] if texts else None
    if isinstance(value, str | int):
        return str(value).strip() or None
    if isinstance(value, Decimal):
        return f"{value:f}"
    raise ValueError(f"{column} holds {type(value).__name__}, and an answer is text, a number or a list of them.")


def answer_items(value: Any) -> list | None:
    """The items of an answer that is a list, or the text of a list of texts; None for any other."""
    return listed_texts(value.strip()) if isinstance(value, str) else value if isinstance(value, list) else None


def _alternatives(item: Any, column: str) -> list[str]:
    """The texts that an item of a list stands for: one, those of a list inside the list, or none."""
    text = answer_text(item, column)
    return [] if text is None else listed_texts(text) or [text]


def decimal_cells(cells: list, kind: pa.DataType) -> list:
    """Cells of an Arrow type, numbers of single or half precision as the shortest decimal that they stand for.

    A column of type float32 holds 0.1 as 0.10000000149, which no completion would ever say.

    >>> decimal_cells(pa.array([0.1, None], pa.float32()).to_pylist(), pa.float32())
    [0.1, None]
    """
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [None if cell is None else decimal_cells(cell, kind.value_type) for cell in cells]
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        narrow = np.float32 if kind.bit_width == 32 else np.float16
        return [None if cell is None else float(str(narrow(cell))) for cell in cells]
    return cells
