"""Cached, uncached, expanded and absorbed attention compute the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model

TOLERANCE = 1e-4  # fp32, relative to the largest logit


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * float(jnp.abs(b).max()))


FORMS = [(name, form) for name, cfg in tiny.ALL.items()
         for form in (("expanded", "absorbed") if isinstance(cfg.attention, model.MLAConfig)
                      else (None,))]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_prefill_and_decode_equal_the_uncached_model(name, form):
  cfg = dataclasses.replace(tiny.ALL[name], mtp=None)
  v, tokens_BT = tiny.variables(cfg), tiny.tokens(cfg)
  whole = tiny.apply(cfg)(v, tokens_BT).logits_BTV
  run, cache, rows = tiny.apply(cfg, mla_form=form), model.init_cache(cfg, 2, 16), []
  for part in (tokens_BT[:, :6], *jnp.split(tokens_BT[:, 6:], 6, axis=1)):
    out = run(v, part, cache=cache)
    cache = out.cache
    rows.append(out.logits_BTV)
  close(jnp.concatenate(rows, axis=1), whole)
  np.testing.assert_array_equal(cache.lengths_B, [12, 12])


def test_unrolled_layers_fill_the_cache_and_use_given_experts_as_scanned_ones_do():
  cfg = dataclasses.replace(tiny.V3, mtp=None)
  v, tokens_BT = tiny.variables(cfg), tiny.tokens(cfg)
  other = tiny.apply(cfg)(v, tokens_BT[:, ::-1])  # for experts that these tokens would not choose
  looped, unrolled = (tiny.apply(cfg, unroll=unroll)(
      v, tokens_BT, cache=model.init_cache(cfg, 2, 16),
      experts_LBTK=other.router["moe_layers"].experts_BTK) for unroll in (1, 3))
  for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(looped), strict=True):
    close(a, b)


@pytest.mark.parametrize("name", ["plain mla", "mqa"])
def test_expanded_and_absorbed_forms_agree_without_a_cache(name):
  cfg = tiny.ALL[name]
  v, tokens_BT = tiny.variables(cfg), tiny.tokens(cfg)
  close(tiny.apply(cfg, mla_form="absorbed")(v, tokens_BT).logits_BTV,
        tiny.apply(cfg, mla_form="expanded")(v, tokens_BT).logits_BTV)


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_rows_advance_independently_and_roll_back(name):
  cfg = dataclasses.replace(tiny.ALL[name], mtp=None)
  v, tokens_BT = tiny.variables(cfg), tiny.tokens(cfg)
  whole = tiny.apply(cfg)(v, tokens_BT).logits_BTV
  run = tiny.apply(cfg)
  # Row 0 keeps four of its nine tokens and row 1 seven; the others are rejected drafts.
  wrong = tokens_BT.at[0, 4:].set(1).at[1, 7:].set(2)
  cache = run(v, wrong[:, :9], cache=model.init_cache(cfg, 2, 12)).cache
  cache = cache.with_lengths(jnp.array([4, 7]))
  step = jnp.stack([tokens_BT[0, 4:7], tokens_BT[1, 7:10]])
  out = run(v, step, cache=cache)
  close(out.logits_BTV, jnp.stack([whole[0, 4:7], whole[1, 7:10]]))
  np.testing.assert_array_equal(out.cache.lengths_B, [7, 10])


def test_mla_caches_only_the_latent():
  cfg = model.get_config("deepseek_v3")
  cache = jax.eval_shape(lambda: model.init_cache(cfg, 1, 4096))
  assert {name: entry.shape for name, entry in cache.entries.items()} == {
      "latent": (61, 1, 4096, 576)}
  size = sum(entry.size * entry.dtype.itemsize for entry in cache.entries.values())
  assert size / 4096 == 70_272  # bytes per token in bfloat16: arXiv:2505.09343, table 1


@pytest.mark.cpu
def test_the_cache_is_updated_in_place():
  cfg = model.get_config("nano")
  variables = model.abstract_variables(cfg)
  cache = jax.eval_shape(lambda: model.init_cache(cfg, 4, 4096))
  step = jax.jit(lambda v, t, c: model.Transformer(cfg).apply(v, t, cache=c), donate_argnums=2)
  compiled = step.lower(variables, jax.ShapeDtypeStruct((4, 1), jnp.int32), cache).compile()
  size = cache.entries["latent"].size * 4
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= size
  # Temporaries are one layer's slice, its scores and its mixtures, but never a second cache.
  assert memory.temp_size_in_bytes < 1.5 * size


def test_tokens_past_the_end_leave_the_cache_unchanged():
  cfg = tiny.GQA
  v = tiny.variables(cfg)
  cache = tiny.apply(cfg)(v, tiny.tokens(cfg, length=4), cache=model.init_cache(cfg, 2, 4)).cache
  after = tiny.apply(cfg)(v, tiny.tokens(cfg, length=1), cache=cache).cache
  jax.tree.map(np.testing.assert_array_equal, after.entries, cache.entries)


@pytest.mark.parametrize("cfg", [tiny.PLAIN_MLA, tiny.GQA])
def test_an_8_bit_cache_rounds_to_four_bits_and_saturates(cfg):
  net, v = model.Transformer(cfg), tiny.variables(cfg)
  tokens = tiny.tokens(cfg, 2, 7)
  caches = {}
  for dtype in (None, "float8_e4m3fn"):
    empty = model.init_cache(cfg, 2, 8, dtype)
    caches[dtype] = net.apply(v, tokens, cache=empty).cache
  for name, exact in caches[None].entries.items():
    kept = caches["float8_e4m3fn"].entries[name]
    assert kept.dtype == jnp.float8_e4m3fn
    first = np.asarray(kept[0, :, :7], np.float32)  # what the first layer writes reads no cache
    np.testing.assert_allclose(first, exact[0, :, :7], rtol=2.0**-4, atol=2.0**-10)
  cache = model.init_cache(cfg, 1, 2, "float8_e4m3fn")
  name, entries = next(iter(cache.entries.items()))
  new = jnp.full((1, 1, *entries.shape[3:]), jnp.array(1e6)).at[..., 0].set(-jnp.inf)
  written = np.asarray(cache.append(0, **{name: new}).layer(name, 0)[0, 0], np.float32)
  assert written.max() == 448 and written.min() == -448


def test_texts_with_an_8_bit_cache_are_plausible_and_other_formats_are_refused():
  cfg = tiny.PLAIN_MLA
  net, v, tokens = model.Transformer(cfg), tiny.variables(cfg), tiny.tokens(cfg, 2, 7)
  ask = lambda dtype: model.generate(net, v, tokens, np.array([7, 5]), max_new_tokens=6,
                                     temperature=0, cache_dtype=dtype)
  exact, rounded = ask(None), ask("float8_e4m3fn")
  np.testing.assert_array_equal(exact.tokens_BN, ask(jnp.float32).tokens_BN)
  same = exact.tokens_BN == rounded.tokens_BN
  gap = np.abs(exact.logprobs_BN - rounded.logprobs_BN)[np.asarray(same)]
  assert 0 < gap.max() < 0.1
  with pytest.raises(ValueError, match="cache_dtype='int8' should be one of float32"):
    ask("int8")
