"""The commands that reproduce everything that a study's folder holds."""

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from experiments.options import Options
from experiments.reports.study_report import PILOT_SEED
from experiments.studies.study import Study


def reproducing_command(study: Study, scale_name: str, options: Options,
                        seeds: Mapping[str, Iterable[int]]) -> str:
  """Returns one line of shell that trains all compared runs, in the default output folder.

  Arms with different seeds need a command each, which are joined by "&&" and share the folder.

  Args:
    study: the study.
    scale_name: name of the scale.
    options: the flags of the command line, for its settings.
    seeds: seeds of the compared runs, by arm.
  """
  words = ["python", "-m", "experiments.run", f"--experiment={study.name}", f"--scale={scale_name}"]
  for flag, assignments in (("--set", options.settings), ("--a", options.a), ("--b", options.b)):
    words += [word for assignment in assignments for word in (flag, assignment)]
  arms_of: dict[tuple[tuple[int, int], ...], list[str]] = {}
  for arm in study.arms:
    if spans := tuple(_spans(seeds.get(arm.name, ()))):
      arms_of.setdefault(spans, []).append(arm.name)
  return " && ".join(
      shlex.join(words + _flags(study, scale_name, arms, span))
      for spans, arms in arms_of.items() for span in spans) or shlex.join(words)


def confirming_command(study: Study, scale_name: str, options: Options, result: Mapping[str, Any],
                       ) -> str | None:
  """Returns a command that trains the arms of contradicted claims on seeds that are not used yet.

  A claim that is contradicted is a surprise, and several claims that share a baseline err together.
  None if no claim is contradicted, or if there are not enough seeds below those of pilots.

  Args:
    study: the study.
    scale_name: name of the scale.
    options: the flags of the command line, for its settings.
    result: the content of results.json.
  """
  surprises = [c for c in result["comparisons"] if c["verdict"] == "contradicted"]
  if not surprises:
    return None
  arms = {arm for c in surprises for arm in (c["arm"], c["baseline"])} - {None}
  first = 1 + max(run["seed"] for run in result["runs"] if run["seed"] < PILOT_SEED)
  fresh = range(first, first + max(c["paired"]["n"] for c in surprises))
  if fresh.stop > PILOT_SEED:
    return None
  command = reproducing_command(study, scale_name, options, dict.fromkeys(arms, fresh))
  return f"{command} --out={shlex.quote(f'runs/{study.name}-{scale_name}-from-seed{first}')}"


def _flags(study: Study, scale_name: str, arms: list[str], span: tuple[int, int]) -> list[str]:
  """Returns the flags for arms and for the seeds from span[0] to span[1] - 1; none for defaults."""
  first, end = span
  flags = [] if set(arms) == set(study.arms_to_run()) else [f"--arms={','.join(arms)}"]
  if span != (0, study.scales[scale_name].seeds):
    flags.append(f"--seeds={f'{first}:' if first else ''}{end}")
  return flags


def _spans(seeds: Iterable[int]) -> Iterator[tuple[int, int]]:
  """Yields the first seed of every run of consecutive seeds, and the seed after its last."""
  for _, group in itertools.groupby(enumerate(sorted(seeds)), lambda pair: pair[1] - pair[0]):
    consecutive = [seed for _, seed in group]
    yield consecutive[0], consecutive[-1] + 1
