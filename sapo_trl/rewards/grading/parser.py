"""From tokens to a tree: lists, relations, precedence, brackets, units and words. Nothing is evaluated here."""

from collections.abc import Sequence

from sapo_trl.rewards.grading import words
from sapo_trl.rewards.grading.latex import FUNCTIONS, GREEK, OPERATORS, BrokenError, Token, UnreadableError, plain
from sapo_trl.rewards.grading.tree import EMPTY_SET, NOTHING, OTHERWISE, Node, negative, number

_RELATIONS = words.vocabulary("""= < > leq geq neq approx sim in notin subset subseteq mid to implies iff perp parallel
cong propto ll gg""")
_WHOLE, _SET, _RATIO, _SUM, _PRODUCT = range(5)  # what binds tighter stands further right
_INFIX = {
    "over": (_WHOLE, "over"), "choose": (_WHOLE, "choose"), "cup": (_SET, "union"), "cap": (_SET, "intersection"),
    "setminus": (_SET, "difference"), ":": (_RATIO, "ratio"), "+": (_SUM, "add"), "-": (_SUM, "add"),
    "cdot": (_PRODUCT, "times"), "times": (_PRODUCT, "times"), "/": (_PRODUCT, "over"), "mod": (_PRODUCT, "mod"),
    "unit": (_PRODUCT, ""), "factor": (_PRODUCT, ""),
}  # fmt: skip
_NO_FACTOR = _RELATIONS | set(_INFIX) | {"land", "lor", "pmod", "rfloor", "rceil", "circ"}
_JOINS = words.AND | words.OR
_STOPS = _JOINS | words.CLAUSES
_APPLIED = frozenset("fghFGHPQVTSRpquvsyE")  # letters that are a function before a bracket around one thing
_CONSTANTS = {"pi": Node("constant", ("pi",)), "infty": Node("infinity"), "dots": Node("dots"), "emptyset": EMPTY_SET}
_DECORATIONS = words.vocabulary("overline vec hat widehat tilde dot overrightarrow")
_CASE_WORDS = words.CLAUSES | {",", ".", "&", "else"}


