"""One spelling for each thing that mathematicians write in many ways: strings in, strings or fractions out.

Nothing here evaluates anything: rewriting is linear in the text, and numbers become `Fraction`s only while they are
short. What is left afterwards either is a number, or goes to the computer algebra system in the worker process.
"""

import re
from fractions import Fraction

MAX_DIGITS = 400  # longer numbers, and larger powers of ten, are left to the symbolic comparison and its deadline

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "∈": r"\in ", "θ": r"\theta ", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "²": "^2", "³": "^3",
    "ℝ": r"\mathbb{R}", "，": ",", "．": ".", "（": "(", "）": ")", "％": "%",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "",
    "“": '"', "”": '"', "’": "'", "…": r"\ldots ",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)

# (pattern, replacement), applied in this order
_SPELLINGS = [
    (r"(?<!\\)\$|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]", ""),  # delimiters of formulas
    (
        r"\\(?:displaystyle|textstyle|limits|nolimits|boldsymbol|bm)(?![a-zA-Z])|\\!|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?",
        "",
    ),
    (r"(?<=\d)(?:(?<!\\)\\[, ]|~|\{,\})(?=\d{3}(?!\d))", ","),  # thousands
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}|\\phantom\{[^{}]*\}", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (
        r"\\(?:text(?:bf|it|rm|normal)|math(?:rm|bf|it|sf)|operatorname|mbox|hbox|rm|underline)\s*\{",
        r"\\text{",
    ),
    (r"\\text\{\s*\}", " "),
    (r"\\(?:textcolor|color)\s*\{[a-zA-Z]{1,20}\}", ""),
    (r"^\s*\\text\{\s*(?:[tT]he )?(?:[fF]inal )?[aA]nswer(?: is)?\s*:?\s*\}\s*:?", ""),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"(?<=\d)\s?(?:\\text\{\s?to\s?\}|(?<=\s)to(?=\s))\s?(?=\d)", ":"),
    (r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q"),
    (r"\\leqslant(?![a-zA-Z])", r"\\leq"),
    (r"\\geqslant(?![a-zA-Z])", r"\\geq"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"\\(?:lbrace|rbrace)(?![a-zA-Z])", lambda m: r"\{" if m.group() == r"\lbrace" else r"\}"),
    (r"\\varnothing(?![a-zA-Z])|\\O(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\%", "%"),
    (r"(?<=\d)\s{0,3}(?:\\text\{\s*)?\b(?:percent|pct|percentage)\b(?:\s*\})?", "%"),
    (r"\^\s?\{\s?\\circ\s?\}|\\degree(?![a-zA-Z])|(?:\\text\{)?\s?\bdegrees?\b(?:\})?", r"^\\circ "),
    (r"\\(?:dot|overline|bar)\s*(?=\d)", r"\\overline"),
    (r"\\(?:infin|infty)(?![a-zA-Z])|\binfinity\b", r"\\infty "),
    (r"\+\s?\\infty", r"\\infty"),
    (r"\\(?:R|reals|Reals)(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\\frac\s{0,3}(\d)\s{0,3}(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s{0,3}(\d)\s{0,3}\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})\s{0,3}(\d)", r"\1{\2}"),
    (r"\\sqrt\s{0,3}(\d)", r"\\sqrt{\1}"),
    (r"\\log_(\d)\s?(\d+)", r"\\log_{\1}{\2}"),
    (r"√\s?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√\s?(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(sin|cos|tan|log|ln)(?=[\s(\\^_])", r"\\\1"),
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\w.])", r"\1\\times 10^{\2}"),
    (r"\*\*", "^"),
    (r"\\ast(?![a-zA-Z])|\*", r"\\cdot "),
]
_SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]
# a formula set in bold or underlined as a whole; words stay in their \text
_STYLED = re.compile(r"\\text\{((?=.*[\d\\^])(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_OUTER_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)


def respell(text: str) -> str:
    r"""The same answer in this package's spelling.

    >>> respell(r"$\dfrac12$."), respell("3e5"), respell(r"300\,000")
    ('\\frac{1}{2}', '3\\times 10^{5}', '300,000')
    """
    for _ in range(3):  # \boxed{\boxed{5}} is 5; nobody means more than that
        inner = _OUTER_BOX.fullmatch(text.strip(" $"))
        if not inner:
            break
        text = inner.group(1)
    text = text.translate(_UNICODE_TABLE)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).rstrip(" .,;:")
    if styled := _STYLED.fullmatch(text):
        text = styled.group(1).strip()
    return text.removesuffix("\\").rstrip()


