"""Converts the `config.json` of Hugging Face folders to ModelConfig, and back.

The architectures are those of `ARCHITECTURES`. A key whose value would make transformers or the
released code compute something else than this model is reported as a problem, never ignored.
"""

import dataclasses
import reprlib

from model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig
from model.hf.reader import Reader
from model.hf.rope import parse_rope, render_scaling
from model.numerics import Numerics

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
# Names under which an architecture is released, but which transformers does not know.
_ALIASES = {"kimi_k2": "deepseek_v3"}
FP8_BLOCK = 128  # rows, and columns, of a matrix that share a scale in V3's release


def parse(config: dict, problems: list[str]) -> ModelConfig | None:
  """Returns the architecture that a `config.json` describes.

  Args:
    config: the JSON object.
    problems: a list, to which everything that is wrong with the object is appended.

  Returns:
    The architecture; None if problems leave shapes of arrays unclear. If they do not, the
    architecture is returned along with problems, so that the weights can be checked too.
  """
  model_type = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
    problems.append(f"config.json: unknown architecture model_type={reprlib.repr(model_type)}; "
                    "known: " + ", ".join(ARCHITECTURES))
    return None
  reader = Reader(config, problems)
  reader.refuse("architectures", unless=[ARCHITECTURES[model_type]])
  model_type = _ALIASES.get(model_type, model_type)
  reader.refuse("hidden_act", unless="silu")
  reader.refuse("pretraining_tp", unless=1)
  latent = model_type.startswith("deepseek")
  fields = {
      "vocab_size": reader.get("vocab_size", int), "d_model": reader.get("hidden_size", int),
      "num_layers": reader.get("num_hidden_layers", int),
      "ffn_dim": reader.get("intermediate_size", int),
      "max_seq_len": reader.get("max_position_embeddings", int),
      "norm_eps": reader.get("rms_norm_eps", float, 1e-6),
      "tie_embeddings": reader.get("tie_word_embeddings", bool, False),
      "init_std": reader.get("initializer_range", float, 0.02),
      "rope": parse_rope(reader, model_type),
      "attention": (_parse_mla(reader.part()) if latent
                    else _parse_gqa(reader.part(), model_type)),
  }
  if latent:
    fields["moe"] = _parse_moe(reader.part(), model_type)
    fields["num_dense_layers"] = reader.get("first_k_dense_replace", int, least=0)
  if model_type == "deepseek_v3":
    depth = reader.get("num_nextn_predict_layers", int, 0, least=0)
    fields["mtp"] = MTPConfig(depth, "embedding_first") if depth else None
  cfg = reader.build(ModelConfig, **fields)
  return None if reader.unclear else cfg


def _parse_mla(reader: Reader) -> MLAConfig | None:
  heads = reader.get("num_attention_heads", int)
  reader.refuse("attention_bias", unless=False)
  if not reader.guessed:
    reader.refuse("num_key_value_heads", unless=heads, why="does not fit latent attention")
  return reader.build(
      MLAConfig, num_heads=heads, kv_lora_rank=reader.get("kv_lora_rank", int),
      qk_nope_head_dim=reader.get("qk_nope_head_dim", int),
      qk_rope_head_dim=reader.get("qk_rope_head_dim", int),
      v_head_dim=reader.get("v_head_dim", int), q_lora_rank=reader.get("q_lora_rank", int, None))


