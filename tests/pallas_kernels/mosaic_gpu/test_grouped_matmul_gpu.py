"""Hopper's grouped products: production shapes lower on any host, and results agree on a GPU.

Shape letters:  R rows  G groups  K contracted width  N result width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, implementations
from pallas_kernels.mosaic_gpu import grouped_matmul as product_kernel
from pallas_kernels.mosaic_gpu import grouped_weight_gradient as gradient_kernel
from pallas_kernels.mosaic_gpu.grouped_matmul import Tiling
from pallas_kernels.ops.grouped_matmul import grouped_weight_gradient

on_hopper = pytest.mark.skipif(implementations.local_backend() != "mosaic_gpu",
                               reason=f"needs {implementations.BACKENDS['mosaic_gpu']}")
PRODUCTION = {"base": (64, 1024, 512), "v2_lite": (64, 2048, 1408), "deepseek_v3": (32, 7168, 2048)}
SIZES = {"even": [256] * 4, "uneven": [1, 700, 0, 321], "one": [0, 0, 1024, 0],
         "part": [100, 9, 0, 300], "none": [0, 0, 0, 0]}
INPUTS = ["normal", "outliers", "zeros", "denormal"]


def assert_lowers(name, run, num_groups, *shapes):
  operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  sizes_G = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
  lowered = jax.jit(run).trace(*operands, sizes_G).lower(lowering_platforms=("cuda",))
  assert f"{name}_mosaic_gpu" in lowered.as_text()  # the name that profiles show


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(("groups", "k", "n"), PRODUCTION.values(), ids=PRODUCTION)
def test_products_of_production_shapes_lower(groups, k, n, transpose_rhs):
  run = functools.partial(product_kernel.run, transpose_rhs=transpose_rhs)
  assert_lowers("grouped_matmul", run, groups, (65536, k),
                (groups, n, k) if transpose_rhs else (groups, k, n))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("groups", "k", "n"), PRODUCTION.values(), ids=PRODUCTION)
def test_weight_gradients_of_production_shapes_lower(groups, k, n, dtype):
  run = functools.partial(gradient_kernel.run, dtype=dtype)
  assert_lowers("grouped_weight_gradient", run, groups, (65536, k), (65536, n))


def made(kind, seed, shape):
  """Returns bfloat16 operands: normal, or of a kind that a kernel may compute incorrectly."""
  x = jax.random.normal(jax.random.key(seed), shape)
  if kind == "outliers":
    x = jnp.where(jax.random.uniform(jax.random.key(seed + 9), shape) < 1e-3, 1e3 * x, x)
  return (x * {"zeros": 0.0, "denormal": 1e-39}.get(kind, 1.0)).astype(jnp.bfloat16)


def assert_rounded(ours, want, magnitude, terms):
  """Asserts that `ours` is a float32 sum of `terms` exact products, rounded to its own dtype.

  `magnitude` is the sum of the absolute products. Denormals may be flushed or not.
  """
  rounding = {"bfloat16": 2.0**-8, "float32": 2.0**-23}[ours.dtype.name]
  ours, want, magnitude = (np.asarray(x, np.float64) for x in (ours, want, magnitude))
  bound = rounding * abs(want) + terms * (2.0**-22 * magnitude + 2.0**-120)
  assert (abs(ours - want) <= bound).all()


def product_and_magnitude(lhs_RK, rhs_GKN, sizes_G):
  run = functools.partial(grouped_matmul, sizes_G=sizes_G, precision="highest",
                          implementation="xla")
  lhs_RK, rhs_GKN = lhs_RK.astype(jnp.float32), rhs_GKN.astype(jnp.float32)
  return run(lhs_RK, rhs_GKN), run(abs(lhs_RK), abs(rhs_GKN))


def gradient_and_magnitude(lhs_RK, rhs_RN, sizes_G):
  run = functools.partial(grouped_weight_gradient, sizes_G=sizes_G, implementation="xla")
  lhs_RK, rhs_RN = lhs_RK.astype(jnp.float32), rhs_RN.astype(jnp.float32)
  return run(lhs_RK, rhs_RN), run(abs(lhs_RK), abs(rhs_RN))


@on_hopper
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_products_agree_with_the_oracle(sizes, transpose_rhs):
  lhs_RK, rhs_GKN = made("normal", 0, (1029, 256)), made("normal", 1, (4, 256, 384))
  sizes_G = jnp.array(sizes, jnp.int32)
  ours = grouped_matmul(lhs_RK, rhs_GKN.mT if transpose_rhs else rhs_GKN, sizes_G,
                        transpose_rhs=transpose_rhs, implementation="mosaic_gpu")
  assert_rounded(ours, *product_and_magnitude(lhs_RK, rhs_GKN, sizes_G), 256)
  assert not np.asarray(ours, np.float32)[sum(sizes):].any()


@on_hopper
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weight_gradients_agree_with_the_oracle(sizes, dtype):
  lhs_RK, rhs_RN = made("normal", 0, (1029, 256)), made("normal", 1, (1029, 384))
  sizes_G = jnp.array(sizes, jnp.int32)
  want = gradient_and_magnitude(lhs_RK, rhs_RN, sizes_G)
  # Rows of no group must not influence the result.
  lhs_RK, rhs_RN = (x.at[sum(sizes):].set(jnp.nan) for x in (lhs_RK, rhs_RN))
  ours = grouped_weight_gradient(
      lhs_RK, rhs_RN, sizes_G, dtype=dtype, implementation="mosaic_gpu")
  assert_rounded(ours, *want, 1029)


@on_hopper
@pytest.mark.parametrize("kind", INPUTS)
def test_outliers_zeros_and_denormals_agree_with_the_oracle(kind):
  lhs_RK, rhs_GKN = made(kind, 0, (1029, 256)), made("normal", 1, (4, 256, 384))
  sizes_G, dout_RN = jnp.array(SIZES["uneven"], jnp.int32), made(kind, 2, (1029, 384))
  ours = grouped_matmul(lhs_RK, rhs_GKN, sizes_G, implementation="mosaic_gpu")
  assert_rounded(ours, *product_and_magnitude(lhs_RK, rhs_GKN, sizes_G), 256)
  ours = grouped_weight_gradient(lhs_RK, dout_RN, sizes_G, implementation="mosaic_gpu")
  assert_rounded(ours, *gradient_and_magnitude(lhs_RK, dout_RN, sizes_G), 1029)


@on_hopper
@pytest.mark.parametrize("tiling", [Tiling(128, 128), Tiling(256, 128), Tiling(128, 256),
                                    Tiling(128, 256, stages=3, swizzle=2)], ids=str)
def test_every_tiling_agrees_with_the_oracle(tiling):
  lhs_RK, rhs_GKN = made("normal", 0, (1029, 256)), made("normal", 1, (4, 256, 512))
  sizes_G = jnp.array(SIZES["uneven"], jnp.int32)
  ours = product_kernel.run(lhs_RK, rhs_GKN, sizes_G, tiling=tiling, dtype=jnp.float32)
  assert_rounded(ours, *product_and_magnitude(lhs_RK, rhs_GKN, sizes_G), 256)
  ours = gradient_kernel.run(lhs_RK, lhs_RK @ rhs_GKN[0], sizes_G, tiling=tiling)
  want = gradient_and_magnitude(lhs_RK, lhs_RK @ rhs_GKN[0], sizes_G)
  assert_rounded(ours, *want, 1029)


@on_hopper
@pytest.mark.parametrize(("rows", "sizes"), [(1, [1, 0]), (7, [3, 2]), (129, [64, 65])])
def test_small_and_odd_numbers_of_rows_agree_with_the_oracle(rows, sizes):
  lhs_RK, rhs_GKN = made("normal", 0, (rows, 128)), made("normal", 1, (2, 128, 128))
  dout_RN, sizes_G = made("normal", 2, (rows, 128)), jnp.array(sizes, jnp.int32)
  run = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes_G, implementation="mosaic_gpu")
  ours, transpose = jax.vjp(run, lhs_RK, rhs_GKN)
  dlhs_RK, drhs_GKN = transpose(dout_RN)
  assert_rounded(ours, *product_and_magnitude(lhs_RK, rhs_GKN, sizes_G), 128)
  assert_rounded(dlhs_RK, *product_and_magnitude(dout_RN, rhs_GKN.mT, sizes_G), 128)
  assert_rounded(drhs_GKN, *gradient_and_magnitude(lhs_RK, dout_RN, sizes_G), rows)


@on_hopper
def test_the_kernel_is_the_default_implementation():
  lhs_RK, rhs_GKN = made("normal", 0, (256, 128)), made("normal", 1, (2, 128, 128))
  sizes_G = jnp.array([100, 156], jnp.int32)
  lowered = jax.jit(grouped_matmul).lower(lhs_RK, rhs_GKN, sizes_G)
  assert "mosaic_gpu" in lowered.as_text()
