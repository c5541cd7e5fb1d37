"""GRPO's epsilon, beta and reference: when each of them does something.

R1 clips at epsilon 10, weighs the KL with 0.001 and makes the policy the reference every 400 of
10,400 steps; its rollouts serve 16 updates. The paper says that too small an epsilon cuts the
gradient of many tokens off, and that too large a one destabilises. All arms update 16 times: with
one update the policy that learns is the one that sampled, every ratio is 1 and epsilon can do
nothing, by construction. The ratio is of tokens, as DeepSeekMath has it and as the paper's remark
on tokens has it too. `off_10` is the setting of R1, and what betas are compared with; `refresh` is
compared at beta 0.04, since at 0.001 the reference hardly pulls.

Matched between arms: the base, problems, samples, rollouts, updates and evaluations. Not matched:
the learning rate, which is each arm's best. Pass@1 is compared so, as each would be used; clipped
tokens and the KL, which a larger rate raises by itself, only between arms whose best is the same.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_BETA = "rl.objective.beta=0.001"
_OFF = ("rl.objective.name=grpo", "rl.objective.minibatches=16")


def _epsilon(value: str) -> str:
  return f"rl.objective.epsilon={value}"


_ARMS = (
    Arm("off_0.2", (*_OFF, _BETA, _epsilon("0.2"))),
    Arm("off_1", (*_OFF, _BETA, _epsilon("1"))),
    Arm("off_10", (*_OFF, _BETA, _epsilon("10"))),
    Arm("beta_0", (*_OFF, _epsilon("10"), "rl.objective.beta=0")),
    Arm("beta_0.04", (*_OFF, _epsilon("10"), "rl.objective.beta=0.04")),
    # R1's 26th of a run is one or two of the steps here.
    Arm("refresh", (*_OFF, _epsilon("10"), "rl.objective.beta=0.04",
                    "rl.objective.refresh_every=2")),
)

# Of pass@1: six of 200 problems, and less than half the width of its interval over problems.
_SAME = 0.03

STUDY = Study(
    name="rl_clip",
    claim="Where a rollout serves several updates, too small an epsilon cuts learning off; a small "
          "KL costs nothing, and a reference that follows frees the policy.",
    source="Nature 2025, Methods; arXiv:2501.12948v2, appendix B; arXiv:2402.03300, section 4.2",
    arms=_ARMS, baseline="off_10",
    comparisons=(
        Comparison("epsilon 0.2 clips tokens", "clip_ratio", "off_0.2", "off_10",
                   Claim("sign", sign=1), at_one_rate=True),
        Comparison("epsilon 10 learns more than 0.2", "pass@1", "off_10", "off_0.2",
                   Claim("sign", sign=1), "too low hurts"),
        Comparison("epsilon 1 is as good as 10", "pass@1", "off_1", "off_10",
                   Claim("equivalent", margin=_SAME)),
        Comparison("epsilon 10 goes further from the base", "kl", "off_10", "off_0.2",
                   Claim("sign", sign=1), "too high destabilises", at_one_rate=True),
        Comparison("R1's KL costs nothing", "pass@1", "off_10", "beta_0",
                   Claim("equivalent", margin=_SAME), "0.001"),
        Comparison("DeepSeekMath's KL holds the policy back", "kl", "beta_0.04", "off_10",
                   Claim("sign", sign=-1), "0.04", at_one_rate=True),
        Comparison("a reference that follows frees it", "pass@1", "refresh", "beta_0.04",
                   Claim("sign", sign=1))),
    # On an H200 one base has to do: the seeds there are of RL alone.
    scales=scales(cpu_steps=50, gpu_steps=24, gpu_bases=1, work=1.2,
                  rates=(3e-5, 8e-5, 2.5e-4)), kind=RLRuns)
