"""Converts the `config.json` of Hugging Face folders to ModelConfig, and back.

Four architectures are supported: deepseek_v3, deepseek_v2, llama and qwen2. A key whose value would
make transformers or the released code compute something else than this model is reported as a
problem, never ignored.
"""

import dataclasses
import reprlib
from collections.abc import Callable
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
FP8_BLOCK = 128  # rows, and columns, of a matrix that share a scale in V3's release


class CheckpointError(ValueError):
  """A folder that cannot be loaded.

  Attributes:
    problems: everything that was found wrong with the folder; the message shows the first 40.
  """

  def __init__(self, path, problems: list[str]):
    self.problems = list(problems)
    shown = self.problems[:40]
    if len(self.problems) > len(shown):
      shown.append(f"... and {len(self.problems) - len(shown)} more")
    lines = [f"cannot load {path}: {len(self.problems)} problem(s)", *shown]
    super().__init__("\n  ".join(lines))


class _Reader:
  """Typed access to a JSON object, which collects problems instead of raising.

  Attributes:
    values: the JSON object.
    problems: a list, to which problems are appended.
    where: what problems call the object.
    guessed: whether a placeholder was returned for a value that is missing or invalid.
    unclear: whether such a placeholder may determine shapes of arrays.
  """

  def __init__(self, values: dict, problems: list[str], where: str = "config.json"):
    self.values, self.problems, self.where = values, problems, where
    self.guessed = self.unclear = False

  def get(self, key: str, expected: type, default: Any = ..., *, least: float = 1) -> Any:
    """Returns the value of a key, or a placeholder and a problem if it is missing or invalid.

    Args:
      key: a key of the JSON object.
      expected: type of the value; an integer is also valid where a float is expected.
      default: returned if the key is missing or null; without it, that is a problem.
      least: the smallest valid integer. For floats, 1 means that the value must be positive.
    """
    value = self.values.get(key)
    if value is None and default is not ...:
      return default
    requirement = self._unmet_requirement(value, expected, least)
    if requirement is None:
      return expected(value)
    self.guessed = True
    self.unclear |= expected is not float
    self.problems.append(
        f"{self.where}: {key} is missing" if value is None
        else f"{self.where}: {key}={reprlib.repr(value)} should be {requirement}")
    return expected(1) if expected in (int, float) else expected()

  @staticmethod
  def _unmet_requirement(value: Any, expected: type, least: float) -> str | None:
    """Returns what the value should be, or None if it is valid."""
    if expected in (int, float):
      numbers = (int, float) if expected is float else int
      if not isinstance(value, numbers) or isinstance(value, bool):
        return "a number" if expected is float else "an integer"
      if expected is int:
        return None if least <= value < 2**31 else f"in {least}..{2**31 - 1}"
      within = abs(value) <= 10**30 and (value == 0 or abs(value) >= 1e-30)  # false for NaN
      if not within or (least == 1 and value <= 0):
        return "positive and between 1e-30 and 1e30"
      return None
    return None if isinstance(value, expected) else f"of type {expected.__name__}"

  def refuse(self, key: str, *, unless: Any, why: str = "is not supported") -> None:
    """Adds a problem if the key is present and its value is not `unless`."""
    value = self.values.get(key)
    alike = value == unless and isinstance(value, bool) == isinstance(unless, bool)
    if value is not None and not alike:
      self.problems.append(
          f"{self.where}: {key}={reprlib.repr(value)} {why}; it should be {unless!r}")

  def build(self, make: Callable, *args, **fields) -> Any:
    """Returns `make(*args, **fields)`, or None and a problem if that raises ValueError.

    If there are placeholders among the values, the error is not added: it may only be about those.
    """
    try:
      return make(*args, **fields)
    except ValueError as error:
      if not self.guessed:
        self.problems.append(f"{self.where}: {error}")
      self.guessed = self.unclear = True
      return None


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
  reader = _Reader(config, problems)
  reader.refuse("architectures", unless=[ARCHITECTURES[model_type]])
  reader.refuse("hidden_act", unless="silu")
  reader.refuse("pretraining_tp", unless=1)
  latent = model_type.startswith("deepseek")
  fields = {
      "vocab_size": reader.get("vocab_size", int), "d_model": reader.get("hidden_size", int),
      "num_layers": reader.get("num_hidden_layers", int),
      "ffn_dim": reader.get("intermediate_size", int),
      "max_seq_len": reader.get("max_position_embeddings", int),
      "norm_eps": reader.get("rms_norm_eps", float),
      "tie_embeddings": reader.get("tie_word_embeddings", bool, False),
      "init_std": reader.get("initializer_range", float, 0.02),
      "rope": _parse_rope(reader, model_type),
      "attention": _parse_mla(reader) if latent else _parse_gqa(reader, model_type),
  }
  if latent:
    fields["moe"] = _parse_moe(reader, model_type)
    fields["num_dense_layers"] = reader.get("first_k_dense_replace", int, least=0)
  if model_type == "deepseek_v3":
    depth = reader.get("num_nextn_predict_layers", int, 0, least=0)
    fields["mtp"] = MTPConfig(depth, "embedding_first") if depth else None
  cfg = reader.build(ModelConfig, **fields)
  return None if reader.unclear else cfg


