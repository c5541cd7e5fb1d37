"""SwiGLU with gates and the down projection: gradients, and what is saved to compute them.

Shape letters:  R rows  G groups  F hidden units  N result width
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations, moe_down_proj

R, G, F, N = 20, 4, 6, 5
SIZES = (7, 0, 10, 1)  # the last two rows are padding
HALF_A_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def operands(dtype=jnp.float32, seed=0):
  """Returns gate and up, the gates, the weights and the gradient of the result."""
  return (normal(seed, R, 2 * F).astype(dtype), jax.nn.sigmoid(normal(seed + 1, R)),
          normal(seed + 2, G, F, N), normal(seed + 3, R, N).astype(dtype))


@jax.jit
def ours(gate_up, gates_R, w_GFN, dy_RN, sizes_G=SIZES):
  """Returns the result of `moe_down_proj` and its gradients."""
  product = functools.partial(
      moe_down_proj, sizes_G=jnp.asarray(sizes_G),
      precision="highest" if gate_up.dtype == jnp.float32 else None)
  y_RN, vjp = jax.vjp(product, gate_up, gates_R, w_GFN)
  return y_RN, *vjp(dy_RN)


def analytic(gate_up, gates_R, w_GFN, dy_RN):
  """Returns the result and gradients in float64, and the sums of the magnitudes of their terms."""
  gate_up, gates_R, w_GFN, dy_RN = (
      np.asarray(x, np.float64) for x in (gate_up, gates_R, w_GFN, dy_RN))
  gate, up = np.split(gate_up, 2, 1)
  scale, sigmoid = gates_R[:, None], 1 / (1 + np.exp(-gate))
  slope = sigmoid * (1 + gate * (1 - sigmoid))
  ungated = gate * sigmoid * up
  real = np.arange(R) < sum(SIZES)
  group_R = np.repeat(np.arange(G + 1), [*SIZES, R - sum(SIZES)])
  w_RFN = np.where(real[:, None, None], w_GFN[np.minimum(group_R, G - 1)], 0)
  member_GR = group_R == np.arange(G)[:, None]

  def results(w_RFN, dy_RN, ungated, up, gate, slope):
    dhidden = np.einsum("rn,rfn->rf", dy_RN, w_RFN)
    return (np.einsum("rf,rfn->rn", ungated * scale, w_RFN),
            np.concatenate([dhidden * scale * up * slope, dhidden * scale * gate * sigmoid], 1),
            (dhidden * ungated).sum(1),
            np.einsum("gr,rf,rn->gfn", member_GR, ungated * scale, dy_RN))

  numbers = (w_RFN, dy_RN, ungated, up, gate)
  return (results(*numbers, slope),
          results(*map(np.abs, numbers), sigmoid * (1 + np.abs(gate))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_results_and_gradients_equal_the_analytic_ones_up_to_rounding(dtype):
  args = operands(dtype)
  for a, exact, size, formats in zip(
      ours(*args), *analytic(*args), (dtype, dtype, jnp.float32, jnp.float32), strict=True):
    assert (a.shape, a.dtype) == (exact.shape, formats)
    # The weights, the hidden units or their gradient, and the result are rounded once each; float32
    # rounds about thirty times on the way, and in sums of at most R + N + F terms.
    tolerance = 3 * HALF_A_STEP[jnp.dtype(dtype).name] * (1 + 2.0**-7) + (30 + R + N + F) * 2.0**-24
    assert (np.abs(np.asarray(a, np.float64) - exact) <= tolerance * size).all()


def test_only_the_arguments_are_saved_for_the_backward_pass():
  gate_up, gates_R, w_GFN, _ = operands(jnp.bfloat16)
  sizes_G = jnp.array(SIZES)
  _, vjp = jax.vjp(lambda *args: moe_down_proj(*args, sizes_G), gate_up, gates_R, w_GFN)
  kept = {(x.shape, x.dtype.name) for x in jax.tree.leaves(vjp)}
  assert kept == {(x.shape, x.dtype.name) for x in (gate_up, gates_R, w_GFN, sizes_G)}


def test_vmapped_calls_are_independent():
  calls = (*operands(), jnp.array(SIZES)), (*operands(seed=9), jnp.array(SIZES[::-1]))
  both = jax.vmap(ours)(*(jnp.stack(xs) for xs in zip(*calls, strict=True)))
  for index, args in enumerate(calls):
    for a, b in zip(both, ours(*args), strict=True):
      # Float32 sums of so many terms, in a different order; all have magnitudes around one.
      np.testing.assert_allclose(a[index], b, rtol=1e-5, atol=(R + N + F) * 2.0**-22)


def test_each_device_may_compute_its_own_rows_in_a_shard_map():
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

  def local(gate_up, gates_R, w_GFN, dy_RN):
    return ours(gate_up, gates_R, jax.lax.pcast(w_GFN, "data", to="varying"), dy_RN)

  on_mesh = jax.jit(jax.shard_map(
      local, mesh=mesh, in_specs=(rows, rows, replicated, rows), out_specs=rows))
  args = operands()
  for a, b in zip(on_mesh(*args), ours(*args), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=(R + N + F) * 2.0**-22)


@pytest.mark.parametrize(("change", "message"), [
    ({0: (R, F)}, r"gate and up \[R, 2 F\]"), ({1: (R, 1)}, r"gates \[R\]"),
    ({3: (G + 1,)}, r"sizes \[G\], not \(20, 12\), \(20,\), \(4, 6, 5\) and \(5,\)")])
def test_mismatched_shapes_are_refused(change, message):
  shapes = {0: (R, 2 * F), 1: (R,), 2: (G, F, N), 3: (G,)} | change
  with pytest.raises(ValueError, match=message):
    moe_down_proj(*map(jnp.zeros, shapes.values()))


def test_on_hopper_kernels_compute_all_but_the_hidden_units_of_the_forward_pass(monkeypatch):
  monkeypatch.setattr(implementations, "local_backend", lambda: "mosaic_gpu")
  r, f, n = 98304, 512, 1024
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((r, 2 * f), jnp.bfloat16), ((r,), jnp.float32), ((G, f, n), jnp.float32),
      ((r, n), jnp.bfloat16))]
  lowered = jax.jit(ours.__wrapped__).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  names = re.findall(r"00(\w+)_mosaic_gpu\\", lowered)
  kernels = [name for name in names if name != "stable"]  # from the name of the MLIR dialect
  assert sorted(kernels) == [
      "grouped_matmul", "grouped_matmul", "grouped_weight_gradient", "swiglu_gated_backward"]
