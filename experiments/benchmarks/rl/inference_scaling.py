"""Accuracy, tokens and latency of models that think for longer or shorter, and that vote.

The budget of a thought is a number of tokens after which its end is written, and the model answers;
a longer thought is one whose end is replaced by "wait" once (Muennighoff et al., arXiv:2501.19393).
All budgets continue the same thoughts, sampled without one, and are judged on the same problems. A
vote takes the answer that most of k samples give; its tokens are those of all k. The claims were
fixed before any run:

- an unlimited thought is right more often than one of half its tokens or, at the same number of
  tokens, than a vote of shorter thoughts;
- a vote of four thoughts is right more often than one thought;
- unforced thoughts are longer on the harder problems;
- replacing the end of a thought by "wait" makes it right more often.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import model
from experiments import settings
from experiments.options import Options, writes_results
from experiments.reports import plots, results
from experiments.reports.markdown import figure
from experiments.reports.summary import bench_summary, target
from experiments.studies.rl_runs import RLStudyConfig
from experiments.studies.rl_scales import R1_ZERO
from model.checks import require, require_positive
from rl.config import RLConfig
from rl.documents import DocumentsConfig
from rl.effort import divide
from rl.evaluate import draw, majority_by_problem, verdicts
from rl.loading import load_model
from rl.pass_rates import estimate
from rl.reflection import tokens_up_to
from rl.sampler import Sampler, Samples, require_drafts
from rl.stages import BaseConfig, pretrain_base, run_rl
from train.config import RunConfig
from train.loading import LoadedModel
from train.run_folder import RunFolder
from train.templates import opens_thinking

_STEP = 2**31 - 3  # no training step reaches this number, so the random keys are its own
_END, _WAIT = "</think>\n", "\nwait "  # as the documents of bases have them
_NATURAL, _LONGER = "unlimited", "wait once"
_TIMED = 7  # rounds
_FORCED = 16  # tokens that the texts above take at most


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  """Models that think, their budgets, and how they are evaluated.

  Attributes:
    base: how the bases are pretrained; generated documents replace its `data.sources`.
    documents: the documents on which they are pretrained.
    rl: the RL runs that follow, with the task and how completions are sampled.
    checkpoints: folders of models trained by r1_zero; empty to train some first. The task and the
      template of `rl` have to be those that they were trained with.
    models: number of models to train, each with a base of its own.
    budgets: tokens of thought after which its end is written, ascending.
    problems: held-out problems.
    samples: samples of each problem, a power of two; votes are those of 1, 2, 4 ... of them.
  """

  base: RunConfig
  documents: DocumentsConfig
  rl: RLConfig
  checkpoints: tuple[str, ...] = ()
  models: int = 3
  budgets: tuple[int, ...] = (0, 4, 8, 12, 16, 20)
  problems: int = 200
  samples: int = 16

  def __post_init__(self):
    require_positive(self, "models")
    require(self.problems >= 2, f"problems={self.problems} must be at least 2, for an interval")
    require(self.samples >= 4 and self.samples.bit_count() == 1,
            f"samples={self.samples} must be a power of two, and at least 4")
    require(bool(self.budgets) and self.budgets[0] >= 0
            and tuple(sorted(set(self.budgets))) == self.budgets,
            f"budgets={self.budgets} must be numbers of tokens, ascending")
    if not self.checkpoints:
      sampling, context = self.rl.sampling, self.base.model.max_seq_len
      longest = sampling.max_prompt_length + 2 * sampling.max_completion_length + _FORCED
      require(longest <= context, f"a prompt, a thought and its continuation may take {longest} "
              f"tokens, more than the context of {context}: lower a limit of rl.sampling, or raise "
              "base.model.max_seq_len")
      require_drafts(sampling, self.base.model)


def _of(cfg: RLStudyConfig, **changes: Any) -> InferenceConfig:
  return InferenceConfig(cfg.base, cfg.documents, cfg.rl, **changes)


SCALES = {
    "smoke": _of(R1_ZERO["smoke"], models=1, budgets=(0, 4), problems=4, samples=4),
    "cpu": _of(R1_ZERO["cpu"], models=1),
    "gpu": _of(R1_ZERO["cpu"]),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  scale = options.scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings, named={"base.model": model.get_config})
  ignored = [name for name in settings.assigned(options.settings)
             if name.split(".")[0] in ("base", "documents", "models")]
  require(not (cfg.checkpoints and ignored), f"{', '.join(sorted(ignored))} would have no effect, "
          "as checkpoints replaces the models that are trained: leave out one or the other")
  result = {"scale": scale, "task": cfg.rl.task, "budgets": list(cfg.budgets), "models": []}
  for seed, start in _models(cfg):
    measured = _measure(cfg, start, seed)
    result["models"].append(measured | {"seed": seed, "parameters": start.cfg.param_count()})
    for way in measured["ways"]:
      print(f"model {seed}, {way['name']}: pass@1 {np.mean(way['right']['1']):.3f}, "
            f"{np.mean(way['tokens']):.1f} tokens, {1e3 * way['seconds']:.1f} ms", flush=True)
    if options.out:
      results.record(options.out, result, summary, _sections)


def _models(cfg: InferenceConfig) -> Iterator[tuple[int, LoadedModel]]:
  """Yields the models with their seeds."""
  if cfg.checkpoints:
    yield from ((seed, load_model(folder)) for seed, folder in enumerate(cfg.checkpoints))
    return
  with tempfile.TemporaryDirectory() as folder:
    for seed in range(cfg.models):
      out = pathlib.Path(folder)
      base = BaseConfig(cfg.base, cfg.documents, cfg.rl.task, cfg.rl.template, seed)
      start = load_model(pretrain_base(base, out=out / f"base-{seed}"))
      rl = dataclasses.replace(cfg.rl, loop=dataclasses.replace(cfg.rl.loop, seed=seed))
      with contextlib.closing(RunFolder(out / f"rl-{seed}")) as run:
        run_rl(rl, start, run)
      yield seed, load_model(out / f"rl-{seed}")


def _measure(cfg: InferenceConfig, start: LoadedModel, seed: int) -> dict[str, Any]:
  """Returns the figures of one model: of each way to think, and of unforced lengths."""
  sampler = Sampler(model.Transformer(start.cfg), cfg.rl, start.tokenizer(), start.prompt_format())
  first = seed * cfg.problems
  natural = draw(sampler, start.variables, split="heldout", problems=cfg.problems,
                 samples=cfg.samples, first=first)
  spans = _thoughts(sampler, natural)
  ways = {str(budget): _forced(sampler, start.variables, natural, spans, budget)
          for budget in cfg.budgets}
  ways[_NATURAL] = natural
  ways[_LONGER] = _longer(sampler, start.variables, natural, spans)
  lengths = {"heldout": _lengths(spans, cfg.samples)}
  if "harder" in sampler.task.splits:
    harder = draw(sampler, start.variables, split="harder", problems=cfg.problems,
                  samples=cfg.samples, first=first)
    lengths["harder"] = _lengths(_thoughts(sampler, harder), cfg.samples)
  return {"questions": [problem.question for problem in natural.problems[::cfg.samples]],
          "thought_tokens": lengths, "ways": [
              {"name": name, "seconds": _seconds(start, drawn), **_judged(drawn, cfg.samples)}
              for name, drawn in ways.items()]}


def _thoughts(sampler: Sampler, drawn: Samples) -> list[tuple[int, int] | None]:
  """Returns the first token of each thought and the one after its last; None without an end."""
  found, opened = [], [opens_thinking(prompt) for prompt in drawn.prompts]
  for text, opens, tokens_N, length in zip(
      drawn.completions, opened, drawn.tokens_SN, drawn.lengths_S, strict=True):
    parts = divide(text, opens_thinking=opens)
    if parts.thought is None or parts.answer is None:
      found.append(None)
      continue
    begin = 0 if opens else text.index("<think>") + len("<think>")
    up_to = functools.partial(tokens_up_to, sampler.tokenizer, tokens_N[:length])
    found.append((up_to(begin), up_to(begin + len(parts.thought))))
  return found


def _lengths(spans: Sequence[tuple[int, int] | None], samples: int) -> list[float]:
  """Returns the mean tokens of each problem's thoughts; NaN if none of them has an end."""
  tokens_PN = np.array([np.nan if span is None else span[1] - span[0] for span in spans],
                       float).reshape(-1, samples)
  return [float(np.nanmean(row)) if np.isfinite(row).any() else float("nan") for row in tokens_PN]


