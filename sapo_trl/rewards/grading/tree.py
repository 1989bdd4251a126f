"""What `parser` makes of tokens, and `compare` compares."""

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class Node(NamedTuple):
    op: str
    args: tuple = ()


NOTHING = Node("text", ("",))
OTHERWISE = Node("otherwise")  # the condition of the last case, which may be said as a relation as well
EMPTY_SET = Node("text", ("empty set",))


def number(value: int | str | Fraction) -> Node:
    """A number with its digits behind the point, if it was written as a decimal."""
    return Node("number", (Fraction(value), len(value.partition(".")[2]) if isinstance(value, str) else 0))


def negative(node: Node) -> Node:
    return Node("negative", (node,))


def difference(left: Node, right: Node) -> Node:
    return Node("add", (left, negative(right)))


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    stack: list = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, Node):
            yield part
        if isinstance(part, tuple):
            stack.extend(part)


def names_in(node: Node) -> set[str]:
    """The names of all free variables in a tree: not those over which it adds up or goes to a limit."""
    names = {part.args[0] for part in walk(node) if part.op == "name"}
    below = [part.args[1] for part in walk(node) if part.op == "operator" and part.args[0] in ("sum", "prod", "lim")]
    return names - {part.args[1][0].args[0] for part in below if part.op == "relation"}
