"""Configs count the parameters, cache and FLOPs of their model, and refuse impossible values."""

import dataclasses
import json
import math

import jax
import pytest

import model

MLA = model.MLAConfig(num_heads=3, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4,
                      v_head_dim=5)
MOE = model.MoEConfig(num_experts=6, experts_per_token=2, expert_dim=9, num_groups=3,
                      groups_per_token=2)
BASE = model.ModelConfig(vocab_size=11, d_model=12, num_layers=3, ffn_dim=13, attention=MLA)
ODD_CONFIGS = {
    "dense latent": BASE,
    "no latent norm": dataclasses.replace(
        BASE, attention=dataclasses.replace(MLA, latent_norm=False, q_lora_rank=8)),
    "all experts, tied": dataclasses.replace(BASE, moe=MOE, tie_embeddings=True),
    "no shared expert": dataclasses.replace(
        BASE, moe=dataclasses.replace(MOE, num_shared_experts=0), num_dense_layers=3),
    "two MTP modules": dataclasses.replace(
        BASE, moe=MOE, num_dense_layers=2, mtp=model.MTPConfig(depth=2)),
    "dense MTP": dataclasses.replace(BASE, mtp=model.MTPConfig()),
    "biased MQA": dataclasses.replace(
        BASE, attention=model.GQAConfig(num_heads=4, num_kv_heads=1, head_dim=6, qkv_bias=True,
                                        out_bias=True)),
}
EVERY_CONFIG = {name: model.get_config(name) for name in model.CONFIGS} | ODD_CONFIGS


