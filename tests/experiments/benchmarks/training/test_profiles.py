"""Profiles: the instructions of a trace are attributed to kinds of work, and their times add up."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.training import profiles
from experiments.benchmarks.training.profiles import Kernel


def test_a_real_trace_is_attributed_to_the_kinds_of_work_of_the_program(tmp_path):
  def work(x):
    with jax.named_scope("optimizer"):
      y = jnp.sin(x) * 3
    return jnp.sort(y @ y, axis=-1)

  x = jnp.ones((200, 200))
  compiled = jax.jit(work).lower(x).compile()
  compiled(x).block_until_ready()
  with jax.profiler.trace(str(tmp_path)):
    for _ in range(3):
      compiled(x).block_until_ready()
  found, came_from = profiles.kernels(tmp_path), profiles.origins(compiled.as_text())
  kinds = {share.name: share for share in profiles.by_kind(found, came_from)}
  assert {"optimizer", "dense products", "sort, gather, scatter", "idle"} <= set(kinds)
  assert kinds["optimizer"].count >= 3 and kinds["idle"].seconds > 0
  total = sum(kernel.seconds for kernel in found)
  by_kernel = profiles.by_kernel(found, came_from)
  assert sum(share.seconds for share in by_kernel) == pytest.approx(total)


@pytest.mark.parametrize(("kernel", "origin", "kind"), [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "", "attention"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "jit(f)/btd,dhk->bthk", "dense products"),
    ("mosaic_gpu_kernel", "moe_layers/ffn/ragged_dot_general", "grouped products"),
    ("anonymous_mosaic_gpu_kernel", "", "our kernels"),
    ("anonymous_mosaic_gpu_kernel", "moe_layers/ffn/quantize/pallas_call", "quantise"),
    ("fp8_grouped_weight_gradient_mosaic_gpu_kernel", "", "grouped products"),
    ("fp8_matmul_mosaic_gpu_kernel", "", "dense products"),
    ("loop_convert_fusion_3", "moe_layers/ffn/quantize/mul", "quantise"),
    ("void cub::DeviceRadixSortOnesweepKernel", "", "sort, gather, scatter"),
    ("loop_multiply_fusion", "jit(train_step)/optimizer/mul", "optimizer"),
    ("input_reduce_fusion_2", "ffn_norm/reduce_sum", "reductions"),
    ("MemcpyD2D", "", "copies"),
    ("loop_add_fusion_7", "moe_layers/add", "elementwise"),
])
def test_gpu_kernels_are_classified_by_name_and_origin(kernel, origin, kind):
  instruction = kernel.replace("fusion_", "fusion.")  # its name in the program
  assert profiles.kind(Kernel(kernel, kernel, 0, 0), {instruction: origin}) == kind


def test_idle_time_is_what_no_kernel_covers():
  found = [Kernel("a", "a", 0.0, 1.0), Kernel("b", "b", 0.5, 1.0), Kernel("c", "c", 2.0, 0.5)]
  idle = profiles.by_kind(found, {})[-1]
  assert idle.name == "idle" and idle.seconds == pytest.approx(0.5)


def test_a_folder_without_a_trace_is_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no trace"):
    profiles.kernels(tmp_path)
