"""Units of answers: `10 cm`, `42 m/s`, `$5`, `5 apples` and `10\\text{ inches}`.

Units are compared by spelling only: `100 cm` and `1 m` have different units and different values.
"""

import re

_LONGEST = 200  # characters of an answer with a unit

_SPELLINGS = """
mm millimeter millimetre; cm centimeter centimetre; dm decimeter decimetre; m meter metre;
km kilometer kilometre; in inch; ft foot feet; yd yard; mi mile; g gram gramme gm;
kg kilogram kilo; mg milligram; lb pound lbs; oz ounce; ton tonne; l L liter litre;
ml mL milliliter millilitre; gal gallon; pt pint; qt quart; tbsp tablespoon; tsp teaspoon;
s second sec; ms millisecond; min minute; h hour hr; day; wk week; month; yr year;
$ \\$ dollar USD buck US\\$ US$; € euro EUR; £ GBP; ¥ yen JPY; yuan RMB CNY; ₹ rupee INR Rs;
¢ cent; ° degree deg ^\\circ \\circ ^{\\circ}; °C celsius; °F fahrenheit; rad radian; % \\%;
N newton; J joule; kJ kilojoule; W watt; kW kilowatt; kWh; V volt; A ampere amp; K kelvin;
Hz hertz; kHz; MHz; Pa pascal; kPa; C coulomb; mol mole; Ω ohm; acre; hectare; unit; th st nd rd;
am AM; pm PM; person people; child children; man men; woman women; sheep; fish; mouse mice; cup;
foot-pound; ticket; cookie; movie; pie; tie; calorie; zombie; brownie; selfie; rookie; bus buses;
gas gases; glass; class; dress; box; dish; bench; watch; match; lunch; peach; sandwich; bush;
branch
"""
_UNITS = {word: words[0] for words in (group.split() for group in _SPELLINGS.split(";"))
          for word in words}
_RATES = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1)),
          "kmh": (("km", 1), ("h", -1)), "kmph": (("km", 1), ("h", -1)),
          "mpg": (("mi", 1), ("gal", -1))}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
# Pairs that may mean the same: degrees may be those of a temperature, and pounds may be money.
_COMPATIBLE = [{"°", "°C"}, {"°", "°F"}, {"lb", "£"}]
# Symbols that are more likely a product of variables directly after a number, as in `2mg`.
_PRODUCTS = frozenset(["m", "g", "s", "h", "l", "L", "mg", "ml", "ms", "pt", "mi"])

# Words after a number that change its value or continue an expression.
_NO_UNITS = re.compile(
    r"(?:and|or|not|plus|minus|times|over|mod|modulo|base|remainder|factorial|choose|divided|"
    r"multiplied|raised|point|half|halves|third|quarter|quarters|thirds|tens|ones|dozens?|scores?|"
    r"pairs?|negative|if|when|where|for|with|from|than|less|is|was|has|this|its|yes|else|unless|"
    r"pi|inf|infinity|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|max|gcd|lcm|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+(?:teen|ty)|"
    r"\w*(?:hundred|thousand|illion)s?|\w+(?:fth|xth|nth|hth|dth)s?)", re.IGNORECASE)

_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|operatorname)\s*" \
    r"\{(?:[^{}]|\{[^{}]*\})*\}"
_SPACE = r"(?:\s|~|\\[,;:! ]|\\quad)"
_WORD = rf"(?:{_TEXT}|\^\{{\\circ\}}|\^?\\circ|\\?[$%]|[€£¥₹¢°Ω]|(?:US\\?\$)|[a-zA-Z]++\.?)"
_POWER = r"(?:\s*\^\s*(?:-?[0-9]|\{\s*-?[0-9]\s*\}))?"
_JOIN = rf"(?:{_SPACE}|\\cdot(?![a-zA-Z])|[*/-])*"
_TAIL = re.compile(
    rf"(?P<value>.*?(?:[0-9)!}}\]]|\\pi(?![a-zA-Z])))(?P<tail>{_SPACE}*{_WORD}{_POWER}"
    rf"(?:{_JOIN}{_WORD}{_POWER}){{0,4}})", re.DOTALL)
_TEXT_TAIL = re.compile(
    rf"(?P<value>.*?[a-zA-Z0-9)!}}\]])(?P<tail>{_SPACE}*{_TEXT}{_POWER}"
    rf"(?:{_JOIN}{_WORD}{_POWER}){{0,4}})", re.DOTALL)
_HEAD = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<unit>US\\?\$|\\?\$|[€£¥₹]|(?:USD|EUR|GBP|INR|Rs\.?)(?=[\s0-9]))\s*"
    r"(?P<value>[-+]?[0-9.\\(].*)", re.DOTALL)
_RATE = re.compile(rf"\\[dt]?frac\s*\{{\s*({_TEXT})\s*\}}\s*\{{\s*({_TEXT}{_POWER})\s*\}}")
_TOKEN = re.compile(
    r"\^\{?\\circ\}?|\\circ|\^\s*\{?\s*-?[0-9]|US\\?\$|\\?[$%]|[€£¥₹¢°Ω]|/|[a-zA-Z]+")
# What is not a variable or a separator in a number or a command.
_NO_LETTERS = re.compile(r"\\(?:[a-zA-Z]+|[,; !])|(?<=[0-9])(?:,(?=[0-9]{3}(?![0-9]))|"
                         r"[eE](?=[-+]?[0-9]))|\{,\}")
