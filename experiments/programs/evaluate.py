"""Evaluate a checkpoint on a task: pass@1, pass@k, cons@k, format and length, with intervals."""

import dataclasses
from typing import Literal

import model
from experiments import settings
from experiments.options import Options, writes_results
from experiments.programs.generate import require_sampling
from experiments.reports import provenance
from rl.config import LoopConfig, RLConfig, SamplingConfig
from rl.evaluate import evaluate, require_memory
from rl.loading import load_model
from rl.sampler import Sampler
from train.chat import require_chat
from train.loading import prompt_format, stored_prompting
from train.templates import CHAT


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """The model, the task, and how completions are sampled.

  The default temperature and top-p are R1's (section 3).

  Attributes:
    checkpoint: the model: a folder that pretrain or r1_zero wrote, or a Hugging Face folder.
    task: spec of the task, see `rl.tasks.get_task`.
    template: name of the prompt template, see `train.templates`; "chat" for the chat template of
      the model's own Hugging Face folder; None for the one that the checkpoint was trained with or,
      if its folder names none, "short".
    system: with the template "chat", the system's message; empty for none, or for the template's
      own; None for the one that the checkpoint was trained with, if it was with this template.
    split: split of the task that the problems are from: heldout, harder or train.
    problems: number of problems, at least 2.
    samples: number of completions of each problem.
    ks: values of k, at most `samples`, for which pass@k is reported in addition to pass@1; None for
      those of 4 and 16 that are.
    temperature: sampling temperature; 0 for greedy decoding.
    top_p: probability mass of nucleus sampling, in (0, 1].
    max_prompt_length: longest prompt allowed, in tokens.
    long_prompts: whether a longer one is an "error" or its question is left out, "skip".
    max_completion_length: number of tokens after which a completion is truncated.
    slots: number of completions that are decoded at a time.
    cache_dtype: format of the cache; None for the format that the model computes in.
    seed: seed of the sampling.
    tokenizer: path of a tokenizer.json, for folders without one.
  """

  checkpoint: str = ""
  task: str = "arithmetic"
  template: str | None = None
  system: str | None = None
  split: str = "heldout"
  problems: int = 200
  samples: int = 16
  ks: tuple[int, ...] | None = None
  temperature: float = 0.6
  top_p: float = 0.95
  max_prompt_length: int = 64
  long_prompts: Literal["error", "skip"] = "error"
  max_completion_length: int = 128
  slots: int = 256
  cache_dtype: Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"] | None = None
  seed: int = 0
  tokenizer: str | None = None

  def __post_init__(self):
    if self.problems < 2 or self.samples < 1 or self.slots < 1:
      raise ValueError("problems must be at least 2, samples and slots at least 1")
    if self.max_prompt_length < 1 or self.max_completion_length < 1:
      raise ValueError(f"max_prompt_length={self.max_prompt_length} and max_completion_length="
                       f"{self.max_completion_length} must be positive")
    if not 0 <= self.seed < 2**31:
      raise ValueError(f"seed={self.seed} must lie in 0..2^31 - 1")
    require_sampling(self.temperature, self.top_p)
    if self.ks and not 1 <= min(self.ks) <= max(self.ks) <= self.samples:
      raise ValueError(f"ks={self.ks} must lie in 1..samples={self.samples}")


CONFIG = EvaluateConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  if not cfg.checkpoint:
    raise ValueError("no model to evaluate: give its folder, --set checkpoint=DIR")
  require_memory(cfg.problems, cfg.samples, cfg.max_completion_length)
  ks = [k for k in (4, 16) if k <= cfg.samples] if cfg.ks is None else cfg.ks
  template, system = _prompting(cfg)
  # A compiled program samples a fixed number of sequences, at least two for each prompt, as the
  # config requires. More of these pairs than there are completions would only be padding.
  pairs = min(cfg.slots, -(-cfg.problems * cfg.samples // 2))
  run = RLConfig(
      task=cfg.task, template=template, system=system, loop=LoopConfig(seed=cfg.seed),
      sampling=SamplingConfig(
          num_prompts=pairs, num_generations=2, max_prompt_length=cfg.max_prompt_length,
          long_prompts=cfg.long_prompts, max_completion_length=cfg.max_completion_length,
          slots=cfg.slots, cache_dtype=cfg.cache_dtype))
  start = load_model(cfg.checkpoint)
  tokenizer = start.tokenizer(cfg.tokenizer)
  found, drawn = evaluate(
      Sampler(model.Transformer(start.cfg), run, tokenizer, start.prompt_format(), show=True),
      start.variables, split=cfg.split,
      problems=cfg.problems, samples=cfg.samples, ks=ks, temperature=cfg.temperature,
      top_p=cfg.top_p)
  print(f"{drawn.prompts[0]}{drawn.completions[0]}\n")
  for line in lines(found):
    print(line)
  if options.out:
    settled = dataclasses.replace(cfg, template=template, system=system)
    result = {"config": dataclasses.asdict(settled), **found}
    print(f"results: {provenance.record(options.out, result)}")


def _prompting(cfg: EvaluateConfig) -> tuple[str, str]:
  """Returns the template of prompts and the system's message.

  Raises:
    ValueError: if the model has no chat template, and the template is that.
  """
  stored, system = stored_prompting(cfg.checkpoint)
  template = cfg.template or stored or RLConfig.template
  if template == CHAT:
    require_chat(prompt_format(cfg.checkpoint))
  if cfg.system is not None:
    system = cfg.system
  elif template != stored:
    system = ""
  return template, system


def lines(found: dict) -> list[str]:
  """Returns the figures of `rl.evaluate.evaluate` as lines of text."""
  figures = {name: value for name, value in found.items() if isinstance(value, list)}
  return [f"{name:16}{value:9.3f}  [{low:.3f}, {high:.3f}]"
          for name, (value, low, high) in figures.items()] + [
              f"{found['problems']} problems ({found['questions']} distinct), {found['samples']} "
              f"samples of each, {found['unjudged']} not judged; 95 % intervals"]
