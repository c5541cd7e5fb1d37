"""Kernels for Hopper in Pallas' Mosaic GPU, one file per operation."""
