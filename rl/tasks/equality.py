"""Comparison of answers as numbers, or as mathematical expressions in LaTeX.

Two integers or fractions are equal if they are exactly so. A decimal may be rounded: it counts if
it differs by at most 1e-6 of the reference, unless the reference is an integer. The rule is the
same however a number is written, `1/3` or `\\frac{1}{3}`, and applies within tuples, sets, matrices
and equations too.
"""

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rl.tasks import algebra
from rl.tasks.algebra_child import close

_LONGEST = 1000  # characters of an expression
_LONGEST_NUMBER = 200

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—−﹣－"), "-")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_CHARACTERS = _FULL_WIDTH | _DASHES
_SYMBOLS = {ord(char): latex for char, latex in {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "°": r"^\circ ", "√": r"\sqrt ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"}.items()}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))

_INTEGER = r"[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,|\\ | )[0-9]{3})+|[0-9]+"
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\,|\\ |[, ]")
_POWER = r"[eE](?P<e>[+-]?[0-9]+)|\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*(?P<brace>\{)?" \
         r"(?P<power>[+-]?[0-9]+)(?(brace)\})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*\\?\$?\s*(?:"
    rf"(?P<integer>{_INTEGER})?(?P<decimals>\.[0-9]+)?(?:{_POWER})?"
    rf"|(?P<numerator>{_INTEGER})/(?P<denominator>[0-9]+)"
    rf"|(?:(?P<whole>[0-9]+)\s*)?(?:(?<=\s)(?P<top>[0-9]+)/(?P<bottom>[0-9]+)"
    rf"|\\[dt]?frac\s*(?:\{{\s*(?P<top2>[0-9]+)\s*\}}\s*\{{\s*(?P<bottom2>[0-9]+)\s*\}}"
    rf"|(?P<top3>[0-9])(?P<bottom3>[0-9]))))")
_LARGEST_POWER = 9999

_EXPONENT = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([+-]?[0-9]+)(?!\w)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z*]+\}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox|operatorname)\s*\{[^{}]*\}")
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|log|ln|exp)(?![a-zA-Z])")
_WORDS = re.compile(r"(?<![\\a-zA-Z])(?!(?:and|sqrt)(?![a-zA-Z]))[a-zA-Z]{3,}")


class _Number(NamedTuple):
  """A number, and how it was written.

  Attributes:
    value: the exact value.
    decimal: whether it was written with a decimal point or an exponent.
  """

  value: Fraction
  decimal: bool

  def latex(self) -> str:
    """Returns the number as LaTeX that states the same value, as a decimal if it was one."""
    if self.decimal and self.value.denominator > 1:
      return f"{_decimal(self.value)}"
    top = str(self.value.numerator)
    return top if self.value.denominator == 1 else rf"\frac{{{top}}}{{{self.value.denominator}}}"


def number(text: str) -> Fraction | None:
  """Returns the exact value of a text that is a number and nothing else, or None.

  Numbers are integers, decimals, fractions and mixed numbers, such as `-1,234.5`, `$3`, `1e-5`,
  `7/2`, `\\frac{7}{2}`, `3 1/2`, `6.63\\times10^{-34}`, and `７` or `–5` in characters that ASCII
  lacks.
  """
  found = _number(text)
  return found and found.value


def is_parsable(answer: str) -> bool:
  """Whether an answer is a number or LaTeX, so that others can be compared with it."""
  return are_parsable([answer])[0]


def are_parsable(answers: Sequence[str]) -> list[bool]:
  """Returns `is_parsable` of each answer, checking several at a time."""
  return [verdict is True for verdict in same_answers([(answer, answer) for answer in answers])]


def same_answer(given: str, gold: str) -> bool | None:
  """Whether `given` equals the reference `gold`; None if `gold` is neither a number nor LaTeX.

  Numbers are compared here, everything else by math-verify with a limit on its time. What it cannot
  compare in that time counts as different.

  Raises:
    RuntimeError: if the process in which math-verify runs does not start.
  """
  return same_answers([(given, gold)])[0]


def same_answers(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
  """Returns `same_answer` of each pair (given, gold), comparing several at a time."""
  golds = list(dict.fromkeys(gold for _, gold in pairs if _number(gold) is None))
  latex = {text: _latex(text) for pair in pairs for text in pair}
  known = [gold for gold in golds if latex[gold]]
  usable = dict(zip(known, algebra.same_many((latex[gold], latex[gold]) for gold in known),
                    strict=True))
  verdicts, open_ = [], []
  for given, gold in pairs:
    reference, guess = _number(gold), _number(given)
    if reference and guess:
      verdicts.append(close(guess.value, reference.value, guess.decimal or reference.decimal))
    elif not reference and usable.get(gold) is not True:
      verdicts.append(None)
    elif not latex[given]:
      verdicts.append(False)
    else:
      open_.append(len(verdicts))
      verdicts.append(None)
  compared = algebra.same_many((latex[pairs[i][0]], latex[pairs[i][1]]) for i in open_)
  for i, verdict in zip(open_, compared, strict=True):
    verdicts[i] = verdict is True
  return verdicts


def ascii_signs(text: str) -> str:
  """Returns the text with ASCII digits, letters, punctuation and minus signs for their variants."""
  return text.translate(_CHARACTERS)


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> _Number | None:
  text = _clean(text)
  match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
  if not match or not re.search("[0-9]", text):
    return None
  part = lambda name: int(_SEPARATOR.sub("", match[name] or "0"))
  sign = -1 if match["sign"] == "-" else 1
  for top, bottom in (("numerator", "denominator"), ("top", "bottom"), ("top2", "bottom2"),
                      ("top3", "bottom3")):
    if match[top]:
      if not part(bottom):
        return None
      return _Number(sign * (part("whole") + Fraction(part(top), part(bottom))), False)
  decimals, power = match["decimals"] or "", int(match["e"] or match["power"] or 0)
  if not (match["integer"] or decimals) or abs(power) > _LARGEST_POWER:
    return None
  value = Fraction(f"{part('integer')}{decimals}") * Fraction(10) ** power
  return _Number(sign * value, bool(decimals or match["e"] or match["power"]))


def _clean(text: str) -> str:
  """Returns the text without delimiters of mathematics, emphasis and the sentence's full stop."""
  text, before = ascii_signs(text), None
  while text != before:
    before = text
    text = text.strip().rstrip(" \n\t.。,;\\")
    for opening, closing in _DELIMITERS:
      inner = text[len(opening):-len(closing)]
      if (len(text) > len(opening + closing) and text.startswith(opening)
          and text.endswith(closing) and opening not in inner):
        text = inner
  return text


@functools.lru_cache(maxsize=8192)
def _latex(text: str) -> str | None:
  """Returns an answer as LaTeX for math-verify; None for words and for what is too long."""
  found = _number(text)
  if found:
    return found.latex()
  text = _clean(text).strip("$").strip()
  text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
  text = _EXPONENT.sub(r"\1\\times10^{\2}", text.translate(_SYMBOLS))
  text = _FUNCTION.sub(r"\\\1", text)
  bare = _ENVIRONMENT.sub(" ", text)
  rest = _TEXT.sub(" ", bare)
  words = rest if re.search("[0-9]", rest) else bare
  return None if not text or len(text) > _LONGEST or _WORDS.search(words) else text


def _decimal(value: Fraction) -> str:
  """Returns a fraction whose denominator divides a power of ten as `digits` or `digits x 10^n`."""
  places = 0
  while value.denominator > 1:
    value, places = value * 10, places + 1
  return rf"{value.numerator}.0\times10^{{-{places}}}"
