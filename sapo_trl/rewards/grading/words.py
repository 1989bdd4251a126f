"""What words mean in an answer: connectives, clauses, texts, units and counted nouns."""

import re
from collections import Counter


def vocabulary(text: str) -> frozenset[str]:
    return frozenset(text.split())


AND = vocabulary("and und et y 和 与 及")
OR = vocabulary("or oder ou 或")
CLAUSES = vocabulary("for where with if when such given whenever provided otherwise")
QUANTIFIERS = vocabulary("all any every each some arbitrary constant constants integer integers real reals")
RESTRICTIONS = vocabulary("not except unless or but maybe other only")
DENIALS = vocabulary("not no never isn wrong incorrect false maybe perhaps approximately about other")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
          "万": 10**4, "亿": 10**8}  # fmt: skip
EVERYTHING = ("all real numbers", "all real number", "all reals", "real numbers", "reals")
# Words that say the same. Everything else that is text must be the same text.
SAME_TEXTS = [set(group.split(", ")) for group in (
    "no solution, none, no real solution, empty set", "does not exist, dne, limit does not exist",
    "undefined, not defined", "infinitely many, infinite, infinitely many solution",
)]  # fmt: skip
# Units: a name, then its other spellings, without plurals in -s.
_SPELLINGS = """
inch in inches; foot feet ft; yard yd; mile mi; pound lb lbs; ounce oz; ton tonne; gallon gal; acre; hectare ha; unit;
s sec secs 秒; minute min mins 分钟 分; hour h hr hrs 小时 时; day d 天 日; week 周; month 月; year yr yrs 年 岁;
dollar usd buck; cent ¢; euro eur €; gbp £; rupee rs inr ₹; yuan rmb cny 元 块 ¥; degree deg 度; radian rad rads; degC;
degF; mile/hour mph; km/hour kmh kph kmph; m 米; cm 厘米; mm 毫米; km 千米 公里; g 克; kg kilo 千克 公斤; L l 升;
mL ml 毫升; m^2 平方米; cm^2 平方厘米; km^2 平方千米 平方公里; m^3 立方米; cm^3 立方厘米
"""
_BASES = """
m meter metre; g gram gramme; L liter litre; s second; N newton; J joule; W watt; V volt; A ampere amp; Hz hertz;
Pa pascal; mol mole; K kelvin; eV electronvolt; cal calorie; B byte; bit; C coulomb; ohm
"""
_PREFIXES = {"": "", "k": "kilo", "c": "centi", "m": "milli", "d": "deci", "n": "nano", "M": "mega", "G": "giga"}
_UNITS: dict[str, str] = {spelling: names.split()[0] for names in _SPELLINGS.split(";") for spelling in names.split()}
for _base, *_names in map(str.split, _BASES.split(";")):
    for _short, _long in _PREFIXES.items():
        _UNITS |= {s: _short + _base for s in (_short + _base, *(_long + name for name in _names)) if s not in _UNITS}
# Units that are read without any markup: 5 cm, but not 5m.
BARE_UNITS = vocabulary("""cm mm km dm kg mg gm ml mL hr hrs min mins sec secs ft in yd mi lb lbs oz gal mph kmh kph
yr yrs Hz kHz Pa kPa mol rad usd USD kJ kW""")
CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "gbp", "₹": "rupee", "¥": "yuan", "¢": "cent"}
_WRITTEN_OUT = [
    (r"\\cdot|\.|\b(?:old|each|tall|high|long|wide|away|ago)\b", " "), (r"\bper\b", "/"),
    (r"\b(?:square|sq)\s+(\w+)|\b(\w+) squared", r"\1\2^2"), (r"\b(?:cubic|cu)\s+(\w+)|\b(\w+) cubed", r"\1\2^3"),
]  # fmt: skip
_PHRASE = re.compile(r"([^\W\d_]+|/)(?:\^\{?(-?\d+)\}?)?")
_PLURALS = vocabulary("people men women children feet teeth mice geese oxen dice data fish sheep deer vertices")
# Words that make another value of the one before them, doubt it, deny it, or go on with a sentence.
_NO_NOUNS = vocabulary(r"""or and not? nor is was are be if else otherwise unless because since as than then thus so
by with without for from to of at in on per over under about around nearly almost roughly approx\w* maybe perhaps
possibly probably likely wrong false incorrect right correct true guess\w* plus minus times divide\w* multipl\w*
add\w* subtract\w* squared? cubed? roots? powers? factorials? half halves thirds? quarters? fourths? fifths? \w+ths
dozens? hundreds? thousands? millions? billions? trillions? pairs? percent\w* more less fewer most least up down
mod\w* bases? negatives? inverse reciprocals? logs? this its us yes has does equals fails versus vs pi \w""")
_NOT_COUNTED = re.compile(rf"\b(?:{'|'.join(_NO_NOUNS)})\b")
_NOT_CHINESE = re.compile(r"[或不非和与及万亿千百十零一二三四五六七八九半多余约几分之上下左右以内对错可]")


def text_key(text: str) -> str:
    """Words without capitals, articles, `is`, hyphens and the preposition in front."""
    text = re.sub(r"[.\"'!?]", "", text.lower().replace("-", " "))
    text = re.sub(r"^\s*(?:on|in|at)\s|\b(?:the|an?|is)\s", "", text)
    return re.sub(r"\bsolutions\b", "solution", re.sub(r"\b([ap]) m\b", r"\1m", " ".join(text.split())))


def unit_of(phrase: str, is_one: bool = False) -> str | None:
    """The one name of a unit phrase; None if it is neither a unit nor a counted noun."""
    powers, sign, written = Counter(), 1, phrase
    for pattern, replacement in _WRITTEN_OUT:
        written = re.sub(pattern, replacement, written)
    for token, power in _PHRASE.findall(written):
        low = token.lower()
        unit = next((_UNITS[s] for s in (token, low, low.removesuffix("s"), low.removesuffix("es")) if s in _UNITS), "")
        if not unit and token != "/":
            return _counted_noun(phrase.lower(), is_one)
        above, _, below = unit.partition("/")
        powers[above] += sign * int(power or 1)
        powers[below] -= sign
        sign = -1 if token == "/" else sign
    names = [unit + f"^{power}" * (power != 1) for unit, power in sorted(powers.items()) if unit and power]
    return " ".join(names) or None


def _counted_noun(phrase: str, is_one: bool) -> str | None:
    last = phrase.split()[-1]
    if not phrase.isascii():
        return phrase if len(phrase) <= 4 and phrase.isalpha() and not _NOT_CHINESE.search(phrase) else None
    counted = is_one or last in _PLURALS or (last.endswith("s") and not last.endswith("ss"))
    odd = len(last) < 3 or phrase.count(" ") > 4 or not phrase.replace(" ", "").isalpha() or _NOT_COUNTED.search(phrase)
    return phrase.removesuffix("s") if counted and not odd else None


def kind_of_join(text: str) -> str:
    """`or`, `and` or `,`, of which the greatest names what several of them say."""
    return "or" if text in OR or text == "lor" else "and" if text in AND or text == "land" else ","