def _parse_rope(reader: _Reader, model_type: str) -> RopeConfig | None:
  key = "rope_parameters" if reader.values.get("rope_parameters") is not None else "rope_scaling"
  given = reader.get(key, dict, {})
  if not isinstance(reader.values.get(key, {}), dict | None):
    return None
  rope = _Reader(given, reader.problems, f"config.json: {key}")
  theta = (rope if given.get("rope_theta") is not None else reader).get("rope_theta", float)
  rope.refuse("partial_rotary_factor", unless=1.0)
  interleaved = model_type == "deepseek_v2" or (
      model_type == "deepseek_v3" and reader.get("rope_interleave", bool, True))
  scaling = _parse_scaling(rope)
  built = rope.build(RopeConfig, theta, "interleaved" if interleaved else "half", scaling)
  reader.guessed |= rope.guessed
  return built


def _parse_scaling(rope: _Reader) -> YarnScaling | Llama3Scaling | LinearScaling | None:
  types = {rope.values[key] if isinstance(rope.values[key], str) else reprlib.repr(rope.values[key])
           for key in ("rope_type", "type") if rope.values.get(key) is not None}
  if len(types) > 1:
    rope.problems.append(f"{rope.where}: rope_type and type disagree: {sorted(types)}")
    return None
  rope_type = types.pop() if types else "default"
  match rope_type:
    case "default":
      if rope.values.get("factor") is not None:
        rope.problems.append(f"{rope.where}: has a factor, but rope_type is missing or 'default'")
      return None
    case "linear":
      return rope.build(LinearScaling, rope.get("factor", float))
    case "llama3":
      return rope.build(
          Llama3Scaling, rope.get("factor", float), rope.get("low_freq_factor", float),
          rope.get("high_freq_factor", float), rope.get("original_max_position_embeddings", int))
    case "yarn":
      rope.refuse("truncate", unless=True)
      if rope.values.get("attention_factor") is not None:
        rope.problems.append(f"{rope.where}: attention_factor is not supported; "
                             "use mscale and mscale_all_dim")
      return rope.build(
          YarnScaling, rope.get("factor", float), rope.get("original_max_position_embeddings", int),
          rope.get("beta_fast", float, 32.0), rope.get("beta_slow", float, 1.0),
          rope.get("mscale", float, 0.0, least=0), rope.get("mscale_all_dim", float, 0.0, least=0))
  rope.problems.append(
      f"{rope.where}: rope_type={rope_type!r} is not supported; it should be default, linear, "
      "llama3 or yarn")
  return None


