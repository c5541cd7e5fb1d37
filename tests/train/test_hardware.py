"""Memory that is freed goes back to the system, even where malloc was told to keep it."""

import os
import platform
import subprocess
import sys

import pytest

FREES = """
import numpy as np
from train import hardware
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
arrays = [np.ones(100_000) for _ in range(500)]
last = np.ones(1000)  # above them, so that malloc cannot shrink its heap
before = resident()
del arrays
kept = resident()
hardware.release_freed_memory()
print(before - kept, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_released():
  tunables = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
  done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True,
                        env=os.environ | {"GLIBC_TUNABLES": tunables, "JAX_PLATFORMS": "cpu"})
  by_itself, released = map(int, done.stdout.split())
  assert by_itself < 1e8 and released > 3e8
