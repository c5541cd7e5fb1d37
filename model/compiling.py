"""`jax.jit` with the compiler options that suit the backend.

By default, XLA tunes the matrix products of a GPU program one by one: it generates dozens of Triton
kernels for each, compiles them and times them. For a model of a million parameters that is nine
tenths of the time in which a training step compiles. Without, cuBLAS computes the products. On an
H200 that made no difference to training steps of `base` and of V2-Lite's widths, whose layers do
not run in a loop, nor to rollouts of `nano` and `base` (0.99 to 1.00 of the time). A step of
`small`, whose layers run in a loop, took 1.12 times as long: see `is_tuned`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from model.config import ModelConfig
from pallas_kernels.targets import target

_TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"
_LARGE = 2**24  # parameters
_TOP_LEVEL = get_opaque_trace_state()  # modules are imported outside of all transformations


def is_tuned(cfg: ModelConfig, unroll: int) -> bool:
  """Whether training steps of a network are worth tuning: large ones, with a loop over layers.

  Args:
    cfg: the architecture.
    unroll: layers in one iteration of the loop, as in `model.Transformer`.
  """
  loops = any(unroll < max(2, count) for _, count, _ in cfg.layer_stacks())
  return loops and cfg.param_count() > _LARGE


def compiler_options(*, tuned: bool = False) -> dict[str, bool]:
  """Returns the compiler options of a program for the device that it is traced for.

  An option that the environment variable XLA_FLAGS names is left to it.

  Args:
    tuned: whether XLA tunes the program's matrix products on a GPU.
  """
  if tuned or target().platform != "gpu" or (
      _TRITON_PRODUCTS in os.environ.get("XLA_FLAGS", "")):
    return {}
  return {_TRITON_PRODUCTS: False}


class Jitted:
  """A jitted function; `jit` returns it."""

  def __init__(self, function: Callable, tuned: bool, **kwargs: Any):
    functools.update_wrapper(self, function)
    # JAX does not accept compiler options for a function that is part of another program.
    self._nested = jax.jit(function, **kwargs)
    self._tuned, self._kwargs = tuned, kwargs
    self._with_options: dict[tuple, Callable] = {}

  @property
  def _program(self) -> Callable:
    # Not at import, when asking for the backend would initialise the devices.
    options = compiler_options(tuned=self._tuned)
    if not options:
      return self._nested
    key = tuple(options.items())
    if key not in self._with_options:
      self._with_options[key] = jax.jit(
          self.__wrapped__, compiler_options=options, **self._kwargs)
    return self._with_options[key]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    top_level = get_opaque_trace_state() == _TOP_LEVEL
    return (self._program if top_level else self._nested)(*args, **kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
    """Returns the function lowered for the given arguments, as that of `jax.jit` does."""
    return self._program.lower(*args, **kwargs)


def jit(function: Callable, *, tuned: bool = False, **kwargs: Any) -> Jitted:
  """Returns `jax.jit` of a function with `compiler_options`, also as a decorator.

  Within another jitted function or a transformation, it is the same as without the options.

  Args:
    function: the function.
    tuned: whether XLA tunes the program's matrix products on a GPU, see `is_tuned`.
    **kwargs: further arguments of `jax.jit`.
  """
  return Jitted(function, tuned, **kwargs)
