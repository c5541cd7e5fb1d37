"""Configurations as plain data: nested dicts, lists and scalars, as JSON has them, and back.

Works for trees of frozen dataclasses whose fields are bool, int, float, str, Literal,
tuple[X, ...], dataclasses, and unions of these with each other and None. "type" is no field's name:
where a union has several dataclasses, it says which one a dict stands for.
"""

import contextlib
import dataclasses
import functools
import operator
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from train.renamed import renamed, translate

_FORMS = {
    bool: "true or false",
    int: "a whole number such as 12, 1_000 or 1e6",
    float: "a finite number such as 0.1 or 3e-4",
}
_EXACT = 2**53  # from here on floats skip whole numbers


@dataclasses.dataclass(frozen=True)
class Invalid:
  """Stands in plain data for what could not be read; `from_dict` reports its message."""

  message: str


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
  """The fields of a dataclass and their types."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def alternatives(hint: Any) -> tuple:
  """The members of a union; of another type, itself."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def classes(hint: Any) -> dict[str, type]:
  """The dataclasses that a field may hold, by name."""
  return {kind.__name__: kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)}


def class_of(hint: Any, plain: Mapping[str, Any]) -> type | None:
  """The dataclass that `plain` stands for; None if it does not say, or names none of them."""
  options = classes(hint)
  only = next(iter(options)) if len(options) == 1 else None
  return options.get(plain.get("type", only))


def type_text(hint: Any) -> str:
  """A type as users read it: `int | none`, `cosine | v3`, `tuple[Source, ...]`."""
  def one(kind):
    if typing.get_origin(kind) is Literal:
      return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
      return f"tuple[{type_text(typing.get_args(kind)[0])}, ...]"
    return "none" if kind is type(None) else kind.__name__
  return " | ".join(map(one, alternatives(hint)))


def call_text(cls: type) -> str:
  """How to write a dataclass with what it cannot do without: `GQAConfig(num_heads=int, ...)`."""
  required = [f"{name}={type_text(hint)}" for name, hint in field_types(cls).items()
              if name in _required(cls)]
  return f"{cls.__name__}({', '.join(required)})"


def _required(cls: type) -> set[str]:
  return {field.name for field in dataclasses.fields(cls)
          if field.default is field.default_factory is dataclasses.MISSING}


def to_dict(config: Any) -> dict[str, Any]:
  """Plain data that `json` can write and `from_dict` reads back."""
  return {name: to_plain(getattr(config, name), hint)
          for name, hint in field_types(type(config)).items()}


def to_plain(value: Any, hint: Any) -> Any:
  """`to_dict` for the value of a field of type `hint`."""
  if dataclasses.is_dataclass(value):
    tag = {"type": type(value).__name__} if len(classes(hint)) > 1 else {}
    return tag | to_dict(value)
  if isinstance(value, tuple):
    return [to_plain(item, _item_type(hint)) for item in value]
  return value


def _item_type(hint: Any) -> Any:
  return next((typing.get_args(kind)[0] for kind in alternatives(hint)
               if typing.get_origin(kind) is tuple), None)


