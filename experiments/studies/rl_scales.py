"""Scales of the RL studies: the base and rollouts of R1-Zero, with each study's number of steps.

The cost of a study is estimated from the following. On two CPU cores, R1-Zero took 2.4 s per step
(16 problems x 16 completions, evaluations during training included), 1 s for 256 completions of an
evaluation, and 6.5 minutes to pretrain a base. For an H200, 0.2 s, 0.15 s and 80 s are assumed, and
4 s for the start of every run.
"""

import dataclasses
from typing import NamedTuple

import model
from experiments.studies.rl_evaluation import EvaluationConfig
from experiments.studies.rl_runs import RLStudyConfig
from experiments.studies.study import Scale
from rl.config import LoopConfig, RLConfig, SamplingConfig
from rl.documents import DocumentsConfig
from rl.tasks import Noise
from train.config import BalanceConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig

_RATES = (2.5e-4, 5e-4, 1e-3)  # around the best learning rate with one update per rollout
_SEEDS = 3
_EVALUATION = EvaluationConfig()


def _few_experts(name: str, expert_dim: int, **changes) -> model.ModelConfig:
  """Returns an architecture with fewer and wider experts, and without MTP.

  Where no kernel computes the experts, this is twice as fast.
  """
  network = model.get_config(name)
  return dataclasses.replace(network, mtp=None, **changes, moe=dataclasses.replace(
      network.moe, num_experts=8, experts_per_token=2, expert_dim=expert_dim, num_groups=1,
      groups_per_token=1))


_NANO = _few_experts("nano", 64)  # 1.1 M parameters
_SMALL = _few_experts("small", 256, d_model=256, num_layers=6, ffn_dim=768)  # 13.1 M


def _base(network: model.ModelConfig, train: TrainConfig, *, learning_rate: float = 2e-3,
          **data) -> RunConfig:
  data = {"bpe_vocab_size": 512, "seq_len": 128, "heldout_bytes": 20_000} | data
  return RunConfig(model=network, data=DataConfig(**data),
                   optimizer=OptimizerConfig(learning_rate=learning_rate),
                   balance=BalanceConfig(bias_rate=0.01), train=train)


def _rl(task: str, learning_rate: float, loop: LoopConfig, **sampling) -> RLConfig:
  sampling = {"num_prompts": 16, "num_generations": 16, "max_prompt_length": 16,
              "max_completion_length": 32} | sampling
  return RLConfig(
      task=task, sampling=SamplingConfig(**sampling), loop=loop,
      optimizer=dataclasses.replace(RLConfig().optimizer, learning_rate=learning_rate))


def _r1_zero(base: RunConfig, documents: DocumentsConfig, rl: RLConfig,
             **evaluation) -> RLStudyConfig:
  evaluation = {"harder": True, "reflection": True, "base_temperatures": (0.0, 0.3, 0.6)
                } | evaluation
  return RLStudyConfig(base=base, documents=documents, rl=rl, bases=None, bases_in="out",
                       evaluation=EvaluationConfig(**evaluation))


# With fewer incorrect steps than by default, a base that is pretrained on so few documents learns
# its sums reliably. With fewer worked solutions and more malformed documents, it is nevertheless
# incorrect as often.
_CLEANER = Noise(direct=0.65, step_error=0.15, malformed=0.35)
R1_ZERO = {
    "smoke": _r1_zero(
        _base(_NANO, TrainConfig(steps=30, batch_size=8), seq_len=64, heldout_bytes=5000),
        DocumentsConfig(2000),
        _rl("arithmetic:terms=2,digits=1", 3e-4,
            LoopConfig(steps=4, eval_problems=4, eval_samples=4),
            num_prompts=4, num_generations=4),
        problems=8, samples=4),
    # Sums only: the last part of `make demo`, a few minutes on two cores.
    "demo": _r1_zero(
        _base(_NANO, TrainConfig(steps=1200, batch_size=8, unroll=3)),
        DocumentsConfig(20_000, Noise(
            direct=0.55, step_error=0.05, self_correction=0, malformed=0.35)),
        _rl("arithmetic:terms=3,digits=1,operators=+", 3e-4,
            LoopConfig(steps=30, eval_every=15, eval_problems=64)),
        problems=100, base_temperatures=(0.0,)),
    "cpu": _r1_zero(
        _base(_NANO, TrainConfig(steps=4000, batch_size=8, unroll=3, checkpoint_every=500)),
        DocumentsConfig(noise=_CLEANER),
        _rl("arithmetic:terms=3,digits=1", 5e-4, LoopConfig(steps=60, eval_every=10))),
    # Small programs, judged by their unit tests: twenty minutes on two cores.
    "code": _r1_zero(
        _base(_NANO, TrainConfig(steps=4000, batch_size=8, unroll=3, checkpoint_every=500),
              seq_len=192),
        DocumentsConfig(noise=Noise(direct=0.5, detailed=0.1, malformed=0.3)),
        _rl("programs", 5e-4,
            LoopConfig(steps=30, eval_every=10, eval_problems=64, checkpoint_every=10),
            num_prompts=8, max_prompt_length=40, max_completion_length=112),
        problems=100, samples=8, base_temperatures=(0.0,)),
    "gpu": _r1_zero(
        _base(_SMALL, TrainConfig(steps=4000, batch_size=32, checkpoint_every=1000),
              learning_rate=1e-3),
        DocumentsConfig(200_000),
        _rl("arithmetic:terms=4,digits=2", 2e-4, LoopConfig(steps=80, eval_every=10),
            num_prompts=32, max_prompt_length=24, max_completion_length=96)),
}


