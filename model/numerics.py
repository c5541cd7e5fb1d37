"""The numerics policy: in which format numbers are kept, and in which they are multiplied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

_FORMATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Numerics:
  """Formats by name, so that a policy is data: hashable, comparable, writable to JSON.

  Whatever the policy, the router's gate, norms, softmax and rotations run in float32, and the
  balancing bias is stored in it.
  """

  params: str = "float32"   # what `init` creates parameters in
  compute: str = "float32"  # operands and results of every linear layer

  def __post_init__(self):
    for name in ("params", "compute"):
      value = getattr(self, name)
      if value not in _FORMATS:
        raise ValueError(f"Numerics.{name}={value!r} must be one of {', '.join(_FORMATS)}")

  @property
  def param_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.params)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.compute)

  def einsum(self, spec: str, *operands: jax.Array) -> jax.Array:
    """A product of activations and weights, in the compute format.

    Float32 means float32: accelerators would otherwise multiply in TF32 or bfloat16.
    """
    return jnp.einsum(spec, *self._cast(operands), precision=self.precision)

  def einsum_f32(self, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same product with its float32 accumulator kept; gradients flow in the compute format."""
    return _einsum_f32(spec, self.precision, *self._cast((a, b)))

  @property
  def precision(self) -> lax.Precision | None:
    return lax.Precision.HIGHEST if self.compute == "float32" else None

  def _cast(self, operands):
    return tuple(operand.astype(self.compute_dtype) for operand in operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum_f32(spec, precision, a, b):
  return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _einsum_f32_forward(spec, precision, a, b):
  return _einsum_f32(spec, precision, a, b), (a, b)


def _einsum_f32_backward(spec, precision, operands, dy):
  _, vjp = jax.vjp(functools.partial(jnp.einsum, spec, precision=precision), *operands)
  return vjp(dy.astype(operands[0].dtype))


_einsum_f32.defvjp(_einsum_f32_forward, _einsum_f32_backward)

NUMERICS = {
    "fp32": Numerics(),
    "bf16": Numerics(compute="bfloat16"),
}
