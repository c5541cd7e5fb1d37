"""Whether RL makes solutions longer only where longer solutions are more often right.

R1-Zero's solutions grew on their own, and the paper takes that for reasoning that pays. Two bases
of the same task tell length and use apart: the documents of `a` are right where they are worked and
wrong where they are not, those of `b` the other way round. `base_length_pays`, the tokens by which
the base's right samples are longer than its wrong ones of the same problem, says whether they are.

Objectives are arms, as some reward length by themselves. In DeepSeekMath's (`grpo`) each output is
averaged over its tokens, so that a long wrong one is punished less for each of its tokens: the
1/length artefact. `dapo`, the mean over all tokens, has no such factor. One guard is enough: with
one update per rollout, no KL and the same advantages, the ratio of whole outputs (`grpo_r1`) and
the sum over a constant (`dr_grpo`) have its gradient up to a factor for the whole batch, which Adam
all but removes. GSPO is no guard: its ratio is a mean over an output's tokens.

Matched between arms: architecture, tokens, problems and order of pretraining; how many documents
are direct, brief and detailed, and how many malformed; problems, samples, rewards, advantages and
updates of RL, without a KL; and the base, between objectives. Nearly matched: how many documents
are right. Not matched: how often the bases are right; and the learning rate, which is each arm's
best. As a larger rate lengthens faster by itself, arms are compared only where their best is the
same.

`base_length_pays` is of a base before RL, and does not depend on it. Where seeds share a base, as
at scale `gpu`, its interval is over three times that one base was sampled, not over bases.
"""

from experiments.stats import Claim
from experiments.studies.rl_runs import RLRuns
from experiments.studies.rl_scales import scales
from experiments.studies.study import Arm, Comparison, Study

_OBJECTIVES = ("grpo", "dapo")
# A worked solution has one to three steps, nearly all of them wrong; direct answers are right so
# often that as many documents are right as with the scales' own noise, `a`: about 26 of 100.
_NOISE = {"a": (), "b": ("documents.noise.direct_error=0.54", "documents.noise.step_error=0.85",
                         "documents.noise.detailed_error=0.85",
                         "documents.noise.self_correction=0")}

# Their papers' KLs and baselines differ too, which is not the question here.
_SAME = ("rl.objective.beta=0", "rl.objective.baseline=mean_std")
_ARMS = tuple(Arm(f"{base}_{name}", (*noise, f"rl.objective.name={name}", *_SAME))
              for base, noise in _NOISE.items() for name in _OBJECTIVES)

# One token in fifty steps: over the 24 steps of the shortest run half a token, of the 5 by which
# R1-Zero's miniature grows. Less is not called growth.
_MARGIN = 0.02


def _comparisons(objective: str) -> tuple[Comparison, ...]:
  return (
      Comparison(f"length grows where it pays, by {objective}", "length_slope", f"a_{objective}",
                 None, Claim("threshold", sign=1, threshold=_MARGIN), "grows for 8,000 steps"),
      Comparison(f"it does not where it does not, by {objective}", "length_slope", f"b_{objective}",
                 None, Claim("threshold", sign=-1, threshold=_MARGIN)),
      Comparison(f"it grows more where it pays, by {objective}", "length_slope", f"a_{objective}",
                 f"b_{objective}", Claim("sign", sign=1, margin=_MARGIN), at_one_rate=True))


STUDY = Study(
    name="rl_length",
    claim="RL from rules makes solutions longer where longer ones are more often right, and only "
          "there.",
    source="arXiv:2501.12948, section 2.2.4 and figure 3; on the artefact arXiv:2503.20783",
    arms=_ARMS, baseline="a_dapo",
    comparisons=(
        Comparison("length pays in base a", "base_length_pays", "a_dapo", None,
                   Claim("threshold", sign=1, threshold=0.0, single_run=True)),
        Comparison("length does not pay in base b", "base_length_pays", "b_dapo", None,
                   Claim("threshold", sign=-1, threshold=0.0, single_run=True)),
        *(comparison for name in _OBJECTIVES for comparison in _comparisons(name)),
        # The artefact lengthens what is wrong, so it shows where length does not pay.
        Comparison("the mean over each output's tokens lengthens more than that over all tokens",
                   "length_slope", "b_grpo", "b_dapo", Claim("sign", sign=1), at_one_rate=True)),
    # On an H200 one base of each kind has to do: the seeds there are of RL alone.
    scales=scales(cpu_steps=60, gpu_steps=24, gpu_bases=1, kinds=2), kind=RLRuns)
