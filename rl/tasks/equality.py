"""Comparison of answers as numbers, or as mathematical expressions in LaTeX.

Two integers or fractions are equal if they are exactly so. A decimal may be rounded: it counts if
it differs by at most 1e-6 of the reference, unless the reference is an integer. The rule is the
same however a number is written, `1/3` or `\\frac{1}{3}`, and applies within tuples, sets, matrices
and equations too.

An answer may state a unit or leave it out, but it must not state another unit than the reference.
"""

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rl.extraction import unfenced
from rl.tasks import algebra, notation, units
from rl.tasks.algebra_child import close

_LONGEST = 1000  # characters of an expression
_LONGEST_NUMBER = 200

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—−﹣－"), "-")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f"), " ")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_CHARACTERS = _FULL_WIDTH | _DASHES | _SPACES | _INVISIBLE
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"),
               ("```", "```"), ("`", "`"))
_INLINE = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\((.+?)\\\)")
_UNIMPORTANT_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)|(?<=[0-9])\s+(?=[a-zA-Z])")
_EQUALS = re.compile(r"(?:(?:=|≈|\\approx(?![a-zA-Z]))\s*)+")

_INTEGER = r"[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,|\\ | )[0-9]{3})+|[0-9]+"
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\,|\\ |[, ]")
_POWER = r"[eE](?P<e>[+-]?[0-9]+)|\s*(?:\\times|\\cdot|\*|[x×·⋅])\s*10\s*(?:\^|\*\*)\s*" \
         r"(?P<brace>\{)?(?P<power>[+-]?[0-9]+)(?(brace)\})"
_PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")
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


class _Answer(NamedTuple):
  """An answer without its unit.

  Attributes:
    number: the answer as a number; None if it is not one.
    latex: the answer as LaTeX; None if it has words or is too long.
    unit: the unit, see `units.split`; None if there is none.
    variable: the variable, if the answer is a union of inequalities such as `x<1 or x>2`.
  """

  number: _Number | None
  latex: str | None
  unit: str | None = None
  variable: str | None = None


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
  answers = {gold: _answer(gold) for _, gold in pairs if _number(gold) is None}
  golds = [gold for gold, answer in answers.items() if answer.latex and not answer.number]
  usable = dict(zip(golds, algebra.same_many((answers[gold].latex,) * 2 for gold in golds),
                    strict=True))
  usable |= {gold: True for gold, answer in answers.items() if answer.number}
  verdicts, open_ = [], []
  for given, gold in pairs:
    reference, guess = _number(gold), _number(given)
    if reference and guess:
      verdicts.append(_close(guess, reference))
    elif not reference and usable.get(gold) is not True:
      verdicts.append(None)
    else:
      verdict = _compared(given, gold)
      if not isinstance(verdict, bool):
        open_.append((len(verdicts), *verdict))
      verdicts.append(verdict)
  compared = algebra.same_many((given, gold) for _, given, gold in open_)
  for (i, *_), verdict in zip(open_, compared, strict=True):
    verdicts[i] = verdict is True
  return verdicts


def ascii_signs(text: str) -> str:
  """Returns the text with ASCII digits, letters, punctuation, minus signs and spaces.

  Characters of no width are left out.
  """
  return text if text.isascii() else text.translate(_CHARACTERS)


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> _Number | None:
  if len(text) <= _LONGEST_NUMBER and (plain := _PLAIN.fullmatch(text)):
    return _Number(Fraction(text), bool(plain[1]))
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
  """Returns the text without delimiters, emphasis, a leading equals sign and final punctuation."""
  text, before = ascii_signs(text), None
  while text != before:
    before = text
    text = text.strip().rstrip(" \n\t.。,;?\\")
    if "`" in text:
      text = unfenced(text)
    if opening := _EQUALS.match(text):
      text = text[opening.end():]
    for opening, closing in _DELIMITERS:
      inner = text[len(opening):-len(closing)]
      if (len(text) > len(opening + closing) and text.startswith(opening)
          and text.endswith(closing) and opening not in inner):
        text = inner
  return text


def _close(guess: _Number, reference: _Number) -> bool:
  return close(guess.value, reference.value, guess.decimal or reference.decimal)


def _compared(given: str, gold: str) -> bool | tuple[str, str]:
  """Returns a verdict that needs no computer algebra, or the LaTeX of both answers."""
  reference = _answer(gold)
  # In the reference `5m` is a product, but in an answer to `5` or `5 m` it is a unit.
  guess = _answer(given, adjacent=bool(reference.number))
  if _UNIMPORTANT_SPACE.sub("", given) == _UNIMPORTANT_SPACE.sub("", gold):
    return True
  if (units.differ(guess.unit, reference.unit) or not guess.latex
      or (guess.variable and reference.variable and guess.variable != reference.variable)):
    return False
  if guess.number and reference.number:
    return _close(guess.number, reference.number)
  return guess.latex, reference.latex


@functools.lru_cache(maxsize=8192)
def _answer(text: str, adjacent: bool = False) -> _Answer:
  """Returns an answer's value and unit; see `units.split` for `adjacent`."""
  found, text = _number(text), _clean(text)
  if found:
    return _Answer(found, found.latex(), "$" if "$" in text else None)
  if len(text) > _LONGEST:
    return _Answer(None, None)
  text = _INLINE.sub(lambda match: match[1] or match[2], text)  # as in `$10$ cm`
  value, unit = units.split(notation.with_ascii_numbers(text), adjacent)
  if unit and (found := _number(value)):
    return _Answer(found, found.latex(), unit)
  latex, variable = notation.as_latex(value.strip("$").strip())
  latex = _EXPONENT.sub(r"\1\\times10^{\2}", latex)
  bare = _ENVIRONMENT.sub(" ", latex)
  rest = _TEXT.sub(" ", bare)
  words = rest if re.search("[0-9]", rest) else bare
  usable = latex and not _WORDS.search(words)
  return _Answer(None, latex if usable else None, unit, variable)


def _decimal(value: Fraction) -> str:
  """Returns a fraction whose denominator divides a power of ten as `digits` or `digits x 10^n`."""
  places = 0
  while value.denominator > 1:
    value, places = value * 10, places + 1
  return rf"{value.numerator}.0\times10^{{-{places}}}"
