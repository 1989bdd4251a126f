r"""Are two expressions, or two sets of real numbers, equal? Decided by values at rational points.

Rational values are exact. Other differences are zero if they vanish with the precision: no fixed number of digits tells
`e^{-400}` from 0. What has no value (an unknown function, an integral) gets one from its name and its parts' values.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Set
from itertools import islice, pairwise

import mpmath
from mpmath import mp, mpc, mpf
from mpmath.rational import mpq

from sapo_trl.rewards.grading.latex import FUNCTIONS
from sapo_trl.rewards.grading.tree import EMPTY_SET, Node, names_in, negative, walk

PRECISION, HIGH_PRECISION, MAX_PRECISION = 200, 512, 300_000  # bits
MAX_BITS = 60_000  # of an exact number; larger ones are computed in floating point
MAX_EXPONENT = 2**40  # of a number in floating point
MAX_TERMS, MAX_FACTORIAL, MAX_ROOT = 2_000, 5_000, 100
MIN_POINTS = 3
INTEGER_NAMES = frozenset("nkmjlNKM")
# Signs and sizes of every kind, so that |x|, sqrt(x^2) and x differ somewhere; no integers, where too much is zero.
_TOPS, _BOTTOMS = (17, -11, 3, 29, -2, 31, 7, -41, 5, 53, 13, -1), (13, 7, 19, 5, 23, 11, 37, 9, 8, 17, 29, 3)
_INTEGERS = (1, -1, 2, -2, 3, 4, 5, -3, 6, 7, 8, -4)
KNOWN_CALLS = FUNCTIONS | {"factorial", "fac2", "binomial", "floor", "ceil"}
_OF_INTEGERS = {
    "factorial": math.factorial, "fac2": lambda n: math.prod(range(n, 0, -2)), "binomial": math.comb, "gcd": math.gcd,
    "lcm": math.lcm, "max": max, "min": min, "mod": lambda a, b: a % b,
}  # fmt: skip
_ARITHMETIC = {
    "add": lambda a, b: a + b, "negative": lambda a: -a, "times": lambda a, b: a * b, "over": lambda a, b: _over(a, b),
    "percent": lambda a: a * mpq(1, 100), "power": lambda a, b: _power(a, b), "quantity": lambda a: a * mp.pi / 180,
    "root": lambda a, b: _power(a, _over(mpq(1, 1), b)), "transpose": lambda a: _mixed("transpose", [a]),
}  # fmt: skip
_SURELY = ("relation", "union", "intersection", "difference", "numbers", "infinity", "builder")
_INFINITIES = {Node("infinity"): mp.inf, negative(Node("infinity")): -mp.inf}
_NO_VALUE = (ArithmeticError, ValueError, TypeError, KeyError, RecursionError, mp.NoConvergence)

Value = mpq | mpf | mpc


class Evaluation:
    """Evaluates at one point, and remembers the largest and the smallest size on the way, as powers of two.

    Raises one of `_NO_VALUE` where an expression has no value, or a huge one.
    """

    def __init__(self, point: dict[str, Value]):
        self.point = point
        self.high = self.low = 0

    def __call__(self, node: Node) -> Value:
        value = self.compute(*node)
        if not mpmath.isfinite(value) or (value and abs(mpmath.mag(value)) > MAX_EXPONENT):
            raise OverflowError
        size = int(mpmath.mag(value)) if value else 0
        self.high, self.low = max(self.high, size), min(self.low, size)
        return value

    def compute(self, op: str, args: tuple) -> Value:
        if op == "number":
            return mpq(args[0].numerator, args[0].denominator)
        if op in ("name", "constant"):
            known = ({"e": +mp.e, "pi": +mp.pi, "i": mpc(0, 1)} if op == "constant" else {}) | self.point
            return known[args[0]] if args[0] in known else _mixed(args[0], [])
        if op == "operator" and args[0] in ("sum", "prod", "lim"):
            return self.bound(*args)
        if op == "quantity" and args[1] != "degree":
            raise ValueError
        if op == "fixed":  # the value at one and the same point
            return Evaluation(next(points(names_in(args[0]))))(args[0])
        values = [self(arg) for arg in args if isinstance(arg, Node) and arg.op != "text"]
        return _call(args[0], values) if op in ("call", "operator") else _ARITHMETIC[op](*values)

    def bound(self, name: str, below: Node, above: Node, body: Node) -> Value:
        """A sum or product between integers; of any other, and of a limit, a mixture of its parts."""
        index, start = below.args[1] if below.op == "relation" else (below, below)
        ends = [self(end) for end in (start, above) if end.op not in ("infinity", "text", "relation")]
        whole = name != "lim" and len(ends) == 2 and all(map(_is_integer, ends))
        steps = range(int(ends[0]), int(ends[1]) + 1) if whole else (mpq(23, 17),)
        if not 0 < len(steps) <= MAX_TERMS:
            raise OverflowError
        outer, terms = self.point, []
        for step in steps:
            self.point = outer | {index.args[0]: mpq(step, 1)}
            terms.append(self(body))
        self.point = outer
        if not whole:
            return _mixed(name, [*ends, *terms])
        return math.prod(terms, start=mpq(1, 1)) if name == "prod" else sum(terms, mpq(0, 1))


def _call(name: str, values: list[Value]) -> Value:
    whole = [int(value) for value in values if _is_integer(value)]
    if name in _OF_INTEGERS and len(whole) == len(values) and (name == "mod" or max(whole) <= MAX_FACTORIAL):
        return mpq(_OF_INTEGERS[name](*whole), 1)
    if any(mpmath.mag(value) > MAX_PRECISION for value in values):  # its sine needs all its digits
        raise OverflowError
    ordered = sorted(values, key=mp.convert) if name in ("max", "min", "gcd", "lcm") else values
    return getattr(mp, name)(*values) if name in KNOWN_CALLS else _mixed(name, ordered)


def _is_integer(value: Value) -> bool:
    return isinstance(value, mpq) and value._mpq_[1] == 1


def _over(top: Value, bottom: Value) -> Value:
    if bottom == 0:
        raise ZeroDivisionError
    return top * bottom**-1


def _power(base: Value, exponent: Value) -> Value:
    """A power; roots of odd order of a negative number are real, as they are at school."""
    if base == 0:
        return base if mp.re(exponent) > 0 else _over(mpq(1, 1), base)
    if isinstance(exponent, mpq):
        top, bottom = exponent._mpq_
        if isinstance(base, mpq) and bottom == 1 and max(map(int.bit_length, base._mpq_)) * abs(top) <= MAX_BITS:
            return base**top
        base = mp.convert(base)
        if bottom % 2 and isinstance(base, mpf) and base < 0:
            return (-1) ** top * _power(-base, exponent)
        if bottom <= MAX_ROOT:
            base, exponent = mp.root(base, bottom), top
    if abs(exponent) * (abs(mpmath.mag(base)) + 1) > MAX_EXPONENT:
        raise OverflowError
    return mp.power(base, exponent)


def _mixed(name: str, values: list[Value]) -> Value:
    """A value for what has none: different for different names and arguments, and smooth in the arguments."""
    seed = zlib.crc32(name.encode("utf-8", "replace"))
    terms = (_over(mpq(place + 2, 3), value + mpq(seed % 1009 + 2027, 1009)) for place, value in enumerate(values))
    return sum(terms, mpq(seed % 9973 + 1, 9973))


def same_number(left: Node, right: Node, point: dict[str, Value]) -> bool | None:
    """Whether two expressions agree at a point; None where one of them has no value."""
    precision = PRECISION
    try:
        for limit in (3, 2):
            with mpmath.workprec(precision):
                evaluation = Evaluation(point)
                gap = evaluation(left) - evaluation(right)
            near = not gap or mpmath.mag(gap) < evaluation.high - precision // limit + 32
            if isinstance(gap, mpq) or not near:
                return bool(gap == 0)
            precision = HIGH_PRECISION + 3 * (evaluation.high - evaluation.low)
            if precision > MAX_PRECISION:
                return None
        return True
    except _NO_VALUE:
        return None


def real_value(node: Node, point: dict[str, Value]) -> Value | None:
    """The value where it is a real number, to 60 digits if it is irrational."""
    try:
        with mpmath.workprec(PRECISION):
            value = Evaluation(point)(node)
            return value if not isinstance(value, mpc) else value.real if abs(value.imag) < mpf(2) ** -100 else None
    except _NO_VALUE:
        return None


def points(names: Set[str], integers: Set[str] = frozenset()) -> Iterator[dict[str, Value]]:
    """The points to compare at; names in `integers` get integers there."""
    for shift in range(len(_TOPS) if names else 1):
        places = [(place, name, (shift + 5 * place) % len(_TOPS)) for place, name in enumerate(sorted(names))]
        yield {
            name: mpq(_INTEGERS[at], 1) if name in integers else mpq(_TOPS[at] + place * _BOTTOMS[at], _BOTTOMS[at])
            for place, name, at in places
        }


def same_expression(gold: Node, answer: Node, integers: Set[str] = frozenset()) -> bool:
    """Whether two expressions agree wherever the first one has a real value (any value, if that is nowhere)."""
    names = names_in(gold) | names_in(answer)
    whole = names & (integers | INTEGER_NAMES)
    return _agree(gold, answer, names, set()) or (bool(whole) and _agree(gold, answer, names, whole))


def _agree(gold: Node, answer: Node, names: Set[str], integers: Set[str]) -> bool:
    real, others = 0, []
    for point in points(names, integers):
        same = same_number(gold, answer, point)
        is_real = real_value(gold, point) is not None
        if is_real and (same is False or (same is None and not integers and real_value(answer, point) is None)):
            return False
        real += is_real and same is True
        others += [same] * (same is not None and not is_real)
    needed = MIN_POINTS if names else 1
    return real >= needed or (all(others) and real + len(others) >= needed)


def same_equation(gold: Node, answer: Node) -> int:
    """Sign of the constant by which two differences of sides are multiples of each other; 0 if there is none."""
    fixed = [Node("fixed", (node,)) for node in (gold, answer)]
    factor = real_value(Node("over", tuple(fixed)), next(points(names_in(gold))))
    crossed = Node("times", (gold, fixed[1])), Node("times", (answer, fixed[0]))
    if not names_in(gold) or names_in(gold) != names_in(answer) or not factor or not same_expression(*crossed):
        return 0
    return 1 if mp.convert(factor) > 0 else -1


def same_region(gold: Node, answer: Node) -> bool | None:
    r"""Whether two trees describe one set of real numbers; None where they are not surely sets.

    They do if they hold the same of their ends and of the numbers between and beyond those: `x \neq 0` and
    `\mathbb{R} \setminus \{0\}` need no rule for each pair of spellings.
    """
    if not _is_surely_set(gold) and not _is_surely_set(answer):
        return None
    try:
        with mpmath.workprec(PRECISION):
            for point in islice(points(names_in(gold) | names_in(answer)), MIN_POINTS):
                values = {real_value(part, point) for tree in (gold, answer) for part in walk(tree)} - {None}
                ends = sorted({mpf(0)} | {sign * mp.convert(value) for value in values for sign in (1, -1)})
                tried = [*ends, *((low + high) / 2 for low, high in pairwise(ends)), ends[0] - 1, ends[-1] + 1]
                if _members(gold, tried, point, True) != _members(answer, tried, point, False):
                    return False
        return len({_variable(gold), _variable(answer)} - {None}) < 2
    except _NO_VALUE:
        return None


def _is_surely_set(node: Node) -> bool:
    """False for what may be a tuple or a list of values as well, such as (1, 2)."""
    french = any(op == "bracket" and (args[0] == "]" or args[1] == "[") for op, args in walk(node))
    return node == EMPTY_SET or french or any(part.op in _SURELY for part in walk(node))


def _variable(node: Node) -> str | None:
    """The name that the first inequality in a tree is about: x in x > 2, 1 < x < 2 and |x| < 3."""
    members = next((part.args[1] for part in walk(node) if part.op == "relation"), ())
    for side in members[1:2] if len(members) == 3 else members:
        name = side.args[1] if side.op == "call" and side.args[0] == "fabs" else side
        if name.op == "name":
            return name.args[0]
    return None


def _members(node: Node, tried: list[Value], point: dict[str, Value], is_gold: bool) -> list[bool]:
    """Which numbers the set holds. x > 1, x < 3 is what lies between; x < 1, x > 3 is what lies outside.

    An answer that says "x < 1 and x > 3" is empty; a reference that says so was not meant to be.
    """
    between = [_holds(node, x, point, all) for x in tried]
    if any(between) or (node.op == "list" and node.args[1] == "and" and not is_gold):
        return between
    return [_holds(node, x, point, any) for x in tried]


def _holds(node: Node, x: Value, point: dict[str, Value], join: Callable) -> bool:
    op, args = node
    if op == "numbers" and args[0] in ("R", "R+", "R0+"):
        return args[0] == "R" or x > 0 or (x == 0 and args[0] == "R0+")
    if op == "bracket" and len(args[2]) == 2:
        low, high = (_end(end, point) for end in args[2])
        operators = "leq" if args[0] == "[" else "<", "leq" if args[1] == "]" else "<"
        return all(map(_satisfied, operators, (low, x), (x, high)))
    if op == "set":
        return any(_equal(x, _end(part, point)) for part in args[0])
    if op == "builder":
        return _holds(args[1], x, point, join)
    if op in ("union", "intersection", "difference"):
        left, right = (_holds(part, x, point, join) for part in args)
        return {"union": left or right, "intersection": left and right, "difference": left and not right}[op]
    if op == "list" and all(part.op == "relation" for part in args[0]):
        return (any if args[1] == "or" else join)(_holds(part, x, point, join) for part in args[0])
    if op != "relation" or (name := _variable(node)) is None or sum(name in names_in(side) for side in args[1]) != 1:
        raise ValueError("no set of real numbers")
    if args[0] == ("in",):
        return _holds(args[1][1], x, point, join)
    sides = [_end(side, point | {name: x}) for side in args[1]]
    return all(map(_satisfied, args[0], sides, sides[1:]))


def _end(node: Node, point: dict[str, Value]) -> Value:
    return _INFINITIES[node] if node in _INFINITIES else mp.convert(real_value(node, point))  # no None: a TypeError


def _equal(a: Value, b: Value) -> bool:
    return a == b or abs(a - b) < max(abs(a), abs(b)) * mpf(2) ** -90


def _satisfied(operator: str, left: Value, right: Value) -> bool:
    if operator not in ("<", ">", "leq", "geq", "neq"):
        raise ValueError("no set of real numbers")
    if _equal(left, right):
        return operator in ("leq", "geq")
    return operator == "neq" or (left < right) == (operator in ("<", "leq"))
