"""Kernels for Hopper GPUs, written in Pallas' Mosaic GPU, one file per operation.

`fp8_kernel` explains the constructs and the protocol that the other kernels share with it.
"""