def count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", EVERY_CONFIG)
def test_counts_equal_those_of_the_models_abstract_variables(name):
  cfg = EVERY_CONFIG[name]
  variables = model.abstract_variables(cfg)
  trunk = {key: value for key, value in variables["params"].items() if not key.startswith("mtp")}
  assert cfg.param_count() == count(trunk)
  assert cfg.param_count(mtp=True) == count(variables["params"])
  assert cfg.mtp_param_count() == count(variables["params"]) - count(trunk)

  routed = [variables["params"]["moe_layers"]["ffn"][name] for name in ("w_gate_up", "w_down")
            ] if cfg.num_moe_layers else []
  idle = 0 if not routed else (
      count(routed) * (cfg.moe.num_experts - cfg.moe.experts_per_token) // cfg.moe.num_experts)
  lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
  assert cfg.active_param_count() == count(trunk) - idle - lookup

  cache = jax.eval_shape(lambda: model.init_cache(cfg, batch=2, num_slots=5))
  assert 2 * 5 * cfg.kv_cache_elements_per_token() == count(cache.entries)


def test_counts_are_the_published_numbers():
  v3, lite = model.get_config("deepseek_v3"), model.get_config("deepseek_v2_lite")
  assert v3.param_count() == 671_026_404_352
  assert count(model.abstract_variables(v3)["router"]["moe_layers"]) == 14_848
  assert round(v3.active_param_count() / 1e9, 2) == 36.63
  assert round(v3.mtp_param_count() / 1e9, 2) == 11.61
  assert round(lite.param_count() / 1e9, 3) == 15.706
  assert round(lite.active_param_count() / 1e9, 2) == 2.45
  assert v3.kv_cache_elements_per_token() == 35_136
  assert lite.kv_cache_elements_per_token() == 15_552
  # arXiv:2505.09343, table 2: 250 and 155 GFLOP per token at a length of 4096.
  assert round(v3.flops_per_token(4096) / 1e9) == 250
  assert round(model.get_config("deepseek_v2").flops_per_token(4096) / 1e9) == 155
  # From the model cards.
  assert model.get_config("llama3_8b").param_count() == 8_030_261_248
  assert model.get_config("qwen2_1_5b").param_count() == 1_543_714_304
  assert model.get_config("qwen3_8b").param_count() == 8_190_735_360


@pytest.mark.parametrize(("name", "millions"), [
    ("nano", (0.8, 1.3)), ("micro", (8, 14)), ("small", (80, 130)), ("base", (1239, 1240))])
def test_the_ladder_of_models_has_its_nominal_sizes(name, millions):
  low, high = millions
  assert low < model.get_config(name).param_count() / 1e6 < high


@pytest.mark.cpu
def test_flops_agree_with_the_compilers_count():
  cfg = dataclasses.replace(
      model.get_config("nano"), mtp=None, vocab_size=1024,
      moe=dataclasses.replace(model.get_config("nano").moe, expert_dim=128))
  length = 64
  # All experts active, so that the dense oracle does exactly the counted work.
  cfg = dataclasses.replace(cfg, moe=dataclasses.replace(
      cfg.moe, num_experts=4, experts_per_token=4, num_groups=1, groups_per_token=1),
      num_layers=1, num_dense_layers=0)
  variables = model.abstract_variables(cfg)
  tokens = jax.ShapeDtypeStruct((1, length), "int32")
  transformer = model.Transformer(cfg, experts="dense", mla_form="expanded")
  lowered = jax.jit(lambda v, t: transformer.apply(v, t).logits_BTV).lower(variables, tokens)
  counted = lowered.compile().cost_analysis()["flops"] / length
  # The compiler does not halve causal attention, and also counts norms, rotations and softmax.
  attention = cfg.attention
  causal_half = attention.num_heads * (attention.score_dim + attention.value_dim) * length
  ours = cfg.flops_per_token(length, training=False) + causal_half
  assert ours < counted < 1.1 * ours


def test_training_flops_are_three_times_forward_and_mtp_adds_its_module_and_head():
  cfg = model.get_config("small")
  assert cfg.flops_per_token(512) == 3 * cfg.flops_per_token(512, training=False)
  extra = cfg.flops_per_token(0, mtp=True, training=False) - cfg.flops_per_token(0, training=False)
  idle = 3 * cfg.d_model * cfg.moe.expert_dim * (
      cfg.moe.num_experts - cfg.moe.experts_per_token)
  vectors = 5 * cfg.d_model + cfg.attention.vector_params(cfg.d_model)
  assert extra == 2 * (cfg.mtp_param_count() - idle - vectors + cfg.vocab_size * cfg.d_model)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: dataclasses.replace(BASE, vocab_size=0), "vocab_size=0 must be positive"),
    (lambda: dataclasses.replace(BASE, num_dense_layers=1), "leave it 0"),
    (lambda: dataclasses.replace(BASE, moe=MOE, num_dense_layers=4), "must lie in 0..3"),
    (lambda: dataclasses.replace(MOE, num_experts=7), "does not divide into num_groups=3"),
    (lambda: dataclasses.replace(MOE, experts_per_token=5), "exceeds the 4 experts"),
    (lambda: dataclasses.replace(MOE, groups_per_token=4), "exceeds num_groups=3"),
    (lambda: dataclasses.replace(MOE, score="relu"), "'sigmoid' or 'softmax'"),
    (lambda: dataclasses.replace(MLA, qk_rope_head_dim=5), "must be even"),
    (lambda: dataclasses.replace(MLA, q_lora_rank=0), "positive or None"),
    (lambda: model.GQAConfig(num_heads=6, num_kv_heads=4, head_dim=8), "does not divide"),
    (lambda: model.RopeConfig(layout="spiral"), "'interleaved' or 'half'"),
    (lambda: model.YarnScaling(beta_fast=1, beta_slow=2), "beta_fast=1 must not be below"),
    (lambda: model.YarnScaling(attention_factor=0.0), "attention_factor=0.0 must be positive"),
    (lambda: model.LinearScaling(4.0, mscale_all_dim=-8.0), "LinearScaling.mscale_all_dim=-8.0"),
    (lambda: model.MTPConfig(concat="both"), "'hidden_first' or 'embedding_first'"),
    (lambda: model.Numerics(compute="int4"), "must be one of float32"),
])
def test_impossible_configs_are_refused_naming_the_field(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_an_unknown_name_is_refused_suggesting_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'deepseek_v3'"):
    model.get_config("deepseek-v3")


def test_configs_are_hashable_values_that_json_can_hold():
  one, two = model.get_config("nano"), model.get_config("nano")
  assert one == two and hash(one) == hash(two)
  assert json.loads(json.dumps(dataclasses.asdict(one)))["moe"]["num_experts"] == 16
