"""Are two expressions equal? Runs in a worker process only: this is where sympy can hang, and where it may be killed.

Expressions are parsed by math-verify's LaTeX parser and compared by their difference at rational points: exactly where
the difference is rational, to 70 digits otherwise. Unlike rounding to six decimals this separates 1e-7 from 2e-7, and
unlike `simplify` it is quick. What cannot be evaluated (sets, intervals, functions without a value) is left to
math-verify's own comparison.
"""

import re
from fractions import Fraction
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from sympy import Abs, Basic, Float, I, MatrixBase, Rational, nan, oo, zoo

NEGLIGIBLE_DIGITS = 70  # a difference below 10^-70 of the values is no difference ...
WORKING_DIGITS = 120  # ... when cancellation is computed with this many digits
MIN_POINTS = 3

_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_CONVERSION = ConversionConfig(lowercase_symbols=False)
# Signs and sizes of every kind, so that |x|, sqrt(x²) and x differ somewhere; no integers, where too much is zero.
_POINTS = [(17, 13), (-11, 7), (29, 5), (3, 19), (-2, 23), (-41, 9), (31, 11), (7, 37)]
# What the parser reads as something else than what stands there, or drops without a word.
_MISREAD = re.compile(r"\\text|\\ldots|\\cdots|\\dots|\.\.\.|\d_|'|\?|:|\d\s+\d|\"|@|#|\x00|=|<|>|\\mid|,")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s?\^\\circ")
_MATRIX = re.compile(r"\\begin\{([pbvB]?matrix|array)\}")
_LONG_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")


@lru_cache(maxsize=512)
def to_sympy(text: str) -> Basic | MatrixBase | None:
    """The expression, with decimals as exact fractions and a free `i` as the imaginary unit; None if unreadable."""
    if not text or _LONG_WORD.search(_MATRIX.sub("", text)) or (_MISREAD.search(text) and not _MATRIX.search(text)):
        return None
    text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi }{180})", text)
    try:
        expression = latex2sympy(
            normalize_latex(text, _NORMALIZATION),
            is_real=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except MemoryError:
        raise
    except Exception:  # the parser raises whatever its grammar trips over; all of it means: this is no mathematics
        return None
    if not isinstance(expression, (Basic, MatrixBase)):
        return None
    return _exact(expression)


def _exact(expression: Basic | MatrixBase) -> Basic | MatrixBase:
    if isinstance(expression, MatrixBase):
        return expression.applyfunc(_exact)
    rational = {number: Rational(str(number)) for number in expression.atoms(Float)}
    imaginary = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    return expression.xreplace(rational).subs(dict.fromkeys(imaginary, I))


def expressions_equal(gold: str, answer: str) -> bool:
    """Whether two respelled expressions have the same value wherever they can be evaluated."""
    left, right = to_sympy(gold), to_sympy(answer)
    if left is None or right is None:
        return False
    if isinstance(left, MatrixBase) or isinstance(right, MatrixBase):
        return _matrices_equal(left, right)
    if left == right:
        return left not in (nan, zoo)
    if {left, right} & {oo, -oo, zoo, nan}:
        return False
    ratios = _compare_at_points(left, right, lambda a, b: _is_negligible(a - b, a, b))
    if ratios is None:
        return bool(verify([left], [right], float_rounding=30, numeric_precision=30, timeout_seconds=None))
    return ratios


def _matrices_equal(left: Basic | MatrixBase, right: Basic | MatrixBase) -> bool:
    if not (isinstance(left, MatrixBase) and isinstance(right, MatrixBase)) or left.shape != right.shape:
        return False
    pairs = zip(left.flat(), right.flat(), strict=True)
    return all(a == b or _compare_at_points(a, b, lambda x, y: _is_negligible(x - y, x, y)) for a, b in pairs)


def _compare_at_points(left: Basic, right: Basic, agree) -> bool | None:
    """Whether `agree` holds at every point where both sides have a value; None with too few such points."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    seen = 0
    for shift in range(len(_POINTS) if symbols else 1):
        values = {s: Rational(*_POINTS[(shift + 3 * k) % len(_POINTS)]) + k for k, s in enumerate(symbols)}
        verdict = _agree_at(left.subs(values), right.subs(values), agree)
        if verdict is False:
            return False
        seen += verdict is True
    return True if seen >= (MIN_POINTS if symbols else 1) else None


def _agree_at(left: Basic, right: Basic, agree) -> bool | None:
    try:
        left, right = left.doit(), right.doit()
        if any(value.has(oo, -oo, zoo, nan) or not _is_value(value) for value in (left, right)):
            return None
        return agree(left, right)
    except MemoryError:
        raise
    except Exception:  # no value at this point: a pole, a branch that sympy does not know
        return None


def _is_value(expression: Basic) -> bool:
    return bool(expression.is_number) and expression.is_commutative is not False


def _is_negligible(difference: Basic, *scale: Basic) -> bool:
    """Whether a number is zero: exactly if it is rational, else against the sizes it was computed from."""
    if difference.is_Rational:
        return bool(difference == 0)
    size = _size(difference)
    largest = max([_size(value) for value in scale], default=1)
    return bool(size <= Rational(1, 10**NEGLIGIBLE_DIGITS) * max(largest, Rational(1, 10**NEGLIGIBLE_DIGITS)))


def _size(value: Basic) -> Basic:
    size = Abs(value).evalf(20, maxn=WORKING_DIGITS)
    if not size.is_Float and not size.is_Rational:
        raise ValueError("not a number")
    return size


def approximate(text: str) -> Fraction | None:
    """A real number to some 30 digits, for rounding policies."""
    expression = to_sympy(text)
    if expression is None or isinstance(expression, MatrixBase) or not expression.is_number:
        return None
    value = expression.doit().evalf(30)
    return Fraction(str(value)) if value.is_Float or value.is_Rational else None


def equations_equal(gold: tuple[str, str], answer: tuple[str, str]) -> bool:
    """Whether two equations say the same: their differences of sides are multiples of each other by a constant.

    An equation without content (1 = 1) or without a solution set of its own equals nothing but its own text.
    """
    sides = [to_sympy(side) for side in (*gold, *answer)]
    if any(side is None or isinstance(side, MatrixBase) for side in sides):
        return False
    left, right = sides[0] - sides[1], sides[2] - sides[3]
    if not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    factors: list[Basic] = []

    def same_factor(a: Basic, b: Basic) -> bool:
        if _is_negligible(a, 1 + abs(a)) or _is_negligible(b, 1 + abs(b)):
            return _is_negligible(a, 1 + abs(a)) and _is_negligible(b, 1 + abs(b))
        factors.append(a / b)
        return _is_negligible(factors[-1] - factors[0], factors[0])

    return _compare_at_points(left, right, same_factor) is True and len(factors) >= MIN_POINTS


def sign_of_factor(gold: tuple[str, str], answer: tuple[str, str]) -> int:
    """Sign of the constant between two differences of sides, 0 if there is none: inequalities need it positive."""
    if not equations_equal(gold, answer):
        return 0
    left = to_sympy(gold[0]) - to_sympy(gold[1])
    right = to_sympy(answer[0]) - to_sympy(answer[1])
    values = {symbol: Rational(*_POINTS[0]) + k for k, symbol in enumerate(sorted(left.free_symbols, key=str))}
    return 1 if (left / right).subs(values) > 0 else -1
