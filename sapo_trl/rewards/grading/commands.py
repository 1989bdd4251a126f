"""The commands of LaTeX that take arguments: fractions, functions, operators, matrices and cases."""

from __future__ import annotations

from typing import Any

from sapo_trl.rewards.grading.latex import FUNCTIONS, OPERATORS, BrokenError, Token, UnreadableError, plain
from sapo_trl.rewards.grading.tree import EMPTY_SET, NOTHING, OTHERWISE, Node, negative, number
from sapo_trl.rewards.grading.words import CLAUSES, text_key, vocabulary

Parser = Any  # `parser.Parser`, which imports this module

_CONSTANTS = {"pi": Node("constant", ("pi",)), "infty": Node("infinity"), "dots": Node("dots"), "emptyset": EMPTY_SET}
_DECORATIONS = vocabulary("overline vec hat widehat tilde dot overrightarrow")
_GREEK = vocabulary(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
_CASE_WORDS = CLAUSES | {",", ".", "&", "else"}


def command(parser: Parser, name: str) -> Node:
    """What a command stands for, with the arguments behind it."""
    if name == "frac":
        return Node("over", (parser.atom(), parser.atom()))
    if name == "binom":
        return Node("call", ("binomial", parser.atom(), parser.atom()))
    if name == "sqrt":
        index = parser.bracket() if parser.peek() == "[" else number(2)
        return Node("root", (parser.atom(), index))
    if name in FUNCTIONS | OPERATORS:
        return _applied(parser, name)
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in ("lfloor", "lceil"):
        node = parser.expression()
        parser.expect(name.replace("l", "r", 1))
        return Node("call", (name[1:], node))
    if name in _DECORATIONS:
        return Node("call", (name + parser.subscript(), parser.atom()))
    if name in _GREEK:
        return parser.name(name)
    if name not in "RZNQC":
        raise UnreadableError(f"the command {name}")
    suffix = plain(parser.script()).strip("{}") if parser.take("^", "_") else ""
    return Node("numbers", (name + {">0": "+", r"\geq0": "0+"}.get(suffix, suffix),))


def _applied(parser: Parser, name: str) -> Node:
    r"""A function or operator: what stands above and below it, and what it acts on, with or without brackets."""
    scripts = {"_": NOTHING, "^": NOTHING}
    while (side := parser.peek()) in scripts and parser.next():
        scripts[side] = parser.raised(NOTHING).args[1] if side == "^" else parser.atom()
    below, above = scripts.values()
    if name in OPERATORS:
        of_list = name in ("max", "min", "gcd", "lcm", "det", "tr") and parser.peek() in ("(", r"\{")
        body = parser.atom() if of_list else parser.expression() if name.endswith("int") else parser.product()
        arguments = body.args[-1] if of_list and body.op in ("bracket", "set") else (body,)
        return Node("operator", (name, below, above, *arguments))
    bracketed = parser.peek() in ("{", "(", "[", "|", "lfloor")
    inside = parser.atom() if bracketed else _bare_argument(parser)
    if above == negative(number(1)):
        return Node("call", ("a" + name, inside))
    node = Node("call", (name, inside) if below == NOTHING else (name, inside, below))
    return node if above == NOTHING else Node("power", (node, above))


def _bare_argument(parser: Parser) -> Node:
    r"""`\sin 2x`, `\cos\frac{\pi}{3}`, `\sin 2\pi/3`: up to a sign, a bracket or the next function."""
    if parser.take("-"):
        return negative(_bare_argument(parser))
    node = parser.power()
    while parser.starts_factor() and parser.peek() not in FUNCTIONS | OPERATORS | {"[", r"\{"}:
        if parser.peek() == "(" and parser.token(-1).kind != "number":
            break
        node = Node("times", (node, parser.power()))
    return Node("over", (node, parser.power())) if parser.token(-1).text == "pi" and parser.take("/") else node


def environment(parser: Parser, name: str) -> Node:
    """A matrix, a determinant, the cases of a function, or equations one below the other."""
    rows: list[list[list[Token]]] = [[[]]]
    while (token := parser.next()).kind != "end":
        if parser.at > len(parser.tokens):
            raise BrokenError("an environment that is not closed")
        if token.text == r"\\":
            rows.append([[]])
        elif token.text == "&":
            rows[-1].append([])
        else:
            rows[-1][-1].append(token)
    rows = rows[:-1] if rows[-1] == [[]] else rows
    if name.endswith("matrix") or name == "array":
        matrix = Node("matrix", tuple(tuple(map(parser.inner, row)) for row in rows))
        if len({len(row) for row in rows}) != 1:
            raise BrokenError("rows of different lengths")
        return Node("operator", ("det", NOTHING, NOTHING, matrix)) if name[0] in "vV" else matrix
    if not name.endswith("cases"):
        raise UnreadableError(f"the environment {name}")
    cases = [_case(parser, [part for cell in row for part in (*cell, Token("sign", ","))]) for row in rows]
    if all(condition == OTHERWISE for _, condition in cases):
        return Node("list", (tuple(value for value, _ in cases), "and"))
    return Node("set", (tuple(Node("bracket", ("(", ")", pair)) for pair in cases),))


def _case(parser: Parser, tokens: list[Token]) -> tuple[Node, Node]:
    """A value and its condition, which stands behind a comma or behind `if`."""
    end = [token.text == "," or (token.kind == "word" and token.text.lower() in CLAUSES) for token in tokens].index(
        True
    )
    condition = [token for token in tokens[end:] if token.text.lower() not in _CASE_WORDS]
    try:
        return parser.inner(tokens[:end]), parser.inner(condition) if condition else OTHERWISE
    except UnreadableError:
        return parser.inner(tokens[:end]), Node("text", (text_key(plain(condition)),))
