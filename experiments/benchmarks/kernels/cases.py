"""The operations that `bench_kernels` times, on shapes of real models or random ones.

Shape letters:  M, R rows  N, K widths  G groups  F hidden units  B batch  T query positions
                H heads  S slots  C width of a cache's entry
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as ops
from pallas_kernels.ops.fp8_grouped import aligned_rows


class Target(NamedTuple):
  """A speed-up over a contender that our implementation should reach."""

  contender: str
  ratio: float


@dataclasses.dataclass(frozen=True)
class Case:
  """An operation on one shape.

  Attributes:
    operation: name of the operation.
    shape: description of the shape, for tables.
    work: FLOPs, or bytes read and written, that define the operation, whatever a contender does.
    unit: unit of the rate that follows from `work`, "TFLOP/s" or "GB/s".
    operands: makes the operands, which all contenders share.
    contenders: implementations by name, as functions of the operands; the first is ours.
    peers: names of functions in `experiments.benchmarks.peers.torch_kernels`, by the peer's name.
    reference: function of the operands whose result ours is compared with; None to report no error.
    targets: speed-ups that our implementation should reach.
    most_seconds: the time that ours should take at most, given the rate of a copy in bytes a
      second; None for no such target.
  """

  operation: str
  shape: str
  work: float
  unit: str
  operands: Callable[[], tuple]
  contenders: dict[str, Callable]
  peers: dict[str, str] = dataclasses.field(default_factory=dict)
  reference: Callable | None = None
  targets: Sequence[Target] = ()
  most_seconds: Callable[[float], float] | None = None


class Shapes(NamedTuple):
  """The shapes of one scale.

  Attributes:
    products: M, N and K of each dense product.
    grouped: rows, groups, K and N of each grouped product, and how even its groups are.
    quantised: rows and columns of each matrix of activations.
    experts: tokens, experts per token, width and hidden units of each MoE layer.
    decoded: rows of the batch, query positions, heads and tokens of each latent cache.
  """

  products: tuple[tuple[int, int, int], ...]
  grouped: tuple[tuple[int, int, int, int, str], ...]
  quantised: tuple[tuple[int, int], ...]
  experts: tuple[tuple[int, int, int, int], ...]
  decoded: tuple[tuple[int, int, int, int], ...] = ()


# The first eight digits of the commits that fixed the rules by which tilings are chosen, of dense
# and of grouped products: no shape that is drawn with them was known to the rules.
DENSE_SEED, GROUPED_SEED = 0x283d4fbe, 0x4664f85b
_RANDOM = 24  # shapes of each kind
_RANDOM_OURS = ("ours", "ours, float32 result")  # contenders on random shapes, besides torch


def random_shapes(seed: int) -> Shapes:
  """Draws shapes from the ranges of V2-Lite, V2, V3, Qwen3-MoE and our own models.

  Sizes are log-uniform. Operands are at most 4 GB. torch's FP8 product needs multiples of 4 rows.
  """
  rng = np.random.default_rng(seed)

  def size(low, high, multiple=1):
    return int(round(np.exp(rng.uniform(np.log(low), np.log(high))) / multiple) * multiple)

  products = tuple((size(65, 16384, 4), size(512, 24576, 64), size(512, 16384, 128))
                   for _ in range(_RANDOM))
  few = tuple((size(1, 64), size(1024, 24576, 64), size(1024, 16384, 128))
              for _ in range(_RANDOM // 2))
  grouped = []
  while len(grouped) < _RANDOM:
    rows, groups = size(12288, 131072), size(8, 256)
    k, n = size(512, 7168, 128), size(512, 4096, 128)
    if max(rows * k, rows * n, groups * k * n) < 2e9:
      grouped.append((rows, groups, k, n, ("even", "skewed")[len(grouped) % 2]))
  return Shapes(products + few, tuple(grouped), (), ())


def _both(*shapes: tuple[int, int, int, int]) -> tuple[tuple[int, int, int, int, str], ...]:
  return tuple((*shape, skew) for shape in shapes for skew in ("even", "skewed"))


SHAPES = {
    "smoke": Shapes(((128, 256, 384),), _both((300, 4, 128, 256)), ((256, 256),),
                    ((64, 2, 256, 128),), ((2, 1, 4, 70),)),
    "gpu": Shapes(
        ((8192, 8192, 8192), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 16384)),
        _both((65536, 64, 2048, 1408), (65536, 32, 7168, 2048)), ((16384, 7168), (65536, 2048)),
        ((16384, 6, 1024, 512), (16384, 6, 2048, 1408)),
        ((256, 1, 16, 4096), (32, 1, 16, 4096), (128, 4, 16, 4096), (64, 1, 128, 4096))),
    "gpu_random": random_shapes(GROUPED_SEED)._replace(
        products=random_shapes(DENSE_SEED).products),
}


def cases(scale: str, implementation: str | None) -> Iterator[Case]:
  """Yields every case of a scale; `implementation` is that of ours, None for the default."""
  shapes = SHAPES[scale]
  for case in _of_products(shapes, implementation):
    # XLA's grouped products take a second each: random shapes are compared with torch's alone.
    yield case if scale != "gpu_random" else dataclasses.replace(
        case, contenders={
            name: run for name, run in case.contenders.items() if name in _RANDOM_OURS},
        reference=case.reference if case.operation.startswith("fp8_matmul") else None)
  for shape in shapes.quantised:
    yield from _quantised(*shape, implementation)
  for shape in shapes.experts:
    yield from _experts(*shape, implementation)
  for shape in shapes.decoded:
    yield _mla_decode(*shape, implementation)


def _of_products(shapes: Shapes, implementation: str | None) -> Iterator[Case]:
  for shape in shapes.products:
    yield _fp8_matmul(*shape, implementation)
  for shape in shapes.grouped:
    yield from _grouped(*shape, implementation)


def group_sizes(rows: int, groups: int, skew: str) -> jax.Array:
  """Returns the rows of each group: as even as possible, or inversely proportional to its rank."""
  weights = jnp.ones(groups) if skew == "even" else 1 / jnp.arange(1, groups + 1)
  ends = jnp.round(jnp.cumsum(weights) / weights.sum() * rows).astype(jnp.int32)
  return jnp.diff(ends, prepend=0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _fp8_matmul(m: int, n: int, k: int, implementation: str | None) -> Case:
  def operands():
    x_MK, w_NK = normal(m, k), normal(n, k, seed=1)
    return ops.quantize(x_MK), ops.quantize(w_NK, "128x128"), x_MK, w_NK

  few = m <= 64
  # Few rows take as long as it takes to read the weights, and short kernels 4 us more.
  read = lambda rate: n * k / (0.8 * rate) + (4e-6 if n * k < 64e6 else 0)
  return Case(
      "fp8_matmul, few rows" if few else "fp8_matmul", f"{m} x {n} x {k}", 2 * m * n * k,
      "TFLOP/s", operands,
      {"ours": lambda x, w, *_: ops.fp8_matmul(x, w, implementation=implementation),
       "XLA bf16": lambda x, w, x_MK, w_NK: x_MK @ w_NK.T},
      {"torch _scaled_mm": "scaled_mm", "torch bf16": "plain_mm"},
      lambda x, w, *_: ops.fp8_matmul(x, w, dtype=jnp.float32, implementation="xla"),
      (Target("torch _scaled_mm", 1.0), *(() if few else (Target("torch bf16", 1.5),))),
      read if few else None)


def _grouped(rows, groups, k, n, skew, implementation) -> Iterator[Case]:
  shape, flops = f"{rows} x {k} x {n}, {groups} {skew} groups", 2 * rows * k * n
  sizes = lambda: group_sizes(rows, groups, skew)
  forward = lambda: (normal(rows, k), normal(groups, k, n, seed=1), sizes())
  backward = lambda: (normal(rows, k), normal(rows, n, seed=2), sizes())
  ours = functools.partial(ops.grouped_matmul, implementation=implementation)

  def forward_and_backward(product):
    def run(x_RK, w_GKN, sizes_G, dy_RN):
      y_RN, vjp = jax.vjp(lambda x, w: product(x, w, sizes_G), x_RK, w_GKN)
      return y_RN, *vjp(dy_RN)
    return run

  yield Case(
      "grouped_matmul, forward", shape, flops, "TFLOP/s", forward,
      {"ours": ours, "lax.ragged_dot": lax.ragged_dot}, {"torch grouped_mm": "grouped_mm"},
      lax.ragged_dot, (Target("torch grouped_mm", 1.0), Target("lax.ragged_dot", 50.0)))
  yield Case(
      "grouped_matmul, forward and backward", shape, 3 * flops, "TFLOP/s",
      lambda: (*forward(), backward()[1]),
      {"ours": forward_and_backward(ours), "lax.ragged_dot": forward_and_backward(lax.ragged_dot)},
      {"torch grouped_mm": "grouped_mm_forward_backward"}, forward_and_backward(lax.ragged_dot),
      (Target("torch grouped_mm", 1.0), Target("lax.ragged_dot", 50.0)))
  yield _fp8_grouped(shape, flops, forward, ours, implementation)
  yield _fp8_weight_gradient(
      f"{shape}, {aligned_rows(rows, groups)} aligned", flops, backward, implementation)


def _fp8_grouped(shape, flops, plain, bf16, implementation) -> Case:
  def operands():
    x_RK, w_GKN, sizes_G = plain()
    return ops.quantize(x_RK), ops.quantize(w_GKN.mT, "128x128"), sizes_G, x_RK, w_GKN

  return Case(
      "fp8_grouped_matmul", shape, flops, "TFLOP/s", operands,
      {"ours": lambda x, w, sizes, *_: ops.fp8_grouped_matmul(
          x, w, sizes, implementation=implementation),
       "ours, bf16": lambda x, w, sizes, x_RK, w_GKN: bf16(x_RK, w_GKN, sizes)},
      {"torch grouped_mm": "grouped_mm_before_quantisation"},
      reference=lambda x, w, sizes, *_: ops.fp8_grouped_matmul(
          x, w, sizes, dtype=jnp.float32, implementation="xla"),
      targets=(Target("ours, bf16", 1.5), Target("torch grouped_mm", 1.45)))


def _fp8_weight_gradient(shape, flops, plain, implementation) -> Case:
  """Gradients in bfloat16, as torch's are, and in float32, which are twice the bytes to write."""
  def gradient(x, dy, sizes, *_, dtype=jnp.bfloat16, implementation=implementation):
    return ops.fp8_grouped_weight_gradient(
        x, dy, sizes, dtype=dtype, implementation=implementation)

  def operands():
    x_RK, dy_RN, sizes_G = plain()
    quantised = (ops.quantize_groups(x, sizes_G) for x in (x_RK, dy_RN))
    return *quantised, sizes_G, x_RK, dy_RN

  return Case(
      "fp8_grouped_weight_gradient", shape, flops, "TFLOP/s", operands,
      {"ours": gradient, "ours, float32 result": functools.partial(gradient, dtype=jnp.float32),
       "ours, bf16": lambda x, dy, sizes, x_RK, dy_RN: ops.grouped_weight_gradient(
           x_RK, dy_RN, sizes, dtype=jnp.bfloat16, implementation=implementation)},
      {"torch grouped_mm": "grouped_weight_gradient"},
      reference=functools.partial(gradient, dtype=jnp.float32, implementation="xla"),
      targets=(Target("ours, bf16", 1.2), Target("torch grouped_mm", 1.0)))


