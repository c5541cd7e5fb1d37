"""Whether RL on a mixture of experts should update through the experts that the rollout used.

Not in DeepSeek's papers, which say nothing of it. Between a rollout and the last update on it the
routers change, and with them a token's experts: its ratio then compares two networks. Arms
`*_replayed` update through the rollout's experts, arms `*_free` through those that the routers
choose now; `moving_*` also move the balancing bias, by V3's 0.001 an update, which `frozen_*` leave
where pretraining had it. Eight updates share a rollout, and the ratio is of tokens, clipped at 0.2,
so that what routing does to it can show.

`gap` is between the sampler's log-probabilities and the trainer's, before a rollout's updates; at
float32 both choose the same experts then, and routing has no part in it.

Matched between arms: the base, problems, samples, updates and evaluations. Not matched: the
learning rate, which is each arm's best. Pass@1 is compared so, as each would be used; clipped
tokens and the agreement of routings, which a larger rate moves by itself, only between arms whose
best is the same.
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

# Of pass@1: six of 200 problems, and less than half the width of its interval over problems.
_SAME = 0.03

STUDY = Study(
    name="rl_routing",
    claim="Routing drifts over the updates that share a rollout, more so if the bias moves; "
          "replaying the rollout's routing keeps ratios near 1, and costs nothing.",
    source="our own question; the bias is that of arXiv:2412.19437, section 2.1.2",
    arms=_ARMS, baseline="frozen_free",
    comparisons=(
        # A choice in two hundred: less changes no ratio that anyone would notice.
        Comparison("routers leave the rollout's experts", "routing_agreement", "frozen_free", None,
                   Claim("threshold", sign=-1, threshold=0.995)),
        Comparison("more so if the bias moves", "routing_agreement", "moving_free", "frozen_free",
                   Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replaying clips fewer tokens, bias frozen", "clip_ratio", "frozen_replayed",
                   "frozen_free", Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replaying clips fewer tokens, bias moving", "clip_ratio", "moving_replayed",
                   "moving_free", Claim("sign", sign=-1), at_one_rate=True),
        Comparison("replaying is as good, bias frozen", "pass@1", "frozen_replayed", "frozen_free",
                   Claim("equivalent", margin=_SAME)),
        Comparison("replaying is as good, bias moving", "pass@1", "moving_replayed", "moving_free",
                   Claim("equivalent", margin=_SAME)),
        Comparison("the moving bias costs nothing", "pass@1", "moving_free", "frozen_free",
                   Claim("equivalent", margin=_SAME)),
        # What float32's rounding leaves is some 3e-7 nats; this is where a flipped expert shows.
        Comparison("sampler and trainer agree", "gap", "frozen_free", None,
                   Claim("threshold", sign=-1, threshold=1e-3))),
    scales=scales(cpu_steps=60, gpu_steps=40, work=1.2, rates=(6e-5, 1.2e-4, 2.5e-4)), kind=RLRuns)
