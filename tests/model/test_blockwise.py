"""Attention by blocks equals the exact form, and its memory grows with the length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model import attention
from model.attention import Context, attend
from model.blockwise import Visibility, blockwise_attention
from pallas_kernels import targets

FP32 = tiny.V3
BF16 = dataclasses.replace(FP32, numerics=model.NUMERICS["bf16"])
SCALE = 0.2


def operands(seed, batch, queries, keys, heads, groups, width, values):
  draw = np.random.default_rng(seed).standard_normal
  return tuple(jnp.asarray(draw((batch, *shape)), jnp.float32) for shape in (
      (queries, heads, width), (keys, groups, width), (keys, groups, values)))


def segments(seed, batch, length, kind):
  rng = np.random.default_rng(seed)
  if kind == "none":
    return None
  if kind == "interleaved":
    return jnp.asarray(rng.integers(1, 4, (batch, length)), jnp.int32)
  rows = np.sort(rng.integers(1, 6, (batch, length)), axis=1)
  rows[0, -length // 4:] = 0  # padding
  return jnp.asarray(rows, jnp.int32)


def context(length, segment_ids=None, slots=None):
  slots = jnp.arange(length, dtype=jnp.int32)[None] if slots is None else slots
  return Context(None, None, slots, segment_ids, causal=segment_ids is None)


def of_float64(q, k, v, slots_BT, segments_BT):
  """Computes attention in float64, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  shared = q.shape[2] // k.shape[2]
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = np.arange(k.shape[1]) <= slots_BT[b, t]
    if segments_BT is not None:
      seen &= segments_BT[b] == segments_BT[b, t]
    scores = SCALE * k[b, seen, h // shared] @ q[b, t, h]
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights / weights.sum() @ v[b, seen, h // shared]
  return out


@pytest.mark.parametrize("kind", ["none", "packed", "interleaved"])
@pytest.mark.parametrize(("length", "heads", "groups", "width", "values", "block"), [
    (1, 2, 2, 8, 8, 16), (37, 4, 2, 12, 7, 8), (48, 3, 1, 5, 16, 16), (33, 2, 2, 8, 8, 64)])
def test_it_agrees_with_float64(kind, length, heads, groups, width, values, block):
  q, k, v = operands(length, 2, length, length, heads, groups, width, values)
  slots_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
  ids = segments(1, 2, length, kind)
  ours = blockwise_attention(
      q.reshape(2, length, groups, heads // groups, width), k, v,
      Visibility(jnp.asarray(slots_BT), ids, ids), scale=SCALE, numerics=FP32.numerics, block=block)
  want = of_float64(q, k, v, slots_BT, None if ids is None else np.asarray(ids))
  np.testing.assert_allclose(ours.reshape(want.shape), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "packed", "interleaved"])
def test_gradients_are_those_of_the_exact_form(kind):
  inputs = operands(0, 2, 150, 150, 4, 2, 12, 8)
  dy = operands(5, 2, 150, 150, 4, 2, 8, 8)[0]
  where = context(150, segments(2, 2, 150, kind))

  def gradients(implementation):
    run = lambda *x: attend(*x, where, SCALE, FP32, implementation)
    out, vjp = jax.vjp(jax.jit(run), *inputs)
    return out, *vjp(dy)

  for ours, exact in zip(gradients("blockwise"), gradients("xla"), strict=True):
    np.testing.assert_allclose(ours, exact, atol=1e-5 * float(jnp.abs(exact).max()))


def test_in_bfloat16_it_errs_as_the_exact_form_does():
  inputs = operands(0, 2, 200, 200, 4, 4, 32, 32)
  exact = np.asarray(attend(*inputs, context(200), SCALE, FP32, "xla"))
  error = lambda name: np.linalg.norm(np.asarray(attend(
      *(x.astype(jnp.bfloat16) for x in inputs), context(200), SCALE, BF16, name),
      np.float32) - exact)
  assert error("blockwise") < 1.1 * error("xla") < 2**-6 * np.linalg.norm(exact)


def test_a_cache_is_read_up_to_each_rows_length_and_what_lies_behind_is_not():
  q, k, v = operands(0, 2, 6, 300, 4, 1, 8, 8)
  slots_BT = jnp.asarray([[3, 4, 5, 6, 7, 8], [120, 121, 122, 123, 124, 125]], jnp.int32)
  where = context(6, slots=slots_BT)
  want = of_float64(q, k, v, slots_BT, None)
  # Blocks have 128 keys, so that those from slot 128 on are not visited.
  garbage = lambda x: x.at[:, 128:].set(jnp.nan)
  ours = attend(q, garbage(k), garbage(v), where, SCALE, FP32, "blockwise")
  np.testing.assert_allclose(ours, want, atol=1e-5)


def test_queries_past_the_last_slot_see_all_slots_once():
  q, k, v = operands(0, 2, 5, 200, 4, 1, 8, 8)
  slots_BT = jnp.asarray([[0], [197]], jnp.int32) + jnp.arange(5)
  want, ours = (attend(q, k, v, context(5, slots=slots_BT), SCALE, FP32, name)
                for name in ("xla", "blockwise"))
  np.testing.assert_allclose(ours, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "packed"])
def test_it_runs_on_each_device_of_a_mesh_on_its_own_rows(kind):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("data")
  inputs, ids = operands(0, 2, 150, 150, 2, 2, 8, 8), segments(3, 2, 150, kind)
  where = () if ids is None else (ids,)
  loss = lambda q, k, v, *ids: (attend(
      q, k, v, context(150, *ids), SCALE, FP32, "blockwise") ** 2).sum(1)
  shared = jax.shard_map(loss, mesh=mesh, in_specs=(spec,) * (3 + len(where)), out_specs=spec)
  grads = [jax.jit(jax.grad(lambda *x, run=run: run(*x).sum(), argnums=(0, 1, 2)))(*inputs, *where)
           for run in (loss, shared)]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *grads)


