"""torch's matrix products on a GPU, on tensors that share the memory of our arrays."""

import jax
import jax.numpy as jnp
import torch


def wait(_) -> None:
  """Waits until the GPU has finished all work that it was given."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def tensors(operands: tuple) -> tuple:
  """Returns torch views of arrays, FP8 included; a quantised array becomes (values, scales).

  Scales are [rows, k], and those of tiles of one row are in column-major order.
  """
  return tuple((_tensor(x.values_MK), _scales(x)) if hasattr(x, "values_MK")
               else jax.tree.map(_tensor, x) for x in operands)


def _scales(x):
  if x.tile[0] > 1:
    return _tensor(x.scales)
  return _tensor(x.scales)[:, :x.shape[0]].contiguous().t()


def _tensor(x: jax.Array):
  if x.dtype == jnp.float8_e4m3fn:  # DLPack has no FP8 type that jax and torch both support
    bits = torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8))
    return bits.view(torch.float8_e4m3fn)
  return torch.from_dlpack(x)


def scaled_mm(x, w, *_):
  """cuBLASLt's product with 1x128 and 128x128 scales, which it requires in column-major order."""
  (x_MK, scales_Mk), (w_NK, scales_nk) = x, w
  return torch._scaled_mm(x_MK, w_NK.t(), scale_a=scales_Mk, scale_b=scales_nk.t(),
                          out_dtype=torch.bfloat16)


def unscaled_mm(lhs_MK: jax.Array, rhs_NK: jax.Array, *, fast: bool) -> jax.Array:
  """cuBLASLt's product of FP8 arrays, lhs @ rhs.T in float32, with or without fast accumulation."""
  lhs, rhs = tensors((lhs_MK, rhs_NK))
  one = torch.ones((), device=lhs.device)
  out_MN = torch._scaled_mm(lhs, rhs.t(), scale_a=one, scale_b=one, out_dtype=torch.float32,
                            use_fast_accum=fast)
  wait(out_MN)
  return jax.dlpack.from_dlpack(out_MN)


def plain_mm(x, w, x_MK, w_NK):
  """The same product in bfloat16, of the operands before quantisation."""
  return x_MK @ w_NK.t()


def grouped_mm(x_RK, w_GKN, sizes_G):
  """Product of each group's rows with the group's matrix."""
  return torch._grouped_mm(x_RK, w_GKN, offs=sizes_G.cumsum(0, dtype=torch.int32))


def grouped_mm_forward_backward(x_RK, w_GKN, sizes_G, dy_RN):
  """The grouped product and the gradients of both operands."""
  x_RK, w_GKN = x_RK.detach().requires_grad_(), w_GKN.detach().requires_grad_()
  y_RN = grouped_mm(x_RK, w_GKN, sizes_G)
  return y_RN, *torch.autograd.grad(y_RN, (x_RK, w_GKN), dy_RN)


def grouped_mm_before_quantisation(x, w, sizes_G, x_RK, w_GKN):
  """The same grouped product in bfloat16, of the operands before quantisation."""
  return grouped_mm(x_RK, w_GKN, sizes_G)


def grouped_weight_gradient(x, dy, sizes_G, x_RK, dy_RN):
  """The gradients of a grouped product's matrices in bfloat16, before quantisation."""
  return torch._grouped_mm(x_RK.t(), dy_RN, offs=sizes_G.cumsum(0, dtype=torch.int32))
