"""`config.json` of Hugging Face folders, to ModelConfig and back.

Four architectures are known: deepseek_v3, deepseek_v2, llama and qwen2. What transformers or the
released code would compute differently from us is refused by name, never ignored.
"""

import dataclasses
from typing import Any

from model.config import (
  GQAConfig,
  LinearScaling,
  Llama3Scaling,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  RopeConfig,
  YarnScaling,
)
from model.numerics import Numerics

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
FP8_BLOCK = 128


class CheckpointError(ValueError):
  """A folder that cannot be loaded; `problems` lists everything found wrong with it."""

  def __init__(self, path, problems: list[str]):
    self.problems = list(problems)
    shown = self.problems[:40]
    if len(self.problems) > len(shown):
      shown.append(f"... and {len(self.problems) - len(shown)} more")
    lines = [f"cannot load {path}: {len(self.problems)} problem(s)", *shown]
    super().__init__("\n  ".join(lines))


class _Reader:
  """Typed access to a JSON object that notes what is wrong instead of raising."""

  def __init__(self, values: dict, problems: list[str], where: str = "config.json"):
    self.values, self.problems, self.where = values, problems, where

  def get(self, key: str, kind: type, default: Any = ...) -> Any:
    value = self.values.get(key)
    if value is None:
      if default is ...:
        self.problems.append(f"{self.where}: {key} is missing")
        return kind(1)
      return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
      self.problems.append(f"{self.where}: {key}={value!r} should be of type {kind.__name__}")
      return kind(1) if default in (..., None) else default
    return value

  def refuse(self, key: str, *, unless: Any, why: str = "is not supported") -> None:
    value = self.values.get(key)
    if value is not None and value != unless:
      self.problems.append(f"{self.where}: {key}={value!r} {why}; only {unless!r} is")


def parse(config: dict, problems: list[str]) -> ModelConfig | None:
  """Returns the architecture that a `config.json` describes, or None with `problems` extended."""
  model_type = config.get("model_type")
  if model_type not in ARCHITECTURES:
    problems.append(f"config.json: unknown architecture model_type={model_type!r}; known: "
                    + ", ".join(ARCHITECTURES))
    return None
  before = len(problems)
  reader = _Reader(config, problems)
  reader.refuse("hidden_act", unless="silu")
  reader.refuse("pretraining_tp", unless=1)
  try:
    rope = _parse_rope(reader, model_type)
    latent = model_type.startswith("deepseek")
    attention = _parse_mla(reader) if latent else _parse_gqa(reader, model_type)
    moe = _parse_moe(reader, model_type) if latent else None
    depth = reader.get("num_nextn_predict_layers", int, 0) if model_type == "deepseek_v3" else 0
    dense = reader.get("first_k_dense_replace", int) if moe else 0
    cfg = ModelConfig(
        vocab_size=reader.get("vocab_size", int), d_model=reader.get("hidden_size", int),
        num_layers=reader.get("num_hidden_layers", int),
        ffn_dim=reader.get("intermediate_size", int), attention=attention, moe=moe,
        num_dense_layers=dense, mtp=MTPConfig(depth, "embedding_first") if depth else None,
        rope=rope, max_seq_len=reader.get("max_position_embeddings", int, 2048),
        norm_eps=reader.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=reader.get("tie_word_embeddings", bool, False),
        init_std=reader.get("initializer_range", float, 0.02))
  except ValueError as error:
    problems.append(f"config.json: {error}")
    return None
  return cfg if len(problems) == before else None


def _parse_rope(reader: _Reader, model_type: str) -> RopeConfig:
  key = "rope_parameters" if reader.values.get("rope_parameters") else "rope_scaling"
  given = reader.get(key, dict, {})
  rope = _Reader(given, reader.problems, f"config.json: {key}")
  theta = rope.get("rope_theta", float, reader.get("rope_theta", float, 10000.0))
  rope.refuse("partial_rotary_factor", unless=1.0)
  interleaved = model_type == "deepseek_v2" or (
      model_type == "deepseek_v3" and reader.get("rope_interleave", bool, True))
  scaling = _parse_scaling(rope, given.get("rope_type", given.get("type", "default")))
  return RopeConfig(theta, "interleaved" if interleaved else "half", scaling)