class Parser:
    r"""Recursive descent over tokens. `declared` collects the names of `k \in \mathbb{Z}`, and whether it is ℤ or ℕ."""

    def __init__(self, tokens: Sequence[Token], declared: set[tuple[str, bool]]):
        self.tokens = tuple(tokens)
        self.at, self.bars = 0, 0  # place; opened |, of which the next one closes the last
        self.declared = declared

    def token(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if 0 <= self.at + ahead < len(self.tokens) else Token("end of text", "")

    def peek(self, ahead: int = 0) -> str:
        """The text of a sign or command, "" for anything else."""
        return self.token(ahead).text if self.token(ahead).kind in ("sign", "command") else ""

    def word(self, ahead: int = 0) -> str:
        return self.token(ahead).text.lower() if self.token(ahead).kind == "word" else ""

    def next(self) -> Token:
        self.at += 1
        return self.token(-1)

    def take(self, *texts: str) -> bool:
        found = self.peek() in texts
        self.at += found
        return found

    def expect(self, *texts: str) -> None:
        if not self.take(*texts):
            raise BrokenError(f"{texts[0]} is missing")

    def inner(self, tokens: Sequence[Token]) -> Node:
        """The answer that a sequence of its own holds, such as a cell."""
        return Parser(tokens, self.declared).answer()

    def answer(self) -> Node:
        """Everything, to the last token; a sign in front is passed over."""
        while self.take("=", ":", "approx", "implies"):
            pass
        node = self.sequence()
        if self.at < len(self.tokens):
            raise BrokenError("something is left over")
        return node

    def sequence(self) -> Node:
        r"""A list, or its only part, without declarations (`k \in \mathbb{Z}`); in `x = 1, 2` the name is of both."""
        parts, kind = [self.relation()], ","
        while separator := self.separator():
            kind = separator if separator != "," else kind
            if self.word() in words.CLAUSES:
                self.clause()
            elif self.token().kind != "end of text":
                parts.append(self.relation())
        first, *others = [part for part in parts if len(parts) == 1 or not self.declares(part)] or parts
        if first.op == "relation" and first.args[0] in (("=",), ("neq",)) and all(p.op != "relation" for p in others):
            others = [Node("relation", (first.args[0], (first.args[1][0], part))) for part in others]
        return Node("list", ((first, *others), kind)) if others else first

    def separator(self) -> str:
        """Goes past what separates the parts of a list, and says what: a comma or semicolon, and, or, or several."""
        found = ""
        while self.peek() in (",", ";", "&", r"\\", "land", "lor") or self.word() in _JOINS:
            found = max(found, words.kind_of_join(self.next().text.lower()))
        return found

    def declares(self, node: Node) -> bool:
        """Whether a relation only says to which numbers a name belongs, which is remembered."""
        if node.op != "relation" or node.args[0] != ("in",) or node.args[1][1].op != "numbers":
            return False
        name, field = node.args[1]
        self.declared |= {(name.args[0], field.args[0][0] in "ZN")} if name.op == "name" else set()
        return True

    def clause(self) -> None:
        """Goes past `for all n`, `where C is a constant`; a clause that says more than that is no part of an answer."""
        said = {token.text.lower() for token in self.tokens[self.at :] if token.kind == "word"}
        declared = self.peek(2) == "in" and self.declares(self.inner(self.tokens[self.at + 1 :]))  # for k in Z
        if not declared and (not said & words.QUANTIFIERS or said & words.RESTRICTIONS):
            raise UnreadableError("a condition")
        self.at = len(self.tokens)

    def relation(self) -> Node:
        members, operators = [self.expression()], []
        while self.peek() in _RELATIONS or (self.peek() == "|" and not self.bars):
            operators.append(self.next().text.replace("|", "mid"))
            members.append(self.expression())
        if self.take("pmod"):
            members[-1] = Node("residue", (members[-1], self.atom()))
        if self.word() in words.CLAUSES:
            self.clause()
        return Node("relation", (tuple(operators), tuple(members))) if operators else members[0]

    def expression(self, level: int = _WHOLE) -> Node:
        node = self.prefix()
        while (sign := self.infix()) and _INFIX[sign][0] >= level:
            node = self.combined(node, sign)
        return node

    def infix(self) -> str:
        """What joins the next thing to the value before it: a key of `_INFIX`, or "" at the end of the value."""
        sign = self.peek()
        if self.word() not in ("", *_STOPS) or (sign == "/" and self.word(1)):
            return "unit"
        return sign if sign in _INFIX else "factor" * self.starts_factor()

    def combined(self, node: Node, sign: str) -> Node:
        if sign == "factor":
            return self.adjacent(node)
        if sign == "unit":
            return Node("quantity", (node, self.unit(node)))
        self.next()
        level, op = _INFIX[sign]
        right = self.expression(level + 1)
        if op == "ratio":  # 2:3 is two thirds, and 1:2:3 the tuple of 1/2 and 1/3
            quotients = [Node("over", (node, right))]
            while self.take(":"):
                quotients.append(Node("over", (node, self.expression(_SUM))))
            return quotients[0] if len(quotients) == 1 else Node("bracket", ("(", ")", tuple(quotients)))
        if sign == "times" and {node.args[:1], right.args[:1]} == {("vec",)}:  # a cross product has an order
            return Node("call", ("cross", node, right))
        if op == "add" and node.op == "numbers" and right.op == "set":  # R - {0}
            op = "difference"
        if op == "mod":  # 3 mod 7 names a residue; 7^2023 mod 10 is a task
            reduced = node.op == right.op == "number" and 0 <= node.args[0] < right.args[0]
            return Node("residue", (node, right)) if reduced else Node("operator", ("mod", node, right))
        right = negative(right) if op == "add" and sign == "-" else right
        return Node("call", ("binomial", node, right)) if op == "choose" else Node(op, (node, right))

    def prefix(self) -> Node:
        if self.take("-"):
            return negative(self.prefix())
        return self.prefix() if self.take("+") else self.power()

    def starts_factor(self) -> bool:
        kind, text = self.token()
        if text == "[":  # [0, 1[ closes with it
            return self.token(1).kind != "end of text" and self.peek(1) not in (*_NO_FACTOR, ",", ";", r"\}")
        if kind == "sign":
            return text in ("(", "{", r"\{") or (text in ("|", r"\|") and not self.bars)
        return kind in ("number", "letter", "begin") or (kind == "command" and text not in _NO_FACTOR)

    def adjacent(self, node: Node) -> Node:
        """Two factors without a sign between them: a product, or a mixed number; two numbers are neither."""
        before, after = self.token(-1).kind, self.token()
        if after.kind == "number" and before in ("number", "letter", "word"):
            raise UnreadableError("two numbers side by side")
        right = self.power()
        sign, part, *unit = (right.op, *right.args) if right.op in ("percent", "quantity") else ("", right)
        whole = node.args[0] if node.op == "negative" else node
        mixed = before == "number" and whole.op == "number" and after.text == "frac" and part.op == "over"
        if mixed and all(x.op == "number" for x in part.args):
            value = Node("add", (node, part if node == whole else negative(part)))
            return Node(sign, (value, *unit)) if sign else value
        return node if self.declares(right) else Node("times", (node, right))

    def power(self) -> Node:
        """An atom with the exponents, factorials and signs behind it."""
        node = self.atom()
        while True:
            if self.take("^"):
                node = self.raised(node)
            elif self.take("!"):
                node = Node("call", ("fac2" if self.take("!") else "factorial", node))
            elif self.take("%"):
                node = Node("percent", (node,))
            elif self.take("circ"):
                node = Node("quantity", (node, "degree"))
            elif node.op == "number" and self.take("_"):
                node = Node("based", (self.token(-2).text.lstrip("0"), plain(self.script()).strip("{}")))
            else:
                return node

    def raised(self, base: Node) -> Node:
        """A power; T and a degree sign stand in the same place and are none."""
        start, text = self.at, plain(self.script()).strip("{}")
        is_matrix = base.op in ("matrix", "bracket") or (base.op == "name" and base.args[0][0].isupper())
        if text in (r"\top", r"\intercal") or (is_matrix and text in ("T", "t")):
            return Node("transpose", (base,))
        self.at = start
        sign = self.next().text if self.peek() in ("+", "-") else ""
        exponent = self.atom()
        exponent = self.raised(exponent) if self.take("^") else exponent
        return Node("power", (base, negative(exponent) if sign == "-" else exponent))

    def script(self) -> tuple[Token, ...]:
        """The tokens of the brace that comes next, or the one token."""
        start, depth = self.at, 0
        while depth or self.at == start:
            depth += (self.peek() == "{") - (self.peek() == "}")
            if self.next().kind == "end of text":
                raise BrokenError("a brace that is not closed")
        return self.tokens[start : self.at]

    def unit(self, value: Node) -> str:
        """The unit or counted noun that comes next."""
        start = self.at
        while self.token().kind != "end of text":
            if self.take("^"):
                self.script()
            elif self.word() not in ("", *_STOPS) or self.peek() in ("/", ".", "cdot") or self.token(-1).text == "/":
                self.at += 1
            else:
                break
        unit = words.unit_of(plain(self.tokens[start : self.at]), value == number(1))
        if unit is None:
            raise UnreadableError("words that are no unit")
        return unit

    def atom(self) -> Node:
        kind, text = self.token()
        if kind == "word":
            return self.text()
        if kind == "sign" and text in ("(", "[", "]", "{"):
            return self.bracket()
        self.at += 1
        if kind == "number":
            return number(text)
        if kind == "letter":
            return self.name(text)
        if kind == "begin":
            return self.environment(text)
        if kind == "command" and text not in _NO_FACTOR:
            return self.command(text)
        if text == r"\{":
            return self.braces()
        if text in ("|", r"\|") and not self.bars:
            self.bars += 1
            node = self.expression()
            self.bars -= 1
            self.expect(text)
            return Node("call", ("fabs" if text == "|" else "norm", node))
        raise (BrokenError if text.isascii() else UnreadableError)(f"{text or 'the end'} where a value should be")

    def name(self, name: str) -> Node:
        """A name, a constant, or a name that is a function of its index or of the bracket behind it."""
        if name in ("e", "i") and self.peek() != "_":
            return Node("constant", (name,))
        if self.take("_"):
            index = self.script()
            if any(token.kind == "letter" for token in index):
                return Node("call", (name + "_", self.inner(index)))
            name += "_" + plain(index).strip("{}")
        while self.take("'"):
            name += "'"
        start = self.at
        if self.peek() == "(" and (name[0] in _APPLIED or name.endswith("'")):
            inside = self.bracket()
            if name[0] in "fgh" or inside.op not in ("add", "times", "over", "negative", "power"):
                return Node("call", (name, inside))
        self.at = start
        return Node("name", (name,))

    def text(self) -> Node:
        """Words where a value should be: an upright letter, or a text."""
        if len(self.word()) == 1 and not self.word(1):
            return self.name(self.next().text)
        start, self.at = self.at, self.at + 1
        while self.word() not in _JOINS and (
            self.token().kind in ("word", "number", "letter") or self.peek() in ("-", "'", ".", '"')
        ):
            self.at += 1
        key = words.text_key(plain(self.tokens[start : self.at]))
        return Node("numbers", ("R",)) if key in words.EVERYTHING else Node("text", (key,))

    def bracket(self) -> Node:
        opening, bars, self.bars = self.next().text, self.bars, 0
        node = self.sequence()
        self.bars, closing = bars, self.peek()
        self.expect(*("}" if opening == "{" else (")", "]", "[")))
        if opening == "{" or (node.op != "list" and opening + closing in ("()", "[]")):
            return node
        return Node("bracket", (opening, closing, node.args[0] if node.op == "list" else (node,)))

    def braces(self) -> Node:
        """A set: its elements, or its builder."""
        if self.take(r"\}"):
            return EMPTY_SET
        bars, self.bars, rest = self.bars, 0, self.tokens[self.at :]
        bar = next((i for i, t in enumerate(rest) if t.text in ("mid", ":") or (t.text == "|" and i)), 0)
        left = self.inner(rest[:bar]) if bar and not {t.text for t in rest[:bar]} & {",", r"\}", "|"} else None
        self.at += 0 if left is None else bar + 1
        inside = self.sequence()
        self.bars = bars
        self.expect(r"\}")
        if left is not None:
            return Node("builder", (left, inside))
        return Node("set", (inside.args[0] if inside.op == "list" else (inside,),))

    def command(self, name: str) -> Node:
        """What a command stands for, with the arguments behind it."""
        if name in ("frac", "binom"):
            above, below = self.atom(), self.atom()
            return Node("over", (above, below)) if name == "frac" else Node("call", ("binomial", above, below))
        if name == "sqrt":
            index = self.bracket() if self.peek() == "[" else number(2)
            return Node("root", (self.atom(), index))
        if name in FUNCTIONS | OPERATORS:
            return self.applied(name)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in ("lfloor", "lceil"):
            node = self.expression()
            self.expect(name.replace("l", "r", 1))
            return Node("call", (name[1:], node))
        if name in _DECORATIONS:
            return Node("call", (name, self.atom()))
        if name in GREEK:
            return self.name(name)
        if name not in "RZNQC":
            raise UnreadableError(f"the command {name}")
        suffix = plain(self.script()).strip("{}") if self.take("^", "_") else ""
        return Node("numbers", (name + {">0": "+", r"\geq0": "0+"}.get(suffix, suffix),))

    def applied(self, name: str) -> Node:
        r"""A function or operator: what stands above and below it, and what it acts on, with or without brackets."""
        scripts = {"_": NOTHING, "^": NOTHING}
        while self.peek() in scripts:
            side = self.next().text
            scripts[side] = self.raised(NOTHING).args[1] if side == "^" else self.atom()
        below, above = scripts.values()
        if name in OPERATORS:
            of_list = name in ("max", "min", "gcd", "lcm", "det", "tr") and self.peek() in ("(", r"\{")
            body = self.atom() if of_list else self.expression(_WHOLE if name.endswith("int") else _PRODUCT)
            arguments = body.args[-1] if of_list and body.op in ("bracket", "set") else (body,)
            return Node("operator", (name, below, above, *arguments))
        bracketed = self.peek() in ("{", "(", "[", "|", "lfloor")
        inside = self.atom() if bracketed else self.bare_argument()
        if above == negative(number(1)):
            return Node("call", ("a" + name, inside))
        arguments = inside.args[2] if inside.op == "bracket" else (inside,)  # log(8, 2)
        node = Node("call", (name, *arguments) if below == NOTHING else (name, inside, below))
        return node if above == NOTHING else Node("power", (node, above))

    def bare_argument(self) -> Node:
        r"""`\sin 2x`, `\cos\frac{\pi}{3}`, `\sin 2\pi/3`: up to a sign, a bracket or the next function."""
        node = self.prefix()
        stops = FUNCTIONS | OPERATORS | {"[", r"\{"}
        while self.starts_factor() and self.peek() not in stops | {"("} - {"(" * (self.token(-1).kind == "number")}:
            node = Node("times", (node, self.power()))
        return Node("over", (node, self.power())) if self.token(-1).text == "pi" and self.take("/") else node

    def environment(self, name: str) -> Node:
        """A matrix, a determinant, the cases of a function, or equations one below the other."""
        rows: list[list[list[Token]]] = [[[]]]
        while (token := self.next()).kind != "end":
            if self.at > len(self.tokens):
                raise BrokenError("an environment that is not closed")
            if token.text == r"\\":
                rows.append([[]])
            elif token.text == "&":
                rows[-1].append([])
            else:
                rows[-1][-1].append(token)
        rows = rows[:-1] if rows[-1] == [[]] else rows
        if name.endswith("matrix") or name == "array":
            matrix = Node("matrix", tuple(tuple(map(self.inner, row)) for row in rows))
            if len({len(row) for row in rows}) != 1:
                raise BrokenError("rows of different lengths")
            return Node("operator", ("det", NOTHING, NOTHING, matrix)) if name[0] in "vV" else matrix
        if not name.endswith("cases"):
            raise UnreadableError(f"the environment {name}")
        cases = [self.case([part for cell in row for part in (*cell, Token("sign", ","))]) for row in rows]
        if all(condition == OTHERWISE for _, condition in cases):
            return Node("list", (tuple(value for value, _ in cases), ","))
        return Node("set", (tuple(Node("bracket", ("(", ")", pair)) for pair in cases),))

    def case(self, tokens: list[Token]) -> tuple[Node, Node]:
        """A value and its condition, which stands behind a comma or behind `if`."""
        ends = [token.text == "," or (token.kind == "word" and token.text in words.CLAUSES) for token in tokens]
        condition = [token for token in tokens[ends.index(True) :] if token.text.lower() not in _CASE_WORDS]
        try:
            return self.inner(tokens[: ends.index(True)]), self.inner(condition) if condition else OTHERWISE
        except UnreadableError:
            return self.inner(tokens[: ends.index(True)]), Node("text", (words.text_key(plain(condition)),))
