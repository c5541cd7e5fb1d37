"""Benchmarks of this project's speed, memory and numerical error, against other libraries."""
