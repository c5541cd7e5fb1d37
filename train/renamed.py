"""Settings that have been renamed: the table by which `config.json` files of old versions load.

A setting is named by its dotted path below the dataclass to which it belonged. Files of any earlier
version are translated when they are read. On the command line an old name is an error, whose
message gives the new one.
"""

from collections.abc import Mapping
from typing import Any

# New path by old path, by dataclass.
SETTINGS: dict[str, dict[str, str]] = {
    "DataConfig": {"heldout_share": "heldout_fraction", "max_bad_share": "max_bad_fraction"},
    "OptimizerConfig": {"warmup_share": "warmup_fraction", "clip": "max_grad_norm"},
    "BalanceConfig": {"bias_share": "bias_fraction"},
    "TrainConfig": {"batch_ramp_share": "batch_ramp_fraction", "mtp_share": "mtp_fraction"},
    "RunConfig": {"train.data": "mesh.data", "train.fsdp": "mesh.fsdp"},
    "RLConfig": {"loop.data": "mesh.data", "loop.fsdp": "mesh.fsdp"},
    "BaseConfig": {"told": "keep_vocabulary"},
    "RLStudyConfig": {"problems": "evaluation.problems", "samples": "evaluation.samples",
                      "temperatures": "evaluation.base_temperatures"},
    "GradientsConfig": {"loud_share": "outlier_fraction", "loud_weight": "outlier_weight",
                        "factors": "outlier_factors"},
}


def renamed(cls: type) -> dict[str, str]:
  """Returns new paths by old paths below a dataclass, those of its base classes included."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    found |= SETTINGS.get(base.__name__, {})
  return found


def translate(cls: type, plain: Mapping[str, Any]) -> dict[str, Any]:
  """Returns plain data of a dataclass with its old names replaced by the new ones.

  Names that belong to nested dataclasses are left as they are.

  Args:
    cls: the dataclass.
    plain: what `config_io.to_dict` of any version returned for it.
  """
  translated = dict(plain)
  for old, new in renamed(cls).items():
    value, found = _pop(translated, old.split("."))
    if found:
      _put(translated, new.split("."), value)
  if cls.__name__ == "DataConfig" and "template" not in translated and any(
      isinstance(source, Mapping) and source.get("prompt_field")
      for source in translated.get("sources", ())):
    translated["template"] = "plain"  # versions without this setting used prompts as they were
  if "template" in translated:
    translated["template"] = template_name(cls.__name__, translated)
  return translated


def template_name(owner: str, plain: Mapping[str, Any]) -> str | None:
  """Returns the present name of the prompt template in plain data of a dataclass.

  Versions whose configurations had no `system` gave the name "chat" to a template of plain text.

  Args:
    owner: the dataclass' name.
    plain: what `config_io.to_dict` of any version returned for it.
  """
  name = plain.get("template")
  old = owner == "BaseConfig" or (owner in ("DataConfig", "RLConfig") and "system" not in plain)
  return "chatml_number" if old and name == "chat" else name


def _pop(node: dict[str, Any], path: list[str]) -> tuple[Any, bool]:
  """Removes and returns the value at a path, and whether there is one.

  Dicts below `node` are copied rather than changed.
  """
  name, *rest = path
  if name not in node:
    return None, False
  if not rest:
    return node.pop(name), True
  if not isinstance(node[name], Mapping):
    return None, False
  node[name] = dict(node[name])
  return _pop(node[name], rest)


def _put(node: dict[str, Any], path: list[str], value: Any) -> None:
  """Sets the value at a path unless there is one: if a file has both names, the new one counts."""
  name, *rest = path
  if not rest:
    node.setdefault(name, value)
    return
  inner = node.get(name)
  node[name] = dict(inner) if isinstance(inner, Mapping) else {}
  _put(node[name], rest, value)
