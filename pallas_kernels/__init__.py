"""Kernels for FP8 training, mixture-of-experts layers and decoding.

They are quantisation, products, SwiGLU, gathers, and attention over a cache of latents.

Each operation has one public function, in `ops`, and one file per backend that has a kernel for it,
in `mosaic_gpu` and `mosaic_tpu`. Operations with kernels take the keyword `implementation`:

  "xla"         the readable oracle in plain JAX, which runs everywhere
  "mosaic_gpu"  the kernel for NVIDIA Hopper
  "mosaic_tpu"  the kernel for TPUs
  None          this machine's kernel if kernels of its kind have been run on hardware and it
                supports the operands and the program's partitioning; otherwise "xla"

A kernel that is named but cannot run on this machine or on these operands raises ValueError with
the reason.
"""

from pallas_kernels.ops.expert_rows import ExpertRows, layout_expert_rows
from pallas_kernels.ops.fp8_experts import fp8_experts
from pallas_kernels.ops.fp8_grouped import (
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    quantize_groups,
)
from pallas_kernels.ops.fp8_linear import fp8_linear
from pallas_kernels.ops.fp8_matmul import fp8_matmul
from pallas_kernels.ops.fp8_swiglu import fp8_swiglu
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.ops.mla_decode import mla_decode
from pallas_kernels.ops.moe_down_proj import moe_down_proj
from pallas_kernels.ops.quantize import (
    quantize,
    quantize_both,
    swiglu,
    swiglu_quantize,
    swiglu_quantize_with_inputs,
)
from pallas_kernels.ops.requantize import quantize_transposed
from pallas_kernels.ops.swiglu_backward import SwigluBackward, swiglu_backward_quantize
from pallas_kernels.ops.swiglu_gated import (
    SwigluGatedBackward,
    swiglu_gated,
    swiglu_gated_backward,
)
from pallas_kernels.quantized import FORMATS, Quantized, dequantize
from pallas_kernels.recipe import RECIPES, Recipe
from pallas_kernels.weight import Weight, WeightOperands, quantize_weight

__all__ = [
    "FORMATS",
    "RECIPES",
    "ExpertRows",
    "Quantized",
    "Recipe",
    "SwigluBackward",
    "SwigluGatedBackward",
    "Weight",
    "WeightOperands",
    "dequantize",
    "fp8_experts",
    "fp8_grouped_matmul",
    "fp8_grouped_weight_gradient",
    "fp8_linear",
    "fp8_matmul",
    "fp8_swiglu",
    "gather_rows",
    "grouped_matmul",
    "grouped_weight_gradient",
    "layout_expert_rows",
    "mla_decode",
    "moe_down_proj",
    "quantize",
    "quantize_both",
    "quantize_groups",
    "quantize_transposed",
    "quantize_weight",
    "swiglu",
    "swiglu_backward_quantize",
    "swiglu_gated",
    "swiglu_gated_backward",
    "swiglu_quantize",
    "swiglu_quantize_with_inputs",
]
