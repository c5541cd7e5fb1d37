"""TPU kernels, written in Pallas for Mosaic TPU, one file per operation.

They compile for every generation from v5e to tpu7x and agree with the oracles in the interpreter.
None has been run on a TPU yet.
"""
