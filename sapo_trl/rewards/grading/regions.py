r"""Sets of real numbers are equal when they hold the same of their ends and of the numbers between and beyond those.

So `x \neq 0` and `\mathbb{R} \setminus \{0\}` need no rule for each pair of spellings.
"""

from collections.abc import Callable
from itertools import islice, pairwise

import mpmath

from sapo_trl.rewards.grading.tree import Node, names_in, negative, number, walk
from sapo_trl.rewards.grading.values import Value, points, real_value

MAX_POINTS = 3
_EVERYTHING = ("all real numbers", "all real number", "all reals", "real numbers", "reals")
_SURELY = ("relation", "union", "intersection", "difference", "numbers", "infinity", "builder")
_INFINITIES = {Node("infinity"): mpmath.inf, negative(Node("infinity")): -mpmath.inf}


class _NoSetError(Exception):
    pass


def same_region(gold: Node, answer: Node) -> bool | None:
    """Whether two trees describe one set of real numbers; None where they are not surely sets."""
    if not _is_surely_set(gold) and not _is_surely_set(answer):
        return None
    names = [_variable(node) for node in (gold, answer)]
    try:
        with mpmath.workprec(200):
            for point in islice(points(names_in(gold) | names_in(answer)), MAX_POINTS):
                parts = [part for node in (gold, answer, number(0)) for part in walk(node)]
                values = {real_value(part, point) for part in parts} - {None}
                ends = sorted({sign * mpmath.mp.convert(value) for value in values for sign in (1, -1)})
                between = [(low + high) / 2 for low, high in pairwise(ends) if not _equal(low, high)]
                tried = [*ends, *between, ends[0] - 1, ends[-1] + 1]
                if _members(gold, tried, point) != _members(answer, tried, point):
                    return False
        return None in names or names[0] == names[1]
    except _NoSetError:
        return None


def _is_surely_set(node: Node) -> bool:
    """False for what may be a tuple or a list of values as well, such as (1, 2)."""
    french = any(op == "bracket" and (args[0] == "]" or args[1] == "[") for op, args in walk(node))
    words = node.op == "text" and node.args[0] in ("empty set", *_EVERYTHING)
    return words or french or any(part.op in _SURELY for part in walk(node))


def _variable(node: Node) -> str | None:
    """The name that the first inequality in a tree is about: x in x > 2, 1 < x < 2 and |x| < 3."""
    members = next((part.args[1] for part in walk(node) if part.op == "relation"), ())
    sides = members[1:2] if len(members) == 3 else members
    about = [side for side in sides if side.op == "name" or (side.op == "call" and side.args[0] == "fabs")]
    name = about[0].args[-1] if about else None
    return name.args[0] if isinstance(name, Node) and name.op == "name" else name if isinstance(name, str) else None


def _members(node: Node, tried: list[Value], point: dict[str, Value]) -> list[bool]:
    """Which numbers the set holds. x > 1, x < 3 is what lies between; x < 1, x > 3 is what lies outside."""
    between = [_holds(node, x, point, all) for x in tried]
    return between if any(between) else [_holds(node, x, point, any) for x in tried]


def _holds(node: Node, x: Value, point: dict[str, Value], join: Callable) -> bool:
    op, args = node
    if op == "numbers" and args[0] in ("R", "R+", "R0+"):
        return args[0] == "R" or x > 0 or (x == 0 and args[0] == "R0+")
    if op == "text" and args[0] in ("empty set", *_EVERYTHING):
        return args[0] != "empty set"
    if op == "bracket" and len(args[2]) == 2:
        low, high = (_end(end, point) for end in args[2])
        return _satisfied("leq" if args[0] == "[" else "<", low, x) and _satisfied(
            "leq" if args[1] == "]" else "<", x, high
        )
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
        raise _NoSetError
    if args[0] == ("in",):
        return _holds(args[1][1], x, point, join)
    sides = [_end(side, point | {name: x}) for side in args[1]]
    return all(map(_satisfied, args[0], sides, sides[1:]))


def _end(node: Node, point: dict[str, Value]) -> Value:
    value = _INFINITIES[node] if node in _INFINITIES else real_value(node, point)
    if value is None:
        raise _NoSetError
    return mpmath.mp.convert(value)


def _equal(a: Value, b: Value) -> bool:
    return a == b or abs(a - b) < max(abs(a), abs(b)) * mpmath.mpf(2) ** -90


def _satisfied(operator: str, left: Value, right: Value) -> bool:
    if operator not in ("<", ">", "leq", "geq", "neq"):
        raise _NoSetError
    if _equal(left, right):
        return operator in ("leq", "geq")
    return operator == "neq" or (left < right) == (operator in ("<", "leq"))
