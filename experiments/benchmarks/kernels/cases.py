"""The operations that `bench_kernels` times, on shapes of real models, with their contenders.

Shape letters:  M, R rows  N, K widths  G groups  F hidden units
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
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


class Shapes(NamedTuple):
  """The shapes of one scale.

  Attributes:
    products: M, N and K of each dense product.
    grouped: rows, groups, K and N of each grouped product.
    quantised: rows and columns of each matrix of activations.
    experts: tokens, experts per token, width and hidden units of each MoE layer.
  """

  products: tuple[tuple[int, int, int], ...]
  grouped: tuple[tuple[int, int, int, int], ...]
  quantised: tuple[tuple[int, int], ...]
  experts: tuple[tuple[int, int, int, int], ...]


SHAPES = {
    "smoke": Shapes(((128, 256, 384),), ((300, 4, 128, 256),), ((256, 256),),
                    ((64, 2, 256, 128),)),
    "gpu": Shapes(
        ((8192, 8192, 8192), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 16384)),
        ((65536, 64, 2048, 1408), (65536, 32, 7168, 2048)), ((16384, 7168), (65536, 2048)),
        ((16384, 6, 1024, 512), (16384, 6, 2048, 1408))),
}


def cases(scale: str, implementation: str | None) -> Iterator[Case]:
  """Yields every case of a scale; `implementation` is that of ours, None for the default."""
  shapes = SHAPES[scale]
  for shape in shapes.products:
    yield _fp8_matmul(*shape, implementation)
  for shape in shapes.grouped:
    for skew in ("even", "skewed"):
      yield from _grouped(*shape, skew, implementation)
  for shape in shapes.quantised:
    yield from _quantised(*shape, implementation)
  for shape in shapes.experts:
    yield from _experts(*shape, implementation)


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

  return Case(
      "fp8_matmul", f"{m} x {n} x {k}", 2 * m * n * k, "TFLOP/s", operands,
      {"ours": lambda x, w, *_: ops.fp8_matmul(x, w, implementation=implementation),
       "XLA bf16": lambda x, w, x_MK, w_NK: x_MK @ w_NK.T},
      {"torch _scaled_mm": "scaled_mm", "torch bf16": "plain_mm"},
      lambda x, w, *_: ops.fp8_matmul(x, w, dtype=jnp.float32, implementation="xla"),
      (Target("torch _scaled_mm", 1.0), Target("torch bf16", 1.5)))


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
      reference=lambda x, w, sizes, *_: ops.fp8_grouped_matmul(
          x, w, sizes, dtype=jnp.float32, implementation="xla"),
      targets=(Target("ours, bf16", 1.5),))


def _fp8_weight_gradient(shape, flops, plain, implementation) -> Case:
  def operands():
    x_RK, dy_RN, sizes_G = plain()
    quantised = (ops.quantize_groups(x, sizes_G) for x in (x_RK, dy_RN))
    return *quantised, sizes_G, x_RK, dy_RN

  return Case(
      "fp8_grouped_weight_gradient", shape, flops, "TFLOP/s", operands,
      {"ours": lambda x, dy, sizes, *_: ops.fp8_grouped_weight_gradient(
          x, dy, sizes, implementation=implementation),
       "ours, bf16": lambda x, dy, sizes, x_RK, dy_RN: ops.grouped_weight_gradient(
           x_RK, dy_RN, sizes, dtype=jnp.float32, implementation=implementation)},
      reference=lambda x, dy, sizes, *_: ops.fp8_grouped_weight_gradient(
          x, dy, sizes, implementation="xla"),
      targets=(Target("ours, bf16", 1.2),))


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
