"""Two trees are equal when they are of one kind and their parts agree: sets in any order, tuples in theirs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mpmath
from mpmath.rational import mpq

from sapo_trl.rewards.grading import values
from sapo_trl.rewards.grading.policy import GraderOptions
from sapo_trl.rewards.grading.tree import EMPTY_SET, NOTHING, OTHERWISE, Node, difference, names_in, number, walk
from sapo_trl.rewards.grading.words import SAME_TEXTS, vocabulary

MAX_BETWEEN = 100  # members that dots may stand for
_GROUPS = {"list", "set", "union", "bracket"}
_UNORDERED = {"list", "set", "union", "one"}
_UNVALUED = vocabulary("lim limsup liminf int iint iiint oint derivative sup inf tr det")
_UPWARDS = {">": "<", "geq": "leq", "<": "<", "leq": "leq"}


def is_name(node: Node) -> bool:
    """Whether a tree names a quantity, so that `name = value` states a value: x, f(2), AB, the area, (x, y)."""
    op, args = node
    if op == "times":
        return all(is_name(part) and (part.op == "times" or part.args[0][0].isupper()) for part in args)
    known = op == "call" and args[0] in values.KNOWN_CALLS and not (args[0] == "fabs" and is_name(args[1]))
    return (op in ("name", "text", "call") and not known) or (op == "bracket" and all(map(is_name, args[2])))


@dataclass(frozen=True)
class Comparison:
    """How two trees are compared. `integers` are names that were declared to be integers."""

    options: GraderOptions
    integers: frozenset[str] = frozenset()

    def same(self, gold: Node, answer: Node) -> bool:
        """Whether an answer says what the reference answer says."""
        ops = {gold.op, answer.op}
        if OTHERWISE in (gold, answer) or gold == answer:
            return True
        if (as_sets := values.same_region(gold, answer)) is not None:
            return as_sets
        if "relation" in ops:
            return self._same_relation(gold, answer)
        if "residue" in ops:
            return self._same_residue(gold, answer)
        if ops & {"matrix", "transpose"} and (left := _matrix(gold)) and (right := _matrix(answer)):
            return self._same_matrix(left, right, "bracket" in ops)
        if ops & _GROUPS:
            if ops == {"list"} and {gold.args[1], answer.args[1]} == {"and", "or"} and all(map(is_name, gold.args[0])):
                return False  # A and C, p and q; of numbers, "x = 1 and x = -1" names both solutions as well as "or"
            return self._same_group(*_group(gold), *_group(answer))
        if ops & {"text", "based"}:
            bare = self.options.bare_base and ops == {"based", "number"} and str(gold.args[0]) == str(answer.args[0])
            return bare or (ops == {"text"} and any({gold.args[0], answer.args[0]} <= group for group in SAME_TEXTS))
        return self._same_quantity(gold, answer)

    def _same_relation(self, gold: Node, answer: Node) -> bool:
        if gold.op != "relation":
            value = self._stated_value(answer, gold)
            return value is not None and self.same(gold, value)
        operators, members = gold.args
        if answer.op != "relation":
            states = set(operators) <= {"=", "approx"} and (is_name(members[0]) or not names_in(gold))
            values_of = members[max(is_name(members[0]), len(operators) - (operators[-1] == "approx")) :]
            return (states or operators == ("in",)) and any(self.same(value, answer) for value in values_of)
        others, other_members = answer.args
        if set(operators) == {"="} and set(others) <= {"=", "approx"}:
            return self._same_equation(gold, answer)
        if len(operators) == len(others) == 1 and {*operators, *others} <= {*_UPWARDS}:
            gaps = [difference(*(side[::-1] if op[0] in (">", "geq") else side)) for op, side in (gold[1], answer[1])]
            return _UPWARDS[operators[0]] == _UPWARDS[others[0]] and values.same_equation(*gaps) > 0
        return operators == others and self._same_sequence(members, other_members)

    def _same_equation(self, gold: Node, answer: Node) -> bool:
        """`x = 2` is met by x = 2, not by an equation that it solves; a curve is met by any of its equations."""
        sides, others = _name_first(gold.args[1]), _name_first(answer.args[1])
        if is_name(sides[0]):
            same_name = others[0] in (sides[0], Node("name", sides[0].args[:1]))  # f = 0 for f(x) = 0
            value = self._stated_value(answer, sides[-1]) if same_name else None
            if value is not None and self.same(sides[-1], value):
                return True
            if not names_in(sides[-1]) or sides[0].op != "name":
                return False
        return len(sides) == len(others) == 2 and values.same_equation(difference(*sides), difference(*others)) != 0

    def _stated_value(self, relation: Node, gold: Node) -> Node | None:
        """What a chain `quantity = ... = value` states: its last member, if every member that has a value agrees.

        Members with names that the value does not have are the quantity that was asked for: m + n = 256 + 37 = 293.
        """
        operators, members = relation.args[0], _name_first(relation.args[1])
        if operators == ("in",) and is_name(members[0]):
            return members[1]
        if operators[-1] == "approx" and (len(members) > 2 or not is_name(members[0])):
            if not _rounds_to(members[-2], members[-1]):
                return None
            members = members[-1:] if gold == members[-1] and _rounds_to(gold, gold, 3) else members[:-1]
        if set(operators[:-1]) - {"="} or operators[-1] not in ("=", "approx"):
            return None
        *before, value = members
        working = replace(self, options=replace(self.options, restated="evaluated"))
        for member in before:
            foreign = names_in(member) - names_in(value)
            member = Node("residue", (member, value.args[1])) if value.op == "residue" else member
            if not foreign and not _has_no_value(member) and not working.same(member, value):
                return None
        return value

    def _same_residue(self, gold: Node, answer: Node) -> bool:
        """`3 \\pmod 7` is 3, or 7k + 3 for any integer k; written with another number, that is below the modulus."""
        literal = answer.args[0] if answer.op == "residue" else answer
        literal = literal.args[0] if literal.op == "negative" else literal
        reduced = answer.op != "residue" or (literal.op == "number" and literal.args[0] < answer.args[1].args[0])
        sides = [node.args[0] if node.op == "residue" else node for node in (gold, answer)]
        same_modulus = gold.op != answer.op or self.same(gold.args[1], answer.args[1])
        return (same_modulus and self.same(*sides)) or (reduced and _same_family(gold, answer, self.integers | {"k"}))

    def _same_group(self, kind: str, parts: tuple[Node, ...], other_kind: str, others: tuple[Node, ...]) -> bool:
        parts, others, kinds = _without_dots(parts), _without_dots(others), {kind, other_kind}
        names, other_names = _names(parts), _names(others)
        if kind == "one" and other_kind == "list":  # "1/2 or 0.5" is one answer in two forms; x = 2, y = 2 are two
            return len(other_names) < 2 and all(self.same(parts[0], other) for other in others)
        if kinds == {"set", "()"}:  # {(1, 2)} for (1, 2)
            sides = (kind, parts), (other_kind, others)
            left, right = (_group(p[0]) if k == "set" and len(p) == 1 else (k, p) for k, p in sides)
            if left[0] == right[0]:
                return self._same_sequence(left[1], right[1])
        if kinds <= _UNORDERED:
            if names != other_names and len(names | other_names) > 1:  # x = 1, y = 2 against 1, 2
                return kinds == {"list"} and self._same_sequence(parts, others)
            same = self.same if "union" in kinds else self._same_member
            return (len(kinds) == 1 or EMPTY_SET not in (*parts, *others)) and self._same_elements(parts, others, same)
        if len(kinds) == 1 or (self.options.bare_list_as_tuple and kinds == {"()", "list"}):
            return self._same_sequence(parts, others)
        is_set = self.options.tuple_as_set and kinds <= {"()", "set", "list"}
        return is_set and self._same_elements(parts, others, self._same_member)

    def _same_sequence(self, parts: tuple[Node, ...], others: tuple[Node, ...]) -> bool:
        return len(parts) == len(others) and all(map(self._same_member, parts, others))

    def _same_member(self, gold: Node, answer: Node) -> bool:
        """{5} is an answer to 5, and no member of what 5 is a member of."""
        return (gold.op in ("set", "relation") or answer.op != "set") and self.same(gold, answer)

    def _same_elements(
        self, parts: tuple[Node, ...], others: tuple[Node, ...], same: Callable[[Node, Node], bool]
    ) -> bool:
        """The same elements in any order, each of the one met by one of the other."""
        left = list(dict.fromkeys(others))
        for part in dict.fromkeys(parts):
            match = next((other for other in left if same(part, other)), None)
            if match is None:
                return False
            left.remove(match)
        return not left

    def _same_matrix(self, left: list[tuple[Node, ...]], right: list[tuple[Node, ...]], as_vectors: bool) -> bool:
        shapes = [(len(rows), len(rows[0])) for rows in (left, right)]
        if as_vectors and all(1 in shape for shape in shapes):  # (1, 2) is a vector, upright or lying
            shapes = [(max(shape),) for shape in shapes]
        return shapes[0] == shapes[1] and self._same_sequence(sum(left, ()), sum(right, ()))

    def _same_quantity(self, gold: Node, answer: Node) -> bool:
        """Values with units: the units must not contradict each other, and the values must agree."""
        (value, unit), (other, other_unit) = self._quantity(gold), self._quantity(answer)
        units = {unit, other_unit}
        if len(units) == 1:
            return self._same_leaf(value, other)
        if "degree" in units and units <= {"degree", "radian", None}:
            angles = [Node("quantity", (v, u)) if u == "degree" else v for v, u in ((value, unit), (other, other_unit))]
            same = self._same_leaf(*angles) or (None in units and self._same_leaf(value, other))
            return self.options.degrees == "optional" and same
        return None in units and self.options.units == "optional" and self._same_leaf(value, other)

    def _quantity(self, node: Node) -> tuple[Node, str | None]:
        """(value, unit), with per cent and degrees turned into what the policy says they are."""
        op, args = node
        if op == "percent" and self.options.percent == "same_number":
            return args[0], None
        in_radians = op == "quantity" and args[1] == "degree" and self.options.degrees == "radians"
        return args if op == "quantity" and not in_radians else (node, None)

    def _same_leaf(self, gold: Node, answer: Node) -> bool:
        """Two expressions. An answer that leaves an operator undone which the reference does not have is none."""
        undone = {part.args[0] for part in walk(answer) if part.op == "operator"}
        if self.options.restated == "refused" and undone - {p.args[0] for p in walk(gold) if p.op == "operator"}:
            return False
        integers, periodic = self.integers, self.integers or Node("constant", ("pi",)) in walk(gold)
        if values.same_expression(gold, answer, integers) or (periodic and _same_family(gold, answer, integers)):
            return True
        names, gap = names_in(gold), difference(gold, answer)
        if gold.op == "add" and Node("name", ("C",)) in gold.args and names == names_in(answer) == {"C", max(names)}:
            return values.same_expression(gap, Node("fixed", (gap,)))  # a constant of integration takes up any other
        return self.options.decimals == "rounded" and (_rounds_to(gold, answer, 3) or _rounds_to(answer, gold, 3))


def _group(node: Node) -> tuple[str, tuple[Node, ...]]:
    """Kind and parts: list, set, union, the two brackets of a tuple or interval, or `one`."""
    if node.op == "bracket":
        return node.args[0] + node.args[1], node.args[2]
    if node.op == "union":
        return "union", sum((_group(side)[1] if side.op == "union" else (side,) for side in node.args), ())
    return (node.op, node.args[0]) if node.op in ("list", "set") else ("one", (node,))


def _without_dots(parts: tuple[Node, ...]) -> tuple[Node, ...]:
    """0, 1, ..., 4 as 0, 1, 2, 3, 4, and 1, 2, 3, ..., n as 1, 2, ..., n: dots continue an arithmetic progression."""
    at = parts.index(Node("dots")) if Node("dots") in parts else 0
    shown = [part.args[0] for part in parts[max(0, at - 3) : at] if part.op == "number"]
    last = [part.args[0] for part in parts[at + 1 : at + 2] if part.op == "number"]
    step = shown[-1] - shown[-2] if last and len(shown) > 1 else 0
    if step and 0 < (count := (last[0] - shown[-1]) / step) <= MAX_BETWEEN and count.denominator == 1:
        between = (number(shown[-1] + step * place) for place in range(1, int(count)))
        return (*parts[:at], *between, *parts[at + 1 :])
    regular = len(shown) == 3 and shown[0] + shown[2] == 2 * shown[1]
    return _without_dots(parts[: at - 1] + parts[at:]) if regular else parts


def _names(parts: tuple[Node, ...]) -> set[Node]:
    """The names in a list of assignments: its order means something where there are several; x₁ and x₂ only count."""
    names = {p.args[1][0] for p in parts if p.op == "relation" and set(p.args[0]) == {"="} and is_name(p.args[1][0])}
    counted = {name.args[0].rstrip("0123456789") for name in names if name.op == "name"}
    return {NOTHING} if len(counted) == 1 and len(names) > 1 else names


def _name_first(members: tuple[Node, ...]) -> tuple[Node, ...]:
    """`5 = x` as `x = 5`."""
    return members[::-1] if len(members) == 2 and is_name(members[1]) and not is_name(members[0]) else members


def _has_no_value(node: Node) -> bool:
    """Whether a tree holds words, an unknown function, a limit, an integral or a sum whose ends are no numbers."""
    return any(
        (op in ("text", "bracket") and node.op != "operator")
        or (op == "call" and args[0] not in values.KNOWN_CALLS)
        or (op == "operator" and (args[0] in _UNVALUED or (args[0] in ("sum", "prod") and args[2].op != "number")))
        for op, args in walk(node)
    )


def _matrix(node: Node) -> list[tuple[Node, ...]] | None:
    """Rows of a matrix, of a tuple read as a column, of a tuple of rows, of a transposed or a multiplied matrix."""
    op, args = node
    if op == "bracket" and args[:2] == ("[", "]") and all(x.op == "bracket" and x.args[0] == "[" for x in args[2]):
        rows = [x.args[2] for x in args[2]]  # [[1, 2], [3, 4]]
        return rows if len({*map(len, rows)}) == 1 else None
    if op == "bracket" or (op == "transpose" and args[0].op == "bracket"):  # (1, 2)^T is written lying
        return [(part,) for part in (args if op == "bracket" else args[0].args)[2]]
    if op == "matrix":
        return list(args)
    linear = op in ("times", "over", "negative", "transpose")
    found = [(place, rows) for place, part in enumerate(args) if linear and (rows := _matrix(part))]
    if len(found) != 1:
        return None
    ((place, rows),) = found
    if op == "transpose":
        return list(zip(*rows, strict=True))
    return [tuple(Node(op, (*args[:place], cell, *args[place + 1 :])) for cell in row) for row in rows]


def _same_family(gold: Node, answer: Node, integers: frozenset[str]) -> bool:
    """Solutions for every integer: π/4 + kπ is π/4 + nπ, and nπ - 3π/4 where it is said that n is an integer."""
    with mpmath.workprec(values.MAX_BITS):  # 7^2023 is exact
        family, other = (_family(node, integers | values.INTEGER_NAMES) for node in (gold, answer))
        if family is None or other is None:
            return False
        steps, ratio = (family[0] - other[0]) / family[1], other[1] / family[1]
        shift = abs(steps - mpmath.nint(steps)) if integers else abs(steps)
        return bool(max(shift, abs(abs(ratio) - 1)) < 1e-40)


def _family(node: Node, integers: frozenset[str]) -> tuple | None:
    """(base, period) of a residue, or of an expression that is linear in one integer, with values for other names."""
    if node.op == "residue":
        node = Node("add", (node.args[0], Node("times", (node.args[1], Node("name", ("k",))))))
    names = names_in(node)
    if len(names & integers) != 1:
        return None
    (name,), point = names & integers, next(values.points(names))
    reals = [values.real_value(node, point | {name: mpq(step, 1)}) for step in range(3)]
    if None in reals:
        return None
    base, first, second = map(mpmath.mp.convert, reals)
    return (base, first - base) if first != base and abs(second - 2 * first + base) < 1e-40 else None


def _rounds_to(exact: Node, rounded: Node, min_digits: int = 0) -> bool:
    """Whether a decimal of so many digits, without zeros in front, is what a value rounds to at its last place."""
    op, args = rounded.args[0] if rounded.op == "negative" else rounded
    if op != "number" or (min_digits and (not args[1] or args[0] * 10 ** args[1] < 10 ** (min_digits - 1))):
        return False
    gap = values.real_value(difference(exact, rounded), {})
    return gap is not None and bool(2 * abs(mpmath.mp.convert(gap)) * 10 ** args[1] <= 1)
