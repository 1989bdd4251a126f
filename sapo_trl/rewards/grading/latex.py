r"""The one reader of LaTeX: an answer becomes a list of tokens, the same for `½`, `\tfrac12` and `\nicefrac{1}{2}`."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sapo_trl.rewards.grading.words import BARE_UNITS, CURRENCIES, DENIALS, SCALES, vocabulary


class UnreadableError(Exception):
    """A text that is not in the grader's language, such as a sentence or a sign that it does not know."""


class BrokenError(UnreadableError):
    r"""A text that is in nobody's language: `x = = 5`, `\frac{1}{}`, `(1, 2`."""


class Token(NamedTuple):
    """`kind` is number, letter, word (upright), command, sign, begin or end (of an environment)."""

    kind: str
    text: str


_FROM_ALPHA = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi o pi rho sigma sigma tau
upsilon phi chi psi omega"""
GREEK = vocabulary(_FROM_ALPHA + " Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar Pr")
_SIGNS = {chr(0x3B1 + place): rf"\{name} " for place, name in enumerate(_FROM_ALPHA.split())} | {
    "−–—\ufe63": "-", "×": r"\times ", "·⋅∙": r"\cdot ", "÷∕⁄": "/", "°": r"^\circ ", "≤⩽": r"\leq ", "≥⩾": r"\geq ",
    "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv ", "～〜∼": r"\sim ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∖": r"\setminus ", "∧": r"\land ", "∨": r"\lor ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "∅": r"\emptyset ",
    "∠": " ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∑": r"\sum ", "∫": r"\int ", "′‘’": "'", "″": "''", "“”": '"',
    "…⋯": r"\dots ", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34", "⅓": r"\frac13", "⅔": r"\frac23",
    "ℝ": r"\mathbb R", "ℤ": r"\mathbb Z", "ℕ": r"\mathbb N", "Ω\u2126": r"\Omega ", "⟨": "(", "⟩": ")", "、": ",",
    "。": ".", "￥": "¥", "\u00a0\u2009\u202f\u3000\u2061": " ",
}  # fmt: skip
_TABLE = {0xFF01 + code: chr(0x21 + code) for code in range(94)}  # the full-width forms of ASCII
_TABLE |= {ord(sign): plain for signs, plain in _SIGNS.items() for sign in signs}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
_MIXED_DIGITS = re.compile(r"[0-9.]\s*[０-９]|[０-９]\s*[0-9.]")  # 1２: no person writes that
_INVISIBLE = "[\u200b-\u200d\u2060\ufeff\u00ad]+"
_TYPED = {"**": "^", "==": "=", "<=": r"\leq ", "=<": r"\leq ", ">=": r"\geq ", "!=": r"\neq ", "...": r"\dots "}
_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen; zero ten twenty thirty forty fifty sixty seventy eighty ninety"""
_ONES, _TENS = map(str.split, _NUMBERS.split(";"))
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8}
_OR_ONES, _OR_TENS, _OR_PARTS, _OR_SCALES = map("|".join, (_ONES, _TENS[2:], _PARTS, SCALES))
_UP = r"\\(?:text(?!color)\w{0,6}|mathrm|mbox|rm|operatorname)\s?\{"  # an opened brace of upright text
_UNIT = rf"({_UP}[^{{}}]*\}}(?:\^\{{?\d\}}?)?)"
_D = r"(?:d|\\partial|\\mathrm\s?\{?\s?d\}?)\s?"
_SUB = r"\s?(?:\{\s?(\w+)\s?\}|(\w))\s?"
_MONEY = r"\\\$|[€£₹¥¢]"
_FRACTION = r"\\[dt]?frac\{\d+\}\{\d+\}"
_AMOUNT = rf"\d[\d,]*(?:\.\d+)?(?:\s?{_FRACTION}|\s?\\cdot \d+(?= ))?|{_FRACTION}"