def _forced(sampler: Sampler, variables: dict, natural: Samples, spans: Sequence,
            budget: int) -> Samples:
  """Returns the samples with the end of each thought written after `budget` tokens."""
  end = sampler.tokenizer.encode(_END)
  cut = {row: np.concatenate([natural.tokens_SN[row, :span[0] + budget], end])
         for row, span in enumerate(spans) if span and span[1] - span[0] > budget}
  return _replaced(sampler, variables, natural, cut, len(end))


def _longer(sampler: Sampler, variables: dict, natural: Samples, spans: Sequence) -> Samples:
  """Returns the samples with the end of each thought replaced by "wait" once."""
  wait = sampler.tokenizer.encode(_WAIT)
  cut = {row: np.concatenate([natural.tokens_SN[row, :span[1]], wait])
         for row, span in enumerate(spans) if span}
  return _replaced(sampler, variables, natural, cut, len(wait))


def _replaced(sampler: Sampler, variables: dict, drawn: Samples, begun: Mapping[int, np.ndarray],
              forced: int) -> Samples:
  """Returns the samples with some of them continued anew; forced tokens are not counted."""
  if not begun:
    return drawn
  rows = np.array(list(begun))
  again = sampler.resume(variables, drawn.rows(rows), list(begun.values()), 1, step=_STEP)
  texts, lengths_S = list(drawn.completions), drawn.lengths_S.copy()
  ended_S = drawn.ended_S.copy()
  lengths_S[rows], ended_S[rows] = again.lengths_S - forced, again.ended_S
  for row, text in zip(rows, again.completions, strict=True):
    texts[row] = text
  return dataclasses.replace(drawn, completions=texts, lengths_S=lengths_S, ended_S=ended_S)


