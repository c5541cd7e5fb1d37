"""Prints the memory and time that loading a Hugging Face folder takes; run as a separate process.

    python tests/model/measure_load.py FOLDER

Prints a JSON object: the size of the variables in MB, by how many MB the process's peak memory
exceeds its memory before loading, and the seconds that loading took.
"""

import json
import pathlib
import re
import sys
import time

import jax

import model


def main(folder: str) -> None:
  # Not getrusage's maximum, which a process inherits from the one that started it.
  status = lambda field: 1024 * int(re.search(
      rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
  jax.block_until_ready(jax.numpy.zeros(1))  # allocates the runtime's own memory first
  before, started = status("VmRSS"), time.perf_counter()
  _, variables = model.hf.load(folder)
  jax.block_until_ready(variables)
  peak = status("VmHWM")
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  print(json.dumps({"variables_mb": held / 1e6, "grown_mb": (peak - before) / 1e6,
                    "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
  main(sys.argv[1])
