"""Named architectures: each is a value of ModelConfig, and no other code depends on the names."""


from model.checks import did_you_mean
from model.config import (
  GQAConfig,
  Llama3Scaling,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  RopeConfig,
  YarnScaling,
)
from model.numerics import NUMERICS


def _deepseek_v3() -> ModelConfig:
  """As released: 671 B parameters, 37 B active, YaRN to 160 K positions, one MTP module."""
  return ModelConfig(
      vocab_size=129280, d_model=7168, num_layers=61, ffn_dim=18432, num_dense_layers=3,
      attention=MLAConfig(num_heads=128, q_lora_rank=1536, kv_lora_rank=512,
                          qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
      moe=MoEConfig(),
      mtp=MTPConfig(concat="embedding_first"),
      rope=RopeConfig(scaling=YarnScaling()),
      max_seq_len=163840, numerics=NUMERICS["bf16"])


def _deepseek_v2() -> ModelConfig:
  """236 B parameters, 21 B active."""
  return ModelConfig(
      vocab_size=102400, d_model=5120, num_layers=60, ffn_dim=12288, num_dense_layers=1,
      attention=MLAConfig(num_heads=128, q_lora_rank=1536, kv_lora_rank=512,
                          qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
      moe=MoEConfig(num_experts=160, experts_per_token=6, expert_dim=1536, num_shared_experts=2,
                    num_groups=8, groups_per_token=3, group_score="max", score="softmax",
                    normalize_gates=False, route_scale=16.0, balancing_bias=False),
      rope=RopeConfig(scaling=YarnScaling(mscale=0.707, mscale_all_dim=0.707)),
      max_seq_len=163840, numerics=NUMERICS["bf16"])


def _deepseek_v2_lite() -> ModelConfig:
  """15.7 B parameters, 2.4 B active; the size of V3's small ablation models."""
  return ModelConfig(
      vocab_size=102400, d_model=2048, num_layers=27, ffn_dim=10944, num_dense_layers=1,
      attention=MLAConfig(num_heads=16, kv_lora_rank=512,
                          qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
      moe=MoEConfig(num_experts=64, experts_per_token=6, expert_dim=1408, num_shared_experts=2,
                    num_groups=1, groups_per_token=1, group_score="max", score="softmax",
                    normalize_gates=False, route_scale=1.0, balancing_bias=False),
      rope=RopeConfig(scaling=YarnScaling(mscale=0.707, mscale_all_dim=0.707)),
      max_seq_len=163840, numerics=NUMERICS["bf16"])


def _nano() -> ModelConfig:
  """1 M parameters; trains on two CPU cores in minutes."""
  return ModelConfig(
      vocab_size=512, d_model=128, num_layers=4, ffn_dim=352, num_dense_layers=1,
      attention=MLAConfig(num_heads=4, q_lora_rank=64, kv_lora_rank=32,
                          qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
      moe=MoEConfig(num_experts=16, experts_per_token=4, expert_dim=32,
                    num_groups=4, groups_per_token=2),
      mtp=MTPConfig(), max_seq_len=512, init_std=0.02)


def _micro() -> ModelConfig:
  """12 M parameters; the size at which CPU training is compared with other libraries."""
  return ModelConfig(
      vocab_size=4096, d_model=256, num_layers=6, ffn_dim=704, num_dense_layers=1,
      attention=MLAConfig(num_heads=4, q_lora_rank=128, kv_lora_rank=64,
                          qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
      moe=MoEConfig(num_experts=16, experts_per_token=4, expert_dim=128,
                    num_groups=4, groups_per_token=2),
      mtp=MTPConfig(), max_seq_len=1024, init_std=0.02)


def _small() -> ModelConfig:
  """110 M parameters, 64 experts; the size of the GPU ablations.

  The widths of the model, its FFNs and its latents are multiples of 128.
  """
  return ModelConfig(
      vocab_size=16384, d_model=512, num_layers=8, ffn_dim=1408, num_dense_layers=1,
      attention=MLAConfig(num_heads=8, q_lora_rank=256, kv_lora_rank=128,
                          qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
      moe=MoEConfig(num_experts=64, experts_per_token=6, expert_dim=128,
                    num_groups=8, groups_per_token=4),
      mtp=MTPConfig(), max_seq_len=2048, init_std=0.02)


def _base() -> ModelConfig:
  """1.24 B parameters, 64 experts of width 512; the size of comparisons of GPU training."""
  return ModelConfig(
      vocab_size=32768, d_model=1024, num_layers=12, ffn_dim=2816, num_dense_layers=1,
      attention=MLAConfig(num_heads=8, q_lora_rank=512, kv_lora_rank=256,
                          qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
      moe=MoEConfig(num_experts=64, experts_per_token=6, expert_dim=512,
                    num_groups=8, groups_per_token=4),
      max_seq_len=4096, numerics=NUMERICS["bf16"])


def _llama3_8b() -> ModelConfig:
  """Llama 3.1 8B, the base of R1-Distill-Llama-8B."""
  return ModelConfig(
      vocab_size=128256, d_model=4096, num_layers=32, ffn_dim=14336,
      attention=GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128),
      rope=RopeConfig(theta=500000.0, layout="half", scaling=Llama3Scaling()),
      max_seq_len=131072, norm_eps=1e-5, init_std=0.02, numerics=NUMERICS["bf16"])


def _qwen2_1_5b() -> ModelConfig:
  """Qwen2.5-Math 1.5B, the base of R1-Distill-Qwen-1.5B."""
  return ModelConfig(
      vocab_size=151936, d_model=1536, num_layers=28, ffn_dim=8960,
      attention=GQAConfig(num_heads=12, num_kv_heads=2, head_dim=128, qkv_bias=True),
      rope=RopeConfig(theta=10000.0, layout="half"),
      max_seq_len=4096, tie_embeddings=True, init_std=0.02, numerics=NUMERICS["bf16"])


def _qwen3_8b() -> ModelConfig:
  """Qwen3 8B as R1-0528-Qwen3-8B has it, with YaRN to 128 K positions."""
  return ModelConfig(
      vocab_size=151936, d_model=4096, num_layers=36, ffn_dim=12288,
      attention=GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128, qk_norm=True),
      rope=RopeConfig(theta=1000000.0, layout="half", scaling=YarnScaling(
          factor=4.0, original_seq_len=32768, mscale=0.0, mscale_all_dim=0.0)),
      max_seq_len=131072, init_std=0.02, numerics=NUMERICS["bf16"])


CONFIGS = {
    build.__name__.removeprefix("_"): build
    for build in (_deepseek_v3, _deepseek_v2, _deepseek_v2_lite, _nano, _micro, _small, _base,
                  _llama3_8b, _qwen2_1_5b, _qwen3_8b)
}


def get_config(name: str) -> ModelConfig:
  """Returns the architecture of this name, a key of CONFIGS.

  Raises:
    ValueError: if there is none; the message lists the names that exist.
  """
  if name not in CONFIGS:
    raise ValueError(f"no architecture is called {name!r}{did_you_mean(name, CONFIGS)} "
                     f"There are: {', '.join(CONFIGS)}")
  return CONFIGS[name]()
