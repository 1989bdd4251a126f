"""A reference answer as text, whatever type its column has."""

import ast
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa


def answer_text(value: Any, column: str = "answer") -> str | None:
    """The text of a reference answer; None when there is none.

    Text is stripped; an integer is written out; a float with an integral value is written as that integer and any other
    float as Python writes it; a list, or the text of a list of texts, is its items joined by ", ". An empty text, null
    and NaN are no answer.

    >>> answer_text(142.0), answer_text(0.5), answer_text([1, 2]), answer_text(" x+1 "), answer_text("")
    ('142', '0.5', '1, 2', 'x+1', None)
    >>> answer_text("['3', '4']"), answer_text("[3, 4]")  # the second is an interval
    ('3, 4', '[3, 4]')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = _listed_texts(value.strip()) or value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    if isinstance(value, list):
        parts = [answer_text(item, column) for item in value]
        return ", ".join(part for part in parts if part) or None
    raise ValueError(f"{column} holds {type(value).__name__}, and an answer is text, a number or a list of them.")


def _listed_texts(text: str) -> list[str] | None:
    r"""The items of `['3', '\\frac{1}{2}']`: a list of texts that Python or JSON wrote out. None for any other text.

    Only what comes out the same when it is written again: a hand-written backslash would be read as an escape.
    """
    if not (text.startswith(("['", '["')) and text.endswith(("']", '"]'))):
        return None
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        return None
    written = (str(items), json.dumps(items), json.dumps(items, ensure_ascii=False))
    return items if "".join(text.split()) in {"".join(form.split()) for form in written} else None


def decimal_cells(cells: list, kind: pa.DataType) -> list:
    """Cells of an Arrow type, numbers of single or half precision as the shortest decimal that they stand for.

    A column of type float32 holds 0.1 as 0.10000000149, which no completion would ever say.

    >>> decimal_cells(pa.array([0.1, None], pa.float32()).to_pylist(), pa.float32())
    [0.1, None]
    """
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [None if cell is None else decimal_cells(cell, kind.value_type) for cell in cells]
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        narrow = np.float32 if kind.bit_width == 32 else np.float16
        return [None if cell is None else float(str(narrow(cell))) for cell in cells]
    return cells
