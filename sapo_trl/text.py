"""Texts of models and files as a terminal or a page may show them."""

# Control characters except tab and newline, marks that reorder the text around them, and halves of surrogate pairs,
# which can't be encoded
_MARKS = (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE = {code: f"\\u{code:04x}" for code in (*_MARKS, *range(0xD800, 0xE000))}


def visible(text: str) -> str:
    r"""The text with control characters and direction marks written out, so that none is executed or hides another.

    >>> print(visible("red: \x1b[31m, bell: \x07"))
    red: \u001b[31m, bell: \u0007
    """
    return text.translate(VISIBLE)
