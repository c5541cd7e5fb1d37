"""Saves checkpoints in processes that are killed or run out of space; for test_checkpoint.py.

    python tests/train/saves.py killed FOLDER   # one process per moment, in FOLDER/<moment>
    python tests/train/saves.py full FOLDER     # FOLDER's file system fits a small checkpoint only
    python tests/train/saves.py limited FOLDER  # the same with a limit on file sizes (RLIMIT_FSIZE)
    python tests/train/saves.py sharded FOLDER  # arrays sharded over eight simulated devices
"""

import json
import os
import pathlib
import random
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from train.checkpoint import CheckpointError, Checkpoints
from train.mesh import make_mesh

# Moments of a save at which the process kills itself: the audit event that Python raises then, and
# a part of the event's first argument.
PINNED = {
    "arrays_created": ("os.mkdir", "arrays"),
    "orbax_done": ("open", "_METADATA"),
    "manifest_begun": ("open", "manifest.json.tmp"),
    "manifest_written": ("os.rename", "manifest.json.tmp"),
    "before_commit": ("os.rename", "tmp.step_00000004"),
    "committed": ("os.rename", "step_00000002"),
    "while_deleting_the_oldest": ("os.remove", "manifest"),
}
RANDOM = [f"random_{i}" for i in range(4)]


def state(step):
  return {"w": jnp.full((300, 400), step, jnp.float32), "m": jnp.full(50_000, step, jnp.bfloat16)}


def killer(event, part):
  def hook(name, args):
    if name == event and part in str(args[0]):
      os.kill(os.getpid(), signal.SIGKILL)

  return hook


def save_forever(folder, moment):
  """Saves until killed, and logs each step once `wait` has returned, which means it is committed.

  A process that never reaches its pinned moment exits after nine steps, which fails in `killed`.
  """
  log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  checkpoints = Checkpoints(folder / "checkpoints", keep=2)
  for step in range(1, 10 if moment in PINNED else 10_000):
    if step == 4 and moment in PINNED:
      sys.addaudithook(killer(*PINNED[moment]))
    checkpoints.save(step, state(step), {"position": step * 10})
    checkpoints.wait()
    os.write(log, f"{step}\n".encode())
  os._exit(0)


def killed(folder):
  rng = random.Random(time.time_ns())
  children = {}
  for moment in [*PINNED, *RANDOM]:
    (folder / moment).mkdir()
    children[moment] = os.fork()  # before JAX starts threads; a fork also saves the imports
    if not children[moment]:
      save_forever(folder / moment, moment)
  for moment in RANDOM:
    log = folder / moment / "log"
    while not log.exists() or not log.stat().st_size:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(children[moment], signal.SIGKILL)
  for moment, child in children.items():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment


def full(folder):
  checkpoints = Checkpoints(folder / "checkpoints", keep=1)
  checkpoints.save(1, state(1), {})
  checkpoints.wait()
  # Random values, since repeated ones are compressed to almost nothing.
  large = {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}
  checkpoints.save(2, large, {})
  try:
    checkpoints.wait()
    message = None
  except CheckpointError as error:
    message = str(error)
  restored = checkpoints.restore(jax.eval_shape(lambda: state(0)))
  checkpoints.save(2, state(2), {})
  checkpoints.close()
  left = sorted(path.name for path in (folder / "checkpoints").iterdir())
  print(json.dumps({
      "message": message, "left": left, "restored": restored.step,
      "intact": bool((restored.arrays["w"] == 1).all())}))


def limited(folder):
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
  full(folder)


def sharded(folder):
  x_BD = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  mesh = make_mesh(data=2, fsdp=4)
  split = NamedSharding(mesh, PartitionSpec("fsdp", "data"))
  saved = {"split": jax.device_put(x_BD, split),
           "replicated": jax.device_put(x_BD, NamedSharding(mesh, PartitionSpec()))}
  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(1, saved, {})
  targets = {"as saved": split, "another mesh": NamedSharding(
      make_mesh(fsdp=8), PartitionSpec(None, "fsdp")), "none": None}
  result = {}
  for name, sharding in targets.items():
    abstract = {key: jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype, sharding=sharding)
                for key in saved}
    arrays = checkpoints.restore(abstract).arrays
    result[name] = {
        "exact": all(np.array_equal(array, x_BD) for array in arrays.values()),
        "placed": all(array.sharding == sharding if sharding else len(array.devices()) == 1
                      for array in arrays.values())}
  print(json.dumps(result))


if __name__ == "__main__":
  globals()[sys.argv[1]](pathlib.Path(sys.argv[2]))
