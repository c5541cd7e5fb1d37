"""What caches of 16 and 8 bits cost in logits, in loss and in problems solved.

Held-out text is read in chunks, each of which attends to the cache of those before, as decoding
does, with the cache in several formats. The logits are compared with those of a cache in float32,
and losses are paired by row. A model that solves a task, one of `--experiment=r1_zero` say, also
samples solutions with each cache, by the same random numbers; accuracies are paired by problem.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.benchmarks.decoding.bench_speculation import SCALES as SPECULATION
from experiments.benchmarks.decoding.models import heldout, loaded_or_trained
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim
from experiments.stats import paired
from model.checks import require, require_positive
from model.decoding.checks import as_cache_dtype
from rl import evaluate
from rl.config import LoopConfig, RLConfig, SamplingConfig
from rl.sampler import Sampler
from train.config import RunConfig
from train.loading import LoadedModel

_EXACT = "float32"
_SEQUENCES = 128  # that are sampled at a time, in pairs


@dataclasses.dataclass(frozen=True)
class CacheConfig(RunConfig):
  """The model, the formats of the cache, and the text.

  Attributes:
    checkpoint: folder of a model; empty to train the configured one first.
    formats: formats of the cache, which are compared with float32.
    rows: rows of held-out text per domain, at most.
    chunk: tokens that are read at a time, a divisor of the rows' length.
    task: spec of a task that the model of `checkpoint` solves, see `rl.tasks.get_task`; empty for
      none.
    problems: held-out problems of the task, at least 2.
    samples: solutions of each that are sampled at temperature 1.
    max_completion_length: tokens after which a solution is truncated.
  """

  checkpoint: str = ""
  formats: tuple[str, ...] = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
  rows: int = 32
  chunk: int = 16
  task: str = ""
  problems: int = 200
  samples: int = 16
  max_completion_length: int = 96

  def __post_init__(self):
    super().__post_init__()
    require_positive(self, "rows", "chunk", "samples", "max_completion_length")
    require(self.problems >= 2, f"problems={self.problems} must be at least 2")
    require(self.checkpoint or not self.task,
            f"task={self.task} needs a model that solves it: give its folder, --set checkpoint=DIR")
    require(bool(self.formats), "formats must not be empty")
    for name in self.formats:
      as_cache_dtype(name)
    require(self.data.seq_len % self.chunk == 0,
            f"chunk={self.chunk} must divide data.seq_len={self.data.seq_len}")


def _scale(name: str, **changes: Any) -> CacheConfig:
  base = SPECULATION[name]
  return CacheConfig.of(base, model=dataclasses.replace(base.model, mtp=None), **changes)


SCALES = {"smoke": _scale("smoke", rows=2), "cpu": _scale("cpu"), "gpu": _scale("gpu", rows=64)}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings,
                       named={"model": model.get_config})
  with loaded_or_trained(cfg.checkpoint, cfg) as start:
    rows = [(domain, held.tokens[i], held.loss_mask[i])
            for domain, held in heldout(cfg.data, start).items()
            for i in range(min(cfg.rows, len(held.tokens)))]
    tokens_RT, mask_RT = (np.stack([row[i] for row in rows]) for i in (1, 2))
    found = measure(start, tokens_RT, mask_RT, cfg.formats, cfg.chunk)
    if cfg.task:
      for name in found:
        found[name]["solved"] = solved(start, cfg, name)
  for name, each in found.items():
    print(f"{name}: loss {np.mean(each['loss']) - np.mean(found[_EXACT]['loss']):+.5f} nats, "
          f"relative error of logits {each['logit_error']:.4f}, "
          f"{100 * each['same_choice']:.2f} % the same likeliest token"
          + (f", pass@1 {np.mean(each['solved']):.4f}" if cfg.task else ""), flush=True)
  if options.out:
    results.record(options.out, {
        "formats": found, "domains": [row[0] for row in rows], "tokens": int(mask_RT.sum()),
        "chunk": cfg.chunk, "task": cfg.task, "samples": cfg.samples,
        "parameters": start.cfg.param_count(),
        "elements": start.cfg.kv_cache_elements_per_token(),
        "numerics": start.cfg.numerics.compute}, summary)


def measure(start: LoadedModel, tokens_RT: np.ndarray, mask_RT: np.ndarray,
            formats: tuple[str, ...], chunk: int) -> dict[str, dict[str, Any]]:
  """Returns what each format gives, that of float32 first.

  Args:
    start: the model.
    tokens_RT: int32, rows of T + 1 tokens, of which the last T are predicted.
    mask_RT: bool [R, T], which of them count.
    formats: formats of the cache.
    chunk: tokens read at a time.

  Returns:
    By format: "loss", nats per token of each row; "logit_error", the norm of the logits' difference
    to those of a float32 cache over the norm of these; and "same_choice", the fraction of tokens
    for which the same token is the likeliest.
  """
  net = model.Transformer(dataclasses.replace(start.cfg, mtp=None))

  @jax.jit
  def read(variables, tokens, cache):
    output = net.apply(variables, tokens, cache=cache)
    return output.logits_BTV, output.cache.with_lengths(cache.lengths_B + chunk)

  def logits(tokens_T, dtype):
    cache = model.init_cache(start.cfg, 1, len(tokens_T), dtype)
    parts = []
    for at in range(0, len(tokens_T), chunk):
      part, cache = read(start.variables, tokens_T[None, at:at + chunk], cache)
      parts.append(part[0])
    return jnp.concatenate(parts)

  names = (_EXACT, *(name for name in formats if name != _EXACT))
  sums = {name: {"loss": [], "difference": 0.0, "same": 0.0} for name in names}
  norm = 0.0
  for tokens_T, mask_T in zip(tokens_RT, mask_RT, strict=True):
    found = {name: logits(tokens_T[:-1], name) for name in names}
    exact_TV = np.asarray(found[_EXACT])[mask_T]
    norm += float(np.square(exact_TV).sum())
    for name, logits_TV in found.items():
      losses_T = -jnp.take_along_axis(
          jax.nn.log_softmax(logits_TV), tokens_T[1:, None], axis=-1)[:, 0]
      here, kept_TV = sums[name], np.asarray(logits_TV)[mask_T]
      here["loss"].append(float(np.asarray(losses_T)[mask_T].mean()))
      here["difference"] += float(np.square(kept_TV - exact_TV).sum())
      here["same"] += float((kept_TV.argmax(-1) == exact_TV.argmax(-1)).sum())
  return {name: {"loss": each["loss"], "logit_error": (each["difference"] / norm) ** 0.5,
                 "same_choice": each["same"] / int(mask_RT.sum())} for name, each in sums.items()}


def solved(start: LoadedModel, cfg: CacheConfig, cache_dtype: str) -> list[float]:
  """Returns the fraction of correct solutions of each problem, with a cache in one format."""
  sequences = min(_SEQUENCES, -(-cfg.problems * cfg.samples // 2))
  run = RLConfig(task=cfg.task, template=start.template or RLConfig.template,
                 loop=LoopConfig(seed=cfg.train.seed), sampling=SamplingConfig(
                     num_prompts=sequences, num_generations=2, cache_dtype=cache_dtype,
                     max_prompt_length=64, max_completion_length=cfg.max_completion_length))
  net = model.Transformer(dataclasses.replace(start.cfg, mtp=None))
  drawn = evaluate.draw(
      Sampler(net, run, start.tokenizer(None), start.prompt_format()), start.variables,
      split="heldout", problems=cfg.problems, samples=cfg.samples)
  return evaluate.verdicts(drawn, cfg.samples).correct_PN.mean(1).tolist()


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  exact, claims, table = result["formats"][_EXACT], [], []
  for name, each in result["formats"].items():
    table.append([name, result["elements"] * jnp.dtype(name).itemsize, each["logit_error"],
                  100 * each["same_choice"], float(np.mean(each["loss"])),
                  *([float(np.mean(each["solved"]))] if "solved" in each else [])])
    if name != _EXACT:
      difference = paired(each["loss"], exact["loss"])
      claims.append(claim(
          f"loss with a cache in {name}, against float32", "difference, nats per token",
          difference.mean, difference.low, difference.high, n=f"{difference.n} rows of text"))
      if "solved" in each:
        difference = paired(each["solved"], exact["solved"])
        claims.append(claim(
            f"{result['task']}: pass@1 with a cache in {name}, against float32", "difference",
            difference.mean, difference.low, difference.high,
            n=f"{difference.n} problems, {result['samples']} solutions of each"))
  return bench_summary(
      "bench_cache", f"{backend(result)}-{result['numerics']}",
      f"{result['tokens']:,} tokens of held-out text, read {result['chunk']} at a time, with a "
      f"cache in several formats; {result['parameters']:,} parameters, {result['numerics']}.",
      result, claims=claims, tables=[{
          "name": "formats", "caption": "Formats of the cache",
          "header": ["format", "bytes per token", "relative error of logits",
                     "same likeliest token, %", "loss, nats per token",
                     *(["pass@1"] if "solved" in exact else [])], "rows": table}])