def test_several_seeds_at_a_time_give_what_each_gives():
  each = [operands(seed, 2, 70, 70, 2, 2, 8, 8) for seed in range(3)]
  ids = jnp.stack([segments(seed, 2, 70, "packed") for seed in range(3)])
  grad = jax.grad(lambda q, k, v, ids: (attend(
      q, k, v, context(70, ids), SCALE, FP32, "blockwise") ** 2).sum(), argnums=(0, 1, 2))
  together = jax.jit(jax.vmap(grad))(*map(jnp.stack, zip(*each, strict=True)), ids)
  for i, inputs in enumerate(each):
    for ours, alone in zip(together, grad(*inputs, ids[i]), strict=True):
      np.testing.assert_allclose(ours[i], alone, atol=1e-5)


def temporary_bytes(length, implementation):
  shapes = [jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32)] * 3
  loss = lambda q, k, v: attend(
      q, k, v, context(length), SCALE, FP32, implementation).sum()
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
  short, long = (temporary_bytes(length, "blockwise") for length in (2048, 8192))
  assert long < 4.5 * short
  weights = 4 * 8 * 8192**2
  assert long < weights / 50 < weights < temporary_bytes(8192, "xla")


def test_the_backward_pass_of_remat_reads_what_the_policy_saved():
  """Without the saved logarithms, the backward pass would have to run the forward pass again."""
  net = functools.partial(model.Transformer, dataclasses.replace(FP32, num_layers=2, mtp=None),
                          attend="blockwise")
  tokens = tiny.tokens(FP32, length=8)

  def exponentials(remat):
    variables = tiny.variables(net().cfg)
    loss = lambda params: net(remat=remat).apply(
        variables | {"params": params}, tokens).logits_BTV.sum()
    return str(jax.make_jaxpr(jax.grad(loss))(variables["params"])).count("= exp ")

  assert exponentials("v3") == exponentials("none") < exponentials("full")


def test_blocks_are_chosen_for_many_pairs(monkeypatch):
  chosen = []
  monkeypatch.setattr(attention, "_blockwise", lambda q, k, v, *_: chosen.append("blockwise") or v)
  monkeypatch.setattr(attention, "_xla", lambda q, k, v, *_: chosen.append("xla") or v)

  def choose(batch, queries, keys, heads):
    shape = lambda length: jax.ShapeDtypeStruct((batch, length, heads, 8), jnp.float32)
    jax.eval_shape(lambda q, k: attend(q, k, k, context(queries), SCALE, FP32),
                   shape(queries), shape(keys))
    return chosen[-1]

  assert choose(8, 256, 256, 4) == "xla" and choose(1, 512, 512, 1) == "blockwise"
  assert choose(64, 1, 4096, 8) == "xla"  # decoding
  with targets.compiled_for(targets.Target("tpu", "TPU v5p")):
    assert choose(1, 512, 512, 1) == "xla" and choose(1, 4096, 4096, 128) == "blockwise"
