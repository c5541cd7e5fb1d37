"""Prints what loading a Hugging Face folder costs: run as a process of its own.

    python tests/model/measure_load.py FOLDER

Prints a JSON object: MB held by the variables, MB by which the process's peak grew over what it
held before, and seconds.
"""

import json
import pathlib
import re
import sys
import time

import jax

import model


def main(folder: str) -> None:
  # Not getrusage's maximum: a process inherits that from the one that started it.
  status = lambda field: 1024 * int(re.search(
      rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
  jax.block_until_ready(jax.numpy.zeros(1))  # the runtime's own
  before, started = status("VmRSS"), time.perf_counter()
  _, variables = model.hf.load(folder)
  jax.block_until_ready(variables)
  peak = status("VmHWM")
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  print(json.dumps({"variables_mb": held / 1e6, "grown_mb": (peak - before) / 1e6,
                    "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
  main(sys.argv[1])
