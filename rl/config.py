"""An RL run as data: frozen dataclasses, validated when made.

Defaults are R1's (Nature 2025, Methods; arXiv:2501.12948v2, appendix B) where they carry over to
small runs, and our own where they do not: learning rate, rollout and lengths.
"""

import dataclasses
import difflib
from typing import Literal

from model.checks import require, require_positive, require_range
from rl.objective import SPECS, ObjectiveSpec
from rl.tasks import get_task
from rl.templates import get_template
from train.config import MeshConfig, OptimizerConfig

_ONE_DEVICE = MeshConfig()
# As in R1, the rate stays where it is; small steps would be lost in bfloat16 moments.
_OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4, schedule="constant", weight_decay=0.0, moments="float32")

# What rewards are compared with, where the objective's paper says something else than GRPO's.
_BASELINES = {"dr_grpo": "mean", "rloo": "leave_one_out", "reinforce": "leave_one_out"}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """A rollout.

  Attributes:
    num_prompts: questions.
    num_generations: completions of each: a group.
    temperature: of sampling, and of every log-probability.
    max_prompt_length: tokens; a longer prompt is an error.
    max_completion_length: tokens after which a completion is cut off.
    slots: sequences that a device decodes at a time; None for all of its own.
  """

  num_prompts: int = 32
  num_generations: int = 16
  temperature: float = 1.0
  max_prompt_length: int = 32
  max_completion_length: int = 96
  slots: int | None = None

  def __post_init__(self):
    require_positive(self, "num_prompts", "num_generations", "temperature", "max_prompt_length",
                     "max_completion_length")
    require(self.slots is None or self.slots > 0,
            f"SamplingConfig.slots={self.slots} must be positive, or none for all")

  @property
  def num_sequences(self) -> int:
    return self.num_prompts * self.num_generations


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Weights of the rewards; 0 leaves one out.

  Attributes:
    accuracy: the right answer, in its block (R1: 1).
    format: one think block, then one answer block (R1: 1).
    language: share of the prompt's language in the reasoning (R1's first stage, for consistency).
    tests: unit tests passed, in a sandbox.
    overlong: DAPO's penalty (eq. 13) within `overlong_tokens` of the limit.
    overlong_tokens: see above.
    random: heads or tails, whatever was written: a control.
  """

  accuracy: float = 1.0
  format: float = 1.0
  language: float = 0.0
  tests: float = 0.0
  overlong: float = 0.0
  overlong_tokens: int = 16
  random: float = 0.0

  def __post_init__(self):
    require_positive(self, "overlong_tokens")
    require(any(self.weights().values()), "RewardConfig: every weight is 0, nothing is rewarded")

  def weights(self) -> dict[str, float]:
    """By name, those that are not 0."""
    names = ("accuracy", "format", "language", "tests", "overlong", "random")
    return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is maximised, and how often with the same rollout.

  Attributes:
    name: a key of `rl.objective.SPECS`; or "rft", the likelihood of right completions
      (rejection-sampling fine-tuning, DeepSeekMath section 5.2).
    baseline: what rewards are compared with in their group; None for what the objective's paper
      says.
    epsilon, epsilon_high, beta: in place of the objective's own, unless None.
    minibatches: optimizer steps that share a rollout (R1: 16).
    inner_epochs: passes over it.
    micro_batch_size: sequences in memory at a time; None for all of a minibatch.
    refresh_every: steps after which the reference becomes the policy (R1: 400); 0 for never.
    sampler: who samples: the policy, or the model that the run began with (offline).
    mask_truncated: completions that were cut off are not learned from.
    resample: rollouts at most, per step, to replace groups whose rewards are all equal (DAPO's
      dynamic sampling); 1 for none.
    bias_rate: of the router's balancing bias; 0 freezes it.
    sequence_balance: weight of V3's sequence-wise balancing loss.
    gae_lambda: of "ppo" (R1's appendix A.3: 1 is close to GRPO, 0.95 worse).
    value_learning_rate: of its value model; None for the policy's.
    routing: which experts an update uses: "free", what its routers choose; "observed", likewise,
      and the metric `routing_agreement` says how often the sampler's chose the same; "replayed",
      the sampler's.
  """

  name: str = "grpo_r1"
  baseline: Literal["mean_std", "mean", "leave_one_out"] | None = None
  epsilon: float | None = None
  epsilon_high: float | None = None
  beta: float | None = None
  minibatches: int = 1
  inner_epochs: int = 1
  micro_batch_size: int | None = None
  refresh_every: int = 400
  sampler: Literal["policy", "initial"] = "policy"
  mask_truncated: bool = False
  resample: int = 1
  bias_rate: float = 0.0
  sequence_balance: float = 0.0
  gae_lambda: float = 1.0
  value_learning_rate: float | None = None
  routing: Literal["free", "observed", "replayed"] = "free"

  def __post_init__(self):
    names = (*SPECS, "rft")
    if self.name not in names:
      near = difflib.get_close_matches(self.name, names, 1, cutoff=0)[0]
      raise ValueError(f"ObjectiveConfig.name={self.name!r} does not exist; did you mean {near!r}? "
                       f"There are: {', '.join(names)}")
    require_positive(self, "minibatches", "inner_epochs", "resample")
    require_range(self, 0, float("inf"), "refresh_every", "bias_rate", "sequence_balance")
    require_range(self, 0, 1, "gae_lambda")
    require(self.value_learning_rate is None or self.value_learning_rate > 0,
            f"ObjectiveConfig.value_learning_rate={self.value_learning_rate} must be positive")
    require(self.sampler == "policy" or self.name == "rft",
            f"ObjectiveConfig.sampler='initial' is for name='rft': {self.name} learns from what "
            "the policy itself has sampled")
    self.spec(1)

  def spec(self, max_length: int) -> ObjectiveSpec:
    """The objective, for completions of at most `max_length` tokens."""
    if self.name == "rft":
      return ObjectiveSpec(surrogate="none", aggregation="token_mean")
    spec = SPECS[self.name]
    if self.name == "dr_grpo":
      spec = spec.replace(max_length=max_length)
    told = {name: getattr(self, name) for name in ("epsilon", "epsilon_high", "beta")}
    told = {name: value for name, value in told.items() if value is not None}
    if told.get("beta") and spec.kl_in == "none":
      told["kl_in"] = "loss"
    return spec.replace(**told)

  @property
  def group_baseline(self) -> str:
    return self.baseline or _BASELINES.get(self.name, "mean_std")

  @property
  def updates(self) -> int:
    """Optimizer steps per rollout."""
    return self.minibatches * self.inner_epochs


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """The loop.

  Attributes:
    steps: rollouts.
    seed: of everything.
    eval_every: steps between evaluations; 0 for before the first and after the last only.
    eval_problems: held-out problems of an evaluation.
    eval_samples: completions of each.
    checkpoint_every: steps between checkpoints; 0 for at the end only.
    keep_checkpoints: how many of the newest stay.
    max_skipped_steps: as in `TrainConfig`.
    samples_logged: completions written to `completions.jsonl` at each evaluation.
  """

  steps: int = 50
  seed: int = 0
  eval_every: int = 0
  eval_problems: int = 128
  eval_samples: int = 4
  checkpoint_every: int = 20
  keep_checkpoints: int = 2
  max_skipped_steps: int = 5
  samples_logged: int = 4

  def __post_init__(self):
    require_positive(self, "steps", "eval_problems", "eval_samples", "keep_checkpoints")
    require_range(self, 0, float("inf"), "eval_every", "checkpoint_every", "max_skipped_steps",
                  "samples_logged")
    require(0 <= self.seed < 2**31, f"LoopConfig.seed={self.seed} must lie in 0..2^31 - 1")


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """Everything that decides a run's numbers, but for the model that it begins with.

  Attributes:
    task: see `rl.tasks.get_task`.
    template: see `rl.templates.get_template`.
    sampling: a rollout.
    rewards: their weights.
    objective: what is maximised.
    optimizer: AdamW and its schedule.
    loop: steps, evaluations and checkpoints.
    mesh: the devices. The sequences of rollouts and updates are divided over all axes, the state
      as `MeshConfig` says.
  """

  task: str = "arithmetic"
  template: str = "short"
  sampling: SamplingConfig = SamplingConfig()
  rewards: RewardConfig = RewardConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  optimizer: OptimizerConfig = _OPTIMIZER
  loop: LoopConfig = LoopConfig()
  mesh: MeshConfig = _ONE_DEVICE

  def __post_init__(self):
    get_task(self.task)
    get_template(self.template)
    sampling, objective = self.sampling, self.objective
    require(objective.name in ("rft", "ppo") or sampling.num_generations > 1,
            "sampling.num_generations=1 leaves nothing to compare a reward with: at least 2")
    require(objective.name != "rft" or self.rewards.accuracy != 0,
            "objective.name='rft' learns from right completions: rewards.accuracy must not be 0")
    sequences, minibatches = sampling.num_sequences, objective.minibatches
    require(sequences % minibatches == 0,
            f"objective.minibatches={minibatches} must divide the {sequences} sequences of a "
            "rollout")
    micro = objective.micro_batch_size
    require(micro is None or (micro > 0 and (sequences // minibatches) % micro == 0),
            f"objective.micro_batch_size={micro} must divide the {sequences // minibatches} "
            "sequences of a minibatch")
    require(not self.rewards.overlong
            or self.rewards.overlong_tokens <= sampling.max_completion_length,
            f"rewards.overlong_tokens={self.rewards.overlong_tokens} must be at most "
            f"sampling.max_completion_length={sampling.max_completion_length}")