def _judged(drawn: Samples, samples: int) -> dict[str, Any]:
  """Returns each problem's accuracy, "right", by the number of votes; and its tokens a sample."""
  accuracy = verdicts(drawn, samples)
  ks = [2**i for i in range(samples.bit_length())]
  return {"right": {str(k): rate_P.tolist() for k, rate_P in
                    majority_by_problem(drawn, ks, accuracy).items()},
          "tokens": drawn.lengths_S.reshape(-1, samples).mean(1).tolist()}


def _seconds(start: LoadedModel, drawn: Samples) -> float:
  """Returns the seconds of one sample at batch 1, of the mean number of tokens; a median."""
  prompt = drawn.prompt_tokens[0][None]
  tokens = max(1, round(float(drawn.lengths_S.mean())))
  plain = model.Transformer(dataclasses.replace(start.cfg, mtp=None))
  run = lambda: jax.block_until_ready(model.generate(
      plain, start.variables, prompt, np.array([prompt.shape[1]]), max_new_tokens=tokens,
      key=jax.random.key(0)))
  run()
  took = []
  for _ in range(_TIMED):
    began = time.perf_counter()
    run()
    took.append(time.perf_counter() - began)
  return float(np.median(took))


def _pooled(result: Mapping[str, Any], name: str, key: str = "right", k: int = 1) -> np.ndarray:
  """Returns a figure of every problem of every model."""
  found = []
  for each in result["models"]:
    way, = (way for way in each["ways"] if way["name"] == name)
    found += way[key][str(k)] if key == "right" else way[key]
  return np.array(found, float)


def _thought_tokens(result: Mapping[str, Any], split: str) -> np.ndarray:
  """Returns the mean tokens of the thoughts on every problem of every model; NaN without any."""
  return np.array([length for each in result["models"]
                   for length in each["thought_tokens"][split]], float)


