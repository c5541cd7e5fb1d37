"""The architecture as data: frozen dataclasses, validated when made, countable without a model.

Names are the papers' where they have one; `docs/library.md` maps them to those of the released
`config.json`.
"""

import dataclasses
import math
from typing import Literal

from model.checks import require, require_positive
from model.numerics import NUMERICS, Numerics


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN context extension (arXiv:2309.00071) with DeepSeek's two temperature terms.

  The released models set both temperatures alike, so that only the softmax scale remains (V3:
  0.1 ln(factor) + 1; V2: 0.0707 ln(factor) + 1). Zero means absent: without both, the rotation
  carries 0.1 ln(factor) + 1, as in Llama forks.

  Attributes:
    factor: by which the context is extended.
    original_seq_len: of the context before.
    beta_fast: rotations over the original context above which a frequency is kept.
    beta_slow: rotations below which a frequency is divided by `factor`; between, interpolated.
    mscale: temperature of the rotated dimensions.
    mscale_all_dim: temperature of all dimensions.
  """

  factor: float = 40.0
  original_seq_len: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def __post_init__(self):
    require_positive(self, "factor", "original_seq_len", "beta_fast", "beta_slow")
    require(self.beta_fast > self.beta_slow, "YarnScaling.beta_fast must exceed beta_slow")
    for name in ("mscale", "mscale_all_dim"):
      require(self._temperature(getattr(self, name)) > 0,
              f"YarnScaling.{name}={getattr(self, name)} makes a temperature that is not positive")

  def _temperature(self, mscale: float) -> float:
    return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

  @property
  def rotation_scale(self) -> float:
    """Multiplies cos and sin, hence the rotated part of the scores by its square."""
    if self.mscale and self.mscale_all_dim:
      return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
    return self._temperature(1.0)

  @property
  def softmax_scale(self) -> float:
    """Multiplies MLA's softmax scale: the square of V3's sqrt(t)."""
    return self._temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's piecewise frequency scaling.

  Attributes:
    factor: by which low frequencies are divided.
    low_freq_factor: rotations over the original context below which a frequency is low.
    high_freq_factor: rotations above which a frequency is kept; between, interpolated.
    original_seq_len: of the context before.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_seq_len: int = 8192

  def __post_init__(self):
    require_positive(self, "factor", "low_freq_factor", "original_seq_len")
    require(self.high_freq_factor > self.low_freq_factor,
            "Llama3Scaling.high_freq_factor must exceed low_freq_factor")


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Position interpolation.

  Attributes:
    factor: by which every frequency is divided.
  """

  factor: float = 1.0

  def __post_init__(self):
    require_positive(self, "factor")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embeddings.

  Attributes:
    theta: the base of the frequencies.
    layout: which dimensions rotate together: adjacent pairs, as in DeepSeek ("interleaved"), or
      the two halves, as in Llama and Qwen ("half").
    scaling: how the context has been extended; None if it has not.
  """

  theta: float = 10000.0
  layout: Literal["interleaved", "half"] = "interleaved"
  scaling: YarnScaling | Llama3Scaling | LinearScaling | None = None

  def __post_init__(self):
    require(self.theta > 1, f"RopeConfig.theta={self.theta} must exceed 1")
    require(self.layout in ("interleaved", "half"),
            f"RopeConfig.layout={self.layout!r} must be 'interleaved' or 'half'")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention (V3 section 2.1.1).

  Attributes:
    num_heads: n_h, attention heads.
    kv_lora_rank: d_c, width of the key-value latent.
    qk_nope_head_dim: d_h, of queries and keys, without positions.
    qk_rope_head_dim: d_h^R, of queries and of the shared key, rotated by position.
    v_head_dim: of values.
    q_lora_rank: d_c', width of the query latent; None leaves queries uncompressed.
    latent_norm: RMSNorm on both latents, which is in the released code and in section 4.2, not in
      the equations.
  """

  num_heads: int
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int
  q_lora_rank: int | None = None
  latent_norm: bool = True

  def __post_init__(self):
    require_positive(
        self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    require(self.q_lora_rank is None or self.q_lora_rank > 0,
            f"MLAConfig.q_lora_rank={self.q_lora_rank} must be positive or None")
    require(self.qk_rope_head_dim % 2 == 0,
            f"MLAConfig.qk_rope_head_dim={self.qk_rope_head_dim} must be even: it rotates pairs")

  @property
  def rope_dim(self) -> int:
    return self.qk_rope_head_dim

  @property
  def score_dim(self) -> int:
    """Width of one query or key head."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def value_dim(self) -> int:
    return self.v_head_dim

  @property
  def cache_elements(self) -> int:
    return self.kv_lora_rank + self.qk_rope_head_dim

  def matmul_params(self, d_model: int) -> int:
    q_in = d_model if self.q_lora_rank is None else self.q_lora_rank
    return (
        (0 if self.q_lora_rank is None else d_model * self.q_lora_rank)
        + q_in * self.num_heads * self.score_dim
        + d_model * self.cache_elements
        + self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        + self.num_heads * self.v_head_dim * d_model)

  def vector_params(self, d_model: int) -> int:
    del d_model
    return (self.kv_lora_rank + (self.q_lora_rank or 0)) if self.latent_norm else 0


@dataclasses.dataclass(frozen=True)
class GQAConfig:
  """Grouped-query attention: MHA when `num_kv_heads == num_heads`, MQA when it is 1.

  Attributes:
    num_heads: of queries.
    num_kv_heads: of keys and values.
    head_dim: of queries, keys and values.
    qkv_bias: biases on their projections (Qwen2).
    out_bias: a bias on the output projection.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool = False
  out_bias: bool = False

  def __post_init__(self):
    require_positive(self, "num_heads", "num_kv_heads", "head_dim")
    require(self.num_heads % self.num_kv_heads == 0,
            f"GQAConfig.num_heads={self.num_heads} does not divide into "
            f"num_kv_heads={self.num_kv_heads}")
    require(self.head_dim % 2 == 0,
            f"GQAConfig.head_dim={self.head_dim} must be even: rotary positions rotate pairs")

  @property
  def rope_dim(self) -> int:
    return self.head_dim

  @property
  def score_dim(self) -> int:
    return self.head_dim

  @property
  def value_dim(self) -> int:
    return self.head_dim

  @property
  def cache_elements(self) -> int:
    return 2 * self.num_kv_heads * self.head_dim

  def matmul_params(self, d_model: int) -> int:
    return d_model * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

  def vector_params(self, d_model: int) -> int:
    heads = self.num_heads + 2 * self.num_kv_heads
    return self.qkv_bias * heads * self.head_dim + self.out_bias * d_model


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """DeepSeekMoE (V3 section 2.1.2; V2 section 2.2). The defaults are V3's.

  Attributes:
    num_experts: N_r, routed experts.
    experts_per_token: K_r, routed experts that compute each token.
    expert_dim: width of an expert's SwiGLU.
    num_shared_experts: N_s, experts that compute every token.
    num_groups: of experts; routing is limited to some groups for each token.
    groups_per_token: M, groups that a token's experts may come from.
    group_score: how groups are ranked: by the sum of their two highest scores (V3), or by the
      highest (V2).
    score: the affinity of token and expert: sigmoid (V3) or softmax over experts (V2).
    normalize_gates: the chosen experts' gates are divided by their sum (V3).
    route_scale: multiplies the gates.
    balancing_bias: loss-free balancing's b_i is added to scores for choosing experts; it lives in
      the variable collection `router`.
  """

  num_experts: int = 256
  experts_per_token: int = 8
  expert_dim: int = 2048
  num_shared_experts: int = 1
  num_groups: int = 8
  groups_per_token: int = 4
  group_score: Literal["top2", "max"] = "top2"
  score: Literal["sigmoid", "softmax"] = "sigmoid"
  normalize_gates: bool = True
  route_scale: float = 2.5
  balancing_bias: bool = True

  def __post_init__(self):
    require_positive(self, "num_experts", "experts_per_token", "expert_dim", "num_groups",
                     "groups_per_token", "route_scale")
    require(self.num_shared_experts >= 0,
            f"MoEConfig.num_shared_experts={self.num_shared_experts} must not be negative")
    require(self.group_score in ("top2", "max"),
            f"MoEConfig.group_score={self.group_score!r} must be 'top2' or 'max'")
    require(self.score in ("sigmoid", "softmax"),
            f"MoEConfig.score={self.score!r} must be 'sigmoid' or 'softmax'")
    require(self.num_experts % self.num_groups == 0,
            f"MoEConfig.num_experts={self.num_experts} does not divide into "
            f"num_groups={self.num_groups}")
    require(self.groups_per_token <= self.num_groups,
            f"MoEConfig.groups_per_token={self.groups_per_token} exceeds "
            f"num_groups={self.num_groups}")
    reachable = self.groups_per_token * self.num_experts // self.num_groups
    require(self.experts_per_token <= reachable,
            f"MoEConfig.experts_per_token={self.experts_per_token} exceeds the {reachable} "
            f"experts in groups_per_token={self.groups_per_token} groups")

  @property
  def shared_dim(self) -> int:
    """Width of the shared experts, which run as one SwiGLU."""
    return self.num_shared_experts * self.expert_dim


@dataclasses.dataclass(frozen=True)
class MTPConfig:
  """Multi-token prediction (V3 section 2.2).

  Attributes:
    depth: D, modules, each of which predicts one token further.
    concat: which half of M_k's input comes first: the hidden state, as in the paper's eq. 21, or
      the embedding, as in the released weights.
    hidden: whether a module reads the previous hidden state after or before its final norm; the
      paper does not say, the released weights are used after it.
  """

  depth: int = 1
  concat: Literal["hidden_first", "embedding_first"] = "hidden_first"
  hidden: Literal["post_norm", "pre_norm"] = "post_norm"

  def __post_init__(self):
    require_positive(self, "depth")
    require(self.concat in ("hidden_first", "embedding_first"),
            f"MTPConfig.concat={self.concat!r} must be 'hidden_first' or 'embedding_first'")
    require(self.hidden in ("post_norm", "pre_norm"),
            f"MTPConfig.hidden={self.hidden!r} must be 'post_norm' or 'pre_norm'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: V3, V2, Llama and Qwen2 are values of this class.

  Attributes:
    vocab_size: rows of the embedding.
    d_model: width of the residual stream.
    num_layers: of the trunk, MTP modules not included.
    attention: latent attention, or grouped queries.
    ffn_dim: width of the dense layers' SwiGLU.
    moe: experts of the other layers; None makes all layers dense.
    num_dense_layers: the first layers, which have no experts.
    mtp: multi-token prediction; None for none.
    rope: rotary positions.
    max_seq_len: what positions were trained or extended to. It bounds nothing in the network, but
      is written to and read from checkpoints.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output head is the embedding, transposed.
    init_std: standard deviation of every matrix at initialisation.
    numerics: formats of parameters and products.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  attention: MLAConfig | GQAConfig
  ffn_dim: int
  moe: MoEConfig | None = None
  num_dense_layers: int = 0
  mtp: MTPConfig | None = None
  rope: RopeConfig = RopeConfig()
  max_seq_len: int = 4096
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  init_std: float = 0.006
  numerics: Numerics = NUMERICS["fp32"]

  def __post_init__(self):
    require_positive(self, "vocab_size", "d_model", "num_layers", "ffn_dim", "max_seq_len",
                     "norm_eps", "init_std")
    limit = self.num_layers if self.moe else 0
    require(0 <= self.num_dense_layers <= limit,
            f"ModelConfig.num_dense_layers={self.num_dense_layers} must lie in 0..{limit}"
            + ("" if self.moe else ": without moe every layer is dense, leave it 0"))

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers if self.moe else 0

  def layer_stacks(self) -> tuple[tuple[str, int, bool], ...]:
    """The layers as (name, count, has experts), in order: what is scanned together."""
    stacks = (("dense_layers", self.num_layers - self.num_moe_layers, False),
              ("moe_layers", self.num_moe_layers, True))
    return tuple(stack for stack in stacks if stack[1])

  # Counting. Every method is arithmetic on the fields; tests hold it to the built model exactly.

  def _ffn_matmul_params(self, experts: bool, active: bool) -> int:
    if not experts:
      return 3 * self.d_model * self.ffn_dim
    moe = self.moe
    routed = moe.experts_per_token if active else moe.num_experts
    swiglu_width = routed * moe.expert_dim + moe.shared_dim
    return 3 * self.d_model * swiglu_width + self.d_model * moe.num_experts

  def _layer_matmul_params(self, experts: bool, active: bool) -> int:
    return self.attention.matmul_params(self.d_model) + self._ffn_matmul_params(experts, active)

  def _layer_vector_params(self) -> int:
    return self.attention.vector_params(self.d_model) + 2 * self.d_model

  def _trunk_params(self, active: bool) -> int:
    layers = sum(count * (self._layer_matmul_params(experts, active) + self._layer_vector_params())
                 for _, count, experts in self.layer_stacks())
    return layers + self.d_model

  def _mtp_matmul_params(self, active: bool) -> int:
    return 2 * self.d_model**2 + self._layer_matmul_params(self.moe is not None, active)

  def mtp_param_count(self) -> int:
    """Parameters the MTP modules own: not the embedding and head they share with the trunk."""
    if not self.mtp:
      return 0
    vectors = self._layer_vector_params() + 3 * self.d_model
    return self.mtp.depth * (self._mtp_matmul_params(active=False) + vectors)

  def param_count(self, *, mtp: bool = False) -> int:
    """All parameters, input embedding and output head included.

    Router biases are not counted: they are state, not parameters (V3 has 58 x 256 of them).

    Args:
      mtp: also count `mtp_param_count()`.
    """
    matrices = 1 if self.tie_embeddings else 2
    total = matrices * self.vocab_size * self.d_model + self._trunk_params(active=False)
    return total + (self.mtp_param_count() if mtp else 0)

  def active_param_count(self) -> int:
    """Parameters that one token's forward pass multiplies with.

    The chosen and the shared experts, the router, the attention, the norms and the output head; not
    the input embedding (a lookup), not MTP, not router biases.
    """
    return self.vocab_size * self.d_model + self._trunk_params(active=True)

  def flops_per_token(self, seq_len: int, *, training: bool = True, mtp: bool = False) -> int:
    """Floating-point operations per token of a causal sequence, a multiply-add counting two.

    Matrix products with the active experts, router and head, and attention's scores and weighted
    sum over the causal half (`seq_len / 2` keys on average, MLA in its expanded form). Not counted:
    the embedding lookup, norms, rotations, softmax, recomputation. This is the count behind the 250
    GFLOP a token at 4096 that arXiv:2505.09343, table 2, gives for V3.

    Args:
      seq_len: tokens in the sequence.
      training: forward and backward (three times forward), else forward alone.
      mtp: also count the MTP modules, each with its own pass through the head.
    """
    head = self.vocab_size * self.d_model
    attention = self.attention
    scores = attention.num_heads * (attention.score_dim + attention.value_dim) * seq_len // 2
    weights = head + sum(count * (self._layer_matmul_params(experts, active=True) + scores)
                         for _, count, experts in self.layer_stacks())
    if mtp and self.mtp:
      weights += self.mtp.depth * (self._mtp_matmul_params(active=True) + scores + head)
    return (6 if training else 2) * weights

  def kv_cache_elements_per_token(self) -> int:
    """Numbers the cache keeps per token over all layers, MTP not included (V2 table 1)."""
    return self.num_layers * self.attention.cache_elements
