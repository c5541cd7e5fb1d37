"""R1-Zero in miniature: a base that has read noisy solutions learns to reason by GRPO alone.

The base is pretrained on worked solutions of every quality, so that it solves some problems some of
the time. Then comes RL with rewards for right answers and for form, and nothing else: no SFT. Other
arms are controls, on the same base: learning the form alone must not look like reasoning. The arms
about reflection have bases of their own.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time

import model
import rl.start
from experiments import provenance, settings
from experiments.bases import Base, DocumentsConfig
from experiments.options import Options
from experiments.rl_report import write_rl_report
from experiments.runs import left
from model.checks import require, require_positive
from rl import loop, reflection
from rl.config import LoopConfig, RLConfig, SamplingConfig
from rl.evaluate import evaluate
from rl.sampler import Sampler, Samples
from rl.tasks import Noise
from train.config import BalanceConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.config_io import to_dict
from train.run_folder import RunFolder, write_json_atomic
from train.tokenizer import Tokenizer

ARMS = {
    "grpo": (),
    "format_only": ("rl.rewards.accuracy=0",),
    "random": ("rl.rewards.accuracy=0", "rl.rewards.format=0", "rl.rewards.random=1"),
    "rft": ("rl.objective.name=rft",),
    "ppo": ("rl.objective.name=ppo",),
    # With bases of their own; one document in a hundred of the others' takes something back.
    "without_reflection": ("documents.noise.self_correction=0",),
    "reflection": ("documents.noise.self_correction=0.1",),
}


@dataclasses.dataclass(frozen=True)
class R1ZeroConfig:
  """A base, and RL on it.

  Attributes:
    base: how it is pretrained; its sources are the documents.
    documents: see there.
    rl: the RL run.
    init: a model to begin RL with instead; then nothing is pretrained.
    problems, samples: of the evaluations before and after.
    temperatures: at which the base is asked besides that of training; 0 is greedy.
  """

  base: RunConfig
  documents: DocumentsConfig = dataclasses.field(default_factory=DocumentsConfig)
  rl: RLConfig = dataclasses.field(default_factory=RLConfig)
  init: str | None = None
  problems: int = 200
  samples: int = 16
  temperatures: tuple[float, ...] = (0.0, 0.3, 0.6)

  def __post_init__(self):
    require_positive(self, "problems", "samples")
    require(min(self.temperatures, default=0) >= 0,
            f"temperatures={self.temperatures} must not be negative")


def _few_experts(name: str, expert_dim: int, **changes) -> model.ModelConfig:
  """A model with fewer, wider experts than its like: twice as fast where no kernel runs them."""
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


# With fewer wrong steps a base of so few documents knows its sums for sure; with fewer worked
# solutions and more faults of form it is as often wrong.
_CLEANER = Noise(direct=0.65, step_error=0.15, malformed=0.35)
SCALES = {
    "smoke": R1ZeroConfig(
        base=_base(_NANO, TrainConfig(steps=30, batch_size=8), seq_len=64, heldout_bytes=5000),
        documents=DocumentsConfig(2000),
        rl=_rl("arithmetic:terms=2,digits=1", 3e-4,
               LoopConfig(steps=4, eval_problems=4, eval_samples=4),
               num_prompts=4, num_generations=4),
        problems=8, samples=4),
    # Sums alone: the last act of `make demo`, a few minutes on two cores.
    "demo": R1ZeroConfig(
        base=_base(_NANO, TrainConfig(steps=1200, batch_size=8, unroll=3)),
        documents=DocumentsConfig(20_000, Noise(
            direct=0.55, step_error=0.05, self_correction=0, malformed=0.35)),
        rl=_rl("arithmetic:terms=3,digits=1,operators=+", 3e-4,
               LoopConfig(steps=30, eval_every=15, eval_problems=64)),
        problems=100, temperatures=(0.0,)),
    "cpu": R1ZeroConfig(
        base=_base(_NANO, TrainConfig(steps=4000, batch_size=8, unroll=3, checkpoint_every=500)),
        documents=DocumentsConfig(noise=_CLEANER),
        rl=_rl("arithmetic:terms=3,digits=1", 5e-4, LoopConfig(steps=60, eval_every=10))),
    # Small programs, judged by their unit tests: twenty minutes on two cores.
    "code": R1ZeroConfig(
        base=_base(_NANO, TrainConfig(steps=4000, batch_size=8, unroll=3, checkpoint_every=500),
                   seq_len=192),
        documents=DocumentsConfig(noise=Noise(direct=0.5, detailed=0.1, malformed=0.3)),
        rl=_rl("programs", 5e-4,
               LoopConfig(steps=30, eval_every=10, eval_problems=64, checkpoint_every=10),
               num_prompts=8, max_prompt_length=40, max_completion_length=112),
        problems=100, samples=8, temperatures=(0.0,)),
    "gpu": R1ZeroConfig(
        base=_base(_SMALL, TrainConfig(steps=4000, batch_size=32, checkpoint_every=1000),
                   learning_rate=1e-3),
        documents=DocumentsConfig(200_000),
        rl=_rl("arithmetic:terms=4,digits=2", 2e-4, LoopConfig(steps=80, eval_every=10),
               num_prompts=32, max_prompt_length=24, max_completion_length=96)),
}


def main(options: Options) -> None:
  options.refuse("a", "b", "profile")
  scale = options.scale_of(SCALES)
  arms = options.arms or ("grpo",)
  if unknown := set(arms) - set(ARMS):
    raise ValueError(f"--arms={','.join(sorted(unknown))} does not exist; there are "
                     + ", ".join(ARMS))
  named = {"base.model": model.get_config}
  cfg = settings.apply(SCALES[scale], options.settings, named=named)
  # Every arm's settings are tried before anything runs.
  configs = {arm: settings.apply(SCALES[scale], (*options.settings, *ARMS[arm]), named=named)
             for arm in arms}
  _refuse_in_vain(cfg, configs, options)
  limit = functools.partial(
      left, options.max_minutes and 60 * options.max_minutes, time.monotonic())
  with contextlib.closing(RunFolder(options.folder(f"r1_zero-{scale}"))) as out:
    for seed in options.seed_range(1):
      for arm in arms:
        own = configs[arm].documents != cfg.documents
        base = _base_of(configs[arm], seed, out.path, f"base-{arm}" if own else "base", options)
        with contextlib.closing(RunFolder(out.path / f"{arm}-seed{seed}")) as folder:
          if not _run_arm(arm, configs[arm], seed, base, folder, limit):
            print("stopped, saved; the same command goes on")
            return
    print(f"report: {write_rl_report(out.path)}")


def _refuse_in_vain(cfg: R1ZeroConfig, configs: dict[str, R1ZeroConfig], options: Options) -> None:
  """Raises ValueError for settings and arms of a base where a model is given instead of one."""
  if not cfg.init:
    return
  vain = [name for name in settings.assigned(options.settings)
          if name.split(".")[0] in ("base", "documents")]
  vain += [f"--arms={arm}" for arm, own in configs.items() if own.documents != cfg.documents]
  if vain:
    raise ValueError(f"{', '.join(vain)} would change a base, but init={cfg.init} is the model to "
                     "begin with: leave one of them out")


def _base_of(cfg: R1ZeroConfig, seed: int, out: pathlib.Path, name: str, options: Options) -> Base:
  return Base(cfg.base, cfg.documents, cfg.rl.task, cfg.rl.template, seed,
              out / f"{name}-seed{seed}",
              told="base.model.vocab_size" in settings.assigned(options.settings))


def _run_arm(arm, cfg: R1ZeroConfig, seed, base: Base, folder: RunFolder, limit) -> bool:
  """Runs one arm on one seed, unless it is done; False if it was stopped before its end."""
  start = rl.start.load(cfg.init) if cfg.init else base.load(limit())
  if start is None:
    return False
  run = dataclasses.replace(cfg.rl, loop=dataclasses.replace(cfg.rl.loop, seed=seed))
  folder.check_config({**rl.start.as_dict(run, start.cfg), "init": cfg.init,
                       "problems": cfg.problems, "samples": cfg.samples,
                       "temperatures": cfg.temperatures})
  results = folder.path / "results.json"
  if results.exists():
    return True
  tokenizer = start.tokenizer()
  tokenizer.save(folder.path / rl.start.TOKENIZER)
  print(f"{arm}, seed {seed}", file=sys.stderr)
  result = loop.train(run, start.cfg, start.variables, tokenizer, folder, max_seconds=limit())
  for message in result.messages:
    print(f"damaged checkpoint, passed over: {message}", file=sys.stderr)
  if result.status == "stopped":
    return False
  judge = _Judge(cfg, run, start.cfg, tokenizer)
  before = _base_figures(judge, start.variables, base.path / "evaluation.json", cfg)
  after = judge(result.state.train.variables)
  write_json_atomic(results, {
      "arm": arm, "seed": seed, "settings": list(ARMS[arm]), "base_name": base.path.name,
      "base": before, "after": after, "cost": result.cost, "config": to_dict(cfg),
      "params": start.cfg.param_count(), "provenance": provenance.describe()})
  _print_outcome(arm, seed, before["heldout"], after["heldout"])
  return True


class _Judge:
  """Evaluates variables on the held-out problems and the harder ones."""

  def __init__(self, cfg: R1ZeroConfig, run: RLConfig, model_cfg, tokenizer: Tokenizer):
    self.cfg, self.sampler = cfg, Sampler(model.Transformer(model_cfg), run, tokenizer)

  def __call__(self, variables: dict) -> dict:
    found, drawn = self.split(variables, "heldout")
    judged = {"heldout": found, "reflection": reflection.effect(self.sampler, variables, drawn)}
    if "harder" in self.sampler.task.splits:
      judged["harder"], _ = self.split(variables, "harder")
    return judged

  def split(self, variables: dict, split: str,
            temperature: float | None = None) -> tuple[dict, Samples]:
    samples = 1 if temperature == 0 else self.cfg.samples
    return evaluate(
        self.sampler, variables, split=split, problems=self.cfg.problems, samples=samples,
        ks=(samples,), temperature=temperature)


def _base_figures(judge: _Judge, variables: dict, path: pathlib.Path, cfg: R1ZeroConfig) -> dict:
  """The base before RL, with what it can do by other ways of asking; kept for the other arms."""
  key = json.loads(json.dumps({
      "init": cfg.init, "task": cfg.rl.task, "template": cfg.rl.template,
      "problems": cfg.problems, "samples": cfg.samples, "temperatures": cfg.temperatures,
      "sampling": to_dict(cfg.rl.sampling)}))
  if path.exists():
    there = json.loads(path.read_text())
    if there["key"] == key:
      return there["figures"]
  found = judge(variables)
  found["temperatures"] = {
      str(temperature): judge.split(variables, "heldout", temperature)[0]
      for temperature in cfg.temperatures}
  path.parent.mkdir(exist_ok=True)
  return write_json_atomic(path, {"key": key, "figures": found})["figures"]


def _print_outcome(arm: str, seed: int, before: dict, after: dict) -> None:
  print(f"{arm}, seed {seed}:")
  for name in before:
    if isinstance(before[name], list) and name in after:
      figures = ["{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for found in (before, after)]
      print(f"  {name:16} {figures[0]}  ->  {figures[1]}")