def _repeating(match: re.Match) -> str:
    """0.1(6) as (16 - 1)/90: the digits with one period, minus those without, over 9..9 0..0."""
    whole, fixed, *periods = match.groups()
    period = re.sub(r"\D", "", next(filter(None, reversed(periods))))
    top = int((whole or "0") + fixed + period) - int((whole or "0") + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _spelled(match: re.Match) -> str:
    """twenty-one as 21, two thirds as a fraction."""
    tens, ones, parts = (group.lower() if group else "" for group in match.groups())
    value = 10 * _TENS.index(tens or "zero") + _ONES.index(ones or "zero")
    return rf"\frac{{{value}}}{{{_PARTS[parts]}}}" if parts else str(value)


_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (  # spellings that run over several signs
    (r"^[\s*共]+|(?<!\^)[\s*]+$", ""),
    # `Area:`, `the answer is`: words that only announce the value behind them
    (rf"(?i)^\s*({_UP})?\s*(?![a-z ,]*\b(?:{'|'.join(DENIALS)})\b)(?:(?:[a-z]+[ ,]*){{1,8}}"
     r"(?:\bis|\bare|\bequals|:)|the\b)\s*(?(1)(\})?)\s*:?(?=\s*[\d\\$([{+-])",
     lambda match: "" if match[2] else match[1] or ""),  # `\text{Answer: 5}` keeps its brace
    (rf"(?<![0-9.]){_INVISIBLE}|{_INVISIBLE}(?![0-9.])", ""),
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(_RAISED) + "}"),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_RAISED) + "}"),
    (r"√\s?(\d+)", r"\\sqrt{\1}"),
    (rf"{_UP}\s?(\\\$)\s?\}}|\b(?:US|USD\s?)(?=\\\$|\d)(?:\\\$)?", r"\\$"),
    (r"\bRs\b\.?\s?(?=\d)", "₹"),
    (r"\\(?:pounds|textsterling)(?![a-zA-Z])", "£"),
    (r"(?<=\d)\s?x\s?(?=10\s?\^)", r"\\times "),
    (r"[^\x00-\x7f]", lambda match: match[0].translate(_TABLE)),
    (r"(?<![\w.'])\d{1,3}(?:'\d{3})+(?![\w'])", lambda match: match[0].replace("'", "")),
    (rf"^\s*({_MONEY})\s?-\s?(?=\d)", r"-\1"),
    (r"\*\*|[=<>!]=|=<|\.{3}", lambda match: _TYPED[match[0]]),
    (r"(?<![\d.])\d{1,3}(?:(?:\{,\}|\\[,;: ]|[ ~])\d{3})+(?!\d)", lambda match: re.sub(r"\D", "", match[0])),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s?(\{?\s?\d+\s?\}?(?:\d*\\dot\s?\{?\d\}?)?)|\((\d+)\))", _repeating),
    (r"(\d*)\.(\d{0,20}?)(?:(\d{2,20}?)\3+|(\d)\4{2,})\s?\\[lc]?dots(?![a-zA-Z])", _repeating),
    *[(r"(\\(?:[dtc]?frac|sqrt|[dt]?binom)\s*(?:\{[^{}]*\}|\[[^\]]*\])?)\s*(\d)", r"\1{\2}")] * 2,  # \frac12
    (r"\^\s*\{?\s*\\(circ|prime)(?![a-zA-Z])\s*\}?", r"\\\1 "),
    (r"\^\s*\{?\s*(?:\*|\\(?:ast|star|dagger)(?![a-zA-Z]))\s*\}?", "_{*}"),
    (r"\\forall(?![a-zA-Z])", r"\\text{for all }"),
    (r"(?i)per cent\b", "percent"),
    (r"(?i)\ball reals?\b(?! numbers?\b)", "all real numbers"),
    (r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\ "),
    (rf"\\frac\s*\{{\s*{_D}([a-z])\s*\}}\s*\{{\s*{_D}[a-z]\s*\}}", r"{\1'}"),
    (rf"\\frac\s*\{{\s*{_D}(?:\^\{{?\d\}}?)?\s*\}}\s*\{{\s*{_D}[^{{}}]*(?:\{{\d\}})?\}}|\\nabla", r"\\derivative "),
    (r"(?s)\\left\s*\\\{\s*\\begin\{array\}(?:\{\w*\})?(.*?)\\end\{array\}\s*\\right\s*\.",
     r"\\begin{cases}\1\\end{cases}"),
    (r"\{\s*([,:=<>])\s*\}", r"\1"),
    (r"\\(?:(?:wide)?(?:hat|vec)\s?(\{\s?)?\\?)?([ijk])(?:math)?(?![a-zA-Z])(?(1)\s?\})", r"{\2}"),
    (rf"(?<![\w}}])(?:\{{\}})?[_^]{_SUB}C_{_SUB}|\bC_{_SUB}\^{_SUB}", r"\\binom{\1\2\5\6}{\3\4\7\8}"),
    (r"\{\s*\\rm(?![a-zA-Z])([^{}]*)\}", r"\\mathrm{\1}"),
    (r"\\(mathrm|text|mbox)\s+([a-zA-Z])", r"\\\1{\2}"),
    (r"(?<=\d)(?:\\[,;: ]|[\s~])*([kM]?)\\Omega\s*$", r"\\text{ \1ohm}"),
    (r"(?s)\\begin\{(align\w*|gather\w*|split|eqn\w*|equation)\*?\}(.*?)\\end\{\1\*?\}",
     lambda match: match[2].replace("&", "")),
    (rf"(?i)\b(?=(?:{_OR_TENS}|{_OR_ONES})\b)(?:({_OR_TENS})\b[- ]?)?(?:({_OR_ONES})\b)?(?:[- ]({_OR_PARTS})s?\b)?",
     _spelled),
    (rf"(?<=\d)\s?({_UP}\s?)?({_OR_SCALES})(?![a-zA-Z])(?(1)\s?\}})", lambda match: rf"\cdot {SCALES[match[2]]} "),
    (rf"(?<=\d)\s?\{{\s?({_FRACTION})\s?\}}", r"\1"),
    (r"(?<![\d.])(\d+)[ ~](\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (rf"({_MONEY})\s?({_AMOUNT})", lambda match: rf"{match[2]}\text{{ {CURRENCIES[match[1]]} }}"),
    (rf"(?<=\d)\s?({_MONEY})", lambda match: rf"\text{{ {CURRENCIES[match[1]]} }}"),
    (rf"(?<=\d)\s?(?:{_UP}\s?to\s?\}}|\bto\b)\s?(?=\d)", ":"),
    (rf"\^?\s?\{{?\s?\\circ\s?\}}?\s?({_UP}\s?)?([CF])(?![a-zA-Z])(?(1)\s?\}})", r"\\text{deg\2}"),
    (rf"\(\s*({_UP})?\s*\\?b?mod(?![a-zA-Z])(?(1)\s*\}})([^()]*)\)", r"\\pmod{\2}"),
    (r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1\\text{ \2}"),
    (rf"\\frac\s*\{{{_UNIT}\}}\s*\{{{_UNIT}\}}", r"\1/\2"),
    (r"(?<=\d)\s?m/s(?:\^\{?2\}?)?\s*$", r"\\text{\g<0>}"),
    (r"\\(?:left|right)\s*\.|\\hline(?![a-zA-Z])|\\\s*$", " "),
    (rf"(?<![\d.])(\d*?)(?:(1[123]|[04-9])|(1)|(2)|(3))\s?\^?\s?(\{{\s?)?({_UP}\s?)?(?(2)th|(?(3)st|(?(4)nd|rd)))"
     r"(?!\w)(?(7)\s?\})(?(6)\s?\})", r"\1\2\3\4\5"),
)]  # fmt: skip

# The names that mpmath has for them.
FUNCTIONS = vocabulary("""sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth sech csch asinh
acosh atanh acoth log log10 exp expj gamma re im arg sign fabs""")
# What an answer leaves undone when it holds one of these.
OPERATORS = vocabulary("sum prod int iint iiint oint lim limsup liminf sup inf max min gcd lcm det tr mod derivative")
_SYNONYMS = """
frac dfrac tfrac cfrac nicefrac sfrac flatfrac; binom dbinom tbinom; leq le leqslant leqq; geq ge geqslant geqq;
neq ne; = equiv; asin arcsin; acos arccos; atan arctan arctg; tan tg; cot ctg; acot arccot arcctg; sinh sh; cosh ch;
asec arcsec; asinh arcsinh arsinh; acosh arccosh arcosh; atanh arctanh artanh; acsc arccsc; acoth arccoth; log ln;
log10 lg; expj cis; re Re; gamma Gamma; im Im; sign sgn; fabs abs; cdot ast star bullet; / div; < lt; > gt;
\\{ lbrace; \\} rbrace; | vert lvert rvert; \\| Vert lVert rVert; ( langle lparen; ) rangle rparen; [ lbrack; ] rbrack;
' prime; R reals Reals; overline bar; emptyset varnothing; infty infin infinity oo; land wedge; lor vee; mod bmod;
circ degree degrees; dots ldots cdots dotsc dotsb vdots; setminus backslash smallsetminus; phi varphi; theta vartheta;
epsilon varepsilon; to rightarrow longrightarrow; implies Rightarrow Longrightarrow therefore;
approx simeq thickapprox approxeq; : colon
"""
_ALIASES = {name: first for first, *others in map(str.split, _SYNONYMS.split(";")) for name in others}
_PROGRAM_NAMES = FUNCTIONS | vocabulary("ln lg arcsin arccos arctan pi sqrt oo infinity gcd lcm max min mod det abs")
_HIDDEN = vocabulary("""quad qquad enspace thinspace space displaystyle textstyle scriptstyle limits nolimits left
right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle boldsymbol bm mathbf mathit mathsf mathcal
mathnormal bf it underline angle triangle ensuremath boxed fbox framebox hfill strut checkmark square blacksquare Box
qed qedhere mathord mathbin mathrel mathop mathpunct mathinner mathstrut strut large Large LARGE huge Huge""")
_SMALL_WORDS = vocabulary("no yes up on am pm is in at if of to by be as an and or the not for half base")
_SCAN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?[eE][+-]?\d{1,4}(?![\w.])|\d+(?:\.\d+)?|\.\d+)"
    r"|\\begin\s*\{\s*(?P<begin>[a-zA-Z]+)\*?\s*\}(?:\s*\{[clr|@\s]*\})?|\\end\s*\{\s*(?P<end>[a-zA-Z]+)\*?\s*\}"
    r"|\\mathbb\s*(?:\{\s*)?(?P<field>[A-Z])(?:\s*\})?"
    r"|\\(?P<style>text(?!color)\w{0,6}|mathrm|mbox|hbox|operatorname)\*?\s*"
    r"\{(?P<upright>(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
    r"|(?P<hidden>\\(?:color|textcolor|[hmv]space|h?phantom|label|tag)\*?\s*\{[^{}]*\}|\s+|~|\\[,;:! >/()\[\]-])"
    r"|\\(?P<command>[a-zA-Z]+)|(?P<letters>[a-zA-Z\u00c0-\u024f]+|[\u0400-\u04ff]+|[\u3400-\u9fff]+)|(?P<sign>\\?.)",
    re.DOTALL | re.ASCII,
)


