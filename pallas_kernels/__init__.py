"""The low-precision and attention core: one public function per operation, one file per backend.

Every operation takes `implementation`: "xla" is the readable oracle, which works everywhere;
"mosaic_gpu" (Hopper) and "mosaic_tpu" are kernels, and raise ValueError with the reason where this
machine or these operands are not for them. None is this machine's kernel, if that has been run on
hardware and can take the operands, and else "xla".
"""

from pallas_kernels.dispatch import Dispatch, dispatch
from pallas_kernels.fp8_experts import fp8_experts
from pallas_kernels.fp8_grouped import (
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    quantize_groups,
)
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.gated_down import gated_down
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.quantize import (
    quantize,
    quantize_both,
    swiglu,
    swiglu_quantize,
    swiglu_quantize_with_inputs,
)
from pallas_kernels.quantized import FORMATS, Quantized, dequantize
from pallas_kernels.recipe import RECIPES, Recipe
from pallas_kernels.requantize import quantize_transposed
from pallas_kernels.swiglu_backward import SwigluBackward, swiglu_backward_quantize
from pallas_kernels.swiglu_gated import (
    SwigluGatedBackward,
    swiglu_gated,
    swiglu_gated_backward,
)
from pallas_kernels.take_rows import take_rows
from pallas_kernels.weight import Weight, WeightOperands, quantize_weight

__all__ = [
    "FORMATS", "RECIPES", "Dispatch", "Quantized", "Recipe", "SwigluBackward",
    "SwigluGatedBackward", "Weight", "WeightOperands", "dequantize", "dispatch", "fp8_experts",
    "fp8_grouped_matmul", "fp8_grouped_weight_gradient", "fp8_linear", "fp8_matmul",
    "gated_down", "grouped_matmul", "grouped_weight_gradient", "quantize", "quantize_both",
    "quantize_groups", "quantize_transposed", "quantize_weight", "swiglu",
    "swiglu_backward_quantize", "swiglu_gated", "swiglu_gated_backward", "swiglu_quantize",
    "swiglu_quantize_with_inputs", "take_rows"]
