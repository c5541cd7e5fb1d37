"""Errors of quantised gradients: outlier tokens spoil blocks, not tiles, and verdicts say so."""

import dataclasses

import pytest

from experiments.benchmarks.numerics import fp8_gradients
from experiments.benchmarks.numerics.fp8_gradients import GRADIENTS, GradientsConfig, random_errors
from pallas_kernels import RECIPES

SMALL = GradientsConfig(tokens=256, width=256, outlier_factors=(1.0, 1e5))
# One rounding of three bits errs by 2^-4 / sqrt(3) at most; two operands add in squares.
TWO_ROUNDINGS = 2**0.5 * 2.0**-4 / 3**0.5


def of(factor, product, over="ordinary"):
  return {row["way"]: row[over] for row in random_errors(SMALL, factor)
          if row["product"] == product}


@pytest.mark.parametrize("product", ["input gradient", "weight gradient"])
def test_without_outlier_tokens_no_scale_is_better_and_a_bit_less_is_worse(product):
  errors = of(1.0, product)
  for way in ("1x128", "128x128", "whole matrix"):
    assert TWO_ROUNDINGS / 2 < errors[way] < TWO_ROUNDINGS
  assert errors["1x128, E5M2"] > 1.3 * errors["1x128"]


def test_outlier_tokens_spoil_others_where_they_share_a_scale():
  errors = of(1e5, "input gradient")
  assert errors["1x128"] < TWO_ROUNDINGS and errors["128x128"] > 4 * errors["1x128"]
  assert of(1e5, "input gradient", "all")["128x128"] < TWO_ROUNDINGS  # the outliers are exact


def test_recipes_differ_in_gradients_alone_and_are_the_studys():
  for way, name in (("1x128", "v3"), ("128x128", "block_gradients"),
                    ("1x128, E5M2", "e5m2_gradients")):
    assert fp8_gradients.recipe_of(GRADIENTS[way]) == RECIPES[name]


def test_verdicts_give_the_ratios_that_the_numbers_have():
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
    ({"outlier_factors": ()}, "one at least"), ({"outlier_factors": (0.5,)}, "at least 1"),
    ({"tokens": 100, "outlier_fraction": 1e-3}, "one outlier token and one ordinary one"),
    ({"outlier_fraction": 1.0}, "one outlier token and one ordinary one")])
def test_what_cannot_be_measured_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **fields)
