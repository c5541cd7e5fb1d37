"""The low-precision and attention core: one public function per operation, one file per backend.

Every operation takes `implementation`: "xla" is the readable oracle, which works everywhere;
"mosaic_gpu" (Hopper) and "mosaic_tpu" are kernels, and raise ValueError with the reason where this
machine or these operands are not for them. None is this machine's kernel, if that has been run on
hardware and can take the operands, and else "xla".
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
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
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
    "Dispatch",
    "Quantized",
    "Recipe",
    "SwigluBackward",
    "SwigluGatedBackward",
    "Weight",
    "WeightOperands",
    "dequantize",
    "dispatch",
    "fp8_experts",
    "fp8_grouped_matmul",
    "fp8_grouped_weight_gradient",
    "fp8_linear",
    "fp8_matmul",
    "gather_rows",
    "grouped_matmul",
    "grouped_weight_gradient",
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
