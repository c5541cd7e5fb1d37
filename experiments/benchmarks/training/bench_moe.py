"""Time implementations of routed experts against each other.

Timed are the forward and backward pass of one MoE layer's experts, alternating, at the shape of the
comparison on a CPU (`micro`: 2048 tokens, 16 experts of 128 hidden units, top 4), with balanced
routing, skewed routing, and every token on the same experts. This takes two minutes on two CPU
cores. `model.experts` keeps the fastest implementation; slower ones are defined here.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.timing import alternate
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim
from model.experts import EXPERTS, ExpertWeights, dense_experts, slot_experts
from model.layers import gated
from model.numerics import NUMERICS, Numerics

_TOKENS, _WIDTH, _EXPERTS, _CHOSEN, _EXPERT_WIDTH = 2048, 256, 16, 4, 128
_SKEWS = {"balanced": 0.0, "skewed": 1.0, "collapsed": 100.0}
_ROUNDS = 15


def padded_blocks(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics, *, block: int) -> jax.Array:
  """Pads each expert's rows to whole blocks; every block gathers the weights of its expert."""
  num_experts, num_chosen = weights.num_experts, experts_NK.shape[1]
  experts_R = experts_NK.reshape(-1)
  sizes_E = jnp.zeros(num_experts, jnp.int32).at[experts_R].add(1)
  padded_E = -(-sizes_E // block) * block
  order_R = jnp.argsort(experts_R, stable=True)
  rank_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size))
  first_E, padded_first_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(padded_E) - padded_E
  place_R = padded_first_E[experts_R] + rank_R - first_E[experts_R]
  num_blocks = experts_R.size // block + num_experts
  source = jnp.full(num_blocks * block, -1).at[place_R].set(jnp.arange(experts_R.size))
  gates = jnp.where(source >= 0, gates_NK.reshape(-1)[source], 0)
  owner = jnp.searchsorted(jnp.cumsum(padded_E), jnp.arange(num_blocks) * block, side="right")
  owner = jnp.minimum(owner, num_experts - 1)
  rows = x_ND[jnp.maximum(source, 0) // num_chosen].reshape(num_blocks, block, -1)
  hidden = gated(numerics.einsum("bpd,bdgf->bpgf", rows, weights.w_gate_up[owner]))
  hidden *= gates.reshape(num_blocks, block, 1)
  out = numerics.einsum("bpf,bfd->bpd", hidden, weights.w_down[owner])
  return out.reshape(num_blocks * block, -1)[place_R].reshape(*experts_NK.shape, -1).sum(1)


def sorted_segments(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics, *, block: int) -> jax.Array:
  """Loops over blocks of the sorted rows, with one expert's weights at a time and no padding.

  This is `slot_experts` without slots: the whole batch is overflow.
  """
  return slot_experts(weights, x_ND, gates_NK, experts_NK, numerics, capacity_factor=0.0,
                      block=block)


_DEFAULT = "slots, 1.125 x mean (the default)"
IMPLEMENTATIONS = {
    "slots, 1.0 x mean": functools.partial(slot_experts, capacity_factor=1.0),
    _DEFAULT: EXPERTS["slots"],
    "slots, 1.25 x mean": functools.partial(slot_experts, capacity_factor=1.25),
    "slots, 1.125 x mean, overflow in 64s": functools.partial(slot_experts, block=64),
    "slots, 1.125 x mean, overflow in 128s": functools.partial(slot_experts, block=128),
    "expert-padded blocks of 64": functools.partial(padded_blocks, block=64),
    "expert-padded blocks of 128": functools.partial(padded_blocks, block=128),
    "sorted segments in 64s": functools.partial(sorted_segments, block=64),
    "sorted segments in 256s": functools.partial(sorted_segments, block=256),
    "lax.ragged_dot": EXPERTS["grouped"],
    "every expert for every token": dense_experts,
}


def _inputs(skew: float):
  key = iter(jax.random.split(jax.random.key(0), 8))
  normal = lambda *shape: jax.random.normal(next(key), shape)
  weights = ExpertWeights(normal(_EXPERTS, _WIDTH, 2, _EXPERT_WIDTH) * _WIDTH**-0.5,
                          normal(_EXPERTS, _EXPERT_WIDTH, _WIDTH) * _EXPERT_WIDTH**-0.5)
  scores = normal(_TOKENS, _EXPERTS) + skew * jnp.linspace(-1, 1, _EXPERTS)
  gates_NK, experts_NK = lax.top_k(scores, _CHOSEN)
  return (weights, normal(_TOKENS, _WIDTH), jax.nn.softmax(gates_NK),
          experts_NK.astype(jnp.int32), normal(_TOKENS, _WIDTH))


def _step(experts):
  """Returns the jitted output and gradients of an implementation.

  The incoming gradient is an argument, so that the compiler cannot fold it as a constant.
  """
  def step(weights, x_ND, gates_NK, experts_NK, dy_ND):
    forward = lambda *args: experts(*args, experts_NK, NUMERICS["fp32"])
    y_ND, vjp = jax.vjp(forward, weights, x_ND, gates_NK)
    return y_ND, vjp(dy_ND)

  return jax.jit(step)


def _error(ours, reference) -> float:
  return max(float(jnp.abs(a - b).max() / jnp.abs(b).max())
             for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "settings", "seeds", "a", "b", "arms", "profile",
                            "max_minutes")
  useful = 18 * _TOKENS * _CHOSEN * _WIDTH * _EXPERT_WIDTH
  rows = []
  print(f"{'routing':10} {'implementation':38} {'ms':>7} {'GFLOP/s':>8} {'error':>8}")
  for routing, skew in _SKEWS.items():
    args = _inputs(skew)
    steps = {name: _step(experts) for name, experts in IMPLEMENTATIONS.items()}
    reference = steps["every expert for every token"](*args)
    errors = {name: _error(step(*args), reference) for name, step in steps.items()}
    seconds = alternate({name: lambda step=step, args=args: _seconds(step, args)
                         for name, step in steps.items()}, _ROUNDS)
    for name, by_round in seconds.items():
      median = float(np.median(by_round))
      rows.append({"routing": routing, "way": name, "ms": 1e3 * median,
                   "ms_min": 1e3 * min(by_round), "ms_max": 1e3 * max(by_round),
                   "useful_gflops": useful / median / 1e9, "error": errors[name]})
      print(f"{routing:10} {name:38} {1e3 * median:7.1f} {useful / median / 1e9:8.0f} "
            f"{errors[name]:8.1e}")
  if options.out:
    shape = {"tokens": _TOKENS, "width": _WIDTH, "experts": _EXPERTS, "chosen": _CHOSEN,
             "expert_width": _EXPERT_WIDTH, "rounds": _ROUNDS, "format": "float32"}
    print(f"report: {results.record(options.out, {'shape': shape, 'rows': rows}, summary)}")


def _seconds(step, args) -> float:
  started = time.perf_counter()
  jax.block_until_ready(step(*args))
  return time.perf_counter() - started


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  ms, rounds = {}, result["shape"]["rounds"]
  for row in result["rows"]:
    ms.setdefault(row["routing"], {})[row["way"]] = row["ms"]
  shape = result["shape"]
  claims = [
      claim(f"{routing} routing: the default against the fastest alternative, {rival}", "speed-up",
            by_name[rival] / by_name[_DEFAULT], n=f"medians of {rounds} rounds")
      for routing, by_name in ms.items()
      for rival in [min((name for name in by_name if not name.startswith("slots")),
                        key=by_name.get)]]
  errors = max(row["error"] for row in result["rows"])
  return bench_summary(
      "bench_moe", backend(result),
      f"Implementations of routed experts, forward and backward: {shape['tokens']} tokens of width "
      f"{shape['width']}, {shape['experts']} experts of {shape['expert_width']} hidden units, "
      f"{shape['chosen']} experts per token, {shape['format']}.", result, claims=claims, tables=[{
          "name": "ms", "caption": "Milliseconds, forward and backward",
          "header": ["implementation", *ms],
          "rows": [[name, *(by_name[name] for by_name in ms.values())]
                   for name in next(iter(ms.values()))],
          "note": f"Medians of {rounds} alternating rounds. Outputs and gradients of all "
                  f"implementations agree to {errors:.1e}, relative to the largest element."}])
