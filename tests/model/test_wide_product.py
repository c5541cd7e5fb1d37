"""A product of bfloat16 and a split float32 matrix is as accurate as one of float32 numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.moe import _gate_logits
from model.wide_product import split_bf16, split_gradients, split_product, wide_product

BATCH, LENGTH, WIDTH, COLUMNS = 2, 96, 256, 16
WIDE, NARROW = 2.0**-20, 2.0**-10  # what float32 sums of this length attain, and bfloat16 does not


def operands(*leading: int) -> tuple[jax.Array, ...]:
  """Returns x in bfloat16, and in float32 w and a gradient of the product."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal((*leading, *shape))
  # The scales of a trained router: gradients are divided by a number of tokens.
  return (jnp.asarray(draw(BATCH, LENGTH, WIDTH), jnp.bfloat16),
          jnp.asarray(0.02 * draw(WIDTH, COLUMNS), jnp.float32),
          jnp.asarray(1e-6 * draw(BATCH, LENGTH, COLUMNS), jnp.float32))


def exact(x, w, dy):
  """Returns the product, and the gradients of x and of w, in float64."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  return (np.einsum("...btd,...de->...bte", x, w), np.einsum("...bte,...de->...btd", dy, w),
          np.einsum("...btd,...bte->...de", x, dy))


def error(ours: jax.Array, want: np.ndarray) -> float:
  return np.linalg.norm(np.asarray(ours, np.float64) - want) / np.linalg.norm(want)


def run(product, x, w, dy):
  y, vjp = jax.vjp(product, x, w)
  return y, *vjp(dy)


@jax.custom_vjp
def split(x, w):
  """The product that accelerators compute."""
  return split_product(x, w)


split.defvjp(lambda x, w: (split(x, w), (x, w)), lambda saved, dy: split_gradients(*saved, dy))


def test_three_parts_add_up_to_the_number_and_two_nearly_so():
  w = operands()[1]
  w = jnp.concatenate([w.ravel(), jnp.array([0, -0.0, 1 + 2**-23, 2 - 2**-23, 1e-30, -1e38])])
  exactly = np.asarray(w, np.float64)
  total = lambda parts: sum(np.asarray(part, np.float64) for part in parts)
  for split_into in (split_bf16, jax.jit(split_bf16, static_argnums=1)):
    parts = split_into(w, 3)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(total(parts), exactly)
    np.testing.assert_allclose(total(split_into(w, 2)), exactly, rtol=2.0**-17)
    np.testing.assert_array_equal(split_into(w, 1)[0], w.astype(jnp.bfloat16))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_split_product_and_its_gradients_are_accurate_to_float32(transform):
  x, w, dy = operands()
  ours, want = run(transform(split), x, w, dy), exact(x, w, dy)
  rounded = [a.astype(jnp.bfloat16) for a in (w, dy)]
  narrow = run(functools.partial(jnp.einsum, "btd,de->bte"), x, *rounded)
  y, dx, dw = (error(a, b) for a, b in zip(ours, want, strict=True))
  y_narrow, _, dw_narrow = (error(a, b) for a, b in zip(narrow, want, strict=True))
  assert [a.dtype for a in ours] == [jnp.float32, jnp.bfloat16, jnp.float32]
  assert y < WIDE and dw < WIDE, (y, dw)
  assert y_narrow > NARROW and dw_narrow > NARROW  # so the limits mean something
  # As accurate as a bfloat16 number can be: nearly all are the ones that the exact gradient gives.
  best = jnp.asarray(want[1], jnp.float32).astype(jnp.bfloat16)
  assert dx <= 1.001 * error(best, want[1])
  assert (ours[1] != best).mean() < 2.0**-6


def test_a_split_product_is_accurate_in_a_vmapped_loop():
  x, w, dy = operands(3)

  def loss(x, w, dy):
    # Twice in a scan, so that gradients are twice as large.
    return jax.lax.scan(lambda total, _: (total + (split(x, w) * dy).sum(), None), 0.0, length=2)[0]

  dx, dw = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, w, dy)
  _, want_dx, want_dw = exact(x, w, dy)
  assert error(dw, 2 * want_dw) < WIDE and error(dx, 2 * want_dx) < 2.0**-8


def lowered(function, dtype, platform: str) -> str:
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands()]
  shapes[0] = jax.ShapeDtypeStruct(shapes[0].shape, dtype)
  return jax.jit(functools.partial(run, function)).trace(*shapes).lower(
      lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[tuple[str, ...]]:
  """Returns the types of the operands of every product, such as 2x96x256xbf16."""
  return re.findall(r"dot_general.*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_bfloat16_operands_without_converting_activations(platform):
  text = lowered(_gate_logits, jnp.bfloat16, platform)
  found = products(text)
  assert len(found) == 3 and all(name.endswith("xbf16") for pair in found for name in pair), found
  assert f"{BATCH}x{LENGTH}x{WIDTH}xf32" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_other_activations_and_cpus_multiply_float32_operands(platform):
  whole = lambda x, w: jnp.einsum(
      "btd,de->bte", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
  for dtype in (jnp.float32, jnp.float16, *[jnp.bfloat16] * (platform == "cpu")):
    found = products(lowered(wide_product, dtype, platform))
    assert found == products(lowered(whole, dtype, platform)) and len(found) == 3
    assert all(name.endswith("xf32") for pair in found for name in pair)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_on_a_cpu_nothing_but_the_formula_in_float32_is_computed(dtype):
  x, w, dy = operands()
  x = x.astype(dtype)
  whole = lambda x, w: jnp.einsum(
      "btd,de->bte", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
  for transform in (lambda f: f, jax.checkpoint):
    ours, want = (jax.jit(transform(functools.partial(run, f)))(x, w, dy)
                  for f in (wide_product, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, want)
  batched = (jax.jit(jax.vmap(functools.partial(run, f)))(*operands(3))
             for f in (wide_product, whole))
  jax.tree.map(np.testing.assert_array_equal, *batched)


def test_gradients_are_summed_over_devices_that_share_the_matrix_in_a_shard_map():
  x, w, dy = operands()
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  data, replicated = jax.P("data"), jax.P()
  loss = lambda x, w, dy: jax.lax.psum((wide_product(x, w) * dy).sum(), "data")
  sharded = jax.shard_map(loss, mesh=mesh, in_specs=(data, replicated, data), out_specs=replicated)
  ours = jax.jit(jax.grad(sharded, (0, 1)))
  _, want_dx, want_dw = exact(x, w, dy)
  dx, dw = ours(x, w, dy)
  assert error(dw, want_dw) < WIDE and error(dx, want_dx) < 2.0**-8
  text = ours.trace(x, w, dy).lower(lowering_platforms=("cuda",)).as_text()
  assert all(name.endswith("xbf16") for pair in products(text) for name in pair)
