"""Where a result comes from: commit, command, versions and hardware."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax

from train.run_folder import write_json_atomic

_ROOT = pathlib.Path(__file__).parent.parent


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


def record(folder: pathlib.Path, result: dict) -> pathlib.Path:
  """Writes a benchmark's results.json, headed by `describe`; returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json_atomic(folder / "results.json", describe() | result)
  return folder / "results.json"


def describe() -> dict:
  """A JSON object for the head of a result."""
  packages = ("jax", "jaxlib", "flax", "numpy")
  status = _git("status", "--porcelain", "--untracked-files=no")
  peer = sys.modules.get("torch")
  return {
      "command": shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]),
      "commit": _git("rev-parse", "HEAD"),
      "dirty": None if status is None else bool(status),
      "versions": {"python": platform.python_version()} | {
          name: importlib.metadata.version(name) for name in packages} | (
              {"torch": str(peer.__version__)} if peer else {}),
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "cpu": _cpu(), "cores": os.cpu_count(),
  }
