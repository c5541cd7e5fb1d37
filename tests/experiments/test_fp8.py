"""The study of FP8: its arms differ in precision alone, and its losses are compared as ratios."""

import dataclasses
import math

import pytest

import model
from experiments import fp8, settings
from pallas_kernels import RECIPES


@pytest.mark.parametrize("scale", fp8.STUDY.scales)
def test_arms_differ_in_numerics_or_moments_and_in_nothing_else(scale):
  base = fp8.STUDY.scales[scale].config
  configs = {arm.name: settings.apply(base, arm.settings) for arm in fp8.STUDY.arms}
  assert len(set(configs.values())) == len(configs)
  for name, cfg in configs.items():
    recipe = {"bf16": None, "float32_moments": None, "fp8": "v3"}.get(name, name)
    assert cfg.model.numerics == dataclasses.replace(
        model.NUMERICS["fp8"], recipe=recipe and RECIPES[recipe])
    assert cfg.optimizer.moments == ("float32" if name == "float32_moments" else "bfloat16")
    assert base == dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, numerics=model.NUMERICS["bf16"]),
        optimizer=dataclasses.replace(cfg.optimizer, moments="bfloat16"))


def test_comparisons_are_between_arms_that_exist_in_metrics_that_exist():
  names = {arm.name for arm in fp8.STUDY.arms}
  for comparison in fp8.STUDY.comparisons:
    assert {comparison.arm, comparison.baseline} <= names
    assert comparison.metric in fp8.log_losses(
        {"curve": [[1, 2.0]], "metrics": {"validation_loss": 2.0}})


def test_a_loss_a_quarter_of_a_per_cent_higher_is_the_papers_bound():
  """Of the last half of the steps only, however uneven the curve."""
  run = lambda factor: fp8.log_losses({
      "curve": [[1, 9.0 * factor**5], [2, 8.0], [3, 4.0 * factor], [4, 2.0 * factor]],
      "metrics": {"validation_loss": 3.0 * factor}})
  bf16, worse = run(1.0), run(1.0025)
  margin = fp8.STUDY.comparisons[0].claim.margin
  assert bf16["log_training_loss"] == pytest.approx(math.log(8) / 2)
  for name in bf16:
    assert worse[name] - bf16[name] == pytest.approx(margin, rel=1e-9)
