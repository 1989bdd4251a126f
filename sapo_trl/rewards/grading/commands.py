"""The commands of LaTeX that take arguments: fractions, functions, operators, matrices and cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sapo_trl.rewards.grading.latex import FUNCTIONS, OPERATORS, BrokenError, Token, UnreadableError, plain
from sapo_trl.rewards.grading.tree import EMPTY_SET, NOTHING, Node, negative, number
from sapo_trl.rewards.grading.words import CLAUSES, text_key, vocabulary

if TYPE_CHECKING:
    from sapo_trl.rewards.grading.parser import Parser

_CONSTANTS = {"pi": Node("constant", ("pi",)), "infty": Node("infinity"), "dots": Node("dots"), "emptyset": EMPTY_SET}
_DECORATIONS = vocabulary("overline vec hat bar widehat tilde dot overrightarrow")
_GREEK = vocabulary(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
_CASE_WORDS = CLAUSES - {"otherwise"} | {",", ".", "&"}


def command(parser: Parser, name: str) -> Node:
    """What a command stands for, with the arguments behind it."""
    if name == "frac":
        return _fraction(parser)
    if name == "binom":
        return Node("call", ("binom", argument(parser), argument(parser)))
    if name == "sqrt":
        index = parser.bracket() if parser.peek() == "[" else number(2)
        return Node("root", (argument(parser), index))
    if name in FUNCTIONS:
        return _function(parser, name)
    if name in OPERATORS:
        return _operator(parser, name)
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in ("lfloor", "lceil"):
        node = parser.expression()
        parser.expect(name.replace("l", "r", 1))
        return Node("call", (name[1:], node))
    if name in _DECORATIONS:
        return Node("call", (name + parser.subscript(), argument(parser)))
    if name in _GREEK:
        return parser.name(name)
    if name not in "RZNQC":
        raise UnreadableError(f"the command {name}")
    suffix = plain(parser.script()).strip("{}") if parser.take("^", "_") else ""
    return Node("numbers", (name + ("+" if suffix == ">0" else suffix),))


def argument(parser: Parser) -> Node:
    r"""A group, or one digit, letter or command (`\frac12`)."""
    kind, text = parser.token()
    if kind == "number" and len(text) > 1 and text.isdigit():
        digits = (Token("number", part) for part in (text[0], text[1:]))
        parser.tokens = (*parser.tokens[: parser.at], *digits, *parser.tokens[parser.at + 1 :])
    return parser.atom()


def _fraction(parser: Parser) -> Node:
    r"""`\frac{a}{b}`; `\frac{d}{dx}` is an operator, and `\frac{dy}{dx}` a name."""
    start = parser.at
    top, bottom = (plain(parser.script())[1:-1] if parser.peek() == "{" else "" for _ in range(2))
    for sign in ("d", r"\partial"):
        if top.startswith(sign) and bottom.startswith(sign) and bottom != sign:
            if top == sign or top.startswith(sign + "^"):
                return Node("operator", ("derivative", Node("name", (bottom,)), parser.product()))
            return Node("name", (f"{top}/{bottom}",))
    parser.at = start
    return Node("over", (argument(parser), argument(parser)))


def _function(parser: Parser, name: str) -> Node:
    exponent, base = None, ()
    while parser.peek() in ("^", "_"):
        if parser.next().text == "^":
            exponent = parser.raised(NOTHING).args[1]
        else:
            base = (argument(parser),)
    bracketed = parser.peek() in ("{", "(", "[", "|", "lfloor")
    inside = parser.atom() if bracketed else _bare_argument(parser)
    if exponent == negative(number(1)):
        return Node("call", ("arc" + name, inside))
    node = Node("call", (name, inside, *base))
    return node if exponent is None else Node("power", (node, exponent))


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


def _operator(parser: Parser, name: str) -> Node:
    """A sum, limit, integral, gcd ... with what stands below and above it, and what it acts on."""
    limits = {"_": NOTHING, "^": NOTHING}
    while parser.peek() in limits:
        side = parser.next().text
        limits[side] = argument(parser)
    if name in ("max", "min", "gcd", "lcm", "det", "tr") and parser.peek() in ("(", r"\{"):
        inside = parser.atom()
        arguments = inside.args[-1] if inside.op in ("bracket", "set") else (inside,)
    else:
        arguments = (parser.expression() if name.endswith("int") else parser.product(),)
    return Node("operator", (name, limits["_"], limits["^"], *arguments))


def environment(parser: Parser, name: str) -> Node:
    """A matrix, a determinant, the cases of a function, or equations one below the other."""
    rows: list[list[list[Token]]] = [[[]]]
    while (token := parser.next()).kind != "end":
        if token.text == r"\\":
            rows.append([[]])
        elif token.text == "&":
            rows[-1].append([])
        elif parser.at > len(parser.tokens):
            raise BrokenError("an environment that is not closed")
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
    cases = tuple(_case(parser, [part for cell in row for part in (*cell, Token("sign", ","))]) for row in rows)
    only_values = all(condition == NOTHING for _, condition in cases)
    return Node("list", (tuple(value for value, _ in cases), "and")) if only_values else Node("cases", cases)


def _case(parser: Parser, tokens: list[Token]) -> tuple[Node, Node]:
    """A value and its condition, which stands behind a comma or behind `if`."""
    said = [token.text == "," or (token.kind == "word" and token.text.lower() in CLAUSES) for token in tokens]
    end = said.index(True)
    condition = [token for token in tokens[end:] if token.text.lower() not in _CASE_WORDS]
    try:
        return parser.inner(tokens[:end]), parser.inner(condition) if condition else NOTHING
    except UnreadableError:
        return parser.inner(tokens[:end]), Node("text", (text_key(plain(condition)),))
