"""Compare methods of balancing experts: a routing bias, and losses over sequences or batches.

The papers train 1 B and 3 B parameters on 100 to 200 B tokens. Here the same methods are applied to
small models that train for minutes, so effects on balance are expected to be visible, and effects
that need size to stay unresolved. Every strength of a loss is an arm of its own; only the learning
rate is tuned.

Matched between arms: parameters, active parameters, tokens, initial values, order of the data.
"""

import dataclasses

import model
from experiments.stats import Claim
from experiments.studies.study import Arm, Comparison, Scale, Study
from train.config import BalanceConfig, DataConfig, RunConfig, Source, TrainConfig

_OFF = BalanceConfig(bias_rate=0.0, sequence_weight=0.0)


def _nano(experts: int) -> model.ModelConfig:
  nano = model.get_config("nano")
  return dataclasses.replace(
      nano, num_layers=3, mtp=None, moe=dataclasses.replace(
          nano.moe, num_experts=experts, num_groups=1, groups_per_token=1))


def gpu_model() -> model.ModelConfig:
  """Returns a model of 26 M parameters, 7 M active, with 64 experts per MoE layer."""
  small = model.get_config("small")
  return dataclasses.replace(
      small, d_model=256, num_layers=4, ffn_dim=768, mtp=None, numerics=model.NUMERICS["bf16"],
      moe=dataclasses.replace(small.moe, num_groups=1, groups_per_token=1))


def _scaled(weight: str, strengths: tuple[str, ...]) -> tuple[Arm, ...]:
  return tuple(Arm(f"{weight}_{strength}", (f"balance.{weight}_weight={strength}",))
               for strength in strengths)


_ARMS = (
    Arm("nothing"),
    # What carries over between runs of different length is gamma x steps. It is 40 in the paper
    # and 2 here, as the bias is added to sigmoid scores, which lie in 0..1, and has to converge
    # within a few hundred steps.
    Arm("loss_free", ("balance.bias_rate=0.01", "balance.bias_fraction=1")),
    *_scaled("expert", ("1e-3", "1e-2", "1e-1")),
    *_scaled("sequence", ("1e-2", "1e-1")),
    *_scaled("batch", ("1e-2", "1e-1")),
)

# Margins: half of the papers' effect of 0.006 nats would be below the seed standard deviation
# here, so claims of no difference use 0.02 nats, about half a per cent of the loss at these sizes.
_COMPARISONS = (
    Comparison("the bias balances better than no balancing", "max_violation", "loss_free",
               "nothing", Claim("sign", sign=-1), "experts are overloaded without balancing"),
    Comparison("the bias balances better than the expert-level loss at the paper's weight",
               "max_violation", "loss_free", "expert_1e-3", Claim("sign", sign=-1, paper=-0.68),
               "0.04 against 0.72 (1 B)"),
    Comparison("the bias keeps MaxVio below 0.3", "max_violation", "loss_free", None,
               Claim("threshold", sign=-1, threshold=0.3, paper=0.04), "0.04 (1 B)"),
    Comparison("validation loss is lower with the bias than with the expert-level loss",
               "validation_loss", "loss_free", "expert_1e-3",
               Claim("sign", sign=-1, paper=-0.0063), "-0.0063 nats (1 B)"),
    Comparison("at equal MaxVio, the expert-level loss costs more quality than the bias",
               "validation_loss", "expert_*", "loss_free", Claim("sign", sign=1),
               "worse at equal MaxVio (figure 2)"),
    Comparison("a sequence-wise loss reduces specialisation", "specialisation", "sequence_*",
               "loss_free", Claim("sign", sign=-1), "weaker specialisation patterns (V3 figure 9)"),
    Comparison("a sequence-wise loss costs quality", "validation_loss", "sequence_*", "loss_free",
               Claim("sign", sign=1, paper=0.005), "+0.005 nats (1 B, 3 B)"),
    Comparison("a batch-wise loss costs no quality", "validation_loss", "batch_*", "loss_free",
               Claim("equivalent", margin=0.02, paper=0.0), "0.000 nats (1 B, 3 B)"),
    Comparison("experts specialise more with a batch-wise than with a sequence-wise loss",
               "specialisation", "batch_1e-1", "sequence_1e-1", Claim("sign", sign=1),
               "batch-wise balancing is more flexible (V3 section 4.5.3)"),
)

REAL_DOMAINS = (Source("builtin:bible"), Source("builtin:python"), Source("builtin:arithmetic"))

STUDY = Study(
    name="load_balancing",
    claim="A bias on the router's scores balances experts better than an auxiliary loss, and at a "
          "lower cost in quality; a batch-wise loss is as good, but a sequence-wise loss keeps "
          "experts from specialising in domains.",
    source="arXiv:2408.15664, tables 2 and 6, figure 2; arXiv:2412.19437, section 4.5",
    arms=_ARMS, baseline="loss_free", comparisons=_COMPARISONS,
    scales={
        "smoke": Scale(
            RunConfig(
                model=_nano(8), balance=_OFF,
                data=DataConfig(tokenizer="bytes", seq_len=64, heldout_bytes=10_000,
                                sources=REAL_DOMAINS),
                train=TrainConfig(steps=6, batch_size=4, checkpoint_every=0)),
            learning_rates=(1e-3, 3e-3, 1e-2), seeds=2, minutes=0.1,
            hardware="2 CPU cores"),
        # 16 experts, 4 of them active per token; 0.4 M tokens per run, a small part of an epoch.
        "cpu": Scale(
            RunConfig(
                model=_nano(16), balance=_OFF,
                data=DataConfig(seq_len=128, bpe_vocab_size=1024, heldout_bytes=100_000,
                                sources=REAL_DOMAINS),
                train=TrainConfig(steps=200, batch_size=16, checkpoint_every=100)),
            learning_rates=(2e-3, 5e-3, 1.2e-2), seeds=4, minutes=1.6,
            hardware="2 CPU cores"),
        # 64 experts; 8 M tokens per run. All arms share one compiled program.
        "gpu": Scale(
            RunConfig(
                model=gpu_model(), balance=_OFF,
                data=DataConfig(seq_len=512, bpe_vocab_size=8192, heldout_bytes=200_000,
                                sources=REAL_DOMAINS),
                train=TrainConfig(steps=250, batch_size=64, checkpoint_every=0)),
            learning_rates=(1e-3, 2e-3, 4e-3), seeds=4, minutes=0.11,
            hardware="one H200"),
    })
