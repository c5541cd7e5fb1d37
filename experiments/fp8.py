"""Training in FP8: whether it costs anything, and what each part of V3's recipe is good for.

The paper compares losses of models of 16 B and 230 B parameters over about 1 T tokens; here the
same products, operand by operand, train small models. A seed fixes initial values and the order of
the data, so paired runs differ in rounding alone, and their losses by less than those of two seeds;
still, effects that take 300 B tokens to show are expected to stay unresolved.

Losses enter as logarithms, whose differences are relative errors.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import model
from experiments.runs import Task
from experiments.stats import Claim
from experiments.study import Arm, Comparison, Scale, Study
from experiments.text_runs import TextRuns
from train.config import DataConfig, RunConfig, TrainConfig
from train.run_folder import RunFolder


class PrecisionRuns(TextRuns):
  """Training on text, with logarithms of the losses among the metrics."""

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    runs = super().train(tasks, folder, max_seconds)
    return runs and [run | {"metrics": run["metrics"] | log_losses(run)} for run in runs]


def log_losses(run: Mapping[str, Any]) -> dict[str, float]:
  """Logarithms of a run's held-out loss, and of its training loss in the last half of the steps.

  Args:
    run: as `TextRuns.train` gives it.
  """
  late = [math.log(loss) for _, loss in run["curve"][len(run["curve"]) // 2:]]
  return {"log_validation_loss": math.log(run["metrics"]["validation_loss"]),
          "log_training_loss": math.fsum(late) / len(late)}


def _nano() -> model.ModelConfig:
  """Three layers, as wide as V3's tiles or wider but for attention's latents and heads."""
  nano = model.get_config("nano")
  return dataclasses.replace(
      nano, d_model=256, num_layers=3, ffn_dim=512, mtp=None, numerics=model.NUMERICS["bf16"],
      moe=dataclasses.replace(nano.moe, num_experts=8, experts_per_token=2, expert_dim=128,
                              num_groups=1, groups_per_token=1))


def _gpu_model() -> model.ModelConfig:
  """`small` without MTP: 64 experts, every width a multiple of 128."""
  return dataclasses.replace(
      model.get_config("small"), mtp=None, numerics=model.NUMERICS["bf16"])


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
                 Claim("equivalent", margin=_MARGIN, paper=effect), paper, at_one_rate=True)
      for kind in ("training", "validation"))


def _worse(name: str, arm: str, paper: str) -> Comparison:
  return Comparison(name, "log_training_loss", arm, "fp8", Claim("sign", sign=1), paper,
                    at_one_rate=True)


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
    scales={
        "smoke": Scale(
            RunConfig(
                model=_nano(),
                data=DataConfig(tokenizer="bytes", seq_len=64, heldout_bytes=10_000),
                train=TrainConfig(steps=4, batch_size=4, checkpoint_every=0)),
            learning_rates=(1e-3, 3e-3, 1e-2), seeds=2, minutes=0.5,
            hardware="2 CPU cores"),
        # 0.2 M tokens a run.
        "cpu": Scale(
            RunConfig(
                model=_nano(),
                data=DataConfig(seq_len=128, bpe_vocab_size=1024, heldout_bytes=100_000),
                train=TrainConfig(steps=200, batch_size=8, checkpoint_every=100)),
            learning_rates=(5e-4, 2e-3, 8e-3), seeds=4, minutes=4,
            hardware="2 CPU cores"),
        # 131 M tokens a run.
        "gpu": Scale(
            RunConfig(
                model=_gpu_model(),
                data=DataConfig(seq_len=512, bpe_vocab_size=16384, heldout_bytes=500_000),
                train=TrainConfig(steps=2000, batch_size=128, checkpoint_every=0)),
            learning_rates=(5e-4, 1e-3, 2e-3), seeds=4, minutes=10,
            hardware="one H200, not yet measured"),
    })