_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_SIGN = r"(?:[+-]\s?)?"
_DECIMAL = re.compile(rf"({_SIGN})({_NUMBER})")
_SPACED = re.compile(rf"{_SIGN}\d{{1,3}}(?: \d{{3}})+(?:\.\d+)?")
_SCIENTIFIC = re.compile(rf"({_SIGN})(?:({_NUMBER})\s?\\(?:times|cdot)\s?)?10\s?\^\s?(?:\{{\s?({_SIGN}\d+)\s?\}}|(\d))")
_FRACTION = re.compile(
    rf"({_SIGN})(?:(\d+)\s?)?\\frac\s?\{{\s?({_SIGN}(?:{_NUMBER}))\s?\}}\s?\{{\s?({_SIGN}(?:{_NUMBER}))\s?\}}"
)
_SLASH = re.compile(rf"({_SIGN})(?:(\d+) )?\(?({_SIGN}(?:{_NUMBER}))\s?/\s?({_NUMBER})\)?")
_REPEATING = re.compile(rf"({_SIGN})(\d*)\.(\d*)(?:\\overline\s?\{{\s?(\d+)\s?\}}|\\overline(\d)|\((\d+)\))")


def _plain(sign: str, digits: str) -> Fraction:
    value = Fraction(digits.replace(",", "").replace(" ", "").removesuffix("."))
    return -value if sign.strip() == "-" else value


def _signed(text: str) -> Fraction:
    text = text.replace(" ", "")
    return _plain(text[0] if text[0] in "+-" else "", text.lstrip("+-"))


def exact_number(text: str) -> Fraction | None:
    r"""The number that a respelled text denotes, if it is a short literal: decimal, fraction, mixed, repeating.

    >>> exact_number("-1,234.50"), exact_number(r"2\frac{1}{2}"), exact_number(r"0.\overline{3}"), exact_number("2x")
    (Fraction(-2469, 2), Fraction(5, 2), Fraction(1, 3), None)
    """
    if len(text) > MAX_DIGITS:
        return None
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if match := _DECIMAL.fullmatch(text):
        return _plain(*match.groups())
    if match := _SCIENTIFIC.fullmatch(text):
        sign, digits, braced, bare = match.groups()
        power = int((braced or bare).replace(" ", ""))
        return _plain(sign, digits or "1") * Fraction(10) ** power if abs(power) <= MAX_DIGITS else None
    if match := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        return _mixed(sign, whole, _signed(top), _signed(bottom))
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, *periods = match.groups()
        return _repeating(sign, whole, fixed, next(period for period in periods if period))
    return None


def _mixed(sign: str, whole: str | None, top: Fraction, bottom: Fraction) -> Fraction | None:
    if bottom == 0:
        return None
    value = int(whole or 0) + top / bottom
    return -value if sign.strip() == "-" else value


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    """0.1(6) = (16 - 1) / 90: the digits with one period, minus the digits without, over 99…9 0…0."""
    difference = int((whole or "0") + fixed + period) - int((whole or "0") + fixed)
    value = Fraction(difference, (10 ** len(period) - 1) * 10 ** len(fixed))
    return -value if sign.strip() == "-" else value


def split_top(text: str, separators: str) -> list[str]:
    r"""Parts between separators that stand in no bracket of any kind.

    >>> split_top(r"(1,2), \{3,4\}", ",")
    ['(1,2)', '\\{3,4\\}']
    """
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in separators and depth <= 0 and text[index - 1 : index] != "\\":
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]]]


def balanced(text: str) -> bool:
    """Whether braces pair up; round and square brackets may mix, as half-open intervals do."""
    depth = round_depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        round_depth += (char in "([") - (char in ")]")
        if depth < 0 or round_depth < 0:
            return False
    return depth == 0 and round_depth == 0
