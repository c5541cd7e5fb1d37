"""Compare FP8 training by V3's recipe with bfloat16, and with changes to parts of the recipe.

The paper compares losses of models of 16 B and 230 B parameters over about 1 T tokens; here small
models are trained with the same quantisation of every operand of every product. Only bfloat16's
learning rate is swept, and all arms train at it, as in the paper. A seed determines the initial
values and the order of the data, so paired runs differ only in rounding.

Resolution: rounding makes paired runs diverge, so the losses of a pair differ by some standard
deviation s, which is smaller than that between two seeds; the report has both. For n = 4 pairs, the
interval is the mean +- 1.6 s. So the paper's bound of 0.25 % can be decided if s is at most 0.1 %,
and a higher loss of an arm is detected if the difference exceeds about 2 s. Effects that take 300 B
tokens to appear are expected to stay unresolved.

The study can be run in parts: `--arms=bf16,fp8,block_gradients --seeds=3` makes 12 runs with three
programs instead of 27 with six, which takes about five minutes at scale `gpu`. `--max_minutes=4`
stops after that time. In either case, the rest can be run later with the same folder.

Losses are compared as logarithms, whose differences are relative errors.
"""

import dataclasses
import math

import model
from experiments.stats import Claim
from experiments.studies.study import Arm, Comparison, Scale, Study
from experiments.studies.text.precision_runs import PrecisionRuns
from train.config import BalanceConfig, DataConfig, RunConfig, TrainConfig

# The rate with which the committed results were made.
_BALANCE = BalanceConfig(bias_rate=1e-3)


def _nano() -> model.ModelConfig:
  """Returns a model of 1.5 M parameters in two layers.

  Except for those of the attention heads, its widths are multiples of V3's 128-wide tiles.
  """
  nano = model.get_config("nano")
  return dataclasses.replace(
      nano, d_model=256, num_layers=2, ffn_dim=512, mtp=None, numerics=model.NUMERICS["bf16"],
      attention=dataclasses.replace(nano.attention, q_lora_rank=128, kv_lora_rank=128),
      moe=dataclasses.replace(nano.moe, num_experts=4, experts_per_token=2, expert_dim=128,
                              num_groups=1, groups_per_token=1))


def _gpu_model() -> model.ModelConfig:
  """Returns a model of 112 M parameters, 31 M active, with V3's head widths of 192 and 128.

  The FP8 kernels require that the contracted and the output width of every product be multiples of
  128. This includes the width of the latent together with the 128-wide shared key.
  """
  small = model.get_config("small")
  return dataclasses.replace(
      small, vocab_size=8192, mtp=None, numerics=model.NUMERICS["bf16"],
      attention=model.MLAConfig(num_heads=4, q_lora_rank=256, kv_lora_rank=256,
                                qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=128),
      moe=dataclasses.replace(small.moe, num_experts=16, experts_per_token=2, expert_dim=512,
                              num_groups=1, groups_per_token=1))


def _fp8(name: str, recipe: str) -> Arm:
  """Returns an arm that trains in FP8 with one of `pallas_kernels.RECIPES`."""
  return Arm(name, ("model.numerics=fp8", f"model.numerics.recipe={recipe}"))


_ARMS = (
    Arm("bf16"),
    _fp8("fp8", "v3"),
    _fp8("per_tensor", "per_tensor"),
    _fp8("e5m2_gradients", "e5m2_gradients"),
    _fp8("block_gradients", "block_gradients"),
    # The other arms keep moments in bfloat16, as V3 does.
    Arm("float32_moments", ("optimizer.moments=float32",)),
)

_MARGIN = math.log1p(0.0025)  # the paper's bound on the relative error of the loss


def _equal(name: str, arm: str, baseline: str, effect: float | None,
           paper: str) -> tuple[Comparison, ...]:
  """Returns the claims that training and validation loss of two arms are within the bound."""
  return tuple(
      Comparison(f"{name} ({kind})", f"log_{kind}_loss", arm, baseline,
                 Claim("equivalent", margin=_MARGIN, paper=effect), paper)
      for kind in ("training", "validation"))


def _worse(name: str, arm: str, paper: str) -> Comparison:
  """Returns the claim that an arm's training loss is higher than that of V3's recipe."""
  return Comparison(name, "log_training_loss", arm, "fp8", Claim("sign", sign=1), paper)


_COMPARISONS = (
    *_equal("FP8's loss is within 0.25 % of bfloat16's", "fp8", "bf16", 0.0003,
            "within 0.25 %, about +0.03 % (16 B)"),
    *_equal("loss with bfloat16 moments is within 0.25 % of float32 moments", "bf16",
            "float32_moments", 0.0, "no degradation observed"),
    _worse("one scale per tensor gives a higher loss than one per tile", "per_tensor",
           "outliers degrade accuracy"),
    _worse("gradients in E5M2 give a higher loss than in E4M3", "e5m2_gradients",
           "E4M3 for all tensors, as its mantissa is longer"),
    _worse("gradients in 128 x 128 blocks give a higher loss than in 1 x 128 tiles",
           "block_gradients", "diverges (16 B, after 300 B tokens)"),
)

STUDY = Study(
    name="fp8",
    claim="With E4M3 for all tensors and one scale per 1 x 128 tile of activations or 128 x 128 "
          "block of weights, the loss of FP8 training stays within 0.25 % of bfloat16's; it is "
          "higher with coarser scales, fewer mantissa bits, or gradients scaled in blocks.",
    source="arXiv:2412.19437, section 3.3, figure 10, appendix B",
    arms=_ARMS, baseline="bf16", comparisons=_COMPARISONS, kind=PrecisionRuns,
    one_rate=True,
    scales={
        "smoke": Scale(
            RunConfig(
                balance=_BALANCE, model=_nano(),
                data=DataConfig(tokenizer="bytes", seq_len=64, heldout_bytes=10_000),
                train=TrainConfig(steps=4, batch_size=4, checkpoint_every=0)),
            learning_rates=(1e-3, 3e-3, 1e-2), seeds=2, minutes=0.2,
            hardware="2 CPU cores"),
        # 0.08 M tokens per run.
        "cpu": Scale(
            RunConfig(
                balance=_BALANCE, model=_nano(),
                data=DataConfig(seq_len=128, bpe_vocab_size=512, heldout_bytes=15_000),
                train=TrainConfig(steps=150, batch_size=4, checkpoint_every=0)),
            learning_rates=(4e-4, 8e-4, 1.6e-3), seeds=4, minutes=0.7,
            hardware="2 busy CPU cores"),
        # 3.3 M tokens per run, 88 M in all: as many as can be trained in minutes, in addition to
        # compiling six programs.
        "gpu": Scale(
            RunConfig(
                balance=_BALANCE, model=_gpu_model(),
                data=DataConfig(seq_len=256, bpe_vocab_size=8192, heldout_bytes=100_000),
                train=TrainConfig(steps=200, batch_size=64, checkpoint_every=0)),
            learning_rates=(5e-4, 1e-3, 2e-3), seeds=4, minutes=0.1,
            hardware="one H200, plus minutes of compilation per program"),
    })
