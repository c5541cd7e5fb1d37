"""The configuration of an RL run: frozen dataclasses, validated on construction.

Defaults are R1's (Nature 2025, Methods; arXiv:2501.12948v2, appendix B) where they carry over to
small runs, and our own where they do not: learning rate, size of the rollout and lengths.
"""

import dataclasses
from typing import Literal

from model.checks import did_you_mean, require, require_positive, require_range
from rl.advantages import LARGEST_REWARD
from rl.objective import SPECS, ObjectiveSpec
from rl.tasks import get_task
from train.config import MeshConfig, OptimizerConfig
from train.templates import check_template
from train.trackers import check_names

_ONE_DEVICE = MeshConfig()
# The learning rate is constant, as in R1. The moments are float32: bfloat16 ones would lose small
# updates.
_OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4, schedule="constant", weight_decay=0.0, moments="float32")

_REWARDS = ("accuracy", "format", "language", "tests", "overlong", "random")
# Fields of `ObjectiveConfig` that replace those of `ObjectiveSpec` with the same name.
_OVERRIDES = ("epsilon", "epsilon_high", "beta", "aggregation", "kl", "kl_level", "dual_clip",
              "dual_clip_ratio", "importance", "importance_cap")
# Baselines of the objectives whose papers do not use GRPO's, "mean_std".
_BASELINES = {"dr_grpo": "mean", "rloo": "leave_one_out", "reinforce": "leave_one_out"}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a rollout, the completions that one RL step learns from, is sampled.

  Attributes:
    num_prompts: prompts per rollout.
    num_generations: completions of each prompt, which form a group (R1: 16).
    temperature: sampling temperature, at which all log-probabilities are computed too (R1: 1).
    max_prompt_length: longest prompt allowed, in tokens.
    long_prompts: what happens to questions whose prompt is longer. "error": the run ends; of a
      file, all questions are checked before the first step. "skip": they are left out, and the
      metric `prompts/skipped` counts them.
    max_completion_length: tokens after which a completion is truncated.
    slots: number of sequences that one device decodes at a time; None for all sequences of that
      device.
    drafts: tokens that the MTP modules of the model draft at a time, which are kept where they are
      what would have been sampled: the completions are the same. It pays where few sequences are
      decoded at a time; 0 for none.
    cache_dtype: format of the cache while sampling; None for the format that the model computes in.
      One of 8 bits samples from a slightly different distribution, which the metric `gap` shows.
  """

  num_prompts: int = 32
  num_generations: int = 16
  temperature: float = 1.0
  max_prompt_length: int = 32
  long_prompts: Literal["error", "skip"] = "error"
  max_completion_length: int = 96
  slots: int | None = None
  drafts: int = 0
  cache_dtype: Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"] | None = None

  def __post_init__(self):
    require_positive(self, "num_prompts", "num_generations", "temperature", "max_prompt_length",
                     "max_completion_length")
    require(self.drafts >= 0, f"SamplingConfig.drafts={self.drafts} must not be negative")
    require(self.slots is None or self.slots > 0,
            f"SamplingConfig.slots={self.slots} must be positive, or none to decode all sequences "
            "at once")

  @property
  def num_sequences(self) -> int:
    """Sequences per rollout."""
    return self.num_prompts * self.num_generations


@dataclasses.dataclass(frozen=True)
class CustomReward:
  """A reward function of the user's own.

  Attributes:
    function: `module:function`, a function with the signature of those in `rl.rewards`,
      `reward(prompts, completions, **columns) -> list[float | None]`. It is given the task's
      columns, all those of a file included, and "question", "num_tokens" and "row".
    weight: the reward's weight.
  """

  function: str
  weight: float = 1.0

  def __post_init__(self):
    module, _, name = self.function.partition(":")
    require(all(part.isidentifier() for part in (*module.split("."), name)),
            f"CustomReward.function={self.function!r} must have the form module:function, such as "
            "my_rewards:brevity")

  @classmethod
  def parse(cls, text: str) -> "CustomReward":
    """Returns the reward that a bare `module:function` stands for, with weight 1."""
    return cls(function=text)

  @property
  def name(self) -> str:
    """The reward's name in metrics, which is the function's."""
    return self.function.partition(":")[2]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Weights of the rewards that are added up; a reward of weight 0 is not computed.

  Attributes:
    accuracy: weight of the accuracy reward, 1 for a correct answer in the answer block and else 0
      (R1: 1). With 0, a file's rows may have any text as their answer, or none.
    format: weight of the format reward, 1 for one think block followed by one answer block and
      else 0 (R1: 1).
    language: weight of the language-consistency reward, the fraction of the reasoning's words that
      are in the prompt's language (Nature 2025, eq. 7; used from R1's first RL stage on).
    tests: weight of the unit-test reward, 1 for a program that passes its tests in the sandbox and
      else 0.
    overlong: weight of DAPO's soft overlong punishment (eq. 13), from 0 to -1 within the last
      `overlong_tokens` tokens before the length limit.
    overlong_tokens: number of tokens before `sampling.max_completion_length` over which the
      `overlong` penalty grows.
    random: weight of a random reward of 0 or 1, independent of correctness: a control.
    custom: reward functions of your own, `module:function` or
      `CustomReward(function=module:function, weight=0.5)`, separated by commas.
  """

  accuracy: float = 1.0
  format: float = 1.0
  language: float = 0.0
  tests: float = 0.0
  overlong: float = 0.0
  overlong_tokens: int = 16
  random: float = 0.0
  custom: tuple[CustomReward, ...] = ()

  def __post_init__(self):
    require_positive(self, "overlong_tokens")
    require(any(self.weights().values()), "RewardConfig: every weight is 0, so nothing is rewarded")
    total = sum(map(abs, self.weights().values()))
    require(total <= LARGEST_REWARD, f"RewardConfig: the weights add up to {total:g}, and rewards "
            f"above {LARGEST_REWARD:g} are not supported: choose smaller weights")
    names = [*_REWARDS, *(reward.name for reward in self.custom)]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"RewardConfig.custom: {', '.join(sorted(twice))} is the name of more than "
            "one reward: rename the function, as metrics have its name")

  def weights(self) -> dict[str, float]:
    """Returns the weights that are not 0, by the reward's name."""
    weights = {name: getattr(self, name) for name in _REWARDS}
    weights |= {reward.name: reward.weight for reward in self.custom}
    return {name: weight for name, weight in weights.items() if weight}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is maximised, and how many optimizer steps are taken on one rollout.

  Attributes:
    name: the objective, a key of `rl.objective.SPECS`; or "rft", the likelihood of correct
      completions (rejection-sampling fine-tuning, DeepSeekMath section 5.2).
    baseline: what a reward is compared with in its group: "mean_std" (GRPO), "mean" (Dr. GRPO) or
      "leave_one_out" (RLOO), see `rl.advantages.group_advantages`; None for that of the objective's
      paper.
    epsilon: the policy ratio is clipped below at 1 - epsilon and, if there is no epsilon_high,
      above at 1 + epsilon; None for the objective's own.
    epsilon_high: the policy ratio is clipped above at 1 + epsilon_high; None for the objective's
      own, which may be none.
    beta: weight of the KL divergence from the reference; None for the objective's own. If the
      objective has no KL, a positive beta adds one to the loss.
    aggregation: how tokens are averaged, "sequence_mean", "token_mean" or "constant_length", see
      `rl.objective.ObjectiveSpec`; None for the objective's own. "constant_length", where it is not
      the objective's own, divides by `sampling.max_completion_length`.
    kl: the estimator of the KL divergence, "k1", "k2" or "k3"; None for the objective's own.
    kl_level: the unit of a KL in the loss, "token", "token_sum" or "sequence"; None for the
      objective's own.
    dual_clip: bound the loss of tokens with a negative advantage (dual-clip PPO, Ye et al. 2020);
      None for the objective's own.
    dual_clip_ratio: the bound of `dual_clip` as a multiple of the advantage, above 1; None for the
      objective's own.
    importance: weight each token by the ratio of its probabilities in the trainer and in the
      sampler, for a sampler that computes other probabilities for the same policy (truncated
      importance sampling); None for the objective's own.
    importance_cap: the largest weight of `importance`; None for the objective's own.
    minibatches: number of minibatches, with one optimizer step each, into which a rollout is
      divided (R1: 16).
    inner_epochs: passes over each rollout (R1: 1).
    micro_batch_size: sequences that are in memory at a time, gradients being accumulated over a
      minibatch; None for the whole minibatch at once.
    refresh_every: RL steps between replacements of the reference by the current policy (R1: 400);
      0 to keep the initial model as the reference.
    sampler: the model that samples: "policy", the one being trained, or "initial", the one that the
      run started from (offline, for "rft" only).
    mask_truncated: leave out of the loss completions that were truncated at the length limit, as
      DAPO's overlong filtering does (arXiv:2503.14476, section 3.4).
    truncated_in_baseline: whether the rewards of completions that `mask_truncated` leaves out still
      count in the mean and standard deviation of their group. DAPO describes a mask of the loss
      only, and TRL's `mask_truncated_completions` computes advantages before it masks: true. If
      false, a group consists of the completions that ended, so that a truncated one does not raise
      the advantage of the others.
    resample: largest number of rollouts sampled per RL step in order to replace groups whose
      rewards are all equal (DAPO's dynamic sampling); 1 for no replacement.
    bias_rate: update rate of the routers' load-balancing bias (V3's gamma); 0 freezes the bias.
    sequence_balance: weight of V3's sequence-wise balancing loss.
    entropy_weight: weight of an entropy bonus, the mean over all learned tokens of the policy's
      entropy in nats, at the sampling temperature and summed exactly over the vocabulary; the
      metric `loss_entropy` is minus that mean. 0 for no bonus.
    gae_lambda: GAE's lambda, used by "ppo" (R1's appendix A.3: 1 is close to GRPO, 0.95 worse).
    value_learning_rate: peak learning rate of the value model, used by "ppo"; None for the
      policy's learning rate.
    mtp_learning_rate: peak learning rate of the MTP modules, which then learn to predict the
      completions that are learned from, by an optimizer of their own and without any effect on the
      policy; the metric `mtp_loss` is their cross-entropy in nats. None leaves the modules as they
      are. There is no weight of that loss, as AdamW's steps do not depend on it.
    routing: the experts to which an update's forward pass sends each token. "free": those that its
      own routers choose. "observed": the same, and the metric `routing_agreement` reports the
      fraction of the sampler's choices that they make too. "replayed": those that were chosen
      during sampling.
  """

  name: str = "grpo_r1"
  baseline: Literal["mean_std", "mean", "leave_one_out"] | None = None
  epsilon: float | None = None
  epsilon_high: float | None = None
  beta: float | None = None
  aggregation: Literal["sequence_mean", "token_mean", "constant_length"] | None = None
  kl: Literal["k1", "k2", "k3"] | None = None
  kl_level: Literal["token", "token_sum", "sequence"] | None = None
  dual_clip: bool | None = None
  dual_clip_ratio: float | None = None
  importance: bool | None = None
  importance_cap: float | None = None
  minibatches: int = 1
  inner_epochs: int = 1
  micro_batch_size: int | None = None
  refresh_every: int = 400
  sampler: Literal["policy", "initial"] = "policy"
  mask_truncated: bool = False
  truncated_in_baseline: bool = True
  resample: int = 1
  bias_rate: float = 0.0
  sequence_balance: float = 0.0
  entropy_weight: float = 0.0
  gae_lambda: float = 1.0
  value_learning_rate: float | None = None
  mtp_learning_rate: float | None = None
  routing: Literal["free", "observed", "replayed"] = "free"

  def __post_init__(self):
    names = (*SPECS, "rft")
    if self.name not in names:
      raise ValueError(f"ObjectiveConfig.name={self.name!r} does not exist"
                       f"{did_you_mean(self.name, names)} The objectives are: {', '.join(names)}")
    require_positive(self, "minibatches", "inner_epochs", "resample")
    require_range(self, 0, float("inf"), "refresh_every", "bias_rate", "sequence_balance",
                  "entropy_weight")
    require_range(self, 0, 1, "gae_lambda")
    for name in ("value_learning_rate", "mtp_learning_rate"):
      value = getattr(self, name)
      require(value is None or value > 0,
              f"ObjectiveConfig.{name}={value} must be positive, or none")
    require(self.sampler == "policy" or self.name == "rft",
            f"ObjectiveConfig.sampler='initial' is for name='rft' only: {self.name} must learn "
            "from completions that the policy itself has sampled")
    require(self.truncated_in_baseline or self.mask_truncated,
            "ObjectiveConfig.truncated_in_baseline=False is for mask_truncated=True: a completion "
            "that is learned from needs a reward relative to its group")
    require(self.truncated_in_baseline or self.name not in ("ppo", "rft"),
            f"ObjectiveConfig.truncated_in_baseline=False has no effect: {self.name} compares no "
            "rewards within a group")
    self._check_overrides(self.spec(1))

  def _check_overrides(self, spec: ObjectiveSpec) -> None:
    """Raises ValueError for a field that is set but would change nothing."""
    unused = {}
    if self.name == "rft":
      unused = dict.fromkeys(_OVERRIDES[3:], "name='rft' has no policy ratio and no KL")
    elif spec.kl_in == "none":
      unused = dict.fromkeys(("kl", "kl_level"), "there is no KL: set a positive beta")
    elif self.name == "ppo" and self.kl != "k1":
      unused["kl"] = "PPO's reward has the KL by k1"
    if not spec.dual_clip:
      unused.setdefault("dual_clip_ratio", "it is for dual_clip=True")
    if not spec.importance:
      unused.setdefault("importance_cap", "it is for importance=True")
    for name, reason in unused.items():
      value = getattr(self, name)
      require(value is None, f"ObjectiveConfig.{name}={value} would have no effect: {reason}, or "
              f"leave {name} out")

  def spec(self, max_length: int) -> ObjectiveSpec:
    """Returns the objective, for completions of at most `max_length` tokens."""
    if self.name == "rft":
      return ObjectiveSpec(surrogate="none", aggregation="token_mean")
    spec = SPECS[self.name]
    overrides = {name: getattr(self, name) for name in _OVERRIDES}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    aggregation = overrides.get("aggregation", spec.aggregation)
    if aggregation == "constant_length" and (
        self.name == "dr_grpo" or aggregation != spec.aggregation):
      spec = spec.replace(max_length=max_length)
    if overrides.get("beta") and spec.kl_in == "none":
      overrides["kl_in"] = "loss"
    return spec.replace(**overrides)

  @property
  def group_baseline(self) -> str:
    """The baseline of `rl.advantages.group_advantages`: `baseline`, or else the objective's own."""
    return self.baseline or _BASELINES.get(self.name, "mean_std")

  @property
  def updates(self) -> int:
    """Optimizer steps per rollout."""
    return self.minibatches * self.inner_epochs


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """The training loop: its length, evaluations and checkpoints.

  Attributes:
    steps: number of RL steps; each samples a rollout and updates the policy on it.
    seed: seed of sampling, of the order of minibatches and, from the second pass over the questions
      of a file on, of their order; the problems and the order of the first pass have a seed of
      their own, in the task's spec.
    nudge: whether every parameter of the policy is moved to the next larger number of its format
      before the first step, as in `TrainConfig.nudge`.
    eval_every: RL steps between evaluations; 0 to evaluate only before the first and after the last
      step.
    eval_problems: number of held-out problems in an evaluation.
    eval_samples: completions of each problem in an evaluation.
    checkpoint_every: RL steps between checkpoints; 0 for one at the end only.
    keep_checkpoints: number of checkpoints kept, the newest ones.
    max_skipped_steps: number of optimizer steps, over the whole run, whose loss or gradient may be
      non-finite; such steps are skipped, and with one more the run stops with an error.
    samples_logged: number of completions written to `completions.jsonl` at each evaluation.
    log_to: trackers to which metrics are sent besides `metrics.jsonl`, as in `TrainConfig.log_to`.
  """

  steps: int = 50
  seed: int = 0
  nudge: bool = False
  eval_every: int = 0
  eval_problems: int = 128
  eval_samples: int = 4
  checkpoint_every: int = 20
  keep_checkpoints: int = 2
  max_skipped_steps: int = 5
  samples_logged: int = 4
  log_to: tuple[str, ...] = ("tensorboard",)

  def __post_init__(self):
    require_positive(self, "steps", "eval_problems", "eval_samples", "keep_checkpoints")
    require_range(self, 0, float("inf"), "eval_every", "checkpoint_every", "max_skipped_steps",
                  "samples_logged")
    check_names(self.log_to, "LoopConfig.log_to")
    require(0 <= self.seed < 2**31, f"LoopConfig.seed={self.seed} must lie in 0..2^31 - 1")


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """Everything that determines the results of an RL run, except the model that it starts from.

  Attributes:
    task: spec of the task whose problems are posed, such as `arithmetic:terms=3,digits=2`,
      `file:PATH` or `gym:NAME`; see `rl.tasks.get_task`.
    template: name of the prompt template: "r1", "short", "short_think" or another one of
      `train.templates.TEMPLATES`; or "chat", the chat template of the model's own Hugging Face
      folder.
    system: with the template "chat", the system's message; empty for none, or for the template's
      own.
    sampling: how a rollout is sampled.
    rewards: weights of the rewards.
    objective: what is maximised, and how many optimizer steps are taken on one rollout.
    optimizer: AdamW and its learning-rate schedule, for the policy and, with "ppo", the value
      model.
    loop: length of the run, evaluations and checkpoints.
    mesh: devices along each axis of the mesh. The sequences of a rollout are divided over all
      devices, those of an update over the data and fsdp axes; the state is sharded as `MeshConfig`
      describes.
  """

  task: str = "arithmetic"
  template: str = "short"
  system: str = ""
  sampling: SamplingConfig = SamplingConfig()
  rewards: RewardConfig = RewardConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  optimizer: OptimizerConfig = _OPTIMIZER
  loop: LoopConfig = LoopConfig()
  mesh: MeshConfig = _ONE_DEVICE

  def __post_init__(self):
    get_task(self.task)
    check_template(self.template, self.system)
    sampling, objective = self.sampling, self.objective
    require(objective.name in ("rft", "ppo") or sampling.num_generations > 1,
            "sampling.num_generations=1 leaves nothing to compare a reward with: set at least 2")
    require(objective.name != "rft" or self.rewards.accuracy != 0,
            "objective.name='rft' learns from correct completions: rewards.accuracy must not be 0")
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
