"""R1-Zero in miniature: RL from rule-based rewards on a base trained on noisy solutions.

The base is pretrained on noisy worked solutions, so that it solves some problems some of the time.
RL with rewards for accuracy and format follows, without SFT. By default only the arm `grpo` runs;
the other arms are controls and variants for `--arms`. `format_only` and `random` start from the
same base, and show how much is gained without a reward for correct answers. `rft`, which is
rejection-sampling fine-tuning, learns from correct completions only. `without_reflection` and
`reflection` have bases of their own: of their documents, none and one in ten, respectively, takes a
step back with "wait"; of those of the other arms' base, it is one in a hundred.

Learning rates are fixed, not swept. Matched between arms with the same base: problems, samples,
rollouts, updates and evaluations.
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

# 0.02 is 4 of 200 problems. Rates of the same problems before and after RL differ less by chance.
_MARGIN = 0.02
_MINUTES = {"smoke": (1, "2 CPU cores"), "demo": (4, "2 CPU cores"), "cpu": (12, "2 CPU cores"),
            "code": (20, "2 CPU cores"), "gpu": (6, "one H200")}


def _gain(name: str, metric: str, sign: int, paper: str = "", arm: str = "grpo") -> Comparison:
  """Returns the claim that RL raises a rate by more than the margin or, for sign -1, does not."""
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
        _gain("RL raises the accuracy of the majority vote", "cons@k", 1,
              "AIME cons@64 86.7 % after RL"),
        _gain("RL raises pass@1 by lenient match, so not by format alone", "lenient_pass@1", 1),
        _gain("the format reward alone does not raise pass@1", "pass@1", -1, arm="format_only"),
        _gain("a random reward does not raise pass@1", "pass@1", -1, arm="random"),
        Comparison("RL raises pass@1 more than the format reward alone", "pass@1_gain", "grpo",
                   "format_only", Claim("sign", sign=1, margin=_MARGIN)),
        Comparison("RL reaches a higher pass@1 than rejection-sampling fine-tuning", "pass@1",
                   "grpo", "rft", Claim("sign", sign=1),
                   "GRPO is above online RFT (DeepSeekMath figure 5)"),
        _gain("completions take a step back more often after RL", "reflection", 1,
              "reflection emerges (the \"aha moment\")"),
        _gain("completions take a step back more often after RL, base with more reflections",
              "reflection", 1, arm="reflection")),
    scales={name: Scale(config, (), seeds=1, minutes=_MINUTES[name][0], hardware=_MINUTES[name][1])
            for name, config in R1_ZERO.items()},
    kind=RLRuns, default_arms=("grpo",), keep_runs=True)
