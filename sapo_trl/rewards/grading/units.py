r"""Units of measure and the nouns of counting: split off a value, and compared by name.

A bare letter is a variable (`3h` is 3·h, not three hours); only a word of at least two letters, or a letter set upright
(`3\text{ h}`), is a unit. A word that is not in this table is no unit, so that `5 \text{ is wrong}` is not 5.
"""

import re

# One line per unit: its name first, then every other spelling.
_TABLE = """
mm millimeter millimetre
cm centimeter centimetre
dm decimeter decimetre
m meter metre
km kilometer kilometre kms
inch in inches
foot feet ft
yard yd
mile mi
mg milligram
g gram gm
kg kilogram
lb pound lbs
oz ounce
ton tonne
ml milliliter millilitre
L l liter litre
gallon gal
s sec second secs
min minute mins
h hr hour hrs
day
week
month
year yr yrs
dollar usd buck
cent
euro eur
rupee rs
radian rad
unit
N newton
J joule
W watt
V volt
A amp ampere
K kelvin
Hz hertz
Pa pascal
mol mole
mile/h mph
km/h kmh kph
acre
hectare
person people
student
child children
man men
woman women
boy
girl
way
point
integer
number
solution
digit
coin
ball
card
book
marble
triangle
square
pair
step
time
page
ticket
car
side
edge
vertex vertices
face
game
tile
hat
question
bag
box boxes
"""
_UNITS = {word: line.split()[0] for line in _TABLE.strip().splitlines() for word in line.split()}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", "₹": "rupee", r"\text{€}": "euro"}

_UPRIGHT = re.compile(r"((?:\s?/?\s?(?:\\cdot\s?)?\\text\{[^{}]{1,60}\}(?:\^(?:\{-?\d\}|\d))?){1,3})$")
_POWER = r"(?:\^(?:\{\d\}|\d))?"
_WORDS = re.compile(rf"(?<=[\d\s}})])([a-zA-Z]{{2,15}}\.?{_POWER}(?:[\s/]{{1,2}}[a-zA-Z]{{1,15}}\.?{_POWER}){{0,3}})$")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # sin 30° is no angle but the sine of one
_CELSIUS = re.compile(r"\^\\circ\s?(?:\\text\{\s?([CF])\s?\}|([CF]))$")
_TOKEN = re.compile(r"[a-zA-Z]+|\^(?:\{-?\d\}|-?\d)|/")


def unit_name(words: str, upright: bool = True) -> str | None:
    """Canonical name of a unit phrase, None when one of its words is no unit.

    >>> unit_name("square centimeters"), unit_name("cm^2"), unit_name("miles per hour"), unit_name("is wrong")
    ('cm^2', 'cm^2', 'mile/h', None)
    """
    words = words.replace(r"\text", " ").replace(r"\cdot", " ").replace("per ", "/")
    words = re.sub(r"\^\{(-?\d)\}", r"^\1", words)
    name, power = [], ""
    tokens = _TOKEN.findall(words)
    for index, token in enumerate(tokens):
        if token in _POWERS and index + 1 < len(tokens):
            power = _POWERS[token]
        elif token[0] in "^/":
            name.append(token)
        else:
            known = _known_unit(token, upright or bool(name))  # the h of km/h is an hour
            if known is None:
                return None
            name.append(known + power)
            power = ""
    return "".join(name) if name and name[0][0] not in "^/" else None


def _known_unit(word: str, upright: bool) -> str | None:
    if len(word) == 1:
        return _UNITS.get(word) if upright else None
    for spelling in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if spelling in _UNITS:
            return _UNITS[spelling]
    return None


def split_unit(text: str) -> tuple[str, str | None]:
    r"""A respelled text as (value, unit); the unit is None when there is none.

    >>> split_unit(r"3\text{ cm}^2"), split_unit("12 km/h"), split_unit("3h"), split_unit(r"\$5")
    (('3', 'cm^2'), ('12', 'km/h'), ('3h', None), ('5', 'dollar'))
    """
    for sign, name in _CURRENCIES.items():
        if text.startswith(sign) and len(text) > len(sign):
            return text.removeprefix(sign).strip(), name
        if text.endswith(sign) and len(text) > len(sign):
            return text.removesuffix(sign).strip(), name
    if match := _CELSIUS.search(text):
        return text[: match.start()].strip(), "degree " + (match.group(1) or match.group(2))
    if text.endswith(r"^\circ") and not _TRIGONOMETRIC.search(text):
        return text.removesuffix(r"^\circ").strip(), "degree"
    for pattern, upright in ((_UPRIGHT, True), (_WORDS, False)):
        match = pattern.search(text)
        if match and match.start() > 0:
            name = unit_name(match.group(1), upright)
            if name:
                return text[: match.start()].strip(), name
    return text, None
