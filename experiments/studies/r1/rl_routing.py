"""Whether RL updates on a mixture of experts should replay the routing of the rollout.

DeepSeek's papers do not address this. Between a rollout and the last update on it, the routers
change, and with them the experts of a token: its ratio then compares two different networks. Arms
`*_replayed` send tokens to the experts that were chosen during the rollout, arms `*_free` to those
that the routers choose at the time of the update. Arms `moving_*` also update the balancing bias,
by V3's 0.001 per update; arms `frozen_*` keep the bias of pretraining. Eight updates use the same
rollout, and the ratio is that of single tokens, clipped at 0.2, so that effects of routing on it
are visible.

`gap` is the difference between the log-probabilities of sampler and trainer before the updates on a
rollout. In float32, both then choose the same experts, so it contains no effect of routing.

Matched between arms: the base, problems, samples, updates and evaluations. Not matched: each arm
has its best learning rate. Pass@1 is compared at these rates, as each arm would be used in
practice. The fraction of clipped tokens and the agreement of routing depend on the learning rate
itself, and are only compared between arms with the same best rate.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_ROUTING = {"free": "observed", "replayed": "replayed"}
_BIAS = {"frozen": "0", "moving": "0.001"}
_ARMS = tuple(
    Arm(f"{bias}_{routing}", (
        "rl.objective.name=grpo", "rl.objective.minibatches=8",
        f"rl.objective.routing={mode}", f"rl.objective.bias_rate={rate}"))
    for bias, rate in _BIAS.items() for routing, mode in _ROUTING.items())

# Margin of pass@1: 6 of 200 problems, less than half the width of its interval over problems.
_SAME = 0.03

STUDY = Study(
    name="rl_routing",
    claim="Routing changes over the updates on one rollout, more so if the balancing bias is "
          "updated; replaying the rollout's routing keeps ratios near 1, at no cost in accuracy.",
    source="not from a paper; the balancing bias is that of arXiv:2412.19437, section 2.1.2",
    arms=_ARMS, baseline="frozen_free",
    comparisons=(
        # One choice in 200: fewer changes would not affect the ratios noticeably.
        Comparison("routers choose other experts than in the rollout", "routing_agreement",
                   "frozen_free", None, Claim("threshold", sign=-1, threshold=0.995)),
        Comparison("routing changes more if the bias is updated", "routing_agreement",
                   "moving_free", "frozen_free", Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replay clips fewer tokens, bias frozen", "clip_ratio", "frozen_replayed",
                   "frozen_free", Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replay clips fewer tokens, bias updated", "clip_ratio", "moving_replayed",
                   "moving_free", Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replay does not change pass@1, bias frozen", "pass@1", "frozen_replayed",
                   "frozen_free", Claim("equivalent", margin=_SAME)),
        Comparison("replay does not change pass@1, bias updated", "pass@1", "moving_replayed",
                   "moving_free", Claim("equivalent", margin=_SAME)),
        Comparison("updating the bias does not change pass@1", "pass@1", "moving_free",
                   "frozen_free", Claim("equivalent", margin=_SAME)),
        # Rounding in float32 alone gives about 3e-7 nats; 1e-3 is where a changed expert shows.
        Comparison("sampler and trainer agree on log-probabilities", "gap", "frozen_free", None,
                   Claim("threshold", sign=-1, threshold=1e-3), any_rate=True)),
    scales=scales(cpu_steps=60, gpu_steps=40, work=1.2, rates=(6e-5, 1.2e-4, 2.5e-4)), kind=RLRuns)
