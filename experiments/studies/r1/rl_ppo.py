"""Compare PPO at two values of GAE's lambda with GRPO.

In R1's appendix, PPO is much worse than GRPO at lambda 0.95, and close to it at lambda 1. The value
model's learning rate is tuned, too: each lambda has two arms, which differ in the ratio of that
learning rate to the policy's, and the one with the better sweep is compared.

Solutions here have about 20 tokens, over which powers of 0.95 decay to a third. Much longer
solutions would be needed to separate the two lambdas as clearly as in the paper, so an unresolved
difference is expected.

Matched between arms: the base, problems, samples, updates, the weight of the KL (R1's 0.001) and
evaluations. Not matched: PPO also trains a value model of the policy's size, and has the KL in the
reward, as in the paper.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_RATIOS = (1, 4)


def _ppo(gae_lambda: str) -> tuple[Arm, ...]:
  return tuple(Arm(f"ppo_{gae_lambda}_value{ratio}x", (
      "rl.objective.name=ppo", "rl.objective.beta=0.001",
      f"rl.objective.gae_lambda={gae_lambda}", f"value_rate_ratio={ratio}")) for ratio in _RATIOS)


STUDY = Study(
    name="rl_ppo",
    claim="PPO is worse with GAE's lambda at 0.95 than at 1, where it is about as good as GRPO.",
    source="arXiv:2501.12948v2, appendix A.3 and figure 4",
    arms=(Arm("grpo", ("rl.objective.name=grpo_r1",)), *_ppo("1"), *_ppo("0.95")), baseline="grpo",
    comparisons=(
        # 0.02 is 4 of 200 problems; the difference in the paper is many times larger.
        Comparison("PPO at lambda 0.95 has a lower pass@1 than at 1", "pass@1", "ppo_0.95_*",
                   "ppo_1_*", Claim("sign", sign=-1, margin=0.02), "much worse", matched="sweep"),
        # "Close" means within a tenth of the 60 points that `r1_zero` gains, rounded down to 5.
        Comparison("PPO at lambda 1 has the same pass@1 as GRPO", "pass@1", "ppo_1_*", "grpo",
                   Claim("equivalent", margin=0.05), "close", matched="sweep"),
        Comparison("PPO at lambda 0.95 has a lower pass@1 than GRPO", "pass@1", "ppo_0.95_*",
                   "grpo", Claim("sign", sign=-1, margin=0.02), "much worse", matched="sweep")),
    scales=scales(cpu_steps=60, gpu_steps=24, work=1.5), kind=RLRuns)
