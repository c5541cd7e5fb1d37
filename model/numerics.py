"""The numerics policy: the formats in which arrays are stored, and those of their products."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from model.checks import require
from model.token_shards import map_token_shards
from pallas_kernels import Recipe, Weight, fp8_linear, fp8_swiglu

_FORMATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Numerics:
  """A numerics policy. It names formats, and so is data: hashable, comparable, writable to JSON.

  Whatever the policy, the router's gate, norms, softmax and rotations are computed in float32 (for
  the gate see `model.wide_product`), and the balancing bias is stored in float32.

  Attributes:
    params: format in which `init` creates parameters: "float32", "bfloat16" or "float16".
    compute: format of the operands and results of matrix products, one of the same three.
    recipe: how linear layers quantise the operands of their products to FP8; None for no FP8.
      Embedding, head, gate, norms and attention's own products are never in FP8 (V3 section 3.3.1).
  """

  params: str = "float32"
  compute: str = "float32"
  recipe: Recipe | None = None

  def __post_init__(self):
    for name in ("params", "compute"):
      value = getattr(self, name)
      if value not in _FORMATS:
        raise ValueError(f"Numerics.{name}={value!r} must be one of {', '.join(_FORMATS)}")
    require(not self.recipe or self.compute != "float16",
            "Numerics.compute='float16' cannot be used with a recipe, because FP8 with its scales "
            "has a wider range than float16: use 'bfloat16'")

  @classmethod
  def parse(cls, text: str) -> "Numerics":
    """Returns the policy of this name, a key of NUMERICS.

    Raises:
      ValueError: if there is none; the message lists the names that exist.
    """
    require(text in NUMERICS,
            f"there is no numerics policy {text!r}; there are: {', '.join(NUMERICS)}")
    return NUMERICS[text]

  @property
  def param_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.params)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.compute)

  def einsum(self, spec: str, *operands: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` in the compute format, to which it casts the operands.

    Products of float32 are computed in float32: by default, accelerators would multiply in TF32 or
    bfloat16.
    """
    return jnp.einsum(spec, *self._cast(operands), precision=self.precision)

  def linear(
      self, spec: str, x: jax.Array, w: jax.Array | Weight, *, after_attention: bool = False,
  ) -> jax.Array:
    """Applies a linear layer: `einsum` of activations and a weight, in FP8 if there is a recipe.

    Args:
      spec: an einsum over the last axes of x and the first ones of w, such as "btd,dhk->bthk".
      x: activations; their first axes are batch and length.
      w: the weight as it is stored, or a `Weight` that has been quantised already.
      after_attention: whether x is the output of attention; see `pallas_kernels.fp8_linear`.

    Returns:
      The axes of x that are not summed, then those of w, in the compute format.
    """
    if self.recipe is None:
      return self.einsum(spec, x, w)
    x_letters, w_letters = spec.partition("->")[0].split(",")
    summed = sum(letter in w_letters for letter in x_letters)
    width = math.prod(w.shape[:summed])

    def local(w, x):
      y = fp8_linear(x.reshape(-1, width), w.reshape(width, -1), self.recipe,
                     after_attention=after_attention)
      return y.reshape(*x.shape[:-summed], *w.shape[summed:])

    return map_token_shards(local, w, x.astype(self.compute_dtype))

  def swiglu(
      self, x_BTD: jax.Array, w_gate_up: jax.Array | Weight, w_down: jax.Array | Weight,
  ) -> jax.Array:
    """Applies a SwiGLU layer in FP8; there must be a recipe.

    Args:
      x_BTD: activations.
      w_gate_up: weights of the gate and up projections, [D, 2, F].
      w_down: weight of the down projection, [F, D].

    Returns:
      [B, T, D] in the compute format.
    """
    def local(weights, x_BTD):
      y = fp8_swiglu(x_BTD.reshape(-1, x_BTD.shape[-1]), *weights, self.recipe)
      return y.reshape(x_BTD.shape)

    return map_token_shards(local, (w_gate_up, w_down), x_BTD.astype(self.compute_dtype))

  def einsum_f32(self, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes `einsum`, but returns the float32 accumulator; gradients have the compute format."""
    return _einsum_f32(spec, self.precision, *self._cast((a, b)))

  @property
  def precision(self) -> lax.Precision | None:
    """The `precision` of products in the compute format; see `einsum`."""
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
    "fp8": Numerics(compute="bfloat16", recipe=Recipe()),
    # Gradients of FP8 weights in bfloat16, where V3 has float32.
    "fp8_bf16_gradients": Numerics(compute="bfloat16", recipe=Recipe(gradients="bfloat16")),
}