def tokenize(text: str, commas: bool = True) -> list[Token]:
    """The tokens of an answer. With `commas`, `1,234` outside of brackets is one number."""
    if _MIXED_DIGITS.search(text):
        raise UnreadableError("digits of two widths")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if commas and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    tokens = list(_scan(text, "", Token("", "")))
    while tokens and tokens[-1].text in (".", ",", ";", ":", r"\\"):
        tokens.pop()
    while len(tokens) > 2 and tokens[0].text in ("'", '"', "`") and tokens[-1].text in ("'", '"'):
        tokens = tokens[1:-1]
    return tokens


def _scan(text: str, style: str, before: Token) -> Iterator[Token]:
    """The tokens of a text; `style` is the command of upright text that it is in, `before` the token before it."""
    formula = False
    for match in _SCAN.finditer(text):
        kind = str(match.lastgroup)
        found = match[kind]
        tokens = [Token(kind, found)]
        if kind == "letters":
            tokens = _letters(found, "" if formula else style, before.kind == "number" or before.text == "}")
        elif kind == "upright":
            tokens = list(_scan(found, match["style"], before))
        elif kind == "field" and found not in "RZNQC":
            tokens = [Token("letter", found)]
        elif kind in ("command", "field"):
            name = _ALIASES.get(found, found)
            tokens = [Token("command" if name.isalnum() else "sign", name)] * (name not in _HIDDEN)
        elif kind == "sign":
            sign = found.removeprefix("\\") if found[1:] in ("%", "&", "#", "_") else found
            tokens = [Token("command", "cdot") if sign == "*" else Token("sign", sign)] * (sign not in ("$", "#"))
            formula ^= sign == "$"
        if kind != "hidden":
            yield from tokens
            before = tokens[-1] if tokens else before