def _parse_scaling(rope: _Reader, kind: Any) -> YarnScaling | Llama3Scaling | LinearScaling | None:
  match kind:
    case "default":
      return None
    case "linear":
      return LinearScaling(rope.get("factor", float))
    case "llama3":
      return Llama3Scaling(
          rope.get("factor", float), rope.get("low_freq_factor", float),
          rope.get("high_freq_factor", float), rope.get("original_max_position_embeddings", int))
    case "yarn":
      rope.refuse("truncate", unless=True)
      if rope.values.get("attention_factor") is not None:
        rope.problems.append(f"{rope.where}: attention_factor is not supported; "
                             "mscale and mscale_all_dim are")
      return YarnScaling(
          rope.get("factor", float), rope.get("original_max_position_embeddings", int),
          rope.get("beta_fast", float, 32.0), rope.get("beta_slow", float, 1.0),
          rope.get("mscale", float, 0.0), rope.get("mscale_all_dim", float, 0.0))
  rope.problems.append(
      f"{rope.where}: rope_type={kind!r} is not supported; default, linear, llama3 and yarn are")
  return None


def _parse_mla(reader: _Reader) -> MLAConfig:
  heads = reader.get("num_attention_heads", int)
  reader.refuse("attention_bias", unless=False)
  reader.refuse("num_key_value_heads", unless=heads, why="does not fit latent attention")
  return MLAConfig(
      num_heads=heads, kv_lora_rank=reader.get("kv_lora_rank", int),
      qk_nope_head_dim=reader.get("qk_nope_head_dim", int),
      qk_rope_head_dim=reader.get("qk_rope_head_dim", int),
      v_head_dim=reader.get("v_head_dim", int), q_lora_rank=reader.get("q_lora_rank", int, None))


