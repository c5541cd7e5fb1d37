"""What tokens cost: prompt tokens that a cache holds or not, and new ones, at a price per hour.

Requests come in groups that share the beginning of their prompts, as those of a conversation or
about a document do. A beginning is read once, which is a cache miss; each request copies its cache,
which is a hit, reads its own question and is answered. Every phase is timed by itself, with all
rows busy: what a user would pay is more, by the time in which rows are empty.

The second table is arithmetic, not a measurement: what DeepSeek's published throughput of a node
means in dollars, and by how much parts of V3's architecture lower the cost of a token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.benchmarks import timing
from experiments.benchmarks.timing import CallTimer
from experiments.benchmarks.training.contenders import random_variables
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim, target
from model import ModelConfig, get_config
from model.checks import require, require_positive
from model.decoding import engine
from model.decoding.sampling import Limits

# DeepSeek's figures of an H800 node, tokens/s read and written, and its list prices of R1 and those
# of o1 at the time, in dollars per million tokens: input that the cache holds, other input, output.
_NODE_READ, _NODE_WRITTEN, _NODE_GPUS = 73_700, 14_800, 8
_R1, _O1 = (0.14, 0.55, 2.19), (7.50, 15.0, 60.0)
_MTP = 1.8  # times the tokens/s, V3's report, section 5.4.3


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """The model, the requests, and the price of a device.

  Attributes:
    model: the architecture; weights are random.
    rows: requests that are answered at a time.
    shared: prompt tokens that a group of requests has in common.
    own: prompt tokens of each request after those.
    new: tokens of an answer.
    price: dollars for an hour of the device.
    rounds: rounds, in each of which every phase is timed once; an even number.
  """

  model: ModelConfig
  rows: int = 64
  shared: int = 1024
  own: int = 128
  new: int = 128
  price: float = 2.0
  rounds: int = 12

  def __post_init__(self):
    require_positive(self, "rows", "shared", "own", "new", "price", "rounds")
    require(self.rounds % 2 == 0, f"rounds={self.rounds} must be even: rounds are paired")
    require(self.new >= 2, f"new={self.new} must be at least 2: the first comes with the prompt")
    longest = self.shared + self.own + self.new
    require(longest <= self.model.max_seq_len,
            f"requests of {longest} tokens are longer than the model's context of "
            f"{self.model.max_seq_len}: lower shared, own or new, or raise model.max_seq_len")


def _of(name: str, numerics: str, **fields: Any) -> ServingConfig:
  cfg = dataclasses.replace(get_config(name), numerics=model.NUMERICS[numerics], mtp=None)
  return ServingConfig(cfg, **fields)


SCALES = {
    "smoke": _of("nano", "fp32", rows=2, shared=32, own=8, new=8, rounds=2),
    "cpu": _of("nano", "fp32", rows=8, shared=256, own=64, new=64, rounds=6),
    "gpu": _of("base", "bf16"),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings,
                       named={"model": get_config})
  seconds = timing.alternate(_phases(cfg), cfg.rounds)
  result = {"seconds": seconds, "parameters": cfg.model.param_count(),
            "numerics": cfg.model.numerics.compute, "price": cfg.price,
            **{name: getattr(cfg, name) for name in ("rows", "shared", "own", "new")}}
  for name, cost, low, high in _costs(result):
    print(f"{name}: ${cost:.4g} ({low:.4g} to {high:.4g}) per million tokens at ${cfg.price} an "
          "hour")
  if options.out:
    results.record(options.out, result, summary)


def _phases(cfg: ServingConfig) -> dict[str, CallTimer]:
  """Returns timers of the phases, each of which works on all rows."""
  net, rng = model.Transformer(cfg.model), np.random.default_rng(0)
  variables = jax.jit(functools.partial(model.cast_weights, cfg.model))(random_variables(cfg.model))
  sampling = engine.Sampling(
      1.0, Limits(), jnp.zeros(0, jnp.int32), cfg.new, False, nucleus=False)
  slots = cfg.shared + engine.num_slots(cfg.own, sampling)
  keys_B = engine.row_keys(jax.random.key(0), cfg.rows)
  text = lambda count: jnp.asarray(rng.integers(0, cfg.model.vocab_size, (cfg.rows, count)),
                                   jnp.int32)
  shared_BT, own_BT = text(cfg.shared), text(cfg.own)
  whole = lambda tokens: jnp.full(cfg.rows, tokens.shape[1], jnp.int32)

  @jax.jit
  def read(variables, tokens):
    cache = model.init_cache(cfg.model, cfg.rows, cfg.shared)
    return engine.prefill(net, variables, tokens, whole(tokens), cache)[1].cache

  @jax.jit
  def begin(variables, tokens, prefix):
    if prefix is not None:
      prefix = engine.fork(prefix, jnp.zeros(cfg.rows, jnp.int32), slots)
    return engine.begin(
        net, variables, sampling, tokens, whole(tokens), keys_B, prefix=prefix)[0]

  @jax.jit
  def answer(variables, rows):
    step_net, step_variables, rows = engine.unrolled(net, variables, rows)
    return jax.lax.fori_loop(
        0, cfg.new - 1,
        lambda _, rows: engine.step(step_net, step_variables, sampling, rows)[0], rows).pending_BP

  prefix = read(variables, shared_BT)
  rows = begin(variables, own_BT, prefix)
  return {name: CallTimer(run, jax.block_until_ready, 0.2) for name, run in {
      "read the shared part": lambda: read(variables, shared_BT),
      "read the own part after a shared one": lambda: begin(variables, own_BT, prefix),
      "read the own part alone": lambda: begin(variables, own_BT, None),
      "answer": lambda: answer(variables, rows)}.items()}


def _seconds_per_token(result: dict) -> dict[str, np.ndarray]:
  """Returns the seconds of a token in each round: of input missed, input hit and output."""
  took = {name: np.asarray(seconds) for name, seconds in result["seconds"].items()}
  hit = took["read the own part after a shared one"] - took["read the own part alone"]
  shared = result["rows"] * result["shared"]
  return {"input, cache miss": took["read the shared part"] / shared,
          "input, cache hit": hit / shared,
          "output": took["answer"] / (result["rows"] * (result["new"] - 1))}


def _costs(result: dict) -> list[tuple[str, float, float, float]]:
  """Returns dollars per million tokens with an interval: of input missed, input hit and output."""
  return [(name, *timing.median_interval(seconds * result["price"] / 3600 * 1e6))
          for name, seconds in _seconds_per_token(result).items()]


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  costs = {name: values for name, *values in _costs(result)}
  miss, hit, output = _seconds_per_token(result).values()
  basis = f"{len(output)} rounds"
  claims = [
      target("input that the cache holds against other input, as in R1's prices", "ratio of costs",
             timing.median_interval(hit / miss),
             at_most=round(_R1[0] / _R1[1], 3), n=basis),
      claim("output against input that the cache does not hold", "ratio of costs",
            *timing.median_interval(output / miss),
            reference=f"{_R1[2] / _R1[1]:.2f} in R1's prices", n=basis)]
  return bench_summary(
      "bench_serving", f"{backend(result)}-{result['numerics']}",
      f"Serving: {result['parameters']:,} parameters, {result['rows']} requests at a time of "
      f"{result['shared']:,} shared, {result['own']:,} own and {result['new']:,} new tokens, "
      f"{result['numerics']}, at ${result['price']:g} an hour.", result,
      claims=claims, tables=[
          {"name": "costs", "caption": "Dollars per million tokens, measured",
           "header": ["tokens", "dollars", "low", "high", "tokens/s"],
           "rows": [[name, cost, low, high, result["price"] / 3600 * 1e6 / cost]
                    for name, (cost, low, high) in costs.items()]},
          _arithmetic(result["price"])])


def _arithmetic(price: float) -> dict[str, Any]:
  """Returns the table of what published figures and V3's architecture say about costs."""
  v3 = get_config("deepseek_v3")
  dollars = lambda rate: _NODE_GPUS * price / 3600 * 1e6 / rate
  heads = v3.attention.num_heads * (
      v3.attention.qk_nope_head_dim + v3.attention.qk_rope_head_dim + v3.attention.v_head_dim)
  rows = [
      [f"input, a node's {_NODE_READ:,} tokens/s, hits included", dollars(_NODE_READ), "$ per M"],
      [f"output, a node's {_NODE_WRITTEN:,} tokens/s", dollars(_NODE_WRITTEN), "$ per M"],
      ["R1's price of output over that cost", _R1[2] / dollars(_NODE_WRITTEN), "times"],
      *([f"o1's price over R1's, {name}", o1 / r1, "times"] for name, o1, r1 in zip(
          ("input hit", "input miss", "output"), _O1, _R1, strict=True)),
      ["experts: products of all parameters over those of active ones",
       v3.param_count() / v3.active_param_count(), "times"],
      ["MLA: cached numbers of as many heads over those of the latent",
       heads / v3.attention.cache_elements, "times"],
      ["MLA: cached numbers of 8 key and value heads, 128 wide, over those of the latent",
       2 * 8 * 128 / v3.attention.cache_elements, "times"],
      ["MTP: tokens/s with a draft, V3's report", _MTP, "times"],
      ["cache hits: R1's price of input missed over hit", _R1[1] / _R1[0], "times"]]
  return {"name": "arithmetic", "caption": "Arithmetic for V3, not measured here",
          "header": ["", "value", "unit"], "rows": rows,
          "note": f"A node has {_NODE_GPUS} GPUs at ${price:g} an hour each. Read and written "
                  "tokens are those of nodes that do only one of both."}
