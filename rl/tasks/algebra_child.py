"""The process that compares answers by computer algebra; `rl.tasks.algebra` starts and kills it.

It reads a line of JSON, [given, gold], and writes true, false, or null if the reference cannot be
used. Computer algebra may never return from a comparison, so the kernel ends the process when one
takes too long. This file imports nothing of this project: the process starts in half a second.
"""

import contextlib
import dataclasses
import fractions
import functools
import itertools
import json
import os
import resource
import signal
import sys
from typing import Any

_TOLERANCE = fractions.Fraction(1, 10**6)
_CPU_SECONDS = 2.0
_MEMORY_BYTES = 4 << 30
_DIGITS = 100  # to which exact numbers that are not rational are evaluated
_SAME_DIGITS = 80
# The largest decimal exponent of a value. Values beyond, such as 10000!, are exact integers with so
# many digits that an answer could not write them.
_LARGEST_EXPONENT = 10_000


def close(given: fractions.Fraction, gold: fractions.Fraction, approximate: bool) -> bool:
  """Whether a number counts as the reference.

  Decimals may be rounded: they count if they differ by at most 1e-6 of the reference. A reference
  that is an integer needs no rounding and has to be matched exactly.

  Args:
    given: the number.
    gold: the reference.
    approximate: whether either of them was written as a decimal. Two integers or fractions have to
      be equal.
  """
  if given == gold or not approximate or gold.denominator == 1:
    return given == gold
  return abs(given - gold) <= _TOLERANCE * abs(gold)


def main() -> None:
  """Answers requests until the standard input is closed."""
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # whatever a library prints must not be read as a reply
  _replace_numeric_comparison()
  for reply in itertools.chain([None], map(_verdict, sys.stdin)):
    print(json.dumps(reply), file=replies, flush=True)


def _verdict(line: str) -> bool | None:
  given, gold = json.loads(line)
  # The default action of this signal ends the process, whatever code is running; an exception
  # raised by a handler would be lost in a callback. CPU time does not depend on other processes.
  signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
  try:
    return _same(given, gold)
  except (Exception, RecursionError):
    return False
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


def _same(given: str, gold: str) -> bool | None:
  import math_verify
  reference = _parse(gold)
  if not reference or not _is_bounded(gold):
    return None
  if given == gold:
    return True
  parsed = _parse(given)
  if not parsed:
    return False
  return math_verify.verify(*_with_imaginary_unit(reference, parsed), timeout_seconds=None,
                            allow_set_relation_comp=True)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> list:
  """Returns the expressions that LaTeX may stand for; none if it contradicts itself.

  A chain of equations contradicts itself if two of its sides are different constants, as in
  `x=43=42`. If all are constants, as in `2+3=5`, it stands for the last one.
  """
  sides = _sides(text)
  if len(sides) < 2:
    return _parse_one(text)
  parsed = [_parse_one(side) for side in sides]
  constants = [side[0] for side in parsed if side and getattr(side[0], "is_number", False)]
  if any(_same_number(constants[0], other) is not True for other in constants[1:]):
    return []
  return parsed[-1] if len(constants) == len(sides) else _parse_one(text)


def _sides(text: str) -> list[str]:
  """Returns the sides of an equation or a chain of equations, and other texts as they are."""
  if "=" not in text or any(mark in text for mark in (",", ";", "&")):
    return [text]
  sides, depth, start = [], 0, 0
  for at, char in enumerate(text):
    depth += {"{": 1, "}": -1}.get(char, 0)
    if char == "=" and not depth and text[at - 1:at] not in ("<", ">", "!", "\\"):
      sides.append(text[start:at])
      start = at + 1
  return [*sides, text[start:]]


def _parse_one(text: str) -> list:
  import math_verify
  config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
  # The caller has removed units. math-verify takes any of `m`, `t`, `d`, ... at the end for one.
  config = dataclasses.replace(config, normalization_config=dataclasses.replace(
      config.normalization_config, units=False))
  return math_verify.parse(
      rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)


