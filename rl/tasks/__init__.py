"""Tasks, named by specs such as `arithmetic:terms=3,digits=2`, `file:PATH` or `gym:NAME`."""

import dataclasses
import functools
import re
from typing import Any

from model.checks import did_you_mean
from rl.tasks.arithmetic import Arithmetic
from rl.tasks.bilingual import Bilingual
from rl.tasks.columns import Columns
from rl.tasks.countdown import Countdown
from rl.tasks.documents import Noise
from rl.tasks.files import File
from rl.tasks.generated import Generated
from rl.tasks.gym import Gym
from rl.tasks.problem import Problem, Task
from rl.tasks.programs import Programs

GENERATED: dict[str, type[Generated]] = {
    task.name: task for task in (Arithmetic, Columns, Bilingual, Countdown, Programs)}
_NAMES = (*GENERATED, "file", "gym")
_SEED = re.compile(r"(.*?)(?::seed=([0-9]+))?", re.DOTALL)  # after the path of a file


@functools.cache
def get_task(spec: str) -> Task:
  """Returns the task that a spec names.

  Args:
    spec: `NAME` or `NAME:field=value,...` for a task of `GENERATED`; `file:PATH` or
      `file:PATH:seed=1` for a JSONL file; `gym:DATASET` or `gym:DATASET:seed=1` for a data set of
      reasoning-gym.

  Raises:
    ValueError: for an unknown name or field, or an invalid value; the message says what is wrong
      and suggests the nearest name.
  """
  name, _, rest = spec.partition(":")
  if name == "file":
    path, seed = _SEED.fullmatch(rest).groups()
    return File(path, int(seed or 0))
  if name == "gym":
    dataset, _, settings = rest.partition(":")
    return Gym(dataset, **_settings(Gym, settings, spec, without="dataset"))
  if name not in GENERATED:
    raise ValueError(f"there is no task {name!r}{did_you_mean(name, _NAMES)} The tasks are: "
                     f"{', '.join(_NAMES)}")
  return GENERATED[name](**_settings(GENERATED[name], rest, spec))


def _settings(cls: type, text: str, spec: str, without: str = "") -> dict[str, Any]:
  """Parses `field=value,...` into the fields of a task class, other than the field `without`."""
  fields = {field.name: field.type for field in dataclasses.fields(cls) if field.name != without}
  values = {}
  for setting in text.split(",") if text else ():
    name, found, value = (part.strip() for part in setting.partition("="))
    if not found:
      raise ValueError(f"task {spec!r}: {setting!r} should have the form field=value")
    if name not in fields:
      raise ValueError(f"task {spec!r}: {cls.name} has no field {name!r}"
                       f"{did_you_mean(name, fields)} Its fields are: {', '.join(fields)}")
    if name in values:
      raise ValueError(f"task {spec!r}: {name} is set twice")
    try:
      values[name] = fields[name](value)
    except ValueError as error:
      raise ValueError(f"task {spec!r}: the value in {name}={value} should be "
                       f"{fields[name].__name__}") from error
  return values