def _parse_mla(reader: _Reader) -> MLAConfig | None:
  heads = reader.get("num_attention_heads", int)
  reader.refuse("attention_bias", unless=False)
  reader.refuse("num_key_value_heads", unless=heads, why="does not fit latent attention")
  return reader.build(
      MLAConfig, num_heads=heads, kv_lora_rank=reader.get("kv_lora_rank", int),
      qk_nope_head_dim=reader.get("qk_nope_head_dim", int),
      qk_rope_head_dim=reader.get("qk_rope_head_dim", int),
      v_head_dim=reader.get("v_head_dim", int), q_lora_rank=reader.get("q_lora_rank", int, None))


def _parse_gqa(reader: _Reader, model_type: str) -> GQAConfig | None:
  heads = reader.get("num_attention_heads", int)
  hidden = reader.values.get("hidden_size")
  head_dim = hidden // heads if isinstance(hidden, int) else 1
  reader.refuse("mlp_bias", unless=False)
  reader.refuse("use_sliding_window", unless=False)
  bias = model_type == "llama" and reader.get("attention_bias", bool, False)
  return reader.build(
      GQAConfig, num_heads=heads, num_kv_heads=reader.get("num_key_value_heads", int, heads),
      head_dim=reader.get("head_dim", int, head_dim),
      qkv_bias=bias or model_type == "qwen2", out_bias=bias)


def _parse_moe(reader: _Reader, model_type: str) -> MoEConfig | None:
  v3 = model_type == "deepseek_v3"
  reader.refuse("moe_layer_freq", unless=1)
  reader.refuse("scoring_func", unless="sigmoid" if v3 else "softmax")
  if v3:
    reader.refuse("topk_method", unless="noaux_tc")
  else:
    reader.refuse("norm_topk_prob", unless=False,
                  why="means different things in the released code and in transformers")
  greedy = not v3 and reader.get("topk_method", str) == "greedy"
  if not (v3 or greedy):
    reader.refuse("topk_method", unless="group_limited_greedy",
                  why="is neither 'greedy' nor supported")
  num_groups = 1 if greedy else reader.get("n_group", int)
  return reader.build(
      MoEConfig, num_experts=reader.get("n_routed_experts", int),
      experts_per_token=reader.get("num_experts_per_tok", int),
      expert_dim=reader.get("moe_intermediate_size", int),
      num_shared_experts=reader.get("n_shared_experts", int, 0, least=0), num_groups=num_groups,
      groups_per_token=1 if greedy else reader.get("topk_group", int),
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
  reader = _Reader(quantization, problems, "config.json: quantization_config")
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
    ValueError: if none of the four does; the message says why.
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


def check_supported(cfg: ModelConfig) -> None:
  """Raises ValueError if no Hugging Face architecture computes what `cfg` does."""
  _architecture(cfg)


def _architecture(cfg: ModelConfig) -> str:
  """Returns the model_type that computes what `cfg` does; raises ValueError if none does."""
  unsupported = []
  if isinstance(cfg.attention, GQAConfig):
    a = cfg.attention
    model_type = "qwen2" if a.qkv_bias and not a.out_bias else "llama"
    if a.out_bias and not a.qkv_bias:
      unsupported.append("an output bias without query, key and value biases")
    if cfg.moe or cfg.mtp:
      unsupported.append("grouped-query attention with experts or MTP")
    if cfg.rope.layout != "half":
      unsupported.append("grouped-query attention with interleaved rotary dimensions")
  else:
    model_type = _check_deepseek(cfg, unsupported)
  if model_type != "deepseek_v3" and cfg.d_model % cfg.attention.num_heads:
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
  if cfg.mtp and (not v3 or cfg.mtp.hidden != "post_norm"):
    unsupported.append("MTP with a softmax router, or on hidden states before the final norm")
  return "deepseek_v3" if v3 else "deepseek_v2"
