"""Checks of the settings of a study's command line, before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import settings
from experiments.studies.study import Arm, Scale, Study


def apply_arm(study: Study, scale: Scale, assignments: Sequence[str], arm: Arm) -> Any:
  """Returns an arm's config: the scale's, with the user's settings and those of the arm.

  Raises:
    ValueError: if a setting is invalid, or is set by both the user and the arm.
  """
  own = settings.assigned(arm.settings)
  both = sorted(settings.assigned(assignments) & own)
  if both:
    raise ValueError(
        f"--set {', '.join(both)} cannot apply to the arm {arm.name}, which sets "
        f"{' '.join(arm.settings)}: leave it out, or run only arms that do not set it, "
        "--arms=NAME,NAME")
  return settings.apply(scale.config, (*assignments, *arm.settings), named=study.kind.named)


def require_effect(study: Study, scale: Scale, assignments: Sequence[str],
                   configs: Mapping[str, Any]) -> None:
  """Raises ValueError for settings that the study would overwrite or ignore.

  Args:
    study: the study.
    scale: its scale.
    assignments: the settings of the command line.
    configs: configs of the arms that run, by name, with all settings applied.
  """
  reasons = dict(study.kind.ignored)
  if scale.learning_rates:
    rates = ", ".join(f"{rate:g}" for rate in scale.learning_rates)
    reasons[study.kind.learning_rate] = (
        f"{study.name} sweeps the learning rate of "
        f"{study.baseline if study.one_rate else 'every arm'} over {rates}: leave it out")
  arms = {arm.name: settings.assigned(arm.settings) for arm in study.arms}
  users = settings.assigned(assignments)
  for name, reason in reasons.items():
    usual = _value(scale.config, name)
    for arm, cfg in configs.items():
      if name in users | arms[arm] or _value(cfg, name) != usual:
        where = f" in the arm {arm}" if name in arms[arm] else ""
        raise ValueError(f"{name}{where} would have no effect: {reason}")


def _value(cfg: Any, name: str) -> Any:
  """Returns the value of a field by its dotted name; None if a section on the way is None."""
  for part in name.split("."):
    cfg = getattr(cfg, part, None)
  return cfg
