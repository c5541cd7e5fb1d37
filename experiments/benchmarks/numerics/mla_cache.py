"""Measure MLA's cache: its bytes, and that the absorbed form needs keys without rotated content.

DeepSeek-V2 (arXiv:2405.04434, section 2.1 and table 1) caches a latent and one rotated key per
token and layer. Decoding can then move W^UK into the queries (the absorbed form), because content
keys are not rotated: with a rotation between W^UK and the queries, which depends on the position of
the key, they could not be. Both are measured in float32 on random weights: logits of a prompt that
is read, and of tokens that are written one by one, in the expanded and the absorbed form and
without a cache; and one layer's attention with content that is rotated, in both forms.

Shape letters:  B sequences  T tokens  S key slots  H heads  C latent width  K content width
                R rotated width  V value width
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import model
from experiments import settings
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, target
from model.attention import Context, attend
from model.checks import require, require_positive
from model.mla import attend_absorbed, attend_expanded, softmax_scale
from model.rope import rotate, rotation

_V3, _BYTES_OF_V3 = "deepseek_v3", 70_272  # arXiv:2505.09343, table 1
_QUANTITIES = {
    "absorbed": "absorbed against expanded, cached",
    "expanded": "expanded, cached against whole sequences",
    "decoupled": "one layer, content not rotated: absorbed against expanded",
    "rotated": "one layer, content rotated: absorbed against expanded"}


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """The network, and what it reads and writes.

  Attributes:
    model: the architecture, with MLA; weights are random, and products in float32.
    batch: B, sequences.
    read: tokens of the prompt.
    written: tokens that are decoded one by one.
    seeds: number of draws of weights and tokens.
    architectures: names of those whose caches are counted.
  """

  model: model.ModelConfig
  batch: int = 2
  read: int = 48
  written: int = 16
  seeds: int = 3
  architectures: tuple[str, ...] = (
      _V3, "deepseek_v2", "deepseek_v2_lite", "small", "llama3_8b", "qwen3_8b")

  def __post_init__(self):
    require_positive(self, "batch", "read", "written", "seeds")
    require(isinstance(self.model.attention, model.MLAConfig), "model.attention must be MLA")
    for name in self.architectures:
      model.get_config(name)


def _of(name: str, **fields: Any) -> CacheConfig:
  return CacheConfig(dataclasses.replace(
      model.get_config(name), numerics=model.NUMERICS["fp32"], mtp=None), **fields)


SCALES = {"smoke": _of("nano", read=6, written=3, seeds=2), "cpu": _of("small"),
          "gpu": _of("small", read=512, written=64)}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings,
                       named={"model": model.get_config})
  sizes = {name: cache_bytes(model.get_config(name)) for name in cfg.architectures}
  differences = {name: [] for name in _QUANTITIES}
  for seed in range(cfg.seeds):
    for name, value in (compare_logits(cfg, seed) | compare_attention(cfg, seed)).items():
      differences[name].append(value)
  for name, values in differences.items():
    print(f"{_QUANTITIES[name]}: largest relative difference {max(values):.2g}", flush=True)
  for name, (size, uncompressed) in sizes.items():
    print(f"{name}: {size:,} bytes per token, {uncompressed / size:.1f} times fewer than keys and "
          "values of all heads")
  if options.out:
    results.record(options.out, {
        "bytes": sizes, "differences": differences, "parameters": cfg.model.param_count(),
        "tokens": [cfg.read, cfg.written], "numerics": "float32"}, summary)


def cache_bytes(cfg: model.ModelConfig) -> tuple[int, int]:
  """Returns the bytes of a token in the cache of all layers, in bfloat16.

  Those of the arrays that `init_cache` makes, and those of keys and values of all query heads.
  """
  cache = jax.eval_shape(lambda: model.init_cache(cfg, 1, 1, "bfloat16"))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.entries))
  a = cfg.attention
  return size, 2 * cfg.num_layers * a.num_heads * (a.score_dim + a.value_dim)


def compare_logits(cfg: CacheConfig, seed: int) -> dict[str, float]:
  """Returns the largest differences of logits between the forms, relative to the largest logit."""
  variables = model.init(cfg.model, jax.random.key(seed))
  length = cfg.read + cfg.written
  tokens_BT = jax.random.randint(
      jax.random.key(seed + 1), (cfg.batch, length), 0, cfg.model.vocab_size)
  whole = _network(cfg.model, None)(variables, tokens_BT).logits_BTV
  cached = {}
  for form in ("expanded", "absorbed"):
    step = _network(cfg.model, form)
    output = step(variables, tokens_BT[:, :cfg.read],
                  cache=model.init_cache(cfg.model, cfg.batch, length))
    parts = [output.logits_BTV]
    for t in range(cfg.read, length):
      output = step(variables, tokens_BT[:, t:t + 1], cache=output.cache)
      parts.append(output.logits_BTV)
    cached[form] = jnp.concatenate(parts, axis=1)
  return {"absorbed": _relative(cached["absorbed"], cached["expanded"]),
          "expanded": _relative(cached["expanded"], whole)}


@functools.cache
def _network(cfg: model.ModelConfig, form: str | None):
  return jax.jit(model.Transformer(cfg, mla_form=form).apply)


def _relative(ours: jax.Array, exact: jax.Array) -> float:
  return float(jnp.abs(ours - exact).max() / jnp.abs(exact).max())


def compare_attention(cfg: CacheConfig, seed: int) -> dict[str, float]:
  """Returns the differences of one layer's attention, with content that is rotated or is not.

  Expanded, rotated content keys are W^UK c, rotated by the key's position. The absorbed form has
  nothing but latents, which it can multiply with rotated queries only.
  """
  a = cfg.model.attention
  length = cfg.read + cfg.written
  draw = lambda index, *shape: jax.random.normal(
      jax.random.fold_in(jax.random.key(seed), index), shape)
  q_BTHK = draw(0, cfg.batch, length, a.num_heads, a.qk_nope_head_dim)
  q_BTHR = draw(1, cfg.batch, length, a.num_heads, a.qk_rope_head_dim)
  latent_BSC = draw(2, cfg.batch, length, a.kv_lora_rank)
  k_BSR = draw(3, cfg.batch, length, a.qk_rope_head_dim)
  up = lambda index, width: (
      draw(index, a.kv_lora_rank, a.num_heads, width) * a.kv_lora_rank**-0.5)
  w_uk_CHK, w_uv_CHV = up(4, a.qk_nope_head_dim), up(5, a.v_head_dim)
  slots_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (cfg.batch, length))
  cos, sin = rotation(cfg.model.rope, a.qk_nope_head_dim, slots_BT)
  rotated = lambda x: rotate(x, cos, sin, cfg.model.rope.layout)
  context = Context(cos, sin, slots_BT, causal=True)

  def by_heads(q_BTHK):
    keys = rotated(jnp.einsum("bsc,chk->bshk", latent_BSC, w_uk_CHK, precision="highest"))
    shared = jnp.broadcast_to(k_BSR[:, :, None], (*keys.shape[:3], k_BSR.shape[-1]))
    values = jnp.einsum("bsc,chv->bshv", latent_BSC, w_uv_CHV, precision="highest")
    join = lambda *parts: jnp.concatenate(parts, axis=-1)
    return attend(join(q_BTHK, q_BTHR), join(keys, shared), values, context,
                  softmax_scale(cfg.model), cfg.model, "xla")

  def form(compute, q_BTHK):
    return compute(q_BTHK, q_BTHR, latent_BSC, k_BSR, w_uk_CHK, w_uv_CHV, context, cfg.model, "xla")

  return {"decoupled": _relative(form(attend_absorbed, q_BTHK), form(attend_expanded, q_BTHK)),
          "rotated": _relative(form(attend_absorbed, rotated(q_BTHK)), by_heads(rotated(q_BTHK)))}


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  found, read, claims = result["differences"], *result["tokens"][:1], []
  if _V3 in result["bytes"]:
    size = result["bytes"][_V3][0]
    claims.append(target("V3: bytes of a token in the cache, against the paper's 70,272", "ratio",
                         (size / _BYTES_OF_V3,), at_most=1.0, n="the arrays' sizes"))
  basis = f"{len(found['absorbed'])} draws of weights"
  for name, quantity in _QUANTITIES.items():
    bound = {"at_least": 1e-2} if name == "rotated" else {"at_most": 1e-4}
    worst = min(found[name]) if name == "rotated" else max(found[name])
    claims.append(target(quantity, "largest relative difference", (worst,), n=basis, **bound))
  return bench_summary(
      "mla_cache", f"{backend(result)}-{result['numerics']}",
      f"Caches of MLA, and the forms that read them: {result['parameters']:,} parameters, random "
      f"weights, {read} tokens read and {result['tokens'][1]} written one by one, float32.", result,
      claims=claims, tables=[{
          "name": "bytes", "caption": "Bytes of a token in the cache, bfloat16",
          "header": ["architecture", "bytes", "keys and values of all heads", "times fewer"],
          "rows": [[name, size, every, every / size]
                   for name, (size, every) in result["bytes"].items()]}])