def walk(cls: type, plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted names and types of all fields of the `cls` that `plain` stands for, and of theirs."""
  for name, hint in field_types(cls).items():
    yield prefix + name, hint
    inner = plain.get(name)
    if isinstance(inner, dict):
      yield from walk(class_of(hint, inner), inner, f"{prefix}{name}.")


def flatten(config: Any) -> dict[str, Any]:
  """The values that are no dataclasses themselves, by dotted name."""
  names = (name for name, _ in walk(type(config), to_dict(config)))
  values = {name: operator.attrgetter(name)(config) for name in names}
  return {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}


def from_dict[T](cls: type[T], plain: dict[str, Any]) -> T:
  """The `cls` that `to_dict` of this or an earlier version made `plain` of.

  Fields that are absent take their defaults, and renamed ones their new names.

  Raises:
    ValueError: listing, a line each, unknown and missing fields, values of another type, and what
      the dataclasses say themselves; a dataclass with a wrong field is not asked.
  """
  errors: list[str] = []
  config = _value(cls, plain, "", errors)
  if errors:
    raise ValueError("\n".join(errors))
  return config


def renamed_setting(cls: type, name: str) -> str | None:
  """The present dotted name of a setting below `cls` that an earlier version called `name`."""
  for old, new in renamed(cls).items():
    if name == old or name.startswith(f"{old}."):
      return new + name.removeprefix(old)
  head, _, rest = name.partition(".")
  for inner in classes(field_types(cls).get(head)).values() if rest else ():
    if found := renamed_setting(inner, rest):
      return f"{head}.{found}"
  return None


def upgrade(stored: Mapping[str, Any], sections: Mapping[str, type]) -> dict[str, Any]:
  """What an earlier version wrote to a `config.json`, as this version would write it.

  Args:
    stored: the file's content.
    sections: the dataclass behind each top-level key that is one's plain data. A section that it
      cannot be read as is left as it is: it will differ from whatever it is compared with.
  """
  upgraded = dict(stored)
  for name, cls in sections.items():
    with contextlib.suppress(ValueError):
      if isinstance(stored.get(name), Mapping):
        upgraded[name] = to_dict(from_dict(cls, stored[name]))
  return upgraded


def _value(hint, plain, path, errors):
  """The value of a field of type `hint`; meaningless if an error was added."""
  if isinstance(plain, Invalid):
    errors.append(plain.message)
  elif isinstance(plain, dict) and class_of(hint, plain):
    return _object(class_of(hint, plain), plain, path, errors)
  elif isinstance(plain, list) and _item_type(hint):
    return tuple(_value(_item_type(hint), item, f"{path}[{i}]", errors)
                 for i, item in enumerate(plain))
  else:
    for kind in alternatives(hint):
      if fits(kind, plain):
        if hasattr(kind, "parse"):
          return _checked(lambda kind=kind: kind.parse(plain), path, errors)
        return kind(plain) if kind in (int, float) else plain
    forms = [_FORMS[kind] for kind in alternatives(hint) if kind in _FORMS]
    forms += [f"written {call_text(kind)}" for kind in classes(hint).values()]
    errors.append((f"{path}=" if path else "") + f"{plain!r} must be {type_text(hint)}"
                  + (f": {' or '.join(forms)}" if forms else ""))
  return None


def fits(kind: Any, plain: Any) -> bool:
  """Whether plain data is of a type that is no union, tuple or dict."""
  number = isinstance(plain, int | float) and not isinstance(plain, bool)
  if kind is float:
    return number and abs(plain) <= sys.float_info.max  # an int may be too large; nan is not <=
  if kind is int:
    return number and (isinstance(plain, int) or (plain.is_integer() and abs(plain) < _EXACT))
  if typing.get_origin(kind) is Literal:
    return any(plain == choice and type(plain) is type(choice) for choice in typing.get_args(kind))
  if hasattr(kind, "parse"):
    return isinstance(plain, str)
  return kind in (bool, str, type(None)) and isinstance(plain, kind)


def _object(cls, plain, path, errors):
  plain = translate(cls, plain)
  known, before = field_types(cls), len(errors)
  prefix = f"{path}." if path else ""
  given = {name: value for name, value in plain.items() if name != "type"}
  for name in given:
    if name not in known:
      errors.append(given[name].message if isinstance(given[name], Invalid) else
                    f"{prefix}{name} does not exist: {cls.__name__} has {', '.join(known)}")
  errors += [f"{prefix}{name} is missing: {cls.__name__} needs {call_text(cls)}"
             for name in known if name in _required(cls) - given.keys()]
  values = {name: _value(hint, given[name], prefix + name, errors)
            for name, hint in known.items() if name in given}
  return _checked(lambda: cls(**values), path, errors) if len(errors) == before else None


def _checked(make, path, errors):
  try:
    return make()
  except ValueError as error:
    errors.append(f"{path}: {error}" if path else str(error))
    return None
