"""Training in FP8: whether it costs anything, and what each part of V3's recipe is good for.

The paper compares losses of models of 16 B and 230 B parameters over about 1 T tokens; here the
same products, operand by operand, train small models. Only bfloat16's learning rate is swept, and
all arms train at it, as in the paper: a seed fixes initial values and the order of the data, so
paired runs differ in rounding alone.

Resolution: rounding sends paired runs apart, so that losses of a pair differ by some standard
deviation s, less than those of two seeds; the report has both. The interval over n pairs is 1.6 s
to either side for n = 4. So the paper's bound of 0.25 % is decided if s is 0.1 % or less, and an
arm's harm shows if it is more than about 2 s. Effects that take 300 B tokens to show are expected
to stay unresolved.

Parts of it: `--arms=bf16,fp8,block_gradients --seeds=3` sweeps and trains 12 times with three
programs, not 27 times with six; at `gpu` scale that is about five minutes. `--max_minutes=4` stops
in time. Either way the same folder takes the rest later.

Losses enter as logarithms, whose differences are relative errors.
"""

import dataclasses
import math

import model
from experiments.stats import Claim
from experiments.studies.precision_runs import PrecisionRuns
from experiments.studies.study import Arm, Comparison, Scale, Study
from train.config import DataConfig, RunConfig, TrainConfig


def _nano() -> model.ModelConfig:
  """1.5 M parameters in two layers, as wide as V3's tiles but for attention's heads."""
  nano = model.get_config("nano")
  return dataclasses.replace(
      nano, d_model=256, num_layers=2, ffn_dim=512, mtp=None, numerics=model.NUMERICS["bf16"],
      attention=dataclasses.replace(nano.attention, q_lora_rank=128, kv_lora_rank=128),
      moe=dataclasses.replace(nano.moe, num_experts=4, experts_per_token=2, expert_dim=128,
                              num_groups=1, groups_per_token=1))


def _gpu_model() -> model.ModelConfig:
  """112 M parameters, 31 M active; V3's kind of heads, 192 and 128 wide.

  Every width that a product in FP8 sums over or gives is a multiple of 128, the latent with the
  shared key's 128 too, as the kernels need it.
  """
  small = model.get_config("small")
  return dataclasses.replace(
      small, vocab_size=8192, mtp=None, numerics=model.NUMERICS["bf16"],
      attention=model.MLAConfig(num_heads=4, q_lora_rank=256, kv_lora_rank=256,
                                qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=128),
      moe=dataclasses.replace(small.moe, num_experts=16, experts_per_token=2, expert_dim=512,
                              num_groups=1, groups_per_token=1))


def _fp8(name: str, recipe: str) -> Arm:
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

_MARGIN = math.log1p(0.0025)  # the paper's bound


def _equal(name: str, arm: str, baseline: str, effect: float | None,
           paper: str) -> tuple[Comparison, ...]:
  return tuple(
      Comparison(f"{name} ({kind})", f"log_{kind}_loss", arm, baseline,
                 Claim("equivalent", margin=_MARGIN, paper=effect), paper)
      for kind in ("training", "validation"))


def _worse(name: str, arm: str, paper: str) -> Comparison:
  return Comparison(name, "log_training_loss", arm, "fp8", Claim("sign", sign=1), paper)


_COMPARISONS = (
    *_equal("FP8 loses less than 0.25 % against bfloat16", "fp8", "bf16", 0.0003,
            "within 0.25 %, about +0.03 % (16 B)"),
    *_equal("bfloat16 moments lose nothing against float32", "bf16", "float32_moments", 0.0,
            "no degradation observed"),
    _worse("one scale for a whole matrix is worse than one for each tile", "per_tensor",
           "outliers degrade accuracy"),
    _worse("E5M2 for gradients is worse than E4M3", "e5m2_gradients",
           "E4M3 on all tensors, for the mantissa"),
    _worse("blocks of 128 x 128 are worse for gradients than tiles of 1 x 128", "block_gradients",
           "diverges (16 B, after 300 B tokens)"),
)

STUDY = Study(
    name="fp8",
    claim="With E4M3 everywhere and a scale for each tile of 1 x 128 activations or 128 x 128 "
          "weights, training in FP8 follows bfloat16 within 0.25 % of the loss; coarser scales, "
          "fewer bits of mantissa or gradients in blocks do not do as well.",
    source="arXiv:2412.19437, section 3.3, figure 10, appendix B",
    arms=_ARMS, baseline="bf16", comparisons=_COMPARISONS, kind=PrecisionRuns,
    one_rate=True,
    scales={
        "smoke": Scale(
            RunConfig(
                model=_nano(),
                data=DataConfig(tokenizer="bytes", seq_len=64, heldout_bytes=10_000),
                train=TrainConfig(steps=4, batch_size=4, checkpoint_every=0)),
            learning_rates=(1e-3, 3e-3, 1e-2), seeds=2, minutes=0.2,
            hardware="2 CPU cores"),
        # 0.08 M tokens a run.
        "cpu": Scale(
            RunConfig(
                model=_nano(),
                data=DataConfig(seq_len=128, bpe_vocab_size=512, heldout_bytes=15_000),
                train=TrainConfig(steps=150, batch_size=4, checkpoint_every=0)),
            learning_rates=(4e-4, 8e-4, 1.6e-3), seeds=4, minutes=0.7,
            hardware="2 busy CPU cores"),
        # 3.3 M tokens a run, 88 M in all: as many as fit in minutes beside compiling six programs.
        "gpu": Scale(
            RunConfig(
                model=_gpu_model(),
                data=DataConfig(seq_len=256, bpe_vocab_size=8192, heldout_bytes=100_000),
                train=TrainConfig(steps=200, batch_size=64, checkpoint_every=0)),
            learning_rates=(5e-4, 1e-3, 2e-3), seeds=4, minutes=0.1,
            hardware="one H200, and minutes to compile each program"),
    })