def _quantised(rows: int, columns: int, implementation: str | None) -> Iterator[Case]:
  scales = rows * columns // 128 * 4
  gate_up = rows, 2, columns // 2
  named = {"quantize": (ops.quantize, (rows, columns), columns, scales),
           "swiglu_quantize": (ops.swiglu_quantize, gate_up, columns // 2, scales / 2),
           "quantize_both": (ops.quantize_both, (rows, columns), 2 * columns, 2 * scales)}
  for name, (run, shape, written, scale_bytes) in named.items():
    moved = int(rows * (2 * columns + written) + scale_bytes)
    # Copying the second array moves the same number of bytes as the operation.
    operands = lambda shape=shape, moved=moved: (
        normal(*shape), jnp.zeros(moved // 4, jnp.bfloat16))
    yield Case(
        name, f"{rows} x {columns}", moved, "GB/s", operands,
        {"ours": lambda x, _, run=run: run(x, implementation=implementation),
         "XLA": lambda x, _, run=run: run(x, implementation="xla"),
         "copy of equal size": lambda _, x: -x},
        targets=(Target("copy of equal size", 0.8),))


def _experts(tokens: int, chosen: int, width: int, hidden: int,
             implementation: str | None) -> Iterator[Case]:
  """Operations of the experts other than matrix products."""
  rows = tokens * chosen
  sent = lambda: jax.random.permutation(jax.random.key(1), rows).astype(jnp.int32) // chosen
  named = {
      "gather_rows": (ops.gather_rows, f"{rows} of {tokens} x {width}", 2 * (tokens + rows) * width,
                    lambda: (normal(tokens, width), sent())),
      "swiglu_gated_backward": (
          ops.swiglu_gated_backward, f"{rows} x {hidden}", 12 * rows * hidden,
          lambda: (normal(rows, 2 * hidden), jnp.ones(rows), normal(rows, hidden, seed=2)))}
  for name, (run, shape, moved, operands) in named.items():
    yield Case(
        name, shape, moved, "GB/s", operands,
        {"ours": functools.partial(run, implementation=implementation),
         "XLA": functools.partial(run, implementation="xla")})


_ENTRY, _VALUES = 576, 512  # widths of V2's and V3's latents with the rotated key, and without


def _mla_decode(batch, positions, heads, tokens, implementation) -> Case:
  """Attention over a cache. With few query rows it is bound by reading the cache once."""
  rows = positions * heads
  flops = 2 * batch * rows * tokens * (_ENTRY + _VALUES)
  work, unit = ((flops, "TFLOP/s") if rows > 64 else (2 * batch * tokens * _ENTRY, "GB/s"))
  run = lambda implementation, q_BTHC, cache, lengths_B: ops.mla_decode(
      q_BTHC, cache, 0, lengths_B, value_width=_VALUES, scale=_ENTRY**-0.5,
      implementation=implementation)
  return Case(
      "mla_decode", f"{batch} x {tokens} tokens, {positions} x {heads} query rows", work, unit,
      lambda: (normal(batch, positions, heads, _ENTRY), normal(1, batch, tokens, _ENTRY, seed=1),
               jnp.full(batch, tokens - positions, jnp.int32)),
      {"ours": functools.partial(run, implementation), "XLA": functools.partial(run, "xla")},
      reference=functools.partial(run, "xla"), targets=(Target("XLA", 2.0),))
