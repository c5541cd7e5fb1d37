"""Where a result comes from: command, code, versions and hardware.

The code is identified by a hash of the product's own sources, which can also be computed in a copy
without git, and by the commit if there is one.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence

import jax

from train.run_folder import write_json_atomic

PRODUCT = ("pallas_kernels", "model", "train", "rl", "experiments")
_ROOT = pathlib.Path(__file__).parents[2]
_SOURCES = (".py", ".json")  # Python files, and tables that they read
_MERGED = ("commit", "dirty", "sources", "versions", "xla_flags", "device", "cpu", "cores")


@functools.cache
def sources_hash(root: pathlib.Path = _ROOT) -> str:
  """Returns 16 hexadecimal digits of a SHA-256 of the product's source files, paths included.

  Committed results are data and are left out.
  """
  digest = hashlib.sha256()
  for package in PRODUCT:
    for path in sorted((root / package).rglob("*")):
      relative = path.relative_to(root)
      if path.suffix in _SOURCES and "results" not in relative.parts:
        digest.update(f"{relative.as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
  return digest.hexdigest()[:16]


def describe() -> dict:
  """Returns the provenance of a result that this process makes, as a JSON object."""
  packages = ("jax", "jaxlib", "flax", "numpy")
  status = _git("status", "--porcelain", "--untracked-files=no")
  peer = sys.modules.get("torch")
  return {
      "command": shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]),
      "commit": _git("rev-parse", "HEAD"),
      "dirty": None if status is None else bool(status),
      "sources": sources_hash(),
      "versions": {"python": platform.python_version()} | {
          name: importlib.metadata.version(name) for name in packages} | (
              {"torch": str(peer.__version__)} if peer else {}),
      "xla_flags": os.environ.get("XLA_FLAGS") or None,
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "cpu": _cpu(), "cores": os.cpu_count(),
  }


def merged(parts: Sequence[dict]) -> dict:
  """Returns the provenance of a result made of several parts: their values where they agree.

  Where the parts differ, all of their values are listed. The command is that of this process, which
  merges the parts.
  """
  found = describe()
  for key in _MERGED:
    values = [part.get(key) for part in parts]
    if values:
      distinct = [value for i, value in enumerate(values) if value not in values[:i]]
      found[key] = distinct[0] if len(distinct) == 1 else {"several": distinct}
  return found


def record(folder: pathlib.Path, result: dict) -> pathlib.Path:
  """Writes a benchmark's results.json, with its provenance first; returns the path."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json_atomic(folder / "results.json", describe() | result)
  return folder / "results.json"


def _git(*args: str) -> str | None:
  done = subprocess.run(["git", "-C", str(_ROOT), *args], capture_output=True, text=True)
  return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()