def _at_tokens(result: Mapping[str, Any], budget: str, tokens: float) -> np.ndarray:
  """Returns each problem's accuracy of votes that take so many tokens.

  Between two numbers of votes it is linear in the logarithm of the tokens. It is that of all votes
  if those take fewer, and that of one if one takes more.
  """
  ks = [int(k) for k in result["models"][0]["ways"][0]["right"]]
  spent = np.log([k * _pooled(result, budget, "tokens").mean() for k in ks])
  at = float(np.clip(np.interp(np.log(tokens), spent, np.arange(len(ks))), 0, len(ks) - 1))
  low, part = int(at), at - int(at)
  high = min(low + 1, len(ks) - 1)
  return ((1 - part) * _pooled(result, budget, k=ks[low])
          + part * _pooled(result, budget, k=ks[high]))


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  questions = [f"{each['seed']}: {question}" for each in result["models"]
               for question in each["questions"]]
  over = lambda values: tuple(estimate(values, questions))
  natural, budgets = _pooled(result, _NATURAL), [str(b) for b in result["budgets"]]
  tokens = _pooled(result, _NATURAL, "tokens").mean()
  thoughts = _thought_tokens(result, "heldout")
  thought = np.nanmean(thoughts) if np.isfinite(thoughts).any() else np.inf
  half = min(budgets, key=lambda budget: abs(int(budget) - thought / 2))
  basis = f"{len(questions)} problems of {len(result['models'])} models"
  claims = [
      target(f"an unlimited thought against one of {half} tokens", "difference in accuracy",
             over(natural - _pooled(result, half)), at_least=0, n=basis),
      *(target(f"an unlimited thought against votes of thoughts of {budget} tokens, as many tokens "
               "in all", "difference in accuracy",
               over(natural - _at_tokens(result, budget, tokens)), at_least=0, n=basis)
        for budget in dict.fromkeys((budgets[0], half))),
      target("a vote of four unlimited thoughts against one", "difference in accuracy",
             over(_pooled(result, _NATURAL, k=4) - natural), at_least=0, n=basis),
      target('a thought whose end is replaced by "wait" once against an unlimited one',
             "difference in accuracy", over(_pooled(result, _LONGER) - natural), at_least=0,
             n=basis)]
  if all("harder" in each["thought_tokens"] for each in result["models"]):
    claims.append(target(
        "unforced thoughts, harder problems against held-out ones", "difference in tokens",
        over(_thought_tokens(result, "harder") - thoughts), at_least=0, n=basis))
  return bench_summary(
      "inference_scaling", result["scale"],
      f"Thinking and voting: {result['task']}, {len(result['models'])} models of "
      f"{result['models'][0]['parameters']:,} parameters trained by RL.", result,
      claims=claims, tables=[{
          "name": "ways", "caption": "Accuracy by tokens of thought and by votes",
          "header": ["thought ends after", "tokens of a sample", "ms of a sample at batch 1",
                     *(f"{k} vote{'s' * (k != '1')}" for k in _votes(result))],
          "rows": [[name if not name.isdecimal() else f"{name} tokens",
                    round(float(_pooled(result, name, "tokens").mean()), 2),
                    round(1e3 * float(np.mean([_way(each, name)["seconds"]
                                               for each in result["models"]])), 3),
                    *(round(float(_pooled(result, name, k=k).mean()), 4)
                      for k in _votes(result))]
                   for name in (*budgets, _NATURAL, _LONGER)],
          "note": "Accuracies are means over problems; a vote without a majority is split."}])


def _votes(result: Mapping[str, Any]) -> list[str]:
  return list(result["models"][0]["ways"][0]["right"])


def _way(each: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  return next(way for way in each["ways"] if way["name"] == name)


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  """Returns the report's figure: accuracy by tokens, of one sample and of votes."""
  mean = lambda name, k: float(_pooled(result, name, k=k).mean())
  spent = lambda name: float(_pooled(result, name, "tokens").mean())
  budgets = [*map(str, result["budgets"]), _NATURAL]
  curves = {"one sample, budgets": ([spent(name) for name in budgets],
                                    [mean(name, 1) for name in budgets])}
  for name in dict.fromkeys((budgets[0], budgets[len(budgets) // 2], _NATURAL)):
    label = f"votes, {name if name == _NATURAL else f'{name} tokens'}"
    curves[label] = ([int(k) * spent(name) for k in _votes(result)],
                     [mean(name, k) for k in _votes(result)])
  draw_curves = functools.partial(plots.panels, ratios="tokens of all samples")
  return [("Accuracy by tokens", figure(folder, "tokens", "Accuracy by tokens", draw_curves,
                                        {"accuracy": curves}))]
