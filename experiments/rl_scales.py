"""Budgets of the RL studies: R1-Zero's base and rollouts, for as many steps as a study can pay.

R1-Zero took on two CPU cores 2.4 s for a step (of 16 problems x 16 completions, and of what
evaluations cost meanwhile), 1 s for 256 completions of an evaluation and 6.5 minutes for a base. An
H200 is guessed to take 0.2 s, 0.15 s and 80 s, and 4 s for each run to begin. What a study costs is
estimated from these.
"""

import dataclasses
from typing import NamedTuple

from experiments.r1_zero import SCALES
from experiments.rl_runs import EvaluationConfig, RLStudyConfig
from experiments.study import Scale

_RATES = (2.5e-4, 5e-4, 1e-3)  # around what is best with one update per rollout
_SEEDS = 3
_EVALUATION = EvaluationConfig()


class _Hardware(NamedTuple):
  """Seconds of what a study does."""

  name: str
  begin: float
  step: float
  rollout: float
  base: float


_CPU = _Hardware("2 CPU cores, estimated", 5, 2.4, 1, 390)
_GPU = _Hardware("one H200, estimated", 4, 0.2, 0.15, 80)


def scales(*, cpu_steps: int, gpu_steps: int, gpu_bases: int = _SEEDS, kinds: int = 1,
           evaluation: EvaluationConfig = _EVALUATION, work: float = 1.0,
           rates: tuple[float, ...] = _RATES) -> dict[str, Scale]:
  """`smoke`, of which the figures mean nothing, `cpu` and `gpu`.

  The latter two sweep the learning rates on one seed, and have three paired seeds.

  Args:
    cpu_steps, gpu_steps: rollouts of a run.
    gpu_bases: see `RLStudyConfig`; on CPUs there is one a seed.
    kinds: of bases that the arms begin with.
    evaluation: before and after.
    work: of a step, in those of a plain one.
    rates: learning rates.
  """
  tiny = SCALES["smoke"]
  loop = dataclasses.replace(tiny.rl.loop, steps=3)
  smoke = RLStudyConfig(
      base=tiny.base, documents=tiny.documents, bases=1, rl=dataclasses.replace(tiny.rl, loop=loop),
      evaluation=dataclasses.replace(evaluation, problems=8, samples=4))
  of_full = lambda steps, bases, hardware: _full(
      steps, bases, evaluation, hardware, kinds, work, rates)
  return {
      "smoke": Scale(smoke, rates, seeds=2, minutes=0.05, hardware=_CPU.name,
                     shared_minutes=0.5),
      "cpu": of_full(cpu_steps, _SEEDS, _CPU), "gpu": of_full(gpu_steps, gpu_bases, _GPU)}


def _full(steps, bases, evaluation, hardware, kinds, work, rates) -> Scale:
  whole = SCALES["cpu"]
  config = RLStudyConfig(
      base=whole.base, documents=whole.documents, bases=bases, evaluation=evaluation,
      rl=dataclasses.replace(whole.rl, loop=dataclasses.replace(whole.rl.loop, steps=steps)))
  completions = evaluation.problems * evaluation.samples * (1 + evaluation.harder)
  rollouts = completions / whole.rl.sampling.num_sequences
  run = hardware.begin + steps * hardware.step * work + rollouts * hardware.rollout
  return Scale(config, rates, seeds=_SEEDS, minutes=run / 60, hardware=hardware.name,
               shared_minutes=kinds * bases * hardware.base / 60)
