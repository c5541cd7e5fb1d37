"""The architecture as data: frozen dataclasses, validated on construction.

Parameters, FLOPs and cache sizes are computed from them, without building a model.

Names are the papers' where they have one; `docs/library.md` maps them to those of the released
`config.json`.
"""

import dataclasses
import math
from typing import Literal

from model.checks import require, require_positive
from model.numerics import NUMERICS, Numerics


def _temperature(factor: float, mscale: float) -> float:
  """Returns 0.1 mscale ln(factor) + 1, or 1 if the context is not extended."""
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class _SoftmaxTemperature:
  """The softmax temperature that DeepSeek's attention has with every type of scaling.

  It is a base of the dataclasses below, whose fields `factor` and `mscale_all_dim` it reads.
  """

  @property
  def softmax_scale(self) -> float:
    """What MLA's softmax scale is multiplied by: the square of sqrt(t) in V3 section 4.3."""
    return _temperature(self.factor, self.mscale_all_dim) ** 2

  def _require_positive_temperatures(self, *names: str) -> None:
    for name in names:
      value = getattr(self, name)
      require(_temperature(self.factor, value) > 0,
              f"{type(self).__name__}.{name}={value} makes a temperature that is not positive")


@dataclasses.dataclass(frozen=True)
class YarnScaling(_SoftmaxTemperature):
  """YaRN context extension (arXiv:2309.00071) with DeepSeek's two temperature terms.

  Each is m = 0.1 mscale ln(factor) + 1. The released models set both coefficients to the same value
  (V3: 1; V2: 0.707), so that the rotation is not scaled and the softmax scale is multiplied by m^2.
  Zero means absent: if either is zero, the rotation is scaled by 0.1 ln(factor) + 1, as in YaRN for
  Llama.

  Attributes:
    factor: ratio of the extended context to the original one.
    original_seq_len: tokens in the original context.
    beta_fast: frequencies with more rotations than this over the original context are kept.
    beta_slow: frequencies with fewer rotations than this are divided by `factor`; those between
      `beta_slow` and `beta_fast` are interpolated. If the two are equal (Kimi K2), at most one pair
      of dimensions is interpolated.
    mscale: coefficient of the temperature of the rotated dimensions.
    mscale_all_dim: coefficient of the temperature of all dimensions.
    attention_factor: what the rotation is scaled by; None derives it from the temperatures.
    truncate: whether the first and the last pair that are interpolated are rounded to whole pairs.
  """

  factor: float = 40.0
  original_seq_len: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    require_positive(self, "factor", "original_seq_len", "beta_fast", "beta_slow")
    require(self.beta_fast >= self.beta_slow,
            f"YarnScaling.beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}")
    self._require_positive_temperatures("mscale", "mscale_all_dim")
    if self.attention_factor is not None:
      require_positive(self, "attention_factor")

  @property
  def rotation_scale(self) -> float:
    """What cos and sin are multiplied by; the rotated part of the scores gets its square."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return _temperature(self.factor, self.mscale) / _temperature(self.factor, self.mscale_all_dim)
    return _temperature(self.factor, 1.0)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(_SoftmaxTemperature):
  """Llama 3.1's piecewise frequency scaling.

  Attributes:
    factor: what low frequencies are divided by.
    low_freq_factor: a frequency is low if it has fewer rotations than this over the original
      context.
    high_freq_factor: frequencies with more rotations than this are kept; those between the two are
      interpolated.
    original_seq_len: tokens in the original context.
    mscale_all_dim: coefficient of MLA's softmax temperature, as in YarnScaling; 0 for none.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_seq_len: int = 8192
  mscale_all_dim: float = 0.0

  def __post_init__(self):
    require_positive(self, "factor", "low_freq_factor", "original_seq_len")
    require(self.high_freq_factor > self.low_freq_factor,
            "Llama3Scaling.high_freq_factor must exceed low_freq_factor")
    self._require_positive_temperatures("mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class LinearScaling(_SoftmaxTemperature):
  """Position interpolation (arXiv:2306.15595).

  Attributes:
    factor: what every frequency is divided by.
    mscale_all_dim: coefficient of MLA's softmax temperature, as in YarnScaling; 0 for none.
  """

  factor: float = 1.0
  mscale_all_dim: float = 0.0

  def __post_init__(self):
    require_positive(self, "factor")
    self._require_positive_temperatures("mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embeddings.

  Attributes:
    theta: base of the frequencies.
    layout: which dimensions form a pair: adjacent ones, as in DeepSeek ("interleaved"), or the
      corresponding ones of the two halves, as in Llama and Qwen ("half").
    scaling: how frequencies are scaled to extend the context; None if they are not.
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
    num_heads: n_h, number of attention heads.
    kv_lora_rank: d_c, width of the key-value latent.
    qk_nope_head_dim: d_h, width of the content part of a query or key head, which is not rotated.
    qk_rope_head_dim: d_h^R, width of the rotated part of a query head, and of the shared key.
    v_head_dim: width of a value head.
    q_lora_rank: d_c', width of the query latent; None leaves queries uncompressed.
    latent_norm: whether both latents are normalised by an RMSNorm. It is in the released code and
      in section 4.2, but not in the equations.
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
    num_heads: number of query heads.
    num_kv_heads: number of key and value heads.
    head_dim: width of a query, key or value head.
    qkv_bias: whether the projections to queries, keys and values have biases (Qwen2).
    out_bias: whether the output projection has a bias.
    qk_norm: whether every query and key head is normalised by an RMSNorm before it is rotated; the
      heads of a layer share one scale for queries and one for keys (Qwen3).
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False

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
    biases = self.qkv_bias * heads * self.head_dim + self.out_bias * d_model
    return biases + self.qk_norm * 2 * self.head_dim


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """DeepSeekMoE (V3 section 2.1.2; V2 section 2.2). The defaults are V3's.

  Attributes:
    num_experts: N_r, number of routed experts.
    experts_per_token: K_r, number of routed experts that compute each token.
    expert_dim: hidden width of an expert's SwiGLU.
    num_shared_experts: N_s, number of experts that compute every token.
    num_groups: number of groups that the routed experts are divided into.
    groups_per_token: M, number of groups that a token's experts may come from.
    group_score: how groups are ranked: by the sum of their two highest scores ("top2", V3) or by
      their highest ("max", V2).
    score: affinity of token and expert: "sigmoid" (V3) or "softmax" over the experts (V2).
    normalize_gates: whether the gates of a token's experts are divided by their sum (V3).
    route_scale: factor of the gates.
    balancing_bias: whether the bias b_i of loss-free balancing is added to the scores when experts
      are chosen. It is a variable of the collection `router`.
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
    depth: D, number of modules, each of which predicts one token further ahead.
    concat: which half of M_k's input comes first: the hidden state, as in the paper's eq. 21, or
      the embedding, as in the released weights.
    hidden: whether a module reads the previous depth's hidden state after ("post_norm") or before
      its final norm. The paper does not say; the released weights are used with "post_norm".
    form: "sequential" for V3's causal chain, in which M_k reads the depth before and token i + k;
      "parallel" for independent heads as in arXiv:2404.19737, each of which reads nothing but the
      trunk's hidden state, in both halves of its input, so that it has as many parameters.
  """

  depth: int = 1
  concat: Literal["hidden_first", "embedding_first"] = "hidden_first"
  hidden: Literal["post_norm", "pre_norm"] = "post_norm"
  form: Literal["sequential", "parallel"] = "sequential"

  def __post_init__(self):
    require_positive(self, "depth")
    require(self.concat in ("hidden_first", "embedding_first"),
            f"MTPConfig.concat={self.concat!r} must be 'hidden_first' or 'embedding_first'")
    require(self.hidden in ("post_norm", "pre_norm"),
            f"MTPConfig.hidden={self.hidden!r} must be 'post_norm' or 'pre_norm'")
    require(self.form in ("sequential", "parallel"),
            f"MTPConfig.form={self.form!r} must be 'sequential' or 'parallel'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: V3, V2, Llama, Qwen2 and Qwen3 are values of this class.

  Attributes:
    vocab_size: number of rows of the embedding.
    d_model: width of the residual stream.
    num_layers: number of layers of the trunk, without MTP modules.
    attention: multi-head latent attention, or grouped-query attention.
    ffn_dim: hidden width of the SwiGLU of dense layers.
    moe: the mixture of experts in the other layers; None makes all layers dense.
    num_dense_layers: number of layers, counted from the first, that are dense although there is a
      `moe`.
    mtp: multi-token prediction; None for none.
    rope: rotary position embeddings.
    max_seq_len: the context, in tokens, that the positions were trained for or extended to. The
      network has no such limit; the value is read from and written to checkpoints.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: whether the output head is the transposed embedding.
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
    """Returns the stacks of layers that are scanned, in order, as (name, count, has experts)."""
    stacks = (("dense_layers", self.num_layers - self.num_moe_layers, False),
              ("moe_layers", self.num_moe_layers, True))
    return tuple(stack for stack in stacks if stack[1])

  # Counts. Every method is arithmetic on the fields; tests check that it agrees with the model.

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
    """Returns the number of parameters of the MTP modules, without shared embedding and head."""
    if not self.mtp:
      return 0
    vectors = self._layer_vector_params() + 3 * self.d_model
    return self.mtp.depth * (self._mtp_matmul_params(active=False) + vectors)

  def param_count(self, *, mtp: bool = False) -> int:
    """Returns the number of parameters, input embedding and output head included.

    Router biases are not counted: they are state, not parameters (V3 has 58 x 256 of them).

    Args:
      mtp: also count `mtp_param_count()`.
    """
    matrices = 1 if self.tie_embeddings else 2
    total = matrices * self.vocab_size * self.d_model + self._trunk_params(active=False)
    return total + (self.mtp_param_count() if mtp else 0)

  def active_param_count(self) -> int:
    """Returns the number of parameters that the forward pass of one token multiplies with.

    These are the chosen and the shared experts, the router, attention, norms and the output head;
    not the input embedding (a lookup), MTP modules and router biases.
    """
    return self.vocab_size * self.d_model + self._trunk_params(active=True)

  def flops_per_token(self, seq_len: int, *, training: bool = True, mtp: bool = False) -> int:
    """Returns the floating-point operations per token of a causal sequence.

    A multiply-add counts as two. Counted are all matrix products with weights (of the experts, only
    the active ones), and attention's scores and weighted sum over the causal half (`seq_len / 2`
    keys on average, MLA in its expanded form). Not counted are the embedding lookup, norms,
    rotations, softmax and recomputation. This gives the 250 GFLOP per token at 4096 that
    arXiv:2505.09343, table 2, has for V3.

    Args:
      seq_len: tokens in the sequence.
      training: whether to count forward and backward pass (three times the forward pass), or the
        forward pass only.
      mtp: whether to count the MTP modules too, each with its own pass through the head.
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
    """Returns the number of values cached per token over all layers, without MTP (V2 table 1)."""
    return self.num_layers * self.attention.cache_elements