def _letters(run: str, style: str, after_value: bool) -> list[Token]:
    """A run of letters: a function, a word, or variables side by side: xyz is a product, `even` is a word."""
    if run.lower() in ("percent", "pct", "percentage") and after_value:
        return [Token("sign", "%")]
    known = run in FUNCTIONS | OPERATORS or run in _ALIASES if style else run in _PROGRAM_NAMES
    if known and len(run) > 1 and (style == "operatorname" or not (after_value and run in ("min", "sec"))):
        return [Token("command", _ALIASES.get(run, run))]
    vowels = len(run) > 2 and not run.isupper() and bool(re.search(r"[aeiouAEIOU]", run))
    spoken = (len(run) > 4 or vowels) and not set(run) <= set("abcdxyz")
    word = spoken or run.lower() in _SMALL_WORDS or not run.isascii() or (after_value and run in BARE_UNITS)
    if (style == "mathrm" and run in ("e", "i", "d")) or not (style or word):
        return [Token("letter", letter) for letter in run]
    return [Token("word", run)]


def plain(tokens: Sequence[Token]) -> str:
    """One line for each sequence of tokens: equal texts are equal lines, whatever their spacing."""
    line, before = "", ""
    for kind, text in tokens:
        spoken = "word" in (before, kind) or before == kind == "number"
        apart = spoken and {before, kind} <= {"word", "number", "letter"}
        line, before = line + " " * apart + "\\" * (kind in ("command", "begin", "end")) + text, kind
    return line
