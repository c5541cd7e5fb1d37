"""cuDNN's and XLA's attention: which is chosen, its operands, and what remat recomputes.

Without a GPU, programs are lowered for one but not run: tests replace this process's first device.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import model
from model.attention import Context, attend
from train.losses import Batch, LanguageModelLoss

HOPPER = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0",
    client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000"))
BF16 = {name: dataclasses.replace(cfg, numerics=model.NUMERICS["bf16"])
        for name, cfg in tiny.ALL.items()}
CALL, CALL_BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


@pytest.fixture
def hopper(monkeypatch):
  """Makes tracing and lowering believe that the first device is an H200 with cuDNN."""
  if jax.devices()[0].platform == "gpu":
    return
  monkeypatch.setattr(jax, "devices", lambda *_: [HOPPER])
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)


def context(length: int, **fields) -> Context:
  none_BTr = jnp.zeros((1, length, 0))
  return Context(none_BTr, none_BTr, jnp.arange(length)[None], causal=True, **fields)


def heads(key: int, length: int, count: int, width: int, dtype=jnp.bfloat16) -> jax.Array:
  draw = np.random.default_rng(key).standard_normal((2, length, count, width))
  return jnp.asarray(draw, dtype)


def lowered(cfg: model.ModelConfig, **fields) -> str:
  """Returns the gradient of the training loss, lowered for an NVIDIA GPU, as text."""
  variables = model.abstract_variables(cfg)
  loss = LanguageModelLoss(model.Transformer(cfg, **fields))
  batch = Batch(jax.ShapeDtypeStruct((2, 17), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.bool_))
  grad = jax.jit(jax.grad(lambda params, batch: loss.sums(
      {**variables_of(variables), "params": params}, batch)[0]["lm"]))
  return grad.trace(variables["params"], batch).lower(lowering_platforms=("cuda",)).as_text()


def variables_of(shapes):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_training_on_a_gpu_calls_cudnn_once_per_direction_in_every_loop_over_layers(hopper, name):
  cfg = dataclasses.replace(BF16[name], mtp=None)
  loops = len(cfg.layer_stacks())
  for remat in ("none", "v3"):  # neither recomputes attention
    text = lowered(cfg, remat=remat)
    assert (text.count(CALL), text.count(CALL_BACKWARD)) == (loops, loops), remat
  text = lowered(cfg, remat="full")
  assert (text.count(CALL), text.count(CALL_BACKWARD)) == (2 * loops, loops)
  assert "__cudnn" not in lowered(cfg, attend="xla")


def lowered_attention(keys: int, values: int) -> str:
  """Returns attention for heads of these widths, lowered for CUDA; results have values' width."""
  shapes = [heads(0, 16, 2, width) for width in (keys, keys, values)]
  run = lambda q, k, v: attend(q, k, v, context(16), 1.0, BF16["v3"])
  traced = jax.jit(run).trace(*shapes)
  assert traced.out_info.shape == (2, 16, 2, values)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_gets_heads_padded_to_one_width_that_is_a_multiple_of_8(hopper):
  assert "tensor<2x16x2x24xbf16>" in lowered_attention(12, 18)


def test_cudnn_gets_v3s_heads_without_padding_if_its_version_supports_them(hopper, monkeypatch):
  assert "stablehlo.pad" not in lowered_attention(192, 128)
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90900)
  assert "stablehlo.pad" in lowered_attention(192, 128)


@pytest.mark.parametrize(("change", "message"), [
    ({"cfg": tiny.V3}, "compute in bfloat16 or float16"),
    ({"context": context(16).replace(causal=False)}, "neither cache nor segments"),
    ({"context": context(16, segment_ids_BT=jnp.ones((2, 16), jnp.int32))}, "neither cache nor"),
    ({"k": 264}, "up to 256 wide on NVIDIA H200, and these are 264 wide"),
    ({"v": 264}, "up to 256 wide"),
])
def test_what_cudnn_does_not_support_is_refused_if_requested_and_else_computed_by_xla(
    hopper, change, message):
  q, v = (heads(0, 16, 2, change.get(name, 16)) for name in "kv")
  run = lambda implementation: jax.eval_shape(lambda: attend(
      q, q, v, change.get("context", context(16)), 1.0, change.get("cfg", BF16["v3"]),
      implementation))
  with pytest.raises(ValueError, match=message):
    run("cudnn")
  assert run(None).shape == v.shape


def test_without_a_gpu_cudnn_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices(backend="cpu"))
  q = heads(0, 16, 2, 16)
  with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this is cpu"):
    attend(q, q, q, context(16), 1.0, BF16["v3"], "cudnn")
  with pytest.raises(ValueError, match="no implementation 'flash'; there are: xla, blockwise"):
    attend(q, q, q, context(16), 1.0, BF16["v3"], "flash")


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_attention_is_marked_causal_unless_there_is_a_cache(name):
  seen = []
  cfg = tiny.ALL[name]
  net = model.Transformer(cfg)
  for cache in (None, model.init_cache(cfg, 2, 8)):
    bound = net.bind(tiny.variables(cfg))
    seen.append(bound._context(tiny.tokens(cfg, length=4), None, None, cache, None).causal)
  assert seen == [True, False]


@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize(("queries", "keys", "width", "values"), [
    (4, 4, 192, 128), (4, 4, 64, 96), (8, 2, 128, 128), (3, 1, 20, 12)])
def test_cudnn_in_bfloat16_agrees_with_xla_in_float32(queries, keys, width, values):
  inputs = (heads(0, 200, queries, width), heads(1, 200, keys, width), heads(2, 200, keys, values))
  dy = heads(3, 200, queries, values)

  def result_and_gradients(cfg, implementation, dtype):
    run = lambda *inputs: attend(*inputs, context(200), width**-0.5, cfg, implementation)
    out, vjp = jax.vjp(jax.jit(run), *(x.astype(dtype) for x in inputs))
    return [np.asarray(x, np.float32) for x in (out, *vjp(dy.astype(out.dtype)))]

  ours = result_and_gradients(BF16["v3"], "cudnn", jnp.bfloat16)
  exact = result_and_gradients(tiny.V3, "xla", jnp.float32)
  for a, b in zip(ours, exact, strict=True):
    # The attention weights, their gradient and the result are each rounded to bfloat16, which
    # errs by 2^-9 of their magnitude.
    assert np.linalg.norm(a - b) < 4 * 2**-9 * np.linalg.norm(b)