class _Hardware(NamedTuple):
  """Hardware, and the seconds that the parts of a study take on it.

  Attributes:
    name: value of `Scale.hardware`.
    start: seconds that a run takes to start.
    step: seconds per RL step.
    rollout: seconds to sample as many completions as a rollout has, in an evaluation.
    base: seconds to pretrain a base.
  """

  name: str
  start: float
  step: float
  rollout: float
  base: float


_CPU = _Hardware("2 CPU cores, estimated", 5, 2.4, 1, 390)
_GPU = _Hardware("one H200, estimated", 4, 0.2, 0.15, 80)


def scales(*, cpu_steps: int, gpu_steps: int, gpu_bases: int | None = _SEEDS, kinds: int = 1,
           evaluation: EvaluationConfig = _EVALUATION, work: float = 1.0,
           rates: tuple[float, ...] = _RATES) -> dict[str, Scale]:
  """Returns the scales `smoke`, `cpu` and `gpu` of an RL study, by name.

  `smoke` only checks that everything runs: its metrics mean nothing. `cpu` and `gpu` sweep the
  learning rates on one seed, and compare the arms on three paired seeds.

  Args:
    cpu_steps: RL steps of a run at scale `cpu`, each of which has one rollout.
    gpu_steps: RL steps of a run at scale `gpu`.
    gpu_bases: `RLStudyConfig.bases` at scale `gpu`; at `cpu` there is one base per seed.
    kinds: number of different bases that the arms of one seed start from, for the estimate of the
      cost.
    evaluation: the evaluations before and after RL.
    work: duration of an RL step relative to that of R1-Zero, for the estimate of the cost.
    rates: learning rates of the sweep.
  """
  tiny = R1_ZERO["smoke"]
  loop = dataclasses.replace(tiny.rl.loop, steps=3)
  smoke = RLStudyConfig(
      base=tiny.base, documents=tiny.documents, bases=1, rl=dataclasses.replace(tiny.rl, loop=loop),
      evaluation=dataclasses.replace(evaluation, problems=8, samples=4))
  full = lambda steps, bases, hardware: _full(
      steps, bases, evaluation, hardware, kinds, work, rates)
  return {
      "smoke": Scale(smoke, rates, seeds=2, minutes=0.05, hardware=_CPU.name,
                     shared_minutes=0.5),
      "cpu": full(cpu_steps, _SEEDS, _CPU), "gpu": full(gpu_steps, gpu_bases, _GPU)}


def _full(steps, bases, evaluation, hardware, kinds, work, rates) -> Scale:
  """Returns a scale with the base and the rollouts of R1-Zero's scale `cpu`."""
  r1_zero = R1_ZERO["cpu"]
  config = RLStudyConfig(
      base=r1_zero.base, documents=r1_zero.documents, bases=bases, evaluation=evaluation,
      rl=dataclasses.replace(r1_zero.rl, loop=dataclasses.replace(r1_zero.rl.loop, steps=steps)))
  completions = evaluation.problems * evaluation.samples * (1 + evaluation.harder)
  rollouts = completions / r1_zero.rl.sampling.num_sequences
  run = hardware.start + steps * hardware.step * work + rollouts * hardware.rollout
  bases = bases or _SEEDS + 1  # one for the sweep
  return Scale(config, rates, seeds=_SEEDS, minutes=run / 60, hardware=hardware.name,
               shared_minutes=kinds * bases * hardware.base / 60)
