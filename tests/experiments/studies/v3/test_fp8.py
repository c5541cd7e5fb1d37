"""The FP8 study: its arms differ only in precision, and its losses are compared as ratios."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import model
from experiments import settings
from experiments.studies.text import precision_runs
from experiments.studies.v3 import fp8
from pallas_kernels import RECIPES, implementations


@pytest.mark.parametrize("scale", fp8.STUDY.scales)
def test_arms_differ_only_in_numerics_or_in_the_format_of_the_moments(scale):
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


def test_comparisons_refer_to_existing_arms_and_metrics():
  names = {arm.name for arm in fp8.STUDY.arms}
  for comparison in fp8.STUDY.comparisons:
    assert {comparison.arm, comparison.baseline} <= names
    assert comparison.metric in precision_runs.log_losses(
        {"curve": [[1, 2.0]], "metrics": {"validation_loss": 2.0}})


def test_the_margin_is_a_loss_0_25_percent_higher_over_the_last_half_of_the_steps():
  run = lambda factor: precision_runs.log_losses({
      "curve": [[1, 9.0 * factor**5], [2, 8.0], [3, 4.0 * factor], [4, 2.0 * factor]],
      "metrics": {"validation_loss": 3.0 * factor}})
  bf16, worse = run(1.0), run(1.0025)
  margin = fp8.STUDY.comparisons[0].claim.margin
  assert bf16["log_training_loss"] == pytest.approx(math.log(8) / 2)
  for name in bf16:
    assert worse[name] - bf16[name] == pytest.approx(margin, rel=1e-9)


def test_kernels_support_every_fp8_product_and_quantisation_of_the_gpu_scale(monkeypatch):
  """What a kernel does not support would fall back to XLA, which takes minutes."""
  reasons, operations = set(), set()

  def spy(operation, implementation, xla, kernels, *operands, **options):
    if operation.startswith("fp8_") or options.get("format") == "e4m3":
      operations.add(operation)
      reasons.add(kernels["mosaic_gpu"].unsupported_reason(*operands, **options))
    return xla(*operands, **options)

  monkeypatch.setattr(implementations, "run", spy)
  base = fp8.STUDY.scales["gpu"].config
  cfg = settings.apply(base, fp8._fp8("fp8", "v3").settings)
  net = model.Transformer(cfg.model)

  def loss(variables):
    tokens_BT = jnp.zeros((cfg.train.batch_size, cfg.data.seq_len), jnp.int32)
    return net.apply(variables, tokens_BT, logits=False).hidden_BTD.astype(jnp.float32).sum()

  jax.eval_shape(jax.grad(loss, allow_int=True), model.abstract_variables(cfg.model))
  assert operations >= {
      "fp8_matmul", "fp8_grouped_matmul", "fp8_grouped_weight_gradient", "quantize"}
  assert reasons == {None}


def test_the_gpu_model_has_112_million_parameters_of_which_31_million_are_active():
  cfg = fp8.STUDY.scales["gpu"].config.model
  assert round(cfg.param_count() / 1e6) == 112 and round(cfg.active_param_count() / 1e6) == 31


# Relative errors.

def a_run(seed, losses):
  run = {"seed": seed, "curve": [[i, loss] for i, loss in enumerate(losses, 1)],
         "metrics": {"validation_loss": losses[-1]}}
  return run | {"metrics": precision_runs.log_losses(run)}


def test_relative_errors_of_arms_are_shown_next_to_those_of_two_bfloat16_seeds():
  parts = precision_runs.relative_errors({
      "bf16": [a_run(0, [4.0, 2.0]), a_run(1, [4.0, 2.2])],
      "fp8": [a_run(1, [4.4, 2.42]), a_run(0, [4.0, 2.1]), a_run(7, [9.0, 9.0])]})
  table, = parts["tables"]
  assert "0.25 %" in table["caption"]
  assert table["rows"] == [
      ["fp8", "+7.500 % (+10.000, +5.000)", "+7.500 % (+10.000, +5.000)", 2],
      ["two seeds of bf16", "+10.000 % (+10.000)", "+10.000 % (+10.000)", 1]]
  panel, = parts["panels"]
  assert panel["bound"][0] == 0.25 and panel["other_scale"] == ["two seeds of bf16"]
  curves = panel["curves"]
  steps, errors, low, high = curves["fp8"]
  assert low[0] < 0 < 10 < high[0]  # the 95 % interval of 0 % and 10 %
  assert steps == [1, 2] and errors[0] == pytest.approx((10 + 0) / 2)
  # With a decay of 0.9, the debiased average of two losses weights them 9/19 and 10/19.
  assert curves["two seeds of bf16"][1][1] == pytest.approx(
      100 * ((9 * 4.0 + 10 * 2.2) / (9 * 4.0 + 10 * 2.0) - 1))


def test_without_bfloat16_runs_there_are_no_relative_errors():
  assert precision_runs.relative_errors({"bf16": [], "fp8": [a_run(0, [4.0, 2.0])]}) == {}
