"""Compare values of GRPO's epsilon and beta, and replacing its reference during training.

R1 clips at epsilon 10, has a KL weight of 0.001, and replaces the reference by the policy every 400
of 10,400 steps; each of its rollouts is used for 16 updates. The paper says that too small an
epsilon truncates the gradient of many tokens, and that too large a one destabilises training.

All arms update 16 times per rollout: with a single update, the policy that learns is the one that
sampled, so that every ratio is 1 and epsilon has no effect. The ratio is that of single tokens, as
in DeepSeekMath and as R1's remark about tokens implies. `off_10` has R1's setting, and is the
baseline for other values of beta; `refresh` is compared at beta 0.04, as at 0.001 the reference has
hardly any effect.

Matched between arms: the base, problems, samples, rollouts, updates and evaluations. Not matched:
each arm has its best learning rate. Pass@1 is compared at these rates, as each arm would be used in
practice. The fraction of clipped tokens and the KL grow with the learning rate itself, and are only
compared between arms with the same best rate.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_BETA = "rl.objective.beta=0.001"
_OFF_POLICY = ("rl.objective.name=grpo", "rl.objective.minibatches=16")


def _epsilon(value: str) -> str:
  return f"rl.objective.epsilon={value}"


_ARMS = (
    Arm("off_0.2", (*_OFF_POLICY, _BETA, _epsilon("0.2"))),
    Arm("off_1", (*_OFF_POLICY, _BETA, _epsilon("1"))),
    Arm("off_10", (*_OFF_POLICY, _BETA, _epsilon("10"))),
    Arm("beta_0", (*_OFF_POLICY, _epsilon("10"), "rl.objective.beta=0")),
    Arm("beta_0.04", (*_OFF_POLICY, _epsilon("10"), "rl.objective.beta=0.04")),
    # R1 replaces its reference after a 26th of the run, which is one or two of the steps here.
    Arm("refresh", (*_OFF_POLICY, _epsilon("10"), "rl.objective.beta=0.04",
                    "rl.objective.refresh_every=2")),
)

# Margin of pass@1: 6 of 200 problems, less than half the width of its interval over problems.
_SAME = 0.03

STUDY = Study(
    name="rl_clip",
    claim="If a rollout is used for several updates, too small an epsilon truncates gradients and "
          "hurts learning; a small KL penalty does not cost accuracy; and replacing the reference "
          "by the policy during training raises accuracy.",
    source="Nature 2025, Methods; arXiv:2501.12948v2, appendix B; arXiv:2402.03300, section 4.2",
    arms=_ARMS, baseline="off_10",
    comparisons=(
        Comparison("epsilon 0.2 clips more tokens than 10", "clip_ratio", "off_0.2", "off_10",
                   Claim("sign", sign=1), at_one_rate=True),
        Comparison("epsilon 10 reaches a higher pass@1 than 0.2", "pass@1", "off_10", "off_0.2",
                   Claim("sign", sign=1), "too small an epsilon degrades performance"),
        Comparison("epsilon 1 reaches the same pass@1 as 10", "pass@1", "off_1", "off_10",
                   Claim("equivalent", margin=_SAME)),
        Comparison("epsilon 10 moves the policy further from the base than 0.2", "kl", "off_10",
                   "off_0.2", Claim("sign", sign=1), "too large an epsilon destabilises",
                   at_one_rate=True),
        Comparison("R1's KL penalty does not change pass@1", "pass@1", "off_10", "beta_0",
                   Claim("equivalent", margin=_SAME), "beta 0.001"),
        Comparison("DeepSeekMath's KL penalty keeps the policy closer to the base than R1's", "kl",
                   "beta_0.04", "off_10", Claim("sign", sign=-1), "beta 0.04", at_one_rate=True),
        Comparison("replacing the reference during training raises pass@1 at beta 0.04", "pass@1",
                   "refresh", "beta_0.04", Claim("sign", sign=1))),
    scales=scales(cpu_steps=50, gpu_steps=24, gpu_bases=None, work=1.2,
                  rates=(3e-5, 8e-5, 2.5e-4)), kind=RLRuns)