def _with_imaginary_unit(*answers: list) -> tuple[list, ...]:
  """Returns answers with `i` as the imaginary unit; unchanged if one compares `i` by its size."""
  import sympy
  unit = {sympy.Symbol("i", **kind): sympy.I for kind in ({}, {"real": True}, {"real": False})}
  has_unit = lambda one: not unit.keys().isdisjoint(getattr(one, "free_symbols", ()))
  try:
    return tuple([one.xreplace(unit) if has_unit(one) else one for one in answer]
                 for answer in answers)
  except (TypeError, ValueError):
    return answers


@functools.lru_cache(maxsize=4096)
def _is_bounded(text: str) -> bool:
  """Whether an expression, if it is a number, is small enough to be compared."""
  import sympy
  expression = _parse(text)[0]
  if not getattr(expression, "is_number", False):
    return True
  value = expression.doit()
  if value in (sympy.oo, -sympy.oo):
    return True
  size = sympy.Abs(value).evalf(15)
  return bool(size.is_finite) and size < sympy.Integer(10) ** _LARGEST_EXPONENT


def _replace_numeric_comparison() -> None:
  """Gives math-verify the rule of `close`.

  Its own rounds to six decimal places, so that all numbers below 5e-7 are equal, and takes exact
  numbers as equal whose difference is small.
  """
  from math_verify import grader
  symbolic = grader.sympy_symbolic_eq

  def numeric_eq(gold, given, *_):
    return _same_number(gold, given) is True

  def symbolic_eq(gold, given):
    verdict = _same_number(gold, given)
    return symbolic(gold, given) if verdict is None else verdict

  grader.sympy_numeric_eq, grader.sympy_symbolic_eq = numeric_eq, symbolic_eq


def _same_number(gold: Any, given: Any) -> bool | None:
  """Whether two numbers, or matrices of numbers, are equal by `close`; None if either is not."""
  from sympy import MatrixBase
  if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
    if gold.shape != given.shape:
      return False
    verdicts = [_same_number(a, b) for a, b in zip(gold.flat(), given.flat(), strict=True)]
    return False if False in verdicts else None if None in verdicts else True
  if not (getattr(gold, "is_number", False) and getattr(given, "is_number", False)):
    return None
  readings = [(_percent(gold), _percent(given))] if _percent(gold) or _percent(given) else []
  return any(_same_value(a if a is not None else gold, b if b is not None else given)
             for a, b in [(gold, given), *readings])


def _percent(expression: Any) -> Any:
  """Returns the number before a percent sign, which may be meant in place of the fraction."""
  from math_verify import grader
  return grader.get_pct_val(expression)


def _same_value(gold: Any, given: Any) -> bool:
  import sympy
  approximate = gold.has(sympy.Float) or given.has(sympy.Float)
  gold, given = _exact(gold), _exact(given)
  if gold.is_Rational and given.is_Rational:
    fraction = lambda x: fractions.Fraction(int(x.p), int(x.q))
    return close(fraction(given), fraction(gold), approximate)
  if gold == given:
    return True
  if not (gold.is_finite and given.is_finite):
    return False
  gold, given = gold.evalf(_DIGITS), given.evalf(_DIGITS)
  size, difference = abs(gold), abs(given - gold).evalf(_DIGITS)
  if approximate:
    return bool(difference <= size * sympy.Rational(1, 10**6))
  # Cancellation may leave a zero that is known only to be small.
  smallest = sympy.Float(10) ** -_SAME_DIGITS
  return bool(difference <= smallest * (size if size > smallest else 1))


def _exact(expression: Any) -> Any:
  """Returns the number evaluated as far as it is exact, each decimal being the fraction it says."""
  import sympy
  floats = {x: sympy.Rational(str(x)) for x in expression.atoms(sympy.Float)}
  with contextlib.suppress(AttributeError):
    expression = expression.doit()
    floats |= {x: sympy.Rational(str(x)) for x in expression.atoms(sympy.Float)}
  return expression.xreplace(floats).doit()


if __name__ == "__main__":
  main()