_SIDE = re.compile(r"\s*\\?[a-zA-Z](?:_\{?\w+\}?)?\s*(?:=|\\approx|≈)")


def split(text: str, adjacent: bool) -> tuple[str, str | None]:
  """Returns an answer's value and its unit in a canonical spelling, None if it has no unit.

  Args:
    text: the answer, in which superscripts are written with `^`.
    adjacent: whether a symbol that could be a variable is a unit if it directly follows the number.
      `5 m` always has a unit, while `5m` may be a product.
  """
  if len(text) > _LONGEST:
    return text, None
  if head := _HEAD.fullmatch(text):
    value = head["sign"] + head["value"]
    return (value, _canonical(head["unit"])) if _is_constant(value) else (text, None)
  text = _RATE.sub(r"\1/\2", text)
  for pattern in (_TAIL, _TEXT_TAIL):
    tail = pattern.fullmatch(text)
    unit = _unit(tail["value"], tail["tail"], adjacent) if tail else None
    if unit:
      return tail["value"] + r"\%" * (unit == "%"), unit
  return text, None


def differ(first: str | None, second: str | None) -> bool:
  """Whether two answers state units, as `split` returns them, that are not the same."""
  return bool(first and second) and first != second and {first, second} not in _COMPATIBLE


def _unit(value: str, words: str, adjacent: bool) -> str | None:
  """Returns the unit that words after a value are, or None if they are none."""
  constant, in_text = _is_constant(value), re.search(_TEXT, words)
  if (re.search(r"[\^_]\s*\{?$", value) or not (in_text or constant)
      or not _may_be_unit(words, adjacent)):
    return None
  is_one = value.strip() in ("1", "-1")
  return _canonical(words, singular=is_one or bool(in_text and constant))


def _is_constant(value: str) -> bool:
  """Whether a value, perhaps after `x =`, is an expression or a tuple without variables."""
  value = _SIDE.sub("", value, count=1).strip()
  letters = _NO_LETTERS.sub("", value)
  separators = "" if value.startswith(("(", "[", r"\{")) else ",;"
  return bool(value) and not re.search(rf"[a-zA-Z<>={separators}]", letters)


def _may_be_unit(words: str, adjacent: bool) -> bool:
  """Whether the words after a number are not variables; see `split` for `adjacent`."""
  symbols = re.findall("[a-zA-Z]+", words)
  if not words[0].isalpha() or not all(len(one) == 1 or one in _PRODUCTS for one in symbols):
    return True
  return adjacent and _PRODUCTS.issuperset(symbols)


def _canonical(words: str, singular: bool = False) -> str | None:
  """Returns a unit in canonical spelling; None for words that are no unit.

  Args:
    words: the unit as it was written.
    singular: whether a word that is not in the list of units may be one without a final `s`.
  """
  spelled = re.sub(_TEXT, lambda text: f" {text[0][text[0].index('{') + 1:-1]} ", words)
  spelled = re.sub(r"\b([ap])\.\s*m\b", r"\1m", spelled)
  if re.search(r"[^\sa-zA-Z0-9()\\^{}/*$€£¥₹¢°Ω%.,;:!~-]", spelled):
    return None
  factors, sign, power = {}, 1, 1
  tokens = _TOKEN.findall(re.sub(r"\\cdot|\\quad", " ", spelled))
  if re.search(r"\bper\s?cent(?:age)?\b|\bpct\b", spelled, re.IGNORECASE):
    return "%" if len(tokens) == 1 + ("cent" in tokens) else None
  last = None
  for at, token in enumerate(tokens):
    if token in ("/", "per"):
      sign = -1
      continue
    exponent = re.fullmatch(r"\^\s*\{?\s*(-?[0-9])", token)
    if exponent or token in _POWERS_AFTER:
      if last is None:
        return None
      factors[last] *= int(exponent[1]) if exponent else _POWERS_AFTER[token]
      continue
    if token.lower() in _POWERS:
      power = _POWERS[token.lower()]
      continue
    found = _factors(token, at == len(tokens) - 1, singular)
    if found is None:
      return None
    for last, by in found:
      factors[last] = factors.get(last, 0) + sign * power * by
    sign, power = (1, 1) if found else (sign, power)
  temperature = {"°C", "°F", "C", "F"} & factors.keys()
  if "°" in factors and temperature:
    return f"°{temperature.pop()[-1]}"
  powers = sorted(factors.items())
  return " ".join(f"{unit}^{by}" if by != 1 else unit for unit, by in powers) or None


def _factors(word: str, last: bool, singular: bool) -> tuple[tuple[str, int], ...] | None:
  """Returns the units that a word stands for: none for an adjective; None if it is no unit."""
  lower = word.lower()
  if lower in _RATES:
    return _RATES[lower]
  for spelling in (word, *([lower] if len(word) > 2 else ())):
    for end in ("", "s", "es"):
      stem = spelling.removesuffix(end) if end else spelling
      if stem in _UNITS and (len(stem) > 1 or not end):
        return ((_UNITS[stem], 1),)
  if word == "F":
    return (("°F", 1),)
  if word == "US":
    return ()
  if len(word) < 3 or _NO_UNITS.fullmatch(word):
    return None
  if not last:
    return ()
  if lower.endswith("s") or singular:
    return ((re.sub("ies$", "y", lower) if lower.endswith("ies") else
             re.sub("(?<!s)s$", "", lower), 1),)
  return None
