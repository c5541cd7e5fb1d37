"""Settings that have been renamed: the one table through which old `config.json` files load.

A setting is named by its dotted path below the dataclass that it belonged to. Files of any earlier
version are translated when they are read; on the command line an old name is an error that gives
the new one.
"""

from collections.abc import Mapping
from typing import Any

# By dataclass, old path to new path.
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
  """Old to new paths below a dataclass, those of its base classes included."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    found |= SETTINGS.get(base.__name__, {})
  return found


def translate(cls: type, plain: Mapping[str, Any]) -> dict[str, Any]:
  """Plain data of a dataclass with old names replaced; nested dataclasses are left as they are.

  Args:
    cls: the dataclass.
    plain: what `config_io.to_dict` of any version gave for it.
  """
  translated = dict(plain)
  for old, new in renamed(cls).items():
    value, found = _pop(translated, old.split("."))
    if found:
      _put(translated, new.split("."), value)
  return translated


def _pop(node: dict[str, Any], path: list[str]) -> tuple[Any, bool]:
  """Removes what a path leads to; dicts on the way are copied, not changed."""
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
  """Sets what a path leads to, unless it is set: a file that has both names is of today."""
  name, *rest = path
  if not rest:
    node.setdefault(name, value)
    return
  inner = node.get(name)
  node[name] = dict(inner) if isinstance(inner, Mapping) else {}
  _put(node[name], rest, value)
