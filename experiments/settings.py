"""Parses settings of the command line, `--set section.field=value`, by the configuration's types.

Values are written like `3e-4`, `true`, `none` or `cosine`, a tuple as `a,b`, and a dataclass as
`Class(field=value, ...)`, whose fields are written by the same rules. Commas and brackets within
quotes have no special meaning; the quotes are removed, and there are no escape sequences.
"""

import contextlib
import difflib
import operator
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from train.config_io import (
  Invalid,
  alternatives,
  call_text,
  class_of,
  classes,
  field_types,
  fits,
  from_dict,
  renamed_setting,
  to_dict,
  to_plain,
  type_text,
  walk,
)

_MOST_SUGGESTED = 3  # names in an error message
_CUTOFF = 0.6  # similarity of a name's last part below which it is not suggested
_SECTION_WEIGHT = 0.5  # of the section's similarity, relative to that of the last part of a name
# Names of text settings for which empty text has a meaning of its own, such as "no system message".
_MAY_BE_EMPTY = {"system", "prompt", "only"}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_QUOTED = r"'[^']*'|\"[^\"]*\""
_TOKEN = re.compile(_QUOTED + r"|.", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def apply[T](config: T, assignments: Sequence[str], *,
             named: Mapping[str, Callable[[str], Any]] | None = None) -> T:
  """Returns `config` with all assignments applied at once, so that only the result must be valid.

  The order of the assignments does not matter: `model=micro` is always applied before
  `model.moe.num_experts=32`.

  Args:
    config: a tree of frozen dataclasses.
    assignments: texts of the form `dotted.name=value`.
    named: by dotted name, functions that turn a plain word into a value, such as `get_config` for
      "model".

  Raises:
    ValueError: with a line for everything that is wrong, which says what would be valid.
  """
  draft = _Draft(config, named or {})
  settings, errors = _pairs(assignments)
  for name, text in sorted(settings.items(), key=lambda setting: setting[0].count(".")):
    draft.set(type(config), draft.tree, "", name.split("."), text)
  try:
    config = from_dict(type(config), draft.tree)
  except ValueError as error:
    errors.append(str(error))
  if errors:
    raise ValueError("\n".join(errors))
  return config


def assigned(assignments: Iterable[str]) -> set[str]:
  """Returns the dotted names that the assignments set, as they are written."""
  return set(_pairs(assignments)[0])


def fields(config: Any) -> list[tuple[str, str, Any]]:
  """Returns everything that can be set, as (dotted name, type in words, current value).

  A field that holds a dataclass is listed only if it may hold another dataclass, or None.
  """
  return [(name, type_text(hint), operator.attrgetter(name)(config))
          for name, hint in walk(type(config), to_dict(config))
          if not (classes(hint) and len(alternatives(hint)) == 1)]


class _Draft:
  """A configuration as plain data, into which settings are written.

  An invalid setting is written as `Invalid`, whose message `from_dict` reports.

  Args:
    config: the configuration before the settings.
    named: see `apply`.
  """

  def __init__(self, config: Any, named: Mapping[str, Callable[[str], Any]]):
    self.cls, self.tree, self._named = type(config), to_dict(config), named

  def set(self, cls: type, node: dict[str, Any], path: str, names: list[str], text: str) -> None:
    """Writes one setting.

    Args:
      cls: the dataclass that `node` stands for.
      node: the plain data of a part of the configuration.
      path: dotted name of that part; empty for the whole configuration.
      names: names of the fields that lead from `node` to the setting.
      text: the value, as on the command line.
    """
    name, *rest = names
    dotted = f"{path}.{name}" if path else name
    full_name = ".".join((dotted, *rest))
    hint = field_types(cls).get(name)
    if new_name := renamed_setting(cls, ".".join(names)):
      prefix = f"{path}." if path else ""
      node[f"--set {full_name}"] = Invalid(f"{full_name} has been renamed: set {prefix}{new_name}")
    elif hint is None:
      # The key is not `name`, which may be "type": that key names the dataclass of a union.
      node[f"--set {full_name}"] = Invalid(self._unknown(cls, path, full_name))
    elif not rest:
      node[name] = value = self._read(hint, text.strip(), dotted)
      empty = isinstance(value, str) and not value.strip()
      if empty and str in alternatives(hint) and name not in _MAY_BE_EMPTY:
        node[name] = Invalid(f"{dotted} is empty, perhaps from a variable that is not set: give a "
                             "value" + ", or none" * (type(None) in alternatives(hint)))
    else:
      # A field that is absent has its default.
      inner = node.setdefault(name, to_plain(getattr(cls, name, None), hint))
      if isinstance(inner, dict):
        self.set(class_of(hint, inner), inner, dotted, rest, text)
      elif inner is None and classes(hint):
        calls = " or ".join(
            f"--set '{dotted}={call_text(kind)}'" for kind in classes(hint).values())
        node[name] = Invalid(f"{full_name} cannot be set while {dotted} is none; add {calls}, "
                             "which is applied first")
      elif not classes(hint):
        node[name] = Invalid(f"{full_name} does not exist: {dotted} has no fields, it is "
                             f"{type_text(hint)}")

  def _read(self, hint: Any, text: str, path: str) -> Any:
    """Returns `text` as plain data of type `hint`.

    Text that is not of that type is returned as it is: `from_dict` rejects it, and says why.
    """
    if type(None) in alternatives(hint) and text.lower() == "none":
      return None
    call = _CALL.fullmatch(text)
    if call and call[1] in classes(hint):
      return self._read_call(classes(hint)[call[1]], call[2], path)
    if path in self._named and not call:
      try:
        return to_plain(self._named[path](text), hint)
      except ValueError as error:
        return Invalid(f"{path}: {error}")
    for kind in alternatives(hint):
      if hasattr(kind, "parse"):
        return self._parsed(kind, hint, text[1:-1] if re.fullmatch(_QUOTED, text) else text, path)
      if typing.get_origin(kind) is tuple:
        inner = text[1:-1] if text[:1] + text[-1:] == "()" and len(_split(text)) == 1 else text
        item_type = typing.get_args(kind)[0]
        return [self._read(item_type, item, f"{path}[{i}]") for i, item in enumerate(_split(inner))]
      value = _read_scalar(kind, text)
      if value is not None:
        return value
    return text[1:-1] if re.fullmatch(_QUOTED, text) else text

  def _parsed(self, kind: type, hint: Any, text: str, path: str) -> Any:
    """Returns the fields of what `kind.parse` makes of `text`, so that settings can change them."""
    try:
      return to_plain(kind.parse(text), hint)
    except ValueError as error:
      return Invalid(f"{path}: {error}")

  def _read_call(self, cls: type, inner: str, path: str) -> Any:
    """Returns the call of a dataclass, `cls(inner)`, as plain data."""
    settings, errors = _pairs(_split(inner))
    if errors:
      return Invalid(f"{path}={cls.__name__}({inner}): {'; '.join(errors)}")
    node = {"type": cls.__name__}
    for name, text in settings.items():
      self.set(cls, node, path, [name], text)
    return node

  def _unknown(self, cls: type, path: str, dotted: str) -> str:
    """Returns the message for a setting that does not exist, with similar names if any exist."""
    prefix = f"{path}." if path else ""
    allowed = field_types(cls)
    known = [prefix + name for name in allowed] + [
        name for name, _ in walk(self.cls, self.tree) if not dotted.startswith(f"{name}.")]
    names = ", ".join(f"{name} ({type_text(hint)})" for name, hint in allowed.items())
    nearest = " or ".join(_nearest(dotted, known))
    return (f"{dotted} does not exist{f'; did you mean {nearest}?' if nearest else ':'} "
            f"{f'{path} ({cls.__name__})' if path else cls.__name__} has {names}")


def _nearest(wanted: str, known: Sequence[str]) -> list[str]:
  """Returns the names that were probably meant: none if no name is similar.

  A name that ends in the whole of `wanted` lacks only its sections: all of these are returned. Of
  other names it is the one whose last part is the most similar, preferably in the same section.
  """
  if complete := {name for name in known if name.endswith(f".{wanted}")}:
    return sorted(complete, key=lambda name: (len(name), name))[:_MOST_SUGGESTED]
  section, _, last = wanted.rpartition(".")
  found = []
  for name in known:
    its_section, _, its_last = name.rpartition(".")
    if (similarity := _similarity(last, its_last)) >= _CUTOFF:
      found.append((similarity + _SECTION_WEIGHT * _similarity(section, its_section), name))
  return [max(found, key=lambda scored: scored[0])[1]] if found else []


def _similarity(a: str, b: str) -> float:
  """Returns the similarity of two names from 0 to 1, which it is for the initials of a name."""
  initials = "".join(word[:1] for word in b.split("_"))
  return 1.0 if len(a) > 1 and a == initials else difflib.SequenceMatcher(None, a, b).ratio()


def _read_scalar(kind: Any, text: str) -> Any:
  """Returns `text` as a bool, number or choice, as `kind` requires; None if it is not one."""
  if typing.get_origin(kind) is Literal:
    return {str(choice): choice for choice in typing.get_args(kind)}.get(text)
  if kind is bool:
    return _BOOLS.get(text.lower())
  for number in {int: (int, float), float: (float,)}.get(kind, ()):
    with contextlib.suppress(ValueError):
      if fits(kind, value := number(text)):
        return value
  return None


def _pairs(items: Iterable[str]) -> tuple[dict[str, str], list[str]]:
  """Returns the values of items `name=value` by name, and messages about all other items."""
  settings, errors = {}, []
  for item in items:
    name, equals, text = item.partition("=")
    name = name.strip()
    if not equals or not name:
      errors.append(f"{item!r} must be name=value, for example train.steps=100")
    elif name in settings:
      errors.append(f"{name} is set twice, to {settings[name]!r} and to {text!r}: keep one")
    else:
      settings[name] = text
  return settings, errors


def _split(text: str) -> list[str]:
  """Returns the parts of `text` between commas outside brackets and quotes.

  A comma at the end is ignored.
  """
  parts, depth = [""], 0
  for token in _TOKEN.findall(text):
    depth = max(0, depth + (token in "([{") - (token in ")]}"))
    if token == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += token
  parts = [part.strip() for part in parts]
  return parts if parts[-1] else parts[:-1]
