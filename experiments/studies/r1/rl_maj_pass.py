"""Whether RL finds answers that the base does not, or makes those that it finds more likely.

DeepSeekMath samples up to 64 solutions per problem at temperature 0.7, before and after GRPO: the
majority vote becomes more accurate (Maj@K), but the fraction of problems with at least one correct
sample does not grow (Pass@K). The report shows the curves over K. `format_only` is rewarded for the
format alone: what it gains is the part of GRPO's gain that is due to format.

If the base solves nearly every problem in 64 samples, Pass@K has no room to rise, and the claim
that it does not rise is not judged. The harder problems, which have one term more than those of
training, leave room.

Matched between arms: the base, problems, samples, updates and evaluations. Not matched: the
learning rate, which is the best of each arm by Pass@1.
"""

from experiments.stats import Claim
from experiments.studies.rl_evaluation import EvaluationConfig
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

# 0.02 is 4 of 200 problems. Rates of the same problems before and after RL differ less by chance.
_MARGIN = 0.02

STUDY = Study(
    name="rl_maj_pass",
    claim="RL raises the accuracy of the majority vote over 64 samples, but not the chance that "
          "one of them is correct: it makes the base's correct answers more likely, and adds none.",
    source="DeepSeekMath, arXiv:2402.03300, section 5.2.2 and figure 7",
    arms=(Arm("grpo", ("rl.objective.name=grpo",)),
          Arm("format_only", ("rl.objective.name=grpo", "rl.rewards.accuracy=0"))),
    baseline="grpo",
    comparisons=(
        Comparison("RL raises Maj@K", "cons@k_gain", "grpo", None,
                   Claim("threshold", sign=1, threshold=_MARGIN), "Maj@K rises"),
        Comparison("RL does not raise Pass@K", "pass@k_gain", "grpo", None,
                   Claim("threshold", sign=-1, threshold=_MARGIN), "Pass@K does not rise",
                   room=("base_pass@k", 1 - _MARGIN)),
        Comparison("RL does not raise Pass@K on harder problems", "harder_pass@k_gain", "grpo",
                   None, Claim("threshold", sign=-1, threshold=_MARGIN)),
        Comparison("RL raises Maj@K more than the format reward alone", "cons@k_gain", "grpo",
                   "format_only", Claim("sign", sign=1, margin=_MARGIN)),
        Comparison("RL raises Pass@1", "pass@1_gain", "grpo", None,
                   Claim("threshold", sign=1, threshold=_MARGIN), "Pass@1 rises")),
    scales=scales(cpu_steps=60, gpu_steps=60, evaluation=EvaluationConfig(
        samples=64, temperature=0.7, harder=True)), kind=RLRuns)
