"""Time decoding with drafts by MTP modules against decoding one token at a time.

Both continue held-out text with the same keys, and should yield the same tokens. A pass of the
trunk over a token and its drafts takes longer than one over a token, and yields more; which of the
two matters more depends on the batch, and how many drafts are right on the model and the text.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

import model
from experiments import settings
from experiments.benchmarks import timing
from experiments.benchmarks.decoding.models import heldout, loaded_or_trained
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim
from experiments.stats import paired
from experiments.studies.text.mtp_runs import spread_prompts
from model.checks import require, require_positive
from train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.loading import LoadedModel

_PLAIN = 0  # drafts of plain decoding


@dataclasses.dataclass(frozen=True)
class SpeculationConfig(RunConfig):
  """The model, the text that it continues, and how it is timed.

  Attributes:
    checkpoint: folder of a model with MTP modules; empty to train the configured one first.
    batches: numbers of texts that are continued at a time.
    drafts: numbers of tokens that are drafted at a time.
    prompt_tokens: tokens of held-out text that are continued.
    new_tokens: tokens of a continuation.
    temperature: sampling temperature; 0 for greedy decoding.
    rounds: rounds, in each of which everything is timed once; an even number.
  """

  checkpoint: str = ""
  batches: tuple[int, ...] = (1, 8, 64)
  drafts: tuple[int, ...] = (1, 2)
  prompt_tokens: int = 32
  new_tokens: int = 64
  temperature: float = 0.0
  rounds: int = 12

  def __post_init__(self):
    super().__post_init__()
    require_positive(self, "prompt_tokens", "new_tokens", "rounds")
    for name in ("batches", "drafts"):
      values = getattr(self, name)
      require(values and min(values) > 0, f"{name}={values} must be positive numbers")
    require(self.rounds % 2 == 0,
            f"rounds={self.rounds} must be even: rounds are paired, one in each order")
    require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")


_NANO, _SMALL = model.get_config("nano"), model.get_config("small")
SCALES = {
    "smoke": SpeculationConfig(
        model=dataclasses.replace(_NANO, num_layers=2), batches=(1,), drafts=(1,), new_tokens=8,
        prompt_tokens=8, rounds=2, data=DataConfig(tokenizer="bytes", seq_len=64,
                                                   heldout_bytes=10_000),
        train=TrainConfig(steps=6, batch_size=4, checkpoint_every=0)),
    # Trains `nano` in four minutes on two cores.
    "cpu": SpeculationConfig(
        model=_NANO, batches=(1, 8), data=DataConfig(heldout_bytes=20_000),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        train=TrainConfig(steps=370, batch_size=8, unroll=3, checkpoint_every=0)),
    # Trains `small` for half a minute on an H200.
    "gpu": SpeculationConfig(
        model=dataclasses.replace(_SMALL, numerics=model.NUMERICS["bf16"]),
        data=DataConfig(seq_len=512, bpe_vocab_size=8192, heldout_bytes=60_000),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=300, batch_size=64, unroll=8, checkpoint_every=0)),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings,
                       named={"model": model.get_config})
  with loaded_or_trained(cfg.checkpoint, cfg) as start:
    require(start.cfg.mtp is not None, f"{cfg.checkpoint or 'the model'} has no MTP modules")
    domains, prompts_BT = _prompts(cfg, start)
    rows = []
    for batch in cfg.batches:
      rows += _measure(cfg, start, domains[:batch], prompts_BT[:batch])
      for row in rows[-len(cfg.drafts):]:
        print(f"{_name(row)}: "
              f"{timing.describe(*timing.median_interval(row['speedups']))} times as fast, "
              f"{np.mean(row['tokens_per_pass']):.2f} tokens a pass", flush=True)
      if options.out:
        results.record(options.out, {
            "rows": rows, "parameters": start.cfg.param_count(), "new_tokens": cfg.new_tokens,
            "prompt_tokens": cfg.prompt_tokens, "temperature": cfg.temperature,
            "numerics": start.cfg.numerics.compute}, summary)


def _prompts(cfg: SpeculationConfig, start: LoadedModel) -> tuple[list[str], np.ndarray]:
  """Returns the held-out texts that are continued, and their domains."""
  needed = max(cfg.batches)
  domains, prompts_BT = spread_prompts(heldout(cfg.data, start), cfg.prompt_tokens, needed)
  require(len(domains) == needed,
          f"batches={cfg.batches} needs {needed} pieces of held-out text of {cfg.prompt_tokens} "
          "tokens: raise data.heldout_bytes, or lower prompt_tokens or batches")
  return domains, prompts_BT


def _measure(cfg: SpeculationConfig, start: LoadedModel, domains: list[str],
             prompts_BT: np.ndarray) -> list[dict[str, Any]]:
  """Returns a row for each number of drafts at one batch."""
  batch, length = prompts_BT.shape
  how = {"max_new_tokens": cfg.new_tokens, "temperature": cfg.temperature,
         "key": jax.random.key(cfg.train.seed)}
  operands = start.variables, prompts_BT, np.full(batch, length)
  plain = model.Transformer(dataclasses.replace(start.cfg, mtp=None))
  runs = {_PLAIN: lambda: model.generate(plain, *operands, **how)}
  for drafts in cfg.drafts:
    runs[drafts] = lambda drafts=drafts: model.speculate(
        model.Transformer(start.cfg), *operands, drafts=drafts, **how)
  timers = timing.call_timers(runs, jax.block_until_ready)
  seconds = timing.alternate(timers, cfg.rounds)
  rows, want = [], np.asarray(timers[_PLAIN].result.tokens_BN)
  for drafts in cfg.drafts:
    found = timers[drafts].result
    passes_B, accepted_BD = np.asarray(found.passes_B), np.asarray(found.accepted_BD)
    same_BN = np.asarray(found.generated.tokens_BN) == want
    rows.append({
        "batch": batch, "drafts": drafts, "domains": domains,
        "seconds": {"plain": seconds[_PLAIN], "drafted": seconds[drafts]},
        "speedups": [a / b for a, b in zip(*map(timing.paired_rounds, (
            seconds[_PLAIN], seconds[drafts])), strict=True)],
        "tokens_per_pass": ((cfg.new_tokens - 1) / passes_B).tolist(),
        "accepted": (accepted_BD / passes_B[:, None]).tolist(),
        "longest_passes": int(passes_B.max()),
        "texts_that_differ": int((~same_BN.all(1)).sum())})
  return rows


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  claims, table = [], []
  for row in result["rows"]:
    claims.append(claim(f"{_name(row)}: against one token at a time", "speed-up",
                        *timing.median_interval(row["speedups"]),
                        n=f"{len(row['speedups'])} pairs of rounds"))
    plain = np.median(row["seconds"]["plain"]) / result["new_tokens"]
    drafted = np.median(row["seconds"]["drafted"]) / (row["longest_passes"] + 1)
    rates = [_over_texts([accepted[d] for accepted in row["accepted"]])
             for d in range(row["drafts"])]
    table.append([row["batch"], row["drafts"], 1e3 * plain, 1e3 * drafted, drafted / plain,
                  _over_texts(row["tokens_per_pass"]), "; ".join(rates), row["texts_that_differ"]])
  last = result["rows"][-1]
  by_domain = [[domain, _over_texts([tokens for tokens, of in zip(
      last["tokens_per_pass"], last["domains"], strict=True) if of == domain])]
      for domain in dict.fromkeys(last["domains"])]
  sampled = "greedily" if result["temperature"] == 0 else f"at temperature {result['temperature']}"
  return bench_summary(
      "bench_speculation", f"{backend(result)}-{result['numerics']}",
      f"Continuations of {result['prompt_tokens']} tokens of held-out text by "
      f"{result['new_tokens']} tokens, {sampled}, with drafts by MTP modules; "
      f"{result['parameters']:,} parameters, {result['numerics']}.", result, claims=claims, tables=[
          {"name": "passes", "caption": "Passes",
           "header": ["batch", "drafts", "ms per token without drafts", "ms per pass with drafts",
                      "ratio", "tokens per pass", "accepted, by position", "texts that differ"],
           "rows": table},
          {"name": "domains", "caption":
           f"Tokens per pass by domain, {_name(last)}",
           "header": ["domain", "tokens per pass"], "rows": by_domain}])


def _name(row: dict[str, Any]) -> str:
  return f"batch {row['batch']}, {row['drafts']} draft{'s' * (row['drafts'] > 1)}"


def _over_texts(values: list[float]) -> str:
  """Returns the mean over texts as text, with its 95 % interval if there are several."""
  pair = paired(values, 0.0)
  return f"{pair.mean:.2f}" + (f" ({pair.low:.2f} to {pair.high:.2f})" if pair.n > 1 else "")
