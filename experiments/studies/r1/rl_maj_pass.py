"""Whether RL finds answers that the base could not, or raises those that it already had.

DeepSeekMath samples up to 64 solutions of each problem at temperature 0.7, before and after GRPO:
the majority's answer is right more often, the best of all is not. The curves over K are in the
report. `format_only` is rewarded for its form alone: what it gains, GRPO gains by form too.

A base that finds nearly every answer in 64 samples cannot do so more often: that Pass@K does not
rise is then not judged. The problems of a term more than training has leave room.

Matched between arms: the base, problems, samples, updates and evaluations. Not matched: the
learning rate, which is each arm's best by Pass@1.
"""

from experiments.stats import Claim
from experiments.studies.rl_evaluation import EvaluationConfig
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

# Of 200 problems, 0.02 is four: rates of the same problems before and after move less by chance.
_MARGIN = 0.02

STUDY = Study(
    name="rl_maj_pass",
    claim="RL raises the majority's answer over 64 samples, not the best of them: it makes right "
          "answers likelier that the base already gives.",
    source="DeepSeekMath, arXiv:2402.03300, section 5.2.2 and figure 7",
    arms=(Arm("grpo", ("rl.objective.name=grpo",)),
          Arm("format_only", ("rl.objective.name=grpo", "rl.rewards.accuracy=0"))),
    baseline="grpo",
    comparisons=(
        Comparison("the majority of K is right more often", "cons@k_gain", "grpo", None,
                   Claim("threshold", sign=1, threshold=_MARGIN), "Maj@K rises"),
        Comparison("the best of K is not", "pass@k_gain", "grpo", None,
                   Claim("threshold", sign=-1, threshold=_MARGIN), "Pass@K does not",
                   room=("base_pass@k", 1 - _MARGIN)),
        Comparison("nor on harder problems", "harder_pass@k_gain", "grpo", None,
                   Claim("threshold", sign=-1, threshold=_MARGIN)),
        Comparison("the majority gains by right answers, not by form alone", "cons@k_gain", "grpo",
                   "format_only", Claim("sign", sign=1, margin=_MARGIN)),
        Comparison("a single sample is right more often", "pass@1_gain", "grpo", None,
                   Claim("threshold", sign=1, threshold=_MARGIN), "rises")),
    scales=scales(cpu_steps=60, gpu_steps=60, evaluation=EvaluationConfig(
        samples=64, temperature=0.7, harder=True)), kind=RLRuns)
