"""Whether RL makes solutions longer only if longer solutions are more often correct.

R1-Zero's solutions became longer during RL, and the paper attributes that to reasoning that pays
off. Two bases for the same task separate length from its use: the documents of base `a` are more
often correct if they are worked than if they answer directly, those of base `b` the other way
round. `base_length_pays`, by how many tokens a base's correct samples are longer than its incorrect
samples of the same problem, shows whether the bases have learned this.

Objectives are arms because some of them favour length by themselves. DeepSeekMath's (`grpo`)
averages over the tokens of each output, so that a long incorrect output is penalised less per
token: the 1/length artefact. `dapo`, the mean over all tokens, does not have this factor. It is the
only such control, as the others would be no different: with one update per rollout, no KL and the
same advantages, the ratio of whole outputs (`grpo_r1`) and the sum divided by a constant
(`dr_grpo`) have the same gradient up to a factor per batch, which Adam all but removes. GSPO has
the artefact: its ratio is a mean over an output's tokens.

Matched between arms: architecture, tokens, problems and order of pretraining; how many documents
are direct, brief, detailed and malformed; problems, samples, rewards, advantages and updates of RL,
without a KL; and, between objectives, the base. Nearly matched: how many documents are correct. Not
matched: how often the bases' samples are correct; and the learning rate, which is each arm's best.
As lengths grow faster at a larger learning rate, arms are compared only if they have the same best
rate.

`base_length_pays` is a property of the base before RL. If seeds share a base, as at scale `gpu`,
its interval is over three samplings of that one base, not over bases.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_OBJECTIVES = ("grpo", "dapo")
# In base `b`, nearly every one of the one to three steps of a worked solution is incorrect, and the
# direct answers are correct so often that about 26 % of all documents are correct, as in base `a`,
# which has the default noise of the scales.
_NOISE = {"a": (), "b": ("documents.noise.direct_error=0.54", "documents.noise.step_error=0.85",
                         "documents.noise.detailed_error=0.85",
                         "documents.noise.self_correction=0")}

# The same for all objectives, as their papers differ in the KL and the baseline, too.
_SAME = ("rl.objective.beta=0", "rl.objective.baseline=mean_std")
_ARMS = tuple(Arm(f"{base}_{name}", (*noise, f"rl.objective.name={name}", *_SAME))
              for base, noise in _NOISE.items() for name in _OBJECTIVES)

# One token in 50 steps: half a token over the 24 steps of the shortest run, compared with the 5
# tokens by which completions grow in `r1_zero`. Slower growth does not count as growth.
_MARGIN = 0.02


def _comparisons(objective: str) -> tuple[Comparison, ...]:
  return (
      Comparison(f"{objective} lengthens solutions from base a (longer is more often correct)",
                 "length_slope", f"a_{objective}", None,
                 Claim("threshold", sign=1, threshold=_MARGIN), "length grows over 8,000 steps"),
      Comparison(f"{objective} does not lengthen solutions from base b (longer is less often "
                 "correct)", "length_slope", f"b_{objective}", None,
                 Claim("threshold", sign=-1, threshold=_MARGIN)),
      Comparison(f"{objective} lengthens solutions faster from base a than from base b",
                 "length_slope", f"a_{objective}", f"b_{objective}",
                 Claim("sign", sign=1, margin=_MARGIN), at_one_rate=True))


STUDY = Study(
    name="rl_length",
    claim="RL from rule-based rewards makes solutions longer if longer ones are more often "
          "correct, and only then.",
    source="arXiv:2501.12948, section 2.2.4 and figure 3; on 1/length averaging arXiv:2503.20783",
    arms=_ARMS, baseline="a_dapo",
    comparisons=(
        Comparison("correct samples of base a are longer than incorrect ones",
                   "base_length_pays", "a_dapo", None,
                   Claim("threshold", sign=1, threshold=0.0, single_run=True)),
        Comparison("correct samples of base b are shorter than incorrect ones",
                   "base_length_pays", "b_dapo", None,
                   Claim("threshold", sign=-1, threshold=0.0, single_run=True)),
        *(comparison for name in _OBJECTIVES for comparison in _comparisons(name)),
        # The artefact lengthens incorrect completions, so it shows in base b.
        Comparison("averaging per output (grpo) lengthens solutions more than per token (dapo)",
                   "length_slope", "b_grpo", "b_dapo", Claim("sign", sign=1), at_one_rate=True)),
    # At scale `gpu` all seeds share one base `a` and one base `b`, to save time: they are seeds of
    # RL only.
    scales=scales(cpu_steps=60, gpu_steps=24, gpu_bases=1, kinds=2), kind=RLRuns)