def _parse_gqa(reader: Reader, model_type: str) -> GQAConfig | None:
  heads = reader.get("num_attention_heads", int)
  usual = 128 if model_type == "qwen3" else max(1, reader.get("hidden_size", int) // heads)
  if model_type == "llama":
    reader.refuse("mlp_bias", unless=False)
  else:
    _refuse_sliding_layers(reader)
  bias = model_type != "qwen2" and reader.get("attention_bias", bool, False)
  return reader.build(
      GQAConfig, num_heads=heads, num_kv_heads=reader.get("num_key_value_heads", int, heads),
      head_dim=reader.get("head_dim", int, usual), qkv_bias=bias or model_type == "qwen2",
      out_bias=bias, qk_norm=model_type == "qwen3")


def _refuse_sliding_layers(reader: Reader) -> None:
  """Adds a problem if a layer attends to a window only.

  `layer_types` says which layers do. Without it, they are those from `max_window_layers` on,
  provided that `use_sliding_window` is true and that `sliding_window` is not null. The defaults are
  those of transformers.
  """
  enabled = reader.get("use_sliding_window", bool, False)
  layer_types = reader.get("layer_types", list, None)
  if layer_types is not None:
    other = [name for name in layer_types if name != "full_attention"]
    if other:
      reader.problems.append(f"{reader.where}: layer_types has {reprlib.repr(other[0])}, which is "
                             "not supported; every layer should be 'full_attention'")
    return
  # A window that is null is none; one that is not given is 4096.
  if not enabled or reader.values.get("sliding_window", 4096) is None:
    return
  first = reader.get("max_window_layers", int, 28, least=0)
  layers = reader.get("num_hidden_layers", int)
  if not reader.guessed and first < layers:
    reader.problems.append(
        f"{reader.where}: use_sliding_window=True with max_window_layers={first} gives layers "
        f"{first}..{layers - 1} a sliding window, which is not supported; only full attention is")


def _parse_moe(reader: Reader, model_type: str) -> MoEConfig | None:
  v3 = model_type == "deepseek_v3"
  reader.refuse("moe_layer_freq", unless=1)
  reader.refuse("scoring_func", unless="sigmoid" if v3 else "softmax")
  if v3:
    reader.refuse("topk_method", unless="noaux_tc")
  else:
    reader.refuse("norm_topk_prob", unless=False,
                  why="means different things in the released code and in transformers")
  grouped = v3 or reader.get("topk_method", str) == "group_limited_greedy"
  if not (grouped or reader.guessed):
    reader.refuse("topk_method", unless="greedy",
                  why="is neither 'group_limited_greedy' nor supported")
  num_groups = reader.get("n_group", int) if grouped else 1
  return reader.build(
      MoEConfig, num_experts=reader.get("n_routed_experts", int),
      experts_per_token=reader.get("num_experts_per_tok", int),
      expert_dim=reader.get("moe_intermediate_size", int),
      num_shared_experts=reader.get("n_shared_experts", int, 0, least=0), num_groups=num_groups,
      groups_per_token=reader.get("topk_group", int) if grouped else 1,
      group_score="top2" if v3 else "max", score="sigmoid" if v3 else "softmax",
      normalize_gates=v3 and reader.get("norm_topk_prob", bool),
      route_scale=reader.get("routed_scaling_factor", float), balancing_bias=v3)


def is_fp8(config: dict, problems: list[str]) -> bool:
  """Whether matrices are stored in FP8 as in V3's release, that is in e4m3 with 128 x 128 blocks.

  Any other quantisation is appended to `problems`.
  """
  quantization = config.get("quantization_config")
  if quantization is None:
    return False
  if not isinstance(quantization, dict):
    problems.append("config.json: quantization_config should be a JSON object")
    return False
  reader = Reader(quantization, problems, "config.json: quantization_config")
  reader.get("quant_method", str)
  reader.get("weight_block_size", list)
  reader.refuse("quant_method", unless="fp8")
  reader.refuse("fmt", unless="e4m3")
  reader.refuse("weight_block_size", unless=[FP8_BLOCK, FP8_BLOCK])
  return True


def with_dtype(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """Returns the config with parameters stored, and products computed, in the format `dtype`."""
  return dataclasses.replace(cfg, numerics=Numerics(params=dtype, compute=dtype))


# From ModelConfig to config.json.


def render(cfg: ModelConfig, dtype: str) -> dict:
  """Returns the `config.json` of the Hugging Face architecture that computes what `cfg` does.

  Args:
    cfg: the architecture.
    dtype: format of the weights, such as "bfloat16".

  Raises:
    ValueError: if none does; the message says why.
  """
  model_type = _architecture(cfg)
  attention = cfg.attention
  config = {
      "architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "dtype": dtype,
      "vocab_size": cfg.vocab_size, "hidden_size": cfg.d_model,
      "num_hidden_layers": cfg.num_layers, "intermediate_size": cfg.ffn_dim,
      "num_attention_heads": attention.num_heads, "hidden_act": "silu",
      "max_position_embeddings": cfg.max_seq_len, "rms_norm_eps": cfg.norm_eps,
      "tie_word_embeddings": cfg.tie_embeddings, "initializer_range": cfg.init_std,
      "rope_theta": cfg.rope.theta, "rope_scaling": render_scaling(cfg.rope.scaling),
      "use_cache": True, "attention_dropout": 0.0,
  }
  if isinstance(attention, GQAConfig):
    config |= {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
    if model_type != "qwen2":
      config["attention_bias"] = attention.qkv_bias
    return config | ({"mlp_bias": False} if model_type == "llama" else {})
  config |= {
      "num_key_value_heads": attention.num_heads, "attention_bias": False,
      "q_lora_rank": attention.q_lora_rank, "kv_lora_rank": attention.kv_lora_rank,
      "qk_nope_head_dim": attention.qk_nope_head_dim,
      "qk_rope_head_dim": attention.qk_rope_head_dim, "v_head_dim": attention.v_head_dim,
      "first_k_dense_replace": cfg.num_dense_layers,
  }
  moe = cfg.moe
  config |= {
      "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
      "moe_intermediate_size": moe.expert_dim, "n_shared_experts": moe.num_shared_experts,
      "n_group": moe.num_groups, "topk_group": moe.groups_per_token,
      "norm_topk_prob": moe.normalize_gates, "routed_scaling_factor": moe.route_scale,
      "scoring_func": moe.score, "moe_layer_freq": 1,
  }
  if model_type == "deepseek_v3":
    config |= {"topk_method": "noaux_tc", "rope_interleave": cfg.rope.layout == "interleaved",
               "num_nextn_predict_layers": cfg.mtp.depth if cfg.mtp else 0}
  else:
    config["topk_method"] = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
  return config


def check_supported(cfg: ModelConfig) -> None:
  """Raises ValueError if no Hugging Face architecture computes what `cfg` does."""
  _architecture(cfg)


def _architecture(cfg: ModelConfig) -> str:
  """Returns the model_type that computes what `cfg` does; raises ValueError if none does."""
  unsupported = []
  if isinstance(cfg.attention, GQAConfig):
    a = cfg.attention
    model_type = "qwen2" if a.qkv_bias and not a.out_bias else "llama"
    if a.qk_norm:
      model_type = "qwen3"
    if a.qk_norm and a.qkv_bias and not a.out_bias:
      unsupported.append("query and key norms with query, key and value biases, but no output bias")
    if a.out_bias and not a.qkv_bias:
      unsupported.append("an output bias without query, key and value biases")
    if cfg.moe or cfg.mtp:
      unsupported.append("grouped-query attention with experts or MTP")
    if cfg.rope.layout != "half":
      unsupported.append("grouped-query attention with interleaved rotary dimensions")
  else:
    model_type = _check_deepseek(cfg, unsupported)
  if model_type not in ("deepseek_v3", "qwen3") and cfg.d_model % cfg.attention.num_heads:
    unsupported.append(
        f"a d_model={cfg.d_model} that num_heads={cfg.attention.num_heads} does not divide")
  if unsupported:
    raise ValueError("no Hugging Face architecture supports " + ", nor ".join(unsupported))
  return model_type


def _check_deepseek(cfg: ModelConfig, unsupported: list[str]) -> str:
  """Returns deepseek_v3 or deepseek_v2, by the router's score; collects what that does not have."""
  if cfg.moe is None:
    unsupported.append("latent attention without experts")
    return "deepseek_v3"
  v3 = cfg.moe.score == "sigmoid"
  if not cfg.attention.latent_norm:
    unsupported.append("latent attention without latent norms")
  if not cfg.moe.num_shared_experts:
    unsupported.append("routed experts without a shared expert")
  if cfg.moe.group_score != ("top2" if v3 else "max") and cfg.moe.num_groups > 1:
    unsupported.append(f"a {cfg.moe.score} router with group_score={cfg.moe.group_score!r}")
  if v3 and not cfg.moe.balancing_bias:
    unsupported.append("a sigmoid router without balancing bias")
  if not v3 and (cfg.moe.balancing_bias or cfg.moe.normalize_gates):
    unsupported.append("a softmax router with balancing bias or normalised gates")
  if not v3 and cfg.rope.layout != "interleaved":
    unsupported.append("a softmax router with rotary layout 'half'")
  if cfg.mtp and (not v3 or cfg.mtp.hidden != "post_norm" or cfg.mtp.form != "sequential"):
    unsupported.append(
        "MTP with a softmax router, on hidden states before the final norm, or with parallel heads")
  return "deepseek_v3" if v3 else "deepseek_v2"
