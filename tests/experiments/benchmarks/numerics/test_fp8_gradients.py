"""Errors of quantised gradients: outlier tokens degrade blocks, but not tiles, as verdicts say."""

import dataclasses

import pytest

from experiments.benchmarks.numerics import fp8_gradients
from experiments.benchmarks.numerics.fp8_gradients import GRADIENTS, GradientsConfig, random_errors
from pallas_kernels import RECIPES

SMALL = GradientsConfig(tokens=256, width=256, outlier_factors=(1.0, 1e5))
# Rounding to three bits of mantissa has a relative RMS error of at most 2^-4 / sqrt(3); the errors
# of two operands add in quadrature.
TWO_ROUNDINGS = 2**0.5 * 2.0**-4 / 3**0.5


def errors_of(factor, product, over="ordinary"):
  return {row["way"]: row[over] for row in random_errors(SMALL, factor)
          if row["product"] == product}


@pytest.mark.parametrize("product", ["input gradient", "weight gradient"])
def test_without_outlier_tokens_all_scale_granularities_are_alike_and_e5m2_is_worse(product):
  errors = errors_of(1.0, product)
  for way in ("1x128", "128x128", "whole matrix"):
    assert TWO_ROUNDINGS / 2 < errors[way] < TWO_ROUNDINGS
  assert errors["1x128, E5M2"] > 1.3 * errors["1x128"]


def test_outlier_tokens_degrade_ordinary_tokens_that_share_a_scale_with_them():
  errors = errors_of(1e5, "input gradient")
  assert errors["1x128"] < TWO_ROUNDINGS and errors["128x128"] > 4 * errors["1x128"]
  # Over all tokens, the norm is that of the outliers, whose own precision does not suffer.
  assert errors_of(1e5, "input gradient", "all")["128x128"] < TWO_ROUNDINGS


def test_recipes_of_gradient_operands_equal_those_of_the_fp8_study():
  for way, name in (("1x128", "v3"), ("128x128", "block_gradients"),
                    ("1x128, E5M2", "e5m2_gradients")):
    assert fp8_gradients.recipe_of(GRADIENTS[way]) == RECIPES[name]


def test_verdicts_state_the_ratios_of_the_errors():
  random = [{"factor": factor, "way": way, "product": "input gradient", "ordinary": error,
             "all": error} for factor, block in ((1.0, 0.02), (10.0, 0.06))
            for way, error in (("1x128", 0.02), ("128x128", block))]
  trained = [{"weight": 1.0, "way": way, "kind": "attention", "error": error}
             for way, error in (("1x128", 0.1), ("128x128", 0.12), ("1x128, E5M2", 0.2))]
  text = " ".join(fp8_gradients.verdicts(random, trained))
  assert "1 at 1, 3 at 10" in text and "from 10 on" in text
  assert "128x128 over 1x128: attention 1.2" in text
  assert "E5M2 over E4M3: attention 2" in text


@pytest.mark.parametrize(("fields", "message"), [
    ({"outlier_factors": ()}, "one or more"), ({"outlier_factors": (0.5,)}, "at least 1"),
    ({"tokens": 100, "outlier_fraction": 1e-3}, "one outlier token and one ordinary one"),
    ({"outlier_fraction": 1.0}, "one outlier token and one ordinary one")])
def test_impossible_configurations_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **fields)
