"""Small configurations that differ in every dimension, with seeded weights and large logits.

Needs only numpy: both the generator of the reference (which has torch, but not jax) and the tests
(which have jax, but not torch) import it.
"""

import zlib

import numpy as np

_V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 41, "hidden_size": 21, "num_hidden_layers": 3, "intermediate_size": 22,
    "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 12, "kv_lora_rank": 14,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 1,
    "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "moe_intermediate_size": 9, "n_group": 3, "topk_group": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_bias": False, "rope_theta": 100.0,
    "initializer_range": 0.02,
}
_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
         "beta_slow": 0.5}
_V2 = {key: value for key, value in _V3.items() if key not in ("n_group", "topk_group")} | {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
    "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
    "routed_scaling_factor": 1.5, "n_shared_experts": 2, "num_hidden_layers": 2,
}
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 43,
    "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 26, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False,
    "rope_theta": 100.0, "initializer_range": 0.02,
}

CASES = {
    # Several expert groups, query compression, YaRN with the release's temperatures, an MTP module.
    "v3": _V3 | {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
                 "num_nextn_predict_layers": 1},
    # One expert group, no query compression, no YaRN, tied embeddings, two shared experts, RoPE in
    # the half layout.
    "v3_plain": _V3 | {
        "num_hidden_layers": 2, "first_k_dense_replace": 0, "q_lora_rank": None, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 2, "tie_word_embeddings": True,
        "rope_interleave": False, "norm_topk_prob": False, "num_nextn_predict_layers": 0},
    "v2": _V2 | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
                 "rope_scaling": _YARN | {"mscale": 0.9, "mscale_all_dim": 0.707}},
    "v2_lite": _V2 | {"q_lora_rank": None},
    "llama": _LLAMA | {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "llama_mqa": _LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "rope_scaling": _YARN,
                           "tie_word_embeddings": True},
    "qwen2": _LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                       "num_key_value_heads": 6, "num_attention_heads": 6, "head_dim": 4,
                       "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    # Heads whose total width is not the model's, and YaRN with its scale given but not its length.
    "qwen3": _LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
                       "head_dim": 10, "rope_scaling": {
                           "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
                           "attention_factor": 1.3}},
}
BATCH, LENGTH = 2, 24
MTP_WEIGHT = 0.3


def tokens(config: dict) -> np.ndarray:
  return np.random.default_rng(7).integers(0, config["vocab_size"], (BATCH, LENGTH))


def make_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Returns weights by name, equal on every machine; logits exceed 3 and no norm's gain is one."""
  weights = {}
  for name, shape in shapes.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape)
    if "norm" in name:
      value = 1 + 0.4 * noise
    elif len(shape) == 1:
      value = 0.3 * noise
    elif "embed_tokens" in name:
      value = 0.7 * noise
    else:
      value = noise * (1.25 / np.sqrt(shape[1]))
    weights[name] = value.astype(np.float32)
  return weights
