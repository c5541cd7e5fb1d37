"""RoPE: scores are relative, layouts differ only by a permutation, and YaRN scales frequencies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model.mla import softmax_scale
from model.rope import frequencies, rotate, rotation

V3 = model.get_config("deepseek_v3").rope


def rotated(x, positions, cfg):
  return rotate(x, *rotation(cfg, x.shape[-1], positions), cfg.layout)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_only_on_the_distance(layout):
  cfg = model.RopeConfig(layout=layout)
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  score = lambda i, j: (rotated(q, jnp.array([[i]]), cfg) * rotated(k, jnp.array([[j]]), cfg)).sum()
  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_layouts_differ_only_by_a_permutation():
  x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
  positions = jnp.arange(5)[None]
  interleaved = rotated(x, positions, model.RopeConfig(layout="interleaved"))
  to_half = jnp.array([0, 2, 4, 6, 1, 3, 5, 7])
  half = rotated(x[..., to_half], positions, model.RopeConfig(layout="half"))
  np.testing.assert_allclose(half, interleaved[..., to_half], rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
  plain = frequencies(dataclasses.replace(V3, scaling=None), 64)
  ratio = plain / frequencies(V3, 64)
  np.testing.assert_array_equal(ratio[:11], 1)
  np.testing.assert_allclose(ratio[23:], 40, rtol=1e-6)
  assert (np.diff(ratio[10:24]) > 0).all()


def test_yarn_temperatures_are_those_of_the_released_models():
  v3, lite = (model.get_config(name) for name in ("deepseek_v3", "deepseek_v2_lite"))
  assert v3.rope.scaling.softmax_scale == pytest.approx(1.873854, abs=1e-6)
  assert lite.rope.scaling.softmax_scale == pytest.approx(1.58963, abs=1e-5)
  assert v3.rope.scaling.rotation_scale == 1
  assert softmax_scale(v3) == pytest.approx(0.135234, abs=1e-6)
  assert softmax_scale(dataclasses.replace(v3, rope=model.RopeConfig())) == pytest.approx(
      0.0721688, abs=1e-7)


def test_linear_scaling_divides_every_frequency():
  cfg = model.RopeConfig(scaling=model.LinearScaling(4.0))
  np.testing.assert_allclose(
      frequencies(model.RopeConfig(), 16) / frequencies(cfg, 16), 4, rtol=1e-6)
