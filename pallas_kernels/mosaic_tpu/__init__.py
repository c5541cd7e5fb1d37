"""Kernels for TPUs in Pallas' Mosaic TPU, one file per operation.

They compile for every chip from v5e to tpu7x, and agree with the oracles in the interpreter; none
has run on a TPU yet.
"""