def _parse_gqa(reader: _Reader, model_type: str) -> GQAConfig:
  heads = reader.get("num_attention_heads", int)
  hidden = reader.get("hidden_size", int)
  reader.refuse("mlp_bias", unless=False)
  reader.refuse("use_sliding_window", unless=False)
  bias = model_type == "llama" and reader.get("attention_bias", bool, False)
  return GQAConfig(
      num_heads=heads, num_kv_heads=reader.get("num_key_value_heads", int, heads),
      head_dim=reader.get("head_dim", int, hidden // max(heads, 1)),
      qkv_bias=bias or model_type == "qwen2", out_bias=bias)


def _parse_moe(reader: _Reader, model_type: str) -> MoEConfig:
  v3 = model_type == "deepseek_v3"
  reader.refuse("moe_layer_freq", unless=1)
  reader.refuse("scoring_func", unless="sigmoid" if v3 else "softmax")
  if v3:
    reader.refuse("topk_method", unless="noaux_tc")
  else:
    reader.refuse("norm_topk_prob", unless=False,
                  why="means different things in the released code and in transformers")
  greedy = not v3 and reader.get("topk_method", str, "greedy") == "greedy"
  if not (v3 or greedy) and reader.values.get("topk_method") != "group_limited_greedy":
    reader.problems.append(f"config.json: topk_method={reader.values.get('topk_method')!r} is not "
                           "supported; greedy and group_limited_greedy are")
  num_groups = 1 if greedy else reader.get("n_group", int)
  return MoEConfig(
      num_experts=reader.get("n_routed_experts", int),
      experts_per_token=reader.get("num_experts_per_tok", int),
      expert_dim=reader.get("moe_intermediate_size", int),
      num_shared_experts=reader.get("n_shared_experts", int, 0), num_groups=num_groups,
      groups_per_token=1 if greedy else reader.get("topk_group", int),
      group_score="top2" if v3 else "max", score="sigmoid" if v3 else "softmax",
      normalize_gates=v3 and reader.get("norm_topk_prob", bool),
      route_scale=reader.get("routed_scaling_factor", float), balancing_bias=v3)


def is_fp8(config: dict, problems: list[str]) -> bool:
  """Whether matrices are stored as V3's release does; any other quantisation is a problem."""
  quantization = config.get("quantization_config")
  if quantization is None:
    return False
  if not isinstance(quantization, dict):
    problems.append("config.json: quantization_config should be an object")
    return False
  reader = _Reader(quantization, problems, "config.json: quantization_config")
  reader.refuse("quant_method", unless="fp8")
  reader.refuse("fmt", unless="e4m3")
  reader.refuse("weight_block_size", unless=[FP8_BLOCK, FP8_BLOCK])
  return True


def with_dtype(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """The config with parameters kept, and multiplied, in one format."""
  return dataclasses.replace(cfg, numerics=Numerics(params=dtype, compute=dtype))


# The other direction.


def render(cfg: ModelConfig, dtype: str) -> dict:
  """Returns the `config.json` of the architecture that computes what `cfg` does.

  Raises:
    ValueError: if none of the four does, saying why.
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
      "rope_theta": cfg.rope.theta, "rope_scaling": _render_scaling(cfg.rope.scaling),
      "use_cache": True, "attention_dropout": 0.0,
  }
  if isinstance(attention, GQAConfig):
    config |= {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
    if model_type == "llama":
      config |= {"attention_bias": attention.qkv_bias, "mlp_bias": False}
    return config
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


def _render_scaling(scaling) -> dict | None:
  match scaling:
    case YarnScaling():
      temperatures = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
      return {
          "type": "yarn", "rope_type": "yarn", "factor": scaling.factor,
          "original_max_position_embeddings": scaling.original_seq_len,
          "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow,
      } | {name: value for name, value in temperatures.items() if value}
    case Llama3Scaling():
      return {
          "rope_type": "llama3", "factor": scaling.factor,
          "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
          "original_max_position_embeddings": scaling.original_seq_len,
      }
    case LinearScaling():
      return {"rope_type": "linear", "factor": scaling.factor}
  return None


def _architecture(cfg: ModelConfig) -> str:
  """The model_type that computes what `cfg` does."""
  why = []
  if isinstance(cfg.attention, GQAConfig):
    a = cfg.attention
    model_type = "qwen2" if a.qkv_bias and not a.out_bias else "llama"
    if a.out_bias and not a.qkv_bias:
      why.append("an output bias without query, key and value biases")
    if cfg.moe or cfg.mtp:
      why.append("grouped-query attention with experts or MTP")
    if cfg.rope.layout != "half":
      why.append("grouped-query attention with interleaved rotation")
  else:
    model_type = _check_deepseek(cfg, why)
  if model_type != "deepseek_v3" and cfg.d_model % cfg.attention.num_heads:
    why.append(f"a d_model={cfg.d_model} that num_heads={cfg.attention.num_heads} does not divide")
  if why:
    raise ValueError("no Hugging Face architecture has " + ", nor ".join(why))
  return model_type


def _check_deepseek(cfg: ModelConfig, why: list[str]) -> str:
  """deepseek_v3 or deepseek_v2 by the router; `why` gets what neither has."""
  if cfg.moe is None:
    why.append("latent attention without experts")
    return "deepseek_v3"
  v3 = cfg.moe.score == "sigmoid"
  if not cfg.attention.latent_norm:
    why.append("latent attention without latent norms")
  if not cfg.moe.num_shared_experts:
    why.append("no shared expert")
  if cfg.moe.group_score != ("top2" if v3 else "max") and cfg.moe.num_groups > 1:
    why.append(f"a {cfg.moe.score} router with group_score={cfg.moe.group_score!r}")
  if v3 and not cfg.moe.balancing_bias:
    why.append("a sigmoid router without balancing bias")
  if not v3 and (cfg.moe.balancing_bias or cfg.moe.normalize_gates):
    why.append("a softmax router with balancing bias or normalised gates")
  if not v3 and cfg.rope.layout != "interleaved":
    why.append("a softmax router with half rotation")
  if cfg.mtp and (not v3 or cfg.mtp.hidden != "post_norm"):
    why.append("MTP beside a softmax router or on hidden states before the final norm")
  return "deepseek_v3" if v3 else "deepseek_v2"
