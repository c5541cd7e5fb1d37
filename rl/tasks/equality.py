"""Whether two answers are the same number, or the same mathematics."""

import fractions
import re
import threading

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|(?<=[0-9])/[0-9]+)?")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_LONGEST = 200
# What computer algebra may take for ever to compare: factorials, sums, integrals, towers of powers.
_UNBOUNDED = re.compile(
    r"!|\*\*|\\(?:int|sum|prod|lim|binom)|\^\s*\{?\s*-?[0-9]{4}|\^\s*\{[^{}]*\^|\^\s*\w\s*\^"
    r"|(?:[)}\]]\s*\^.*){2}", re.DOTALL)


def number(text: str) -> fractions.Fraction | None:
  """The number that the text is, and nothing besides: `-1,234.5`, `$3`, `7/2`; exactly, or None."""
  text = text.strip().removeprefix("\\$").removeprefix("$").rstrip(".").strip()
  if len(text) > _LONGEST or not _NUMBER.fullmatch(text) or not re.search("[0-9]", text):
    return None
  try:
    return fractions.Fraction(text.replace(",", ""))
  except ZeroDivisionError:
    return None


def is_parsable(answer: str) -> bool:
  """Whether it is mathematics that other answers can be compared with."""
  return number(answer) is not None or _parse(answer) is not None


def same_answer(given: str, gold: str) -> bool | None:
  """Whether `given` equals `gold`, a number or LaTeX; None if `gold` is neither.

  Two numbers are compared exactly, everything else by math-verify. Its timeouts are signals, which
  only the main thread receives, so what may not end is never given to it: not even a right answer
  counts then.
  """
  right, guess = number(gold), number(given)
  if right is not None and guess is not None:
    return right == guess
  parsed_gold = _parse(gold)
  if parsed_gold is None:
    return None
  parsed = _parse(given)
  if parsed is None:
    return False
  import math_verify
  return bool(math_verify.verify(parsed_gold, parsed, timeout_seconds=_seconds()))


def _parse(text: str) -> list | None:
  """math-verify's reading of one expression, which is None for words and for what may not end."""
  text = text.strip().strip("$").strip()
  if not text or len(text) > _LONGEST or _UNBOUNDED.search(text) or _WORDS.search(text):
    return None
  import math_verify
  parsed = math_verify.parse(
      rf"\boxed{{{text}}}", [math_verify.LatexExtractionConfig(boxed_match_priority=0)],
      fallback_mode="no_fallback", parsing_timeout=_seconds())
  return parsed or None


def _seconds() -> int | None:
  """math-verify's time limit, off the main thread none."""
  return 5 if threading.current_thread() is threading.main_thread() else None
