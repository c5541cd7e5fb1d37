"""Absorbed latent attention against float64: the oracle, and Hopper's kernels, interpreted and run.

Shape letters:  L layers  B batch  S slots  T query positions  H heads  C width of an entry
                V width of the values
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations, mla_decode
from pallas_kernels.mosaic_gpu import mla_decode as kernel
from pallas_kernels.mosaic_gpu.mla_schedule import TOKENS, schedule, shape_of

ON_HOPPER = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu",
    reason=f"needs {implementations.BACKENDS['mosaic_gpu']}")
BFLOAT16 = 2.0**-8  # largest relative error of rounding


class Case(NamedTuple):
  """Shapes, and the number of tokens of each row before the new ones."""

  positions: int
  heads: int
  width: int
  value_width: int
  slots: int
  lengths: tuple[int, ...]
  layers: int = 1


SMALL = {
    "one_slot": Case(1, 4, 48, 32, 130, (0, 129), layers=2),
    "few_heads": Case(2, 4, 160, 128, 200, (126, 62)),
    "odd_rows": Case(3, 5, 96, 64, 70, (0, 67, 69)),  # the last row has no slot for two tokens
    "five_positions": Case(5, 16, 48, 32, 100, (60, 95)),
    "many_rows": Case(9, 4, 160, 128, 300, (255, 100)),
    "many_rows_odd_blocks": Case(5, 8, 320, 256, 200, (150, 0), layers=2),
    "two_tiles": Case(2, 40, 160, 128, 130, (64, 127))}
LARGE = {
    "v3_16_heads": Case(1, 16, 576, 512, 300, (0, 63, 299), layers=2),
    "v3_one_long_row": Case(1, 16, 576, 512, 4096, (4000, 77)),
    "v3_two_positions": Case(2, 16, 576, 512, 517, (515, 63, 64, 62, 1)),
    "v3_four_positions": Case(4, 16, 576, 512, 1100, (0, 63, 640, 1050, 1096)),
    "v3_128_heads": Case(1, 128, 576, 512, 333, (1, 332, 127), layers=2),
    "v3_256_rows": Case(2, 128, 576, 512, 200, (0, 130)),
    "v3_many_rows_of_the_batch": Case(1, 16, 576, 512, 200, tuple(range(0, 199, 2)))}


def operands(case: Case, seed: int = 0):
  """Normal numbers; slots past those that any position sees hold NaN."""
  rng = np.random.default_rng(seed)
  batch = len(case.lengths)
  q_BTHC = rng.standard_normal((batch, case.positions, case.heads, case.width))
  cache = rng.standard_normal((case.layers, batch, case.slots, case.width))
  for row, length in enumerate(case.lengths):
    cache[:, row, length + case.positions:] = np.nan
  return (jnp.asarray(q_BTHC, jnp.bfloat16), jnp.asarray(cache, jnp.bfloat16),
          jnp.int32(case.layers - 1), jnp.asarray(case.lengths, jnp.int32))


def options(case: Case) -> dict:
  return {"value_width": case.value_width, "scale": 1.5 * case.width**-0.5}


def assert_attends(case: Case, result, args):
  """Asserts equality with float64, but for bfloat16 weights and one final rounding."""
  out_BTHV, lse_BTH = result
  assert out_BTHV.shape == (*args[0].shape[:3], case.value_width)
  assert lse_BTH.shape == args[0].shape[:3]
  assert out_BTHV.dtype == args[0].dtype and lse_BTH.dtype == jnp.float32
  q_BTHC, cache, layer, _ = (np.asarray(x, np.float64) for x in args)
  scale = options(case)["scale"]
  for row, length in enumerate(case.lengths):
    for position in range(case.positions):
      seen_SC = cache[int(layer), row, :length + position + 1]
      q_HC = q_BTHC[row, position]
      scores_HS = scale * q_HC @ seen_SC.T
      largest_H1 = scores_HS.max(1, keepdims=True)
      weights_HS = np.exp(scores_HS - largest_H1)
      lse_H = largest_H1[:, 0] + np.log(weights_HS.sum(1))
      weights_HS /= weights_HS.sum(1, keepdims=True)
      values_SV = seen_SC[:, :case.value_width]
      want_HV = weights_HS @ values_SV
      # Of float32 scores, summed in any order.
      error = case.width * 2.0**-24 * (scale * np.abs(q_HC) @ np.abs(seen_SC).T).max() + 2.0**-18
      bound = BFLOAT16 * np.abs(want_HV) + (BFLOAT16 + 2 * error) * 1.01 * (
          weights_HS @ np.abs(values_SV))
      ours = np.asarray(out_BTHV[row, position], np.float64)
      assert (np.abs(ours - want_HV) <= bound).all()
      assert (np.abs(np.asarray(lse_BTH[row, position]) - lse_H) <= error).all()


def interpreted(args, **how):
  result = kernel.run(*args, **how, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  return result


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_the_oracle_attends_to_visible_slots(case):
  args = operands(case)
  run = functools.partial(mla_decode, **options(case), implementation="xla")
  assert_attends(case, jax.jit(run)(*args), args)


def test_the_oracle_computes_in_the_queries_format():
  case = SMALL["few_heads"]
  q_BTHC, cache, layer, lengths_B = operands(case)
  run = functools.partial(mla_decode, **options(case), implementation="xla")
  out_BTHV, _ = run(q_BTHC.astype(jnp.float32), cache, layer, lengths_B)
  assert out_BTHV.dtype == jnp.float32
  narrow = cache.astype(jnp.float8_e4m3fn)
  for ours, want in zip(run(q_BTHC, narrow, layer, lengths_B),
                        run(q_BTHC, narrow.astype(jnp.bfloat16), layer, lengths_B), strict=True):
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize(("name", "programs"), [
    ("one_slot", 3), ("few_heads", 2), ("odd_rows", 1), ("five_positions", 4), ("many_rows", 1),
    ("many_rows", 5), ("many_rows_odd_blocks", 2), ("two_tiles", 4)])
def test_interpreted_kernels_attend_to_visible_slots_and_have_no_races(name, programs):
  case = SMALL[name]
  args = operands(case)
  assert_attends(case, interpreted(args, **options(case), programs=programs), args)


@pytest.mark.parametrize("many", [False, True])
def test_interpreted_kernels_of_both_kinds_attend_for_the_same_shape(many):
  case = Case(2, 4, 160, 128, 200, (126, 3))
  args = operands(case)
  assert_attends(case, interpreted(args, **options(case), many=many), args)


def test_a_later_largest_score_rescales_what_came_before():
  case = Case(1, 8, 160, 128, 260, (257,))
  q_BTHC, cache, layer, lengths_B = operands(case)
  cache = cache.at[0, 0, 200].set(20 * q_BTHC[0, 0, 3])  # one weight is nearly one, the others tiny
  args = q_BTHC, cache, layer, lengths_B
  for many in (False, True):
    assert_attends(case, interpreted(args, **options(case), many=many, programs=1), args)


@pytest.mark.parametrize("programs", [1, 3, 132])
def test_the_schedule_gives_every_block_to_one_thread_block(programs):
  lengths = np.random.default_rng(0).integers(0, 1000, 37).astype(np.int32)
  ends_B, plan, parts_B2 = map(np.asarray, schedule(jnp.asarray(lengths), 2, 900, programs))
  blocks_B = -(-np.minimum(lengths + 2, 900) // TOKENS)
  np.testing.assert_array_equal(ends_B, np.cumsum(blocks_B))
  row_of = np.repeat(np.arange(37), blocks_B)
  stops = [0]
  parts = [set() for _ in lengths]
  for program, (first, last, begin, stop) in enumerate(plan):
    if begin < ends_B[-1]:
      assert begin == stops[-1] and (first, last) == (row_of[begin], row_of[stop - 1])
      stops.append(stop)
      for row in range(first, last + 1):
        parts[row].add(program + row)
    else:
      assert last < first
  assert stops[-1] == ends_B[-1] and max(np.diff(stops)) <= -(-ends_B[-1] // programs)
  assert [sorted(part) for part in parts] == [list(range(a, b + 1)) for a, b in parts_B2]


@pytest.mark.parametrize(("positions", "heads", "width", "value_width", "slots"), [
    (1, 16, 576, 512, 4096), (2, 16, 576, 512, 4097), (4, 16, 576, 512, 65536),
    (1, 128, 576, 512, 4096), (8, 128, 576, 512, 4097), (1, 4, 48, 32, 1), (1, 4, 96, 64, 300),
    (8, 8, 160, 128, 1024), (4, 8, 320, 256, 1025)])
def test_production_shapes_lower_for_hopper(positions, heads, width, value_width, slots):
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((32, positions, heads, width), jnp.bfloat16), ((1, 32, slots, width), jnp.bfloat16),
      ((), jnp.int32), ((32,), jnp.int32))]
  assert kernel.unsupported_reason(*shapes, value_width=value_width, scale=1.0) is None
  run = functools.partial(kernel.run, value_width=value_width, scale=1.0)
  text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert "mla_decode_mosaic_gpu" in text and "mla_decode_combine_mosaic_gpu" in text


def test_many_query_rows_take_the_kernel_that_multiplies_faster():
  shapes = lambda heads: (jnp.zeros((1, 1, heads, 576)), jnp.zeros((1, 1, 64, 576)))
  assert not shape_of(*shapes(32), 512).many
  assert shape_of(*shapes(40), 512).many and shape_of(*shapes(128), 512).tiles == 2


@pytest.mark.parametrize(("width", "dtypes", "batch", "reason"), [
    (576, "float32 bfloat16", 2, "needs bfloat16, not queries in float32"),
    (576, "bfloat16 float8_e4m3fn", 2, "needs bfloat16, not .* a cache in float8_e4m3fn"),
    (40, "bfloat16 bfloat16", 2, "a multiple of 16, and it is 40"),
    (576, "bfloat16 bfloat16", 0, "needs queries and a cache, and their shapes are"),
    (2048, "bfloat16 bfloat16", 2, "too little shared memory for entries 2048 wide")])
def test_unsupported_operands_are_refused_with_the_reason(width, dtypes, batch, reason):
  q_dtype, cache_dtype = dtypes.split()
  refused = kernel.unsupported_reason(
      jnp.zeros((batch, 1, 64, width), q_dtype), jnp.zeros((1, batch, 64, width), cache_dtype),
      jnp.int32(0), jnp.zeros(batch, jnp.int32), value_width=32, scale=1.0)
  assert re.search(reason, refused)


@pytest.mark.parametrize(("shapes", "more", "message"), [
    (((2, 1, 4, 48), (1, 2, 8, 32), (2,)), {}, r"queries \[B, T, H, C\]"),
    (((2, 1, 4, 48), (1, 3, 8, 48), (2,)), {}, r"queries \[B, T, H, C\]"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (3,)), {}, r"lengths \[B\]"),
    (((2, 0, 4, 48), (1, 2, 8, 48), (2,)), {}, r"queries \[B, T, H, C\]"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (2,)), {"layer": 1}, "layer=1 should be a scalar, at least 0"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (2,)), {"layer": jnp.zeros(1, int)}, "should be a scalar"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (2,)), {"lengths_B": jnp.zeros(2)}, "lengths of integers"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (2,)), {"value_width": 49}, "value_width=49 must be"),
    (((2, 1, 4, 48), (1, 2, 8, 48), (2,)), {"scales": jnp.ones(2)}, "does not support scales")])
def test_mismatched_operands_are_refused(shapes, more, message):
  q_BTHC, cache, lengths_B = map(jnp.zeros, shapes)
  how = {"layer": 0, "lengths_B": lengths_B.astype(jnp.int32), "value_width": 32, "scale": 1.0}
  with pytest.raises(ValueError, match=message):
    mla_decode(q_BTHC, cache, **how | more)


@ON_HOPPER
@pytest.mark.parametrize("case", (SMALL | LARGE).values(), ids=SMALL | LARGE)
def test_on_a_gpu_the_kernels_attend_to_visible_slots(case):
  args = operands(case)
  run = functools.partial(mla_decode, **options(case), implementation="mosaic_gpu")
  assert_attends(case, jax.jit(run)(*args), args)


@ON_HOPPER
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("programs", [1, 7, 64])
def test_on_a_gpu_results_do_not_depend_on_how_the_work_is_divided(programs, many):
  case = Case(2, 16, 576, 512, 1000, (998, 500, 3))
  args = operands(case)
  run = functools.partial(kernel.run, **options(case), programs=programs, many=many)
  assert_attends(case, jax.jit(run)(*args), args)


@ON_HOPPER
@pytest.mark.parametrize("heads", [16, 128])
def test_on_a_gpu_repeated_runs_give_the_same_bits(heads):
  args = operands(Case(1, heads, 576, 512, 2048, tuple(range(60, 2048, 31))))
  run = jax.jit(functools.partial(kernel.run, value_width=512, scale=0.06))
  first = run(*args)
  for _ in range(20):
    for ours, want in zip(run(*args), first, strict=True):
      np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(want, np.float32))


@ON_HOPPER
def test_on_a_gpu_the_kernel_is_the_default_implementation():
  case = LARGE["v3_16_heads"]
  run = jax.jit(functools.partial(mla_decode, **options(case)))
  assert "mla_decode_mosaic_gpu" in run.lower(*operands(case)).as_text()
