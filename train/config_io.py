"""Converts configurations to plain data (nested dicts, lists and scalars, as in JSON) and back.

Works for trees of frozen dataclasses whose fields are bool, int, float, str, Literal,
tuple[X, ...], dataclasses, and unions of these with each other and None. No field may be called
"type": where a union has several dataclasses, that key says which one a dict stands for.
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
_EXACT = 2**53  # from here on, float64 does not represent every whole number


@dataclasses.dataclass(frozen=True)
class Invalid:
  """Placeholder in plain data for a value that could not be parsed.

  Attributes:
    message: what was wrong; `from_dict` includes it in its error.
  """

  message: str


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
  """Returns the types of a dataclass' fields by name."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def alternatives(hint: Any) -> tuple:
  """Returns the members of a union type, or the type itself if it is no union."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def classes(hint: Any) -> dict[str, type]:
  """Returns the dataclasses that a field of type `hint` may hold, by name."""
  return {kind.__name__: kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)}


def class_of(hint: Any, plain: Mapping[str, Any]) -> type | None:
  """Returns the dataclass that `plain` stands for in a field of type `hint`.

  None if "type" is missing where the field may hold several dataclasses, or names none of them.
  """
  options = classes(hint)
  only = next(iter(options)) if len(options) == 1 else None
  return options.get(plain.get("type", only))


def type_text(hint: Any) -> str:
  """Returns a type as shown to users: `int | none`, `cosine | v3`, `tuple[Source, ...]`."""
  def one(kind):
    if typing.get_origin(kind) is Literal:
      return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
      return f"tuple[{type_text(typing.get_args(kind)[0])}, ...]"
    return "none" if kind is type(None) else kind.__name__
  return " | ".join(map(one, alternatives(hint)))


def call_text(cls: type) -> str:
  """Returns a call of a dataclass with its required fields: `GQAConfig(num_heads=int, ...)`."""
  required = [f"{name}={type_text(hint)}" for name, hint in field_types(cls).items()
              if name in _required(cls)]
  return f"{cls.__name__}({', '.join(required)})"


def _required(cls: type) -> set[str]:
  return {field.name for field in dataclasses.fields(cls)
          if field.default is field.default_factory is dataclasses.MISSING}


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a config as plain data that `json` can write and `from_dict` reads back."""
  return {name: to_plain(getattr(config, name), hint)
          for name, hint in field_types(type(config)).items()}


def to_plain(value: Any, hint: Any) -> Any:
  """Returns the value of a field of type `hint` as plain data, as `to_dict` does for a config."""
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
  """Yields the dotted names and types of all fields of a config, those of nested ones included.

  Args:
    cls: the config's dataclass.
    plain: the config as plain data; it decides which dataclass a union holds.
    prefix: put before every name.
  """
  for name, hint in field_types(cls).items():
    yield prefix + name, hint
    inner = plain.get(name)
    if isinstance(inner, dict):
      yield from walk(class_of(hint, inner), inner, f"{prefix}{name}.")


def flatten(config: Any) -> dict[str, Any]:
  """Returns every value of a config that is not itself a dataclass, by dotted name."""
  names = (name for name, _ in walk(type(config), to_dict(config)))
  values = {name: operator.attrgetter(name)(config) for name in names}
  return {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}


def from_dict[T](cls: type[T], plain: dict[str, Any]) -> T:
  """Returns the `cls` from which `to_dict`, of this or an earlier version, made `plain`.

  Absent fields take their defaults. Fields that have been renamed since are given their new names.

  Raises:
    ValueError: with a line for every unknown field, missing field, value of another type and error
      raised by a dataclass' own validation. A dataclass with a wrong field is not validated.
  """
  errors: list[str] = []
  config = _value(cls, plain, "", errors)
  if errors:
    raise ValueError("\n".join(errors))
  return config


def renamed_setting(cls: type, name: str) -> str | None:
  """Returns the dotted name of the setting below `cls` that an earlier version called `name`.

  None if `name` is not an old name of a setting.
  """
  for old, new in renamed(cls).items():
    if name == old or name.startswith(f"{old}."):
      return new + name.removeprefix(old)
  head, _, rest = name.partition(".")
  for inner in classes(field_types(cls).get(head)).values() if rest else ():
    if found := renamed_setting(inner, rest):
      return f"{head}.{found}"
  return None


def upgrade(stored: Mapping[str, Any], sections: Mapping[str, type]) -> dict[str, Any]:
  """Returns the content of an earlier version's `config.json` as this version would write it.

  Args:
    stored: the file's content.
    sections: the dataclasses by top-level key, for those keys that hold a config as plain data. A
      section that does not parse as its dataclass is left as it is: it will then differ from
      whatever it is compared with.
  """
  upgraded = dict(stored)
  for name, cls in sections.items():
    with contextlib.suppress(ValueError):
      if isinstance(stored.get(name), Mapping):
        upgraded[name] = to_dict(from_dict(cls, stored[name]))
  return upgraded


def _value(hint, plain, path, errors):
  """Returns the value of a field of type `hint`; undefined if `errors` was appended to."""
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
  """Whether plain data is a value of `kind`, which is not a union, tuple or dict."""
  number = isinstance(plain, int | float) and not isinstance(plain, bool)
  if kind is float:
    return number and abs(plain) <= sys.float_info.max  # excludes ints too large, and nan
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
