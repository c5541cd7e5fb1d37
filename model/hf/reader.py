"""Typed access to the JSON of Hugging Face folders, and the error that lists all their problems."""

import reprlib
from collections.abc import Callable
from typing import Any


class CheckpointError(ValueError):
  """A folder that cannot be loaded.

  Attributes:
    problems: everything that was found wrong with the folder; the message shows the first 40.
  """

  def __init__(self, path, problems: list[str]):
    self.problems = list(problems)
    shown = self.problems[:40]
    if len(self.problems) > len(shown):
      shown.append(f"... and {len(self.problems) - len(shown)} more")
    lines = [f"cannot load {path}: {len(self.problems)} problem(s)", *shown]
    super().__init__("\n  ".join(lines))


class Reader:
  """Typed access to a JSON object, which collects problems instead of raising.

  Attributes:
    values: the JSON object.
    problems: a list, to which problems are appended.
    where: what problems call the object.
    guessed: whether a placeholder was returned for a value that is missing or invalid, by this
      reader or by one that `part` made of it.
    unclear: whether such a placeholder may determine shapes of arrays.
  """

  def __init__(self, values: dict, problems: list[str], where: str = "config.json"):
    self.values, self.problems, self.where = values, problems, where
    self.guessed = self.unclear = False
    self._whole: Reader | None = None

  def part(self, values: dict | None = None, where: str | None = None) -> "Reader":
    """Returns a reader for one part of the architecture, which has seen no placeholder yet.

    Args:
      values: a JSON object within this one, on which no shape depends; None for the same object.
      where: what problems call that object.
    """
    part = Reader(self.values if values is None else values, self.problems, where or self.where)
    part._whole = self
    return part

  def _guess(self, unclear: bool) -> None:
    self.guessed, self.unclear = True, self.unclear or unclear
    if self._whole is not None:
      self._whole._guess(unclear and self.values is self._whole.values)

  def get(self, key: str, expected: type, default: Any = ..., *, least: float = 1) -> Any:
    """Returns the value of a key, or a placeholder and a problem if it is missing or invalid.

    Args:
      key: a key of the JSON object.
      expected: type of the value; an integer is also valid where a float is expected, and a float
        without a fraction where an integer is.
      default: returned if the key is missing or null; without it, that is a problem.
      least: the smallest valid integer. For floats, 1 means that the value must be positive.
    """
    value = self.values.get(key)
    if value is None and default is not ...:
      return default
    if expected is int and isinstance(value, float) and value.is_integer():
      value = int(value)
    requirement = self._unmet_requirement(value, expected, least)
    if requirement is None:
      return expected(value)
    self._guess(unclear=expected is not float)
    self.problems.append(
        f"{self.where}: {key} is missing" if value is None
        else f"{self.where}: {key}={reprlib.repr(value)} should be {requirement}")
    return expected(1) if expected in (int, float) else expected()

  @staticmethod
  def _unmet_requirement(value: Any, expected: type, least: float) -> str | None:
    """Returns what the value should be, or None if it is valid."""
    if expected in (int, float):
      numbers = (int, float) if expected is float else int
      if not isinstance(value, numbers) or isinstance(value, bool):
        return "a number" if expected is float else "an integer"
      if expected is int:
        return None if least <= value < 2**31 else f"in {least}..{2**31 - 1}"
      within = abs(value) <= 10**30 and (value == 0 or abs(value) >= 1e-30)  # false for NaN
      if not within or (least == 1 and value <= 0):
        return "positive and between 1e-30 and 1e30"
      return None
    return None if isinstance(value, expected) else f"of type {expected.__name__}"

  def refuse(self, key: str, *, unless: Any, why: str = "is not supported") -> None:
    """Adds a problem if the key is present and its value is not `unless`."""
    value = self.values.get(key)
    alike = value == unless and isinstance(value, bool) == isinstance(unless, bool)
    if value is not None and not alike:
      self.problems.append(
          f"{self.where}: {key}={reprlib.repr(value)} {why}; it should be {unless!r}")

  def build(self, make: Callable, *args, **fields) -> Any:
    """Returns `make(*args, **fields)`, or None and a problem if that raises ValueError.

    If there are placeholders among the values, the error is not added: it may only be about those.
    """
    try:
      return make(*args, **fields)
    except ValueError as error:
      if not self.guessed:
        self.problems.append(f"{self.where}: {error}")
      self._guess(unclear=True)
      return None
