"""The low-precision and attention core: one public function per operation, one file per backend."""

from pallas_kernels.grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
