"""Comparison of answers as numbers, or as mathematical expressions in LaTeX."""

import fractions
import re
import threading

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|(?<=[0-9])/[0-9]+)?")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_LONGEST = 200
# Expressions that computer algebra may never finish comparing: factorials, sums, integrals, towers
# of powers.
_UNBOUNDED = re.compile(
    r"!|\*\*|\\(?:int|sum|prod|lim|binom)|\^\s*\{?\s*-?[0-9]{4}|\^\s*\{[^{}]*\^|\^\s*\w\s*\^"
    r"|(?:[)}\]]\s*\^.*){2}", re.DOTALL)


def number(text: str) -> fractions.Fraction | None:
  """Returns the exact value of a text that is a number and nothing else, or None.

  Numbers are integers, decimals and fractions, such as `-1,234.5`, `$3` and `7/2`.
  """
  text = text.strip().removeprefix("\\$").removeprefix("$").rstrip(".").strip()
  if len(text) > _LONGEST or not _NUMBER.fullmatch(text) or not re.search("[0-9]", text):
    return None
  try:
    return fractions.Fraction(text.replace(",", ""))
  except ZeroDivisionError:
    return None


def is_parsable(answer: str) -> bool:
  """Whether an answer is a number or LaTeX, so that others can be compared with it."""
  return number(answer) is not None or _parse(answer) is not None


def same_answer(given: str, gold: str) -> bool | None:
  """Whether `given` equals the reference `gold`; None if `gold` is neither a number nor LaTeX.

  Two numbers are compared exactly, everything else by math-verify. Its timeouts are signals, which
  only the main thread receives, so expressions that it may never finish are not given to it. They
  cannot be compared, even if they are correct.
  """
  reference, guess = number(gold), number(given)
  if reference is not None and guess is not None:
    return reference == guess
  parsed_gold = _parse(gold)
  if parsed_gold is None:
    return None
  parsed = _parse(given)
  if parsed is None:
    return False
  import math_verify
  return bool(math_verify.verify(parsed_gold, parsed, timeout_seconds=_seconds()))


def _parse(text: str) -> list | None:
  """Parses one expression by math-verify; None for words and for what it may never finish."""
  text = text.strip().strip("$").strip()
  if not text or len(text) > _LONGEST or _UNBOUNDED.search(text) or _WORDS.search(text):
    return None
  import math_verify
  parsed = math_verify.parse(
      rf"\boxed{{{text}}}", [math_verify.LatexExtractionConfig(boxed_match_priority=0)],
      fallback_mode="no_fallback", parsing_timeout=_seconds())
  return parsed or None


def _seconds() -> int | None:
  """Returns math-verify's time limit in seconds; None, for no limit, outside the main thread."""
  return 5 if threading.current_thread() is threading.main_thread() else None
