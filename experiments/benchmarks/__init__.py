"""Benchmarks: contenders that alternate on one machine, ours beside other libraries'."""
