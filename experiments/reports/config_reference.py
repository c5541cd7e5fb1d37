"""The configuration reference: every setting with its type, default and meaning.

Everything in it comes from the dataclasses: types and defaults from their fields, meanings from the
"Attributes" sections of their docstrings. `docs/configuration.md` holds what `reference` returns,
and `--help_config` prints what `help_text` returns.
"""

import dataclasses
import inspect
import operator
import re
from collections.abc import Iterator
from typing import Any

import model
from experiments import catalogue
from experiments.reports.markdown import table
from rl.config import RLConfig
from train.config import RunConfig
from train.config_io import classes, field_types, to_dict, type_text, walk

_HEAD = """\
Every setting of every experiment, generated from the dataclasses by `make results`. A setting is
given as `--set section.field=value`; `python -m experiments.run --experiment=NAME --help_config`
prints the settings of one experiment with their values at a scale. Values are written as `--set`
reads them: `3e-4`, `true`, `none`, `cosine`, `a,b` for a tuple, and `Class(field=value, ...)` for a
dataclass.

`RunConfig` describes a training run on text, and `RLConfig` an RL run. Programs, studies and
benchmarks contain them as sections of their own configurations.
"""


def descriptions(cls: type) -> dict[str, str]:
  """Returns the meaning of each documented field of a dataclass, base classes included."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
    _, _, section = doc.partition("Attributes:\n")
    names: list[str] = []
    for line in section.splitlines():
      start = re.match(r"  ([\w, ]+): (.*)", line)
      if start and not line.startswith("   "):
        names = [name.strip() for name in start[1].split(",")]
        found |= dict.fromkeys(names, start[2])
      elif line.startswith("    ") and names:
        found |= {name: f"{found[name]} {line.strip()}" for name in names}
      elif line.strip():
        break
  return found


def value_text(value: Any) -> str:
  """Returns a value as `--set` reads it.

  A dataclass lists only the fields that differ from their defaults.
  """
  if value is None:
    return "none"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, tuple):
    return ",".join(map(value_text, value)) if value else "()"
  if dataclasses.is_dataclass(value):
    changed = [f"{field.name}={value_text(getattr(value, field.name))}"
               for field in dataclasses.fields(value)
               if getattr(value, field.name) != _default(field)]
    return f"{type(value).__name__}({', '.join(changed)})"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def help_text(experiment: str | None, scale: str | None) -> str:
  """Returns the settings of an experiment at a scale, or the reference if no experiment is named.

  Raises:
    ValueError: if the experiment or the scale does not exist.
  """
  if experiment is None:
    return reference()
  configs = catalogue.find(experiment).configs()
  if not configs:
    return f"--experiment={experiment} has no settings"
  name = scale or next(iter(configs))
  if name not in configs:
    raise ValueError(f"--scale={scale} does not exist for {experiment}; there are "
                     + ", ".join(configs))
  lines = [f"settings of --experiment={experiment}" + (f" --scale={name}" if name else "")]
  for dotted, kind, value, meaning in _settings(configs[name]):
    lines += [f"\n{dotted} = {value}  ({kind})", f"  {meaning}"]
  return "\n".join(lines)


def _settings(config: Any) -> Iterator[tuple[str, str, str, str]]:
  """Yields the dotted name, type, value and meaning of everything that can be set."""
  for dotted, hint in walk(type(config), to_dict(config)):
    value, (parent, _, name) = operator.attrgetter(dotted)(config), dotted.rpartition(".")
    owner = operator.attrgetter(parent)(config) if parent else config
    if not (classes(hint) and dataclasses.is_dataclass(value)):
      yield dotted, type_text(hint), value_text(value), descriptions(type(owner)).get(name, "")


def reference() -> str:
  """Returns `docs/configuration.md`: a table for each dataclass, beginning with the main ones."""
  parts, found = ["# Configuration reference", _HEAD.rstrip()], all_classes()
  names = [cls.__name__ for cls in found]
  for cls in found:
    place = f" ({cls.__module__})" if names.count(cls.__name__) > 1 else ""
    parts += [f"## {cls.__name__}{place}", _summary(cls), _class_table(cls)]
  return "\n\n".join(parts) + "\n"


def all_classes() -> list[type]:
  """Returns the dataclasses of all configurations, outer ones before those nested in them."""
  found: dict[type, None] = {}

  def visit(cls: type) -> None:
    if cls not in found:
      found[cls] = None
      for hint in field_types(cls).values():
        for inner in _inner_classes(hint):
          visit(inner)

  for cls in (RunConfig, RLConfig, model.ModelConfig):
    visit(cls)
  for experiment in catalogue.experiments().values():
    for config in experiment.configs().values():
      visit(type(config))
  return list(found)


def _inner_classes(hint: Any) -> list[type]:
  """Returns the dataclasses that a field may hold, including those inside tuples."""
  items = [arg for kind in (hint, *getattr(hint, "__args__", ()))
           for arg in (kind, *getattr(kind, "__args__", ()))]
  return [kind for item in dict.fromkeys(items) for kind in classes(item).values()]


def _summary(cls: type) -> str:
  """Returns a class's docstring up to its attributes, and where the class is defined."""
  doc = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:")[0].strip()
  return f"{doc}\n\nDefined in `{cls.__module__}`."


def _class_table(cls: type) -> str:
  meanings, rows = descriptions(cls), []
  for field in dataclasses.fields(cls):
    default = _default(field)
    text = "required" if default is dataclasses.MISSING else f"`{value_text(default)}`"
    rows.append((f"`{field.name}`", f"`{type_text(field_types(cls)[field.name])}`", text,
                 meanings.get(field.name, "")))
  return table(("field", "type", "default", "meaning"), rows)
