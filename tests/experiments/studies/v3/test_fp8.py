"""The study of FP8: its arms differ in precision alone, and its losses are compared as ratios."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import model
from experiments import settings
from experiments.studies import precision_runs
from experiments.studies.v3 import fp8
from pallas_kernels import RECIPES, implementations


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
    assert comparison.metric in precision_runs.log_losses(
        {"curve": [[1, 2.0]], "metrics": {"validation_loss": 2.0}})


def test_a_loss_a_quarter_of_a_per_cent_higher_is_the_papers_bound():
  """Of the last half of the steps only, however uneven the curve."""
  run = lambda factor: precision_runs.log_losses({
      "curve": [[1, 9.0 * factor**5], [2, 8.0], [3, 4.0 * factor], [4, 2.0 * factor]],
      "metrics": {"validation_loss": 3.0 * factor}})
  bf16, worse = run(1.0), run(1.0025)
  margin = fp8.STUDY.comparisons[0].claim.margin
  assert bf16["log_training_loss"] == pytest.approx(math.log(8) / 2)
  for name in bf16:
    assert worse[name] - bf16[name] == pytest.approx(margin, rel=1e-9)


def test_no_product_of_v3s_recipe_at_gpu_scale_is_without_a_kernel(monkeypatch):
  """Nor is any quantisation to E4M3: what a kernel refuses would fall back, and cost minutes."""
  refused, products = [], set()

  def spy(operation, implementation, xla, kernels, *operands, **options):
    if operation.startswith("fp8_") or options.get("format") == "e4m3":
      products.add(operation)
      refused.append(kernels["mosaic_gpu"].unsupported_reason(*operands, **options))
    return xla(*operands, **options)

  monkeypatch.setattr(implementations, "run", spy)
  base = fp8.STUDY.scales["gpu"].config
  cfg = settings.apply(base, fp8._fp8("fp8", "v3").settings)
  net = model.Transformer(cfg.model)

  def loss(variables):
    tokens_BT = jnp.zeros((cfg.train.batch_size, cfg.data.seq_len), jnp.int32)
    return net.apply(variables, tokens_BT, logits=False).hidden_BTD.astype(jnp.float32).sum()

  jax.eval_shape(jax.grad(loss, allow_int=True), model.abstract_variables(cfg.model))
  assert products >= {"fp8_matmul", "fp8_grouped_matmul", "fp8_grouped_weight_gradient", "quantize"}
  assert set(refused) == {None}


def test_the_gpu_model_has_as_many_parameters_as_its_docstring_says():
  cfg = fp8.STUDY.scales["gpu"].config.model
  assert round(cfg.param_count() / 1e6) == 112 and round(cfg.active_param_count() / 1e6) == 31


# Relative errors.

def a_run(seed, losses):
  run = {"seed": seed, "curve": [[i, loss] for i, loss in enumerate(losses, 1)],
         "metrics": {"validation_loss": losses[-1]}}
  return run | {"metrics": precision_runs.log_losses(run)}


def test_arms_are_set_beside_two_seeds_of_bfloat16():
  shown = precision_runs.relative_errors({
      "bf16": [a_run(0, [4.0, 2.0]), a_run(1, [4.0, 2.2])],
      "fp8": [a_run(1, [4.4, 2.42]), a_run(0, [4.0, 2.1]), a_run(7, [9.0, 9.0])]})
  table, = shown["tables"]
  assert "0.25 %" in table["caption"]
  assert table["rows"] == [
      ["fp8", "+7.500 % (+10.000, +5.000)", "+7.500 % (+10.000, +5.000)", 2],
      ["two seeds of bf16", "+10.000 % (+10.000)", "+10.000 % (+10.000)", 1]]
  panel, = shown["panels"]
  of_seeds = panel["curves"]["relative error of the loss (%), arms and seeds"]
  steps, errors = of_seeds["fp8"]
  assert steps == [1, 2] and errors[0] == pytest.approx((10 + 0) / 2)
  # Weights of a smoothing of 0.9 over two losses are 9 and 10, over 19.
  assert of_seeds["two seeds of bf16"][1][1] == pytest.approx(
      100 * ((9 * 4.0 + 10 * 2.2) / (9 * 4.0 + 10 * 2.0) - 1))


def test_without_bfloat16_there_is_nothing_to_compare_with():
  assert precision_runs.relative_errors({"bf16": [], "fp8": [a_run(0, [4.0, 2.0])]}) == {}
