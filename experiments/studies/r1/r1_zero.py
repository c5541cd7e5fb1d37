"""R1-Zero in miniature: a base that has read noisy solutions improves by RL from rules alone.

The base is pretrained on worked solutions of every quality, so that it solves some problems some of
the time. Then comes RL with rewards for accuracy and format, and nothing else: no SFT. By default
only `grpo` runs; the other arms are controls and variants, for `--arms`. `format_only` and `random`
start from the same base and show what is gained without a reward for correct answers. `rft` learns
from the correct completions alone. The arms about reflection have bases of their own, whose
documents take a step back never or in one of ten; of the others' documents one in a hundred does.

Learning rates are fixed, not swept. Matched between arms on one base: problems, samples, rollouts,
updates and evaluations.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import R1_ZERO
from experiments.studies.study import Arm, Comparison, Scale, Study

_ARMS = (
    Arm("grpo"),
    Arm("format_only", ("rl.rewards.accuracy=0",)),
    Arm("random", ("rl.rewards.accuracy=0", "rl.rewards.format=0", "rl.rewards.random=1")),
    Arm("rft", ("rl.objective.name=rft",)),
    Arm("ppo", ("rl.objective.name=ppo",)),
    Arm("without_reflection", ("documents.noise.self_correction=0",)),
    Arm("reflection", ("documents.noise.self_correction=0.1",)),
)

# Of 200 problems, 0.02 is four: rates of the same problems before and after move less by chance.
_MARGIN = 0.02
_MINUTES = {"smoke": (1, "2 CPU cores"), "demo": (4, "2 CPU cores"), "cpu": (12, "2 CPU cores"),
            "code": (20, "2 CPU cores"), "gpu": (6, "one H200")}


def _gain(name: str, metric: str, sign: int, paper: str = "", arm: str = "grpo") -> Comparison:
  """That RL raises a rate by more than the margin, or that it does not."""
  return Comparison(name, f"{metric}_gain", arm, None,
                    Claim("threshold", sign=sign, threshold=_MARGIN), paper)


STUDY = Study(
    name="r1_zero",
    claim="RL from rule-based rewards alone, without SFT, teaches a base model to solve problems "
          "that it rarely solved before.",
    source="arXiv:2501.12948, section 2.2; arXiv:2402.03300, section 5.2",
    arms=_ARMS, baseline="grpo",
    comparisons=(
        _gain("RL raises pass@1", "pass@1", 1, "AIME 15.6 % to 71.0 %"),
        _gain("RL raises the majority vote", "cons@k", 1, "AIME cons@64 86.7 % after RL"),
        _gain("it does so by more than format: pass@1 by lenient match rises", "lenient_pass@1", 1),
        _gain("the format reward alone does not", "pass@1", -1, arm="format_only"),
        _gain("a random reward does not", "pass@1", -1, arm="random"),
        Comparison("RL gains more than the format reward alone", "pass@1_gain", "grpo",
                   "format_only", Claim("sign", sign=1, margin=_MARGIN)),
        Comparison("RL gains more than rejection-sampling fine-tuning", "pass@1", "grpo", "rft",
                   Claim("sign", sign=1), "GRPO above online RFT (DeepSeekMath figure 5)"),
        _gain("completions take a step back more often after RL", "reflection", 1,
              "reflection emerges (the aha moment)"),
        _gain("also where the base has read more of that", "reflection", 1, arm="reflection")),
    scales={name: Scale(config, (), seeds=1, minutes=_MINUTES[name][0], hardware=_MINUTES[name][1])
            for name, config in R1_ZERO.items()},
    kind=RLRuns, default_arms=("grpo",), keep_runs=True)
